"""How much memory a training step takes at most, computed before it runs.

One step is: student forward, reading of a document that is new, teacher forward, loss, backward,
optimizer. :func:`predict_step` adds up, for each of these stages, what is in use at its worst
moment; the largest stage is the step's peak. Every term is a product of lengths, below in the
letters of this project: T tokens of the packed row, P of the cartridge, N trained tokens, D of a
document, L layers, h width, Hq and H heads, d head size, m numbers that gate and up of the MLP put
out, V vocabulary, b bytes of the model's dtype.

Held all the time:

- weights: ``b * parameters``. Over several ranks a part each, and whole: two layers and what
  belongs to no layer (FSDP gathers a layer, and the next one meanwhile). Not checked on a GPU.
- cartridge, its gradient and AdamW's two moments: ``4 * 2LHd`` bytes a token each, float32.
- documents' KV: ``b * 2LHd`` bytes a token of each that the teacher keeps.
- prompts' KV, ``grouped`` alone: all that the setting allows, from the teacher's first forward on.

Kept by the student's forward for the backward, a layer, with frozen weights (a linear layer keeps
no input then):

- norms: a float32 copy of each norm's input, ``4Th``; of queries and keys where they have norms.
- MLP: what gate and up put out and the activation, ``1.5 * bTm`` (``bTm`` without a gate).
- attention, ``flex``: queries and result ``2bTHqd``, keys and values of prefix and row
  ``2b(P+T)Hd``, one float32 a query and head. ``grouped`` keeps the attention weights besides, for
  each head, query and visible key; ``dense``, and ``grouped`` where there are soft caps, a float32
  of each and a copy in another dtype. Layers whose window is narrower than what is there do so,
  too, which is not counted.
- with gradient checkpointing a layer keeps its input alone, ``bTh``; one layer's worth of the above
  comes back in the backward, and the joined float32 cartridge stays until then.

Passing, whichever is larger in a stage: within a layer the MLP (``1.5 * bTm``) or attention with
its keys and values; ``[N, V]`` logits of student and teacher; the loss' float32 rows, 512 at once;
the KV of a document's piece before it is copied to its place.

What is not in it: the CUDA context and cuBLAS' workspace, unusable fragments of the allocator,
other processes on the device. Nothing of it was compared with a GPU yet. It is compared with the
storages that torch really makes, shapes on ``meta`` with a stand-in for compiled FlexAttention, in
``tests/distill/test_memory_plan.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cartridge_distill.distill.step_shape import StepShape
from cartridge_distill.model.blocks import BLOCK, LEAST_ROW
from cartridge_distill.model.logprobs import ROWS_AT_ONCE
from cartridge_distill.model.prefill import PREFILL_TOKENS
from cartridge_distill.model.shape import DecoderShape
from cartridge_distill.util.errors import ConfigError

_GIB = 1024**3
_FLOAT = 4

_NAMES = {
    "row_tokens": "tokens a row",
    "gradient_checkpointing": "gradient checkpointing",
    "documents_kept": "documents kept",
    "prompts_kept_mib": "MiB of prompts kept",
    "cartridge_tokens": "cartridge tokens",
}


Terms = dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """What a step takes, in bytes.

    Attributes:
        model, step: what was asked about.
        stages: for each stage its terms at its worst moment, by name.
    """

    model: DecoderShape
    step: StepShape
    stages: dict[str, Terms]

    @property
    def peak_stage(self) -> str:
        """The stage that takes most."""
        return max(self.stages, key=self.of_stage)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the step."""
        return self.of_stage(self.peak_stage)

    def of_stage(self, stage: str) -> int:
        """Bytes at the worst moment of a stage."""
        return sum(self.stages[stage].values())

    def line(self) -> str:
        """The prediction in one line."""
        terms = sorted(self.stages[self.peak_stage].items(), key=lambda term: -term[1])[:3]
        largest = ", ".join(f"{name} {_gib(size)}" for name, size in terms)
        return f"a step takes at most {_gib(self.peak)} (in {self.peak_stage}: {largest})"

    def describe(self) -> str:
        """A table: the terms of the worst stage, largest first, then every stage's sum."""
        rows = sorted(self.stages[self.peak_stage].items(), key=lambda term: -term[1])
        lines = [f"worst moment: {self.peak_stage}"]
        lines += [f"  {name:<44}{_gib(size):>12}" for name, size in rows if size]
        lines += [f"  {'together':<44}{_gib(self.peak):>12}", "at most in each stage"]
        lines += [f"  {stage:<44}{_gib(self.of_stage(stage)):>12}" for stage in self.stages]
        return "\n".join(lines)

    def advice(self, names: Mapping[str, str] | None = None) -> list[str]:
        """Settings that make the peak smaller, the most helpful first; empty when none does.

        Args:
            names: what the caller's users call the fields of :class:`StepShape`.
        """
        called = {**_NAMES, **(names or {})}
        step = self.step
        tries: list[tuple[str, object, StepShape]] = []
        if not step.gradient_checkpointing:
            tries.append(
                ("gradient_checkpointing", True, replace(step, gradient_checkpointing=True))
            )
        half = max(step.row_tokens // 2, step.sequence_tokens or 1)
        if half < step.row_tokens:
            trained = None if step.trained_tokens is None else min(half, step.trained_tokens)
            if trained is not None:
                trained = max(1, trained * half // step.row_tokens)
            tries.append(
                ("row_tokens", half, replace(step, row_tokens=half, trained_tokens=trained))
            )
        if min(step.documents_kept, step.documents) > 1:
            tries.append(("documents_kept", 1, replace(step, documents_kept=1)))
        if _prompts(self.model, step):
            tries.append(("prompts_kept_mib", 0, replace(step, prompts_kept_mib=0)))
        if step.cartridge_tokens > 1:
            fewer = step.cartridge_tokens // 2
            tries.append(("cartridge_tokens", fewer, replace(step, cartridge_tokens=fewer)))
        found = []
        for field, value, other in tries:
            saved = self.peak - predict_step(self.model, other).peak
            if saved > 0:
                was = getattr(step, field)
                found.append((saved, f"{called[field]} {was} -> {value}: {_gib(saved)} less"))
        return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def predict_step(model: DecoderShape, step: StepShape) -> MemoryPlan:
    """The memory of one step; the module's docstring has the formulas."""
    size = step.dtype.itemsize
    row = _row(step, step.row_tokens)
    held = _held(model, step)
    logits = size * step.trained * model.vocabulary
    float_rows = _FLOAT * min(ROWS_AT_ONCE, step.trained) * model.vocabulary
    made = 0 if size == _FLOAT else float_rows  # what is float32 already is not copied
    joined = _FLOAT * model.kv_numbers * step.cartridge_tokens
    gradient = joined
    early_gradient = gradient if step.micro_batches > 1 else 0
    # A soft cap keeps its tanh beside the logits.
    of_student = logits * (2 if model.capped_logits else 1)
    top = step.trained * step.topk * (8 + _FLOAT)
    layer = _kept_by_layer(model, step, row)
    kept = _kept(model, step, row, layer)
    piece = min(PREFILL_TOKENS, step.document_tokens)
    before = step.document_tokens - piece

    # A document that is new is there before the oldest goes.
    more = step.documents > step.documents_kept
    new_document = size * model.kv_numbers * step.document_tokens if more else 0

    def stage(**terms: int) -> Terms:
        return {**held, **{name.replace("_", " "): value for name, value in terms.items()}}

    return MemoryPlan(
        model,
        step,
        {
            "student forward": stage(
                **kept,
                cartridge_joined_in_float32=joined,
                cartridge_gradient=early_gradient,
                student_logits_or_a_layer=max(
                    of_student, _passing(model, step, row, step.cartridge_tokens, False)
                ),
            ),
            "document": stage(
                new_document_KV=new_document,
                **_without_passing(kept, step, joined),
                cartridge_gradient=early_gradient,
                student_logits=of_student,
                document_piece_KV=size * model.kv_numbers * piece,
                a_layer_of_the_document=_passing(model, step, _row(step, piece), before, True),
            ),
            "teacher forward": stage(
                **_without_passing(kept, step, joined),
                cartridge_gradient=early_gradient,
                student_logits=of_student,
                teacher_logits_or_a_layer=max(
                    of_student,
                    logits + float_rows + made,
                    _passing(model, step, row, step.document_tokens, True),
                ),
            ),
            "loss": stage(
                **_without_passing(kept, step, joined),
                cartridge_gradient=early_gradient,
                student_logits=of_student,
                teacher_top_k=top,
                loss_rows_in_float32=2 * float_rows + made,
            ),
            "backward": stage(
                **_without_passing(kept, step, joined),
                cartridge_gradient=gradient,
                **_backward(
                    model, step, row, layer, of_student, logits, 2 * float_rows + made, top
                ),
            ),
            "optimizer": stage(cartridge_gradient=gradient, AdamW_passing=2 * gradient),
        },
    )


def _held(model: DecoderShape, step: StepShape) -> Terms:
    """In use from the first step to the last."""
    size, ranks = step.dtype.itemsize, step.ranks
    weights = model.parameters
    if ranks > 1:
        outside = model.parameters - model.layers * model.layer_parameters
        weights = -(-model.parameters // ranks) + 2 * model.layer_parameters + outside
    documents = min(step.documents, step.documents_kept)
    cartridge = _FLOAT * model.kv_numbers * step.cartridge_tokens
    return {
        "weights": size * weights,
        "cartridge in float32": cartridge,
        "AdamW's moments": 2 * cartridge,
        "documents' KV": size * model.kv_numbers * step.document_tokens * documents,
        "prompts' KV": _prompts(model, step),
    }


def _prompts(model: DecoderShape, step: StepShape) -> int:
    """As many whole tokens as there is room for."""
    if step.backend != "grouped":
        return 0
    token = step.dtype.itemsize * model.kv_numbers
    return (step.prompts_kept_mib * 2**20) // token * token


def _row(step: StepShape, tokens: int) -> int:
    """Tokens that are really computed."""
    if step.backend != "flex":
        return tokens
    return max(LEAST_ROW, -(-tokens // BLOCK) * BLOCK)


def _seen(step: StepShape, row: int, prefix: int) -> int:
    """Attention weights of one head, in numbers."""
    own = row if step.backend == "dense" else min(row, step.longest)
    return row * (prefix + own)


def _kept_by_layer(model: DecoderShape, step: StepShape, row: int) -> Terms:
    """For the backward, by one layer."""
    size = step.dtype.itemsize
    queries, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    norms = _FLOAT * row * model.norms * model.hidden
    if model.head_norms:
        norms += _FLOAT * row * (queries + kv)
    mlp = size * row * (model.mlp * 3 // 2 if model.gated else model.mlp)
    attention = 2 * size * row * queries
    keys = step.cartridge_tokens + row
    if step.backend == "flex":
        keys = _row(step, step.cartridge_tokens) + row
        attention += _FLOAT * row * model.heads
    else:
        seen = model.heads * _seen(step, row, step.cartridge_tokens)
        if step.backend == "grouped" and not model.capped_logits:
            attention += size * seen  # what the merged attention's backward is given
        else:
            # Softmax' float32 result, and the copy that the product with the values is given.
            attention += (_FLOAT if size == _FLOAT else _FLOAT + size) * seen
    attention += 2 * size * keys * kv
    return {"norms": norms, "MLP": mlp, "attention": attention}


def _kept(model: DecoderShape, step: StepShape, row: int, layer: Terms) -> Terms:
    """For the backward, by all layers."""
    if step.gradient_checkpointing:
        inputs = model.layers * step.dtype.itemsize * row * model.hidden
        return {"kept_by_layers:_inputs": inputs + _FLOAT * row * model.hidden}
    return {f"kept_by_layers:_{name}": model.layers * size for name, size in layer.items()}


def _without_passing(kept: Terms, step: StepShape, joined: int) -> Terms:
    """What is left of it when the student's forward is over."""
    if step.gradient_checkpointing:
        return {**kept, "cartridge_joined_in_float32": joined}
    return kept


def _passing(model: DecoderShape, step: StepShape, row: int, prefix: int, frozen: bool) -> int:
    """Most that one layer has in use in a forward and does not keep."""
    size = step.dtype.itemsize
    queries, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    streams = 2 * size * row * model.hidden  # the residual, and what the norm made of it
    # The activation, up and their product; or what went in and what came out.
    mlp = size * row * (model.mlp * 3 // 2 if model.gated else 2 * model.mlp)
    keys = 2 * size * (prefix + row) * kv
    attention = size * row * 2 * (queries + kv) + keys
    if step.backend != "flex":
        attention += (
            (2 * _FLOAT + size)
            * model.heads
            * min(_seen(step, row, prefix), 32 * 1024 * 1024 // model.heads if frozen else 2**62)
        )
    norm = 2 * _FLOAT * row * model.hidden
    if not frozen:
        # What is kept is counted already: of the MLP the product is left.
        mlp, attention = size * row * model.mlp // 2, size * row * 2 * (queries + kv)
    return streams + max(mlp, attention, norm)


def _backward(
    model: DecoderShape,
    step: StepShape,
    row: int,
    layer: Terms,
    of_student: int,
    logits: int,
    float_rows: int,
    top: int,
) -> Terms:
    """The worse of its two moments: the loss' own, with logits, or a layer's."""
    size = step.dtype.itemsize
    in_layer = size * row * (2 * model.hidden + model.mlp * 3 // 2)
    if step.gradient_checkpointing:
        in_layer += sum(layer.values())
    if of_student + logits + float_rows + top >= in_layer:
        return {
            "student_logits": of_student,
            "gradient_of_the_logits": logits,
            "loss_rows_in_float32": float_rows,
            "teacher_top_k": top,
        }
    return {"a_layer's_gradients": in_layer}


def check_fits(plan: MemoryPlan, free_bytes: int, names: Mapping[str, str] | None = None) -> None:
    """Refuses a step that cannot fit.

    Args:
        free_bytes: what the device has for this process, what it holds already included.
        names: what the caller's users call the fields of :class:`StepShape`.

    Raises:
        ConfigError: the prediction is over it; with the settings that make it smaller.
    """
    if plan.peak <= free_bytes:
        return
    advice = plan.advice(names)
    fixes = "; ".join(advice) if advice else "use a smaller model or a device with more memory"
    raise ConfigError(
        f"{plan.line()}, and the device has {_gib(free_bytes)} for it; fix: what makes it smaller: "
        f"{fixes}"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
