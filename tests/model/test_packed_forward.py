"""Packed results equal one-by-one results, in logits and in the cartridge's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.forward import packed_forward, recomputing_layers
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from tests.tiny import ARCHITECTURES, VOCAB, random_cartridge, tiny_model

# Ragged, with length 1 twice, and 30 > the tiny models' sliding window of 24: the window is shorter
# than prefix + sequence, and in the second prefix shorter than the prefix itself.
LENGTHS = (1, 17, 5, 16, 1, 30)
PREFIX_TOKENS = (16, 32)


def sequences(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS]


def weighted(logits: list[Tensor]) -> Tensor:
    """A loss that gives every logit a weight of its own, mean over tokens."""
    generator = torch.Generator().manual_seed(7)
    rows = [row.log_softmax(-1) * torch.randn(row.shape, generator=generator) for row in logits]
    return torch.cat(rows).sum() / (sum(LENGTHS) * VOCAB**0.5)


@pytest.mark.parametrize("prefix_tokens", PREFIX_TOKENS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_equals_one_by_one(kind: str, prefix_tokens: int) -> None:
    """Against transformers: eager attention, a DynamicCache, one sequence at a time."""
    model = tiny_model(kind).requires_grad_(False)
    cartridge = random_cartridge(model, prefix_tokens)
    tokens = sequences()
    outputs = []
    for ids in tokens:
        cache = cartridge.as_cache()
        positions = prefix_tokens + torch.arange(len(ids))
        out = model(input_ids=ids[None], position_ids=positions[None], past_key_values=cache)
        outputs.append(out.logits[0])
    expected = torch.autograd.grad(weighted(outputs), cartridge.trainable_parameters())

    prepare_model(model)
    for backend in ("grouped", "dense"):
        logits = packed_forward(model, cartridge.prefix(), pack(tokens), backend=backend)
        torch.testing.assert_close(logits, torch.cat(outputs), atol=1e-5, rtol=0)
        parts = list(logits.split(LENGTHS))
        got = torch.autograd.grad(weighted(parts), cartridge.trainable_parameters())
        for mine, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)
    with (
        torch.no_grad()
    ):  # FlexAttention has no backward on a CPU; uncompiled it still shows the mask
        logits = packed_forward(model, cartridge.prefix(), pack(tokens), backend="flex")
    torch.testing.assert_close(logits, torch.cat(outputs), atol=1e-5, rtol=0)


def test_without_a_prefix_it_is_the_bare_model() -> None:
    model = tiny_model()
    tokens = sequences()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=ids[None]).logits[0] for ids in tokens])
        prepare_model(model)
        got = packed_forward(model, None, pack(tokens))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_bounded_score_buffer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long documents are worked on in pieces; the pieces must not show."""
    # In float32 the order of the sums, which differs between processors, makes up to 1.1e-6.
    model = prepare_model(tiny_model("mistral_window").double())
    cartridge = random_cartridge(model, 32)
    with torch.no_grad():
        whole = packed_forward(model, cartridge.prefix(), pack(sequences()))
        monkeypatch.setattr("cartridge_distill.model.attention._SCORE_BUDGET", 700)
        pieces = packed_forward(model, cartridge.prefix(), pack(sequences()))
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=0)


def test_keep_takes_rows_by_mask() -> None:
    model = prepare_model(tiny_model())
    batch = pack(sequences())
    logit_mask = torch.zeros(batch.num_tokens, dtype=torch.bool)
    logit_mask[[0, 3, 40, batch.num_tokens - 1]] = True
    with torch.no_grad():
        everything = packed_forward(model, None, batch)
        some = packed_forward(model, None, batch, logit_mask)
    torch.testing.assert_close(some, everything[logit_mask], atol=5e-6, rtol=0)


def test_prefix_from_tokens_is_the_models_own_kv() -> None:
    """The KV of a document equals what transformers' cache holds after reading it."""
    ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(3))
    model = tiny_model("gemma3")
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[None], past_key_values=cache)
    prefix = prefix_from_tokens(prepare_model(model), ids)
    for layer in range(len(prefix.keys)):
        torch.testing.assert_close(prefix.keys[layer], cache.layers[layer].keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            prefix.values[layer], cache.layers[layer].values, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["grouped", "dense", "flex"])
def test_a_document_in_pieces_has_the_same_kv(kind: str, backend: str) -> None:
    """Pieces shorter and longer than the windows of 24, and a last one of a single token."""
    model = prepare_model(tiny_model(kind))
    ids = torch.randint(3, VOCAB, (61,), generator=torch.Generator().manual_seed(3))
    whole = prefix_from_tokens(model, ids, "dense")
    for at_once in (20, 30, 61):
        pieces = prefix_from_tokens(model, ids, backend, at_once)
        assert pieces.num_tokens == 61
        for mine, reference in zip(
            (*pieces.keys, *pieces.values), (*whole.keys, *whole.values), strict=True
        ):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)


def test_another_attention_implementation_is_refused() -> None:
    model = tiny_model()  # eager: packed sequences would see each other
    with pytest.raises(ConfigError, match="'eager'.*see each other"):
        packed_forward(model, None, pack(sequences()))


def test_a_call_around_the_packed_forward_is_refused() -> None:
    model = prepare_model(tiny_model())
    with pytest.raises(ConfigError, match="without a packed layout"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradient_checkpointing_keeps_the_prefix(kind: str) -> None:
    """The layers run again in the backward, the prefix with them; but no KV can be collected."""
    model = prepare_model(tiny_model(kind))
    cartridge, batch, ran = random_cartridge(model, 32), pack(sequences()), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: ran.append(1))

    def gradients() -> tuple[Tensor, ...]:
        loss = weighted(list(packed_forward(model, cartridge.prefix(), batch).split(LENGTHS)))
        return torch.autograd.grad(loss, cartridge.trainable_parameters())

    plain = gradients()
    with recomputing_layers(model):
        again = gradients()
        with pytest.raises(ConfigError, match="throws away the cache"):
            prefix_from_tokens(model, sequences()[1])
    assert len(ran) == 3
    assert all(map(torch.equal, plain, again))
    prefix_from_tokens(model, sequences()[1])


def test_a_prefix_of_another_model_is_refused_by_the_number_that_differs() -> None:
    model = prepare_model(tiny_model())
    keys = [torch.randn(1, 3, 16, 16) for _ in range(2)]
    with pytest.raises(CartridgeFormatError, match="3 kv heads, the model .* has 2"):
        packed_forward(model, Prefix(keys, keys), pack(sequences()))


def test_too_many_positions_are_refused() -> None:
    model = prepare_model(tiny_model())  # context 512
    prefix = random_cartridge(model, 496).prefix()
    with pytest.raises(
        ConfigError, match="496 .* 30 = 526 tokens is over the model's context of 512"
    ):
        packed_forward(model, prefix, pack(sequences()))


def test_the_first_token_of_a_sequence_cannot_be_predicted() -> None:
    batch = pack([torch.tensor([1, 2]), torch.tensor([3])])
    with pytest.raises(ValueError, match="no predecessor"):
        batch.predicts(torch.tensor([False, True, True]))
    assert batch.predicts(torch.tensor([False, True, False])).tolist() == [True, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled FlexAttention needs a GPU")
def test_compiled_flex_on_a_gpu_has_the_same_gradients() -> None:
    model = prepare_model(tiny_model().cuda())
    cartridge = random_cartridge(model, 32).cuda()
    results = []
    for backend in ("flex", "dense"):
        batch = pack([ids.cuda() for ids in sequences()])
        logits = packed_forward(model, cartridge.prefix(), batch, backend=backend)
        loss = logits.float().log_softmax(-1)[:, 5].mean()
        results.append(torch.autograd.grad(loss, cartridge.trainable_parameters()))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mistral_window"])
def test_sequences_that_begin_alike_are_computed_once_and_equal_one_by_one(kind: str) -> None:
    """Branches, a sequence that is another's beginning, and one that stands there twice."""
    model = tiny_model(kind).requires_grad_(False)
    cartridge = random_cartridge(model, 32)
    a = torch.randint(3, VOCAB, (30,), generator=torch.Generator().manual_seed(4))
    tokens = [a, a[:12], torch.cat([a[:12], a[:9]]), a[:12], torch.cat([a[:20], a[:1]]), a[5:9]]
    outputs = []
    for ids in tokens:
        positions = 32 + torch.arange(len(ids))
        cache = cartridge.as_cache()
        out = model(input_ids=ids[None], position_ids=positions[None], past_key_values=cache)
        outputs.append(out.logits[0])
    weights = [
        torch.randn(o.shape, generator=torch.Generator().manual_seed(n)) / 50
        for n, o in enumerate(outputs)
    ]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    expected = torch.autograd.grad(loss, cartridge.trainable_parameters())  # type: ignore[arg-type]
    prepare_model(model)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].numel())
    )
    logits = packed_forward(model, cartridge.prefix(), pack(tokens), backend="grouped")
    assert seen == [30 + 9 + 1 + 4]  # of 30 + 12 + 21 + 12 + 21 + 4
    torch.testing.assert_close(logits, torch.cat(outputs), atol=1e-5, rtol=0)
    got = torch.autograd.grad((logits * torch.cat(weights)).sum(), cartridge.trainable_parameters())
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["grouped", "dense"])
def test_what_follows_the_last_kept_row_is_not_computed(backend: str) -> None:
    """Neither are whole sequences of which nothing is kept; rows and gradients are the same."""
    model = prepare_model(tiny_model())
    cartridge, batch = random_cartridge(model, 32), pack(sequences())
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].numel())
    )
    asked = {1: (15,), 3: (4, 9), 4: (0,), 5: (29,)}  # of LENGTHS = (1, 17, 5, 16, 1, 30)
    logit_mask = torch.zeros(batch.num_tokens, dtype=torch.bool)
    for number, places in asked.items():
        logit_mask[batch.offsets[number] + torch.tensor(places)] = True
    whole = packed_forward(model, cartridge.prefix(), batch, backend=backend)[logit_mask]
    kept = packed_forward(model, cartridge.prefix(), batch, logit_mask, backend)
    assert seen == [batch.num_tokens, 16 + 10 + 1 + 30]
    torch.testing.assert_close(kept, whole, atol=1e-5, rtol=0)
    expected, got = (
        torch.autograd.grad(rows.log_softmax(-1)[:, 7].mean(), cartridge.trainable_parameters())
        for rows in (whole, kept)
    )
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)
    nothing = torch.zeros_like(logit_mask)
    assert packed_forward(model, cartridge.prefix(), batch, nothing, backend).shape == (0, VOCAB)


def test_masks_that_do_not_fit_the_row_are_refused() -> None:
    batch = pack([torch.arange(5, 12), torch.arange(3, 6)])
    for call in (batch.predicts, batch.tokens, batch.up_to_last):
        with pytest.raises(ValueError, match="4 entries, and the row has 10 tokens"):
            call(torch.zeros(4, dtype=torch.bool))
        with pytest.raises(ValueError, match="1-D and bool"):
            call(torch.zeros(10))
    with pytest.raises(ValueError, match="whole numbers"):
        pack([torch.ones(3)])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_are_refused(kind: str) -> None:
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ConfigError, match=f"llama: rope_type=.*{kind}.*packed sequences"):
        prepare_model(model)
