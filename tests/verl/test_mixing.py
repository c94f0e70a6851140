"""The plan and its check, and the agent loop's teacher against a real embedded server."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("verl.workers.rollout.replica", reason="veRL is not installed")

from tensordict import TensorDict

from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.model.prompts import render_document
from cartridge_distill.sync.versions import version_id
from cartridge_distill.util.errors import DocumentError, OffPolicyError, RolloutError
from tests.tiny import (
    byte_tokenizer,
    plain_logprobs,
    random_cartridge,
    tiny_model,
    write_cartridge,
)
from tests.verl.proxy_rig import PATIENCE, SAMPLING, sync
from verl_patches.rollout.agent_loop import CartridgeAgentLoop
from verl_patches.rollout.teacher import EPOCH, PLAN, rollout_teacher
from verl_patches.rollout.tokasaurus_rollout.server import TokasaurusHttpServer
from verl_patches.trainer.mixing import Mixing

TEXT = "The red house stands by the sea. " * 4
NEW = 6


def run_config(folder: Path, **cartridge: Any) -> Any:
    """The keys that are read here, as veRL's configuration holds them."""
    documents = folder / "documents.jsonl"
    documents.write_text(json.dumps({"document_id": "red", "text": TEXT}))
    settings = {
        "on_policy_fraction": 0.5,
        "skip_first_tokens": 0,
        "async_steps": 0,
        "teacher_temperature": None,
        "teacher_cache": None,
        "documents": str(documents),
        "document_key": "document_id",
    }
    rollout = {"n": 2, "temperature": 0.7, "response_length": NEW, "prompt_length": 64}
    return OmegaConf.create(
        {
            "data": {"seed": 3},
            "actor_rollout_ref": {
                "actor": {
                    "cartridge": settings | cartridge,
                    "fsdp_config": {"model_dtype": "fp32"},
                },
                "rollout": rollout,
            },
        }
    )


# --- the trainer's side -----------------------------------------------------------------------


def tag(version: int | None, length: int = 4) -> dict[str, Any]:
    return {"min_global_steps": version, "max_global_steps": version, "response_len": length}


def came_back(mixing: Mixing, step: int, rows: int) -> tuple[list[Any], list[Any]]:
    """Tags and labels of a batch that went as planned."""
    plan = mixing.plan(step, rows)
    tags = [tag(step - 1 if student else None) for student in plan]
    labels = [{"author": STUDENT if student else TEACHER} for student in plan]
    return tags, labels


def test_a_batch_is_labelled_as_planned(tmp_path: Path) -> None:
    mixing = Mixing(run_config(tmp_path, on_policy_fraction=[[0, 0.0], [4, 1.0]]))
    for step, students in ((1, 2), (2, 4), (3, 6), (4, 8), (5, 8)):
        batch = TensorDict({"x": torch.zeros(4)}, batch_size=4)
        mixing.label(batch, step, epoch=1)
        assert batch[PLAN].shape == (4, 2) and int(batch[PLAN].sum()) == students
        assert batch[PLAN].flatten().tolist() == mixing.plan(step, 4)
        assert batch[EPOCH] == 1
        mixing.check(*came_back(mixing, step, 4), step, version=step - 1)


def test_another_batch_than_planned_is_refused(tmp_path: Path) -> None:
    mixing = Mixing(run_config(tmp_path))

    def check(number: int, new_tag: Any, label: Any) -> None:
        tags, labels = came_back(mixing, 7, 4)
        tags[number], labels[number] = new_tag, label
        mixing.check(tags, labels, 7, version=6)

    plan = mixing.plan(7, 4)
    student, teacher = plan.index(True), plan.index(False)
    with pytest.raises(RolloutError, match="step 7: planned .*'student': 4.*got .*'student': 5"):
        check(teacher, tag(6), {"author": STUDENT})
    with pytest.raises(RolloutError, match="got .*'None': 1"):
        check(student, tag(6), {})
    with pytest.raises(OffPolicyError, match=r"step \[5\] reached the trainer at step 6"):
        check(student, tag(5), {"author": STUDENT})
    with pytest.raises(OffPolicyError, match=r"step \[None\] reached"):
        check(student, tag(None), {"author": STUDENT})
    with pytest.raises(OffPolicyError, match=r"teacher carry cartridge steps \[6\]"):
        check(teacher, tag(6), {"author": TEACHER})


def test_a_batch_that_was_asked_for_ahead_may_be_older(tmp_path: Path) -> None:
    mixing = Mixing(run_config(tmp_path, async_steps=2))
    tags, labels = came_back(mixing, 7, 4)
    student = mixing.plan(7, 4).index(True)
    for version in (4, 5, 6):
        tags[student] = tag(version)
        mixing.check(tags, labels, 7, version=6)
    for version in (3, 7):
        tags[student] = tag(version)
        with pytest.raises(
            OffPolicyError, match=rf"step \[{version}\].*async_steps=2 takes steps 4"
        ):
            mixing.check(tags, labels, 7, version=6)


def test_tokens_are_counted_by_stage_and_go_on_after_a_resume(tmp_path: Path) -> None:
    mixing = Mixing(run_config(tmp_path))
    tags = [tag(0, 3), tag(None, 5), tag(None, 7), tag(0, 1)]
    labels = [
        {"author": STUDENT},
        {"author": TEACHER, "cached": True},
        {"author": TEACHER, "cached": False},
        {"author": STUDENT},
    ]
    mixing.count(tags, labels)
    found = mixing.metrics()
    assert {name: found[f"tokens/{name}"] for name in mixing.state()} == {
        "generated": 4,
        "generated_by_teacher": 7,
        "teacher_scored": 16,
        "trained": 16,
    }
    assert found["actor/on_policy_fraction"] == 0.5
    assert (found["teacher_answers/cache_hits"], found["teacher_answers/cache_misses"]) == (1, 1)
    resumed = Mixing(run_config(tmp_path))
    resumed.restore(json.loads(json.dumps(mixing.state())))
    resumed.count(tags, labels)
    assert resumed.metrics()["tokens/total_generated_by_teacher"] == 14
    assert resumed.metrics()["tokens/generated_by_teacher"] == 7


def test_tokens_without_a_loss_are_not_trained(tmp_path: Path) -> None:
    mixing = Mixing(run_config(tmp_path, skip_first_tokens=3))
    mixing.count([tag(0, 3), tag(0, 5), tag(0, 1)], [{"author": STUDENT}] * 3)
    found = mixing.metrics()
    assert (found["tokens/generated"], found["tokens/trained"]) == (9, 2)


# --- the agent loop's side --------------------------------------------------------------------


class Requests:
    """veRL's client of the servers: here one proxy, which is real."""

    def __init__(self, proxy: TokasaurusHttpServer) -> None:
        self.proxy = proxy
        self.count = 0

    async def generate(self, **request: Any) -> Any:
        self.count += 1
        return await self.proxy.generate(request.pop("request_id"), **request)


@pytest.fixture
async def server(start_server: Any, tmp_path: Path) -> Any:
    write_cartridge(random_cartridge(tiny_model(), 16), tmp_path, version_id("run", 0))
    proxy = TokasaurusHttpServer(start_server().url, NEW, vocab_size=259, client_options=PATIENCE)
    yield Requests(proxy)
    await proxy.close()


def loop(config: Any, server: Requests, model_folder: Path) -> CartridgeAgentLoop:
    tokenizer = byte_tokenizer()
    model = SimpleNamespace(
        tokenizer=tokenizer, local_path=str(model_folder), hf_config=tiny_model().config
    )
    made = CartridgeAgentLoop(SimpleNamespace(config=config), server, tokenizer)
    made.teacher = rollout_teacher(config, model)  # type: ignore[misc]  # of this loop alone
    return made


def sample(document_id: str = "red", row: int = 5, session: int = 0) -> dict[str, Any]:
    """Columns of a row: the student writes the second of two samples."""
    return {
        "raw_prompt": [{"role": "user", "content": "Where?"}],
        "index": row,
        "session_id": session,
        "extra_info": {"document_id": document_id},
        PLAN: torch.tensor([False, True]),
        EPOCH: 0,
    }


async def test_student_and_teacher_answer_as_planned(
    server: Requests, tmp_path: Path, model_folder: Path
) -> None:
    """The numbers are those of the plain model behind the document, and behind the cartridge."""
    both = loop(run_config(tmp_path, teacher_temperature=1.2), server, model_folder)
    # the teacher waits for no cartridge
    taught = await both.run(SAMPLING, **sample(session=0))
    await sync(server.proxy, version_id("run", 0))
    own = await both.run(SAMPLING, **sample(session=1))
    assert taught.prompt_ids == own.prompt_ids
    assert taught.extra_fields == {
        "author": TEACHER,
        "cached": False,
        "finish_reason": taught.extra_fields["finish_reason"],
    }
    assert (own.extra_fields["author"], own.extra_fields["global_steps"]) == (STUDENT, 0)
    document = render_document(byte_tokenizer(), TEXT)
    prefix = random_cartridge(tiny_model(), 16).prefix()
    for out, before, ids, temperature in (
        (taught, None, document + taught.prompt_ids, 1.2),
        (own, prefix, own.prompt_ids, 0.7),
    ):
        expected = plain_logprobs(tiny_model(), before, ids, out.response_ids, temperature)
        assert out.response_logprobs == pytest.approx(expected, abs=1e-5)


async def test_answers_repeat_and_are_kept(
    server: Requests, tmp_path: Path, model_folder: Path
) -> None:
    config = run_config(tmp_path)
    kept = run_config(tmp_path, teacher_cache=str(tmp_path / "answers"))
    first = await loop(config, server, model_folder).run(SAMPLING, **sample())
    again = await loop(kept, server, model_folder).run(SAMPLING, **sample())
    other = await loop(kept, server, model_folder).run(SAMPLING, **sample(row=6))
    assert first.response_ids == again.response_ids != other.response_ids
    assert server.count == 3
    found = await loop(kept, server, model_folder).run(SAMPLING, **sample())
    assert server.count == 3
    assert found.response_ids == again.response_ids
    assert found.response_logprobs == again.response_logprobs
    assert found.extra_fields == {**again.extra_fields, "cached": True}


async def test_a_general_rows_answer_is_the_bare_models(
    server: Requests, tmp_path: Path, model_folder: Path
) -> None:
    config = run_config(tmp_path, teacher_cache=str(tmp_path / "answers"))
    general = {**sample(), "extra_info": {"document_id": None, "kind": "general"}}
    out = await loop(config, server, model_folder).run(SAMPLING, **general)
    expected = plain_logprobs(tiny_model(), None, out.prompt_ids, out.response_ids, 0.7)
    assert out.response_logprobs == pytest.approx(expected, abs=1e-5)
    about = await loop(config, server, model_folder).run(SAMPLING, **sample())
    assert about.response_logprobs != out.response_logprobs
    again = await loop(config, server, model_folder).run(SAMPLING, **general)
    assert again.extra_fields["cached"] and again.response_logprobs == out.response_logprobs
    both = {**sample(), "extra_info": {"document_id": "red", "kind": "general"}}
    with pytest.raises(DocumentError, match="row 5 is labelled 'general' and names"):
        await loop(config, server, model_folder).run(SAMPLING, **both)


async def test_no_answer_without_its_document(
    server: Requests, tmp_path: Path, model_folder: Path
) -> None:
    config = run_config(tmp_path)
    with pytest.raises(DocumentError, match="'green' is not in"):
        await loop(config, server, model_folder).run(SAMPLING, **sample("green"))
    with pytest.raises(DocumentError, match="has no 'document_id'"):
        nameless = {**sample(), "extra_info": {"split": "train"}}
        await loop(config, server, model_folder).run(SAMPLING, **nameless)
    config.actor_rollout_ref.rollout.response_length = 512
    with pytest.raises(DocumentError, match="context is 512"):
        await loop(config, server, model_folder).run(SAMPLING, **sample())
    (tmp_path / "documents.jsonl").unlink()
    config.actor_rollout_ref.actor.cartridge.documents = str(tmp_path / "documents.jsonl")
    with pytest.raises(DocumentError, match="does not exist"):
        loop(config, server, model_folder)
    assert server.count == 0


def test_only_the_student_needs_no_documents(tmp_path: Path) -> None:
    assert rollout_teacher(run_config(tmp_path, on_policy_fraction=1.0), None) is None
