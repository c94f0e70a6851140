"""All of veRL's settings as a run has them, composed by Hydra before veRL is started."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.pasting import hydra_value
from verl_patches.launching.command import overrides
from verl_patches.launching.settings import CONFIG_FOLDER, CONFIG_NAME, Run
from verl_patches.manage import find_tree

if TYPE_CHECKING:
    from omegaconf import DictConfig


@cache
def configuration(run: Run) -> DictConfig:
    """The settings, the run's own overrides among them. They are not to be changed.

    Raises:
        ConfigError: Hydra does not take them; its reason is in the message.
        PatchError: no veRL is there.
    """
    # Imported here: --help needs none of them.
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    theirs = find_tree().root / "verl" / "trainer" / "config"
    search = f"hydra.searchpath=[{hydra_value(f'file://{theirs}')}]"
    before: Any = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            return compose(CONFIG_NAME, overrides=[search, *overrides(run)])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"veRL's settings cannot be read: {error}") from error
    finally:
        GlobalHydra.instance().hydra = before
