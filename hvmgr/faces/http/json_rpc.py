"""JSON-RPC 2.0 as the clients of the Xen API use it."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

from hvmgr.faces.http.failure import Unreadable
from hvmgr.faces.http.xml_rpc import to_date

CONTENT_TYPE = "application/json"  # exactly: with a charset Xen Orchestra takes it for something else

_FAILURE, _PARSE, _NO_CALL = 1, -32700, -32600


def parse_call(body: bytes) -> tuple[str, list[Any], Any]:
    """The method, its parameters, and the id that the answer has to have."""
    try:
        call = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"no JSON: {str(error)[:200]}") from error
    if not isinstance(call, dict) or not isinstance(call.get("method"), str):
        raise Unreadable("no JSON-RPC call: it names no method")
    parameters, number = call.get("params", []), call.get("id")
    is_id = isinstance(number, str | int | None) or (isinstance(number, float) and math.isfinite(number))
    if not isinstance(parameters, list) or not is_id:
        raise Unreadable("no JSON-RPC call: params are a list, an id is a text or a number")
    return call["method"], parameters, number


def success(value: Any, number: Any) -> bytes:
    """The answer to a call that went well."""
    return _encode({"jsonrpc": "2.0", "result": value, "id": number})


def failure(description: list[str], number: Any) -> bytes:
    """The answer to a call that failed: a code and its parameters."""
    error = {"code": _FAILURE, "message": description[0], "data": description[1:]}
    return _encode({"jsonrpc": "2.0", "error": error, "id": number})


def unreadable(words: str) -> bytes:
    """The answer to what is no call."""
    code = _PARSE if words.startswith("no JSON:") else _NO_CALL
    return _encode({"jsonrpc": "2.0", "error": {"code": code, "message": words, "data": []}, "id": None})


def _encode(value: Any) -> bytes:
    return json.dumps(value, default=_other, separators=(",", ":")).encode("ascii")


def _other(value: object) -> str:
    return to_date(value) if isinstance(value, datetime) else str(value)


def _refuse(word: str) -> object:
    raise ValueError(f"{word} is no number of JSON")
