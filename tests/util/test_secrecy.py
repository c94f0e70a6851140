"""No credential in what is written or shown; and what is none stays as it was."""

from __future__ import annotations

import json
import logging
import pickle

import pytest

from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError, ServerRefused
from cartridge_distill.util.secrecy import (
    HIDDEN,
    clean_arguments,
    clean_settings,
    clean_text,
    is_secret,
    named_secrets,
)


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach http://anna:hush@gpu-box:10210/ping",
        "http://hush@gpu-box",
        "http://anna:hu/sh@gpu-box:1/x and http://anna:h@ush@gpu-box",
        "https://host/x?sig=hush&b=c",
        "https://host/x?a=b#hush",
        "modal_key=hush",
        "modal_key = hush, steps=3",
        "{api_key: hush}",
        "{a: 1, api_key: hush, b: 2}",
        "a.b={api_key: hush}",
        'curl -H "X-Api-Key: hush" http://host',
        "curl -u anna:hush http://host",
        "X-Auth-Token: hush",
        "Modal-Key: hush\nModal-Secret: hush",
        "Authorization: Bearer hush",
        "Authorization: Basic aHVzaDpodXNo hush",
        "Proxy-Authorization: Digest username=a, response=hush",
        "headers={'Authorization': 'Bearer hush', 'Accept': '*/*'}",
        '{"token": "hush", "n": 3}',
        r"{\"api_key\": \"hush\"}",
        "{'hub_token': b'hush'}",
        "Cookie: session=hush; theme=dark",
        "apiKey=hush APIKEY=hush api-key: hush apikey:hush",
        "export HF_TOKEN=hush WANDB_API_KEY='hush hush'",
        "AWS_SECRET_ACCESS_KEY=hush",
        "password: hush",
        "passwd=12345-hush",
        "client_secret=hush;x=1",
        "credentials=[hush, hush]",
        "GET /v1/models?api_key=hush HTTP/1.1",
        "--api-key hush --steps 3",
        "--wandb-api-key=hush",
        "a=access_token=hush",
        "db=postgres://anna:hush@host/db",
    ],
)
def test_hidden(text: str) -> None:
    shown = clean_text(text)
    assert "hush" not in shown and "ush@" not in shown and "/sh@" not in shown, shown
    assert clean_text(shown) == shown
    assert "hush" not in json.dumps(clean_settings({"x": [text, {"y": text}]}))


@pytest.mark.parametrize(
    "token",
    [
        "hf_AbCdEfGhIjKlMnOpQrStUvWxYz12345678",
        "sk-proj-abcdefghijklmnop1234",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "wk-AbCdEfGhIjKlMnOpQrStUv",
        "as-AbCdEfGhIjKlMnOpQrStUv",
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_ghi",
    ],
)
def test_tokens_are_known_by_their_shape(token: str) -> None:
    assert token not in clean_text(f"the server said {token}, and no more")
    assert token not in clean_text(f"(b'authorization', b'Bearer {token}')")


@pytest.mark.parametrize(
    "text",
    [
        "data.prompt_key=prompt actor.cartridge.document_key=document_id sort_key: name",
        "num_tokens=128, max_tokens: 16, 3 tokens: 4",
        "choice 0, token 3: id 100 is outside the vocabulary of 100",
        "the model names no end token: every answer runs to max_tokens",
        "eos_token=</s> pad_token: <pad> token=5",
        "use_auth_token=True requires_proxy_auth=false",
        "send the header 'Authorization: Bearer TOKEN'",
        "the bearer token is missing",
        "set TOKASAURUS_API_KEY to the gateway's token, and MODAL_PROXY_KEY; then go on",
        "KeyError: 'data' full_key: a.b.c, Key 'x' is not in struct",
        "--port 80 is not key=value",
        "http://127.0.0.1:10210/custom/cartridge/completions",
        "owner/name@main, a@b.c, 10:30",
        "tokenizer=owner/name tokenizer: x",
        "runs/demo/checkpoints: saved up to step 7",
        "python -u script.py --no-token with --host x",
        "hf_config hf_overrides sk-learn ws-1 as-is",
    ],
)
def test_shown(text: str) -> None:
    assert clean_text(text) == text
    assert named_secrets(text) == []


def test_credentials_of_this_process_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", "a-quite-ordinary-word")
    monkeypatch.setenv("TOKENS", "a-number-of-them")
    assert "ordinary" not in clean_text("it said a-quite-ordinary-word, twice")
    assert clean_text("a-number-of-them") == "a-number-of-them"


def test_names() -> None:
    for name in ("modal_key", "HF_TOKEN", "--token", "x-api-key", "apiKey", "db.password"):
        assert is_secret(name)
    for name in ("prompt_key", "num_tokens", "TOKENS", "pad_token", "tokenizer", "keys", "lr", ""):
        assert not is_secret(name)
    assert is_secret("modal_key", surely=True) and not is_secret("my_key", surely=True)
    assert named_secrets("x={api_key: hush}") == ["api_key"]
    assert named_secrets("x=http://anna:hush@host") == ["URL"]


def test_arguments() -> None:
    given = ["run", "-H", "X-Api-Key: hush", "--password", "hush", "-u", "anna:hush", "k.lr=0.1"]
    shown = clean_arguments(given)
    assert "hush" not in " ".join(shown)
    assert shown[0] == "run" and shown[-1] == "k.lr=0.1" and shown.count(HIDDEN) == 2
    assert clean_arguments(["pass_key=hu,sh and more"]) == [f"pass_key={HIDDEN}"]


def test_settings_keep_their_form() -> None:
    given = {
        "lr": 0.02,
        "steps": 3,
        "on": True,
        "none": None,
        "token": "hush",
        "nested": {"api_key": ["hush", "hush"], "n": [1, 2.5]},
        "credentials": {"user": "hush"},
        "command": ["--token", "hush"],
    }
    shown = clean_settings(given)
    assert "hush" not in json.dumps(shown)
    assert list(shown) == list(given)
    assert {k: shown[k] for k in ("lr", "steps", "on", "none")} == {
        k: given[k] for k in ("lr", "steps", "on", "none")
    }
    assert shown["nested"]["n"] == [1, 2.5]


def test_every_error_of_the_project_is_clean() -> None:
    for error in (
        ConfigError("server http://anna:hush@host: api_key=hush"),
        CartridgeDistillError("Authorization: Bearer hush"),
        ServerRefused("modal_secret=hush", 400),
    ):
        assert "hush" not in f"{error} {error!r} {error.args}"
    assert str(pickle.loads(pickle.dumps(ConfigError("a=1")))) == "a=1"


def test_logs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every library's, with arguments, exceptions and formatters that read them one by one."""
    before = logging.getLogRecordFactory()
    try:
        hide_secrets_in_logs()
        hide_secrets_in_logs()
        seen: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = seen.append  # type: ignore[method-assign]
        log = logging.getLogger("some.library")
        log.addHandler(handler)
        log.propagate = False
        log.warning("asked %s with %s, %d times", "http://a:hush@host", {"api_key": "hush"}, 3)
        log.warning("api_key=%s", "hush")
        log.warning("%(token)s and token=%(token)s", {"token": "hush-hush"})
        log.warning('%s - "%s %s"', "1.2.3.4:5", "GET", "/x?api_key=hush")
        log.warning("%d", "wrong on purpose")  # logging's own business
        try:
            raise ValueError("Authorization: Bearer hush")
        except ValueError:
            log.exception("failed")
        log.removeHandler(handler)
    finally:
        logging.setLogRecordFactory(before)
    lines = [logging.Formatter().format(record) for record in (*seen[:2], seen[3], seen[5])]
    assert not any("hush" in line for line in lines), lines
    assert lines[0].endswith("3 times") and "Traceback" in lines[3] and "ValueError" in lines[3]
    assert isinstance(seen[3].args, tuple) and len(seen[3].args) == 3
    assert "token=hush" not in seen[2].getMessage()
