"""Chat messages and documents as token ids, the same for the student, the teacher and the server.

A sequence is always `prefix + prompt + response`. The prefix is the cartridge (student) or the
document's KV (teacher); the prompt's ids are the same for both, so the two differ by the prefix
alone. `render_document` gives the ids of the document prefix, `render_prompt` the ids that follow
any prefix: without a begin-of-text token and without the default system prompt that some chat
templates put in (SmolLM2, Qwen2).

`begin_of_text` is what the model always begins with, whatever follows. A document begins with it,
and so does a cartridge made of a document's first tokens: there it is the attention sink that the
first, frozen token holds. Where neither stands before a prompt ("no document", a chat without a
cartridge), it stands there alone; `render_alone` gives such a prompt. The default system prompt of
a template is no part of it: the document takes its place.

A conversation that ends with an assistant message is a *started answer*: the turn is left open and
the model goes on in the middle of the sentence. It begins where the template writes an answer,
which is not always the end of the generation prompt: that may open a thought (`<think>`), or leave
the choice of a channel to the model.

Contents are text (`contents`): what looks like a control token in them is none.

Not done here: truncation (a document or a prompt that is too long is the caller's error to raise).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from cartridge_distill.model.contents import Contents
from cartridge_distill.util.errors import ConfigError, DocumentError

Message = Mapping[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
_PROBE = "A"
# Llama 3 templates write today's date into the system message; the same document must give the
# same ids (and the same cached KV) tomorrow.
_TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024"}
_OPENS_A_THOUGHT = re.compile(
    r"[<\[]\W?(?:begin_of_)?(?:think|thinking|thought|reason|reasoning)\W?[>\]]\s*\Z", re.IGNORECASE
)


def render_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the document prefix [P].

    The document is the system message of the chat template. Where the template has no system role
    (Gemma, older Mistral), or there is no template, it is begin-of-text + text + a blank line.

    Raises:
        DocumentError: the document is empty.
        ConfigError: the tokenizer cannot tell a control token from its name in the text, or the
            chat template cannot be split behind a system message.
    """
    if not text.strip():
        raise DocumentError(
            "the document is empty: there is no text to compute a prefix from; fix: give one with "
            "text"
        )
    contents = Contents(tokenizer, [text])
    marked = contents.mark(text)
    rendered = _system_rendering(tokenizer, marked)
    if rendered is None:
        begin = begin_of_text(tokenizer) or _bos(tokenizer)
        return begin + contents.ids(marked + "\n\n")
    ids = contents.ids(rendered)
    # A tokenizer that adds begin-of-text by itself means it to be there, also under a template
    # that leaves it out: it is the attention sink that the first, frozen cartridge slot carries.
    own = _own_begin_of_text(tokenizer)
    return ids if ids[: len(own)] == own else own + ids


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model always begins with: the ids before any conversation, mostly one or none.

    Empty where the prompt itself opens with it: SmolLM2 calls ``<|im_start|>`` its bos, which
    opens every message, and Llama 2 writes ``<s>`` at each turn. It need not be the bos: GLM-4's
    ``[gMASK]<sop>`` is no token that a tokenizer adds.

    Without a chat template it is the bos. With one, it is the special tokens with which the whole
    rendering begins and which the prompt, as :func:`render_prompt` has it, does not hold; the last
    of them opens the system's turn, where text follows, unless it is the bos. A bos that the
    tokenizer adds to any text by itself belongs there, too, when the template leaves it out.
    """
    bos = _bos(tokenizer)
    if tokenizer.chat_template is None:
        return bos
    user = {"role": "user", "content": _PROBE}
    prompt = render_prompt(tokenizer, [user])
    rendered = _apply_template(tokenizer, [user], add_generation_prompt=True)
    whole = Contents(tokenizer, [_PROBE]).ids(rendered)
    own = _own_begin_of_text(tokenizer)
    if whole[: len(own)] != own:
        whole = own + whole
    special = _special_ids(tokenizer)
    begin = list(takewhile(lambda token: token in special and token not in prompt, whole))
    rest = whole[len(begin) :]
    if rest == prompt or rest[0] in special or begin[-1:] == bos:
        return begin
    return begin[:-1]


def render_alone(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids [T] of a prompt with no document and no cartridge before it.

    As :func:`render_prompt`, after what the model always begins with.
    """
    return begin_of_text(tokenizer) + render_prompt(tokenizer, messages)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids [T] that follow a prefix, ready for the model to go on from.

    Args:
        tokenizer: with or without a chat template.
        messages: chat messages (`role`, `content`). When the last one is from the assistant, its
            content is the beginning of the answer, which may be empty: it is appended verbatim to
            what the template writes before an answer, the turn stays open. A system message of
            the caller's own is kept, after the prefix.

    Raises:
        ConfigError: messages are empty, have unknown roles or contents that are not text, the chat
            template refuses them or does not say where an answer begins, or the tokenizer cannot
            tell a control token from its name in a content.
    """
    turns = _checked(messages)
    contents = Contents(tokenizer, [turn["content"] for turn in turns])
    for place, turn in enumerate(turns):
        # Templates take the thoughts, which the model wrote itself, out of earlier answers.
        earlier_answer = turn["role"] == "assistant" and place < len(turns) - 1
        turn["content"] = contents.mark(turn["content"], thoughts_too=not earlier_answer)
    started = None
    if turns[-1]["role"] == "assistant":
        started = turns.pop()["content"]
        if not turns:
            raise ConfigError(
                "the conversation has only a started assistant answer; fix: put the user's message "
                "that it answers before it"
            )
    if tokenizer.chat_template is None:
        return contents.ids(_plain_chat(turns) + (started or ""))
    try:
        rendered = _render_without_prefix(tokenizer, turns)
        if started is not None:
            opening = _answer_opening(tokenizer, turns, rendered, contents.mark_character)
            rendered = opening + started
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ConfigError(
            f"The tokenizer's chat template refuses a conversation of the roles [{roles}]: "
            f"{error}; fix: use roles that the model's template knows"
        ) from error
    return contents.ids(rendered)


def _checked(messages: Sequence[Message]) -> list[dict[str, str]]:
    if len(messages) == 0:
        raise ConfigError("the conversation is empty; fix: give a prompt one message at least")
    turns = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise ConfigError(
                f"Message {number} has the role {role!r}; fix: make it one of {', '.join(_ROLES)}"
            )
        if not isinstance(content, str):
            raise ConfigError(
                f"Message {number} ({role}) has content of type {type(content).__name__}; "
                "fix: give text"
            )
        turns.append({"role": role, "content": content})
    return turns


def _render_without_prefix(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, str]],
    add_generation_prompt: bool = True,
) -> str:
    """The conversation less begin-of-text and system prompt, by default with an open answer."""
    system = None if turns[0]["role"] == "system" else _probe_rendering(tokenizer)
    if system is None:
        rendered = _apply_template(tokenizer, turns, add_generation_prompt)
        return _strip_begin_of_text(tokenizer, rendered)
    # With a system message of ours the template puts in none of its own; what is left after it
    # is what follows a document prefix.
    with_system = [{"role": "system", "content": _PROBE}, *turns]
    rendered = _apply_template(tokenizer, with_system, add_generation_prompt)
    if not rendered.startswith(system):
        raise _cannot_be_split(system, rendered)
    return rendered[len(system) :]


def _answer_opening(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], generation: str, probe: str
) -> str:
    """The conversation up to where an answer begins.

    That is what the template writes before the content of an assistant's message. Mostly it is the
    generation prompt. Where that opens a thought, the template closes it before an answer, or has
    none there. White space that differs is taken from the generation prompt.

    Args:
        generation: the conversation with the generation prompt.
        probe: a character that the conversation does not hold.
    """
    answer = {"role": "assistant", "content": probe}
    try:
        whole = _render_without_prefix(tokenizer, [*turns, answer], add_generation_prompt=False)
    except TemplateError:
        whole = ""  # It knows no answers: the generation prompt alone tells.
    before, found, _ = whole.partition(probe)
    last = turns[-1]["content"].strip()
    asked = generation.rfind(last) + len(last)
    if found and before[:asked] == generation[:asked]:
        return generation if before.rstrip() == generation.rstrip() else before
    if _OPENS_A_THOUGHT.search(generation):
        raise ConfigError(
            "The tokenizer's chat template opens a thought for the model "
            f"({generation[-30:]!r}) and does not show where an answer begins, so an answer cannot "
            "be started; fix: use open questions (--recipe open), or a template that writes the "
            "assistant's messages"
        )
    return generation


_probe_renderings: WeakKeyDictionary[Any, tuple[Any, str | None]] = WeakKeyDictionary()


def _probe_rendering(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """`_system_rendering` of the probe, which every prompt needs; kept for each tokenizer."""
    state = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    kept = _probe_renderings.get(tokenizer)
    if kept is None or kept[0] != state:
        kept = state, _system_rendering(tokenizer, _PROBE)
        _probe_renderings[tokenizer] = kept
    return kept[1]


def _system_rendering(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """How the template renders a system message, begin-of-text included; None without such a role.

    A template that folds the system message into the user's turn (Gemma 3, Mistral before v7) has
    no system role in this sense: there is nothing that could stand before the turn by itself.

    Raises:
        ConfigError: there is such a role, and what it writes depends on what follows.
    """
    if tokenizer.chat_template is None:
        return None
    system, user = {"role": "system", "content": text}, {"role": "user", "content": "B"}
    text = text.strip()
    alone = _rendered_or_none(tokenizer, [system])
    both = _rendered_or_none(tokenizer, [system, user], add_generation_prompt=True)
    if alone is not None and text in alone:
        # Phi-3 ends what is no generation prompt with an end-of-text token.
        for candidate in (alone, alone.removesuffix(str(tokenizer.eos_token or ""))):
            if both is None or both.startswith(candidate):
                return candidate
    turn = _rendered_or_none(tokenizer, [user], add_generation_prompt=True)
    if both is None or turn is None:
        return None
    before = both.removesuffix(_strip_begin_of_text(tokenizer, turn))
    if before != both and text in before:
        return before
    if alone is not None and text in alone:
        raise _cannot_be_split(alone, both)
    return None


def _cannot_be_split(alone: str, both: str) -> ConfigError:
    return ConfigError(
        "The tokenizer's chat template renders a system message differently when a conversation "
        f"follows it: {_shown(alone)!r} alone, {_shown(both)!r} with it. Such a template cannot be "
        "split into a prefix and a prompt; give the tokenizer another chat_template."
    )


def _shown(rendered: str) -> str:
    return rendered if len(rendered) <= 160 else f"{rendered[:80]} ... {rendered[-80:]}"


def _rendered_or_none(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = False,
) -> str | None:
    """None where the template refuses these roles."""
    try:
        return _apply_template(tokenizer, messages, add_generation_prompt)
    except TemplateError:
        return None


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = False,
) -> str:
    rendered = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **_TEMPLATE_ARGUMENTS,
    )
    assert isinstance(rendered, str)
    return rendered


def _strip_begin_of_text(tokenizer: PreTrainedTokenizerBase, rendered: str) -> str:
    """Takes a leading begin-of-text token off, if the tokenizer's bos really is one.

    SmolLM2 calls `<|im_start|>` its bos, which opens every message: that one stays.
    """
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or not rendered.startswith(bos):
        return rendered
    conversation = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    if _apply_template(tokenizer, conversation).count(bos) > 1:
        return rendered
    return rendered.removeprefix(bos)


def _plain_chat(turns: list[dict[str, str]]) -> str:
    """A conversation for models without a chat template; ends with an open assistant turn."""
    lines = [f"{turn['role'].capitalize()}:\n{turn['content']}\n\n" for turn in turns]
    return "".join(lines) + "Assistant:\n"


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    return [] if bos is None else [bos]


def _own_begin_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token that the tokenizer puts before any text by itself, if it does."""
    bos = _bos(tokenizer)
    return bos if bos and list(tokenizer("a").input_ids)[:1] == bos else []


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
