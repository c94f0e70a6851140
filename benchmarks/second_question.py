"""Does a second question get its own answer? Behind nothing, a cartridge, the document's own KV.

    python benchmarks/second_question.py runs/demo --questions 12 --tokens 40

Each question of the run's data is asked alone, and again behind another question with the answer
that the model gave to it, as a chat would. The document's own keys and values in the cartridge's
place are the oracle: what happens with them is not the cartridge's doing. All answers are the
likeliest tokens, so a second run gives the same table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cartridge_distill.cartridge.run_folder import model_of, resolve_cartridge  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("run", type=Path, help="folder of a run with data, evaluation questions among it")
    option("--model", help="folder or hub id (the run's own)")
    option("--questions", type=int, default=12, help="so many, from all over (%(default)s)")
    option("--tokens", type=int, default=40, help="of an answer at most (%(default)s)")
    option("--threads", type=int, help="CPU threads (torch's choice)")
    options = parser.parse_args(arguments)

    import torch

    from cartridge_distill.cartridge.checkpoint import load_cartridge
    from cartridge_distill.data.document_store import DocumentStore
    from cartridge_distill.data.records import load_questions
    from cartridge_distill.evaluation.names import FULL_DOCUMENT, NO_DOCUMENT
    from cartridge_distill.model.loading import load_model
    from cartridge_distill.model.prefill import prefix_from_tokens
    from cartridge_distill.model.prompts import render_document, render_prompt
    from cartridge_distill.model.reading import read_tokenizer

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name = options.model or model_of(options.run)
    if name is None:
        parser.error(f"{options.run} does not say its model; fix: name it with --model")
    tokenizer, model = read_tokenizer(name), load_model(name)
    store = DocumentStore.from_file(options.run / "data" / "documents.jsonl")
    document = store.text(store.ids[0])
    found = [
        question
        for question in load_questions(options.run / "data" / "eval.json")
        if question.document_id == store.ids[0]
    ]
    questions = found[:: max(1, len(found) // options.questions)][: options.questions]
    ids = render_document(tokenizer, document)
    turns = _turns(questions[0].question, "It was so.", questions[1].question)
    same = _by_template(tokenizer, document, turns) == [*ids, *render_prompt(tokenizer, turns)]
    print(f"{name}; {len(questions)} questions, answers of {options.tokens} tokens at most")
    print(f"the conversation behind the document has the template's own ids: {same}\n")
    print(
        "| before the questions | second answer = first | begins like it | a sentence three times, "
        "first answers | right alone | right as second | right after a short right answer |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    cartridge = load_cartridge(resolve_cartridge(options.run)).prefix()
    for label, prefix in (
        (NO_DOCUMENT, None),
        ("cartridge", cartridge),
        (FULL_DOCUMENT, prefix_from_tokens(model, torch.tensor(ids))),
    ):
        row = _measured(model, tokenizer, prefix, questions, options.tokens)
        print(f"| {label} | {' | '.join(map(str, row))} |", flush=True)
    return 0


def _turns(first: str, answer: str, second: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]


def _by_template(tokenizer: Any, document: str, turns: list[dict[str, str]]) -> list[int]:
    """The whole conversation as the tokenizer's template has it, with no code of this project."""
    system = {"role": "system", "content": document}
    text = tokenizer.apply_chat_template(
        [system, *turns], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _measured(
    model: Any, tokenizer: Any, prefix: Any, questions: list[Any], tokens: int
) -> list[int]:
    """A row of the table."""
    from cartridge_distill.evaluation.prompts import end_ids
    from cartridge_distill.evaluation.scoring import greedy_answers
    from cartridge_distill.model.prompts import render_prompt

    def ask(conversations: list[list[dict[str, str]]]) -> list[str]:
        prompts = [render_prompt(tokenizer, one) for one in conversations]
        ends = end_ids(model, tokenizer)
        said = greedy_answers(model, [prefix] * len(prompts), prompts, tokens, ends)
        return [str(tokenizer.decode(one, skip_special_tokens=True)).strip() for one in said]

    alone = ask([[{"role": "user", "content": one.question}] for one in questions])
    after = [*questions[1:], questions[0]]
    behind = list(zip(questions, alone, after, strict=True))
    second = ask([_turns(one.question, answer, then.question) for one, answer, then in behind])
    short = ask([_turns(one.question, f"{one.answer}.", then.question) for one, _, then in behind])
    return [
        sum(one == other for one, other in zip(alone, second, strict=True)),
        sum(one.split()[:6] == other.split()[:6] for one, other in zip(alone, second, strict=True)),
        sum(_says_thrice(one) for one in alone),
        sum(_is_right(one, said) for one, said in zip(questions, alone, strict=True)),
        sum(_is_right(one, said) for one, said in zip(after, second, strict=True)),
        sum(_is_right(one, said) for one, said in zip(after, short, strict=True)),
    ]


def _says_thrice(answer: str) -> bool:
    sentences = [one.strip() for one in answer.split(".") if len(one.strip()) > 8]
    return any(sentences.count(one) >= 3 for one in sentences)


def _is_right(question: Any, answer: str) -> bool:
    return str(question.answer).lower() in answer.lower()


if __name__ == "__main__":
    sys.exit(main())
