"""The engine with veRL's own config classes, one process, real gloo: what trains, what does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from cartridge_distill.model.beginning import first_cartridge
from cartridge_distill.util.errors import ConfigError, DocumentError, OffPolicyError, RolloutError
from tests.tiny import plain_logprobs, tiny_model
from tests.verl.engine_rig import SHAPES, TEMPERATURE, rollouts, step
from verl_patches.actor.initial_cartridge import initial_document
from verl_patches.hooks import distill_loss


@pytest.fixture
def engine(build: Any) -> Any:
    return build()


def replace(data: TensorDict, name: str, values: list[Any]) -> TensorDict:
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor_stack(data, name, values)
    return data


def test_steps_lower_the_loss_and_touch_the_cartridge_alone(engine: Any) -> None:
    losses = []
    for _ in range(4):
        out = step(engine, rollouts(engine))
        losses.append(sum(out["loss"]))
        assert max(out["metrics"]["logprob_diff/max"]) < 1e-5  # length 1 and 16 in one batch
        assert out["metrics"]["frozen_tokens_changed"] == [0.0]
    assert losses[-1] < losses[0] * 0.9
    assert engine.step == 4
    assert engine.teacher.prefills == 2  # two documents, four steps
    # The prompts of all steps are the first one's; the last token of each is computed again.
    prompts = sum(prompt - 1 for prompt, _, _ in SHAPES)
    assert out["metrics"]["teacher_prompt_tokens/computed"] == [0.0]
    assert out["metrics"]["teacher_prompt_tokens/kept"] == [float(prompts)]


def test_micro_batches_add_up_to_one_batch(engine: Any) -> None:
    """The mean is over response tokens, however the batch is cut."""
    gradients = []
    for size in (1, 2, 4):
        data = rollouts(engine)
        from verl.utils import tensordict_utils as tu

        tu.assign_non_tensor(data, micro_batch_size_per_gpu=size)
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(data, distill_loss)
        gradients.append([p.grad.clone() for p in engine.cartridge.trainable_parameters()])
    for other in gradients[1:]:
        for mine, reference in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-4)


def no_logprob(data: TensorDict) -> TensorDict:
    del data["rollout_log_probs"]
    return data


def wrong_logprob(data: TensorDict) -> TensorDict:
    values = [v.clone() for v in data["rollout_log_probs"].unbind()]
    values[1][7] -= 0.01
    data["rollout_log_probs"] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return data


def nan_logprob(data: TensorDict) -> TensorDict:
    values = [v.clone() for v in data["rollout_log_probs"].unbind()]
    values[0][0] = float("nan")
    data["rollout_log_probs"] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return data


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        pytest.param(
            lambda d: replace(
                d, "extra_fields", [{"global_steps": -1}] + [{"global_steps": 0}] * 3
            ),
            OffPolicyError,
            r"step \[-1\] reached the trainer at step 0",
            id="stale version",
        ),
        pytest.param(
            lambda d: replace(d, "extra_fields", [{}] * 4),
            OffPolicyError,
            r"step \[None\]",
            id="no version label",
        ),
        pytest.param(wrong_logprob, OffPolicyError, "disagree .* by 0.01", id="other log-prob"),
        pytest.param(nan_logprob, OffPolicyError, "disagree .* by nan", id="NaN log-prob"),
        pytest.param(no_logprob, RolloutError, "calculate_log_probs=True", id="no log-probs"),
        pytest.param(
            lambda d: replace(d, "extra_info", [{"document_id": "green"}] * 4),
            DocumentError,
            "'green' is not in",
            id="missing document",
        ),
        pytest.param(
            lambda d: replace(d, "extra_info", [{"split": "train"}] * 4),
            DocumentError,
            "has no 'document_id'",
            id="no document id",
        ),
    ],
)
def test_nothing_is_trained_on(
    engine: Any, spoil: Any, error: type[Exception], message: str
) -> None:
    before = {k: v.clone() for k, v in engine.cartridge.state_dict().items()}
    with pytest.raises(error, match=message):
        step(engine, spoil(rollouts(engine)))
    assert engine.step == 0
    assert all(torch.equal(v, before[k]) for k, v in engine.cartridge.state_dict().items())
    assert all(p.grad is None for p in engine.cartridge.trainable_parameters())
    step(engine, rollouts(engine))  # and a sound batch still trains
    assert engine.step == 1


@pytest.mark.parametrize("by_teacher", [[], [1, 2], [0, 1, 2, 3]], ids=["none", "half", "all"])
@pytest.mark.parametrize("size", [1, 4])
def test_batches_that_both_write_train(engine: Any, by_teacher: list[int], size: int) -> None:
    losses = []
    for _ in range(3):
        out = step(engine, rollouts(engine, micro_batch=size, by_teacher=by_teacher))
        losses.append(sum(out["loss"]))
        metrics = out["metrics"]
        assert max(metrics["logprob_diff/max"]) < 1e-5
        assert ("logprob_diff/teacher_max" in metrics) == bool(by_teacher)
        assert len(metrics["student_logprob"]) == 4 // size
    assert losses[-1] < losses[0]
    assert engine.step == 3


def test_who_wrote_a_token_does_not_change_its_loss(engine: Any) -> None:
    """The same tokens, with other labels: the loss is the same to the last bit."""
    gradients = []
    for by_teacher in ([], [0, 2]):
        data = rollouts(engine, by_teacher=by_teacher)
        engine.teacher.prompts.clear()  # else the second time has other sums
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(data, distill_loss)
        gradients.append([p.grad.clone() for p in engine.cartridge.trainable_parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_the_teachers_temperature_is_its_own(build: Any) -> None:
    hot = build(teacher_temperature=1.5)
    step(hot, rollouts(hot, by_teacher=[1], teacher_temperature=1.5))
    with pytest.raises(OffPolicyError, match="written by the teacher"):
        step(hot, rollouts(hot, by_teacher=[1]))
    greedy = build(teacher_temperature=0.0)
    step(greedy, rollouts(greedy, by_teacher=[0, 1, 2, 3], teacher_temperature=0.0))


def labelled(data: TensorDict, row: int, label: dict[str, Any]) -> TensorDict:
    labels = [{"author": "teacher"}] * 4
    return replace(data, "extra_fields", [*labels[:row], label, *labels[row + 1 :]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda e: labelled(rollouts(e, by_teacher=[0, 1, 3]), 2, {"author": "teacher"}),
            r"disagree .*written by the teacher.*without the document",
            id="the student's answer for the teacher's",
        ),
        pytest.param(
            lambda e: labelled(rollouts(e, by_teacher=[0, 1, 2, 3]), 2, {"global_steps": 0}),
            r"disagree .*written by the student.*this cartridge version",
            id="the teacher's answer for the student's",
        ),
        pytest.param(
            lambda e: replace(
                rollouts(e, by_teacher=[0, 1, 2, 3]), "extra_info", [{"document_id": "red"}] * 4
            ),
            r"disagree .*written by the teacher",
            id="another document",
        ),
        pytest.param(
            lambda e: labelled(
                rollouts(e, by_teacher=[0, 1, 2, 3]), 1, {"author": "teacher", "global_steps": 0}
            ),
            r"answers of the teacher carry cartridge steps \[0\]",
            id="a version label",
        ),
        pytest.param(
            lambda e: nan_logprob(rollouts(e, by_teacher=[0, 1])), "by nan", id="NaN log-prob"
        ),
        pytest.param(
            lambda e: bare(rollouts(e, by_teacher=[0, 1, 2, 3])),
            r"disagree .*written by the teacher",
            id="the base model without any document",
        ),
    ],
)
def test_a_wrong_answer_of_the_teacher_is_not_trained_on(
    engine: Any, spoil: Any, message: str
) -> None:
    before = {k: v.clone() for k, v in engine.cartridge.state_dict().items()}
    with pytest.raises(OffPolicyError, match=message):
        step(engine, spoil(engine))
    assert engine.step == 0
    assert all(torch.equal(v, before[k]) for k, v in engine.cartridge.state_dict().items())
    step(engine, rollouts(engine, by_teacher=[1]))  # and a sound batch still trains


def bare(data: TensorDict) -> TensorDict:
    """Row 0 as a base model without the document would have written it."""
    values = [v.clone() for v in data["rollout_log_probs"].unbind()]
    prompt, response = data["prompts"].unbind()[0], data["responses"].unbind()[0]
    values[0] = torch.tensor(
        plain_logprobs(tiny_model(), None, prompt.tolist(), response.tolist(), TEMPERATURE)
    )
    data["rollout_log_probs"] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return data


def test_a_gradient_that_is_not_finite_ends_the_run(engine: Any) -> None:
    step(engine, rollouts(engine))
    for parameter in engine.cartridge.trainable_parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(FloatingPointError, match="the step was not taken"):
        engine.optimizer_step()
    assert engine.step == 1


def test_the_weight_update_carries_the_cartridge_alone(engine: Any) -> None:
    from cartridge_distill.cartridge.snapshot import Snapshot

    tensors, peft = engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
    taken = Snapshot.take(dict(tensors), torch.float32)
    assert peft is None
    assert (taken.num_tokens, taken.num_frozen_tokens) == (32, 1)
    mine = engine.cartridge.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in taken.items())
    # a copy: the next step must not reach what is being published
    with torch.no_grad():
        mine["trainable_keys.0"] += 1
    assert not torch.equal(dict(taken.items())["trainable_keys.0"], mine["trainable_keys.0"])


def test_a_checkpoint_is_the_cartridge_and_proves_the_base_unchanged(
    engine: Any, tmp_path: Path
) -> None:
    from cartridge_distill.cartridge.checkpoint import load_cartridge, read_meta

    step(engine, rollouts(engine))
    engine.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    saved = load_cartridge(tmp_path / "actor" / "cartridge")
    assert torch.equal(saved.trainable_keys[0], engine.cartridge.trainable_keys[0])
    meta = read_meta(tmp_path / "actor" / "cartridge")
    documents = engine.teacher.documents
    one = len(documents.ids) == 1
    assert meta["step"] == 1
    assert meta["document_title"] == (documents.ids[0] if one else None)
    assert bool(meta["document_sha256"]) == one
    with torch.no_grad():
        next(engine.module.parameters()).view(-1)[0] += 1
    with pytest.raises(RuntimeError, match="frozen base model's weights changed"):
        engine.save_checkpoint(str(tmp_path / "other"), global_step=2)


def test_several_documents_need_a_choice_for_the_start(engine: Any) -> None:
    settings = SimpleNamespace(init_document=None, documents="documents.jsonl")
    with pytest.raises(ConfigError, match="holds 2 documents; fix: set actor.cartridge.init_doc"):
        initial_document(settings, engine.teacher.documents.ids)


@pytest.mark.parametrize("init", ["spans", "attended"])
def test_a_run_may_begin_with_other_parts_of_the_document(build: Any, init: str) -> None:
    engine, plain = build(init=init), build()
    ids = torch.tensor(engine.teacher.document_ids("red"))
    wanted = first_cartridge(engine.module, ids, 32, 1, init)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(engine.cartridge.state_dict()[name], tensor), name
    assert not torch.equal(
        engine.cartridge.trainable_values[0], plain.cartridge.trainable_values[0]
    )
    step(engine, rollouts(engine))


def test_a_run_may_begin_with_the_cartridge_of_another(build: Any, tmp_path: Path) -> None:
    """As `distill --rebuild` does: the same numbers, step 0, and training goes on from there."""
    first = build()
    step(first, rollouts(first))
    meta = CartridgeMeta(base_model="tiny", step=1)
    saved = save_cartridge(first.cartridge, tmp_path / "old", meta)
    begins: dict[str, Any] = {"init": "checkpoint", "checkpoint_path": str(saved)}
    engine = build(**begins)
    assert (engine.step, engine.version) == (0, 0)
    for name, tensor in first.cartridge.state_dict().items():
        assert torch.equal(engine.cartridge.state_dict()[name], tensor), name
    step(engine, rollouts(engine, seed=1))
    assert engine.step == 1
    moved = engine.cartridge.trainable_keys[0] - first.cartridge.trainable_keys[0]
    assert moved.abs().max() > 0
    with pytest.raises(ConfigError, match="holds 32 tokens, actor.cartridge.num_tokens is 48"):
        build(**begins, num_tokens=48)
