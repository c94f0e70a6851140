"""veRL's actor and rollout worker, with one method more."""

from __future__ import annotations

from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker


class CartridgeWorker(ActorRolloutRefWorker):
    """Reaches the engine's validation from the trainer."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def validate_cartridge(self) -> dict[str, float]:
        """The same numbers from every rank; see ``CartridgeEngine.validate``."""
        scores: dict[str, float] = self.actor.engine.validate()
        return scores
