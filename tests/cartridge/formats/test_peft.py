"""Our files in the installed peft, and peft's files here."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import CartridgeConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.cartridge.utils import (
    compose_cartridge_adapters,
    prompt_embeddings_from_past_key_values,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, read_cartridge, write_cartridge
from cartridge_distill.cartridge.compose import compose
from cartridge_distill.cartridge.formats.peft import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKED,
    NO_EFFECT_FROM,
    VERSIONS,
)
from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cartridge.model_card import card
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.cli.main import app
from cartridge_distill.util.errors import CartridgeFormatError
from tests.cartridge.formats.made import same_bits, stored
from tests.cartridge.formats.peft_effect import measure
from tests.tiny import ARCHITECTURES, random_cartridge, tiny_model

NEW = 64
ROOT = Path(__file__).resolve().parents[3]


def stored_for(model: PreTrainedModel, tokens: int) -> tuple[TrainableCache, StoredCartridge]:
    cartridge = random_cartridge(model, tokens, seed=3)
    for layer in (*cartridge.frozen_keys, *cartridge.trainable_keys):
        layer.data *= 2  # attention that prefers some of its keys, so that a wrong order shows
    snapshot = Snapshot.take(cartridge.state_dict(), torch.float32)
    return cartridge, StoredCartridge(snapshot, CartridgeMeta("tiny"))


def greedy(model: object, ids: Tensor, **inputs: object) -> tuple[list[int], Tensor]:
    """New token ids, and their logits ``[NEW, V]``."""
    out = model.generate(  # type: ignore[attr-defined]
        input_ids=ids,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **inputs,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).float()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_peft_generates_the_same_tokens(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Prompts of one token, shorter and longer than the cartridge; logits too, because the tied
    embeddings of a tiny Gemma make it repeat one token whatever stands before."""
    model = tiny_model(kind).to(dtype)
    cartridge, made = stored_for(model, 32)
    directory = write_cartridge(made, tmp_path / "adapter", "peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()
    for length in (1, 12, 50):
        ids = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(length))
        tokens, logits = greedy(theirs, ids, attention_mask=torch.ones_like(ids))
        ours, our_logits = greedy(
            model,
            ids,
            attention_mask=torch.ones(1, 32 + length, dtype=torch.long),
            past_key_values=cartridge.as_cache(dtype),
        )
        assert tokens == ours
        torch.testing.assert_close(logits, our_logits, atol=2e-5, rtol=0)
        if length < 24:  # the window of those that have one: behind it nobody sees the cartridge
            _, without = greedy(model, ids, attention_mask=torch.ones_like(ids))
            assert (logits - without).abs().max() > 0.1


def test_the_installed_versions_use_the_adapter() -> None:
    found = measure()
    assert found["generate_to_ours"] < 2e-5 and found["forward_to_ours"] < 2e-5
    assert found["generate_to_none"] > 0.1
    assert Version(found["transformers"]) < Version(NO_EFFECT_FROM)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_newest_versions_use_the_adapter_or_are_known_not_to(tmp_path: Path) -> None:
    """In an environment that has the newest two on top of what is installed here."""
    venv.create(tmp_path / "newest", with_pip=True)
    python = tmp_path / "newest" / "bin" / "python"
    [packages] = (tmp_path / "newest" / "lib").glob("python3*/site-packages")
    here = sysconfig.get_path("purelib")
    (packages / "installed.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--upgrade", "transformers", "peft"]
    subprocess.run(pip, check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "tests.cartridge.formats.peft_effect"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["forward_to_ours"] < 2e-5, found
    if Version(found["transformers"]) >= Version(NO_EFFECT_FROM):
        # Known, and said by `convert`, the card and the docs. If it works again, say that.
        assert found["generate_to_none"] < 1e-3, f"the adapter works again: {found}"
    else:
        assert found["generate_to_none"] > 0.1, f"no effect, and nothing says so: {found}"
        assert found["generate_to_ours"] < 2e-5, found


def test_a_user_is_told_the_versions(tmp_path: Path) -> None:
    source = write_cartridge(stored(), tmp_path / "source", "native")
    said = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a"), "--to", "peft"])
    assert said.exit_code == 0 and VERSIONS in said.output
    said = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "b"), "--to", "native"])
    assert "PEFT" not in said.output
    assert VERSIONS in card(stored(), ["peft"], "owner/name")
    page = " ".join((ROOT / "docs" / "getting-started.md").read_text().split())
    assert CHECKED in page and f'"transformers<{NO_EFFECT_FROM}"' in page


def test_the_configuration_is_one_of_pefts(tmp_path: Path) -> None:
    directory = write_cartridge(stored(tokens=48, frozen=2), tmp_path / "adapter", "peft")
    config = PeftConfig.from_pretrained(directory)
    assert isinstance(config, CartridgeConfig)
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (48, 2)
    assert (config.base_model_name_or_path, config.revision) == ("owner/tiny", "c0ffee")
    written = json.loads((directory / ADAPTER_CONFIG).read_text())
    assert written.keys() <= config.to_dict().keys()


def test_an_adapter_that_peft_trained_and_saved(tmp_path: Path) -> None:
    """Made by peft from a prefill, saved by peft, read here: the same KV in the same order."""
    model = tiny_model("qwen2")
    cartridge, _ = stored_for(model, 32)
    wrapped = get_peft_model(
        copy.deepcopy(model),
        CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=32, num_frozen_tokens=3),
    )
    legacy = list(
        zip(cartridge.prefix().keys, cartridge.prefix().values, strict=True)
    )  # peft's own helper flattens it
    table = prompt_embeddings_from_past_key_values(legacy, num_virtual_tokens=32)
    wrapped.prompt_encoder["default"].load_prompt_embeddings(table)
    wrapped.save_pretrained(tmp_path / "adapter")
    found = TrainableCache.from_snapshot(read_cartridge(tmp_path / "adapter").snapshot)
    assert (found.num_tokens, found.num_frozen_tokens) == (32, 3)
    for mine, theirs in (
        *zip(found.prefix().keys, cartridge.prefix().keys, strict=True),
        *zip(found.prefix().values, cartridge.prefix().values, strict=True),
    ):
        assert torch.equal(mine, theirs)


def test_a_padded_batch_in_peft(tmp_path: Path) -> None:
    """Left padding, as usual: each row as by itself."""
    model = tiny_model()
    _, made = stored_for(model, 32)
    theirs = PeftModel.from_pretrained(model, write_cartridge(made, tmp_path / "a", "peft")).eval()
    rows = [torch.arange(10, 30), torch.arange(40, 45)]
    alone = [greedy(theirs, row[None], attention_mask=torch.ones(1, len(row)))[0] for row in rows]
    ids, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, 20 - len(row) :], mask[number, 20 - len(row) :] = row, 1
    out = theirs.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert out[:, 20:].tolist() == alone


def test_what_peft_loads_and_saves_comes_back(tmp_path: Path, model_folder: Path) -> None:
    # A folder, not a hub id: peft looks the base model's configuration up when it saves.
    made = stored(tokens=32, frozen=2, meta=CartridgeMeta(str(model_folder)))
    directory = write_cartridge(made, tmp_path / "ours", "peft")
    PeftModel.from_pretrained(tiny_model(), directory).save_pretrained(tmp_path / "theirs")
    assert same_bits(read_cartridge(tmp_path / "theirs"), made)


def test_joining_is_pefts_joining(tmp_path: Path) -> None:
    parts = [stored(32, 1, seed=1), stored(16, 2, seed=2)]
    paths = [write_cartridge(part, tmp_path / f"{n}", "peft") for n, part in enumerate(parts)]
    compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    assert same_bits(read_cartridge(tmp_path / "theirs"), compose(parts))


def test_adapters_that_are_no_cartridge_say_why(tmp_path: Path) -> None:
    directory = write_cartridge(stored(), tmp_path / "adapter", "peft")
    weights, file = directory / ADAPTER_WEIGHTS, directory / ADAPTER_CONFIG
    config, table = json.loads(file.read_text()), load_file(weights)["prompt_embeddings"]

    def refused(match: str, **changes: object) -> None:
        file.write_text(json.dumps(config | changes))
        with pytest.raises(CartridgeFormatError, match=match):
            read_cartridge(directory)

    refused("peft_type is 'LORA', expected 'CARTRIDGE'", peft_type="LORA")
    refused("num_layers is None, expected a number", num_layers=None)
    refused(r"is \(32, 128\).*num_layers=3 \* 2 \* token_dim=32", num_layers=3)
    refused("token_dim=32 does not divide by 3 kv heads", num_attention_heads=3)
    refused("no frozen token", num_frozen_tokens=0)
    # PEFT's own files have no hash, which would be compared first.
    save_file({"prompt_embeddings": table.contiguous()}, weights)
    refused("all its tokens are frozen", num_frozen_tokens=32)
    save_file({"prompt_embeddings": table.contiguous(), "more": torch.zeros(1)}, weights)
    refused(r"holds \['more', 'prompt_embeddings'\]")
    weights.rename(directory / "adapter_model.bin")
    refused("adapter_model.safetensors is missing.*safe_serialization=True")
