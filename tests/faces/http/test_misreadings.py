"""What a client may say and a server misread: heads, bodies, names and files that mean something else than they seem to."""

from __future__ import annotations

import base64
import shutil
import time

import pytest

from hvmgr import errors
from hvmgr.faces.http.failure import XenFailure, translate
from hvmgr.faces.http.message import parse_head
from hvmgr.faces.http.notes import Notes
from hvmgr.model.user import Role
from hvmgr.storage import users
from tests.faces.http.conftest import MIB, PATIENCE_S, make_certificate, parse_answer, pattern, post, settled

HEAD = b"HEAD /export_raw_vdi HTTP/1.1\r\nHost: h\r\n\r\n"
GET = b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n"


class TestHeads:
    def test_answer_to_head_has_no_body_and_the_next_request_its_own(self, server):
        first, _, second = server.talk(HEAD + GET, end=True).partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 405 ")
        assert parse_answer(second).status == 404

    def test_scheme_counts_where_a_target_begins_with_one(self, server):
        assert (
            parse_answer(server.talk(b"GET /x://y/export_raw_vdi HTTP/1.1\r\nHost: h\r\n\r\n", end=True)).status == 404
        )
        assert (
            parse_answer(server.talk(b"GET http://y/export_raw_vdi HTTP/1.1\r\nHost: h\r\n\r\n", end=True)).status
            == 401
        )

    def test_bytes_of_a_disk_behind_a_refused_upload_are_no_request(self, server):
        """The disk's owner, a guest, would else speak to the server in its backup's place."""
        got = server.talk(b"PUT /import_raw_vdi?vdi=x HTTP/1.1\r\nHost: h\r\n\r\n" + GET, end=True)
        assert parse_answer(got).status == 401
        assert got.count(b"HTTP/1.1 ") == 1

    def test_cookies_are_read_at_once_whatever_they_are(self):
        """http.cookies looks at the rest of the text once for each of these: for more than a day."""
        parse_head(b"GET", b"/", [(b"cookie", b'a="' + b"\\a" * 5_000_000 + b'"')], b"1.1")
        head = parse_head(b"GET", b"/", [(b"cookie", b"odd[1]=x=y; ; session_id=OpaqueRef:1;vdi = a")], b"1.1")
        assert (head.parameter("session_id"), head.parameter("vdi")) == ("OpaqueRef:1", "a")


class TestCalls:
    @pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"[]", b"{}"])
    def test_id_that_no_answer_can_have_is_refused(self, server, number):
        call = b'{"method": "system.listMethods", "params": [], "id": %s}' % number
        answer = parse_answer(server.talk(post("/jsonrpc", call), end=True))
        assert answer.status == 200
        assert '"code":-32600' in answer.text
        assert "Infinity" not in answer.text

    def test_path_of_an_image_that_is_in_use_is_not_told(self):
        error = errors.Conflict("'/srv/secret.qcow2' is in use by process 7", path="/srv/secret.qcow2", pids=[7])
        found = translate(error)
        assert (found.code, found.status) == ("VDI_IN_USE", 409)
        assert "secret" not in str(found.description)

    def test_number_that_is_none_is_no_call(self, server):
        value = b"<param><value><bigdecimal>x</bigdecimal></value></param>"
        call = b"<methodCall><methodName>x</methodName><params>" + value + b"</params></methodCall>"
        assert parse_answer(server.talk(post("/", call), end=True)).status == 400
        assert server.told("defect") == []

    @pytest.mark.parametrize(
        ("method", "before", "with_session"),
        [
            ("session.login_with_password", [], False),
            ("task.create", [], True),
            ("event.from", [], True),
            ("event.inject", ["task"], True),
            ("VDI.create", [], True),
            ("SR.get_by_uuid", [], True),
            ("SR.get_record", [], True),
        ],
    )
    def test_list_without_a_bottom_is_no_parameter(self, server, method, before, with_session):
        deep = "<array><data><value>" * 5000 + "</value></data></array>" * 5000
        words = [*([server.login().handle] if with_session else []), *before]
        values = [f"<param><value>{one}</value></param>" for one in [*words, deep, "x", "1"]]
        for count in (len(words) + 1, len(words) + 2, len(words) + 3):  # each call has one number of its own
            call = (
                f"<methodCall><methodName>{method}</methodName><params>{''.join(values[:count])}</params></methodCall>"
            )
            answer = parse_answer(server.talk(post("/", call.encode()), end=True))
            assert answer.status == 200
            assert b"Failure" in answer.body
        assert server.told("defect") == []

    def test_notes_have_an_end(self, server):
        """Who may only look could fill the memory by the tasks that are his own."""
        session = server.login("rita")
        task = session.xenapi.task.create("t", "")
        for number in range(3):
            session.xenapi.task.add_to_other_config(task, f"key {number}", "x" * 1000)
        told = server.json("task.add_to_other_config", session.handle, task, "key", "x" * 1000)
        assert told["error"]["message"] == "OUT_OF_SPACE"
        notes = Notes("VDI")
        for number in range(50):
            notes.add("a", str(number), "")
        with pytest.raises(XenFailure, match="at most 50 notes"):
            notes.add("a", "more", "")


class TestUploads:
    @pytest.mark.parametrize(
        ("header", "status"),
        [("Content-Encoding: gzip", 415), ("Content-Range: bytes 1048576-2097151/4194304", 400)],
        ids=["packed", "part"],
    )
    def test_what_is_not_the_disk_as_it_stands_makes_none(self, server, place, header, status):
        (place / "new").write_bytes(pattern(MIB))
        session = server.login()
        words = {"session_id": session.handle, "sr_id": server.service.place.sr}
        assert server.put(place / "new", "-H", header, **words).status == status
        assert session.xenapi.VDI.get_all() == []
        assert server.put(place / "new", "-H", "Content-Encoding: identity", **words).code == 0

    @pytest.mark.parametrize("words", [["-0"], ["-H", "Expect:"]], ids=["http-1.0", "http-1.1"])
    def test_defect_in_the_middle_does_not_look_like_success(self, server, place, monkeypatch, words):
        (place / "new").write_bytes(pattern(MIB))
        session = server.login()
        free = session.xenapi.VDI.create({"name_label": "free", "virtual_size": MIB})
        task = session.xenapi.task.create("t", "")

        def break_down(_vdi, source, *_, **__):
            while source.read(MIB):
                pass
            return 1 / 0

        monkeypatch.setattr(server.service.disks, "take_in", break_down)
        got = server.put(place / "new", *words, session_id=session.handle, vdi=free, task_id=task)
        assert (got.status, got.code in {18, 56}) == (200, True)
        assert settled(session, task)["error_info"][0] == "INTERNAL_ERROR"


class TestFiles:
    def test_log_has_of_a_name_that_is_none_no_more_than_names_have(self, server):
        word = base64.b64encode(b"a" * 20000 + b":x").decode()
        head = f"GET /export_raw_vdi HTTP/1.1\r\nHost: h\r\nAuthorization: Basic {word}\r\n\r\n"
        assert parse_answer(server.talk(head.encode(), end=True)).status == 401
        assert server.told("login")[0]["user"] == "a" * 64

    def test_users_that_could_not_be_read_once_are_read_again(self, server, monkeypatch):
        real, tries = users.read, []

        def fail_once(path):
            tries.append(path)
            if len(tries) == 1:
                raise errors.HostFailed("too many open files")
            return real(path)

        server.add_user("otto", Role.READ)  # a change of the file, which the server sees at the next login
        monkeypatch.setattr(users, "read", fail_once)
        with pytest.raises(Exception, match="SESSION_AUTHENTICATION_FAILED"):
            server.login("otto")
        assert server.login("otto").handle
        assert len(tries) == 2

    def test_certificate_without_its_key_changes_nothing(self, start, place):
        """As it is while somebody replaces both: SIGHUP between the two."""
        old, new = (make_certificate(place / name) for name in ("old", "new"))
        server = start(tls=old)
        shutil.copy(new[0], old[0])
        server.server.wish_reload()
        until = time.monotonic() + PATIENCE_S
        while not server.told("reload"):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert "cannot be used" in server.told("reload")[0]["outcome"]
        assert server.curl(f"{server.url}/x").status == 404
        shutil.copy(new[1], old[1])
        server.server.reload()
        assert server.curl(f"{server.url}/x").status == 404
