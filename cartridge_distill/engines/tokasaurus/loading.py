"""When a cartridge is written into the KV cache: once for each time it is given blocks.

Tokasaurus splits the work over two kinds of process that share no memory. The *manager* gives out
blocks and decides what runs; a *model worker* holds the keys and values. Between them is one queue,
first in, first out: the manager puts a load command (id, block numbers, directory) on it and, after
it, the batches that read these blocks; the worker takes them in that order, on one CUDA stream.
Both keep a table of the ids that were ever loaded, neither hears of an eviction. So an id that is
asked for again after its eviction gets new blocks, no load command is sent, or one is sent and
ignored, and the model reads whatever the blocks hold.

Here **only the manager decides, and it asks the blocks**: a cartridge is loaded if the first block
of its present chain carries the note of :func:`.allocator.mark_written`, which an eviction takes
away. The worker has no opinion: it does what each command says. An evicted id is thus **read from
its file again**, into its new blocks, ahead of the first batch that reads them.

Why not refuse an evicted id? A version is immutable, so its file gives the same weights; and an
eviction follows from other requests' needs, which the one who asks cannot know: a version that was
published and then pushed out before its first rollout would end a training run. Refusing would also
need a list of ids that grows for ever, in the process that may be restarted.

What is refused, with HTTP 400 and before the request takes any block: an id whose files are gone
(Tokasaurus would keep it waiting for ever), a file with keys that are not known (Tokasaurus would
read it as if they were not there), a token count that does not fill its pages (the model
worker would end), an id named twice (the manager would end). If the files disappear between that
and the load command, the manager ends, and the server with it: nothing is left that could be
answered truthfully. Whoever deletes versions must wait for their requests.

Duck-typed: ``state`` is Tokasaurus' ``ManagerState``, ``decision`` its ``ScheduleDecision``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.formats import hazyresearch
from cartridge_distill.engines.tokasaurus.allocator import (
    BrokenAllocator,
    chain,
    is_written,
    mark_written,
)

FILES = ("cartridge.pt", "config.yaml")


# --- manager process ----------------------------------------------------------------------------


def is_loaded(state: Any, cartridge_id: str) -> bool:
    """Whether the blocks that the id has now were filled for it."""
    head = state.block_allocator.cartridge_id_to_head.get(cartridge_id)
    return head is not None and is_written(head, cartridge_id)


def mark_loaded(state: Any, cartridge_id: str) -> None:
    """Note that the load command for the id's present blocks was sent.

    Raises:
        BrokenAllocator: the id has no blocks.
    """
    head = state.block_allocator.cartridge_id_to_head.get(cartridge_id)
    if head is None:
        raise BrokenAllocator(f"cartridge {cartridge_id} is to be marked as loaded, has no blocks")
    mark_written(head, cartridge_id)


def forget_file(state: Any, cartridge_id: str) -> None:
    """A file was downloaded anew (``force_redownload``).

    Weights behind an id that is in the cache stay as they are: requests in flight and prompt pages
    were computed from them. The file is read at the next load, after an eviction.
    """
    if cartridge_id in state.block_allocator.cartridge_id_to_head:
        state.logger.warning(
            f"cartridge {cartridge_id} was downloaded again, and is in the cache: what is there "
            "stays in use until it is evicted. New weights need a new id"
        )
    else:
        state.cartridge_id_to_config.pop(cartridge_id, None)


def check_request(
    state: Any, cartridges: Iterable[dict[str, Any]] | None, sanitize: Callable[[str], str]
) -> None:
    """Refuse a request that could only wait for ever, or end a process.

    Args:
        cartridges: of one request, each with ``id`` and ``source``.
        sanitize: id to directory name, as Tokasaurus does it.

    Raises:
        FileNotFoundError, ValueError: answered with HTTP 400 and the message.
    """
    seen: set[str] = set()
    for cartridge in cartridges or ():
        cartridge_id = cartridge["id"]
        if cartridge_id in seen:
            raise ValueError(f"cartridge {cartridge_id} is named twice; name it once")
        seen.add(cartridge_id)
        if cartridge["source"] != "local":
            continue
        if missing := _missing_files(state, cartridge_id, sanitize):
            raise FileNotFoundError(
                f"cartridge {cartridge_id}: no {' and no '.join(missing)} in "
                f"{_directory(state, cartridge_id, sanitize)}; it was never uploaded here, or has "
                "been deleted. Upload it under a new id"
            )
        if cartridge_id not in state.cartridge_id_to_config:  # that is where it is kept once read
            hazyresearch.check_keys(_directory(state, cartridge_id, sanitize) / FILES[0])
        tokens = state.load_cartridge_config(cartridge_id).num_tokens
        page = state.config.page_size
        if tokens < 1 or tokens % page:
            raise ValueError(
                f"cartridge {cartridge_id} has {tokens} tokens; the server needs a multiple of "
                f"{page}. Cut or grow it, and upload it under a new id"
            )


def send_load_commands(
    state: Any,
    decision: Any,
    *,
    send: Callable[[Any, Any], None],
    command: Callable[..., Any],
    sanitize: Callable[[str], str],
) -> None:
    """Have each cartridge that a batch reads in its blocks before the batch is sent.

    Args:
        send: puts a command on the queue to the model workers: ``send(state, command)``.
        command: makes one from ``cartridge_id``, ``block_indices``, ``cartridge_dir``.

    Raises:
        BrokenAllocator: a sequence would read blocks that are not its cartridges'.
        FileNotFoundError: a cartridge has to be loaded, and its files are gone.
    """
    chains: dict[str, list[int]] = {}
    for seq in (*decision.decoding_seqs, *(seq for seq, _ in decision.prefill_seqs)):
        if not seq.prepended_cartridge_ids:
            continue
        expected: list[int] = []
        for cartridge_id in seq.prepended_cartridge_ids:
            if cartridge_id not in chains:
                chains[cartridge_id] = _chain_indices(state, cartridge_id)
            expected += chains[cartridge_id]
        if seq.cartridge_indices != expected:
            raise BrokenAllocator(
                f"sequence {seq.id} would read blocks {seq.cartridge_indices}, but cartridges "
                f"{', '.join(seq.prepended_cartridge_ids)} are in {expected}"
            )
    for cartridge_id, block_indices in chains.items():
        if is_loaded(state, cartridge_id):
            continue
        if missing := _missing_files(state, cartridge_id, sanitize):
            raise FileNotFoundError(
                f"cartridge {cartridge_id} is to be loaded, and {' and '.join(missing)} in "
                f"{_directory(state, cartridge_id, sanitize)} went while a request for it was in "
                "flight. Do not delete a version before its requests are answered"
            )
        send(
            state,
            command(
                cartridge_id=cartridge_id,
                block_indices=block_indices,
                cartridge_dir=state.config.cartridge_dir,
            ),
        )
        mark_loaded(state, cartridge_id)
        state.logger.info(f"cartridge {cartridge_id} goes into {len(block_indices)} blocks")


def _chain_indices(state: Any, cartridge_id: str) -> list[int]:
    head = state.block_allocator.cartridge_id_to_head.get(cartridge_id)
    return [] if head is None else [block.idx for block in chain(head)]


def _directory(state: Any, cartridge_id: str, sanitize: Callable[[str], str]) -> Path:
    return Path(state.config.cartridge_dir) / sanitize(cartridge_id)


def _missing_files(state: Any, cartridge_id: str, sanitize: Callable[[str], str]) -> list[str]:
    directory = _directory(state, cartridge_id, sanitize)
    return [name for name in FILES if not (directory / name).is_file()]
