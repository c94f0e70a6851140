"""From a dataset row to a rollout: veRL's agent loop for a prompt that follows a cartridge.

veRL's own single-turn loop adds a generation prompt after every conversation, lets the template
inject a system prompt and truncates from the left. A prompt here may end in a started assistant
answer, has no system prompt and no begin-of-text token, and is refused when it is too long.

The student answers, or the teacher, as the trainer planned it. Either way the sample
is the prompt and the answer, without the document. Each rollout has a seed of its own, so that one
whose answer was lost is drawn again and not anew, where the server takes seeds.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, ClassVar
from uuid import uuid4

import ray
from ray.exceptions import RayActorError
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.profiler import simple_timer

from cartridge_distill.distill.mixing import rollout_seed
from cartridge_distill.distill.on_policy import OLDEST_STEP, ONLY_STEP, oldest_step
from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.util.errors import ConfigError, ProcessDied
from verl_patches.rollout.ray_errors import kind_and_message, why
from verl_patches.rollout.teacher import EPOCH, PLAN, RolloutTeacher, rollout_teacher
from verl_patches.rollout.tokasaurus_rollout.direct import DirectClient
from verl_patches.rollout.tokasaurus_rollout.replica import proxies_of

AGENT_NAME = "cartridge_agent"
_ERRORS_KEPT = 3


@register(AGENT_NAME)
class CartridgeAgentLoop(AgentLoopBase):
    """One prompt, one completion, token in and token out."""

    # Of the worker's process: veRL makes a loop for each sample, documents are read once.
    teacher: ClassVar[RolloutTeacher | None] = None

    def __init__(self, trainer_config: Any, server_manager: Any, tokenizer: Any, **_: Any) -> None:
        # veRL makes one of these for each sample. Its own __init__ builds a token builder with
        # parsers each time, which is most of a short rollout's cost here and is not needed.
        self._config = trainer_config.config
        self.rollout_config = trainer_config.config.actor_rollout_ref.rollout
        self.server_manager = server_manager
        self.tokenizer = tokenizer

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Renders ``raw_prompt`` and asks the rollout server.

        Raises:
            ConfigError: the prompt is over ``rollout.prompt_length``; it is never truncated.
            DocumentError: the teacher is to answer, and the document is missing or too long.
        """
        prompt_ids = render_prompt(self.tokenizer, list(kwargs["raw_prompt"]))
        limit = self.rollout_config.prompt_length
        if len(prompt_ids) > limit:
            raise ConfigError(
                f"prompt of {len(prompt_ids)} tokens is over data.max_prompt_length={limit} "
                f"(row {kwargs.get('index')}); fix: raise it or shorten the prompt"
            )
        metrics: dict[str, Any] = {}
        by_student = PLAN not in kwargs or bool(kwargs[PLAN][kwargs["session_id"]])
        with simple_timer("generate_sequences", metrics):
            if by_student:
                output = await self.server_manager.generate(
                    request_id=uuid4().hex,
                    prompt_ids=prompt_ids,
                    sampling_params=sampling_params | self._seed(kwargs) | self._version(kwargs),
                )
                tokens, logprobs = output.token_ids, output.log_probs
                labels = output.extra_fields
            else:
                assert self.teacher is not None  # made wherever a plan can name it
                answer, labels = await self.teacher.write(
                    self.server_manager, prompt_ids, kwargs, uuid4().hex
                )
                tokens, logprobs = answer.token_ids, answer.logprobs
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=tokens,
            response_mask=[1] * len(tokens),
            response_logprobs=logprobs,
            num_turns=2,
            metrics=metrics,
            extra_fields=labels,
        )

    def _seed(self, sample: dict[str, Any]) -> dict[str, int]:
        """The rollout's own; none for a prompt that is of no batch of the trainer's."""
        if EPOCH not in sample:
            return {}
        row, epoch = int(sample["index"]), int(sample[EPOCH])
        choice = int(sample["session_id"])
        return {"seed": rollout_seed(self._config.data.seed, row, epoch, choice)}

    def _version(self, sample: dict[str, Any]) -> dict[str, int]:
        """Which version may answer a prompt of a batch of the trainer's."""
        if EPOCH not in sample or "global_steps" not in sample:
            return {}
        ahead = self._config.actor_rollout_ref.actor.cartridge.async_steps
        name = OLDEST_STEP if ahead else ONLY_STEP
        return {name: oldest_step(int(sample["global_steps"]), ahead)}


class _CartridgeAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """veRL's worker; asks the servers itself, remembers why prompts failed, computes no reward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._errors: list[str] = []
        replicas = self.config.trainer.nnodes * self.config.trainer.n_gpus_per_node
        self.llm_client = DirectClient(partial(proxies_of, replicas), self.tokenizer)
        CartridgeAgentLoop.teacher = rollout_teacher(self.config, self.model_config)

    async def _run_agent_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._run_agent_loop(*args, **kwargs)
        except Exception as error:
            # veRL logs it and marks the prompt as failed; the trainer then asks for the cause.
            if len(self._errors) < _ERRORS_KEPT:
                self._errors.append(kind_and_message(error))
            raise

    def connect(self, teacher_client: Any, reward_handles: Any) -> None:
        """What was not there yet when the worker began. The servers it finds by itself."""
        self.teacher_client = teacher_client
        self.reward_loop_worker_handles = reward_handles

    def take_errors(self) -> list[str]:
        """The first causes since the last call."""
        errors, self._errors = self._errors, []
        return errors

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        """Distillation has no reward; none is made up to satisfy the trainer."""


class CartridgeAgentLoopManager(AgentLoopManagerTQ):
    """``rollout.agent.agent_loop_manager_class``."""

    _begun: ClassVar[list[Any] | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(_CartridgeAgentLoopWorker)

    @classmethod
    def begin(cls, config: Any) -> None:
        """Starts the workers, which import and read the tokenizer while the trainer's model loads.

        veRL makes them when all else is there. The manager that it makes then takes these.
        """
        if config.actor_rollout_ref.rollout.trace.get("token2text", False):
            return  # a worker then asks its client as it begins
        manager = cls(config, None)
        asyncio.run(super(CartridgeAgentLoopManager, manager)._init_agent_loop_workers())
        CartridgeAgentLoopManager._begun = manager.agent_loop_workers

    async def _init_agent_loop_workers(self) -> None:
        begun, CartridgeAgentLoopManager._begun = CartridgeAgentLoopManager._begun, None
        if begun is None:
            await super()._init_agent_loop_workers()
            return
        self.agent_loop_workers = begun
        clients = self.teacher_client, self.reward_loop_worker_handles
        try:
            await asyncio.gather(*(worker.connect.remote(*clients) for worker in begun))
        except RayActorError as error:
            if (reason := why(error)) is None:
                raise
            raise ProcessDied(
                f"an agent loop worker died while the run was starting ({reason}); fix: start the "
                "same command again"
            ) from error


def begin_workers(config: Any) -> None:
    """:meth:`CartridgeAgentLoopManager.begin`, where that is the manager of the configuration."""
    name = config.actor_rollout_ref.rollout.agent.agent_loop_manager_class
    manager = load_class_from_fqn(name, "AgentLoopManager") if name else None
    if manager is not None and issubclass(manager, CartridgeAgentLoopManager):
        manager.begin(config)
