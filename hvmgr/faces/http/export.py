"""``GET /export_raw_vdi``: a disk, or what has changed of it, with its exact length before the first byte."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from hvmgr.faces.http import transfer
from hvmgr.faces.http.connection import Connection
from hvmgr.faces.http.failure import Gone, Headers, XenFailure
from hvmgr.faces.http.message import Head
from hvmgr.faces.http.transfer import Work
from hvmgr.model.user import Role

if TYPE_CHECKING:
    from hvmgr.faces.http.service import Service
    from hvmgr.operations.transfer.outgoing import Outgoing

REALM = "VDI.export_raw"
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)


def handle(service: Service, connection: Connection, head: Head) -> None:
    """The answer to one request."""
    with transfer.begun(service, connection, head, Role.READ, REALM) as work:
        fmt = transfer.parse_format(head)
        if "chunked" in head.query:
            raise XenFailure("INTERNAL_ERROR", "chunked is for imports; an export says its length and comes as it is")
        vdi, base = head.parameter("vdi"), head.parameter("base")
        if vdi is None:
            raise XenFailure("VDI_MISSING", "the query says no vdi")
        work.about = vdi[:64]
        with service.disks.exported(vdi, base, fmt, work.reporter()) as stream:
            work.check()
            _send(work, stream)
        work.succeed()  # not before the disk is let go: the client may destroy it now
        connection.finish()


def _send(work: Work, stream: Outgoing) -> None:
    connection = work.connection
    start, length, status, more = _range(work.head, stream)
    headers = [
        ("Content-Type", stream.content_type),
        ("Content-Length", str(length)),
        ("Content-Disposition", f'attachment; filename="{stream.file_name}"'),
        ("Cache-Control", "no-cache, no-store"),
        ("task-id", work.task),
        ("Connection", "close"),
        *more,
    ]
    connection.limit.set_stall(connection.limits.stall_s)
    connection.begin(status, headers)
    try:
        if connection.is_encrypted:
            done = 0
            for piece in stream.chunks(start, length):
                connection.write(piece)
                done += len(piece)
                work.report(done, length)
        else:
            stream.send(connection.lend(), work.report, start=start, length=length)
            connection.count(length)
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise Gone(str(error)) from error
        raise
    work.done = length
    connection.limit.set(None)


def _range(head: Head, stream: Outgoing) -> tuple[int, int, HTTPStatus, Headers]:
    """Which bytes are sent. One range of a raw disk can be asked for; another wish gets everything, as HTTP allows."""
    offers = [("Accept-Ranges", "bytes")] if stream.has_ranges else []
    match = _RANGE.fullmatch(head.headers.get("range", "").replace(" ", ""))
    if match is None or not any(match.groups()) or not stream.has_ranges or "if-range" in head.headers:
        return 0, stream.length, HTTPStatus.OK, offers
    first, last = match.groups()
    if not first:  # the last so many bytes
        start, end = max(0, stream.length - int(last)), stream.length
    else:
        start, end = int(first), min(int(last) + 1 if last else stream.length, stream.length)
    if last and first and int(last) < int(first):
        return 0, stream.length, HTTPStatus.OK, offers
    if start >= end:
        raise XenFailure(
            "INVALID_VALUE",
            "range",
            f"the disk has {stream.length} bytes",
            status=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
        )
    told = ("Content-Range", f"bytes {start}-{end - 1}/{stream.length}")
    return start, end - start, HTTPStatus.PARTIAL_CONTENT, [*offers, told]
