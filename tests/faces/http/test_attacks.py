"""Clients that are slow, vanish, send nonsense, come in crowds or guess passwords; and a server that is told to stop."""

from __future__ import annotations

import contextlib
import json
import resource
import time
import xmlrpc.client
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvmgr.faces.http import accounts, json_rpc, peers, xml_rpc
from hvmgr.faces.http.accounts import Failures
from hvmgr.faces.http.connection import Limits
from hvmgr.faces.http.failure import Unreadable
from hvmgr.model.image_format import ImageFormat
from tests.faces.http.conftest import (
    MIB,
    PATIENCE_S,
    make_certificate,
    parse_answer,
    pattern,
    post,
    raw_of,
    read_all,
    settled,
)
from tests.faces.http.test_transfers import PIB, put_head, vdi_of

HASTY = Limits(head_s=1.5, body_s=1.5, idle_s=1.5, linger_s=0.3)


def is_served(server):
    """Whether everybody else is; a busy machine may be too slow for a hasty server."""
    return any(b'"result"' in server.talk(_CALL) for _ in range(5))


_CALL = post("/jsonrpc", b'{"method": "system.listMethods", "params": [], "id": 1}', "Connection: close")


class TestSlow:
    def test_what_does_not_come(self, start):
        """Nothing at all, a head, or the body of a call: all of them at once."""
        server = start(limits=HASTY)
        heads = [b"GE", b"GET / HTTP/1.1\r\nHost: h\r\nX-A: b", post("/jsonrpc", b"x" * 100)[:-50]]
        with ThreadPoolExecutor() as pool:
            nothing, *answers = pool.map(server.talk, [b"", *heads])
        assert nothing == b""
        assert [answer[:13] for answer in answers] == [b"HTTP/1.1 408 "] * len(heads)
        assert is_served(server)

    def test_second_head_has_no_longer_than_the_first(self, start):
        server = start(limits=Limits(head_s=1.5, idle_s=100 * PATIENCE_S, linger_s=0.3))
        with server.connected() as one:
            one.sendall(_CALL.replace(b"Connection: close\r\n", b""))
            assert one.recv(1 << 20).startswith(b"HTTP/1.1 200 ")
            one.sendall(b"GE")
            assert b"HTTP/1.1 408 " in read_all(one)

    def test_drops_do_not_help(self, start):
        server = start(limits=HASTY)
        with server.connected() as one:
            with contextlib.suppress(ConnectionError):
                for byte in b"GET /export_raw_vdi?vdi=abcdefghijklmnopqrstuvwxyz HTTP/1.1\r\n":
                    one.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert read_all(one).startswith(b"HTTP/1.1 408 ")

    def test_transfer_that_does_not_move(self, start, bench):
        server = start(limits=Limits(stall_s=1.5))
        vm = bench.make(32)
        bench.write(vm, 5, length=32 * MIB)
        session = server.login()
        ref, before = vdi_of(session, vm, "hda"), bench.photo(vm)
        tasks = [session.xenapi.task.create("t", "") for _ in range(2)]
        with server.connected() as reader:
            path = server.export_link(session_id=session.handle, vdi=ref, task_id=tasks[0]).removeprefix(server.url)
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            assert settled(session, tasks[0])["error_info"][0] == "CLIENT_ERROR"
        with server.connected() as writer:
            writer.sendall(put_head(server, session, PIB, vdi=ref, task_id=tasks[1]) + bytes(1000))
            assert settled(session, tasks[1])["error_info"][0] == "IMPORT_ERROR_PREMATURE_EOF"
        assert bench.photo(vm) == before
        bench.check(vm)


class TestNonsense:
    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 40000 + b"\r\n\r\n", 431),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\nzzzz", 400),
            (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
            (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2000000\r\n\r\n" + bytes(1100000), 413),
            (b"POST /RPC2 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello", 400),
            (b"GET http://other/x HTTP/1.1\r\nHost: h\r\n\r\n", 404),
            (b"GET /" + b"%00" * 50 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 404),
            (b"GET /export_raw_vdi?vdi=%ff HTTP/1.1\r\nHost: h\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 20\r\n\r\n<methodCall>", 400),
            (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab", 400),
            (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + b"F" * 21 + b"\r\nab", 400),
        ],
        ids=["long", "tls", "negative", "two-lengths", "gzip", "large", "no-xml", "proxy", "zeros", "no-utf-8",
             "shorter", "no-chunk", "large-chunk"],
    )  # fmt: skip
    def test_gets_its_status(self, server, sent, status):
        assert parse_answer(server.talk(sent, end=True)).status == status
        assert is_served(server)
        assert server.told("defect") == []

    def test_names_are_data_wherever_they_go(self, server, bench):
        """Of a disk: a path, markup, a header, an escape of a terminal."""
        session = server.login()
        names = ["../../etc/passwd", "<b>&amp;</b>", "a\r\nX-Evil: y", "\x1b[31m", '"; filename="x', "%00", "a" * 1000]
        for name in names:
            ref = server.json("VDI.create", session.handle, {"name_label": name, "virtual_size": MIB})["result"]
            shown = server.json("VDI.get_name_label", session.handle, ref)["result"]
            assert shown == name
            got = server.curl(server.export_link(session_id=session.handle, vdi=ref))
            assert (got.status, "x-evil" in got.headers) == (200, False)
            uuid = ref.removeprefix("OpaqueRef:")
            assert got.headers["content-disposition"] == f'attachment; filename="{uuid}.raw"'
            for asked in ({"vdi": name}, {"vdi": ref, "base": name, "format": "vhd"}, {"vdi": ref, "task_id": name}):
                refused = server.curl(server.export_link(session_id=session.handle, **asked))
                assert refused.status in {400, 404}
                assert refused.text.removesuffix("\n").isprintable()
            session.xenapi.VDI.destroy(ref)
        assert {path.name for path in (bench.place / "root" / ".disks").glob("*.qcow2")} == set()
        assert len(server.log.getvalue().splitlines()) == len(server.told())
        assert server.told("defect") == []

    @pytest.mark.parametrize("bomb", [
        b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><methodCall><methodName>&b;</methodName></methodCall>',
        b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><methodCall><methodName>&a;</methodName></methodCall>',
        b"<methodCall><methodName>x</methodName><params>" + b"<param><value><array><data>" * 20000,
    ], ids=["entities", "file", "depth"])  # fmt: skip
    def test_xml_bomb(self, server, bomb):
        assert parse_answer(server.talk(post("/", bomb), end=True)).status == 400

    @pytest.mark.parametrize(
        "bomb",
        [b"[" * 500000, b'{"method":"a","params":' + b"[" * 400000, b"9" * 900000, b'{"method":"a","params":[NaN]}'],
    )
    def test_json_bomb(self, server, bomb):
        got = parse_answer(server.talk(post("/jsonrpc", bomb), end=True))
        assert json.loads(got.body)["error"]["code"] == -32700
        assert server.told("defect") == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
METHODS = ["session.login_with_password", "VDI.create", "VDI.get_record", "VDI.destroy", "VDI.snapshot", "event.from", "event.inject",
           "task.create", "task.set_progress", "task.set_status", "task.add_to_other_config", "Async.VDI.destroy", "system.listMethods",
           "VDI.get_by_uuid", "pool.get_master", "SR.get_by_uuid", "VDI.add_to_other_config"]  # fmt: skip
CALM = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class TestAnything:
    """Whatever comes gets an answer and is no defect."""

    @CALM
    @given(method=st.sampled_from(METHODS), parameters=st.lists(VALUES, max_size=4), with_session=st.booleans())
    def test_call(self, server, method, parameters, with_session):
        if method == "event.from":
            parameters = [*parameters[:-1], 0] if parameters else parameters
        if not hasattr(server, "handle"):
            server.handle = server.login().handle
            server.service.accounts._failures = Failures(most=100000)
        found = [server.handle, *parameters] if with_session else parameters
        body = json.dumps({"method": method, "params": found, "id": 1}).encode()
        answer = json.loads(parse_answer(server.talk(post("/jsonrpc", body, "Connection: close"))).body)
        assert ("result" in answer) != ("error" in answer)
        assert server.told("defect") == []

    @CALM
    @given(
        data=st.binary(max_size=200),
        start=st.sampled_from([b"", b"GET ", b"PUT /import_raw_vdi", b"POST /RPC2 HTTP/1.1\r\n"]),
    )
    def test_bytes(self, server, data, start):
        got = server.talk(start + data, end=True)
        assert got == b"" or got.startswith(b"HTTP/1.1 ")
        assert server.told("defect") == []

    @CALM
    @given(
        words=st.dictionaries(
            st.sampled_from(["vdi", "base", "format", "session_id", "task_id", "sr_id", "chunked", "subtask_of"]),
            st.text(max_size=30) | st.sampled_from(["raw", "vhd", "../..", "OpaqueRef:NULL"]),
        ),
        method=st.sampled_from(["GET", "PUT"]),
    )  # fmt: skip
    def test_query(self, server, words, method):
        path = (server.export_link if method == "GET" else server.import_link)(**words).removeprefix(server.url)
        basic = "Authorization: Basic YW5uYTpjb3JyZWN0IGhvcnNl"
        got = server.talk(
            f"{method} {path} HTTP/1.1\r\nHost: h\r\n{basic}\r\nContent-Length: 0\r\n\r\n".encode(), end=True
        )
        assert parse_answer(got).status in {400, 401, 404}
        assert server.told("defect") == []

    @CALM
    @given(VALUES)
    def test_value_survives_the_encodings(self, value):
        (found,), _ = xmlrpc.client.loads(xml_rpc.success(value))
        assert found["Status"] == "Success"
        assert json.loads(json_rpc.success("x", 1))["result"] == "x"

    @CALM
    @given(
        st.binary(max_size=300)
        | st.text(max_size=100).map(lambda text: f"<methodCall>{text}".encode("utf-8", "replace"))
    )
    def test_xml_is_a_call_or_not(self, body):
        with contextlib.suppress(Unreadable):
            xml_rpc.parse_call(body)


class TestCrowds:
    def test_more_than_there_is_room_for(self, start):
        server = start(connections=4)
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(server.connected()) for _ in range(8)]
            assert all(read_all(one).startswith(b"HTTP/1.1 503 ") for one in held[3:])  # an address gets three quarters
        until = time.monotonic() + PATIENCE_S
        while len(server.server._threads):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert is_served(server)

    def test_hundred_clients_of_every_kind(self, start):
        """Those that are slow, vanish, or talk nonsense are in nobody's way."""
        server = start(connections=200)
        session = server.login()
        free = session.xenapi.VDI.create({"name_label": "free", "virtual_size": MIB})
        path = server.export_link(session_id=session.handle, vdi=free).removeprefix(server.url)
        whole = f"GET {path} HTTP/1.0\r\n\r\n".encode()
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(20) as pool:
            for number in range(80):
                one = stack.enter_context(server.connected())
                with contextlib.suppress(ConnectionError):
                    one.sendall(
                        [b"GET / HT", whole, b"\0" * 2000, put_head(server, session, PIB, vdi=free)][number % 4]
                    )
                if number % 8 == 1:
                    one.close()
            bodies = list(pool.map(lambda _: parse_answer(server.talk(whole)).body, range(20)))
        assert bodies == [bytes(MIB)] * 20
        server.await_rest()
        session.xenapi.VDI.destroy(free)
        assert server.told("defect") == []

    def test_limits_count_a_network_of_ipv6_as_one(self):
        assert peers.origin("2001:db8:1:2:3:4:5:6") == peers.origin("2001:db8:1:2::9%eth0") == "2001:db8:1:2::/64"
        assert peers.origin("2001:db8:1:3::9") != peers.origin("2001:db8:1:2::9")
        assert [peers.origin(one) for one in ("192.0.2.7", "::1", "")] == ["192.0.2.7", "::1", ""]

    def test_fifty_transfers_at_once(self, server, bench, place):
        vm = bench.make(4, 4)
        for slot in vm.now().disks:
            bench.write(vm, 3, MIB, slot=slot)
        session = server.login()
        read = vdi_of(session, vm, min(vm.now().disks))
        free = session.xenapi.VDI.create({"name_label": "free", "virtual_size": 4 * MIB})
        new = pattern(4 * MIB)
        (place / "new").write_bytes(new)
        expected = raw_of(vm, min(vm.now().disks))

        def down(_):
            with server.connected() as one:
                path = server.export_link(session_id=session.handle, vdi=read).removeprefix(server.url)
                one.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                return parse_answer(read_all(one)).body == expected

        with ThreadPoolExecutor(50) as pool:
            up = pool.submit(server.put, place / "new", session_id=session.handle, vdi=free)
            assert all(pool.map(down, range(49)))
            assert up.result().code == 0
        assert server.curl(server.export_link(session_id=session.handle, vdi=free)).body == new
        server.await_rest()
        bench.check(vm)

    def test_memory_does_not_grow_with_the_disk(self, server, bench, place):
        big = place / "big.raw"
        with big.open("wb") as file:
            for _ in range(8):
                file.write(pattern(MIB) * 16)
        vm = bench.make(bench.in_place(big, format=ImageFormat.RAW))
        session = server.login()
        ref = vdi_of(session, vm, "hda")
        server.curl("-o", "/dev/null", server.export_link(session_id=session.handle, vdi=ref))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for fmt in ("raw", "vhd"):
            assert (
                server.curl("-o", "/dev/null", server.export_link(session_id=session.handle, vdi=ref, format=fmt)).code
                == 0
            )
        assert server.put(big, session_id=session.handle, vdi=ref).code == 0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 << 10  # KiB; the disk has 128 MiB


class TestGuesses:
    def test_too_many_are_not_looked_at(self, start):
        server = start(failures=Failures(most=3, within_s=3600))
        for _ in range(3):
            assert server.curl("-u", "anna:wrong", server.export_link(vdi="x")).status == 401
        refused = server.curl("-u", "anna:correct horse", server.export_link(vdi="x"))
        assert (refused.status, int(refused.headers["retry-after"]) > 3000) == (429, True)
        told = server.json("session.login_with_password", "anna", "correct horse")["error"]
        assert told["message"] == "SESSION_AUTHENTICATION_FAILED"
        assert "too many" in told["data"][1]
        assert "result" in server.json("session.login_with_password", "rita", "correct horse")
        outcomes = [line["outcome"] for line in server.told("login") if line["user"] == "anna"]
        assert outcomes == ["wrong user or password"] * 3 + ["too many failures"]  # once, as often as somebody may ask

    def test_time_heals(self):
        now = [0.0]
        failures = Failures(most=2, within_s=10, clock=lambda: now[0])
        failures.note(["a b", "a"])
        failures.note(["a b", "a"])
        with pytest.raises(Exception, match="too many"):
            failures.require_few(["a b"])
        failures.require_few(["a c", "a"])
        now[0] = 11
        failures.require_few(["a b"])

    def test_many_places_whose_time_is_over_are_forgotten(self, monkeypatch):
        monkeypatch.setattr(accounts, "_MOST_PLACES", 3)
        now = [0.0]
        failures = Failures(most=2, within_s=10, clock=lambda: now[0])
        for name in "bcde":
            failures.note([f"a {name}"])
        now[0] = 11
        failures.require_few(["a b"])
        failures.note(["a f"])
        failures.note(["a f"])
        with pytest.raises(Exception, match="too many"):
            failures.require_few(["a f"])
        assert list(failures._times) == ["a f"]


class TestEnds:
    @pytest.fixture
    def half(self, start, bench):
        """``half(grace)``: an export and an import that are in the middle, with their tasks."""
        server = start()
        vm = bench.make(32)
        bench.write(vm, 5, length=32 * MIB)
        session = server.login()
        ref = vdi_of(session, vm, "hda")
        free = session.xenapi.VDI.create({"name_label": "free", "virtual_size": 4 * MIB})
        tasks = [session.xenapi.task.create("t", "") for _ in range(2)]
        with server.connected() as reader, server.connected() as writer:
            path = server.export_link(session_id=session.handle, vdi=ref, task_id=tasks[0]).removeprefix(server.url)
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            writer.sendall(put_head(server, session, 4 * MIB, vdi=free, task_id=tasks[1]) + pattern(MIB))
            assert reader.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert writer.recv(4096).startswith(b"HTTP/1.1 200 ")
            yield server, session, tasks, reader, writer, vm, free

    def test_task_is_cancelled(self, half, bench):
        server, session, tasks, reader, writer, vm, free = half
        for task in tasks:
            session.xenapi.task.cancel(task)
        read_all(reader)
        with contextlib.suppress(ConnectionError):
            writer.sendall(bytes(512))
        for task in tasks:
            assert settled(session, task)["error_info"] == ["TASK_CANCELLED", task]
            assert session.xenapi.task.get_status(task) == "cancelled"
        bench.check(vm)
        assert not any(server.curl(server.export_link(session_id=session.handle, vdi=free)).body)

    def test_client_vanishes(self, half, bench):
        server, session, tasks, reader, writer, vm, free = half
        reader.close()
        writer.close()
        assert settled(session, tasks[0])["error_info"][0] == "CLIENT_ERROR"
        assert settled(session, tasks[1])["error_info"][0] == "IMPORT_ERROR_PREMATURE_EOF"
        assert not any(server.curl(server.export_link(session_id=session.handle, vdi=free)).body)
        session.xenapi.VDI.destroy(free)
        server.await_rest()
        bench.check(vm)

    def test_server_is_stopped(self, half, bench):
        server, _, tasks, reader, _, vm, free = half
        server.server.stop()
        server.thread.join(PATIENCE_S)
        assert not server.thread.is_alive()
        records = server.service.tasks.records()
        assert [records[task]["status"] for task in tasks] == ["failure", "failure"]
        assert len(read_all(reader)) < 32 * MIB
        assert bench.host.disks.get(free.removeprefix("OpaqueRef:")).size == 4 * MIB
        with bench.host.disks.export(free.removeprefix("OpaqueRef:")) as stream:
            assert not any(any(piece) for piece in stream.chunks())
        bench.check(vm)

    def test_transfers_get_time_to_finish(self, start, bench):
        server = start(grace=PATIENCE_S)
        vm = bench.make(4)
        session = server.login()
        task = session.xenapi.task.create("t", "")
        new = pattern(4 * MIB)
        with server.connected() as writer:
            writer.sendall(put_head(server, session, 4 * MIB, vdi=vdi_of(session, vm, "hda"), task_id=task))
            assert writer.recv(4096).startswith(b"HTTP/1.1 200 ")
            server.server.stop()
            writer.sendall(new)
            assert read_all(writer).endswith(b"0\r\n\r\n")
        server.thread.join(PATIENCE_S)
        assert server.service.tasks.record(task)["status"] == "success"
        assert raw_of(vm) == new


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate that signed itself, and its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_everything_goes_through_tls(start, bench, certificate, place):
    server = start(tls=certificate, limits=Limits(head_s=5.0))
    vm = bench.make(4)
    session = server.login()
    ref = vdi_of(session, vm, "hda")
    (place / "new").write_bytes(pattern(4 * MIB))
    assert server.put(place / "new", session_id=session.handle, vdi=ref).code == 0
    for fmt in ("raw", "vhd"):
        got = server.curl(server.export_link(session_id=session.handle, vdi=ref, format=fmt))
        assert (got.code, len(got.body)) == (0, int(got.headers["content-length"]))
    assert raw_of(vm) == (place / "new").read_bytes()
    assert b"HTTP" not in server.talk(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")  # not a word in the clear
    assert b"HTTP" not in server.talk(b"")  # a handshake that never comes
    server.server.reload()
    assert server.curl(f"{server.url}/x").status == 404


def test_client_that_comes_back_at_once_finds_the_disk_free(server, bench, place):
    vm = bench.make(4)
    session = server.login()
    ref = vdi_of(session, vm, "hda")
    (place / "new").write_bytes(pattern(4 * MIB))
    for _ in range(5):
        assert server.curl(server.export_link(session_id=session.handle, vdi=ref)).code == 0
        assert server.put(place / "new", session_id=session.handle, vdi=ref).code == 0
