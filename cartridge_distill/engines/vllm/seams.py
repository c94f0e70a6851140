"""What of vLLM is relied on, and whether a release still has it: read from its source files.

Nothing is imported. A seam is a function or class with some arguments or attributes, or a piece of
text that must stand in a file. The files of a release may be those of an installed vLLM or those of
a wheel.
"""

from __future__ import annotations

import ast
import importlib.util
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.engines.vllm.versions import known
from cartridge_distill.util.errors import ConfigError

Sources = Callable[[str], str | None]
"""From a path such as ``vllm/v1/request.py`` to its text; None where there is no such file."""

_KV = "vllm/distributed/kv_transfer"
_BASE = f"{_KV}/kv_connector/v1/base.py"


@dataclass(frozen=True)
class Seam:
    """One thing that is relied on.

    Attributes:
        use: what for, in words.
        files: it stands in one of them; releases differ in where.
        name: ``function``, ``Class`` or ``Class.function``; None where only the text counts.
        arguments: names that the function must take, in this order.
        text: pieces of source that the function, class or file must hold, spaces aside.
        since_failing_requests: only of releases in which a load can fail by request.
    """

    use: str
    files: tuple[str, ...]
    name: str | None = None
    arguments: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    since_failing_requests: bool = False


_SCHEDULER = ("vllm/v1/core/sched/scheduler.py",)
_RUNNERS = ("vllm/v1/worker/kv_connector_model_runner_mixin.py",)
_STATE = (
    "vllm/entrypoints/launchers/api_server/app_state.py",
    "vllm/entrypoints/openai/api_server.py",
)
_APP = (
    "vllm/entrypoints/serve/middleware/register.py",
    "vllm/entrypoints/openai/api_server.py",
)
_ATTENTION = ("vllm/model_executor/layers/attention/attention.py",)

SEAMS = (
    Seam(
        "vLLM makes the connector",
        (f"{_KV}/kv_connector/factory.py",),
        "KVConnectorFactory",
        text=("kv_connector_module_path", "connector_cls(config, role, kv_cache_config)"),
    ),
    Seam(
        "the settings that travel to the connector",
        ("vllm/config/kv_transfer.py",),
        "KVTransferConfig",
        text=(
            "kv_connector_extra_config: dict[str, Any]",
            "kv_connector_module_path: str | None",
            'kv_load_failure_policy: Literal["recompute", "fail"]',
        ),
    ),
    Seam(
        "the connector's constructor",
        (_BASE,),
        "KVConnectorBase_V1.__init__",
        ("self", "vllm_config", "role", "kv_cache_config"),
    ),
    Seam("a request comes in", (_BASE,), "KVConnectorBase_V1.on_new_request", ("self", "request")),
    Seam(
        "how many tokens need no computing",
        (_BASE,),
        "KVConnectorBase_V1.get_num_new_matched_tokens",
        ("self", "request", "num_computed_tokens"),
    ),
    Seam(
        "blocks were taken for a request",
        (_BASE,),
        "KVConnectorBase_V1.update_state_after_alloc",
        ("self", "request", "blocks", "num_external_tokens"),
    ),
    Seam(
        "what the worker half is told of a step",
        (_BASE,),
        "KVConnectorBase_V1.build_connector_meta",
        ("self", "scheduler_output"),
    ),
    Seam(
        "before the forward",
        (_BASE,),
        "KVConnectorBase_V1.start_load_kv",
        ("self", "forward_context"),
    ),
    Seam(
        "models with several cache groups keep them",
        (_BASE,),
        "SupportsHMA.request_finished_all_groups",
        ("self", "request", "block_ids"),
    ),
    Seam(
        "requests that failed (their ids)",
        (_BASE,),
        "KVConnectorBase_V1.get_transfer_results",
        ("self", "finished_req_ids"),
        since_failing_requests=True,
    ),
    Seam(
        "requests that failed (their ids), the result's names",
        (_BASE,),
        "KVConnectorTransferResults",
        text=("finished_recving: set[str]", "failed_recving: set[str]"),
        since_failing_requests=True,
    ),
    Seam(
        "requests that failed (their blocks)",
        (_BASE,),
        "KVConnectorBase_V1.get_block_ids_with_load_errors",
        ("self",),
    ),
    Seam(
        "requests that waited for a load",
        (_BASE,),
        "KVConnectorBase_V1.get_finished",
        ("self", "finished_req_ids"),
    ),
    Seam(
        "the order of a step in the scheduler",
        _SCHEDULER,
        "Scheduler",
        text=(
            "self.connector.on_new_request(request)",
            "self.connector.get_num_new_matched_tokens(",
            "self.connector.update_state_after_alloc(",
            "num_external_computed_tokens=num_external_computed_tokens",
            "delay_cache_blocks=load_kv_async",
        ),
    ),
    Seam(
        "loads come before the forward",
        _RUNNERS,
        "KVConnectorModelRunnerMixin",
        text=("kv_connector.start_load_kv(get_forward_context())",),
    ),
    Seam(
        "blocks are shared by hash, and the salt is part of it",
        ("vllm/v1/core/kv_cache_utils.py",),
        text=("start_token_idx == 0 and request.cache_salt",),
    ),
    Seam(
        "the salt is set anew in a request",
        ("vllm/v1/request.py",),
        "Request",
        text=(
            "self.cache_salt: str | None = cache_salt",
            "self.block_hashes: list[BlockHash] = []",
            "self.kv_transfer_params",
            "def update_block_hashes(self) -> None:",
        ),
    ),
    Seam(
        "keys and values are written as vLLM writes its own",
        _ATTENTION,
        "unified_kv_cache_update",
        text=("attn_layer.impl.do_kv_cache_update(", "attn_layer, key, value, kv_cache,"),
    ),
    Seam(
        "a layer has its cache, and says whether it reads another's",
        _ATTENTION,
        "Attention",
        text=("self.kv_cache = torch.tensor([])", "self.kv_sharing_target_layer_name ="),
    ),
    Seam(
        "writing, FlashAttention",
        ("vllm/v1/attention/backends/flash_attn.py",),
        "FlashAttentionImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    Seam(
        "writing, on a CPU",
        ("vllm/v1/attention/backends/cpu_attn.py",),
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    Seam(
        "the front finds the engine",
        _STATE,
        text=("state.engine_client = engine_client", "state.vllm_config = vllm_config"),
    ),
    Seam(
        "the front is put in",
        _APP,
        text=("for middleware in args.middleware:", "app.add_middleware(imported)"),
    ),
    Seam(
        "a request through the engine",
        ("vllm/v1/engine/async_llm.py",),
        "AsyncLLM.generate",
        ("self", "prompt", "sampling_params", "request_id"),
    ),
    Seam(
        "what a request asks of sampling",
        ("vllm/sampling_params.py",),
        "SamplingParams",
        text=(
            "seed: int | None = None",
            "stop_token_ids: list[int] | None = None",
            "ignore_eos: bool = False",
            "logprobs: int | None = None",
            "detokenize: bool = True",
            "extra_args: dict[str, Any] | None = None",
            "skip_reading_prefix_cache: bool | None = None",
            "include_stop_str_in_output: bool = False",
        ),
    ),
    Seam(
        "log-probs of what was sampled from",
        ("vllm/v1/sample/sampler.py",),
        "Sampler",
        text=('"processed_logprobs"',),
    ),
)


def differences(version: str, sources: Sources) -> list[str]:
    """What a release does not have of what is relied on; a line each, empty if all is there.

    Args:
        version: of the release.
        sources: its files.

    Raises:
        ConfigError: the release is unknown.
    """
    fails_requests = known(version).fails_requests
    found = []
    for seam in SEAMS:
        if seam.since_failing_requests and not fails_requests:
            continue
        problems = [_problem(seam, file, sources(file)) for file in seam.files]
        if all(problem is not None for problem in problems):
            found.append(f"{seam.use}: {'; '.join(filter(None, problems))}")
    return found


def _problem(seam: Seam, file: str, source: str | None) -> str | None:
    if source is None:
        return f"{file} is not there"
    part = source
    if seam.name is not None:
        node = _find(ast.parse(source), seam.name.split("."))
        if node is None:
            return f"{file} has no {seam.name}"
        part = ast.get_source_segment(source, node) or ""
        if seam.arguments:
            assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            taken = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
            if tuple(taken[: len(seam.arguments)]) != seam.arguments:
                return f"{file}: {seam.name} takes {', '.join(taken)}"
    squeezed = _squeeze(part)
    missing = [text for text in seam.text if _squeeze(text) not in squeezed]
    return f"{file}: {seam.name or 'it'} has no `{missing[0]}`" if missing else None


def _find(
    tree: ast.AST, names: list[str]
) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | None:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name == names[0]:
                return node if len(names) == 1 else _find(node, names[1:])
    return None


def _squeeze(text: str) -> str:
    """Without spaces and line ends: formatting is nobody's promise."""
    return "".join(text.split())


def installed_sources() -> Sources:
    """The files of the vLLM of this environment, which is not imported.

    Raises:
        ConfigError: there is none.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise ConfigError(
            "vLLM is not installed in this environment; fix: run this in its own (docs/vllm.md)"
        )
    return folder_sources(Path(found.origin).parents[1])


def folder_sources(folder: Path) -> Sources:
    """The files of a release that lie in a folder, ``folder/vllm/...``."""

    def text(path: str) -> str | None:
        file = folder / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return text


def wheel_sources(wheel: Path) -> Sources:
    """The files of a wheel."""
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    return lambda path: archive.read(path).decode() if path in names else None
