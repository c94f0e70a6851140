"""OpenAI's form of an error: ``{"error": {"message", "type", "param", "code"}}``.

``param`` is the path of the value that is wrong (``messages[0].content``), ``code`` a word for the
kind of the mistake. Clients tell mistakes apart by the HTTP status: 400 for a request that cannot
be served, 404 for a model or a URL that is not here, 429 and 5xx for what may work later.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from cartridge_distill.util.http_errors import shortened

_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_LIMITS = {
    "greater_than_equal": ("below_min_value", ">= {ge}"),
    "greater_than": ("below_min_value", "> {gt}"),
    "less_than_equal": ("above_max_value", "<= {le}"),
    "less_than": ("above_max_value", "< {lt}"),
}
_OWN_CODES = {"unsupported_value"}
_NOT_JSON = (
    "We could not parse the JSON body of your request: send a JSON object, with the header "
    "'Content-Type: application/json'."
)


class ApiError(Exception):
    """A request is not served.

    Args:
        status: of HTTP.
        param: path of the value that is wrong, or None.
        code: kind of the mistake, or None.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        # What is quoted of a request may be megabytes, or hold what cannot be sent back.
        message, param = (
            None if text is None else shortened(text.encode("utf-8", "backslashreplace").decode())
            for text in (self.message, self.param)
        )
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The answer over HTTP."""
        return JSONResponse(self.body, self.status, headers)


def error_body(path: str, status: int, words: str) -> dict[str, Any]:
    """The form for what is refused before a route sees it."""
    return ApiError(status, words).body


def model_not_found(model: str, known: Sequence[str]) -> ApiError:
    """404 for a model that is not here."""
    asked = shortened(repr(model), 200)
    message = f"model {asked} is not here; here are: {', '.join(known)}"
    return ApiError(404, message, "model", "model_not_found")


def from_validation(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, in OpenAI's words."""
    # The path of each error within the body; names of the alternatives of a union fall out.
    problems = [(_path(one, error.body), one) for one in error.errors()]
    first = problems[0][0][:1]
    # Of a union every alternative complains: that which got furthest meant this value, and one to
    # which the value's type is no trouble before others.
    path, problem = max(
        (one for one in problems if one[0][:1] == first),
        key=lambda one: (len(one[0]), one[1]["type"] not in _TYPES),
    )
    kind, context = problem["type"], problem.get("ctx") or {}
    name, value = _shown(path), problem.get("input")
    if kind == "json_invalid" or not path and kind in ("missing", "model_attributes_type"):
        return ApiError(400, _NOT_JSON)
    if kind == "missing":
        message, code = f"Missing required parameter: '{name}'.", "missing_required_parameter"
    elif kind == "union_tag_not_found":
        name += "." + str(context["discriminator"]).strip("'")
        message, code = f"Missing required parameter: '{name}'.", "missing_required_parameter"
    elif kind == "extra_forbidden":
        message, code = f"Unknown parameter: '{name}'.", "unknown_parameter"
    elif kind in _TYPES:
        alternatives = [_TYPES[o["type"]] for p, o in problems if p == path and o["type"] in _TYPES]
        expected = " or ".join(dict.fromkeys(alternatives))
        message = f"Invalid type for '{name}': expected {expected}, but got {_kind(value)} instead."
        code = "invalid_type"
    elif kind in ("literal_error", "union_tag_invalid"):
        if kind == "union_tag_invalid":
            name, value = f"{name}.{str(context['discriminator']).strip(chr(39))}", context["tag"]
        supported = context.get("expected") or context["expected_tags"]
        message = f"Invalid value: {json.dumps(value)}. Supported values are: {supported}."
        code = "invalid_value"
    elif kind in _LIMITS:
        code, bound = _LIMITS[kind]
        limit = next(context[key] for key in ("ge", "gt", "le", "lt") if key in context)
        number = "decimal" if isinstance(limit, float) else "integer"
        message = (
            f"Invalid '{name}': {number} {code.replace('_', ' ')}. "
            f"Expected a value {bound.format(**context)}, but got {value} instead."
        )
        code = f"{number}_{code}"
    elif kind in ("too_long", "too_short", "string_too_long"):
        what = {"too_long": _kind(value).split()[-1], "too_short": "array"}.get(kind, "string")
        code = "empty_array" if kind == "too_short" else f"{what}_above_max_length"
        bound = f"at least {context['min_length']}" if kind == "too_short" else ""
        bound = bound or f"at most {context['max_length']}"
        message = f"Invalid '{name}': expected length {bound}, but got {len(value)}."
    else:
        message, code = str(problem["msg"]), "invalid_value"
        if kind in _OWN_CODES:
            code = kind
        elif "at" in context:
            name, code = context["at"], "invalid_parameter_combination"
        elif name:
            message = f"Invalid '{name}': {message}."
    return ApiError(400, message, name or None, code)


def _path(problem: dict[str, Any], body: Any) -> tuple[str | int, ...]:
    """The parts of a location that stand in the body, and the name of what is missing there."""
    parts = problem["loc"][1:]  # the first is "body"
    found: list[str | int] = []
    for place, part in enumerate(parts):
        if isinstance(body, dict) and part in body:
            body = body[part]
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        elif not (problem["type"] == "missing" and place == len(parts) - 1):
            continue
        found.append(part)
    return tuple(found)


def _shown(path: Sequence[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _kind(value: Any) -> str:
    for kind, name in (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a decimal number"),
        (str, "a string"),
        (list, "an array"),
        (dict, "an object"),
    ):
        if isinstance(value, kind):
            return name
    return "null"


def _offered(app: FastAPI) -> list[str]:
    """What a client may ask for, as ``POST /v1/chat/completions``."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return [f"{next(iter(route.methods))} {route.path}" for route in routes]


def add_error_handlers(app: FastAPI) -> None:
    """Every answer that is an error has OpenAI's form, unknown URLs and crashes included."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def other(http: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            here = ", ".join(_offered(app))
            message = f"Invalid URL ({http.method} {http.scope['path']}). Offered here: {here}."
        elif error.status_code == 405:
            message = f"Not allowed to {http.method} on {http.scope['path']}."
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, message).response(headers)

    @app.exception_handler(Exception)
    async def crashed(_: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer: the log has the traceback.
        return ApiError(500, f"the server failed: {type(error).__name__}").response()
