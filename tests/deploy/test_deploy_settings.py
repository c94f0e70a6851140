"""What can be set on the deployments, and what is refused before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deploy_settings import DeploySettings, ServerSettings, TrainSettings

from cartridge_distill.gateway.settings import GatewaySettings
from cartridge_distill.util.errors import ConfigError
from tests.deploy.recording import FOLDER

SETTINGS: list[type[DeploySettings]] = [ServerSettings, TrainSettings]


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_setting_is_described_in_the_docstring_and_the_readme(
    kind: type[DeploySettings],
) -> None:
    readme = (FOLDER / "README.md").read_text()
    for field in kind.model_fields:
        assert field in (kind.__doc__ or ""), field
        assert f"`{field.upper()}`" in readme, field


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_survive_the_way_through_the_environment(kind: type[DeploySettings]) -> None:
    plain = kind.from_environment({})
    assert kind.from_environment(plain.as_environment()) == plain
    other: dict[str, Any] = (
        {"server_args": ("dtype=float16", "log_level='A B'"), "page_budget": 4096, "proxy_auth": 0}
        if kind is ServerSettings
        else {"proxy_secret": None, "wandb_secret": "w", "timeout_h": 1.5}
    )
    changed = kind(**other)
    assert changed != plain
    assert kind.from_environment(changed.as_environment()) == changed


def test_environment_is_read() -> None:
    settings = ServerSettings.from_environment(
        {
            "CARTRIDGE_SERVER_GPU": "l40s",
            "CARTRIDGE_SERVER_KV_CACHE_TOKENS": "65536",
            "CARTRIDGE_SERVER_SERVER_ARGS": "max_seqs_per_forward=512 dtype=bfloat16",
            "CARTRIDGE_SERVER_PROXY_AUTH": "false",
            "CARTRIDGE_SERVER_PAGE_BUDGET": "",  # empty: not set
            "TOKASAURUS_URL": "https://elsewhere",  # not ours
        }
    )
    assert settings.gpu == "L40S"
    assert settings.kv_cache_tokens == 65_536
    assert settings.server_args == ("max_seqs_per_forward=512", "dtype=bfloat16")
    assert settings.proxy_auth is False
    assert settings.page_budget is None


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("gpus", "H100", "did you mean CARTRIDGE_SERVER_GPU?"),
        ("gpu", "B200", "take H100 or H200"),
        ("gpu", "H100:2", "say H100"),
        ("gpu", "two fast ones", "by Modal's name"),
        ("kv_cache_tokens", "1000", "multiple of 16"),
        ("max_inflight", "many", "valid integer"),
        ("max_inflight", "0", "greater than or equal to 1"),
        ("tokasaurus_commit", "geoff/cartridges", "git ls-remote"),
        ("tokasaurus_repository", "git@github.com:a/b", "https"),
        ("model", "Llama-3.2-3B-Instruct", "pattern"),
        ("server_args", "--port 80", "key=value"),
        ("server_args", "use_hydragen=T", "stays off"),
        ("server_args", "kv_cache_num_tokens=16", "CARTRIDGE_SERVER_KV_CACHE_TOKENS"),
        ("server_args", "dp_size=2", "dp_size"),
        ("scaledown_window_s", "7200", "less than or equal to 3600"),
        ("proxy_auth", "perhaps", "boolean"),
        ("volume", "none", "string"),
        ("min_containers", "2", "CARTRIDGE_SERVER_MAX_CONTAINERS=1"),
        ("max_containers", "2", "CARTRIDGE_SERVER_ALLOW_SEVERAL_CONTAINERS=true"),
        ("max_cartridge_tokens", "8", "greater than or equal to 16"),
    ],
)
def test_bad_values_are_refused_with_name_value_and_fix(field: str, value: str, says: str) -> None:
    variable = ServerSettings.variable(field)
    with pytest.raises(ConfigError) as refused:
        ServerSettings.from_environment({variable: value})
    assert f"{variable}={value}" in str(refused.value)
    assert says in str(refused.value)


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        TrainSettings.from_environment(
            {"CARTRIDGE_TRAIN_TIMEOUT_H": "48", "CARTRIDGE_TRAIN_MAX_RETRIES": "-1"}
        )
    assert "CARTRIDGE_TRAIN_TIMEOUT_H=48" in str(refused.value)
    assert "CARTRIDGE_TRAIN_MAX_RETRIES=-1" in str(refused.value)


def test_what_the_gateway_would_refuse_is_refused_before_the_image_is_built() -> None:
    with pytest.raises(ConfigError, match="page budget is 100") as refused:
        ServerSettings.from_environment(
            {"CARTRIDGE_SERVER_DEFENCE": "restart", "CARTRIDGE_SERVER_PAGE_BUDGET": "100"}
        )
    assert "Value error" not in str(refused.value)


def test_several_containers_only_when_said_twice() -> None:
    settings = ServerSettings(max_containers=3, allow_several_containers=True)
    assert settings.max_containers == 3


def test_the_gateways_settings_come_from_here() -> None:
    settings = ServerSettings(
        kv_cache_tokens=65_536, page_budget=2048, max_inflight=7, server_args=("dtype=float16",)
    )
    gateway = settings.gateway(Path("/weights/some/model"), Path("/cartridges"))
    assert isinstance(gateway, GatewaySettings)
    assert gateway.backend == "tokasaurus"
    assert gateway.model == "/weights/some/model"
    assert gateway.base_model == settings.model
    assert gateway.cartridge_dir == Path("/cartridges")
    assert gateway.kv_cache_tokens == 65_536
    assert gateway.page_budget == 2048
    assert gateway.max_inflight == 7
    assert gateway.server_args == ("use_hydragen=F", "dtype=float16")


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ServerSettings().gpu = "T4"
