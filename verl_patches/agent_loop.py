"""From a dataset row to a rollout: veRL's agent loop for a prompt that follows a cartridge.

veRL's own single-turn loop adds a generation prompt after every conversation, lets the template
inject a system prompt and truncates from the left. A prompt here may end in a started assistant
answer, has no system prompt and no begin-of-text token, and is refused when it is too long.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import ray
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.profiler import simple_timer

from cartridge_distill.errors import ConfigError
from cartridge_distill.prompts import render_prompt

AGENT_NAME = "cartridge_agent"
_ERRORS_KEPT = 3


@register(AGENT_NAME)
class CartridgeAgentLoop(AgentLoopBase):
    """One prompt, one completion, token in and token out."""

    def __init__(self, trainer_config: Any, server_manager: Any, tokenizer: Any, **_: Any) -> None:
        # veRL makes one of these for each sample. Its own __init__ builds a token builder with
        # parsers each time, which is most of a short rollout's cost here and is not needed.
        self.rollout_config = trainer_config.config.actor_rollout_ref.rollout
        self.server_manager = server_manager
        self.tokenizer = tokenizer

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Renders ``raw_prompt`` and asks the rollout server.

        Raises:
            ConfigError: the prompt is over ``rollout.prompt_length``; it is never truncated.
        """
        prompt_ids = render_prompt(self.tokenizer, list(kwargs["raw_prompt"]))
        limit = self.rollout_config.prompt_length
        if len(prompt_ids) > limit:
            raise ConfigError(
                f"prompt of {len(prompt_ids)} tokens is over data.max_prompt_length={limit} "
                f"(row {kwargs.get('index')}); raise it or shorten the prompt"
            )
        metrics: dict[str, Any] = {}
        with simple_timer("generate_sequences", metrics):
            output = await self.server_manager.generate(
                request_id=uuid4().hex, prompt_ids=prompt_ids, sampling_params=sampling_params
            )
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=output.token_ids,
            response_mask=[1] * len(output.token_ids),
            response_logprobs=output.log_probs,
            num_turns=2,
            metrics=metrics,
            extra_fields=output.extra_fields,
        )


class _CartridgeAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """veRL's worker; remembers why prompts failed, and computes no reward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._errors: list[str] = []

    async def _run_agent_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._run_agent_loop(*args, **kwargs)
        except Exception as error:
            # veRL logs it and marks the prompt as failed; the trainer then asks for the cause.
            if len(self._errors) < _ERRORS_KEPT:
                self._errors.append(f"{type(error).__name__}: {error}")
            raise

    def take_errors(self) -> list[str]:
        """The first causes since the last call."""
        errors, self._errors = self._errors, []
        return errors

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        """Distillation has no reward; none is made up to satisfy the trainer."""


class CartridgeAgentLoopManager(AgentLoopManagerTQ):
    """``rollout.agent.agent_loop_manager_class``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(_CartridgeAgentLoopWorker)
