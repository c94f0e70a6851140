"""Checks on the REAL branch's own classes, each in a fresh process: ``python -m
tests.engines.tokasaurus.real_checks NAME``. Prints one line of JSON. Whether it is the repaired
branch is a matter of the ``PYTHONPATH``. See ``test_real_branch.py``."""

from __future__ import annotations

import json
import queue
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CACHE = 131_072 // 16
VERSION = 2_048 // 16


# --- allocator ----------------------------------------------------------------------------------


class Run:
    """Sequences on the real allocator, with the calls that the manager makes."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        from tokasaurus.manager.allocator import BlockAllocator, NoSpaceException

        self.no_space = NoSpaceException
        self.allocator = BlockAllocator(num_blocks=num_blocks, page_size=16)
        self.rng = random.Random(seed)
        self.running: dict[str, dict[str, Any]] = {}

    def start(
        self, seq_id: str, ids: tuple[str, ...], sizes: dict[str, int], prompt: list[int], heap: Any
    ) -> None:
        ids = tuple(sorted(ids))
        cartridge, tokens, _ = self.allocator.allocate_with_prefix_match(
            seq_id,
            prompt,
            available_leaf_heap=heap,
            allow_used_leaves_in_heap=True,
            prepended_cartridge_ids=ids or None,
            cartridge_id_to_num_blocks={name: sizes[name] for name in ids} or None,
        )
        self.running[seq_id] = {"ids": ids, "prompt": prompt, "c": cartridge, "t": tokens, "n": 0}

    def grow(self, seq_id: str, tokens: int, heap: Any) -> None:
        seq = self.running[seq_id]
        length = len(seq["prompt"]) + seq["n"] + tokens
        seq["t"] += self.allocator.allocate_up_to_length(
            seq_id, seq["t"], length, available_leaf_heap=heap
        )
        seq["n"] += tokens

    def finish(self, seq_id: str) -> None:
        seq = self.running.pop(seq_id)
        ids = seq["prompt"] + [self.rng.randrange(3) for _ in range(seq["n"])]
        self.allocator.free_and_update(
            seq_id, seq["c"], seq["t"], ids[:-1], prepended_cartridge_ids=seq["ids"] or None
        )

    def account(self) -> None:
        """Each block in exactly one place, by our count; and the branch's own checks."""
        allocator = self.allocator
        allocator.sanity_checks(set(self.running))
        pages, todo = [], list(allocator.prefix_tree.children.values())
        while todo:
            pages.append(todo.pop())
            todo += pages[-1].children.values()
        places = [block.idx for block in allocator.floating_blocks + pages]
        for head in allocator.cartridge_id_to_head.values():
            while head is not None:
                places.append(head.idx)
                head = head.next_cartridge_block_ref
        known = set(places)
        own = {idx for seq in self.running.values() for idx in seq["t"]} - known
        assert len(places) == len(known), "a block is in two places"
        assert len(known) + len(own) == allocator.num_blocks, "blocks are lost"
        for page in pages:
            assert set(page.prepended_cartridge_ids or ()) <= set(allocator.cartridge_id_to_head)


def thousand_versions() -> dict[str, Any]:
    run = Run(CACHE, seed=0)
    for version in range(1_000):
        name = f"v{version}"
        sizes = {name: VERSION}
        run.start(f"{name}-first", (name,), sizes, [1, 2, 3], None)
        run.finish(f"{name}-first")
        heap = run.allocator.make_available_leaf_heap()
        for number in range(6):
            prompt = [1] * 20 + [run.rng.randrange(5) for _ in range(run.rng.randrange(200))]
            run.start(f"{name}-{number}", (name,), sizes, prompt, heap)
        heap = run.allocator.make_available_leaf_heap()
        for number in range(6):
            run.grow(f"{name}-{number}", run.rng.randrange(1, 300), heap)
        run.account()
        for seq_id in run.rng.sample(list(run.running), len(run.running)):
            run.finish(seq_id)
        run.account()
    return {"versions": 1_000, "resident": len(run.allocator.cartridge_id_to_head)}


def runs_dry() -> dict[str, Any]:
    run = Run(CACHE, seed=0)
    for version in range(1_000):
        try:
            run.start(f"s{version}", (f"v{version}",), {f"v{version}": VERSION}, [1, 2, 3], None)
        except (run.no_space, RuntimeError) as error:
            return {"step": version + 1, "error": str(error)}
        run.finish(f"s{version}")
    return {"step": None}


def random_interleavings() -> dict[str, Any]:
    refused = started = 0
    for seed in range(5):
        run = Run(96, seed)
        sizes = {f"c{number}": run.rng.randrange(1, 24) for number in range(12)}
        for number in range(600):
            heap = run.allocator.make_available_leaf_heap()
            for part in range(run.rng.randrange(3)):
                ids = tuple(run.rng.sample(list(sizes), run.rng.choice([0, 1, 1, 1, 2])))
                prompt = [run.rng.randrange(2) for _ in range(run.rng.randrange(1, 70))]
                try:
                    run.start(f"s{number}-{part}", ids, sizes, prompt, heap)
                    started += 1
                except run.no_space:
                    refused += 1
            heap = run.allocator.make_available_leaf_heap()
            for seq_id in list(run.running):
                free = run.allocator.num_free_blocks
                if run.rng.random() < 0.3 and free >= 2:
                    run.grow(seq_id, run.rng.randrange(1, 17), heap)
            for seq_id in list(run.running):
                if run.rng.random() < 0.3:
                    run.finish(seq_id)
            run.account()
    return {"started": started, "refused": refused}


def full_cache_with_a_cartridge_in_use() -> dict[str, Any]:
    """10 blocks: a cartridge of 4, read by one sequence with 1 more. A second needs 2 of the 5."""
    run = Run(10, seed=0)
    run.start("a", ("c",), {"c": 4}, [1] * 3, None)
    run.running["a"]["t"] += run.allocator.allocate_up_to_length("a", [], 16 * 2)
    try:
        run.start("b", ("c",), {"c": 4}, [2] * 20, None)
    except run.no_space:
        return {"fits": False}
    return {"fits": True}


# --- from the manager's decision to the worker's cache -----------------------------------------


class Pair:
    """The real manager functions and the real loader, with a queue between them."""

    def __init__(self, num_blocks: int, directory: Path) -> None:
        import torch
        from loguru import logger
        from tokasaurus.manager.allocator import BatchIndexAllocator, BlockAllocator
        from tokasaurus.manager.types import ManagerState, SchedulingQueue
        from tokasaurus.model.kv_cache import LayerKVCache
        from tokasaurus.model.types import CartridgeManager

        logger.remove()
        self.torch = torch
        self.directory = directory
        state = ManagerState.__new__(ManagerState)  # __post_init__ wants a tokenizer
        state.config = SimpleNamespace(
            cartridge_dir=str(directory), page_size=16, pp_size=1, use_hydragen=False,
            max_seqs_per_forward=8,
        )  # fmt: skip
        state.block_allocator = BlockAllocator(num_blocks=num_blocks, page_size=16)
        state.batch_index_allocator = BatchIndexAllocator(8)
        state.scheduling_queue = SchedulingQueue()
        state.q_manager_to_model = queue.Queue()
        state.cartridge_id_to_config, state.cartridge_loading_state = {}, {}
        state.sent_no_more_inputs = False
        state.logger = logger
        self.state = state
        self.layers = [LayerKVCache(4, 2, num_blocks, 16, dtype=torch.float32) for _ in range(2)]
        attention = [SimpleNamespace(self_attn=SimpleNamespace(layer_cache=c)) for c in self.layers]
        model = SimpleNamespace(device="cpu", model=SimpleNamespace(layers=attention))
        self.worker = CartridgeManager(model, 16, logger=logger)

    def publish(self, name: str, number: float, tokens: int = 32, parameters: bool = False) -> None:
        torch = self.torch
        folder = self.directory / name
        folder.mkdir(parents=True, exist_ok=True)
        first, rest = (torch.full((1, 2, n, 4), number) for n in (16, tokens - 16))
        parts = {"frozen_keys": first, "frozen_values": first, "trainable_keys": rest}
        parts["trainable_values"] = rest
        make = torch.nn.Parameter if parameters else (lambda x: x)
        file = {key: [make(value.clone()) for _ in range(2)] for key, value in parts.items()}
        torch.save(file, folder / "cartridge.pt")
        (folder / "config.yaml").write_text(f"kv_cache_initializer: {{max_tokens: {tokens}}}\n")

    def ask(self, seq_id: str, name: str, blocks: int = 2) -> set[float]:
        """Run one sequence behind a cartridge; returns the numbers found in its blocks."""
        from tokasaurus.manager.manager import prepare_and_submit_to_model, real_allocate
        from tokasaurus.manager.types import ScheduleDecision, Sequence
        from tokasaurus.model.types import LoadCartridge

        seq = Sequence(seq_id, 4, [5] * 20, (name,))
        self.state.scheduling_queue.add_queued(seq)
        real_allocate(self.state, seq, self.state.block_allocator.make_available_leaf_heap())
        decision = ScheduleDecision("d", [], [(seq, seq.prompt_to_schedule())])
        prepare_and_submit_to_model(self.state, decision)
        found: set[float] = set()
        while not self.state.q_manager_to_model.empty():
            command = self.state.q_manager_to_model.get()
            if isinstance(command, LoadCartridge):
                self.worker.load_cartridge(
                    cartridge_id=command.cartridge_id,
                    block_indices=command.block_indices,
                    cartridge_dir=command.cartridge_dir,
                )
            else:
                pages = command.attention_info_builder.prefill_builder.kv_indices
                for layer in self.layers:
                    found |= set(layer.k_cache[pages[:blocks]].flatten().tolist())
                    found |= set(layer.v_cache[pages[:blocks]].flatten().tolist())
                    # what the model does with the prompt's pages
                    layer.k_cache[pages[blocks:]] = layer.v_cache[pages[blocks:]] = -1.0
        self.state.scheduling_queue.remove_prefilling(seq.id)
        self.state.deallocate(seq)
        return found


def evicted_id_comes_back() -> dict[str, Any]:
    """A cache for two cartridges of two blocks and their prompts: the third pushes one out."""
    with tempfile.TemporaryDirectory() as directory:
        pair = Pair(8, Path(directory))
        wrong = []
        names = [f"v{number}" for number in range(4)]
        for number, name in enumerate(names):
            pair.publish(name, float(number + 1))
        for turn in range(40):
            number = (0, 1, 2, 3, 0, 2)[turn % 6]
            found = pair.ask(f"s{turn}", names[number])
            if found != {float(number + 1)}:
                wrong.append([names[number], sorted(found)])
        return {"wrong": wrong}


def evicted_id_of_one_block_comes_back() -> dict[str, Any]:
    """Of one block nothing leaks; so the unrepaired server gets as far as a wrong read."""
    with tempfile.TemporaryDirectory() as directory:
        pair = Pair(4, Path(directory))
        for number in (1, 2, 3):
            pair.publish(f"v{number}", float(number), tokens=16)
        found = [pair.ask(f"s{turn}", f"v{v}", 1) for turn, v in enumerate((1, 2, 3, 1))]
        return {"read": [sorted(numbers) for numbers in found]}


def parameters_in_a_file() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        pair = Pair(8, Path(directory))
        pair.publish("v", 1.0, parameters=True)
        pair.ask("s", "v")
        return {"cache_hangs_on_parameters": pair.layers[0].k_cache.requires_grad}


def requests_that_cannot_be_served() -> dict[str, Any]:
    from tokasaurus.manager.manager import check_and_request_downloads

    def answer(*names: str) -> str:
        wanted = [{"id": name, "source": "local"} for name in names]
        try:
            check_and_request_downloads(pair.state, wanted)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return "accepted"

    with tempfile.TemporaryDirectory() as directory:
        pair = Pair(8, Path(directory))
        pair.publish("fine", 1.0)
        pair.publish("odd", 1.0, tokens=40)
        pair.publish("deleted", 1.0)
        answers = {"before": answer("deleted")}
        (Path(directory) / "deleted" / "cartridge.pt").unlink()
        return answers | {
            "fine": answer("fine"),
            "odd": answer("odd"),
            "deleted": answer("deleted"),
            "twice": answer("fine", "fine"),
            "never": answer("never"),
        }


def answers_are_forgotten() -> dict[str, Any]:
    import asyncio

    from tokasaurus.server import endpoints, utils

    async def run() -> int:
        state = SimpleNamespace(rid_to_req={}, requests_per_engine=[0])
        sent: Callable[..., Any] = lambda request: setattr(state, "sent", request)  # noqa: E731
        state.engines = [SimpleNamespace(q_server_to_manager=SimpleNamespace(put=sent))]
        originals = utils.process_request
        utils.process_request = lambda _, request: request
        try:
            task = asyncio.create_task(endpoints.generate_output(state, SimpleNamespace(id="r")))
            await asyncio.sleep(0)
            state.rid_to_req["r"].request_output = "output"
            state.rid_to_req["r"].event.set()
            assert (await task)[1] == "output"
        finally:
            utils.process_request = originals
        return len(state.rid_to_req)

    return {"kept": asyncio.run(run())}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    check.__name__: check
    for check in (
        thousand_versions,
        runs_dry,
        random_interleavings,
        full_cache_with_a_cartridge_in_use,
        evicted_id_comes_back,
        evicted_id_of_one_block_comes_back,
        parameters_in_a_file,
        requests_that_cannot_be_served,
        answers_are_forgotten,
    )
}

if __name__ == "__main__":
    print(json.dumps(CHECKS[sys.argv[1]]()))
