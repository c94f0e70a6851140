"""One run: write a batch, score it, take a step; saved whole, and gone on with exactly.

What veRL's engine trains with is called here by itself, in one process: the same rows in the same
order, the same seeds, forwards, losses, checks and optimizer. The steps are a pure function of
settings, data, cartridge and optimizer state, so a run that was stopped goes on from its last save
with the numbers of the run that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.general import document_of
from cartridge_distill.distill.integrity import weights_checksum
from cartridge_distill.distill.mixing import (
    TEACHER,
    Schedule,
    TokenCounts,
    student_writes,
)
from cartridge_distill.distill.on_policy import check_versions
from cartridge_distill.distill.token_loss import TokenLoss
from cartridge_distill.model.identity import weights_fingerprint
from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.util.errors import ConfigError, RolloutError
from cartridge_distill.util.parquet import read_rows
from training.study.earlier import Earlier
from training.study.rollouts import Prompt, Rollouts, Written, rendered_teacher
from training.study.settings import RunSettings
from verl_patches.actor import engine_state
from verl_patches.actor.device import StageSeconds
from verl_patches.actor.forwards import score
from verl_patches.actor.initial_cartridge import initial_cartridge
from verl_patches.actor.kept_versions import OwnVersionCheck
from verl_patches.actor.samples import Samples
from verl_patches.actor.step_checks import StepChecks
from verl_patches.actor.token_sums import StepSums

Numbers = dict[str, float]


def read_prompts(data: Path, tokenizer: Any, document_key: str = "document_id") -> list[Prompt]:
    """The rows of a data folder's ``train.parquet``, rendered.

    Raises:
        ConfigError: the file cannot be read.
        DocumentError: a row names no document and is not labelled as general.
    """
    rows = read_rows(data / "train.parquet")
    found = []
    for number, (messages, info) in enumerate(zip(rows["prompt"], rows["extra_info"], strict=True)):
        document_id = document_of(info, document_key, f"row {number}")
        ids = render_prompt(tokenizer, [dict(message) for message in messages])
        found.append(Prompt(int((info or {}).get("index", number)), ids, document_id))
    return found


def batches(rows: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Places of the rows of each step, without end: veRL's order, shuffled anew in each pass.

    Raises:
        ConfigError: not one batch.
    """
    if rows < batch:
        raise ConfigError(f"{rows} prompts are less than one batch of {batch}; prepare more rows")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(rows, generator=generator).tolist()
        for start in range(0, rows - batch + 1, batch):
            yield order[start : start + batch]


class PlainLoop:
    """Trains one cartridge.

    Attributes:
        cartridge: as it stands.
        step: optimizer steps done.
        totals: tokens by stage since the start.

    Args:
        model: the frozen base, float32, from ``load_model``; several runs may share it.
        tokenizer: the model's.
        name: folder or hub id of the model.
        data: folder that ``prepare`` wrote.
        settings: of the run.

    Raises:
        ConfigError: data or model do not fit the settings.
        DocumentError: a document is missing or too long.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, data: Path, settings: RunSettings
    ) -> None:
        dtype = next(model.parameters()).dtype
        if dtype != torch.float32:
            raise ConfigError(f"a plain loop computes in float32, and the model is {dtype}")
        self.settings = settings.cartridge
        self.run_settings = settings
        self.module = model
        self.teacher = rendered_teacher(
            model, tokenizer, DocumentStore.from_file(data / "documents.jsonl"), settings
        )
        self.token_loss = TokenLoss.of(self.settings)
        self.cartridge: TrainableCache = initial_cartridge(
            self.settings, model, self.teacher, name
        ).to(self.teacher.device)
        self.optimizer = torch.optim.AdamW(
            self.cartridge.trainable_parameters(),
            lr=self.settings.lr,
            betas=settings.optim.betas,
            weight_decay=settings.optim.weight_decay,
        )
        self.lr_scheduler = LambdaLR(self.optimizer, settings.rate())
        self._stage = StageSeconds()
        self._sums = StepSums()
        self._checks = StepChecks(
            self.settings.max_logprob_diff,
            model,
            self.settings.teacher_temperature,
            self.settings.attention,
            self._stage,
            self.settings.async_steps,
        )
        self._own_versions = OwnVersionCheck(
            self._checks.kept,
            self.settings.async_check_fraction,
            (settings.seed, 0),
            model,
            self.teacher.device,
            self.settings.attention,
            self._stage,
        )
        self._earlier = Earlier(self.settings.async_steps)
        self._prompts = read_prompts(data, tokenizer, self.settings.document_key)
        self._steps_per_epoch = len(self._prompts) // settings.batch
        self._order = batches(len(self._prompts), settings.batch, settings.seed)
        self._rollouts = Rollouts(model, tokenizer, name, self.teacher, settings)
        self._schedule = Schedule.of(self.settings.on_policy_fraction)
        self._base_before = weights_checksum(model)
        self._remember_frozen()
        self.step = 0
        self.totals = TokenCounts()
        # What the engine's save and restore read.
        self.optimizer_config = settings.optim
        self.engine_config = SimpleNamespace(model_dtype="fp32")
        self.model_config = SimpleNamespace(path=name)
        self.base_sha256 = engine_state.weights_sha256(self._base_before)
        self.model_fingerprint = weights_fingerprint(name, None)

    @property
    def version(self) -> int:
        """Batches trained on: one optimizer step each."""
        return self.step

    @version.setter
    def version(self, value: int) -> None:
        if value != self.step:
            raise ConfigError(f"a plain loop takes one step a batch: step {self.step}, {value}")

    def _remember_frozen(self) -> None:
        self._frozen_before = [p.detach().clone() for p in self._frozen()]

    def _frozen(self) -> list[torch.Tensor]:
        return [*self.cartridge.frozen_keys, *self.cartridge.frozen_values]

    # ---------------------------------------------------------------- one step

    def train_step(self) -> Numbers:
        """The next step; its numbers, under veRL's names.

        Raises:
            OffPolicyError: the engine that writes and the loop disagree on a token's log-prob.
            FloatingPointError: loss or gradient are not finite.
            RuntimeError: a frozen token moved.
        """
        started, cpu = time.perf_counter(), time.process_time()
        number = self.step + 1
        epoch = (number - 1) // self._steps_per_epoch
        prompts = [self._prompts[place] for place in next(self._order)]
        fraction = self._schedule.at(number)
        plan = student_writes(self.run_settings.seed, number, len(prompts), fraction)
        writing, cartridge = self._earlier.writes(self.step, self.cartridge)
        with torch.no_grad():
            prefix = cartridge.prefix()
        written = self._rollouts.write(prompts, plan, epoch, writing, prefix)
        rollout = time.perf_counter() - started
        rate = float(self.optimizer.param_groups[0]["lr"])
        numbers = self._update(samples_of(written, self.run_settings.temperature))
        counts = self._counted(written)
        self.totals += counts
        whole = time.perf_counter() - started
        return {
            **{f"actor/{name}": value for name, value in numbers.items()},
            "actor/lr": rate,
            "actor/on_policy_fraction": sum(plan) / len(plan),
            "training/staleness": float(self.step - 1 - writing),
            **counts.metrics("tokens/"),
            **self.totals.metrics("tokens/total_"),
            "timing_s/rollout": rollout,
            "timing_s/update": whole - rollout,
            "timing_s/step": whole,
            "timing_s/cpu": time.process_time() - cpu,
            "training/global_step": float(self.step),
        }

    def _update(self, samples: Samples) -> Numbers:
        ahead = self.settings.async_steps
        check_versions(samples.authors, samples.steps, self.version, ahead)
        self._checks.begin_batch()
        self._own_versions.begin_batch()
        self._sums.begin()
        self._stage.take()
        counted = int(self.token_loss.counted(samples.answers).sum())
        if not counted:
            raise RolloutError(
                f"skip_first_tokens={self.settings.skip_first_tokens} leaves nothing to train on: "
                f"the longest answer of the batch has {max(samples.answers)} tokens"
            )
        self.optimizer.zero_grad(set_to_none=True)
        found: list[Numbers] = []
        for part in split(samples, self.run_settings.row_tokens):
            own = self._own_versions.run(part, self.version) if ahead else None
            prefix = self.cartridge.prefix()
            scored = score(
                *(part, self.module, prefix, self.teacher, self.settings),
                *(self.token_loss, self._stage),
            )
            loss = scored.token_loss.sum() / counted
            computed = scored.computed(loss)
            metrics = self._checks.run(part, computed, self.version, False, prefix, own)
            self._sums.add(metrics)
            found.append(metrics)
            loss.backward()
        parameters = self.cartridge.trainable_parameters()
        clip = self.run_settings.optim.clip_grad
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the cartridge's gradient norm is {norm}; the step was not taken"
            )
        self._checks.remember(self.version, self.cartridge.prefix())
        self._earlier.remember(self.version, self.cartridge)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.step += 1
        pairs = zip(self._frozen_before, self._frozen(), strict=True)
        if any(bool((before != now).any()) for before, now in pairs):
            raise RuntimeError(f"a frozen token of the cartridge moved in step {self.step}")
        return {
            **_over_parts(found),
            "loss": sum(metrics["loss"] for metrics in found),
            "grad_norm": norm,
            **self._sums.means(self.teacher.device),
        }

    def _counted(self, written: Sequence[Written]) -> TokenCounts:
        lengths = [(each, len(each.answer.token_ids)) for each in written]
        skipped = self.settings.skip_first_tokens
        return TokenCounts(
            generated=sum(n for each, n in lengths if each.author != TEACHER),
            generated_by_teacher=sum(
                n for each, n in lengths if each.author == TEACHER and not each.cached
            ),
            teacher_scored=sum(n for _, n in lengths),
            trained=sum(max(0, n - skipped) for _, n in lengths),
        )

    # ---------------------------------------------------------------- saving

    def save(self, folder: Path) -> None:
        """Writes cartridge, optimizer and counts, whole or not at all; replaces an earlier save.

        Raises:
            RuntimeError: the base weights are no longer those that were loaded.
        """
        if weights_checksum(self.module) != self._base_before:
            raise RuntimeError("the frozen base model's weights changed during training")
        folder.parent.mkdir(parents=True, exist_ok=True)
        engine_state.keep_on(self)
        self._earlier.save(folder, str(self.model_config.path))
        engine_state.save(self, folder)
        self._earlier.forget_files(folder)

    def restore(self, folder: Path, totals: Mapping[str, int]) -> None:
        """Goes on from a save.

        Args:
            totals: the tokens up to it, as :func:`totals_of` found them.

        Raises:
            CartridgeFormatError: it is damaged.
            ConfigError: it is of a run with other settings.
        """
        engine_state.restore(self, folder)
        self._checks.forget()
        self._earlier.restore(folder, self.version, self._checks.remember)
        self.totals = TokenCounts.from_saved(totals)
        self._remember_frozen()
        self._order = batches(len(self._prompts), self.run_settings.batch, self.run_settings.seed)
        for _ in range(self.step):
            next(self._order)


def samples_of(written: Sequence[Written], temperature: float) -> Samples:
    """Rollouts as the engine's pieces take them."""
    sequences, masks, logprobs = [], [], []
    for each in written:
        prompt, answer = each.prompt.ids, each.answer
        sequences.append(torch.tensor([*prompt, *answer.token_ids]))
        mask = np.zeros(len(prompt) + len(answer.token_ids), dtype=bool)
        mask[len(prompt) :] = True
        masks.append(mask)
        logprobs.append(torch.tensor(answer.logprobs, dtype=torch.float32))
    return Samples(
        sequences=sequences,
        response_masks=masks,
        rollout_logprobs=torch.cat(logprobs),
        document_ids=[each.prompt.document_id for each in written],
        steps=[each.step for each in written],
        authors=[each.author for each in written],
        temperature=temperature,
    )


def split(samples: Samples, row_tokens: int) -> Iterator[Samples]:
    """In order, cut so that each part has ``row_tokens`` tokens at most, or is one sequence."""
    logprobs = samples.rollout_logprobs.split(samples.answers)
    start = 0
    while start < len(samples.sequences):
        end, held = start, 0
        while end < len(samples.sequences):
            length = samples.sequences[end].numel()
            if end > start and held + length > row_tokens:
                break
            held, end = held + length, end + 1
        yield Samples(
            sequences=samples.sequences[start:end],
            response_masks=samples.response_masks[start:end],
            rollout_logprobs=torch.cat(logprobs[start:end]),
            document_ids=samples.document_ids[start:end],
            steps=samples.steps[start:end],
            authors=samples.authors[start:end],
            temperature=samples.temperature,
        )
        start = end


def _over_parts(found: Sequence[Numbers]) -> Numbers:
    """What the checks say of a step: the largest of what is a maximum, else the mean."""
    names = dict.fromkeys(name for metrics in found for name in metrics)
    merged = {}
    for name in names:
        values = [metrics[name] for metrics in found if name in metrics]
        merged[name] = max(values) if name.endswith("max") else sum(values) / len(values)
    return merged


def log_line(path: Path, step: int, numbers: Numbers) -> None:
    """Adds a step to ``metrics.jsonl``, in veRL's form."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "data": numbers}) + "\n")


def keep_lines(path: Path, last: int) -> list[dict[str, Any]]:
    """The lines up to a step; those after it, of steps that were not saved, are taken out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the process died while it wrote
                break
            if line["step"] <= last:
                lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def totals_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Tokens since the start, as the last line has them."""
    last = lines[-1]["data"] if lines else {}
    return {name: int(last.get(f"tokens/total_{name}", 0)) for name in asdict(TokenCounts())}
