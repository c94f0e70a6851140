"""PEFT's ``CARTRIDGE`` adapter (peft >= 0.19): ``PeftModel.from_pretrained(base, directory)``.

One tensor, ``prompt_embeddings`` ``[P, L * 2 * H * D]``, per token laid out as
``[layer][key, value][kv_head][head_dim]``; the numbers stand in ``adapter_config.json``. Written by
hand, so that peft need not be installed. The metadata of the tensors' file, which peft does not
read, holds a hash that is compared here; in a file of peft's own there is none.

With peft, prompts follow the same rules as everywhere: no begin-of-text token and no second system
prompt (:func:`cartridge_distill.model.prompts.render_prompt`). Positions and mask need nothing:
peft puts the cartridge into the cache, moves the positions up by P and lengthens the mask by P
ones, so the mask that is passed covers the prompt alone. What peft cannot do with it:
``use_cache=False`` in ``generate``, and gradient checkpointing.

Whether ``generate`` uses the adapter at all depends on the versions: peft hands the cartridge over
as ``past_key_values``, and newer versions of transformers take a ``cache`` in its place and drop it
with a warning. The model's forward is right there, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cartridge_distill.cartridge.content_hash import sha256_of_named
from cartridge_distill.cartridge.formats.known_keys import (
    metadata_of,
    read_safetensors,
    refuse_unknown,
)
from cartridge_distill.cartridge.formats.stored_cartridge import (
    NO_FROZEN_TOKEN,
    CartridgeMeta,
    StoredCartridge,
    checked_snapshot,
)
from cartridge_distill.cartridge.snapshot import Snapshot, split_layers
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import replace_directory

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
_TENSOR = "prompt_embeddings"
_SHA256 = "sha256"
_NUMBERS = (
    "num_virtual_tokens",
    "num_frozen_tokens",
    "num_layers",
    "num_attention_heads",
    "token_dim",
)
# What leaves the tensor's meaning as it is, with any value.
_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
# What is understood with one value alone: further trained modules are not in the tensor.
_FIXED = {"modules_to_save": (None, []), "num_transformer_submodules": (None, 1)}

# tests/cartridge/formats/test_peft.py compares with the installed versions, and (long) the newest.
CHECKED = "peft 0.21.2 with transformers 5.10.4, 5.17.0, 5.20.0, 5.22.0 and 5.23.0"
# The first version of transformers with which generate ignores it; later ones are taken for alike.
NO_EFFECT_FROM = "5.24.0"
VERSIONS = (
    f"Checked: {CHECKED}. With transformers {NO_EFFECT_FROM}, the newest then, PEFT's `generate` "
    f'ignores the cartridge with no more than a warning: use "transformers<{NO_EFFECT_FROM}".'
)


def read(path: Path) -> StoredCartridge:
    """Reads an adapter.

    Raises:
        CartridgeFormatError: a file is missing or broken, another kind of adapter, or one whose
            numbers differ from its tensor.
    """
    config = _read_config(path)
    weights = path / ADAPTER_WEIGHTS
    tensors = read_safetensors(weights, (_SHA256,))
    if list(tensors) != [_TENSOR]:
        raise CartridgeFormatError(f"{weights} holds {sorted(tensors)}, expected [{_TENSOR!r}]")
    file = path / ADAPTER_CONFIG
    tokens, layers, heads, width = (
        _number(config, name, file)
        for name in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    )
    frozen = _number(config, "num_frozen_tokens", file, least=0)
    if width % heads:
        raise CartridgeFormatError(f"{file}: token_dim={width} does not divide by {heads} kv heads")
    table_PE = tensors[_TENSOR]
    if tuple(table_PE.shape) != (tokens, layers * 2 * width):
        raise CartridgeFormatError(
            f"{weights}: {_TENSOR} is {tuple(table_PE.shape)}; {ADAPTER_CONFIG} says "
            f"[num_virtual_tokens={tokens}, num_layers={layers} * 2 * token_dim={width}]"
        )
    if frozen < 1:
        raise CartridgeFormatError(f"{path}: {NO_FROZEN_TOKEN}")
    sha256 = metadata_of(weights).get(_SHA256)
    if sha256 is not None and (found := _sha256(table_PE, frozen, layers, heads)) != sha256:
        raise CartridgeFormatError(
            f"{weights}: the tensor, or a number of {ADAPTER_CONFIG}, is not what was written: "
            f"SHA-256 {found}, and the file says {sha256!r:.80}; fix: take another copy of both"
        )
    parts = split_layers(*_layers_of(table_PE, layers, heads), frozen)
    meta = CartridgeMeta(
        config.get("base_model_name_or_path"), base_revision=config.get("revision")
    )
    return StoredCartridge(checked_snapshot(parts, str(weights)), meta, sha256)


def write(cartridge: StoredCartridge, path: Path, overwrite: bool = False) -> None:
    """Writes an adapter.

    Raises:
        CartridgeFormatError: nobody has said which model it is for, or its layers differ in shape.
        FileExistsError: it is there and ``overwrite`` is false.
    """
    snapshot = cartridge.snapshot
    heads, size = snapshot.kv_heads, snapshot.head_dim
    if not (isinstance(heads, int) and isinstance(size, int)):
        raise CartridgeFormatError(
            f"its layers differ in heads or head size (kv_heads={heads}, head_dim={size}), and "
            "this format has one shape for all; fix: write it as native, hazyresearch or tokasaurus"
        )
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": cartridge.base_model(),
        "inference_mode": True,
        "modules_to_save": None,
        # With prefixes peft means kv heads, and the width of all of them together.
        "num_attention_heads": heads,
        "num_frozen_tokens": snapshot.num_frozen_tokens,
        "num_layers": snapshot.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": snapshot.num_tokens,
        "peft_type": "CARTRIDGE",
        "revision": cartridge.meta.base_revision,
        "task_type": "CAUSAL_LM",
        "token_dim": heads * size,
    }

    def fill(scratch: Path) -> None:
        table_PE = prompt_embeddings(snapshot)
        sha256 = _sha256(table_PE, snapshot.num_frozen_tokens, snapshot.num_layers, heads)
        # Some readers of metadata want the first entry.
        save_file({_TENSOR: table_PE}, scratch / ADAPTER_WEIGHTS, {"format": "pt", _SHA256: sha256})
        (scratch / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    replace_directory(path, fill, overwrite)


def prompt_embeddings(snapshot: Snapshot) -> Tensor:
    """The tensor ``[P, L * 2 * H * D]``, in the snapshot's dtype."""
    keys, values = snapshot.layers()
    # [1, H, P, D] each -> [P, 2L, H, D], key before value in each layer
    table = torch.stack(
        [t[0].transpose(0, 1) for pair in zip(keys, values, strict=True) for t in pair], dim=1
    )
    return table.reshape(snapshot.num_tokens, -1).contiguous()


def _sha256(table_PE: Tensor, *numbers: int) -> str:
    """Of the tensor, and of frozen tokens, layers and heads, which its shape does not tell."""
    return sha256_of_named({_TENSOR: table_PE, "numbers": torch.tensor(numbers)})


def _layers_of(table_PE: Tensor, layers: int, heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values, L tensors ``[1, H, P, D]`` each."""
    each = table_PE.view(table_PE.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3)[:, None]
    return list(each[0::2]), list(each[1::2])


def _read_config(path: Path) -> dict[str, Any]:
    file = path / ADAPTER_CONFIG
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise CartridgeFormatError(
            f"{path / ADAPTER_WEIGHTS} is missing; fix: save the adapter with "
            "safe_serialization=True"
        )
    try:
        config = json_text.load(file)
    except (OSError, ValueError) as error:
        raise CartridgeFormatError(f"{file} cannot be read: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or kind != "CARTRIDGE":
        raise CartridgeFormatError(f"{file}: peft_type is {kind!r}, expected 'CARTRIDGE'")
    # A newer peft writes null for what is not in use.
    said = [name for name, value in config.items() if value is not None]
    refuse_unknown(said, {*_NUMBERS, *_HARMLESS, *_FIXED}, str(file))
    for name, allowed in _FIXED.items():
        if config.get(name) not in allowed:
            raise CartridgeFormatError(
                f"{file}: {name} is {config[name]!r}; only {allowed[-1]!r} can be read: the rest "
                "of such an adapter would be left out"
            )
    return config


def _number(config: dict[str, Any], name: str, file: Path, least: int = 1) -> int:
    value = config.get(name)
    if type(value) is not int or value < least:
        raise CartridgeFormatError(
            f"{file}: {name} is {value!r:.60}, expected a number of {least} or more"
        )
    return value
