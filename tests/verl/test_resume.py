"""Saved and gone on with: the engine's files, and the folder that says which of them count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.cartridge.checkpoint import read_meta
from cartridge_distill.model.identity import weights_fingerprint
from cartridge_distill.sync.versions import new_run_id
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from tests.verl.engine_rig import SHAPES, loss_of, rollouts, step
from verl_patches.rollout import run_ids
from verl_patches.trainer import run_folder

SCHEDULE = {"lr_scheduler_type": "cosine", "lr_warmup_steps": 2, "weight_decay": 0.1}


@pytest.fixture
def build(build: Any) -> Any:
    return partial(build, optim=SCHEDULE)


def train(engine: Any, steps: range) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of each step; the samples follow from its number."""
    out = [step(engine, rollouts(engine, seed=number)) for number in steps]
    return [(loss_of(o), o["metrics"]["grad_norm"], o["metrics"]["lr"]) for o in out]


STRAIGHT = {"optim": {"lr_warmup_steps": 2}, "lr_decay_to": 0.1, "skip_first_tokens": 2}


@pytest.mark.parametrize("settings", [{}, STRAIGHT], ids=["cosine", "straight down"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    build: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Exactly: same process, same kernels, so not a bit may differ."""
    build = partial(build, **settings)
    engine = build()
    train(engine, range(3))
    engine.save_checkpoint(str(tmp_path / "actor"), global_step=3)
    meta = read_meta(tmp_path / "actor" / "cartridge")
    assert meta["model_fingerprint"] == weights_fingerprint(engine.model_config.local_path)
    torch.manual_seed(1)  # the state below is not what the checkpoint holds
    expected = train(engine, range(3, 6))
    drawn = torch.rand(1)

    resumed = build()
    resumed.load_checkpoint(str(tmp_path / "actor"))
    assert (resumed.step, resumed.version) == (3, 3)
    torch.manual_seed(1)
    assert train(resumed, range(3, 6)) == expected
    assert torch.equal(torch.rand(1), drawn)
    for mine, theirs in zip(
        resumed.cartridge.state_dict().values(), engine.cartridge.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_prompts_that_the_teacher_keeps_change_no_bit_of_a_resumed_run(
    build: Any, tmp_path: Path
) -> None:
    """Which tokens are computed decides the order of sums: both have the same ones after a save.

    Prompts of two seeds, an older one of them at the end; saved twice, resumed from the second.
    """
    shapes: list[Any] = [*SHAPES, (6, 4, None), (4, 2, None)]

    def train_on(engine: Any, seeds: Sequence[int]) -> list[tuple[float, float]]:
        out = [step(engine, rollouts(engine, seed, shapes)) for seed in seeds]
        return [(loss_of(o), o["metrics"]["grad_norm"]) for o in out]

    engine = build()
    for seed in (0, 1):
        train_on(engine, [seed, seed])
        engine.save_checkpoint(str(tmp_path / "actor"), global_step=2 * seed + 2)
    resumed = build()
    resumed.load_checkpoint(str(tmp_path / "actor"))
    kept = engine.teacher.prompts
    assert len(kept) == len(resumed.teacher.prompts) == 2 * sum(n - 1 for n, _, _ in shapes)
    computed = kept.computed
    assert train_on(engine, [1, 0]) == train_on(resumed, [1, 0])
    assert kept.computed == computed  # all were there
    state, other = engine.cartridge.state_dict(), resumed.cartridge.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_random_numbers_go_on(build: Any, tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float, float, float]:
        return (
            float(torch.rand(1)),
            float(np.random.rand()),
            float(np.random.randn()),
            random.random(),
            random.gauss(0, 1),
        )

    engine = build()
    draw()  # the second number of a pair of normal ones is now waiting
    engine.save_checkpoint(str(tmp_path / "actor"))
    expected = draw()
    engine.load_checkpoint(str(tmp_path / "actor"))
    assert draw() == expected


def test_a_checkpoint_is_small_and_holds_no_pickle(
    build: Any, tmp_path: Path, model_folder: Path
) -> None:
    engine = build()
    train(engine, range(1))
    engine.save_checkpoint(str(tmp_path / "actor"))
    files = {f.relative_to(tmp_path).as_posix(): f for f in tmp_path.glob("actor/**/*.*")}
    assert sorted(files) == [
        "actor/cartridge/cartridge.json",
        "actor/cartridge/cartridge.safetensors",
        "actor/training_state.json",
        "actor/training_state.safetensors",
    ]
    cartridge = files["actor/cartridge/cartridge.safetensors"].stat().st_size
    # two moments of the trained tokens, and some random generators
    assert files["actor/training_state.safetensors"].stat().st_size < 2 * cartridge + 40_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 16}, "cartridge.num_tokens: 32 there, 16 now"),
        ({"lr": 0.01}, "cartridge.lr: 0.02 there, 0.01 now"),
        ({"optim": {**SCHEDULE, "weight_decay": 0.0}}, "optim.weight_decay: 0.1 there, 0.0 now"),
        ({"dtype": "bf16", "max_logprob_diff": 1.0}, "model_dtype: 'fp32' there, 'bf16' now"),
    ],
)
def test_another_runs_state_is_refused(
    build: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    build().save_checkpoint(str(tmp_path / "actor"))
    with pytest.raises(ConfigError, match=message):
        build(**changes).load_checkpoint(str(tmp_path / "actor"))


def test_more_steps_than_planned_follow_the_new_schedule(build: Any, tmp_path: Path) -> None:
    engine = build()
    train(engine, range(3))
    engine.save_checkpoint(str(tmp_path / "actor"))
    longer = build(optim={**SCHEDULE, "total_training_steps": 20})
    longer.load_checkpoint(str(tmp_path / "actor"))
    fresh = build(optim={**SCHEDULE, "total_training_steps": 20})
    rates = [out[2] for out in train(fresh, range(4))]
    assert train(longer, range(3, 4))[0][2] == rates[3]


def test_other_documents_are_refused(build: Any, tmp_path: Path) -> None:
    engine = build()
    engine.save_checkpoint(str(tmp_path / "actor"))
    engine.teacher.documents._texts["red"] += "And it is new."
    with pytest.raises(ConfigError, match="documents: '.*' there, '.*' now"):
        engine.load_checkpoint(str(tmp_path / "actor"))


def test_damage_is_named(build: Any, tmp_path: Path) -> None:
    engine = build()
    engine.save_checkpoint(str(tmp_path / "actor"))
    state = tmp_path / "actor" / "training_state.safetensors"
    whole = state.read_bytes()
    changed = bytearray(whole)
    changed[-1000] ^= 1
    state.write_bytes(changed)
    with pytest.raises(CartridgeFormatError, match="the tensors are not those that were written"):
        engine.load_checkpoint(str(tmp_path / "actor"))
    state.write_bytes(whole)
    engine.load_checkpoint(str(tmp_path / "actor"))
    train(engine, range(1))
    engine.save_checkpoint(str(tmp_path / "later"))
    shutil.copytree(tmp_path / "later" / "cartridge", tmp_path / "actor" / "cartridge2")
    shutil.rmtree(tmp_path / "actor" / "cartridge")
    (tmp_path / "actor" / "cartridge2").rename(tmp_path / "actor" / "cartridge")
    with pytest.raises(CartridgeFormatError, match="of step 1, the training state of step 0"):
        engine.load_checkpoint(str(tmp_path / "actor"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CartridgeFormatError, match="the training state is damaged"):
        engine.load_checkpoint(str(tmp_path / "actor"))
    state.unlink()
    with pytest.raises(CartridgeFormatError, match="without its optimizer"):
        engine.load_checkpoint(str(tmp_path / "actor"))


def test_a_save_that_is_killed_leaves_the_one_before(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    engine.save_checkpoint(str(tmp_path / "actor"))
    before = (tmp_path / "actor" / "training_state.json").read_text()
    train(engine, range(1))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("verl_patches.actor.engine_state.save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        engine.save_checkpoint(str(tmp_path / "actor"))
    assert (tmp_path / "actor" / "training_state.json").read_text() == before
    engine.load_checkpoint(str(tmp_path / "actor"))
    assert engine.step == 0


# The folder of a run.

ABOUT = {"data rows": 12, "data.train_batch_size": 4}


def save(run: Path, number: int) -> None:
    """What the trainer writes, in its order."""
    folder = run_folder.step_folder(run, number)
    (folder / "actor").mkdir(parents=True, exist_ok=True)
    run_folder.write_data_position(folder, {"_num_yielded": number}, ABOUT)
    run_folder.mark_complete(run, number)


def test_a_checkpoint_counts_when_the_tracker_names_it(tmp_path: Path) -> None:
    assert run_folder.checkpoint_to_resume("auto", tmp_path, None) is None
    save(tmp_path, 1)
    (tmp_path / "global_step_2" / "actor").mkdir(parents=True)  # killed before the rest
    found = run_folder.checkpoint_to_resume("auto", tmp_path, None)
    assert found == tmp_path / "global_step_1"
    assert run_folder.read_data_position(found, ABOUT) == {"_num_yielded": 1}
    given = str(tmp_path / "global_step_1")
    assert run_folder.checkpoint_to_resume("resume_path", tmp_path, given) == found


def test_every_start_is_noted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = new_run_id("mine"), new_run_id("mine")
    assert run_ids.record_start(run, first) == []
    with (run / run_ids.RUNS_FILE).open("a") as file:
        file.write("../elsewhere\n")  # not what this program writes
    assert run_ids.record_start(run, second) == [first]
    assert run_ids.record_start(run, second) == [first]
    assert (run / run_ids.RUNS_FILE).read_text() == f"{first}\n{second}\n"


def test_a_folder_that_the_nodes_do_not_share_is_refused(tmp_path: Path) -> None:
    run_folder.check_shared(tmp_path)
    with pytest.raises(ConfigError, match="fix: .*trainer.default_local_dir on a disk that all"):
        run_folder.check_shared(tmp_path / "global_step_1" / "actor")


def test_what_would_silently_start_over_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(ConfigError, match="saved up to step 2.*fix: set trainer.resume_mode=auto"):
        run_folder.checkpoint_to_resume("disable", tmp_path, None)
    shutil.rmtree(tmp_path / "global_step_2" / "actor")
    with pytest.raises(CartridgeFormatError, match="not complete.*global_step_1"):
        run_folder.checkpoint_to_resume("auto", tmp_path, None)
    (tmp_path / run_folder.TRACKER).write_text("")
    with pytest.raises(CartridgeFormatError, match="says '', not the number of a step"):
        run_folder.checkpoint_to_resume("auto", tmp_path, None)
    for given, message in (
        (None, "name one of"),
        (str(tmp_path), "<run>/global_step_<number>"),
        (str(tmp_path / "global_step_7"), "no complete checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_folder.checkpoint_to_resume("resume_path", tmp_path, given)


LOST: dict[str, Any] = {
    "gone": lambda tracker: tracker.unlink(),
    "empty": lambda tracker: tracker.write_text(""),
    "no number": lambda tracker: tracker.write_text("seven"),
    "negative": lambda tracker: tracker.write_text("-1"),
    "other digits": lambda tracker: tracker.write_text("\u0663", encoding="utf-8"),
    "endless": lambda tracker: tracker.write_text("9" * 5000),
    "no text": lambda tracker: tracker.write_bytes(b"\xff\xfe\x00"),
    "a folder": lambda tracker: (tracker.unlink(), tracker.mkdir()),
    "zero": lambda tracker: tracker.write_text("0"),
    "elsewhere": lambda tracker: tracker.write_text("../global_step_2"),
}


@pytest.mark.parametrize("kind", sorted(LOST))
@pytest.mark.parametrize("mode", ["auto", "disable"])
def test_a_lost_tracker_is_an_error_that_says_how_to_go_on(
    kind: str, mode: str, tmp_path: Path
) -> None:
    for number in (1, 2):
        save(tmp_path, number)
    LOST[kind](tmp_path / run_folder.TRACKER)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CartridgeFormatError) as failure:
        run_folder.checkpoint_to_resume(mode, tmp_path, None)
    said = str(failure.value)
    assert run_folder.TRACKER in said and "Nothing was deleted" in said
    assert f"echo 2 > {tmp_path / run_folder.TRACKER}" in said
    assert sorted(tmp_path.rglob("*")) == before
    # Both ways that it names lead on.
    given = str(tmp_path / "global_step_1")
    assert given in said
    assert str(run_folder.checkpoint_to_resume("resume_path", tmp_path, given)) == given
    if kind != "a folder":
        (tmp_path / run_folder.TRACKER).write_text("2\n")
        assert run_folder.checkpoint_to_resume("auto", tmp_path, None) == tmp_path / "global_step_2"


def test_a_first_save_that_was_killed_is_no_lost_tracker(tmp_path: Path) -> None:
    """Both parts are there, and the tracker was not written yet: the run begins anew."""
    folder = run_folder.step_folder(tmp_path, 1)
    run_folder.begin_save(folder)
    (folder / "actor").mkdir()
    run_folder.write_data_position(folder, {}, ABOUT)
    assert run_folder.checkpoint_to_resume("auto", tmp_path, None) is None
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        run_folder.checkpoint_to_resume("resume_path", tmp_path, str(folder))
    run_folder.mark_complete(tmp_path, 1)
    assert run_folder.checkpoint_to_resume("auto", tmp_path, None) == folder
    # Killed between the tracker and the end of the save: it counts, and it stays.
    run_folder.begin_save(folder)
    assert run_folder.checkpoint_to_resume("auto", tmp_path, None) == folder
    save(tmp_path, 2)
    (tmp_path / run_folder.TRACKER).write_text("1")
    assert run_folder.keep_newest(tmp_path, 2, 2) == []
    assert run_folder.keep_newest(tmp_path, 2, None) == []


def test_a_run_from_elsewhere_is_not_mixed_into_one_that_is_there(tmp_path: Path) -> None:
    save(tmp_path / "here", 5)
    save(tmp_path / "there", 3)
    given = str(tmp_path / "there" / "global_step_3")
    with pytest.raises(ConfigError, match="saved up to step 5.*would be mixed"):
        run_folder.checkpoint_to_resume("resume_path", tmp_path / "here", given)
    found = run_folder.checkpoint_to_resume("resume_path", tmp_path / "new", given)
    assert str(found) == given


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"PK\x03\x04 cut"])
def test_a_damaged_data_position_ends_in_words(damage: bytes, tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "global_step_1"
    whole = (folder / run_folder.DATA_FILE).read_bytes()
    one_bit = bytearray(whole)
    one_bit[whole.index(b"_num_yielded") + 18] ^= 1
    for content in (damage, whole[: len(whole) // 2], whole[:-30], bytes(one_bit)):
        (folder / run_folder.DATA_FILE).write_bytes(content)
        with pytest.raises(CartridgeFormatError, match="cannot be read as a data position"):
            run_folder.read_data_position(folder, ABOUT)
    for saved in ([], {"loader": 3, "about": ABOUT}, {"loader": {}, "about": None}, "x"):
        torch.save(saved, folder / run_folder.DATA_FILE)
        with pytest.raises(CartridgeFormatError, match="cannot be read as a data position"):
            run_folder.read_data_position(folder, ABOUT)


def test_other_data_is_refused_and_a_hostile_file_is_not_run(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "global_step_1"
    with pytest.raises(ConfigError, match="data rows: 12 there, 13 now"):
        run_folder.read_data_position(folder, {**ABOUT, "data rows": 13})

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"loader": Hostile(), "about": ABOUT}, folder / run_folder.DATA_FILE)
    with pytest.raises(CartridgeFormatError, match="cannot be read as a data position"):
        run_folder.read_data_position(folder, ABOUT)
    assert not (tmp_path / "touched").exists()


def test_the_newest_stay(tmp_path: Path) -> None:
    for number in (1, 2, 3, 9):
        save(tmp_path, number)
    (tmp_path / "global_step_4" / "actor").mkdir(parents=True)  # left by a save that was killed
    (tmp_path / "global_step_3" / ".actor.x1y2").mkdir()
    save(tmp_path, 5)

    def there() -> list[str]:
        return sorted(f.name for f in tmp_path.iterdir() if f.is_dir())

    run_folder.keep_newest(tmp_path, 5, None)
    assert there() == [f"global_step_{n}" for n in (1, 2, 3, 5, 9)]
    run_folder.keep_newest(tmp_path, 5, 2)
    assert there() == [f"global_step_{n}" for n in (3, 5, 9)]  # 9 is of another timeline
    assert list((tmp_path / "global_step_3").glob(".*")) == []


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_data_goes_on_where_it_stood(tmp_path: Path, shuffle: bool) -> None:
    """veRL's sampler and loader, stopped after each of nine batches, three epochs."""
    from omegaconf import OmegaConf
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo.utils import create_rl_sampler

    class Walk:
        def __init__(self) -> None:
            rows = list(range(7))
            sampler = create_rl_sampler(OmegaConf.create({"shuffle": shuffle, "seed": 0}), rows)
            self.loader = StatefulDataLoader(rows, batch_size=2, drop_last=True, sampler=sampler)
            self.iterator: Any = None

        def fetch(self) -> list[int]:  # as PPOTrainer._fetch_one_gen_batch
            try:
                if self.iterator is None:
                    self.iterator = iter(self.loader)
                return list(next(self.iterator).tolist())
            except StopIteration:
                self.iterator = iter(self.loader)
                return list(next(self.iterator).tolist())

    whole, walk = [], Walk()
    for number in range(9):
        whole.append(walk.fetch())
        run_folder.write_data_position(tmp_path / str(number), walk.loader.state_dict(), ABOUT)
    for number in range(9):
        again = Walk()
        again.loader.load_state_dict(run_folder.read_data_position(tmp_path / str(number), ABOUT))
        assert [again.fetch() for _ in range(8 - number)] == whole[number + 1 :]


def test_the_recipe_is_readable(build: Any, tmp_path: Path) -> None:
    build().save_checkpoint(str(tmp_path / "actor"))
    about = json.loads((tmp_path / "actor" / "training_state.json").read_text())
    assert about["step"] == 0
    assert about["recipe"]["optim.lr_scheduler_type"] == "cosine"
