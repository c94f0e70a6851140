"""A run of veRL's whose rollouts a real vLLM writes: gateway, proxy, engine and trainer."""

from __future__ import annotations

import pytest

from tests.engines.vllm.rigs import model, vllm_python
from tests.gateway.rig import TOKEN, Rig
from tests.verl.conftest import world  # noqa: F401  (a fixture)
from tests.verl.world import OVER_HTTP, STEPS, World

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]


def test_the_oracle_through_proxy_and_gateway(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cartridge is the document's KV: no loss at step 1, and every step agrees with vLLM."""
    python = vllm_python()
    model("llama").save_pretrained(world.folder / "model")  # heads of a size that vLLM has
    monkeypatch.setenv("TOKASAURUS_API_KEY", TOKEN)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    bounds = ("--max-request-tokens", 256, "--max-cartridge-tokens", 256, "--keep-versions", 2)
    folder = world.folder
    with Rig(
        *(folder / "rig", folder / "model", *bounds),
        server=("--dtype", "float32"),
        engine_python=python,
    ) as rig:
        status, log = world.run(
            *OVER_HTTP, f"actor_rollout_ref.rollout.custom.tokasaurus_url={rig.url}"
        )
        assert status == 0, log[-4000:]
        assert rig.metric("uploads_total", "created") == STEPS + 1
        assert [int(name[-6:]) for name in rig.on_disk()] == [STEPS - 1, STEPS]
    assert len(world.metrics) == STEPS
    assert abs(world.metrics[0]["actor/loss"]) < 1e-4
    for step in world.metrics:
        assert 0 < step["actor/logprob_diff/max"] < 1e-4
        assert step["actor/response_tokens"] > 0
        assert step["actor/frozen_tokens_changed"] == 0
