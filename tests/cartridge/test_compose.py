"""Several cartridges in one prompt: joined into one file, or by id list on the server."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, read_cartridge, write_cartridge
from cartridge_distill.cartridge.compose import compose
from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.snapshot import Snapshot, split_layers
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import pack
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from tests.cartridge.formats.made import META, same_bits, stored
from tests.conftest import StartServer
from tests.tiny import plain_logprobs, tiny_model

PROMPT = [10, 20, 30, 40, 50]


def joined_by_hand(*parts: StoredCartridge) -> Prefix:
    """Layer by layer, token after token, nothing rotated."""
    sides = [part.snapshot.layers() for part in parts]
    return Prefix(
        [torch.cat([keys[layer] for keys, _ in sides], dim=2) for layer in range(2)],
        [torch.cat([values[layer] for _, values in sides], dim=2) for layer in range(2)],
    )


def test_tokens_stand_one_after_the_other_in_the_order_given(tmp_path: Path) -> None:
    a, b, c = stored(32, 2, seed=1), stored(16, 1, seed=2), stored(48, 3, seed=3)
    whole = compose([c, a, b])
    want = joined_by_hand(c, a, b)
    for mine, theirs in zip(whole.snapshot.layers(), (want.keys, want.values), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    assert whole.snapshot.num_tokens == 96
    assert whole.snapshot.num_frozen_tokens == 3  # the first part's; the others' may learn
    assert not same_bits(whole, compose([a, b, c]))
    assert same_bits(compose([compose([c, a]), b]), whole)
    for format, name in (
        ("native", "w"),
        ("peft", "p"),
        ("tokasaurus", "t"),
        ("hazyresearch", "h.pt"),
    ):
        path = write_cartridge(whole, tmp_path / name, format)  # type: ignore[arg-type]
        assert same_bits(read_cartridge(path), whole)
    parts = read_cartridge(tmp_path / "w").meta.recipe["composed_of"]
    assert [part["num_tokens"] for part in parts] == [48, 32, 16]
    assert parts[0]["document_sha256"] == META.document_sha256


def test_the_server_gives_the_same_for_ids_and_for_the_joined_file(
    llama: PreTrainedModel, start_server: StartServer, tmp_path: Path
) -> None:
    """Alphabetical order is the server's; a joined file in that order is the same cartridge."""
    parts = {"beta": stored(32, 2, seed=1), "alpha": stored(16, 1, seed=2), "c": stored(48, seed=3)}
    for name, part in parts.items():
        write_cartridge(part, tmp_path / name, "tokasaurus")
    order = sorted(parts)
    write_cartridge(compose([parts[name] for name in order]), tmp_path / "joined", "tokasaurus")
    server = start_server()

    async def ask(*ids: str) -> Completion:
        async with TokasaurusClient(server.url) as client:
            refs = [CartridgeRef(id=name, source="local") for name in ids]
            [answer] = await client.complete(PROMPT, 12, 0.0, refs)
            return answer

    by_ids, joined = asyncio.run(ask("c", "beta", "alpha")), asyncio.run(ask("joined"))
    assert by_ids.token_ids == joined.token_ids
    assert by_ids.logprobs == pytest.approx(joined.logprobs, abs=1e-6)
    assert asyncio.run(ask("c", "beta")).logprobs != pytest.approx(joined.logprobs, abs=1e-2)
    # Both are what the plain forward says, with positions from the sum of the token counts on.
    prefix = joined_by_hand(*(parts[name] for name in order))
    plain = plain_logprobs(llama, prefix, PROMPT, joined.token_ids)
    assert joined.logprobs == pytest.approx(plain, abs=1e-5)
    # And so is the training's forward.
    model = prepare_model(copy.deepcopy(llama))
    ids = torch.tensor([*PROMPT, *joined.token_ids])
    with torch.no_grad():
        logits = packed_forward(model, prefix, pack([ids]))
    logprobs = chosen_logprobs(logits[len(PROMPT) - 1 : -1], ids[len(PROMPT) :])
    assert logprobs.tolist() == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(("kind", "matters"), [("llama", False), ("mistral_window", True)])
def test_order_matters_to_windows_alone(kind: str, matters: bool) -> None:
    """Keys bring their own positions along: to full attention a prefix is a set."""
    model = prepare_model(tiny_model(kind))
    a, b = stored(16, seed=1), stored(16, seed=2)
    batch = pack([torch.tensor(PROMPT)])
    with torch.no_grad():
        first, second = (
            packed_forward(model, joined_by_hand(*order), batch) for order in ((a, b), (b, a))
        )
    assert torch.allclose(first, second, atol=1e-5) != matters


def test_the_widest_dtype_holds_them_all() -> None:
    half, full = stored(16, dtype=torch.bfloat16), stored(16, seed=1)
    whole = compose([half, full])
    assert whole.snapshot.dtype == torch.float32
    assert torch.equal(whole.snapshot.layers()[0][1][:, :, 16:], full.snapshot.layers()[0][1])
    assert compose([half, half]).snapshot.dtype == torch.bfloat16


def test_what_does_not_join() -> None:
    good = stored(32)
    with pytest.raises(CartridgeFormatError, match="cartridge 2 has 20 tokens.*counts it as 32"):
        compose([good, stored(20)])
    with pytest.raises(CartridgeFormatError, match="cartridge 1 has 40 tokens"):
        compose([stored(40), good])  # the first as well: what comes after it would be misplaced
    with pytest.raises(ConfigError, match="two or more"):
        compose([good])
    keys, values = good.snapshot.layers()
    deeper = StoredCartridge(Snapshot(split_layers(keys * 2, values * 2, 1)), META)
    with pytest.raises(CartridgeFormatError, match="cartridge 2 has num_layers=4, the first has 2"):
        compose([good, deeper])
    wide = [t.reshape(1, 1, 32, 32) for t in keys], [t.reshape(1, 1, 32, 32) for t in values]
    with pytest.raises(CartridgeFormatError, match="kv_heads=1, the first has 2"):
        compose([good, StoredCartridge(Snapshot(split_layers(*wide, 1)), META)])


def test_the_model_they_are_for() -> None:
    here, unknown = stored(16), stored(16, meta=CartridgeMeta(None))
    there = stored(16, meta=replace(META, base_model="owner/other", base_revision=None))
    with pytest.raises(CartridgeFormatError, match="owner/other and owner/tiny.*base_model"):
        compose([here, there])
    assert compose([here, there], base_model="owner/tiny").meta.base_model == "owner/tiny"
    meta = compose([here, unknown]).meta
    assert (meta.base_model, meta.base_revision, meta.document_title) == ("owner/tiny", None, None)
    both = compose([here, here]).meta
    assert both.base_revision == "c0ffee" and both.document_title == " + ".join(
        [str(META.document_title)] * 2
    )
    assert compose([unknown, unknown]).meta.base_model is None


def test_the_weights_they_were_trained_with() -> None:
    def of(fingerprint: str | None) -> StoredCartridge:
        part = stored(16, 1, seed=1)
        return replace(part, meta=replace(part.meta, model_fingerprint=fingerprint))

    assert compose([of("weights1:a"), of("weights1:a")]).meta.model_fingerprint == "weights1:a"
    assert compose([of("weights1:a"), of(None)]).meta.model_fingerprint is None
    with pytest.raises(CartridgeFormatError, match="different weights"):
        compose([of("weights1:a"), of("weights1:b")])
