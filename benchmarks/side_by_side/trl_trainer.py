"""Child: TRL's SDFTTrainer with PEFT's CARTRIDGE, on the work's own prompts and answers.

    python -m benchmarks.side_by_side.trl_trainer WORK trl

The trainer is TRL's; :class:`Timed` gives it the work's token ids where it would render texts of
its own, and looks at its clock. :data:`CHANGED` says what else a user has to set. If TRL has no
such trainer, or it does not run, the child says which and why.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.side_by_side import plain
from benchmarks.side_by_side.peft_loop import sampling
from benchmarks.side_by_side.plain import Outcome, StageCpu
from benchmarks.side_by_side.work import Work, load

NAME = "trl.experimental.sdft.SDFTTrainer"
CHANGED = (
    "transformers 5.10.4: with 5.24 PEFT's generate ignores the adapter",
    "gradient_checkpointing=False (its default is on): PEFT refuses it with a CARTRIDGE",
    "bf16=False, use_cpu=True: float32, as all ways here",
    "temperature=1, generation_kwargs={'temperature': ...}: its one temperature is the loss's, too",
    "teacher_prompt_template='{privileged_context}{prompt}': the document stands before the prompt",
    "max_prompt_length=None: its default cuts the teacher's document at 512 tokens, from the left",
    "num_generations=1, distillation_alpha=0 (forward KL), distillation_topk as ours with a tail; "
    "its top k are the student's, ours the teacher's",
)
STUDENT_MARK, TEACHER_MARK = "", "T"


def trainer_class() -> tuple[Any, Any]:
    """TRL's trainer and its settings.

    Raises:
        ImportError: this TRL has none, or cannot be imported.
    """
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    return SDFTConfig, SDFTTrainer


def timed_class(base: Any) -> Any:
    """TRL's trainer with the work's ids, the work's answers, and CPU-seconds by stage."""

    class Timed(base):
        """See the module. ``begin`` before ``train``."""

        def begin(self, work: Work, outcome: Outcome) -> None:
            """What its methods below read."""
            self.work, self.outcome, self.stage, self.at = work, outcome, StageCpu(), 0

        def _tokenize_prompts(self, prompts: list[str]) -> list[list[int]]:
            found = []
            for prompt in prompts:
                number, row = map(int, prompt.removeprefix(TEACHER_MARK).split(":"))
                self.at = number
                ids = self.work.batches[number].prompts[row]
                is_teacher = prompt.startswith(TEACHER_MARK)
                found.append([*self.work.document, *ids] if is_teacher else ids)
            return found

        def _generate(self, prompt_ids: list[list[int]]) -> Any:
            with self.stage("rollout"):
                super()._generate(prompt_ids)
            return prompt_ids, self.work.batches[self.at].answers

        def _forward_logits(self, *given: Any, **named: Any) -> Tensor:
            with self.stage("student" if torch.is_grad_enabled() else "teacher"):
                logits: Tensor = super()._forward_logits(*given, **named)
            return logits

        def _compute_teacher_student_logits(self, *given: Any, **named: Any) -> Any:
            found = super()._compute_teacher_student_logits(*given, **named)
            if self.outcome.logprobs is None:
                self._note(found.student_logits.detach(), found.teacher_logits)
            return found

        def _note(self, student: Tensor, teacher: Tensor) -> None:
            """The first batch's numbers, by the formula that the other ways are compared with."""
            logits, told = student.flatten(0, 1), teacher.flatten(0, 1)
            answers = self.work.batches[0].answers
            self.outcome.logprobs = plain.chosen(logits, answers).tolist()
            topk = plain.teacher_topk(told, self.work.topk)
            self.outcome.token_losses = plain.forward_kl(logits, topk).tolist()

        def compute_loss(self, *given: Any, **named: Any) -> Tensor:
            loss: Tensor = super().compute_loss(*given, **named)
            self.outcome.losses.append(float(loss.detach()))
            return loss

        def compare_rollouts(self) -> None:
            """Rollouts of the first batch, against the trainer's own forward over them."""
            batch, count = self.work.batches[0], self.work.answer_tokens
            ids, mask = plain.padded_left(batch.prompts)
            with torch.no_grad():
                made = self.model.generate(
                    input_ids=ids, attention_mask=mask, **sampling(self.work, look=True)
                )
                drawn_from = torch.stack(made.logits, 1).float()
                answers = made.sequences[:, -count:]
                whole = torch.cat([ids, answers], 1), torch.cat([mask, torch.ones_like(answers)], 1)
                again = super()._forward_logits(self.model, *whole, count)
            drawn = plain.chosen(drawn_from.flatten(0, 1), answers.tolist())
            by_student = plain.chosen(again.flatten(0, 1), answers.tolist())
            self.outcome.own = float((drawn - by_student).abs().max())
            first = [[answer[0]] for answer in batch.answers]
            self.outcome.first = plain.chosen(drawn_from[:, 0], first).tolist()

    return Timed


class Clock(TrainerCallback):
    """A step from its begin to its end: rollout, forwards, backward, optimizer."""

    def __init__(self, stage: StageCpu, outcome: Outcome) -> None:
        self._stage, self._outcome = stage, outcome

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        self._stage.take("update")

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self._outcome.steps.append(self._stage.take("update"))


def settings_of(config: Any, work: Work, folder: str) -> Any:
    """TRL's settings for the work."""
    return config(
        output_dir=folder,
        per_device_train_batch_size=len(work.batches[0].prompts),
        max_steps=len(work.batches),
        learning_rate=work.lr,
        weight_decay=0.0,
        max_grad_norm=work.clip,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        num_generations=1,
        shuffle_dataset=False,
        max_prompt_length=None,
        max_completion_length=work.answer_tokens,
        temperature=1.0,
        generation_kwargs={"temperature": work.temperature, "min_new_tokens": work.answer_tokens},
        teacher_prompt_template="{privileged_context}{prompt}",
        distillation_mode="topk_logits",
        distillation_topk=work.topk,
        distillation_add_tail=True,
        distillation_alpha=0.0,
        distillation_is_clip=None,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def run(work: Work) -> Outcome:
    """Trains on the work's batches; the first is compared and not timed."""
    from datasets import Dataset
    from peft import CartridgeConfig
    from transformers import AutoTokenizer

    config, trainer = trainer_class()
    outcome = Outcome(versions=plain.versions_of("peft", "trl", "accelerate"))
    rows = [
        {"prompt": f"{number}:{row}", "privileged_context": TEACHER_MARK}
        for number, batch in enumerate(work.batches)
        for row in range(len(batch.prompts))
    ]
    adapter = CartridgeConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(work.table_PE),
        num_frozen_tokens=work.num_frozen,
    )
    with tempfile.TemporaryDirectory(prefix="trl-") as folder:
        made = timed_class(trainer)(
            model=plain.load_base(work.model, work.context),
            args=settings_of(config, work, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(work.model),
            peft_config=adapter,
        )
        made.model.prompt_encoder["default"].load_prompt_embeddings(work.table_PE)
        made.begin(work, outcome)
        made.add_callback(Clock(made.stage, outcome))
        outcome.started = time.process_time()
        made.compare_rollouts()
        made.train()
    outcome.steps, outcome.losses = outcome.steps[1:], outcome.losses[1:]
    outcome.notes = [f"changed to make it run: {change}" for change in CHANGED]
    outcome.notes.append(
        "it pads prompts on the left and gives its forwards no positions: a padded prompt stands "
        "further from the cartridge than in its rollouts"
    )
    return outcome


def main() -> None:
    folder, _ = sys.argv[1:]
    plain.one_thread()
    try:
        outcome = run(load(Path(folder)))
    except Exception as error:
        outcome = Outcome(failed=f"{NAME}: {type(error).__name__}: {error}")
    plain.say(outcome)


if __name__ == "__main__":
    main()
