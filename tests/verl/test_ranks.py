"""One rank and two: the same losses, gradients and cartridges from the same samples.

Two processes with real gloo and an FSDP2-sharded model run every scenario once; this process then
runs the same with one rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from tensordict import TensorDict

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.cartridge.prefix import Prefix
from tests.verl.engine_rig import (
    SHAPES,
    build_engine,
    free_port,
    loss_of,
    process_group,
    questions_file,
    rollouts,
    step,
)

pytestmark = pytest.mark.integration
RANKS = 2
ROWS = (*SHAPES, (7, 3, "blue"), (11, 9, "red"), (8, 6, None))
# "red" alone on rank 0, both documents on rank 1: the teacher's forwards must be evened out.
UNEVEN = ([0], [1, 2, 3])
EVEN = ([0, 1], [2, 3])
DOCUMENTS_APART = ([0, 2], [1, 3])
TWO_AND_FOUR = ([0, 4], [1, 2, 3, 5])


@dataclass(frozen=True)
class Scenario:
    """The rows of both ranks, an optimizer step each; a rank's are cut into micro-batches."""

    mini_batches: list[tuple[list[int], list[int]]]
    settings: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    by_teacher: tuple[int, ...] = ()
    prompts_come_again: bool = False
    behind: tuple[int, ...] = ()  # rows that the version before has written, once there is one

    def data(
        self, engine: Any, number: int, rank: int | None, before: Prefix | None
    ) -> list[TensorDict]:
        """What a rank gets at a step, or the only one: all, uncut."""
        made = []
        now, old = engine.cartridge.prefix(), self.behind if before else ()
        for rows in self.mini_batches:
            mine = sorted(sum(rows, [])) if rank is None else rows[rank]
            size = len(mine) // (self.micro_batches if rank is not None else 1)
            made.append(
                rollouts(
                    engine,
                    0 if self.prompts_come_again else number,
                    ROWS,
                    take=mine,
                    micro_batch=size,
                    by_teacher=self.by_teacher,
                    served=[before if before and row in old else now for row in range(len(ROWS))],
                    versions=[engine.version - (row in old) for row in range(len(ROWS))],
                )
            )
        return made


SCENARIOS = {
    # One document's KV is kept at a time, so that which one is there differs between the ranks.
    "uneven": Scenario([UNEVEN], {"teacher_cache_documents": 1}),
    "even": Scenario([EVEN], {"init": "random", "init_document": None}),
    "layers computed again": Scenario([UNEVEN], {"gradient_checkpointing": True}),
    # Rank 1's samples are all the teacher's, rank 0's none.
    "documents apart": Scenario(
        [DOCUMENTS_APART], {"topk": 5, "loss": "topk_cross_entropy"}, by_teacher=(1, 3)
    ),
    # The check's own forwards must be as many on the rank that has nothing of the student's.
    "compared with the rounding": Scenario(
        [DOCUMENTS_APART], {"max_logprob_diff": None}, by_teacher=(1, 3)
    ),
    # The bare model is one forward more of rank 0's teacher, and no document.
    "a general row on one rank": Scenario(
        [([2, 6], [1, 3])],
        {"loss": "reverse_kl_student_topk", "topk": 5, "skip_first_tokens": 2},
    ),
    # Rank 0's samples are all of the version before, and rank 1 has none of them to compare.
    "rollouts ahead": Scenario(
        [EVEN], {"async_steps": 1, "async_check_fraction": 0.5}, behind=(0, 1)
    ),
    "rollouts ahead, compared with the rounding": Scenario(
        [DOCUMENTS_APART],
        {"async_steps": 1, "max_logprob_diff": None},
        by_teacher=(1, 3),
        behind=(0,),
    ),
    "uneven, accumulated": Scenario([TWO_AND_FOUR], micro_batches=2),
    # The teacher computes answers alone from the second step on.
    "prompts come again": Scenario([([2, 6], [0, 1, 3])], prompts_come_again=True),
    "two steps a batch": Scenario([UNEVEN, ([5], [4])], {"max_staleness": 1}),
    "two steps, accumulated": Scenario(
        [TWO_AND_FOUR, EVEN], {"max_staleness": 1, "teacher_cache_documents": 1}, micro_batches=2
    ),
}
SCHEDULE = {"lr_scheduler_type": "cosine", "lr_warmup_steps": 1, "clip_grad": 0.05}
STEPS = 3


def run(model: Path, folder: Path, name: str, rank: int | None) -> list[dict[str, float]]:
    """Some batches of a scenario on this rank; what the last step on each was."""
    engine = build_engine(model, folder, optim=SCHEDULE, **SCENARIOS[name].settings)
    found = []
    before = None
    for number in range(STEPS):
        now = engine.cartridge.prefix()
        now = Prefix(
            [k.detach().clone() for k in now.keys], [v.detach().clone() for v in now.values]
        )
        out = step(engine, *SCENARIOS[name].data(engine, number, rank, before))
        before = now
        found.append(summary(engine, out))
    if SCENARIOS[name].prompts_come_again:
        assert out["metrics"]["teacher_prompt_tokens/computed"] == [0.0]
        assert out["metrics"]["teacher_prompt_tokens/kept"][0] > 0
    engine.save_checkpoint(str(folder / name / "actor"), global_step=STEPS)
    return found


def validated(model: Path, folder: Path) -> dict[str, float]:
    """What validation says of an untrained cartridge."""
    questions = str(questions_file(folder))
    engine = build_engine(model, folder, eval_questions=questions, **SCENARIOS["even"].settings)
    scores: dict[str, float] = engine.validate()
    assert engine.validate() == scores
    return scores


def summary(engine: Any, out: dict[str, Any]) -> dict[str, float]:
    weights = [p.detach().double() for p in engine.cartridge.trainable_parameters()]
    return {
        "loss": loss_of(out),
        "grad_norm": out["metrics"]["grad_norm"],
        "lr": out["metrics"]["lr"],
        "weights": float(sum(w.square().sum() for w in weights)) ** 0.5,
        "first": float(weights[0].flatten()[-1]),
        "entropy": out["metrics"]["student_entropy"][0],
        "general": out["metrics"].get("loss_general", [0.0])[0],
    }


def one_of_two(rank: int, port: int, model: Path, folder: Path) -> None:
    """A process of its own; rank 0 leaves the results, rank 1 says whether it has them too."""
    torch.set_num_threads(1)
    mine = folder / f"rank{rank}"
    mine.mkdir()
    with process_group(rank, RANKS, port):
        results = {}
        for name in SCENARIOS:
            results[name] = run(model, mine, name, rank)
        engine = build_engine(model, mine, optim=SCHEDULE, **SCENARIOS["even"].settings)
        results["validated"] = [validated(model, mine)]
        results["sharded"] = [{"sharded": float(_is_sharded(engine.module))}]
        # a checkpoint of one rank, which the parent wrote, goes on with two
        engine.load_checkpoint(str(folder / "one" / "even" / "actor"))
        out = step(engine, rollouts(engine, STEPS, take=EVEN[rank]))
        results["resumed"] = [summary(engine, out)]
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


def _is_sharded(module: Any) -> bool:
    return all(
        p.to_local().numel() < p.numel() for p in module.parameters() if hasattr(p, "to_local")
    ) and any(hasattr(p, "to_local") for p in module.parameters())


@pytest.fixture(scope="module")
def results(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Folder, then what one rank found, and both of two."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "one").mkdir()
    with process_group():
        alone = {name: run(model_folder, folder / "one", name, None) for name in SCENARIOS}
        alone["validated"] = [validated(model_folder, folder / "one")]
        context = torch.multiprocessing.spawn(
            one_of_two, (free_port(), model_folder, folder), RANKS, join=False
        )
        while not context.join(timeout=60):
            pass
        two = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
        yield folder, alone, two[0], two[1]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_as_one(results: Any, name: str) -> None:
    _, alone, first, second = results
    assert first[name] == second[name]  # the ranks hold the same cartridge, to the bit
    for mine, reference in zip(first[name], alone[name], strict=True):
        for what, value in reference.items():
            # a loss is a sum of differences of log-probs of about 1, in float32
            assert mine[what] == pytest.approx(value, rel=1e-5, abs=1e-6), (what, name)


def test_two_ranks_validate_as_one(results: Any) -> None:
    _, alone, first, second = results
    assert first["validated"] == second["validated"]
    assert first["validated"][0] == pytest.approx(alone["validated"][0], rel=1e-5)


def test_the_base_is_sharded_and_one_rank_writes(results: Any) -> None:
    folder, _, first, _ = results
    assert first["sharded"] == [{"sharded": 1.0}]
    assert (folder / "rank0" / "even" / "actor" / "cartridge").is_dir()
    assert not (folder / "rank1" / "even").exists()


def test_a_run_goes_on_with_another_number_of_ranks(results: Any, model_folder: Path) -> None:
    """Saved by one and gone on with two, and the other way round: the third is one all along."""
    folder, _, first, second = results

    def go_on(saved_by: str) -> dict[str, float]:
        settings = SCENARIOS["even"].settings
        engine = build_engine(model_folder, folder / "one", optim=SCHEDULE, **settings)
        engine.load_checkpoint(str(folder / saved_by / "even" / "actor"))
        return summary(engine, step(engine, rollouts(engine, STEPS, micro_batch=1)))

    reference = go_on("one")
    assert first["resumed"] == second["resumed"]
    for other in (go_on("rank0"), first["resumed"][0]):
        assert other == pytest.approx(reference, rel=1e-5)
