"""What describes one run of a study.

:class:`CartridgeSettings` and :class:`OptimSettings` have the names and defaults of veRL's settings
of the same kind (a test compares them), so that the engine's own pieces read them and a checkpoint
says the same of itself. What a plain loop cannot do has no field: several ranks, a sync.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from cartridge_distill.distill.config import cartridge_problems
from cartridge_distill.distill.rates import warmed_and_decayed
from cartridge_distill.util.errors import ConfigError, require_counts


@dataclass(frozen=True)
class CartridgeSettings:
    """``actor_rollout_ref.actor.cartridge`` of a run; docs/configuration.md has the fields."""

    num_tokens: int = 2048
    num_frozen_tokens: int = 1
    lr: float = 0.02
    lr_decay_to: float | None = None
    init: str = "text"
    init_document: str | None = None
    checkpoint_path: str | None = None
    documents: str | None = None
    document_key: str = "document_id"
    loss: str = "forward_kl_topk"
    loss_weight: float | None = None
    skip_first_tokens: int = 0
    max_token_loss: float | None = None
    topk: int = 20
    kl_temperature: float = 1.0
    attention: str = "auto"
    teacher_cache_documents: int = 8
    teacher_cache_prompt_mib: int = 256
    max_logprob_diff: float | None = 1e-3
    max_staleness: int = 0
    on_policy_fraction: Any = 1.0
    teacher_temperature: float | None = None
    teacher_cache: str | None = None
    transport: str = "shared_dir"
    sync_keep: int = 2
    sync_dtype: str = "auto"
    run_name: str | None = None
    seed: int = 0
    async_steps: int = 0
    async_check_fraction: float = 0.25
    # A plain loop validates nothing; the checks want to read that.
    eval_own_text_tokens: ClassVar[int] = 0


@dataclass(frozen=True)
class OptimSettings:
    """``actor_rollout_ref.actor.optim`` of a run: AdamW, at a constant rate or straight down."""

    lr_warmup_steps: int = 0
    optimizer: str = "AdamW"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    override_optimizer_config: None = None
    lr_scheduler_type: str = "constant"
    lr_warmup_steps_ratio: float = 0.0
    min_lr_ratio: float | None = None
    num_cycles: float = 0.5
    zero_indexed_step: bool = True


@dataclass(frozen=True)
class RunSettings:
    """One run, less its model, documents and prompts.

    Attributes:
        cartridge, optim: the recipe.
        seed: of the order of the prompts, of who writes and of what is drawn.
        steps: optimizer steps.
        batch: rollouts a step, one a prompt.
        response_tokens: longest rollout.
        temperature: of the rollouts.
        row_tokens: tokens of one packed row; a batch of more is computed in several.
        server_seed: of the engine that writes, as ``serve --seed``; None takes ``seed``.

    Raises:
        ConfigError: every setting that makes no sense, with its fix.
    """

    cartridge: CartridgeSettings
    optim: OptimSettings = field(default_factory=OptimSettings)
    seed: int = 0
    steps: int = 16
    batch: int = 16
    response_tokens: int = 32
    temperature: float = 0.7
    row_tokens: int = 8192
    server_seed: int | None = None

    def __post_init__(self) -> None:
        require_counts(self, "steps", "batch", "response_tokens", "row_tokens")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature}: rollouts are sampled; set above 0")
        problems = cartridge_problems(self.cartridge)
        if self.cartridge.max_staleness != 0:
            problems.append("cartridge.max_staleness: a plain loop takes one step a batch; set 0")
        if self.cartridge.max_logprob_diff is None:
            problems.append("cartridge.max_logprob_diff: a plain loop is float32; set 1e-3")
        if self.optim.lr_warmup_steps < 0:
            problems.append(f"lr_warmup_steps={self.optim.lr_warmup_steps}: set 0 or more")
        elif self.optim.lr_warmup_steps and self.cartridge.lr_decay_to is None:
            problems.append(
                f"lr_warmup_steps={self.optim.lr_warmup_steps} would be ignored at a constant "
                "rate; set lr_decay_to, too (1.0 keeps the rate after the warm-up)"
            )
        if problems:
            raise ConfigError("\n".join(["the run cannot be trained like this:", *problems]))
        self.rate()  # a warm-up as long as the run is refused now

    def rate(self) -> Callable[[int], float]:
        """The factor of the learning rate at each step, from 0."""
        last = self.cartridge.lr_decay_to
        if last is None:
            return lambda step: 1.0
        return warmed_and_decayed(self.optim.lr_warmup_steps, self.steps, last)

    def identity(self) -> dict[str, Any]:
        """What must be the same when the run goes on, as plain values."""
        found = asdict(self)
        for name in ("cartridge", "optim"):
            found |= {f"{name}.{key}": value for key, value in found.pop(name).items()}
        return found | {"optim.betas": list(self.optim.betas)}
