"""XML-RPC as the clients of the Xen API read it: no white space between tags, strings bare, whole numbers as strings.

Documents with a DOCTYPE are refused, and with it every entity that could grow.
"""

from __future__ import annotations

import math
import re
import xmlrpc.client
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape

from hvmgr.faces.http.failure import Unreadable

CONTENT_TYPE = "text/xml"

_HEAD = '<?xml version="1.0"?>'
# What XML 1.0 cannot say in any way.
_UNSPEAKABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parse_call(body: bytes) -> tuple[str, list[Any]]:
    """The method and its parameters."""
    reader = xmlrpc.client.Unmarshaller(use_builtin_types=True)
    reader.xml(None, None)  # type: ignore[arg-type]  # the parser hands over text, not bytes
    parser = expat.ParserCreate(None, None)
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(body, True)
        parameters, method = reader.close(), reader.getmethodname()
    except (expat.ExpatError, xmlrpc.client.Error, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise Unreadable(f"no XML-RPC call: {str(error)[:200]}") from error
    if not isinstance(method, str):
        raise Unreadable("no XML-RPC call: it names no method")
    return method, list(parameters)


def success(value: Any) -> bytes:
    """The answer to a call that went well."""
    return _response({"Status": "Success", "Value": value})


def failure(description: list[str]) -> bytes:
    """The answer to a call that failed: a code and its parameters."""
    return _response({"Status": "Failure", "ErrorDescription": description})


def to_text(value: Any) -> str:
    """A value as its element: what ``result`` of a task holds."""
    return "".join(_value(value))


def _response(value: Any) -> bytes:
    parts = [_HEAD, "<methodResponse><params><param>", *_value(value), "</param></params></methodResponse>"]
    return "".join(parts).encode()


def _value(value: Any) -> Iterator[str]:
    if value is None or value == "":
        yield "<value/>"
        return
    yield "<value>"
    if isinstance(value, bool):
        yield f"<boolean>{value:d}</boolean>"
    elif isinstance(value, float):
        yield f"<double>{value if math.isfinite(value) else 0.0!r}</double>"
    elif isinstance(value, int):
        yield str(value)
    elif isinstance(value, datetime):
        yield f"<dateTime.iso8601>{to_date(value)}</dateTime.iso8601>"
    elif isinstance(value, Mapping):
        yield "<struct>"
        for name, one in value.items():
            yield f"<member><name>{_text(name)}</name>"
            yield from _value(one)
            yield "</member>"
        yield "</struct>"
    elif isinstance(value, list | tuple):
        yield "<array><data>"
        for one in value:
            yield from _value(one)
        yield "</data></array>"
    else:
        yield _text(value)
    yield "</value>"


def to_date(moment: datetime) -> str:
    """A moment as both encodings have it: ``20161110T12:34:56Z``."""
    return moment.astimezone(UTC).strftime("%Y%m%dT%H:%M:%SZ")


def _text(value: object) -> str:
    # A bare carriage return would be read as a line feed.
    return escape(_UNSPEAKABLE.sub("\ufffd", str(value)), {"\r": "&#13;"})


def _refuse_doctype(*_: object) -> None:
    raise ValueError("a DOCTYPE is not wanted")
