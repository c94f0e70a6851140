"""The rollout replica ``"tokasaurus"``: an HTTP proxy to a Tokasaurus server with cartridges."""

from verl_patches.rollout.tokasaurus_rollout.adapter import ServerAdapter
from verl_patches.rollout.tokasaurus_rollout.replica import TokasaurusReplica
from verl_patches.rollout.tokasaurus_rollout.server import TokasaurusHttpServer

__all__ = ["ServerAdapter", "TokasaurusHttpServer", "TokasaurusReplica"]
