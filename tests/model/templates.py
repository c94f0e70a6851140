"""Chat templates of the shapes in the field, each with a small tokenizer that fits it.

The templates are shortened from the models' own: tools and images are left out, everything that
decides about begin-of-text, roles and system prompts is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = SMOLLM2.replace("AI assistant named SmolLM", "assistant.")
LLAMA3 = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}"
    "{% endif %}{% if messages[0]['role'] == 'system' %}"
    "{% set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system_message = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{ system_message + '<|eot_id|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + message['content'] }}"
    "{% else %}{{ '[INST] ' + message['content'] }}{% endif %}{{ '[/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Refuses a conversation without a user, and has a system role all the same.
NEEDS_USER = (
    "{{ bos_token }}{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No user query found in messages.') }}{% endif %}"
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Ends whatever is no generation prompt with the end-of-text token.
PHI3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The same with a system prompt of its own: no two renderings differ by the system message alone.
PHI3_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\nBe kind.<|end|>\n' }}{% endif %}"
    + PHI3
)
_CHATML_TURN = "{{ '<|im_start|>' + message['role'] + '\n' }}"
_THINK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
# A thought before each answer is asked for, and taken out of earlier turns.
THOUGHT_DROPPED = (
    "{% for message in messages %}"
    + _CHATML_TURN
    + "{{ message['content'].split('</think>')[-1] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + _THINK
)
# The last answer is written with its thought, an empty one if it has none.
THOUGHT_EMPTY = (
    "{% for message in messages %}" + _CHATML_TURN + "{% if message['role'] == 'assistant' %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + _THINK
)
# The model itself may choose to think: nothing is opened, and an answer is not begun either.
THOUGHT_CHOSEN = THOUGHT_EMPTY.replace("assistant\n<think>\n", "assistant\n")
# Generation prompt and answer go apart behind the role.
THOUGHT_CLOSED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<bot></think>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot><think>' }}{% endif %}"
)
# An answer stands in a channel, which the generation prompt leaves to the model.
CHANNELS = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Begins with two tokens that are no bos.
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Two tokens open a turn.
COHERE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|START|><|' + message['role'] + '|>' + message['content'] + '<|END|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START|><|assistant|>' }}{% endif %}"
)
# The system prompts stand behind bos with no turn of their own; an answer's thought is taken out,
# and the generation prompt opens one (DeepSeek-R1 and what was distilled from it).
DEEPSEEK_R1 = (
    "{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] %}"
    "{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
# Only answers behind the user's last question have a thought; whether the model thinks is a switch
# of the template (Qwen3).
QWEN3 = (
    "{% set ns = namespace(last=messages|length - 1) %}{% for message in messages[::-1] %}"
    "{% if message['role'] == 'user' and not ns.found %}{% set ns.found = true %}"
    "{% set ns.last = messages|length - loop.index %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}{% set thought = '' %}"
    "{% if message['role'] == 'assistant' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{% set content = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content %}{% endif %}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Roles must take turns, and the system prompt goes into the user's last turn (Mistral v0.3).
MISTRAL_V3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' }}{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ message['content'] + '[/INST]' }}{% else %}"
    "{{ ' ' + message['content']|trim + eos_token }}{% endif %}{% endfor %}"
)
# A system turn is always there; the caller's own text is one chapter of it (SmolLM3).
SYSTEM_CHAPTERS = (
    "{% if messages[0]['role'] == 'system' %}{% set own = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set own = 'You are helpful.' %}"
    "{% set rest = messages %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday: ' + strftime_now('%Y') }}"
    "{{ '\n\n## Instructions\n\n' + own + '\n\n<|im_end|>\n' }}{% for message in rest %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n' + message['content'].lstrip('\n') }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Each turn of the user begins with bos; no system role.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Its bos ends the assistant's turns, too.
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ bos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# A default system prompt, whose turn is opened by a token of its own.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\nYou help.<|end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A template, its special tokens, and what it must make of a document and of a prompt.

    `answer` is what stands before a started answer, where that is not the prompt; `tags` are tokens
    that the tokenizer knows and does not call special.
    """

    template: str | None
    bos: str | None
    specials: tuple[str, ...]
    document: str
    prompt: str
    answer: str | None = None
    tags: tuple[str, ...] = ()


_CHATML = ("<|im_start|>", "<|im_end|>")
_CHATML_DOCUMENT = "<|im_start|>system\nDOC<|im_end|>\n"
_CHATML_PROMPT = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_GEMMA_PROMPT = "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n"
_PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_PHI3_PROMPT = "<|user|>\nWho?<|end|>\n<|assistant|>\n"
_THOUGHTS = ("<think>", "</think>")
_CHANNELS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")

SHAPES = {
    "smollm2": Shape(SMOLLM2, "<|im_start|>", _CHATML, _CHATML_DOCUMENT, _CHATML_PROMPT),
    "qwen2": Shape(QWEN2, None, _CHATML, _CHATML_DOCUMENT, _CHATML_PROMPT),
    "llama3": Shape(
        LLAMA3,
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>" + _HEADER.format("system") + "Today Date: 26 Jul 2024\n\nDOC<|eot_id|>",
        _HEADER.format("user") + "Who?<|eot_id|>" + _HEADER.format("assistant"),
    ),
    "gemma2": Shape(GEMMA2, "<bos>", _GEMMA, "<bos>DOC\n\n", _GEMMA_PROMPT),
    "gemma3": Shape(GEMMA3, "<bos>", _GEMMA, "<bos>DOC\n\n", _GEMMA_PROMPT),
    "mistral": Shape(MISTRAL, "<s>", ("[INST]", "[/INST]"), "<s>DOC\n\n", "[INST] Who?[/INST]"),
    "needs_user": Shape(NEEDS_USER, "<s>", (), "<s><system>DOC", "<user>Who?<assistant>"),
    "phi3": Shape(PHI3, "<s>", _PHI3, "<s><|system|>\nDOC<|end|>\n", _PHI3_PROMPT),
    "phi3_default": Shape(PHI3_DEFAULT, None, _PHI3, "<|system|>\nDOC<|end|>\n", _PHI3_PROMPT),
    "thought_dropped": Shape(
        THOUGHT_DROPPED,
        *(None, _CHATML, _CHATML_DOCUMENT, _CHATML_PROMPT + "<think>\n"),
        answer=_CHATML_PROMPT,
        tags=_THOUGHTS,
    ),
    "thought_empty": Shape(
        THOUGHT_EMPTY,
        *(None, _CHATML, _CHATML_DOCUMENT, _CHATML_PROMPT + "<think>\n"),
        answer=_CHATML_PROMPT + "<think>\n\n</think>\n\n",
        tags=_THOUGHTS,
    ),
    "thought_chosen": Shape(
        THOUGHT_CHOSEN,
        *(None, _CHATML, _CHATML_DOCUMENT, _CHATML_PROMPT),
        answer=_CHATML_PROMPT + "<think>\n\n</think>\n\n",
        tags=_THOUGHTS,
    ),
    "thought_closed": Shape(
        THOUGHT_CLOSED,
        *("<s>", ("<user>", "<bot>"), "<s>DOC", "<user>Who?<bot><think>"),
        answer="<user>Who?<bot></think>",
        tags=_THOUGHTS,
    ),
    "deepseek_r1": Shape(
        DEEPSEEK_R1,
        "<｜begin▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        "<｜begin▁of▁sentence｜>DOC",
        "<｜User｜>Who?<｜Assistant｜><think>\n",
        answer="<｜User｜>Who?<｜Assistant｜>",
        tags=_THOUGHTS,
    ),
    "qwen3": Shape(
        QWEN3,
        *(None, _CHATML, _CHATML_DOCUMENT, _CHATML_PROMPT),
        answer=_CHATML_PROMPT + "<think>\n\n</think>\n\n",
        tags=_THOUGHTS,
    ),
    "mistral_v3": Shape(
        MISTRAL_V3, "<s>", ("[INST]", "[/INST]"), "<s>DOC\n\n", "[INST] Who?[/INST]"
    ),
    "system_chapters": Shape(
        SYSTEM_CHAPTERS,
        *(None, _CHATML),
        f"<|im_start|>system\n## Metadata\n\nToday: {date.today():%Y}\n\n## Instructions\n\n"
        "DOC\n\n<|im_end|>\n",
        _CHATML_PROMPT,
        answer=_CHATML_PROMPT + "<think>\n\n</think>\n",
        tags=_THOUGHTS,
    ),
    "channels": Shape(
        CHANNELS,
        *(None, _CHANNELS, "<|start|>system<|message|>DOC<|end|>"),
        prompt="<|start|>user<|message|>Who?<|end|><|start|>assistant",
        answer="<|start|>user<|message|>Who?<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "glm4": Shape(
        GLM4,
        None,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        "[gMASK]<sop><|system|>\nDOC",
        "<|user|>\nWho?<|assistant|>\n",
    ),
    "cohere": Shape(
        COHERE,
        "<BOS_TOKEN>",
        ("<|START|>", "<|END|>", "<|system|>", "<|user|>", "<|assistant|>"),
        "<BOS_TOKEN><|START|><|system|>DOC<|END|>",
        "<|START|><|user|>Who?<|END|><|START|><|assistant|>",
    ),
    "llama2": Shape(LLAMA2, "<s>", (), "<s>DOC\n\n", "<s>[INST] Who? [/INST]"),
    "olmo2": Shape(
        OLMO2,
        "<|endoftext|>",
        (),
        "<|endoftext|><|system|>\nDOC\n",
        "<|user|>\nWho?\n<|assistant|>\n",
    ),
    "default_system": Shape(
        DEFAULT_SYSTEM,
        None,
        _ROLES,
        "<|system|>\nDOC<|end|>\n",
        "<|user|>\nWho?<|end|>\n<|assistant|>\n",
    ),
    "default_system_after_bos": Shape(
        "{{ bos_token }}" + DEFAULT_SYSTEM,
        "<s>",
        _ROLES,
        "<s><|system|>\nDOC<|end|>\n",
        "<|user|>\nWho?<|end|>\n<|assistant|>\n",
    ),
    "none": Shape(None, "<s>", (), "<s>DOC\n\n", "User:\nWho?\n\nAssistant:\n"),
}


def tokenizer_of(shape: Shape) -> PreTrainedTokenizerFast:
    """A byte tokenizer with the special tokens of a shape."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(shape.specials)})
    tokenizer.add_tokens(list(shape.tags))
    tokenizer.bos_token = None
    if shape.bos is not None:
        tokenizer.add_special_tokens({"bos_token": shape.bos})
    tokenizer.chat_template = shape.template
    return tokenizer
