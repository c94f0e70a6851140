"""A GPU that is not there: which operations make the host wait for it, told with their lines.

On a GPU the host queues kernels and runs ahead. Whatever needs a value on the host (``.item()``,
``bool(tensor)``, ``tolist()``), a size that depends on values (``nonzero``, a boolean mask as an
index) or an upload from ordinary memory makes it wait until the queue is empty. Neither shows on a
CPU. Here a tensor "on the GPU" is a :class:`OnGpu`: its numbers lie in a CPU tensor inside, so the
computation is real, and it says that it lies on the device ``meta``, so that torch takes no short
cut to them. :class:`FakeGpu` notes every operation that would wait, and goes on.

Code of this project sees ``cuda:0`` where it asks for a device, and takes its way for a GPU.
Libraries see ``meta``: a torch built without CUDA cannot run autograd on what says ``cuda``.

What this does not do: time anything, run a kernel of a GPU, or see a wait inside a library's C++
that is none of torch's operations.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

PROJECT = Path(__file__).resolve().parents[1]
CUDA, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
_OURS = ("cartridge_distill", "verl_patches", "training", "benchmarks")
_DEVICE_OF = Tensor.device.__get__  # type: ignore[attr-defined]
_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_FROM_HOST = (torch.tensor, torch.as_tensor, torch.scalar_tensor)


def fake_device(value: Any) -> Any:
    """``cuda`` in whatever form, as the device that stands for it; anything else as it is."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return META
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return META
    return value


class SeenAsCuda(TorchFunctionMode):
    """The project's modules see ``cuda:0`` instead of ``meta``, and may ask for it.

    Not in a backward: torch runs it without such modes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pinned: list[Tensor] = []  # held, so that an id stands for one tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor is other for other in self._pinned)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in (_DEVICE_OF, _IS_CUDA):
            caller = str(sys._getframe(1).f_globals.get("__name__", "")).split(".")[0]
            on_gpu = caller in _OURS and args[0].is_meta
            if on_gpu:
                return CUDA if func == _DEVICE_OF else True
            return func(*args)
        if func is torch.device:
            return func(*args, **given)
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            self._pinned.append(pinned)
            return pinned
        args, given = (tree_map(fake_device, value) for value in (args, given))
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], OnGpu):
            return func(args[0].to(CPU), *args[1:], **given)
        if func is Tensor.cuda:
            return args[0].to(META, *args[2:], **given)
        if func in _FROM_HOST and given.get("device") == META:
            # torch makes an empty tensor on meta; a GPU is sent the values.
            pinned_first = given.pop("pin_memory", False)
            del given["device"]
            made = func(*args, **given)
            return (self._remember(made) if pinned_first else made).to(META)
        if given.pop("pin_memory", False):
            return self._remember(func(*args, **given))
        return func(*args, **given)

    def _remember(self, tensor: Tensor) -> Tensor:
        self._pinned.append(tensor)
        return tensor


class OnGpu(Tensor):
    """A tensor that says it lies on ``meta`` and has its numbers in ``inner``, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=META,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a fake GPU's tensor outside of `with FakeGpu()`")


@dataclass(frozen=True)
class Wait:
    """One operation for which the host would wait.

    Attributes:
        what: ``read`` (a value comes to the host), ``shape`` (a size depends on values),
            ``upload`` (``non_blocking=True`` was not asked for) or ``staged`` (it was, of memory
            that is not pinned: CUDA copies it aside first, and may wait when it is large).
        operation: as torch calls it.
        line: ``file:line`` of the innermost frame in this project, and its code.
        within: the project's functions that led there, outermost first.
    """

    what: str
    operation: str
    line: str
    within: str

    def __str__(self) -> str:
        return f"{self.what:<7}{self.operation:<28}{self.line}\n{'':<35}in {self.within}"


class AsOnCuda(TorchDispatchMode):
    """Looks at each operation, of modules that see a GPU while it does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_as = SeenAsCuda()

    def __enter__(self) -> Self:
        self.seen_as.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        self.seen_as.__exit__(*given)


class FakeGpu(AsOnCuda):
    """Runs operations on :class:`OnGpu` tensors and notes what the host would wait for.

    ``with FakeGpu() as gpu:`` ... ``gpu.waits``. Tensors come to it by ``.to("cuda")`` or a
    factory's ``device="cuda"``; a model by :meth:`put`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._quiet = False

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """In here nothing is noted: loading, preparing, looking at results."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def put(self, module: nn.Module) -> nn.Module:
        """A module's parameters and buffers to the fake GPU, in place; not noted."""
        with self.quiet():
            for part in module.modules():
                for name, parameter in list(part._parameters.items()):
                    if parameter is not None and not isinstance(parameter.data, OnGpu):
                        moved = OnGpu(parameter.detach())
                        part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
                for name, buffer in list(part._buffers.items()):
                    if buffer is not None:
                        part._buffers[name] = OnGpu(buffer)
        return module

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        flat = list(_tensors((args, given)))
        on_gpu = any(isinstance(tensor, OnGpu) for tensor in flat)
        target = given.get("device")
        if target is not None and torch.device(target).type == "meta":
            given["device"] = CPU
        self._note(func, args, given, target, on_gpu)
        if on_gpu and func is not torch.ops.aten.copy_.default:
            _refuse_mixture(func, flat)
        result = func(*tree_map(_inner, args), **tree_map(_inner, given))
        if func._schema.is_mutable and not _is_new(func):
            return args[0] if "out" not in given else given["out"]
        ends_on_gpu = on_gpu if target is None else torch.device(target).type == "meta"
        return tree_map(_wrap, result) if ends_on_gpu else result

    def _note(
        self, func: Any, args: tuple[Any, ...], given: Mapping[str, Any], target: Any, on_gpu: bool
    ) -> None:
        aten = torch.ops.aten
        what = None
        if func is aten._to_copy.default and target is not None:
            to_gpu = torch.device(target).type == "meta"
            if on_gpu and not to_gpu:
                what = "read"
            elif to_gpu and not on_gpu:
                what = self._upload(args[0], given.get("non_blocking"))
        elif func is aten.copy_.default:
            to_gpu, from_gpu = (isinstance(tensor, OnGpu) for tensor in args[:2])
            non_blocking = given.get("non_blocking", len(args) > 2 and args[2])
            if from_gpu and not to_gpu:
                what = "read"
            elif to_gpu and not from_gpu:
                what = self._upload(args[1], non_blocking)
        elif on_gpu:
            what = _waits_by_nature(func, args, given)
        if what is not None and not self._quiet:
            line, within = _where()
            self.waits.append(Wait(what, str(func).removeprefix("aten."), line, within))

    def _upload(self, source: Tensor, non_blocking: Any) -> str | None:
        """What an upload is; one number travels with the launch of a kernel."""
        if source.dim() == 0 or source.numel() == 0:
            return None
        if not non_blocking:
            return "upload"
        return None if self.seen_as.is_pinned(source) else "staged"


def _waits_by_nature(func: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> str | None:
    """What an operation whose tensors all lie on the GPU waits for."""
    aten = torch.ops.aten
    if func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
        return "read"
    if func._overloadpacket in (
        aten.nonzero,
        aten.masked_select,
        aten._unique2,
        aten.unique_dim,
        aten.unique_consecutive,
        aten.bincount,
    ):
        return "shape"
    if func is aten.repeat_interleave.Tensor and given.get("output_size") is None:
        return "shape"
    if func._overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "shape"
        if any(not isinstance(index, OnGpu) for index in indices):
            return "upload"
    return None


def _refuse_mixture(func: Any, flat: Sequence[Tensor]) -> None:
    """As a GPU would: a tensor on the CPU beside one on the GPU is an error, unless one number."""
    if func._overloadpacket is torch.ops.aten.index:
        return
    strange = [tensor for tensor in flat if not isinstance(tensor, OnGpu) and tensor.dim()]
    if strange:
        shapes = [tuple(tensor.shape) for tensor in strange]
        raise RuntimeError(f"{func}: tensors {shapes} lie on the CPU, others on the GPU")


def _is_new(func: Any) -> bool:
    """Whether what comes back is a new tensor, also of an operation that writes to another."""
    return all(value.alias_info is None for value in func._schema.returns)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def _wrap(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


def _where() -> tuple[str, str]:
    """The innermost line of the project's own code, and the functions around it."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if (file := Path(frame.filename)).is_relative_to(PROJECT)
        and file.relative_to(PROJECT).parts[0] in _OURS
    ]
    if not frames:
        return "outside of the project", "-"
    last = frames[-1]
    file = Path(last.filename).relative_to(PROJECT)
    return f"{file}:{last.lineno} {last.line}", " > ".join(frame.name for frame in frames)


def dense_of_a_block_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """In the place of ``cartridge_distill.model.flex.compile_and_call``: what it computes, all
    scores."""
    gpu = torch.utils._python_dispatch._get_current_dispatch_mode()
    assert isinstance(gpu, FakeGpu)
    with gpu.quiet():  # what the mask costs here is none of FlexAttention's
        rows = torch.arange(query.shape[2], device=query.device)[:, None]
        columns = torch.arange(key.shape[2], device=query.device)[None]
        allowed = block_mask.mask_mod(None, None, rows, columns)
    per_head = query.shape[1] // key.shape[1]
    key, value = (kind.repeat_interleave(per_head, dim=1) for kind in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1, torch.float32)
    return weights.to(value.dtype) @ value
