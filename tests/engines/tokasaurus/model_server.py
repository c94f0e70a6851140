"""A MODEL of the server's block bookkeeping, written from the description of its behaviour.

It is not the server's code. It has what the repairs touch: blocks with the real field names, a free
list, a tree of prompt pages, chains of cartridge blocks, a manager that sends load commands, and a
worker that obeys them in order and notes what each block of its memory holds. Whatever the model
"computes" checks that each block it reads holds what the sequence believes, so that a wrong read is
an :class:`WrongRead`, not a number.

The unrepaired behaviour is here too (:func:`leaky_pick`, ``repaired_loading=False``), as the notes
describe it, so that tests can show that the model fails where the real server was seen to fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cartridge_distill.engines.tokasaurus import allocator, loading

PAGE = 16


class OutOfBlocks(Exception):
    """What the model's allocator raises where the real one says "Could not pick N blocks"."""


class WrongRead(AssertionError):
    """A block did not hold what the sequence that read it believed."""


@dataclass(eq=False)
class ModelBlock:
    idx: int
    last_used_at: float = 0.0
    seq_ids: set[str] = field(default_factory=set)
    children: dict[Any, ModelBlock] = field(default_factory=dict)
    parent: ModelBlock | None = None
    key: Any = None
    prepended_cartridge_ids: tuple[str, ...] | None = None
    cartridge_id: str | None = None
    next_cartridge_block_ref: ModelBlock | None = None

    def __lt__(self, other: ModelBlock) -> bool:
        return self.last_used_at < other.last_used_at

    def is_root(self) -> bool:
        return self.idx < 0

    def wipe(self) -> None:
        if self.parent is not None:
            del self.parent.children[self.key]
        self.parent = self.key = self.prepended_cartridge_ids = None
        self.cartridge_id = self.next_cartridge_block_ref = None
        self.children, self.seq_ids = {}, set()


Pick = Callable[..., list[ModelBlock]]


def leaky_pick(
    num_blocks: int,
    floating: list[ModelBlock],
    leaves: set[ModelBlock],
    heads: dict[str, ModelBlock],
    heap: list[ModelBlock] | None = None,
    *,
    no_space: type[Exception],
) -> list[ModelBlock]:
    """The behaviour in the notes: of an evicted cartridge only the first block comes back."""
    taken = [floating.pop() for _ in range(min(num_blocks, len(floating)))]
    while len(taken) < num_blocks and leaves:
        page = min(leaves)
        before = page.parent
        assert before is not None
        leaves.remove(page)
        page.wipe()
        taken.append(page)
        if not (before.is_root() or before.children or before.seq_ids):
            leaves.add(before)
    idle = sorted((h.last_used_at, name) for name, h in heads.items() if not h.seq_ids)
    for _, name in idle:
        if len(taken) == num_blocks:
            break
        block: ModelBlock | None = heads.pop(name)
        while block is not None:
            block.wipe()
            if len(taken) < num_blocks:
                taken.append(block)
            block = block.next_cartridge_block_ref  # which the wipe has cleared
    if len(taken) < num_blocks:
        raise no_space(f"could not pick {num_blocks} blocks")
    return taken


@dataclass(eq=False)
class ModelSequence:
    id: str
    prepended_cartridge_ids: tuple[str, ...]
    prompt: tuple[int, ...]  # one number per full page
    cartridge_indices: list[int] = field(default_factory=list)
    pages: list[ModelBlock] = field(default_factory=list)
    own: list[ModelBlock] = field(default_factory=list)
    cached_pages: int = 0


class ModelServer:
    """Manager and worker in one process, with the queue between them.

    Args:
        num_blocks: of the cache.
        directory: holds the cartridges' folders; :meth:`publish` makes one.
        pick: how blocks are found.
        repaired_loading: False keeps the two tables of ids that never forget.
    """

    def __init__(
        self,
        num_blocks: int,
        directory: Path,
        pick: Pick = allocator.pick_blocks,
        repaired_loading: bool = True,
    ) -> None:
        self.blocks = [ModelBlock(idx) for idx in range(num_blocks)]
        self.floating = list(self.blocks)
        self.root = ModelBlock(-1)
        self.leaves: set[ModelBlock] = set()
        self.heads: dict[str, ModelBlock] = {}
        self.running: dict[str, ModelSequence] = {}
        self.pick = pick
        self.repaired_loading = repaired_loading
        self.clock = 0.0
        self.sizes: dict[str, int] = {}
        self.weights: dict[str, str] = {}
        # as the manager's state
        self.block_allocator = SimpleNamespace(cartridge_id_to_head=self.heads)
        self.config = SimpleNamespace(cartridge_dir=str(directory), page_size=PAGE)
        self.logger = SimpleNamespace(info=lambda _: None, warning=lambda _: None)
        self.cartridge_id_to_config: dict[str, Any] = {}
        self.ever_loaded: set[str] = set()  # unrepaired only
        # the worker, behind a queue
        self.queue: deque[Any] = deque()
        self.memory: dict[int, Any] = {}
        self.worker = SimpleNamespace(loaded_cartridges=set())
        self.loads = 0

    # --- what the outside does ------------------------------------------------------------------

    def publish(self, name: str, num_blocks: int, weights: str | None = None) -> None:
        folder = Path(self.config.cartridge_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in loading.FILES:
            (folder / file).touch()
        self.sizes[name] = num_blocks
        self.weights[name] = weights or f"weights of {name}"
        self.cartridge_id_to_config[name] = SimpleNamespace(num_tokens=num_blocks * PAGE)

    def load_cartridge_config(self, name: str) -> Any:
        return self.cartridge_id_to_config[name]

    def start(
        self, seq_id: str, cartridges: Iterable[str] = (), prompt: Iterable[int] = (), own: int = 0
    ) -> ModelSequence:
        """Give a sequence its blocks, and send its first batch."""
        seq = ModelSequence(seq_id, tuple(sorted(cartridges)), tuple(prompt))
        for page in self._cached(seq):
            self._read(page, seq_id)
            seq.pages.append(page)
        seq.cached_pages = len(seq.pages)
        try:
            for name in seq.prepended_cartridge_ids:
                seq.cartridge_indices += [b.idx for b in self._cartridge(name, seq_id)]
            self._grow(seq, own)
        except OutOfBlocks:
            self._release(seq)
            raise
        self.running[seq_id] = seq
        self._submit(seq, first=True)
        return seq

    def step(self, seq_id: str) -> None:
        """One more batch with the sequence."""
        self._submit(self.running[seq_id], first=False)

    def finish(self, seq_id: str) -> None:
        """The sequence's blocks are nobody's from here on; its batches may still be queued."""
        self._release(self.running.pop(seq_id))

    def work(self, commands: int | None = None) -> None:
        """Let the worker take some commands from the queue, or all."""
        for _ in range(len(self.queue) if commands is None else min(commands, len(self.queue))):
            self.queue.popleft()()

    # --- manager ----------------------------------------------------------------------------------

    def _take(self, count: int, seq_id: str) -> list[ModelBlock]:
        if count == 0:
            return []
        blocks = self.pick(
            count, self.floating, self.leaves, self.heads, None, no_space=OutOfBlocks
        )
        assert len({block.idx for block in blocks}) == count
        for block in blocks:
            assert not block.seq_ids and block.parent is None and block.cartridge_id is None
            self._read(block, seq_id)
        return blocks

    def _read(self, block: ModelBlock, seq_id: str) -> None:
        self.clock += 1
        block.last_used_at = self.clock
        block.seq_ids.add(seq_id)
        self.leaves.discard(block)

    def _cached(self, seq: ModelSequence) -> list[ModelBlock]:
        found, node = [], self.root
        for number in seq.prompt:
            child = node.children.get((seq.prepended_cartridge_ids, number))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def _cartridge(self, name: str, seq_id: str) -> list[ModelBlock]:
        if name in self.heads:
            blocks = list(allocator.chain(self.heads[name]))
            for block in blocks:
                self._read(block, seq_id)
            return blocks
        blocks = self._take(self.sizes[name], seq_id)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            block.cartridge_id = name
            block.next_cartridge_block_ref = following
        self.heads[name] = blocks[0]
        return blocks

    def _grow(self, seq: ModelSequence, own: int) -> None:
        missing = seq.prompt[len(seq.pages) :]
        blocks = self._take(len(missing) + own, seq.id)
        for number, block in zip(missing, blocks, strict=False):
            before = seq.pages[-1] if seq.pages else self.root
            block.key = (seq.prepended_cartridge_ids, number)
            block.prepended_cartridge_ids = seq.prepended_cartridge_ids
            block.parent = before
            before.children[block.key] = block
            seq.pages.append(block)
        seq.own = blocks[len(missing) :]

    def _release(self, seq: ModelSequence) -> None:
        self.clock += 1
        for idx in seq.cartridge_indices:
            self.blocks[idx].seq_ids.discard(seq.id)
            self.blocks[idx].last_used_at = self.clock
        for page in seq.pages:
            page.seq_ids.discard(seq.id)
            if not page.seq_ids and not page.children:
                self.leaves.add(page)
        for block in seq.own:
            block.wipe()
            self.floating.append(block)

    def _submit(self, seq: ModelSequence, first: bool) -> None:
        decision = SimpleNamespace(
            decoding_seqs=[] if first else [seq], prefill_seqs=[(seq, 1)] if first else []
        )
        if self.repaired_loading:
            loading.send_load_commands(
                self,
                decision,
                send=lambda _, command: self.queue.append(command),
                command=self._load_command,
                sanitize=lambda name: name,
            )
        else:
            for name in seq.prepended_cartridge_ids:
                if name not in self.ever_loaded:
                    self.ever_loaded.add(name)
                    indices = [b.idx for b in allocator.chain(self.heads[name])]
                    self.queue.append(self._load_command(name, indices, ""))
        self.queue.append(self._batch(seq, first))

    # --- worker -----------------------------------------------------------------------------------

    def _load_command(
        self, cartridge_id: str, block_indices: list[int], cartridge_dir: str
    ) -> Callable[[], None]:
        def load() -> None:
            if cartridge_id in self.worker.loaded_cartridges and not self.repaired_loading:
                return
            self.worker.loaded_cartridges.add(cartridge_id)
            self.loads += 1
            for place, idx in enumerate(block_indices):
                self.memory[idx] = (self.weights[cartridge_id], place)

        return load

    def _batch(self, seq: ModelSequence, first: bool) -> Callable[[], None]:
        """Reads cartridges and cached pages, writes the pages that are new."""
        weights = tuple(self.weights[name] for name in seq.prepended_cartridge_ids)
        expected: dict[int, Any] = {}
        places = iter(seq.cartridge_indices)
        for name, weight in zip(seq.prepended_cartridge_ids, weights, strict=True):
            expected |= {next(places): (weight, place) for place in range(self.sizes[name])}
        pages = [block.idx for block in seq.pages]
        prompt, cached = seq.prompt, seq.cached_pages

        def run() -> None:
            for place, idx in enumerate(pages):
                content = (weights, prompt[: place + 1])
                if first and place >= cached:
                    self.memory[idx] = content
                else:
                    expected[idx] = content
            for idx, content in expected.items():
                if self.memory.get(idx) != content:
                    raise WrongRead(f"{seq.id}: block {idx} holds {self.memory.get(idx)}")

        return run

    # --- accounting -------------------------------------------------------------------------------

    def account(self) -> None:
        """Each block is exactly one of: floating, a page, of a resident cartridge, a sequence's."""
        places: dict[str, list[ModelBlock]] = {
            "floating": self.floating,
            "pages": self._all_pages(),
            "cartridges": [b for head in self.heads.values() for b in allocator.chain(head)],
            "own": [block for seq in self.running.values() for block in seq.own],
        }
        indices = [block.idx for blocks in places.values() for block in blocks]
        counts = {name: len(blocks) for name, blocks in places.items()}
        assert len(indices) == len(set(indices)), f"a block is in two places: {counts}"
        assert len(indices) == len(self.blocks), f"lost blocks: {counts} of {len(self.blocks)}"
        assert not any(block.seq_ids for block in self.floating)
        assert self.leaves == {b for b in places["pages"] if not b.seq_ids and not b.children}
        for page in places["pages"]:
            assert set(page.prepended_cartridge_ids or ()) <= set(self.heads), (
                "a page outlived the cartridge it was computed behind"
            )
        for seq in self.running.values():
            for idx in seq.cartridge_indices:
                assert seq.id in self.blocks[idx].seq_ids, "a cartridge in use was taken away"

    def _all_pages(self) -> list[ModelBlock]:
        found, todo = [], list(self.root.children.values())
        while todo:
            page = todo.pop()
            found.append(page)
            todo += page.children.values()
        return found
