"""The route of the page, and what the page must know of the server.

The page's policy (Content-Security-Policy) allows the one script and the one style in it, by their
hashes, and requests to this server alone: a text that came in as markup would not be run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """A model that can be asked, and what it takes.

    Attributes:
        model: its name in the chat API.
        tokens: of the KV that stands before every question.
    """

    model: str
    tokens: int


@dataclass(frozen=True)
class Shown:
    """A cartridge on the page.

    Attributes:
        cartridge: itself.
        document: the full document, where the server knows it and it fits the model.
        no_document: why there is none; shown in its place.
        questions: examples.
    """

    cartridge: Place
    document: Place | None = None
    no_document: str = ""
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Playground:
    """All that the page shows beside questions and answers.

    Attributes:
        model: the base model's name in the chat API.
        token_bytes: KV of one token, in bytes.
        context: tokens that prompt and answer may have together.
        cartridges: in order.
    """

    model: str
    token_bytes: int
    context: int
    cartridges: Sequence[Shown]

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"cartridges": [asdict(one) for one in self.cartridges]}


@cache
def page() -> tuple[str, str]:
    """The page, and its policy."""
    style, script, frame = (
        (_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    html = frame.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src {_hash(script)}; style-src {_hash(style)}"
    )
    return html, policy


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def add_playground(app: FastAPI, playground: Playground) -> None:
    """Adds the page at ``/``, and what it reads at ``/playground``."""
    described = playground.described()

    @app.get("/", include_in_schema=False)
    async def show() -> HTMLResponse:
        html, policy = page()
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(html, headers=headers)

    @app.get("/playground", include_in_schema=False)
    async def about() -> JSONResponse:
        return JSONResponse(described, headers={"Cache-Control": "no-store"})
