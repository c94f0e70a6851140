"""The teacher: one model, documents by id, KV kept and reused, nothing without its document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.general import BARE
from cartridge_distill.distill.kept_prompts import settle
from cartridge_distill.distill.loss import TeacherTopK, get_loss
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.model.beginning import first_cartridge
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from cartridge_distill.util.errors import DocumentError
from tests.tiny import VOCAB, tiny_model

TEXTS = {"a": "first document " * 3, "b": "another one " * 5}


def render(text: str) -> list[int]:
    return list(text.encode())


def teacher(model: object = None, **options: object) -> Teacher:
    model = model or prepare_model(tiny_model())
    return Teacher(model, DocumentStore(TEXTS), render, **options)  # type: ignore[arg-type]


def samples() -> tuple[list[Tensor], list[Tensor], list[str]]:
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, VOCAB, (n,), generator=generator) for n in (9, 4, 12, 6)]
    response_masks = [
        torch.arange(len(s)) >= start for s, start in zip(sequences, (5, 3, 1, 2), strict=True)
    ]
    return sequences, response_masks, ["b", "a", "b", "a"]


def test_scores_equal_a_plain_forward_over_document_and_sample() -> None:
    sequences, response_masks, ids = samples()
    plain = tiny_model()
    expected = []
    with torch.no_grad():
        for sequence, mask, document in zip(sequences, response_masks, ids, strict=True):
            context = torch.tensor(render(TEXTS[document]))
            logits = plain(input_ids=torch.cat([context, sequence])[None]).logits[0]
            rows = len(context) + mask.nonzero()[:, 0] - 1
            expected.append(logits[rows])
    reference = TeacherTopK.from_logits(torch.cat(expected), 7, 1.5)
    got = teacher().score(sequences, response_masks, ids, 7, 1.5)
    assert torch.equal(got.ids, reference.ids)  # in the order of the sequences, not of documents
    torch.testing.assert_close(got.logprobs, reference.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("begin", [[], [1, 7]], ids=["nothing", "two tokens"])
def test_a_general_samples_teacher_is_the_bare_model_with_what_it_begins_with(
    begin: list[int],
) -> None:
    """Beside samples with documents, in the order of the sequences, and asked of further tokens."""
    sequences, response_masks, _ = samples()
    ids = ["b", BARE, "a", BARE]
    plain = tiny_model()
    expected = []
    with torch.no_grad():
        for sequence, mask, document in zip(sequences, response_masks, ids, strict=True):
            context = torch.tensor(begin if document is BARE else render(TEXTS[document]))
            whole = torch.cat([context.long(), sequence])
            logits = plain(input_ids=whole[None]).logits[0]
            rows = len(context) + mask.nonzero()[:, 0] - 1
            expected.append(logits[rows])
    asked = torch.arange(4).expand(sum(len(rows) for rows in expected), 4)
    reference = TeacherTopK.from_logits(torch.cat(expected), 7, 1.5, asked)
    judge = teacher(begin=begin)
    for _ in range(2):
        got = judge.score(sequences, response_masks, ids, 7, 1.5, asked_ids=asked)
        torch.testing.assert_close(got.logprobs, reference.logprobs, atol=1e-5, rtol=0)
        assert got.asked is not None and reference.asked is not None
        torch.testing.assert_close(got.asked.logprobs, reference.asked.logprobs, atol=1e-5, rtol=0)
    assert judge.prefills == 2  # the bare model's is no document's


def test_a_teacher_that_does_not_know_how_the_model_begins_takes_no_general_sample() -> None:
    sequences, response_masks, _ = samples()
    with pytest.raises(DocumentError, match="labelled as general"):
        teacher().score(sequences, response_masks, ["a", BARE, "b", "a"], 3)


def test_a_documents_kv_is_computed_once_and_kept_within_bounds() -> None:
    sequences, response_masks, ids = samples()
    kept = teacher(max_cached=2)
    for _ in range(3):
        kept.score(sequences, response_masks, ids, 3)
    assert kept.prefills == 2
    tight = teacher(max_cached=1)
    tight.score(sequences, response_masks, ids, 3)
    tight.score(sequences[:1], response_masks[:1], ["a"], 3)  # "a" was used last: still there
    assert tight.prefills == 2
    tight.score(sequences[:1], response_masks[:1], ["b"], 3)
    assert tight.prefills == 3


def test_prompts_are_computed_once_and_score_the_same() -> None:
    """Mixed documents and a general row; the answers differ from call to call."""
    model = prepare_model(tiny_model("qwen3"))
    keeping, forgetful = teacher(model, begin=[1, 7]), teacher(model, begin=[1, 7], prompt_mib=0)
    assert keeping.prompts is not None and forgetful.prompts is None
    sequences, response_masks, _ = samples()
    ids = ["b", BARE, "b", "a"]
    for seed in range(3):
        for sequence, mask in zip(sequences, response_masks, strict=True):
            generator = torch.Generator().manual_seed(seed)
            sequence[mask] = torch.randint(3, VOCAB, (int(mask.sum()),), generator=generator)
        got, expected = (
            judge.score(sequences, response_masks, ids, 7, 1.5, chosen_at=0.7)
            for judge in (keeping, forgetful)
        )
        torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.chosen, expected.chosen, atol=1e-5, rtol=0)
        assert not got.logprobs.requires_grad
    prompts = (5 - 1) + (3 - 1) + (1 - 1) + (2 - 1)  # a prompt's last token is computed each time
    assert (keeping.prompts.computed, keeping.prompts.found) == (prompts, 2 * prompts)
    assert keeping.prompts.bytes <= 256 * 2**20


def test_settled_prompts_are_those_that_were_kept() -> None:
    """Rows by document, each prompt once; where tokens had to go, none is kept any more."""
    keeping = teacher(begin=[1, 7])
    sequences, response_masks, _ = samples()
    ids = ["b", BARE, "b", "a"]
    keeping.score(sequences, response_masks, ids, 3)
    assert keeping.prompts is not None and keeping.settled == []
    settle(keeping)
    prompts = [sequences[0][:4].tolist(), sequences[1][:2].tolist(), sequences[3][:1].tolist()]
    rows = [("b", prompts[:1]), (BARE, prompts[1:2]), ("a", prompts[2:])]
    assert keeping.settled == rows and len(keeping.prompts) == 7
    settle(keeping)  # nothing is new
    keeping.score(sequences, response_masks, ids, 3)
    assert keeping.settled == rows and keeping.prompts.found == 7
    keeping.prompts.evicted = 1
    settle(keeping)
    assert (keeping.settled, len(keeping.prompts)) == ([], 0)


def test_other_attention_keeps_no_prompts() -> None:
    assert teacher(backend="dense").prompts is None and teacher(backend="flex").prompts is None


def test_the_oracle_has_no_loss_and_no_gradient() -> None:
    """A cartridge that is the document's KV: student equals teacher."""
    model = prepare_model(tiny_model("qwen3"))
    judge = teacher(model)
    document = torch.tensor(judge.document_ids("b"))
    oracle = first_cartridge(model, document, len(document))
    sequences, response_masks, _ = samples()
    batch = pack(sequences)
    logits = packed_forward(
        model, oracle.prefix(), batch, batch.predicts(torch.cat(response_masks))
    )
    loss = get_loss("forward_kl_topk")(
        logits, judge.score(sequences, response_masks, ["b"] * 4, 20)
    )
    assert loss.abs().max() < 1e-4
    loss.mean().backward()
    gradients = [p.grad for p in oracle.trainable_parameters() if p.grad is not None]
    assert len(gradients) == 4 and max(g.abs().max() for g in gradients) < 1e-5


def test_a_missing_document_is_named() -> None:
    sequences, response_masks, _ = samples()
    with pytest.raises(DocumentError, match="'zebra' is not in memory .it has: a, b.*bare model"):
        teacher().score(sequences, response_masks, ["a", "b", "a", "zebra"], 3)


def test_a_document_longer_than_the_context_is_named() -> None:
    store = DocumentStore({"long": "x" * 600})
    judge = Teacher(prepare_model(tiny_model()), store, render)
    with pytest.raises(DocumentError, match="'long' has 600 tokens, the model's context is 512"):
        judge.prefix("long")
    judge = Teacher(prepare_model(tiny_model()), DocumentStore({"edge": "x" * 505}), render)
    sequences, response_masks, _ = samples()
    with pytest.raises(DocumentError, match="'edge' .505 tokens. and a sample of 12 tokens exceed"):
        judge.score(sequences, response_masks, ["edge"] * 4, 3)


def test_document_files(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"document_id": k, "text": v}) for k, v in TEXTS.items()))
    assert DocumentStore.from_file(path).ids == ["a", "b"]
    for rows, message in (
        ([{"document_id": "a", "text": " "}], "'a' is empty"),
        ([{"document_id": "a"}], "row 0: needs document_id and text"),
        ([{"document_id": "a", "text": "x"}] * 2, "'a' appears twice"),
        ([], "holds no document"),
    ):
        path.write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(DocumentError, match=message):
            DocumentStore.from_file(path)
    with pytest.raises(DocumentError, match="cartridge-distill prepare"):
        DocumentStore.from_file(tmp_path / "none.jsonl")
