"""One prompt, with and without a cartridge, against any Tokasaurus server.

The prompt goes out as token ids (from the tokenizer that ``--model`` names), as the trainer's
prompts do, and what comes back is shown token by token with its log-prob. A cartridge is named by
its id on the server; this script uploads nothing. Needs neither veRL nor Ray when it is run by its
path, as in the examples.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cartridge_distill.model.prompts import render_document, render_prompt
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError
from cartridge_distill.util.standard_output import guard_output

SOURCES = ("local", "huggingface", "wandb")
DEFAULT_PROMPT = "What is the patient's name, and what is the diagnosis?"
EXAMPLES = """\
examples:
  # the demo's trained cartridge: copy a published version's folder into the server's
  # --cartridge-dir, or keep the server of a run; its id is the folder's name
  python verl_patches/rollout/tokasaurus_rollout/example_query.py --model path/to/model \\
      --url http://127.0.0.1:10210 --cartridge demo-20260101120000-ab12-step-000032

  # two cartridges before one prompt; the server joins them in alphabetical order of their ids
  ... --cartridge record_a --cartridge record_b --prompt "What do the two patients share?"

  # a cartridge from the Hugging Face hub, on a server that may download
  ... --model meta-llama/Llama-3.2-3B-Instruct \\
      --cartridge huggingface:hazyresearch/cartridge-wauoq23f

  # a started answer: the model goes on in the middle of the sentence
  ... --prompt "What does the record say about medication?" --answer "The patient takes"

credentials, if the server wants them: TOKASAURUS_API_KEY, or MODAL_PROXY_KEY and MODAL_PROXY_SECRET
exit status: 0 answered, 1 an error, which is named
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--url", required=True, help="of the server, e.g. http://127.0.0.1:10210")
    option("--model", required=True, help="folder or hub id of the server's model: its tokenizer")
    option(
        "--cartridge",
        action="append",
        default=[],
        metavar="[SOURCE:]ID",
        help=f"cartridge on the server, SOURCE one of {', '.join(SOURCES)} (default local); "
        "may be repeated",
    )
    option("--prompt", default=DEFAULT_PROMPT, help="what the user says (%(default)r)")
    option("--answer", help="how the answer begins; the model goes on from there")
    option("--max-tokens", type=int, default=48, help="new tokens at most (%(default)s)")
    option("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    option("--wait", type=float, default=30.0, help="seconds to wait for the server (%(default)s)")
    return parser.parse_args(arguments)


def cartridge_ref(text: str) -> CartridgeRef:
    """``[SOURCE:]ID`` as the protocol has it.

    Raises:
        ConfigError: an unknown source, or no id.
    """
    source, colon, name = text.partition(":")
    if not colon:
        source, name = "local", text
    if source not in SOURCES or not name:
        raise ConfigError(
            f"--cartridge {text!r} names no cartridge; fix: write ID or SOURCE:ID with SOURCE one "
            f"of {', '.join(SOURCES)}"
        )
    return CartridgeRef(id=name, source=source)  # type: ignore[arg-type]  # checked above


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str | None, behind_cartridge: bool
) -> list[int]:
    """The ids that are sent.

    Behind a cartridge the prompt has no begin-of-text token and no system prompt: the cartridge
    stands for both. The bare model gets a plain system prompt, as it knows it from its training.
    """
    messages = [{"role": "user", "content": prompt}]
    if answer:
        messages.append({"role": "assistant", "content": answer})
    ids = render_prompt(tokenizer, messages)
    if behind_cartridge:
        return ids
    return render_document(tokenizer, "You are a helpful assistant.") + ids


def show(title: str, sent: int, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> None:
    """The answer, and a line with each token's log-prob."""
    count, total = len(completion.token_ids), sum(completion.logprobs)
    print(f"\n== {title}")
    print(f"   {sent} prompt tokens, {count} new ones, ended by {completion.finish_reason!r}")
    print(f"   {tokenizer.decode(completion.token_ids, skip_special_tokens=True)}")
    print(f"   mean log-prob of a token: {total / max(count, 1):.3f}")
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    print("   " + "  ".join(f"{tokenizer.decode([token])!r} {p:.2f}" for token, p in pairs))


async def query(options: argparse.Namespace) -> None:
    """Asks twice, and prints both answers.

    Raises:
        ConfigError: an option that makes no sense.
        RolloutError: no server, or it refused; its own words are in the message.
    """
    refs = [cartridge_ref(text) for text in options.cartridge]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    settings = ClientSettings(startup_timeout_s=options.wait)
    async with TokasaurusClient(options.url, settings) as client:
        await client.wait_until_ready()
        print(f"{options.url} serves {', '.join(await client.models())}")
        print(f"prompt: {options.prompt!r}", f"answer begins: {options.answer!r}", sep="\n")
        cases: list[tuple[str, list[CartridgeRef]]] = [("without a cartridge", [])]
        if refs:
            names = " + ".join(sorted(ref.id for ref in refs))
            cases.append((f"with cartridge {names}", refs))
        for title, wanted in cases:
            ids = prompt_ids(tokenizer, options.prompt, options.answer, bool(wanted))
            [completion] = await client.complete(
                ids, options.max_tokens, options.temperature, wanted
            )
            show(title, len(ids), completion, tokenizer)
    if not refs:
        print("\nno --cartridge was given: the bare model's answer alone", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    try:
        asyncio.run(query(options))
    except (CartridgeDistillError, OSError) as error:  # OSError: the tokenizer is not there
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
