"""What is refused: by which status and code, with the client's task ended and the disk as it was."""

from __future__ import annotations

import io
import os
import socket

import pytest

from hvmgr import errors
from hvmgr.faces.http import failure
from hvmgr.model.image_format import ImageFormat
from hvmgr.operations.steps import image_steps
from tests.faces.http.conftest import MIB, PATIENCE_S, parse_answer, pattern, raw_of, read_all, settled
from tests.faces.http.test_transfers import PIB, put_head, snapshot_ref, vdi_of

NOBODY = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def world(server, bench):
    """A server, a session, a VM with a full disk and a snapshot."""
    vm = bench.make(bench.image("disk.img"))
    vm.create_snapshot("monday")
    return server, server.login(), vm


EXPORTS = [
    ({"format": "tar"}, 400, "INTERNAL_ERROR"),
    ({"format": "../../etc"}, 400, "INTERNAL_ERROR"),
    ({"vdi": None}, 400, "VDI_MISSING"),
    ({"vdi": NOBODY}, 404, "UUID_INVALID"),
    ({"vdi": f"OpaqueRef:{NOBODY}"}, 404, "HANDLE_INVALID"),
    ({"vdi": "../../etc/passwd"}, 404, "UUID_INVALID"),
    ({"base": NOBODY, "format": "vhd"}, 404, "UUID_INVALID"),
    ({"base": "MONDAY", "format": "raw"}, 400, "INVALID_VALUE"),
    ({"base": "MONDAY", "format": "qcow2"}, 400, "INVALID_VALUE"),
    ({"base": "OTHER", "format": "vhd"}, 400, "INVALID_VALUE"),
    ({"chunked": "true"}, 400, "INTERNAL_ERROR"),
]  # fmt: skip


def test_export(world, bench):
    server, session, vm = world
    other = bench.make(4, name="other")
    for asked, status, code in EXPORTS:
        task = session.xenapi.task.create("export", "")
        words = {"vdi": vdi_of(session, vm, "hda"), **asked}
        if words.get("base") == "MONDAY":
            words["base"] = snapshot_ref(session, "monday")
        elif words.get("base") == "OTHER":
            words["base"] = vdi_of(session, other, "hda")
        words = {name: value for name, value in words.items() if value is not None}
        got = server.curl(server.export_link(session_id=session.handle, task_id=task, **words))
        assert (got.status, got.headers["content-type"]) == (status, "text/plain; charset=utf-8")
        assert got.text.startswith(code)
        record = settled(session, task)
        assert (record["status"], record["error_info"][0]) == ("failure", code)


BEFORE = [
    ({"format": "zip"}, 400, "INTERNAL_ERROR"),
    ({"chunked": "true", "format": "vhd"}, 400, "INTERNAL_ERROR"),
    ({"vdi": None}, 400, "VDI_MISSING"),
    ({"vdi": NOBODY}, 404, "UUID_INVALID"),
    ({"vdi": None, "sr_uuid": NOBODY}, 404, "HANDLE_INVALID"),
    ({"vdi": None, "sr_id": "SR", "format": "vhd"}, 400, "INTERNAL_ERROR"),
    ({"vdi": "MONDAY"}, 409, "OPERATION_NOT_ALLOWED"),
    ({}, 400, "VDI_TOO_SMALL"),
    ({"length": 4 * MIB - 512}, 400, "IMPORT_ERROR_PREMATURE_EOF"),
]  # fmt: skip


def test_import_before_the_answer(world, bench):
    server, session, vm = world
    before = bench.photo(vm)
    for asked, status, code in BEFORE:
        task = session.xenapi.task.create("import", "")
        words = {"vdi": vdi_of(session, vm, "hda"), **asked}
        for name, value in words.items():
            words[name] = {"MONDAY": snapshot_ref(session, "monday"), "SR": server.service.place.sr}.get(value, value)
        words = {name: value for name, value in words.items() if value is not None}
        got = server.talk(put_head(server, session, words.pop("length", 5 * MIB), task_id=task, **words))
        assert got.startswith(b"HTTP/1.1 %d " % status)
        record = settled(session, task)
        assert (record["status"], record["error_info"][0]) == ("failure", code)
    assert bench.photo(vm) == before
    bench.check(vm)


@pytest.mark.parametrize(
    ("length", "data", "words", "code"),
    [
        (4 * MIB, pattern(MIB), {}, "IMPORT_ERROR_PREMATURE_EOF"),
        (4 * MIB, b"", {}, "IMPORT_ERROR_PREMATURE_EOF"),
        (PIB, pattern(MIB), {}, "IMPORT_ERROR_PREMATURE_EOF"),
        (None, pattern(MIB), {}, "IMPORT_ERROR_PREMATURE_EOF"),
        (PIB, b"", {}, "IMPORT_ERROR_PREMATURE_EOF"),
        (4 * MIB, pattern(4 * MIB), {"format": "vhd"}, "IMPORT_ERROR"),
        (MIB, pattern(MIB), {"format": "qcow2"}, "IMPORT_ERROR"),
        (None, bytes(7), {"chunked": "yes"}, "IMPORT_ERROR_PREMATURE_EOF"),
        (None, (5 * MIB).to_bytes(8, "little") + b"\1\0\0\0x", {"chunked": "yes"}, "IMPORT_ERROR"),
    ],
    ids=[
        "cut-off",
        "cut-off-at-once",
        "cut-off-pebibyte",
        "cut-off-unknown",
        "nothing",
        "no-vhd",
        "no-qcow2",
        "half-frame",
        "frame-beyond",
    ],
)
def test_import_after_the_answer(world, bench, length, data, words, code):
    server, session, vm = world
    before = bench.photo(vm)
    task = session.xenapi.task.create("import", "")
    head = put_head(server, session, length, task_id=task, vdi=vdi_of(session, vm, "hda"), **words)
    got = server.talk(head, data, end=True)
    assert got.startswith(b"HTTP/1.1 200 ")
    assert not got.endswith(b"0\r\n\r\n")  # the answer is cut off
    record = settled(session, task)
    assert (record["status"], record["error_info"][0]) == ("failure", code), record
    assert bench.photo(vm) == before
    bench.check(vm)


def test_client_of_http_1_0_sees_that_the_answer_is_cut_off(world, place):
    server, session, vm = world
    (place / "junk").write_bytes(pattern(2 * MIB))
    got = server.put(place / "junk", "-0", session_id=session.handle, vdi=vdi_of(session, vm, "hda"), format="vhd")
    assert got.code != 0


def test_client_that_asks_first_gets_the_true_status(world, place):
    server, session, vm = world
    (place / "junk").write_bytes(pattern(2 * MIB))
    got = server.put(
        place / "junk",
        "-H",
        "Expect: 100-continue",
        session_id=session.handle,
        vdi=vdi_of(session, vm, "hda"),
        format="vhd",
    )
    assert (got.status, got.code) == (400, 0)
    assert got.text.startswith("IMPORT_ERROR")


def test_running_vm_takes_nothing_in_but_goes_out(world, bench):
    server, session, vm = world
    bench.start(vm)
    ref = vdi_of(session, vm, "hda")
    task = session.xenapi.task.create("import", "")
    got = server.talk(put_head(server, session, PIB, task_id=task, vdi=ref))
    assert got.startswith(b"HTTP/1.1 409 ")
    assert settled(session, task)["error_info"][0] == "OPERATION_NOT_ALLOWED"
    monday = snapshot_ref(session, "monday")
    got = server.curl(server.export_link(session_id=session.handle, vdi=ref, base=monday, format="vhd"))
    assert (got.status, got.code, len(got.body)) == (200, 0, int(got.headers["content-length"]))
    server.await_rest()
    vm.stop(force=True)
    assert server.curl(server.export_link(session_id=session.handle, vdi=ref)).body == raw_of(vm)
    server.await_rest()
    bench.check(vm)


def test_export_that_breaks_off_after_its_head_is_short_and_says_why(server, bench, place):
    """Here the file of the disk ends while it is sent. Nothing but its bytes is ever in the body."""
    image = place / "disk.raw"
    image.write_bytes(pattern(MIB) * 24)
    vm = bench.make(bench.in_place(image, format=ImageFormat.RAW))
    session = server.login()
    task = session.xenapi.task.create("export", "")
    words = {"session_id": session.handle, "vdi": vdi_of(session, vm, "hda"), "format": "vhd"}
    whole = server.curl(server.export_link(**words)).body
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(PATIENCE_S)
        one.connect(server.address)
        path = server.export_link(task_id=task, **words).removeprefix(server.url)
        one.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        got = one.recv(1000)
        os.truncate(image, 20 * MIB)  # more than the kernel keeps of a connection lies before that
        got = parse_answer(got + read_all(one))
    assert (got.status, int(got.headers["content-length"])) == (200, len(whole))
    assert len(got.body) < len(whole)
    assert whole[512:].startswith(got.body[512:])  # the first sector has the time
    record = settled(session, task)
    assert (record["status"], record["error_info"][0]) == ("failure", "VDI_IO_ERROR")
    assert f"ends at byte {20 * MIB}" in record["error_info"][1]
    assert server.told("export")[-1]["outcome"] == "VDI_IO_ERROR"


class TestWho:
    def test_nobody(self, world):
        server, session, vm = world
        ref = vdi_of(session, vm, "hda")
        task = session.xenapi.task.create("export", "")
        for words in (
            [],
            ["-u", "anna:wrong"],
            ["-u", "nobody:correct horse"],
            ["-H", "Authorization: Bearer x"],
            ["-b", "session_id=x"],
        ):
            got = server.curl(*words, server.export_link(vdi=ref, task_id=task))
            assert (got.status, got.headers["www-authenticate"]) == (401, 'Basic realm="VDI.export_raw"')
        got = server.talk(
            put_head(server, session, 0, vdi=ref).replace(session.handle.encode()[-9:], b"000000000"), end=True
        )
        assert b"401 Unauthorized" in got
        assert b'Basic realm="VDI.import"' in got
        assert session.xenapi.task.get_status(task) == "pending"

    def test_session_in_a_cookie_or_basic(self, world):
        server, session, vm = world
        ref = vdi_of(session, vm, "hda")
        assert server.curl("-b", f"session_id={session.handle}", server.export_link(vdi=ref)).status == 200
        assert server.curl("-u", "rita:correct horse", server.export_link(vdi=ref)).status == 200

    def test_reader_may_not_import(self, world):
        server, _, vm = world
        session = server.login("rita")
        task = session.xenapi.task.create("import", "")
        got = server.talk(put_head(server, session, PIB, task_id=task, vdi=vdi_of(session, vm, "hda")))
        assert got.startswith(b"HTTP/1.1 403 ")
        assert settled(session, task)["error_info"][0] == "RBAC_PERMISSION_DENIED"

    def test_task_of_another(self, world):
        server, session, vm = world
        other = server.login("rita")
        task = other.xenapi.task.create("mine", "")
        words = {"session_id": session.handle, "vdi": vdi_of(session, vm, "hda")}
        assert server.curl(server.export_link(task_id=task, **words)).status == 403
        assert server.curl(server.export_link(task_id=f"OpaqueRef:{NOBODY}", **words)).status == 404
        assert other.xenapi.task.get_status(task) == "pending"
        own = session.xenapi.task.create("done", "")
        session.xenapi.task.cancel(own)
        assert server.curl(server.export_link(task_id=own, **words)).status == 409
        assert session.xenapi.task.get_status(own) == "cancelled"


def test_disk_beyond_a_vhd_is_refused_before_the_answer(server, bench, place):
    big = place / "big.qcow2"
    bench.run("qemu-img", "create", "-f", "qcow2", big, "2041G")
    vm = bench.make(big)
    session = server.login()
    ref = vdi_of(session, vm, "hda")
    task = session.xenapi.task.create("export", "")
    got = server.curl(server.export_link(session_id=session.handle, task_id=task, vdi=ref, format="vhd"))
    assert got.status == 400
    assert "qcow2" in got.text
    assert "raw" in got.text
    assert settled(session, task)["error_info"][0] == "VDI_TOO_LARGE"


def test_paths_and_methods(server):
    assert server.curl(f"{server.url}/etc/passwd").status == 404
    assert server.curl("--path-as-is", f"{server.url}/export_raw_vdi/../../etc/passwd").status == 404
    refused = server.curl("-X", "DELETE", f"{server.url}/export_raw_vdi")
    assert (refused.status, refused.headers["allow"]) == (405, "GET")
    assert server.curl(f"{server.url}/").status == 405
    assert server.curl(f"{server.url}/export_raw_vdi?vdi=a&vdi=b").status == 400


def test_no_space(world, monkeypatch, place):
    """Forced here; that a full disk says so is the business of the operations' own tests."""
    server, session, vm = world

    def full(_target, source, *_, **__):
        source.read(1)
        raise errors.NoSpace("no space left", hint="free some")

    monkeypatch.setattr(server.service.disks, "take_in", full)
    (place / "new").write_bytes(pattern(4 * MIB))
    task = session.xenapi.task.create("import", "")
    words = {"session_id": session.handle, "vdi": vdi_of(session, vm, "hda"), "task_id": task}
    got = server.put(place / "new", "-H", "Expect: 100-continue", **words)
    assert (got.status, got.text) == (507, "SR_FULL: no space left (free some)\n")
    assert settled(session, task)["error_info"] == ["SR_FULL", "no space left (free some)"]


def test_new_disk_that_cannot_be_taken_back_hides_no_failure(server, monkeypatch):
    session = server.login()

    def refuse(_):
        raise errors.HostFailed("no way back")

    monkeypatch.setattr(server.service.disks, "destroy", refuse)
    task = session.xenapi.task.create("import", "")
    head = put_head(server, session, MIB, task_id=task, sr_id=server.service.place.sr)
    server.talk(head, bytes(1000), end=True)
    assert settled(session, task)["error_info"][0] == "IMPORT_ERROR_PREMATURE_EOF"
    assert "no way back" in server.told("VDI.destroy")[0]["outcome"]


class Died(BaseException):
    """The process ends here."""


def test_merge_that_has_to_wait_is_no_failure_of_what_was_done(world, bench, monkeypatch):
    server, session, vm = world
    ref, new = vdi_of(session, vm, "hda"), pattern(4 * MIB)
    alone = session.xenapi.VDI.snapshot(ref)
    assert server.put(pattern(4 * MIB, 2), session_id=session.handle, vdi=ref).code == 0

    def fail(patched, error):
        def act(*_, **__):
            raise error

        for name in ("_stream", "_commit"):
            patched.setattr(image_steps, name, act)

    with monkeypatch.context() as patched:
        fail(patched, errors.NoSpace("no space left"))
        task = session.xenapi.task.create("import", "")
        assert server.put(new, session_id=session.handle, vdi=ref, task_id=task).code == 0
        assert settled(session, task)["status"] == "success"
        assert raw_of(vm) == new
        (told,) = server.told("merge")
        assert "images wait to be merged (no space left)" in told["outcome"]
    assert bench.host.vm(vm.name).merge()
    with monkeypatch.context() as patched:
        fail(patched, Died())
        with pytest.raises(Died):
            bench.host.disks.receive(ref.removeprefix("OpaqueRef:"), io.BytesIO(new), length=len(new))
        fail(patched, errors.NoSpace("no space left"))  # for the dead command's merge: what is asked for is not begun
        with pytest.raises(errors.NoSpace, match="images wait to be merged") as caught:
            bench.host.disks.destroy(alone.removeprefix("OpaqueRef:"))
        assert not failure.is_done(caught.value)
    assert alone in session.xenapi.VDI.get_all()
    session.xenapi.VDI.destroy(alone)
    bench.check(vm)


def test_disk_that_another_command_works_on(world, bench):
    server, session, vm = world
    ref = vdi_of(session, vm, "hda")
    server.service.disks._wait_s = 0
    task = session.xenapi.task.create("export", "")
    with bench.host.vm(vm.name).home.locked(wait_s=60):
        got = server.curl(server.export_link(session_id=session.handle, vdi=ref, task_id=task))
    assert (got.status, got.text.partition(":")[0]) == (409, "VDI_IN_USE")
    assert settled(session, task)["error_info"][0] == "VDI_IN_USE"


def test_defect_is_told_to_the_log_alone(world, monkeypatch):
    server, session, vm = world
    task = session.xenapi.task.create("export", "")
    words = {"session_id": session.handle, "vdi": vdi_of(session, vm, "hda"), "task_id": task}
    monkeypatch.setattr(server.service.disks, "exported", lambda *_: 1 / 0)
    got = server.curl(server.export_link(**words))
    assert got.status == 500
    assert "division" not in got.text
    assert "division" in server.told("defect")[0]["error"]
    assert settled(session, task)["error_info"][0] == "INTERNAL_ERROR"
