"""Which blocks of the KV cache go when it is full. Pure functions over Tokasaurus' block objects.

The cache is a fixed number of blocks of 16 tokens. At any time a block is exactly one of

* *floating*: on the free list, holding nothing;
* a *page*: a node of the prefix tree, holding 16 prompt tokens behind certain cartridges;
* part of a *resident cartridge*: a chain, from the block in ``cartridge_id_to_head`` along
  ``next_cartridge_block_ref``;
* neither, but in use by a sequence (its completion, the end of its prompt).

``seq_ids`` names the sequences in flight that read a block. One that nobody reads may be given to
another; pages and cartridges stay until their room is needed, oldest first.

Everything freed goes to the free list, and blocks are taken from that list only. So no block can
fall between the two, and a request that cannot be served loses nothing.

What is deliberately not here: Tokasaurus prefers pages over cartridges whatever their age. Here the
older one goes, for a loop over versions leaves cartridges behind that nobody asks for again, while
the pages of the current version are asked for all the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Protocol


class Block(Protocol):
    """What is used of a Tokasaurus block."""

    idx: int
    last_used_at: float
    seq_ids: set[str]
    children: dict[Any, Any]
    parent: Any | None
    prepended_cartridge_ids: tuple[str, ...] | None
    cartridge_id: str | None
    next_cartridge_block_ref: Any | None

    def wipe(self) -> None:
        """Leave the tree and forget everything, the link to the next block, too."""

    def is_root(self) -> bool: ...


class BrokenAllocator(RuntimeError):
    """Blocks are not in a state that they can be in; going on would read another's weights."""


_WRITTEN = "written_cartridge_id"
"""Attribute of a cartridge's first block, set when the model workers were told to fill the chain.

It lives on the block, because the block is what gets taken away: a table of ids elsewhere has to be
told of each eviction, and the one that was not told is the bug that this package fixes.
"""


def mark_written(head: Block, cartridge_id: str) -> None:
    """Note that the load command for this allocation is on its way."""
    setattr(head, _WRITTEN, cartridge_id)


def is_written(head: Block, cartridge_id: str) -> bool:
    """Whether this very allocation was filled with this cartridge."""
    return getattr(head, _WRITTEN, None) == cartridge_id


def chain(head: Block) -> Iterator[Block]:
    """The blocks of a cartridge, in the order of its tokens."""
    block: Block | None = head
    while block is not None:
        # Before the block is handed out: whoever wipes it clears the link.
        following = block.next_cartridge_block_ref
        yield block
        block = following


def pick_blocks(
    num_blocks: int,
    available_floating: list[Any],
    available_leaves: set[Any],
    cartridge_id_to_head: dict[str, Any],
    available_leaf_heap: list[Any] | None = None,
    *,
    no_space: type[Exception] = MemoryError,
) -> list[Any]:
    """Take ``num_blocks`` empty blocks, freeing what nobody reads, oldest first.

    Args:
        available_floating: the free list; shrinks, and grows by what is freed beyond the need.
        available_leaves: pages without children that nobody reads; kept up to date.
        cartridge_id_to_head: first block of each resident cartridge; kept up to date.
        available_leaf_heap: the same pages by age, as far as the caller knew them. Only a hint that
            saves sorting: the set decides, for the heap is not told of what other calls took.
        no_space: raised when less than ``num_blocks`` can be had; what was freed is then on the
            free list, and nothing is lost.

    Returns:
        ``num_blocks`` distinct blocks that hold nothing and that nobody reads.

    Raises:
        ValueError: less than one block is asked for.
        no_space: see above.
    """
    if num_blocks < 1:
        raise ValueError(f"asked for {num_blocks} blocks")
    if len(available_floating) < num_blocks:
        pages = _PagesByAge(available_leaves, available_leaf_heap)
        idle = sorted(
            (
                (head.last_used_at, cartridge_id)
                for cartridge_id, head in cartridge_id_to_head.items()
                if not head.seq_ids
            ),
            reverse=True,
        )
        while len(available_floating) < num_blocks:
            page = pages.oldest()
            if idle and (page is None or idle[-1][0] <= page.last_used_at):
                cartridge_id = idle.pop()[1]
                _free_cartridge(cartridge_id, cartridge_id_to_head, pages, available_floating)
            elif page is not None:
                _free_page(page, pages, available_floating)
            else:
                raise no_space(
                    f"{num_blocks} blocks are needed, {len(available_floating)} are free, and all "
                    "others are read by requests in flight"
                )
    return [available_floating.pop() for _ in range(num_blocks)]


def blocks_to_allocate(
    cartridge_id_to_num_blocks: dict[str, int], cartridge_id_to_head: dict[str, Any]
) -> dict[str, int]:
    """How many free blocks each cartridge of a request will take.

    None for one that another request is reading: it is there already, and its blocks are not
    counted as free. Tokasaurus asks for room for it once more, so that near a full cache a request
    that would fit ends the manager.
    """
    return {
        cartridge_id: 0
        if (head := cartridge_id_to_head.get(cartridge_id)) is not None and head.seq_ids
        else num_blocks
        for cartridge_id, num_blocks in cartridge_id_to_num_blocks.items()
    }


class _PagesByAge:
    """The pages that may go, oldest first, over a set that others change, too."""

    def __init__(self, available: set[Any], heap: list[Any] | None) -> None:
        self.available = available
        self._heap: list[Any] = [] if heap is None else heap

    def oldest(self) -> Any | None:
        while self.available:
            while self._heap:
                if self._heap[0] in self.available:
                    return self._heap[0]
                heapq.heappop(self._heap)
            # The hint is used up, yet there are pages that it did not know of.
            self._heap[:] = self.available
            heapq.heapify(self._heap)
        return None

    def add(self, page: Any) -> None:
        self.available.add(page)
        heapq.heappush(self._heap, page)


def _free_page(page: Any, pages: _PagesByAge, floating: list[Any]) -> Any | None:
    """Free one page; returns the page before it if that one may go next."""
    _must_be_unread(page)
    before = page.parent
    pages.available.remove(page)
    page.wipe()
    floating.append(page)
    if before is None or before.is_root() or before.children or before.seq_ids:
        return None
    pages.add(before)
    return before


def _free_cartridge(
    cartridge_id: str, heads: dict[str, Any], pages: _PagesByAge, floating: list[Any]
) -> None:
    """Free all blocks of a cartridge that nobody reads, and all pages computed behind it."""
    blocks = list(chain(heads[cartridge_id]))
    for block in blocks:
        _must_be_unread(block)
        if block.cartridge_id != cartridge_id:
            raise BrokenAllocator(
                f"block {block.idx} in the chain of cartridge {cartridge_id} is marked as part of "
                f"{block.cartridge_id}"
            )
    del heads[cartridge_id]
    for block in blocks:
        if hasattr(block, _WRITTEN):
            delattr(block, _WRITTEN)
        block.wipe()
        floating.append(block)
    # Who reads such a page reads the cartridge, too. So nobody reads any of them, and each hangs
    # together with the others of its branch, down to a leaf that is in the set.
    behind = [leaf for leaf in pages.available if cartridge_id in _cartridges(leaf)]
    for leaf in behind:
        page: Any | None = leaf
        while page is not None and cartridge_id in _cartridges(page):
            page = _free_page(page, pages, floating)


def _cartridges(page: Any) -> tuple[str, ...]:
    return page.prepended_cartridge_ids or ()


def _must_be_unread(block: Any) -> None:
    if block.seq_ids:
        raise BrokenAllocator(
            f"block {block.idx} was to be freed, but is read by {sorted(block.seq_ids)[:3]}"
        )
