"""A cartridge in vLLM, without a server: from a folder or the Hub to an answer.

Run it with the Python of an environment that has vLLM and this package (docs/vllm.md makes one)::

    python examples/use_in_vllm.py --model MODEL --cartridge DIR "Which medicine does she take?"

The five lines are in :func:`answer`; the rest reads the command line.
"""

from __future__ import annotations

import argparse


def answer(model: str, cartridge: str, question: str, max_model_len: int = 4096) -> str:
    """The model's answer to a question about the cartridge's document.

    Args:
        model: folder or hub id.
        cartridge: file or folder of any format, or a hub id ``owner/name``.
        max_model_len: tokens of cartridge, question and answer together.
    """
    from cartridge_distill.engines.vllm.offline import CartridgeLLM

    llm = CartridgeLLM(model, {"document": cartridge}, max_model_len=max_model_len)
    return llm.ask("document", question)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of the model")
    parser.add_argument("--cartridge", required=True, help="file, folder or hub id")
    parser.add_argument("--max-model-len", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("question")
    given = parser.parse_args()
    print(answer(given.model, given.cartridge, given.question, given.max_model_len))


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
