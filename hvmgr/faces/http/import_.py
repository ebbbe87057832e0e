"""``PUT /import_raw_vdi``: a disk takes in what arrives, all of it or nothing.

The 200 comes before the body is read, for some clients send nothing before they have seen it; what becomes of the import
then stands in its task, and a failure cuts the answer off before its last chunk. A client that asks first (Expect:
100-continue) gets the true status at the end instead.

A body of no bytes without a task of the client's is a probe: it changes nothing and is told that all is well.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.faces.http import failure, transfer, xml_rpc
from hvmgr.faces.http.body import Body
from hvmgr.faces.http.connection import Connection
from hvmgr.faces.http.failure import XenFailure
from hvmgr.faces.http.frames import Frames
from hvmgr.faces.http.message import Head
from hvmgr.faces.http.sessions import REF
from hvmgr.faces.http.transfer import Work
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.user import Role

if TYPE_CHECKING:
    from hvmgr.faces.http.service import Service
    from hvmgr.operations.transfer.vdis import Vdi

REALM = "VDI.import"
_NEW_LABEL = "Imported VDI"


def handle(service: Service, connection: Connection, head: Head) -> None:
    """The answer to one request."""
    with transfer.begun(service, connection, head, Role.ADMIN, REALM) as work:
        fmt = transfer.parse_format(head)
        _require_plain(head)
        if "chunked" in head.query and fmt is not ImageFormat.RAW:
            raise XenFailure("INTERNAL_ERROR", "chunked is for raw alone")
        body = Body(work)
        target = _target(work, fmt, body)
        answers_late = connection.waits_for_word
        if answers_late:
            connection.let_come()
        else:
            connection.begin(HTTPStatus.OK, _headers(work))
        result = _receive(work, target, fmt, body)
        work.succeed(result)
        if answers_late:
            connection.begin(HTTPStatus.OK, [*_headers(work), ("Content-Length", "0")])
        connection.finish()


def _require_plain(head: Head) -> None:
    """The body is a whole disk as it stands; packed, or as a part, its bytes would be taken for the disk's own."""
    if head.headers.get("content-encoding", "").lower() not in {"", "identity"}:
        status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        raise XenFailure("INVALID_VALUE", "content-encoding", "send the disk without a content encoding", status=status)
    if "content-range" in head.headers:
        raise XenFailure("INVALID_VALUE", "content-range", "a part of a disk is not taken in; send all of it")


def _headers(work: Work) -> list[tuple[str, str]]:
    return [
        ("Content-Type", "application/octet-stream"),
        ("Cache-Control", "no-cache, no-store"),
        ("task-id", work.task),
        ("Connection", "close"),
    ]


def _target(work: Work, fmt: ImageFormat, body: Body) -> Vdi | None:
    """The disk that is there and may be written; None where a new one is to be made of what arrives."""
    head, disks = work.head, work.service.disks
    vdi = head.parameter("vdi")
    if vdi is None:
        _require_place(work, fmt, body)
        return None
    work.about = vdi[:64]
    found = disks.writable(vdi, work.reporter())
    if fmt is ImageFormat.RAW and "chunked" not in head.query and body.length:  # of 0 bytes it may be a probe
        _require_size(found, body.length)
    return found


def _require_size(target: Vdi, length: int) -> None:
    if length > target.size:
        words = f"{length} bytes do not fit into {target.size}"
        raise XenFailure("VDI_TOO_SMALL", REF + target.uuid, str(length), words)
    if length < target.size:
        words = f"the disk has {target.size} bytes, {length} would come"
        raise XenFailure("IMPORT_ERROR_PREMATURE_EOF", str(length), words)


def _require_place(work: Work, fmt: ImageFormat, body: Body) -> None:
    head, place = work.head, work.service.place
    ref, uuid = head.parameter("sr_id", cookie_first=True), head.parameter("sr_uuid", cookie_first=True)
    if ref is None and uuid is None:
        raise XenFailure("VDI_MISSING", "the query says neither vdi nor sr_id")
    if place.sr not in {ref, REF + str(uuid)}:
        raise XenFailure("HANDLE_INVALID", "SR", str(ref or uuid)[:64], status=HTTPStatus.NOT_FOUND)
    if fmt is not ImageFormat.RAW or "chunked" in head.query:
        raise XenFailure("INTERNAL_ERROR", "only a raw disk can make a new VDI; create one and name it with vdi")
    if not body.length and not (body.length == 0 and work.is_own_task):
        raise XenFailure("INTERNAL_ERROR", "a new VDI needs a Content-Length: it becomes its size")


def _receive(work: Work, target: Vdi | None, fmt: ImageFormat, body: Body) -> str:
    """What the task's result says; a probe's says nothing."""
    if _is_empty(body):
        if work.is_own_task:
            return ""
        raise XenFailure("IMPORT_ERROR_PREMATURE_EOF", "not one byte arrived")
    disks = work.service.disks
    if target is not None:
        _import(work, target, fmt, body)
        return xml_rpc.to_text(REF + target.uuid)
    assert body.length is not None
    made = disks.create(_NEW_LABEL, body.length)
    work.about = made
    try:
        _import(work, disks.writable(made, work.reporter()), fmt, body)
    except BaseException:
        _take_back(work, made)
        raise
    return xml_rpc.to_text(REF + made)


def _is_empty(body: Body) -> bool:
    try:
        return body.is_empty()
    except errors.Corrupt as error:
        raise XenFailure("IMPORT_ERROR_PREMATURE_EOF", str(body.at), error.message) from error


def _take_back(work: Work, made: str) -> None:
    """The new disk goes; where it cannot, the log is told, and the client what was wrong first."""
    try:
        work.service.disks.destroy(made)
    except (errors.HvmgrError, XenFailure, OSError) as second:
        words = f"'{_NEW_LABEL}' stays: {second}"
        work.service.audit.tell("VDI.destroy", user=work.session.name, about=made, outcome=words)


def _import(work: Work, target: Vdi, fmt: ImageFormat, body: Body) -> None:
    source = Frames(body, target.size) if "chunked" in work.head.query else body
    is_exact = source is body and not body.is_open_ended

    try:
        work.service.disks.take_in(
            target, source, fmt, length=body.length if is_exact else None, to_end=is_exact, reporter=work.importing()
        )
    except (errors.Corrupt, errors.Conflict, errors.UsageError, errors.Unsupported) as error:
        raise _explained(target, body, error) from error


def _explained(target: Vdi, body: Body, error: errors.HvmgrError) -> XenFailure:
    """The code of what is wrong with a stream; that of a disk is everybody's."""
    facts = error.facts
    if (
        facts.get("premature")
        or facts.get("fault") == "F51"
        or (isinstance(error, errors.Corrupt) and "needed" in facts)
    ):
        return XenFailure("IMPORT_ERROR_PREMATURE_EOF", str(body.at), error.message)
    if "parent" in facts:
        return XenFailure("VDI_CONTENT_ID_MISSING", REF + target.uuid, error.message, status=HTTPStatus.CONFLICT)
    if "needed" in facts:
        return XenFailure("VDI_TOO_SMALL", REF + target.uuid, str(facts["needed"]), error.message)
    if isinstance(error, errors.Corrupt) or "frame" in facts:
        return XenFailure("IMPORT_ERROR", error.message)
    return failure.translate(error)
