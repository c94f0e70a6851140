"""A whole run with general rows, another loss and both schedules: real veRL, real HTTP."""

from __future__ import annotations

import pandas as pd
import pytest

pytest.importorskip("verl.workers.config", reason="veRL is not installed")

from tests.verl.authors import Asked
from tests.verl.world import ROWS, STEPS, World

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(400)]

CARTRIDGE = "actor_rollout_ref.actor.cartridge"
SETTINGS = [
    f"{CARTRIDGE}.init=random",
    f"{CARTRIDGE}.loss=reverse_kl_student_topk",
    f"{CARTRIDGE}.skip_first_tokens=1",
    f"{CARTRIDGE}.max_token_loss=30.0",
    f"{CARTRIDGE}.lr_decay_to=0.1",
    f"{CARTRIDGE}.on_policy_fraction=cold_start:1",
]


def test_general_rows_go_through_the_whole_loop(
    world: World,
    asked: Asked,
) -> None:
    file = world.folder / "train.parquet"
    rows = pd.read_parquet(file)
    general = [number % ROWS == 1 for number in range(len(rows))]
    rows["extra_info"] = [
        {**info, "kind": "general" if is_general else "open"}
        | ({"document_id": None} if is_general else {})
        for info, is_general in zip(rows["extra_info"], general, strict=True)
    ]
    rows.to_parquet(file)
    status, log = world.run(*SETTINGS, "data.shuffle=False")
    assert status == 0, log[-4000:]
    assert len(world.metrics) == STEPS
    for step in world.metrics:
        for kind in ("document", "general"):
            assert step[f"actor/trained_tokens/{kind}"] > 0 and step[f"actor/loss_{kind}"] > 0
        tokens = step["actor/trained_tokens/document"] + step["actor/trained_tokens/general"]
        assert tokens == step["tokens/trained"] < step["tokens/teacher_scored"]
        assert step["actor/logprob_diff/max"] < 1e-3  # also of the bare model's answers
        assert 0 < step["actor/student_entropy"] and 0 <= step["actor/topk_overlap"] <= 1
        assert step["actor/loss_clipped"] == 0
    first, second = world.metrics[0], world.metrics[1]
    assert (first["actor/on_policy_fraction"], second["actor/on_policy_fraction"]) == (0, 1)
    rates = [step["actor/lr"] for step in world.metrics]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    # The cold start's first step: three answers behind the document, one of the bare model.
    length = len(asked.document)
    behind = [body["prompt"][:length] == asked.document for body in asked.of_teacher]
    assert sorted(behind) == [False] + [True] * (ROWS - 1)
