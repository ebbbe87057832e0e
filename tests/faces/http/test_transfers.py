"""Whole disks and deltas in and out, by clients that know nothing of hvmgr, byte for byte."""

from __future__ import annotations

import pytest

from tests.faces.http.conftest import MIB, pattern, raw_of, settled

SIZE = 4 * MIB


@pytest.fixture
def vm(bench):
    """A VM that is off, with a qcow2, a raw and a VHD disk of 4 MiB each, not all zeros."""
    images = [bench.image(f"{fmt}.img", fmt=fmt) for fmt in ("qcow2", "raw")]
    images.append(bench.image("vhd.vhd", fmt="vpc", options="subformat=dynamic,force_size=on"))
    return bench.make(*images)


def vdi_of(session, vm, slot):
    """The reference of a present disk."""
    (found,) = [
        ref for ref, one in session.xenapi.VDI.get_all_records().items() if one["name_label"] == f"{vm.name} {slot}"
    ]
    return found


@pytest.mark.parametrize("number", [0, 1, 2], ids=["qcow2", "raw", "vhd"])
def test_disk_goes_out_and_comes_back(server, vm, number, place):
    session = server.login()
    slot = sorted(vm.now().disks)[number]
    ref = vdi_of(session, vm, slot)
    before = raw_of(vm, slot)
    for fmt in ("raw", "vhd", "qcow2"):
        task = session.xenapi.task.create("export", "")
        got = server.curl(server.export_link(session_id=session.handle, task_id=task, vdi=ref, format=fmt))
        assert (got.status, got.code, int(got.headers["content-length"])) == (200, 0, len(got.body))
        assert settled(session, task)["status"] == "success"
        (place / "out").write_bytes(got.body)
        task = session.xenapi.task.create("import", "")
        sent = server.put(place / "out", session_id=session.handle, task_id=task, vdi=ref, format=fmt)
        assert (sent.status, sent.code) == (200, 0)
        record = settled(session, task)
        assert (record["status"], record["progress"]) == ("success", 1.0)
        assert record["result"] == f"<value>{ref}</value>"
        assert raw_of(vm, slot) == before
    new = pattern(SIZE)
    assert server.put(new, vdi=ref, session_id=session.handle).status == 200
    assert raw_of(vm, slot) == new


def test_delta_between_snapshots_restores_the_bytes(server, bench, vm, place):
    session = server.login()
    vm.create_snapshot("monday")
    bench.write(vm, 8, 3 * MIB)
    vm.create_snapshot("tuesday")
    monday, tuesday = (snapshot_ref(session, name) for name in ("monday", "tuesday"))
    full = server.curl(server.export_link(session_id=session.handle, vdi=monday, format="vhd"))
    delta = server.curl(server.export_link(session_id=session.handle, vdi=tuesday, base=monday, format="VHD"))
    assert (full.status, delta.status) == (200, 200)
    assert 2 * MIB < len(delta.body) < 2 * MIB + 8192  # one block of a VHD
    other = bench.make(4, name="other")
    target = vdi_of(session, other, "hda")
    refused = server.put(delta.body, session_id=session.handle, vdi=target, format="vhd")
    assert (refused.status, refused.text.partition(":")[0]) == (409, "VDI_CONTENT_ID_MISSING")  # a delta on nothing
    early = server.put(delta.body, "-H", "Expect:", session_id=session.handle, vdi=target, format="vhd")
    assert early.status == 200
    assert early.code in {18, 56}  # curl: the answer is cut off
    for stream in (full.body, delta.body):
        assert server.put(stream, session_id=session.handle, vdi=target, format="vhd").code == 0
    assert raw_of(other) == raw_of(vm, "hda", "tuesday")


def snapshot_ref(session, name):
    """The reference of disk hda in a snapshot."""
    (found,) = [
        ref
        for ref, one in session.xenapi.VDI.get_all_records().items()
        if one["is_a_snapshot"] and name in one["name_label"] and "hda" in one["name_description"]
    ]
    return found


@pytest.mark.parametrize("words", [["-H", "Expect:"], ["-H", "Expect: 100-continue"], ["-0"], ["-H", "Transfer-Encoding: chunked"]],
                         ids=["early-answer", "asked-first", "http-1.0", "chunked"])  # fmt: skip
def test_upload_in_every_way_that_curl_knows(server, bench, place, words):
    vm = bench.make(4)
    session = server.login()
    (place / "new").write_bytes(pattern(SIZE))
    task = session.xenapi.task.create("import", "")
    ref = vdi_of(session, vm, "hda")
    got = server.put(place / "new", *words, session_id=session.handle, task_id=task, vdi=ref)
    assert (got.status, got.code, got.headers["task-id"]) == (200, 0, task)
    assert settled(session, task)["status"] == "success"
    assert raw_of(vm) == (place / "new").read_bytes()


def put_head(server, session, length, **parameters):
    """The head of an upload, as a client that waits for the status before it sends data."""
    path = server.import_link(session_id=session.handle, **parameters).removeprefix(server.url)
    lines = [f"PUT {path} HTTP/1.1", "Host: h"] + ([] if length is None else [f"Content-Length: {length}"])
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


PIB = 1 << 50


@pytest.mark.parametrize("fmt", ["raw", "vhd"])
@pytest.mark.parametrize("length", [None, PIB], ids=["no-length", "a-pebibyte"])
def test_length_need_not_be_known(server, bench, vm, fmt, length):
    session = server.login()
    target = vdi_of(session, bench.make(4, name="other"), "hda")
    data = server.curl(server.export_link(session_id=session.handle, vdi=vdi_of(session, vm, "hdb"), format=fmt)).body
    task = session.xenapi.task.create("import", "")
    with server.connected() as one:
        one.sendall(put_head(server, session, length, vdi=target, task_id=task, format=fmt))
        assert one.recv(4096).startswith(b"HTTP/1.1 200 ")  # before a byte of data, as xe wants it
        one.sendall(data)
        assert settled(session, task)["status"] == "success"  # the connection is still open
        assert one.recv(4096).startswith(b"0\r\n")  # the end of the answer
    other = bench.host.vm("other")
    assert raw_of(other) == raw_of(vm, "hdb")


@pytest.mark.parametrize("length", [0, PIB])
def test_probe_is_told_that_all_is_well_and_changes_nothing(server, bench, vm, length):
    session = server.login()
    before = {path: bench.file_of(path) for path in vm.now().disks.values()}
    with server.connected() as one:
        one.sendall(put_head(server, session, length, vdi=vdi_of(session, vm, "hda"), format="vhd"))
        assert one.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert {path: bench.file_of(path) for path in vm.now().disks.values()} == before
    bench.check(vm)


def test_range_of_a_raw_disk(server, vm):
    session = server.login()
    link = server.export_link(session_id=session.handle, vdi=vdi_of(session, vm, "hda"))
    whole = server.curl(link)
    assert whole.headers["accept-ranges"] == "bytes"
    for word, start, end in (
        ("0-0", 0, 1),
        ("4000-70000", 4000, 70001),
        (f"{SIZE - 5}-", SIZE - 5, SIZE),
        ("-7", SIZE - 7, SIZE),
    ):
        part = server.curl("-r", word, link)
        assert (part.status, part.body) == (206, whole.body[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert server.curl("-r", f"{SIZE}-", link).status == 416
    vhd = server.curl("-r", "0-99", link + "&format=vhd")
    assert (vhd.status, "accept-ranges" in vhd.headers) == (200, False)


def test_new_disk_out_of_an_upload(server, place):
    session = server.login()
    pool = session.xenapi.pool.get_all()[0]
    sr = session.xenapi.pool.get_default_SR(pool)
    (place / "new").write_bytes(pattern(MIB))
    task = session.xenapi.task.create("import", "")
    assert server.put(place / "new", session_id=session.handle, task_id=task, sr_id=sr).code == 0
    ref = settled(session, task)["result"].removeprefix("<value>").removesuffix("</value>")
    assert session.xenapi.VDI.get_name_label(ref) == "Imported VDI"
    assert server.curl(server.export_link(session_id=session.handle, vdi=ref)).body == (place / "new").read_bytes()


def test_frames_are_the_disk_with_zeros_between_them(server, bench, vm):
    session = server.login()
    pieces = {0: pattern(MIB // 2), 2 * MIB: pattern(MIB, 2), SIZE - 512: b"z" * 512}
    data = b"".join(at.to_bytes(8, "little") + len(piece).to_bytes(4, "little") + piece for at, piece in pieces.items())
    expected = bytearray(SIZE)
    for at, piece in pieces.items():
        expected[at : at + len(piece)] = piece
    task = session.xenapi.task.create("import", "")
    words = {"session_id": session.handle, "vdi": vdi_of(session, vm, min(vm.now().disks)), "task_id": task}
    assert server.put(data + bytes(12), **words, chunked="true").code == 0
    assert settled(session, task)["status"] == "success"
    assert raw_of(vm, min(vm.now().disks)) == bytes(expected)
