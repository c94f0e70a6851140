"""The model card of a pushed cartridge: ``README.md`` with the Hub's front matter.

Everything in it comes from the cartridge's own JSON. Text that users wrote goes through
:func:`_plain`, so that a title cannot break out of its table.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cartridge_distill.cartridge.formats.peft import VERSIONS
from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge

CARD_FILE = "README.md"
_MARK = "\n<!-- cartridge-distill wrote this card; SHA-256 of what is above: {} -->\n"
_CURVE_ROWS = 12
_BARS = "▁▂▃▄▅▆▇█"


def card(cartridge: StoredCartridge, formats: Sequence[str], location: str) -> str:
    """The card's text.

    Args:
        formats: what lies beside it.
        location: hub id or directory, as users will name it.
    """
    meta = cartridge.meta
    base = cartridge.base_model()
    document = meta.document_title or meta.document_sha256 or "a document"
    sections = [
        f"---\n{_front_matter(base, formats)}---",
        f"# Cartridge: {_plain(document)}",
        f"A [cartridge](https://arxiv.org/abs/2506.06266), {cartridge.snapshot.num_tokens} tokens "
        f"of keys and values that stand in for a document in front of `{_plain(base)}`. Made with "
        "cartridge-distill. It holds much of what the document says: whoever has it can ask it.",
        _table(["", ""], _facts(cartridge)),
        _recipe(meta.recipe),
        _training(meta.metrics),
        _results(meta.metrics.get("results")),
        "## How to use it",
        "A cartridge is the beginning of a conversation. The prompt that follows carries no "
        "begin-of-text token and no system prompt; `render_prompt` leaves both out.",
    ]
    if "native" in formats:
        sections.append(_use_here(base, location))
    if "peft" in formats:
        sections.append(_use_peft(base, location, cartridge))
    if "tokasaurus" in formats:
        sections.append(_use_tokasaurus(location))
    text = "\n\n".join(section for section in sections if section) + "\n"
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def is_written_here(text: str) -> bool:
    """Whether a card is as :func:`card` wrote it, without a line by another hand."""
    written, begin, mark = text.rpartition(_MARK.partition("{}")[0])
    return begin + mark == _MARK.format(hashlib.sha256(written.encode()).hexdigest())


def _front_matter(base: str, formats: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData  # `info` reads this module, and needs no Hub

    relation: dict[str, Any] = (
        {} if base.startswith(("/", ".", "~")) else {"base_model_relation": "adapter"}
    )
    data = ModelCardData(
        tags=["cartridge", "kv-cache", "distillation"],
        base_model=base if relation else None,  # the Hub takes ids alone
        library_name="peft" if "peft" in formats else None,
        pipeline_tag="text-generation",
        **relation,
    )
    return f"{data}\n"


def _facts(cartridge: StoredCartridge) -> list[list[object]]:
    meta, snapshot = cartridge.meta, cartridge.snapshot
    rows: list[list[object]] = [
        ["base model", meta.base_model],
        ["base model's revision", meta.base_revision],
        ["document", meta.document_title],
        ["document's SHA-256", meta.document_sha256],
        ["tokens", f"{snapshot.num_tokens}, of which {snapshot.num_frozen_tokens} frozen"],
        [
            "layers, kv heads, head size",
            f"{snapshot.num_layers}, {snapshot.kv_heads}, {snapshot.head_dim}",
        ],
        ["dtype, size", f"{cartridge.dtype_name()}, {snapshot.num_bytes / 1e6:.1f} MB"],
        ["optimizer steps", meta.step],
        ["version", meta.version],
    ]
    return [row for row in rows if row[1] is not None]


def _recipe(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    rows = [
        [name, value if isinstance(value, str) else json.dumps(value, default=str)]
        for name, value in recipe.items()
        if value not in (None, "")
    ]
    return "## Recipe\n\n" + _table(["setting", "value"], rows)


def _training(metrics: Mapping[str, Any]) -> str:
    """The curve, and the numbers of the last step."""
    parts = [_curve(metrics.get("curve")), _last_step(metrics.get("last_step"))]
    told = "\n\n".join(part for part in parts if part)
    return f"## Training\n\n{told}" if told else ""


def _last_step(numbers: Any) -> str:
    if not isinstance(numbers, Mapping) or not numbers:
        return ""
    rows = [[name.replace("_", " "), _number(value)] for name, value in numbers.items()]
    return _table(["last step", ""], rows)


def curve_in_a_line(curve: Any) -> str:
    """``▇▅▂▁ loss 1.257 to 0.501, steps 1 to 32``; empty where there is no curve."""
    rows = _curve_rows(curve)
    names = [name for name in rows[0] if name != "step"] if rows else []
    values = [row[names[0]] for row in rows if names and _is_number(row.get(names[0]))]
    if not values:
        return ""
    told = f"{names[0]} {_number(values[0])} to {_number(values[-1])}"
    return f"{_bars(values)} {told}, steps {rows[0]['step']} to {rows[-1]['step']}".lstrip()


def _curve_rows(curve: Any) -> list[Mapping[str, Any]]:
    return [row for row in curve or [] if isinstance(row, Mapping) and "step" in row]


def _curve(curve: Any) -> str:
    """A line of bars for the first series, and a table of some steps, first and last among them."""
    rows = _curve_rows(curve)
    if not rows:
        return ""
    names = [name for name in rows[0] if name != "step"]
    places = sorted({round(i * (len(rows) - 1) / (_CURVE_ROWS - 1)) for i in range(_CURVE_ROWS)})
    shown = _table(
        ["step", *names],
        [[rows[i]["step"], *(_number(rows[i].get(name)) for name in names)] for i in places],
    )
    bars = _bars([row[names[0]] for row in rows if names and _is_number(row.get(names[0]))])
    line = f"`{bars}` {_plain(names[0])}, first step to last\n\n" if bars else ""
    return f"{line}{shown}"


def _bars(values: Sequence[float], width: int = 60) -> str:
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    picked = [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
    low, high = min(picked), max(picked)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in picked)


def _results(results: Any) -> str:
    rows = [row for row in results or [] if isinstance(row, Mapping)]
    if not rows:
        return ""
    names = list(rows[0])
    cells = [[_number(row.get(name)) for name in names] for row in rows]
    note = (
        "KL and log-loss in nats per token; the KL is to the model with the whole document.\n\n"
        if {"kl", "log_loss"} & set(names)
        else ""
    )
    return f"## Results\n\n{note}{_table([name.replace('_', ' ') for name in names], cells)}"


def _use_here(base: str, location: str) -> str:
    return f"""### Here

```bash
cartridge-distill chat --model {_pasted(base)} --cartridge {_pasted(location)}
```"""


def _use_peft(base: str, location: str, cartridge: StoredCartridge) -> str:
    revision = cartridge.meta.base_revision
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    return f"""### In PEFT

{VERSIONS} The code below looks whether it did.

The mask covers the prompt alone; PEFT moves positions and mask by itself. `use_cache=False` and
gradient checkpointing do not work with a prefix there.

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from cartridge_distill.model.prompts import render_prompt

base = {json.dumps(base)}
tokenizer = AutoTokenizer.from_pretrained(base{pinned})
model = AutoModelForCausalLM.from_pretrained(base{pinned})
model = PeftModel.from_pretrained(model, {json.dumps(location)}).eval()
ids = torch.tensor([render_prompt(tokenizer, [{{"role": "user", "content": "What is it about?"}}])])
inputs = {{"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
out = model.generate(
    **inputs, max_new_tokens=64, do_sample=False, output_logits=True, return_dict_in_generate=True
)
with torch.no_grad():
    seen = model(**inputs).logits[:, -1]
if (out.logits[0].float() - seen.float()).abs().max() > 0.5:
    raise RuntimeError("PEFT's generate ignored the cartridge: use another version of transformers")
print(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True))
```"""


def _use_tokasaurus(location: str) -> str:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "What is it about?"}],
        "max_tokens": 64,
        "cartridges": [{"id": location, "source": "huggingface"}],
    }
    return f"""### In Tokasaurus

The branch with cartridges, `POST /custom/cartridge/chat/completions`:

```json
{json.dumps(body, indent=2, ensure_ascii=False)}
```

With a copy in the server's `cartridge_dir`, the `id` is the folder's name and the `source` is
`local`. The server unpickles `cartridge.pt` without restrictions: `cartridge_distill`'s `pull`
refuses one that holds anything but tensors."""


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(value: object) -> str:
    """On one line, without what ends a table's cell or begins a tag."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _pasted(value: object) -> str:
    """One word of a shell's command, on one line."""
    return shlex.quote(" ".join(str(value).split()))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _number(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value if value is not None else ""
