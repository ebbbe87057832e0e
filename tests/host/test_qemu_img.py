"""qemu-img's answers as values."""

from __future__ import annotations

import pytest

from hvmgr import errors
from hvmgr.host import process, qemu_errors, qemu_img, storage_daemon

MIB = 1 << 20
CLUSTER = 64 << 10


def qemu(*argv):
    return process.run(argv, timeout_s=60)


def write(path, *commands, fmt="qcow2"):
    qemu("qemu-io", "-f", fmt, *(word for command in commands for word in ("-c", command)), path)


@pytest.fixture
def chain(tmp_path):
    """A 4 MiB base with data in its first MiB, and a child with zeros and data of its own."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "4M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    write(tmp_path / "base.qcow2", "write -P 1 0 1M")
    write(tmp_path / "top.qcow2", "write -z 512k 64k", "write -P 2 2M 64k")
    return tmp_path / "top.qcow2"


def test_info_of_a_child(chain):
    info = qemu_img.info(chain, "qcow2")
    assert (info.path, info.fmt, info.size, info.cluster_size) == (chain, "qcow2", 4 * MIB, CLUSTER)
    assert (info.backing_name, info.backing_fmt) == ("base.qcow2", "qcow2")
    assert info.backing_full == str(chain.with_name("base.qcow2"))
    assert 0 < info.allocated < MIB
    assert not (info.is_corrupt)
    assert not (info.is_dirty)
    assert not (info.is_encrypted)
    assert not (info.data_file)
    assert info.internal_snapshots == info.bitmaps == ()


def test_info_needs_no_parent(chain):
    chain.with_name("base.qcow2").unlink()
    assert qemu_img.info(chain, "qcow2").backing_name == "base.qcow2"


def test_info_shows_what_strangers_may_hide(tmp_path):
    path = tmp_path / "x.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/bytes", path, "1M")
    assert qemu_img.info(path, "qcow2").data_file == f"{tmp_path}/bytes"


def test_info_shows_internal_snapshots_and_bitmaps(tmp_path):
    path = tmp_path / "x.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    qemu("qemu-img", "snapshot", "-c", "inner", path)
    qemu("qemu-img", "bitmap", "--add", path, "marks")
    info = qemu_img.info(path, "qcow2")
    assert (info.internal_snapshots, info.bitmaps) == (("inner",), ("marks",))


def test_info_of_raw_has_no_header(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    info = qemu_img.info(tmp_path / "disk", "raw")
    assert (info.fmt, info.size, info.cluster_size, info.backing_name) == ("raw", MIB, None, None)


def test_raw_that_looks_like_qcow2_stays_raw(chain):
    assert qemu_img.info(chain, "raw").backing_name is None


def test_map_of_a_chain(chain):
    extents = qemu_img.map(chain, "qcow2")
    assert [e.start for e in extents] == [0, *[e.start + e.length for e in extents[:-1]]][: len(extents)]
    assert extents[-1].start + extents[-1].length == 4 * MIB
    by_start = {e.start: e for e in extents}
    data, zeros, hole = by_start[0], by_start[512 << 10], by_start[MIB]
    assert (data.length, data.depth, data.present, data.data) == (512 << 10, 1, True, True)
    assert chain.with_name("base.qcow2").read_bytes()[data.offset : data.offset + 4] == b"\1\1\1\1"
    assert (zeros.length, zeros.depth, zeros.zero, zeros.data, zeros.offset) == (CLUSTER, 0, True, False, None)
    assert (hole.present, hole.zero, hole.data) == (False, True, False)
    own = by_start[2 * MIB]
    assert own.depth == 0
    assert chain.read_bytes()[own.offset : own.offset + 4] == b"\2\2\2\2"


def test_check_of_a_sound_image(chain):
    result = qemu_img.check(chain, "qcow2")
    assert result.is_sound
    assert (result.corruptions, result.leaks, result.end_offset) == (0, 0, chain.stat().st_size)


def test_check_finds_corruption(chain):
    base = chain.with_name("base.qcow2")
    data = bytearray(base.read_bytes())
    offset = qemu_img.map(base, "qcow2")[0].offset
    entry = data.index((offset | 1 << 63).to_bytes(8, "big"))
    data[entry + 8 : entry + 16] = data[entry : entry + 8]  # two clusters in one place
    base.write_bytes(data)
    result = qemu_img.check(base, "qcow2")
    assert result.corruptions
    assert not result.is_sound


def test_check_repairs_leaks(chain):
    data = bytearray(chain.read_bytes())
    own = next(e for e in qemu_img.map(chain, "qcow2") if e.start == 2 * MIB)
    entry = data.index((own.offset | 1 << 63).to_bytes(8, "big"))
    data[entry : entry + 8] = bytes(8)
    chain.write_bytes(data)
    assert (qemu_img.check(chain, "qcow2").leaks, qemu_img.check(chain, "qcow2").is_sound) == (1, True)
    assert qemu_img.check(chain, "qcow2", repair_leaks=True).leaks_fixed == 1
    assert qemu_img.check(chain, "qcow2").leaks == 0


def test_check_of_raw_is_unsupported(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with pytest.raises(errors.Unsupported):
        qemu_img.check(tmp_path / "disk", "raw")


def test_measure_counts_the_chain(chain):
    measure = qemu_img.measure(chain, "qcow2", target="qcow2")
    assert MIB < measure.required < 2 * MIB < 4 * MIB < measure.fully_allocated
    assert qemu_img.measure(chain, "qcow2", target="raw").fully_allocated == 4 * MIB


VERBS = {
    "info": lambda path: qemu_img.info(path, "qcow2"),
    "map": lambda path: qemu_img.map(path, "qcow2"),
    "check": lambda path: qemu_img.check(path, "qcow2"),
    "measure": lambda path: qemu_img.measure(path, "qcow2", target="raw"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
class TestRefusals:
    def test_missing(self, verb, tmp_path):
        with pytest.raises(errors.NotFound, match=r"gone\.qcow2"):
            verb(tmp_path / "gone.qcow2")

    def test_another_format(self, verb, tmp_path):
        (tmp_path / "x.qcow2").write_bytes(b"no image at all" * 100)
        with pytest.raises(errors.Corrupt):
            verb(tmp_path / "x.qcow2")

    def test_nonsense_in_the_header(self, verb, chain):
        with chain.open("r+b") as file:
            file.seek(36)  # l1_size
            file.write(b"\xff\xff\xff\xff")
        with pytest.raises(errors.Corrupt):
            verb(chain)

    def test_name_that_sounds_like_a_failure(self, verb, tmp_path):
        with pytest.raises(errors.NotFound):
            verb(tmp_path / "corrupt, not supported: No space left on device.qcow2")

    def test_parent_in_use(self, verb, chain):
        base = chain.with_name("base.qcow2")
        with storage_daemon.started() as daemon:
            daemon.open(base, "qcow2", writable=True)
            if verb in (VERBS["info"], VERBS["check"]):
                verb(chain)  # these open no parent
                return
            with pytest.raises(errors.Conflict) as caught:
                verb(chain)
        assert (caught.value.facts["path"], caught.value.facts["pids"]) == (str(base), [daemon.pid])

    def test_folder(self, verb, tmp_path):
        with pytest.raises(errors.HvmgrError):
            verb(tmp_path)

    def test_in_use(self, verb, chain):
        with storage_daemon.started() as daemon:
            daemon.open(chain, "qcow2", writable=True)
            with pytest.raises(errors.Conflict) as caught:
                verb(chain)
        assert caught.value.facts["pids"] == [daemon.pid]


def test_force_share_reads_an_image_in_use(chain):
    with storage_daemon.started() as daemon:
        daemon.open(chain, "qcow2", writable=True)
        assert qemu_img.info(chain, "qcow2", force_share=True).size == 4 * MIB
        assert qemu_img.map(chain, "qcow2", force_share=True)


@pytest.mark.parametrize("name", ["-x.qcow2", "nbd:x.qcow2", "json:{}.qcow2", "a b'c.qcow2"])
def test_odd_names_are_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with storage_daemon.started() as daemon:
        daemon.create_qcow2(tmp_path / name, size=MIB, backing=None)
    relative = (tmp_path / name).relative_to(tmp_path)
    assert qemu_img.info(relative, "qcow2").size == MIB


def test_holders_of_a_file_nobody_has(tmp_path):
    assert qemu_errors.holders_of(tmp_path / "none") == []
    (tmp_path / "file").touch()
    assert qemu_errors.holders_of(tmp_path / "file") == []
