"""The block bookkeeping, on a model of the server and on single blocks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cartridge_distill.engines.tokasaurus import allocator
from tests.engines.tokasaurus.model_server import (
    ModelBlock,
    ModelServer,
    OutOfBlocks,
    WrongRead,
    leaky_pick,
)

CACHE = 131_072 // 16
VERSION = 2_048 // 16


def chained(name: str, *blocks: ModelBlock) -> ModelBlock:
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        block.cartridge_id, block.next_cartridge_block_ref = name, following
    return blocks[0]


# --- the run that the notes describe ------------------------------------------------------------


def test_the_unrepaired_model_runs_dry_after_64_versions(tmp_path: Path) -> None:
    server = ModelServer(CACHE, tmp_path, pick=leaky_pick)
    for version in range(64):
        server.publish(f"v{version}", VERSION)
        server.start(f"s{version}", [f"v{version}"])
        server.finish(f"s{version}")
    server.account()
    server.publish("v64", VERSION)
    with pytest.raises(OutOfBlocks):
        server.start("s64", ["v64"])


def test_hundreds_of_versions_pass_through_the_repaired_model(tmp_path: Path) -> None:
    """As training does it: each version gets one token, then prompts of several pages, some of
    which begin alike, with sequences of this version in flight while others finish."""
    rng = random.Random(0)
    server = ModelServer(CACHE, tmp_path)
    for version in range(300):
        name = f"v{version}"
        server.publish(name, VERSION)
        server.start(f"{name}-first", [name], own=1)
        server.finish(f"{name}-first")
        for request in range(6):
            prompt = (1, request % 2, *(rng.randrange(50) for _ in range(rng.randrange(8))))
            server.start(f"{name}-{request}", [name], prompt, own=rng.randrange(1, 30))
            server.work(rng.randrange(3))
            if request % 2:
                server.finish(f"{name}-{rng.choice([request, request - 1])}")
        server.account()
        for seq_id in list(server.running):
            server.step(seq_id)
            server.finish(seq_id)
        server.work()
        server.account()
    assert server.loads == 300, "each version is loaded once"


@pytest.mark.parametrize("seed", range(6))
def test_random_interleavings_lose_nothing_and_read_only_what_is_theirs(
    tmp_path: Path, seed: int
) -> None:
    """A cache that is always nearly full; ids come back long after they were evicted."""
    rng = random.Random(seed)
    server = ModelServer(96, tmp_path)
    ids = [f"c{number}" for number in range(12)]
    for name in ids:
        server.publish(name, rng.randrange(1, 24))
    refused = 0
    for number in range(1_500):
        action = rng.random()
        if action < 0.4:
            cartridges = rng.sample(ids, rng.choice([0, 1, 1, 1, 2]))
            prompt = [rng.randrange(3) for _ in range(rng.randrange(6))]
            try:
                server.start(f"s{number}", cartridges, prompt, own=rng.randrange(4))
            except OutOfBlocks:
                refused += 1
        elif server.running and action < 0.8:
            server.finish(rng.choice(list(server.running)))
        elif server.running:
            server.step(rng.choice(list(server.running)))
        server.work(rng.randrange(4))
        server.account()
    for seq_id in list(server.running):
        server.finish(seq_id)
    server.work()
    server.account()
    assert refused > 20 and server.loads > 100, "the cache was never full: nothing was tested"
    # All of it can be had at once when nobody reads anything.
    server.publish("all", 96)
    server.start("last", ["all"])
    server.work()
    server.account()


def test_the_model_notices_an_evicted_id_that_is_read_as_if_it_were_there(tmp_path: Path) -> None:
    server = ModelServer(4, tmp_path, repaired_loading=False)
    for name in ("old", "new"):
        server.publish(name, 3)
        server.start(name, [name])
        server.finish(name)
        server.work()
    server.start("again", ["old"])
    with pytest.raises(WrongRead, match="weights of new"):
        server.work()


# --- single decisions ---------------------------------------------------------------------------


def test_what_is_freed_beyond_the_need_is_on_the_free_list() -> None:
    blocks = [ModelBlock(idx) for idx in range(6)]
    heads = {"old": chained("old", *blocks[:4])}
    floating = blocks[4:]
    picked = allocator.pick_blocks(3, floating, set(), heads)
    assert len(picked) == 3 and len(floating) == 3 and not heads
    assert {block.idx for block in picked + floating} == set(range(6))


def test_the_oldest_goes_first_be_it_page_or_cartridge() -> None:
    old, new, page, root = ModelBlock(0), ModelBlock(1), ModelBlock(2), ModelBlock(-1)
    old.last_used_at, page.last_used_at, new.last_used_at = 1.0, 2.0, 3.0
    heads = {"new": chained("new", new), "old": chained("old", old)}
    page.parent, page.key, root.children = root, "p", {"p": page}
    leaves = {page}
    order = [allocator.pick_blocks(1, [], leaves, heads)[0].idx for _ in range(3)]
    assert order == [0, 2, 1]


def test_a_request_that_cannot_be_served_loses_nothing() -> None:
    blocks = [ModelBlock(idx) for idx in range(5)]
    heads = {"idle": chained("idle", *blocks[:2]), "busy": chained("busy", *blocks[2:4])}
    for block in blocks[2:4]:
        block.seq_ids.add("s")
    floating = [blocks[4]]
    with pytest.raises(OutOfBlocks, match="4 blocks are needed, 3 are free"):
        allocator.pick_blocks(4, floating, set(), heads, no_space=OutOfBlocks)
    assert {block.idx for block in floating} == {0, 1, 4}
    assert list(heads) == ["busy"]


def test_a_heap_that_others_made_stale_is_only_a_hint() -> None:
    """Pages in it were taken by someone else, and others may go that it never heard of."""
    root = ModelBlock(-1)
    pages = [ModelBlock(idx, last_used_at=float(idx)) for idx in range(4)]
    for page in pages:
        page.parent, page.key = root, page.idx
        root.children[page.idx] = page
    taken, unheard = pages[:2], pages[2:]
    for page in taken:
        page.seq_ids.add("s")
    picked = allocator.pick_blocks(2, [], set(unheard), {}, list(taken))
    assert {page.idx for page in picked} == {2, 3}


def test_the_pages_behind_a_cartridge_go_with_it_and_no_others() -> None:
    root = ModelBlock(-1)
    cartridge = ModelBlock(0, last_used_at=1.0)
    heads = {"a": chained("a", cartridge)}
    pages = [ModelBlock(idx, last_used_at=9.0) for idx in range(1, 5)]
    behind = [("a",), ("a",), ("a", "b"), None]
    for page, before, names in zip(pages, [root, pages[0], root, root], behind, strict=True):
        page.parent, page.key, page.prepended_cartridge_ids = before, page.idx, names
        before.children[page.idx] = page
    leaves = {pages[1], pages[2], pages[3]}
    floating: list[ModelBlock] = []
    picked = allocator.pick_blocks(1, floating, leaves, heads)
    assert {block.idx for block in picked + floating} == {0, 1, 2, 3}
    assert leaves == {pages[3]} and list(root.children) == [4]


def test_a_block_in_use_is_never_freed() -> None:
    block, other = ModelBlock(0), ModelBlock(1)
    heads = {"a": chained("a", block, other)}
    other.seq_ids.add("s")  # which cannot be: the chain is used as one
    with pytest.raises(allocator.BrokenAllocator, match="block 1 .* is read by"):
        allocator.pick_blocks(1, [], set(), heads)
    assert list(heads) == ["a"]


def test_a_chain_that_runs_into_another_cartridge_is_not_freed() -> None:
    block, other = ModelBlock(0), ModelBlock(1)
    heads = {"a": chained("a", block)}
    chained("b", other)
    block.next_cartridge_block_ref = other
    with pytest.raises(allocator.BrokenAllocator, match="marked as part of b"):
        allocator.pick_blocks(1, [], set(), heads)


def test_a_cartridge_in_use_needs_no_room_once_more() -> None:
    busy, idle = ModelBlock(0, seq_ids={"s"}), ModelBlock(1)
    counts = allocator.blocks_to_allocate(
        {"busy": 4, "idle": 5, "absent": 6}, {"busy": busy, "idle": idle}
    )
    assert counts == {"busy": 0, "idle": 5, "absent": 6}
