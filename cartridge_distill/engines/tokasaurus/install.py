"""Puts the repairs in place in this process.

Tokasaurus' processes are *spawned*: each is a fresh interpreter that imports Tokasaurus from its
files, so what is replaced in one is not replaced in the next. :mod:`.launch` calls :func:`install`
in each of them before anything else.

A function may be known under several names (``from a import f``). It is rebound in every module of
Tokasaurus that holds it; modules that are imported later find the replacement where it is defined.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from cartridge_distill.engines.tokasaurus import allocator, loading
from cartridge_distill.engines.tokasaurus.guard import import_tokasaurus, require

logger = logging.getLogger(__name__)

_MARK = "__cartridge_distill__"
_DEBUG_FILE = "/tmp/tokasaurus_layer_0_hidden_states.pt"

Replacement = Callable[[Any], Any]
"""From the original function to the one in its place."""


def install() -> None:
    """Verify the installed Tokasaurus, then put all replacements in place. Again is harmless.

    Raises:
        UnknownTokasaurus: nothing was changed; the message names the functions.
        TokasaurusMissing: there is none.
        RuntimeError: the replacements are not there afterwards, which is a defect of this package.
    """
    if is_installed():
        return
    require()
    for path, make in _replacements().items():
        module, _, name = path.partition(":")
        _replace(import_tokasaurus(module), name, make)
    _mute_debug_file()
    if not is_installed():
        raise RuntimeError("the repairs did not take; this is a bug of this package")
    logger.info("Tokasaurus is repaired in this process: %d functions", len(_replacements()))


def is_installed() -> bool:
    """Whether every replacement is in its place, in this process."""
    import torch

    return hasattr(torch.save, _MARK) and all(
        hasattr(_find(module, name), _MARK)
        for module, _, name in (path.partition(":") for path in _replacements())
    )


def _find(module: str, name: str) -> Any:
    found: Any = import_tokasaurus(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _replace(module: Any, name: str, make: Replacement) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    original = getattr(owner, attribute)
    new = functools.wraps(original)(make(original))
    setattr(new, _MARK, True)
    setattr(owner, attribute, new)
    if owner is not module:
        return  # a method: looked up in its class at each call
    for other_name, other in list(sys.modules.items()):
        if other_name == "tokasaurus" or other_name.startswith("tokasaurus."):
            for key, value in list(vars(other).items()):
                if value is original:
                    setattr(other, key, new)


# --- the replacements -----------------------------------------------------------------------------


def _replacements() -> dict[str, Replacement]:
    """By ``module:name``; each of them stands in ``guard.KNOWN`` as replaced."""
    return {
        "manager.allocator:pick_blocks_for_allocation": _pick_blocks,
        "manager.allocator:BlockAllocator.allocate_with_prefix_match": _allocate,
        "manager.manager:check_and_request_downloads": _check_request,
        "manager.manager:send_cartridge_load_commands": _send_load_commands,
        "manager.types:ManagerState.is_cartridge_loaded": _method(loading.is_loaded),
        "manager.types:ManagerState.mark_cartridge_loading": _method(loading.mark_loaded),
        "manager.types:ManagerState.reset_cartridge_loading_state": _method(loading.forget_file),
        "model.types:CartridgeManager.load_cartridge": _load_cartridge,
        "server.utils:generate_output": _generate_output,
    }


def _method(function: Callable[[Any, str], Any]) -> Replacement:
    def make(original: Any) -> Any:
        # A function of its own: it is made to look like the original, and ours stays as it is.
        return lambda self, cartridge_id: function(self, cartridge_id)

    return make


def _pick_blocks(original: Any) -> Any:
    no_space = import_tokasaurus("manager.allocator").NoSpaceException

    def pick_blocks_for_allocation(
        num_blocks: int,
        available_floating: list[Any],
        available_leaves: set[Any],
        cartridge_id_to_head: dict[str, Any],
        available_leaf_heap: list[Any] | None = None,
        allow_used_leaves_in_heap: bool = False,  # a page in use is never taken from the heap
    ) -> tuple[list[Any], list[Any]]:
        blocks = allocator.pick_blocks(
            num_blocks,
            available_floating,
            available_leaves,
            cartridge_id_to_head,
            available_leaf_heap,
            no_space=no_space,
        )
        return blocks, []

    return pick_blocks_for_allocation


def _allocate(original: Any) -> Any:
    def allocate_with_prefix_match(
        self: Any,
        *arguments: Any,
        cartridge_id_to_num_blocks: dict[str, int] | None = None,
        **options: Any,
    ) -> Any:
        if cartridge_id_to_num_blocks is not None:
            cartridge_id_to_num_blocks = allocator.blocks_to_allocate(
                cartridge_id_to_num_blocks, self.cartridge_id_to_head
            )
        return original(
            self, *arguments, cartridge_id_to_num_blocks=cartridge_id_to_num_blocks, **options
        )

    return allocate_with_prefix_match


def _check_request(original: Any) -> Any:
    sanitize = import_tokasaurus("utils").sanitize_cartridge_id

    def check_and_request_downloads(state: Any, cartridges: list[dict[str, Any]] | None) -> None:
        loading.check_request(state, cartridges, sanitize)
        original(state, cartridges)

    return check_and_request_downloads


def _send_load_commands(original: Any) -> Any:
    send = import_tokasaurus("manager.manager").send_to_model
    command = import_tokasaurus("model.types").LoadCartridge
    sanitize = import_tokasaurus("utils").sanitize_cartridge_id

    def send_cartridge_load_commands(state: Any, decision: Any) -> None:
        loading.send_load_commands(state, decision, send=send, command=command, sanitize=sanitize)

    return send_cartridge_load_commands


def _load_cartridge(original: Any) -> Any:
    def load_cartridge(
        self: Any, cartridge_id: str, block_indices: list[int], cartridge_dir: str
    ) -> None:
        loading.load_as_told(original, self, cartridge_id, block_indices, cartridge_dir)

    return load_cartridge


def _generate_output(original: Any) -> Any:
    async def generate_output(state: Any, request: Any) -> Any:
        answered, output = await original(state, request)
        # Otherwise every prompt and completion of the server's life stays in its memory. One that
        # was cancelled does stay: its output may still come, and must find its place.
        state.rid_to_req.pop(answered.id, None)
        return answered, output

    return generate_output


def _mute_debug_file() -> None:
    """Drop the hidden states that Tokasaurus writes to one file at each forward without a CUDA
    graph, which waits for the GPU and writes up to tens of megabytes each time."""
    import torch

    original = torch.save

    @functools.wraps(original)
    def save(obj: Any, f: Any, *arguments: Any, **options: Any) -> None:
        if f == _DEBUG_FILE:
            return
        original(obj, f, *arguments, **options)

    setattr(save, _MARK, True)
    torch.save = save
