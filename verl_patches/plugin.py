"""What ``VERL_USE_EXTERNAL_MODULES=verl_patches.plugin`` loads into every veRL process.

The CPU platform, which must be known before veRL first asks which device there is, and the filter
that keeps credentials out of logs. The engine, the trainer, the rollout and the agent loop are
imported by the patched registries when their names are asked for, so ``import verl`` stays as quick
as it was.
"""

import verl_patches.platform.cpu  # noqa: F401  (registers itself)
from cartridge_distill.util.clean_logs import hide_secrets_in_logs

hide_secrets_in_logs()
