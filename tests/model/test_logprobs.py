"""Log-probs and sums of exponentials, some rows at a time."""

from __future__ import annotations

import math

import pytest
import torch

from cartridge_distill.model import logprobs
from cartridge_distill.model.logprobs import chosen_logprobs, log_total, rows_at_once


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_whole(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CPU_NUMBERS", 100)  # three rows at once
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 33, generator=draw) * 20
    ids = torch.randint(33, (11,), generator=draw)
    expected = torch.log_softmax(logits.double() / (temperature or 1.0), -1)
    expected = expected.gather(1, ids[:, None])[:, 0]
    found = chosen_logprobs(logits, ids, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_sums_of_exponentials_are_torchs() -> None:
    rows = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 30
    rows[1, 3:] = -math.inf
    rows[2] = -math.inf
    expected = torch.logsumexp(rows, -1, keepdim=True)
    torch.testing.assert_close(log_total(rows), expected, rtol=1e-6, atol=1e-5)
    for wrong in (math.nan, math.inf):
        rows[0, 5] = wrong
        assert not log_total(rows)[0].isfinite()


def test_rows_of_a_large_vocabulary_stay_in_the_cache() -> None:
    assert rows_at_once(torch.empty(700, 49_152)) == 21
    assert rows_at_once(torch.empty(700, 2**21)) == 1
    assert rows_at_once(torch.empty(700, 259)) == 512
    assert rows_at_once(torch.empty(700, 49_152, device="meta")) == 512
