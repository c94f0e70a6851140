"""Hostile requests, made from right ones with a seed: the same seed makes the same requests.

A request is bytes, as they go over a connection. Some are right, most have one or two things wrong:
a field of the body, its JSON, the head, the length that is announced, the path, an upload's header
or its tensors. Knows nothing of what a server answers.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COMPLETION_PATHS = ("/custom/cartridge/completions", "/v1/completions")
CHAT_PATHS = ("/custom/cartridge/chat/completions", "/v1/chat/completions")
OTHER_PATHS = (
    *("/ping", "/v1/models", "/metrics", "/cartridges", "/cartridges/attack-step-000000"),
    *(
        "/openapi.json",
        "/custom/cartridge/loaded",
        "/v1/files",
        "/nowhere",
        "/",
        "//",
        "/%00",
        "/cartridges/%2e%2e",
    ),
    *(
        "/cartridges/" + "x" * 300,
        "/cartridges/%ED%A0%80",
        "/v1/models?a=%ff",
        "*",
        "http://x/ping",
    ),
)
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW")
SWITCHES = ("enable_thinking", "chat_template", "tokenize", "tools", "add_generation_prompt")

# As JSON text, so that there may be some that no JSON writer writes.
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "2", "3.5", "1e400", "-1e400", "NaN", "Infinity"),
    *("9" * 30, "-" + "9" * 300, "9" * 5000, "1e-320", "0.0000001", '""', '"x"', '"\\ud800"'),
    *('"\\udfff\\ud800"', '"\\u0000"', '"' + "y" * 5000 + '"', '"' + "z" * 200_000 + '"'),
    *("[]", "[1]", "[[1]]", "[[]]", '["a"]', "[null]", "[-1]", "[300]", "[1.5]", "[true]"),
    *("[" + "7," * 3000 + "7]", '["' + '","'.join("s" * 100) + '"]', "[" * 50 + "]" * 50),
    *("[" * 5000, "{}", '{"a": 1}', '{"a": 1, "a": 2}', '{"": {}}', '{"a":' * 40 + "1" + "}" * 40),
    '{"id": "base", "source": "local"}',
    '[{"id": "base", "source": "local"}]',
    '[{"id": "base", "source": "local"}, {"id": "base", "source": "local"}]',
    '[{"id": "../../etc", "source": "local"}]',
    '[{"id": "base"}]',
    '[{"role": "user", "content": "hi"}]',
    '[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]',
    '[{"role": "tool", "content": "{{ 7 * 7 }}"}]',
    '{"type": "json_object"}',
    '"{% for i in range(10**9) %}{% endfor %}"',
)
COMPLETION_FIELDS = (
    *("model", "prompt", "max_tokens", "n", "stop", "temperature", "top_p", "seed", "logprobs"),
    *("echo", "best_of", "suffix", "logit_bias", "metadata", "user", "stream", "stream_options"),
    *("cartridges", "ignore_eos", "logprobs_in_fingerprint", "presence_penalty", "surprise"),
)
CHAT_FIELDS = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "n", "stop", "temperature"),
    *("logprobs", "top_logprobs", "response_format", "stream", "apply_chat_template_overrides"),
    *("cartridges", "user", "metadata", "seed", "tools", "surprise"),
)


@dataclass(frozen=True)
class Target:
    """Where requests go: what is sent as the token, and a right upload to begin with."""

    host: str
    token: str | None
    upload: bytes


class Maker:
    """One seed's requests."""

    def __init__(self, seed: int, target: Target) -> None:
        self._random = random.Random(seed)
        self._target = target
        self._kinds: tuple[Callable[[], bytes], ...] = (
            *(self._completion, self._completion, self._chat, self._chat, self._damaged_json),
            *(self._upload, self._upload_header, self._other, self._damaged_head),
        )

    def next(self) -> bytes:
        """The next request."""
        return self._random.choice(self._kinds)()

    # --- bodies ---------------------------------------------------------------------------------

    def _fields(self, right: dict[str, str], names: tuple[str, ...]) -> str:
        fields = dict(right)
        for _ in range(self._random.randrange(3)):
            fields[self._random.choice(names)] = self._random.choice(VALUES)
        if self._random.random() < 0.05 and fields:
            del fields[self._random.choice(list(fields))]
        pairs = [f'"{name}": {value}' for name, value in fields.items()]
        if self._random.random() < 0.05:
            pairs.append(self._random.choice(pairs))  # twice
        return "{" + ", ".join(pairs) + "}"

    def _completion_text(self) -> str:
        right = {"model": '"m"', "prompt": "[10, 20]", "max_tokens": "2"}
        if self._random.random() < 0.3:
            right["cartridges"] = '[{"id": "base", "source": "local"}]'
        return self._fields(right, COMPLETION_FIELDS)

    def _chat_text(self) -> str:
        right = {
            "model": '"m"',
            "messages": '[{"role": "user", "content": "hi"}]',
            "max_tokens": "2",
        }
        if self._random.random() < 0.3:
            name, value = self._random.choice(SWITCHES), self._random.choice(VALUES)
            right["apply_chat_template_overrides"] = f'{{"{name}": {value}}}'
        return self._fields(right, CHAT_FIELDS)

    def _completion(self) -> bytes:
        path = self._random.choice(COMPLETION_PATHS)
        return self._request("POST", path, self._completion_text().encode())

    def _chat(self) -> bytes:
        return self._request("POST", self._random.choice(CHAT_PATHS), self._chat_text().encode())

    def _damaged_json(self) -> bytes:
        body = bytearray(self._completion_text().encode())
        self._damage(body)
        return self._request("POST", COMPLETION_PATHS[0], bytes(body))

    def _damage(self, data: bytearray) -> None:
        """A few bytes changed, a piece left out, doubled, or all that follows cut off."""
        for _ in range(self._random.randrange(1, 4)):
            if not data:
                return
            start = self._random.randrange(len(data))
            end = min(len(data), start + self._random.randrange(1, 30))
            kind = self._random.randrange(4)
            if kind == 0:
                data[start] = self._random.randrange(256)
            elif kind == 1:
                del data[start:end]
            elif kind == 2:
                data[start:start] = data[start:end]
            else:
                del data[start:]

    # --- uploads --------------------------------------------------------------------------------

    def _upload(self) -> bytes:
        body = bytearray(self._target.upload)
        if self._random.random() < 0.9:
            self._damage(body)
        return self._request("PUT", self._version(), bytes(body))

    def _upload_header(self) -> bytes:
        """With one thing of the description changed, and the hash as it was."""
        upload = self._target.upload
        (length,) = struct.unpack("<Q", upload[:8])
        entries: dict[str, Any] = json.loads(upload[8 : 8 + length])
        place = self._random.choice(["__metadata__", *entries])
        inner = entries[place]
        name = self._random.choice([*inner, "surprise"])
        marked = "@changed@"
        inner[name] = marked
        text = json.dumps(entries).replace(f'"{marked}"', self._random.choice(VALUES), 1).encode()
        body = struct.pack("<Q", len(text)) + text + upload[8 + length :]
        return self._request("PUT", self._version(), body)

    def _version(self) -> str:
        number = self._random.randrange(6)
        return f"/cartridges/attack-step-{number:06d}"

    # --- heads ----------------------------------------------------------------------------------

    def _other(self) -> bytes:
        method = self._random.choice(METHODS)
        body = self._completion_text().encode() if self._random.random() < 0.3 else b""
        return self._request(method, self._random.choice(OTHER_PATHS), body)

    def _damaged_head(self) -> bytes:
        request = self._request("POST", COMPLETION_PATHS[0], self._completion_text().encode())
        head, _, body = request.partition(b"\r\n\r\n")
        damaged = bytearray(head)
        self._damage(damaged)
        return bytes(damaged) + b"\r\n\r\n" + body

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        length = len(body)
        if self._random.random() < 0.03:
            length = self._random.choice([0, length + 10, max(0, length - 5), 10**12, -1])
        kind = "application/json"
        if self._random.random() < 0.03:
            kind = self._random.choice(["text/plain", "", "application/x+json", "a/b; c=\xff"])
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._target.host}", "Connection: close"]
        lines += [f"Content-Type: {kind}", f"Content-Length: {length}"]
        if self._target.token is not None:
            tokens = [self._target.token]
            if self._random.random() < 0.03:
                tokens = self._random.choice([[], ["wrong"], ["wrong", *tokens], tokens * 2])
            lines += [f"Authorization: Bearer {token}" for token in tokens]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
