"""Child: on-policy distillation with PEFT's CARTRIDGE in a plain loop, or rollouts by `generate`.

    python -m benchmarks.side_by_side.peft_loop WORK peft-kept     # the document's KV is kept
    python -m benchmarks.side_by_side.peft_loop WORK peft-reread   # and here it is read again
    python -m benchmarks.side_by_side.peft_loop WORK generate      # rollouts alone

Prints a line of JSON at its end. Rollouts are drawn and thrown away; the loop trains on the work's
answers, so that all ways score the same tokens. `generate` has the cartridge as its cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.side_by_side import plain
from benchmarks.side_by_side.plain import Outcome, StageCpu, TopK
from benchmarks.side_by_side.work import Batch, Work, load

KEPT, REREAD, GENERATE = WAYS = ("peft-kept", "peft-reread", "generate")


class PeftLoop:
    """A loop around PEFT's adapter.

    Args:
        reread: read the document with each sample, as a loop that keeps nothing does.
    """

    def __init__(self, work: Work, reread: bool) -> None:
        from peft import CartridgeConfig, get_peft_model

        self.work, self.reread, self.outcome = work, reread, Outcome()
        self.base = plain.load_base(work.model, work.context)
        config = CartridgeConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=len(work.table_PE),
            num_frozen_tokens=work.num_frozen,
        )
        self.peft: Any = get_peft_model(self.base, config)
        encoder: Any = self.peft.prompt_encoder["default"]
        encoder.load_prompt_embeddings(work.table_PE)
        self.trained: Tensor = encoder.trainable_embedding
        self.optimizer = torch.optim.AdamW([self.trained], lr=work.lr, weight_decay=0.0)
        started = time.process_time()
        self.document = None if reread else plain.read_document(self.base, work.document)
        self.outcome.reading = None if reread else time.process_time() - started
        self.vocabulary: int = self.base.config.vocab_size
        self.stage = StageCpu()

    def student(self, ids: Tensor, mask: Tensor, positions: Tensor, keep: int) -> Tensor:
        """PEFT moves the positions behind the cartridge."""
        logits: Tensor = self.peft(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep
        ).logits
        return logits

    def rollout(self, batch: Batch, look: bool = False) -> Any:
        """Answers of the full length; with ``look`` also the logits they were drawn from."""
        ids, mask = plain.padded_left(batch.prompts)
        with torch.no_grad():
            return self.peft.generate(
                input_ids=ids, attention_mask=mask, **sampling(self.work, look)
            )

    @torch.no_grad()
    def teach(self, batch: Batch) -> TopK:
        if self.reread:
            return self._teach_again(batch)
        assert self.document is not None
        width = self.work.table_PE.shape[1]  # numbers of a token in all layers
        longest = max(map(len, batch.prompts)) + self.work.answer_tokens
        row = 4 * width * (len(self.work.document) + longest)
        rows = plain.rows_at_once(
            len(batch.prompts), self.work.answer_tokens, self.vocabulary, kv_bytes_of_row=row
        )
        found = []
        for prompts, answers in parts(batch, rows):
            forward = plain.behind(self.base, self.document)
            logits = plain.answer_logits(forward, prompts, answers)
            found.append(plain.teacher_topk(logits, self.work.topk))
        return joined(found)

    def _teach_again(self, batch: Batch) -> TopK:
        def forward(ids: Tensor, mask: Tensor, positions: Tensor, keep: int) -> Tensor:
            logits: Tensor = self.base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=keep,
            ).logits
            return logits

        longest = len(self.work.document) + max(map(len, batch.prompts)) + self.work.answer_tokens
        rows = plain.rows_at_once(len(batch.prompts), self.work.answer_tokens, self.vocabulary)
        rows = max(1, min(rows, plain.READ_TOKENS // longest))
        found = []
        for prompts, answers in parts(batch, rows):
            whole = [[*self.work.document, *prompt] for prompt in prompts]
            logits = plain.answer_logits(forward, whole, answers)
            found.append(plain.teacher_topk(logits, self.work.topk))
        return joined(found)

    def train(self, batch: Batch) -> list[Tensor]:
        """A step behind the rollout.

        Returns:
            ``[N]`` losses and ``[N]`` log-probs of the student, before the step; the gradient's
            norm.
        """
        with self.stage("teacher"):
            told = self.teach(batch)
        self.optimizer.zero_grad(set_to_none=True)
        count = sum(map(len, batch.answers))
        rows = plain.rows_at_once(len(batch.prompts), self.work.answer_tokens, self.vocabulary)
        losses, logprobs, done = [], [], 0
        for prompts, answers in parts(batch, rows):
            with self.stage("student"):
                logits = plain.answer_logits(self.student, prompts, answers)
            here = slice(done, done + len(logits))
            part = TopK(told.ids[here], told.logprobs[here], told.tail[here])
            found = plain.forward_kl(logits, part)
            (found.sum() / count).backward()
            done += len(logits)
            losses.append(found.detach())
            logprobs.append(plain.chosen(logits.detach(), answers))
        norm = torch.nn.utils.clip_grad_norm_([self.trained], self.work.clip)
        self.optimizer.step()
        return [torch.cat(losses), torch.cat(logprobs), norm]

    def check(self, batch: Batch) -> None:
        """Rollouts against the student's own forward, before anything has moved."""
        made = self.rollout(batch, look=True)
        with torch.no_grad():
            compare_rollouts(self.outcome, made, batch, self.student)

    def shortened(self, batch: Batch) -> Batch:
        """The samples that the document is read for."""
        few = slice(None, self.work.reread)
        return Batch(batch.prompts[few], batch.answers[few])


def of_loop(work: Work, reread: bool) -> Outcome:
    """Runs the loop."""
    loop = PeftLoop(work, reread)
    outcome = loop.outcome
    outcome.versions = plain.versions_of("peft")
    first, *timed = work.batches
    outcome.started = time.process_time()
    loop.check(first)
    if reread:
        return of_reading(loop, timed)
    losses, logprobs, norm = loop.train(first)
    outcome.token_losses, outcome.logprobs = losses.tolist(), logprobs.tolist()
    outcome.grad_norm = float(norm)
    for batch in timed:
        loop.stage.take("update")
        with loop.stage("rollout"):
            loop.rollout(batch)
        losses, _, _ = loop.train(batch)
        outcome.steps.append(loop.stage.take("update"))
        outcome.losses.append(float(losses.mean()))
    return outcome


def of_reading(loop: PeftLoop, timed: Sequence[Batch]) -> Outcome:
    """The teacher of the loop that reads again; its other stages are those of the other loop.

    A batch's reading is that of some samples, multiplied; those of the first batch are compared.
    """
    outcome, work = loop.outcome, loop.work
    first = work.batches[0]
    few = loop.shortened(first)
    told = loop.teach(few)
    with torch.no_grad():
        logits = plain.answer_logits(loop.student, few.prompts, few.answers)
        outcome.token_losses = plain.forward_kl(logits, told).tolist()
        outcome.logprobs = plain.chosen(logits, few.answers).tolist()
    for batch in timed:
        loop.stage.take("update")
        loop.teach(loop.shortened(batch))
        seconds = loop.stage.take("teacher")["teacher"]
        outcome.steps.append({"teacher": seconds * len(batch.prompts) / len(few.prompts)})
    if len(few.prompts) < len(first.prompts):
        outcome.notes.append(
            f"the document was read for {len(few.prompts)} of {len(first.prompts)} samples, and "
            "the seconds multiplied"
        )
    return outcome


def of_generate(work: Work) -> Outcome:
    """Rollouts by the base's `generate`, behind a cache that holds the cartridge."""
    outcome = Outcome(versions=plain.versions_of())
    base = plain.load_base(work.model, work.context)
    kept = cache_of(work, base)
    tokens = kept.get_seq_length()

    def rollout(batch: Batch, look: bool = False) -> Any:
        ids, mask = plain.padded_left(batch.prompts)
        cache = DynamicCache()
        for number, layer in enumerate(kept.layers):
            wide = (len(ids), -1, -1, -1)
            cache.update(layer.keys.expand(wide), layer.values.expand(wide), number)
        # `generate` leaves out as many ids as the cache holds: nobody looks at them.
        ids = torch.cat([ids.new_zeros(len(ids), tokens), ids], 1)
        mask = torch.cat([mask.new_ones(len(mask), tokens), mask], 1)
        with torch.no_grad():
            return base.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                **sampling(work, look),
            )

    first, *timed = work.batches
    outcome.started = time.process_time()
    made = rollout(first, look=True)
    with torch.no_grad():
        compare_rollouts(outcome, made, first, plain.behind(base, kept))
    for batch in timed:
        start = time.process_time()
        rollout(batch)
        outcome.steps.append({"rollout": time.process_time() - start})
    return outcome


def cache_of(work: Work, base: Any) -> DynamicCache:
    """The cartridge as a transformers cache of one row."""
    config = base.config
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    table = work.table_PE.view(len(work.table_PE), layers, 2, heads, -1)
    cache = DynamicCache()
    for layer in range(layers):
        key, value = (table[:, layer, kind].transpose(0, 1)[None].contiguous() for kind in (0, 1))
        cache.update(key, value, layer)
    return cache


def sampling(work: Work, look: bool) -> dict[str, Any]:
    """What `generate` is asked for: the work's number of tokens, whatever would end before."""
    more = {"return_dict_in_generate": True, "output_logits": True} if look else {}
    return {
        "do_sample": True,
        "temperature": work.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": work.answer_tokens,
        "max_new_tokens": work.answer_tokens,
        "pad_token_id": 0,
        **more,
    }


def compare_rollouts(outcome: Outcome, made: Any, batch: Batch, forward: plain.Forward) -> None:
    """The logits that tokens were drawn from, against a forward over the finished answers."""
    drawn_from = torch.stack(made.logits, 1).float()  # [B, tokens, V]
    length = drawn_from.shape[1]
    answers = made.sequences[:, -length:].tolist()
    drawn = plain.chosen(drawn_from.flatten(0, 1), answers)
    rows = plain.rows_at_once(len(answers), length, drawn_from.shape[-1])
    again = [
        plain.chosen(plain.answer_logits(forward, prompts, some), some)
        for prompts, some in parts(Batch(batch.prompts, answers), rows)
    ]
    outcome.own = float((drawn - torch.cat(again)).abs().max())
    first = [[answer[0]] for answer in batch.answers]
    outcome.first = plain.chosen(drawn_from[:, 0], first).tolist()


def parts(batch: Batch, rows: int) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Micro-batches of so many samples."""
    starts = range(0, len(batch.prompts), rows)
    return [(batch.prompts[at : at + rows], batch.answers[at : at + rows]) for at in starts]


def joined(found: Sequence[TopK]) -> TopK:
    return TopK(
        torch.cat([each.ids for each in found]),
        torch.cat([each.logprobs for each in found]),
        torch.cat([each.tail for each in found]),
    )


def main() -> None:
    folder, way = sys.argv[1:]
    plain.one_thread()
    work = load(Path(folder))
    if way not in WAYS:
        raise SystemExit(f"{way!r} is no way of this script; give one of {', '.join(WAYS)}")
    plain.say(of_generate(work) if way == GENERATE else of_loop(work, way == REREAD))


if __name__ == "__main__":
    main()
