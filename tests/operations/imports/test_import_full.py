"""Imports onto a file system that becomes full in the middle: a sentence, and nothing left."""

from __future__ import annotations

import os

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.operations.exchange import compare_place
from tests.storage.conftest import mounted

MIB = 1 << 20


@pytest.fixture
def small(require, require_program):
    with mounted("ext4", 16 * MIB, require, require_program) as folder:
        folder.chmod(0o711)
        yield folder


@pytest.fixture(params=["folder", "vhd", "archive"])
def source(request, bench):
    """An export of 24 MiB that nothing compresses; its VM is gone."""
    path = bench.place / "large.raw"
    path.write_bytes(os.urandom(12 * MIB))
    vm = bench.make(path)
    vm.create_snapshot("one")
    bench.run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 12M", vm.now().disks["hda"])
    if request.param in ("folder", "vhd"):
        fmt = hvmgr.ImageFormat.VHD if request.param == "vhd" else None
        made = vm.export(bench.place / "out", hvmgr.ExportOptions(format=fmt))
    else:
        made = bench.place / "web.tar.zst"
        vm.export_archive(made)
    vm.delete(with_disks=True)
    return made


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lost+found")


def test_too_little_space_is_said_before(bench, source, small):
    assert bench.codes(source, vm_path=small) == ["no-space"]
    with pytest.raises(errors.NoSpace) as caught:
        bench.bring(source, vm_path=small)
    assert caught.value.exit_code == 7
    assert left(small) == []


@pytest.mark.parametrize("root", ["vm_path", "disk_path"])
def test_disk_that_becomes_full_leaves_nothing(bench, source, small, monkeypatch, root):
    monkeypatch.setattr(compare_place, "_space_findings", lambda _comparison: iter(()))
    (small / "more").write_bytes(bytes(6 * MIB))
    before = bench.states()
    with pytest.raises(errors.NoSpace, match=f"no space left for '?{small}") as caught:
        bench.bring(source, **{root: small})
    assert caught.value.exit_code == 7
    assert "free space" in caught.value.hint
    assert left(small) == ["more"]
    assert bench.states() == before
    assert bench.host.vms() == []
    (small / "more").unlink()
    if root == "disk_path":
        vm = bench.bring(source, **{root: small})
        bench.check(vm)
        vm.delete(with_disks=True)


@pytest.mark.parametrize("source", ["archive"], indirect=True)
def test_what_an_archive_shows_needs_little(bench, small, source, monkeypatch):
    monkeypatch.setenv("HVMGR_INDEX", str(small / "index"))
    (small / "more").write_bytes(bytes(9 * MIB))
    assert bench.host.verify(source) == []
    bench.host.close()
