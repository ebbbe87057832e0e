"""From requests to answers: the paths, and what is said when something is refused."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from hvmgr.faces.http import api, calls_host, calls_task, calls_vdi, export, import_, json_rpc, xml_rpc
from hvmgr.faces.http.connection import Connection
from hvmgr.faces.http.failure import Gone, Refused, Unreadable, XenFailure
from hvmgr.faces.http.message import Head

if TYPE_CHECKING:
    from hvmgr.faces.http.server import Server
    from hvmgr.faces.http.service import Service

_TABLES = (calls_host, calls_task, calls_vdi)  # importing them fills the table of calls

_EXPORT, _IMPORT = "/export_raw_vdi", "/import_raw_vdi"
_XML = {"/", "/RPC2", "/xmlrpc"}
_JSON = "/jsonrpc"
_MOST_WORDS = 2000


class App:
    """Answers what comes through one server's connections."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.server: Server | None = None

    def serve(self, connection: Connection) -> None:
        """All requests of one connection, one after the other."""
        while True:
            try:
                head = connection.next_request()
                if head is None:
                    break
                self._answer(connection, head)
            except Refused as refusal:
                _refuse(connection, refusal)
            except Gone:
                connection.cut_off()
                return
            except Exception as error:  # noqa: BLE001 - the outermost edge: one request's defect is not the others'
                self._service.report_defect(error)
                if connection.has_begun:
                    connection.cut_off()
                    return
                _refuse(connection, Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "a defect in hvmgr"))
        connection.linger()

    def _answer(self, connection: Connection, head: Head) -> None:
        path = head.path.rstrip("/") or "/"
        if path in {_EXPORT, _IMPORT}:
            wanted = "GET" if path == _EXPORT else "PUT"
            _require_method(head, wanted)
            assert self.server is not None
            with self.server.working(connection):
                (export if wanted == "GET" else import_).handle(self._service, connection, head)
        elif path in _XML or path == _JSON:
            _require_method(head, "POST")
            body = connection.read_call()
            if path == _JSON:
                connection.answer(HTTPStatus.OK, json_rpc.CONTENT_TYPE, self._json(connection, body))
            else:
                connection.answer(HTTPStatus.OK, xml_rpc.CONTENT_TYPE, self._xml(connection, body))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing at this path")

    def _xml(self, connection: Connection, body: bytes) -> bytes:
        try:
            method, parameters = xml_rpc.parse_call(body)
        except Unreadable as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        try:
            return xml_rpc.success(self._call(connection, method, parameters))
        except XenFailure as problem:
            return xml_rpc.failure(problem.description)

    def _json(self, connection: Connection, body: bytes) -> bytes:
        try:
            method, parameters, number = json_rpc.parse_call(body)
        except Unreadable as error:
            return json_rpc.unreadable(str(error))
        try:
            return json_rpc.success(self._call(connection, method, parameters), number)
        except XenFailure as problem:
            return json_rpc.failure(problem.description, number)

    def _call(self, connection: Connection, method: str, parameters: list[Any]) -> Any:
        return api.carry_out(self._service, connection.peer, connection.local, method, parameters)


def _require_method(head: Head, wanted: str) -> None:
    if head.method != wanted:
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{wanted} alone is possible here", headers=[("Allow", wanted)])


def _refuse(connection: Connection, refusal: Refused) -> None:
    words = "".join(one if one.isprintable() else "?" for one in refusal.text[:_MOST_WORDS])  # clients' own among them
    connection.answer(refusal.status, "text/plain; charset=utf-8", words.encode() + b"\n", refusal.headers)
