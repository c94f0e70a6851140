"""Norms and gated MLPs of a frozen model on a CPU, with fewer passes over their numbers.

Between its products a layer reads and writes its activations some fifty times. torch's autograd
keeps what each of these steps made. Here a norm and the gate of an MLP are one step each, with the
backward in closed form, in place where nobody else has the tensor. Same numbers up to the order of
roundings.

Which formula a module computes is told by its class. Only classes that were compared are taken
(:data:`NORMS`, :data:`GATED`), and each module's own result decides once more when it is taken:
what differs on a few random numbers keeps its own code, as do other classes, other devices and
weights that are trained.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

NORMS: dict[str, tuple[str, bool]] = {
    **{f"{name}RMSNorm": ("variance_epsilon", False) for name in ("Llama", "Mistral")},
    **{f"{name}RMSNorm": ("variance_epsilon", False) for name in ("Qwen2", "Qwen3")},
    **{f"{name}RMSNorm": ("eps", True) for name in ("Gemma", "Gemma2", "Gemma3")},
}
"""Classes of transformers: the name of their epsilon, and whether they scale by ``1 + weight``."""

GATED = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
"""Classes of transformers that compute ``down(act(gate(x)) * up(x))``."""

SILU = frozenset({"SiLU", "SiLUActivation"})
"""Classes of torch and of transformers; the second's name depends on its version."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the largest number, between a module's own result and the one here."""


class _Norm(torch.autograd.Function):
    """``x / rms(x) * weight``; the gradient is for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        found, scale = _normed(x, weight, eps, plus_one)
        ctx.save_for_backward(x, weight, scale)
        ctx.plus_one = plus_one
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        pulled = grad.to(scale.dtype) * (weight.to(scale.dtype) + ctx.plus_one)
        along = torch.mul(pulled, x).sum(-1, keepdim=True)
        along = along.mul_(scale.pow(3)).div_(x.shape[-1])
        pulled = pulled.mul_(scale).addcmul_(x.to(scale.dtype), along, value=-1)
        return pulled.to(grad.dtype), None, None, None


def _normed(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """The result, and ``1 / rms(x) [..., 1]``, at least in float32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    found = x * scale  # in float32, whatever x is
    if plus_one:
        # Gemma scales before it rounds, the others after.
        return found.mul_(weight.to(exact) + 1).to(x.dtype), scale
    return found.to(x.dtype).mul_(weight), scale


class _Gate(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return to_gate, silu(gate).mul_(grad)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
    )


class _FusedNorm(nn.Module):
    """Comes before a norm's own class."""

    weight: nn.Parameter

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        if others or named or not _is_plain(x, self.weight):
            return cast(Tensor, super().forward(x, *others, **named))
        name, plus_one = NORMS[type(self).__bases__[1].__name__]
        given = x, self.weight, getattr(self, name), plus_one
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Norm.apply(*given))
        return _normed(*given)[0]


class _FusedGate(nn.Module):
    """Comes before a gated MLP's own class."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """``[..., hidden]`` -> ``[..., hidden]``."""
        if others or named or not _is_plain(x, self.gate_proj.weight):
            return cast(Tensor, super().forward(x, *others, **named))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled() and gate.requires_grad:
            return cast(Tensor, self.down_proj(_Gate.apply(gate, up)))
        return cast(Tensor, self.down_proj(silu(gate, inplace=True).mul_(up)))


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(own: type[nn.Module], first: type[nn.Module]) -> type[nn.Module]:
    if own not in _made:
        _made[own] = cast(type[nn.Module], type(f"Fused{own.__name__}", (first, own), {}))
    return _made[own]


def use_fused_layers(model: nn.Module) -> list[str]:
    """Turns a frozen model's norms and gated MLPs into fused ones where they compute the same.

    In place: the modules keep their weights, and their class is a subclass of their own.

    Returns:
        Names of the modules that were taken.
    """
    taken = []
    module: Any
    for name, module in model.named_modules():
        own = type(module)
        if not own.__module__.startswith("transformers.models."):
            continue
        if own.__name__ in NORMS:
            fused, width = _fused_class(own, _FusedNorm), module.weight.shape[-1]
        elif own.__name__ in GATED and type(module.act_fn).__name__ in SILU:
            fused, width = _fused_class(own, _FusedGate), module.gate_proj.in_features
        else:
            continue
        if _agrees(module, fused, int(width)):
            taken.append(name)
    return taken


@torch.no_grad()
def _agrees(module: nn.Module, fused: type[nn.Module], width: int) -> bool:
    """Gives a module the class, and takes it back if the result is another one."""
    weight = next(module.parameters())
    if weight.device.type != "cpu" or weight.dtype not in TOLERANCE:
        return False
    own = type(module)
    # Not torch's own generator: loading a model must not change what is drawn afterwards.
    numbers = torch.linspace(-2.0, 3.0, 2 * width).cos().mul_(torch.linspace(0.5, 2.0, 2 * width))
    x = numbers.view(1, 2, width).to(weight.dtype)
    expected = module(x).float()
    module.__class__ = fused
    error = (module(x).float() - expected).abs().max()
    if not error <= TOLERANCE[weight.dtype] * expected.abs().max():
        module.__class__ = own
        return False
    return True


def use_own_layers(model: nn.Module) -> None:
    """Takes :func:`use_fused_layers` back; for comparing the two."""
    for module in model.modules():
        if isinstance(module, _FusedNorm | _FusedGate):
            module.__class__ = cast(Any, type(module).__bases__[1])
