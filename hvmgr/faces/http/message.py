"""What was asked and what is answered: values, without a connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs

from hvmgr.faces.http.failure import Refused

_MOST_PARAMETERS = 32


@dataclass(frozen=True, slots=True)
class Head:
    """The first line and the headers of a request; names of headers are lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    cookies: Mapping[str, str]
    version: str
    length: int | None = field(default=None)
    is_chunked: bool = False

    def parameter(self, name: str, *, cookie_first: bool = False) -> str | None:
        """A parameter of the query or a cookie; an empty one counts as none."""
        places = (self.cookies, self.query) if cookie_first else (self.query, self.cookies)
        return next((place[name] for place in places if place.get(name)), None)


def parse_head(method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]], version: bytes) -> Head:
    """The request's head; Refused where it contradicts itself."""
    path, _, query = target.decode("ascii", "replace").partition("?")
    if not path.startswith("/"):  # the absolute form that proxies send
        path = "/" + path.partition("://")[2].partition("/")[2]
    found: dict[str, str] = {}
    for name, value in headers:
        key = name.decode("ascii", "replace")
        text = value.decode("latin-1")
        found[key] = f"{found[key]}; {text}" if key == "cookie" and key in found else text
    length = found.get("content-length")
    if length is not None and "transfer-encoding" in found:  # a proxy before us might have read it the other way
        raise Refused(HTTPStatus.BAD_REQUEST, "the request says its length twice")
    return Head(
        method=method.decode("ascii", "replace"),
        path=path,
        query=_query(query),
        headers=found,
        cookies=_cookies(found.get("cookie", "")),
        version=version.decode("ascii"),
        length=int(length) if length is not None and length.isdigit() else None,
        is_chunked="transfer-encoding" in found,
    )


def _query(text: str) -> dict[str, str]:
    try:
        pairs = parse_qs(text, keep_blank_values=True, max_num_fields=_MOST_PARAMETERS, errors="strict")
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, "the query cannot be read") from error
    for name, values in pairs.items():
        if len(values) > 1:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the query says more than once what '{name[:40]}' is")
    return {name: values[0] for name, values in pairs.items()}


def _cookies(text: str) -> dict[str, str]:
    # Read plainly, for what is meant for us has no quotes: http.cookies takes a second for 32 KiB of backslashes.
    return {name.strip(): value.strip() for name, _, value in (one.partition("=") for one in text.split(";"))}
