"""Requests that are not understood: JSON with one meaning, and refusals that repeat nothing.

An answer that echoes its input turns a body of some kilobytes of nonsense into one of megabytes,
and what is in it (NaN, half characters) may be what no answer can be written with. So the first
problem is named, with where it is, in a bounded number of characters.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import Response

from cartridge_distill.util.http_front import ErrorBody, Front, no_more_than, plain_detail
from cartridge_distill.util.strict_json import BadJson, loads

MAX_WORDS = 600
"""Characters of a refusal."""
_PLACE, _MESSAGE = 120, 400


class StrictRoute(APIRoute):
    """A route that reads its JSON body with :mod:`cartridge_distill.util.strict_json`.

    What is no JSON is HTTP 400.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = loads(await self.body())
            except BadJson as error:
                raise HTTPException(400, f"the body is not JSON that is read: {error}") from error
        return self._json


def protect(
    app: FastAPI,
    idle_s: float,
    body_limit: Callable[[str, str], int] | None = None,
    error_body: ErrorBody = plain_detail,
) -> None:
    """Gives an app strict JSON and bounded bodies; call it before any route is added.

    Args:
        idle_s: how long a client may be silent in the middle of a body.
        body_limit: bytes a request may bring, by method and path.
        error_body: the form of what is refused before a route sees it.
    """
    app.router.route_class = StrictRoute
    # A redirect would go where the client's Host header says, with whatever its query holds.
    app.router.redirect_slashes = False
    app.add_middleware(
        Front, body_limit=body_limit or no_more_than(), idle_s=idle_s, error_body=error_body
    )


def first_problem(error: RequestValidationError) -> str:
    """The first of what is wrong, without the value."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "body") or "the body"
    return f"{shortened(place, _PLACE)}: {shortened(problem['msg'], _MESSAGE)}"


def shortened(words: str, length: int = MAX_WORDS) -> str:
    """Words that fit into an answer and can be written in it."""
    clean = words.encode("utf-8", "replace").decode()
    return clean if len(clean) <= length else clean[: length - 3] + "..."


def add_refusals(
    app: FastAPI, malformed_status: int = 422, error_body: ErrorBody = plain_detail
) -> None:
    """Bounded answers for what is malformed, and for what a route refuses.

    Args:
        malformed_status: of a request that does not fit its schema.
    """

    async def malformed(http: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        body = error_body(http.scope["path"], malformed_status, first_problem(error))
        return JSONResponse(body, malformed_status)

    async def refused(http: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        body = error_body(http.scope["path"], error.status_code, shortened(str(error.detail)))
        return JSONResponse(body, error.status_code, headers=error.headers)

    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(StarletteHTTPException, refused)
