"""torch.compile for a GPU that is not there: everything but the launch.

:class:`OfflineCompiler` is a backend in dynamo's sense. Dynamo traces the caller's real code with
tensors on the CPU, and AOTAutograd makes forward and backward of it, as always. Then each graph's
tensors are put on a pretended ``cuda:0`` (fake tensors: shapes without memory), and inductor and
Triton compile it for the GPU's architecture down to machine code (Triton brings ``ptxas``). What is
called at run time returns a tensor of the right shape and computes nothing.

What this finds: graphs that cannot be traced or lowered, kernels that do not compile, and kernels
that ask for more shared memory than a block may have. What it cannot find: wrong results, speed,
and memory.

The pretence holds only while inductor compiles (:func:`pretended`), and replaces nothing but
questions to the driver. Three spots where torch asks for the device while it still traces are
answered in :meth:`OfflineCompiler.tracing`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gpu:
    """What inductor and Triton ask of a GPU.

    Attributes:
        capability: major, minor.
        shared_memory: bytes that one block may ask for.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    memory: int
    shared_memory: int

    @property
    def architecture(self) -> int:
        return 10 * self.capability[0] + self.capability[1]


GPUS = {
    "a100": Gpu("A100", (8, 0), 108, 80 * 2**30, 166_912),
    "h100": Gpu("H100", (9, 0), 132, 80 * 2**30, 232_448),
}


@dataclass(frozen=True)
class Kernel:
    """One compiled Triton kernel; ``shared`` is in bytes."""

    name: str
    shared: int


class _Driver:
    """Triton's driver, as far as compiling needs one."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.utils = SimpleNamespace(
            get_device_properties=lambda _device=0: {
                "max_shared_mem": gpu.shared_memory,
                "multiprocessor_count": gpu.processors,
                "max_num_regs": 65_536,
                "warpSize": 32,
            }
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.gpu.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@functools.cache
def _answer_device_guards() -> None:
    """Lets a build of torch without CUDA dispatch operators on fake CUDA tensors.

    Such a build has no device guard for CUDA, and even a fake ``copy_`` looks for one. The CPU's
    does nothing, which is right where there is no memory; torch has no Python function for this.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 2).in_dll(library, name)  # by DeviceType: CPU, CUDA
    if guards[1] is None:
        guards[1] = guards[0]


@contextmanager
def pretended(gpu: Gpu) -> Iterator[None]:
    """Questions to CUDA's driver are answered for ``gpu``; nothing can be launched."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.config as inductor
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.runtime.triton_heuristics as heuristics
    import torch._subclasses.fake_tensor as fake
    from triton.runtime import driver

    _answer_device_guards()
    driver.set_active(_Driver(gpu))
    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.processors,
        total_memory=gpu.memory,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        warp_size=32,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=gpu.shared_memory,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
    )

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: value

    cuda = interfaces.CudaInterface
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", always(True)),
        (torch.cuda, "device_count", always(1)),
        (torch.cuda, "current_device", always(0)),
        (torch.cuda, "get_device_properties", always(properties)),
        (torch.cuda, "get_device_capability", always(gpu.capability)),
        (torch.cuda, "is_bf16_supported", always(True)),
        (torch.cuda, "get_rng_state", always(torch.zeros(16, dtype=torch.uint8))),
        (torch.cuda, "set_rng_state", always(None)),
        (torch.cuda, "_exchange_device", always(0)),
        (torch.cuda, "_maybe_exchange_device", always(0)),
        (torch._C, "_cuda_getCurrentRawStream", always(0)),
        (cuda, "is_available", staticmethod(always(True))),
        (cuda, "get_device_properties", staticmethod(always(properties))),
        (cuda, "get_compute_capability", staticmethod(always(gpu.architecture))),
        (cuda.Worker, "get_device_properties", staticmethod(always(properties))),
        (fake, "init_gpu_context", always(None)),
        (helpers, "set_driver_to_gpu", always(None)),
        # Compiled machine code would be loaded onto the GPU here.
        (
            heuristics.CachingAutotuner,
            "_make_launchers",
            lambda self: setattr(self, "launchers", []),
        ),
    ]
    with ExitStack() as stack:
        for owner, name, answer in answers:
            # create: a build without CUDA does not even have all the names.
            stack.enter_context(patch.object(owner, name, answer, create=owner is torch._C))
        _forget_answers()
        stack.callback(_forget_answers)
        # In this process, one after the other, and no graph from an earlier run. Triton's own cache
        # stays: it goes by a kernel's source, and layers have kernels in common.
        stack.enter_context(inductor.patch(compile_threads=1, fx_graph_cache=False))
        yield


class OfflineCompiler:
    """A backend of torch.compile that compiles for ``gpu`` and launches nothing.

    Attributes:
        kernels: every Triton kernel compiled so far.
        graphs: for each graph that dynamo gave, which parts of it were compiled: "inference", or
            "forward" and "backward".
        failures: what went wrong, a sentence each.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.kernels: list[Kernel] = []
        self.graphs: list[list[str]] = []
        self.failures: list[str] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Callable[..., tuple[Tensor]]:
        import torch._functorch.config as functorch
        from torch._inductor.compile_fx import compile_fx

        if len(_attention_inputs(inputs)) != 3:
            self.failures.append("a graph without attention: the function was cut into parts")
            raise RuntimeError(self.failures[-1])
        self.graphs.append([])
        with functorch.patch(enable_autograd_cache=False):
            part: Any = self._compile_part  # torch's type is of its own compiled graph
            compile_fx(graph, inputs, inner_compile=part)
        return _shape_of_attention

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While dynamo traces FlexAttention on CPU tensors, it does what it would for a GPU's."""
        import torch.nn.attention.flex_attention as flex

        # The package has an operator of the same name, which `import ... as` would find.
        operators = importlib.import_module("torch._higher_order_ops.flex_attention")

        options_of = flex._apply_kernel_options

        def with_logsumexp(*args: Any, **kwargs: Any) -> Any:
            # A CPU never returns the sums that a backward needs, a GPU does when gradients are on.
            options = options_of(*args, **kwargs)
            options["OUTPUT_LOGSUMEXP"] = torch.is_grad_enabled()
            return options

        def unfused(*_args: Any, **_kwargs: Any) -> Any:
            self.failures.append("fell back to unfused attention")
            raise RuntimeError("FlexAttention was called uncompiled: it would compute all scores")

        with (
            patch.object(flex, "_validate_device", lambda *_: None),  # "no backward on a CPU"
            patch.object(flex, "_apply_kernel_options", with_logsumexp),
            patch.object(operators, "math_attention", unfused),
        ):
            yield

    def _compile_part(self, graph: Any, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx_inner

        part = "backward" if options.get("is_backward") else "forward"
        if options.get("is_inference"):
            part = "inference"
        _initialise_patterns()
        _move_to_gpu(graph)
        try:
            with pretended(self.gpu), self._collecting_kernels():
                compile_fx_inner(graph, [_on_gpu(value) for value in inputs], **options)
        except Exception as error:
            # Named here because AOTAutograd drops what a backward raises: it compiles it early, and
            # again when it is called, which never happens here.
            self.failures.append(f"{part}: {_first_lines(error)}")
            raise
        self.graphs[-1].append(part)
        return _never_called

    @contextmanager
    def _collecting_kernels(self) -> Iterator[None]:
        import triton

        compile_kernel = triton.compile

        def collecting(*args: Any, **kwargs: Any) -> Any:
            binary = compile_kernel(*args, **kwargs)
            self.kernels.append(Kernel(binary.metadata.name, binary.metadata.shared))
            return binary

        with patch.object(triton, "compile", collecting):
            yield


def _forget_answers() -> None:
    """torch asks once whether there is a GPU for Triton; from here it asks again."""
    from torch.utils import _triton

    for function in vars(_triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _no_launchers(self: Any) -> None:
    self.launchers = []


def _attention_inputs(inputs: Sequence[Any]) -> list[Tensor]:
    """Query, key and value among the inputs of a graph."""
    return [
        value
        for value in inputs
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
    ]


def _shape_of_attention(*inputs: Any) -> tuple[Tensor]:
    """What the compiled function would return: the query's shape, and a gradient's way to each."""
    query, key, value = _attention_inputs(inputs)
    nothing = 0 * (key[:, :1, :1, :1] + value[:, :1, :1, :1])
    return (query + nothing,)


def _never_called(*_args: Any) -> Any:
    raise AssertionError("a kernel for a GPU that is not there was called")


_never_called._boxed_call = True  # type: ignore[attr-defined]  # how AOTAutograd would call it


@functools.cache
def _initialise_patterns() -> None:
    """Inductor's patterns are traced once, with real tensors: before any GPU is pretended."""
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as post

    joint.lazy_init()
    post.lazy_init()


def _on_gpu(value: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda:0")


def _move_to_gpu(graph: Any) -> None:
    """Puts every tensor of a graph, and of the functions in it, on the GPU."""
    import torch.utils._pytree as pytree

    _answer_device_guards()
    for module in graph.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(_on_gpu, node.meta["val"])
            node.meta.pop("tensor_meta", None)
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        module.recompile()


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:400]
