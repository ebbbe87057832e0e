"""Where exports go: disks that are full, file systems that share blocks, and users who change their mind."""

from __future__ import annotations

import os
import signal

import pytest

from hvmgr import errors
from hvmgr.model.manifest import Extent
from hvmgr.operations.exchange import export_
from hvmgr.operations.exchange.export_steps import Exporter
from tests.storage.conftest import mounted

MIB = 1 << 20


@pytest.fixture
def large(bench):
    """A VM with 24 MiB of data that nothing compresses, and a snapshot."""
    path = bench.place / "large.raw"
    path.write_bytes(os.urandom(12 * MIB))
    vm = bench.make(path)
    vm.create_snapshot("one")
    bench.run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 12M", vm.now().disks["hda"])
    return vm


@pytest.fixture
def small(require, require_program):
    with mounted("ext4", 16 * MIB, require, require_program) as folder:
        yield folder


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lost+found")


def test_too_little_space_is_said_before_anything_is_made(bench, large, small):
    with pytest.raises(errors.NoSpace, match="the export needs"):
        bench.export(large, small)
    assert left(small) == []


@pytest.mark.parametrize("options", [{}, {"snapshots": Extent.NONE}], ids=["tree", "flat"])
def test_disk_that_becomes_full_leaves_no_export(bench, large, small, monkeypatch, options, untouched):
    monkeypatch.setattr(export_, "require_space", lambda *_, **__: None)
    (small / "more").write_bytes(bytes(6 * MIB))
    files = untouched(large)
    with pytest.raises(errors.NoSpace, match="no space left"):
        bench.export(large, small, **options)
    assert left(small) in (["more"], [".web.hvmgr-export", "more"])
    assert untouched(large) == files
    bench.check(large)
    (small / "more").unlink()
    bench.check(large)


def test_blocks_are_shared_where_that_can_be(bench, require, require_program):
    with mounted("xfs", 320 * MIB, require, require_program) as folder:
        folder.chmod(0o711)
        path = folder / "big.raw"
        path.write_bytes(os.urandom(60 * MIB))
        vm = bench.make(bench.in_place(path))
        vm.create_snapshot("one")
        os.sync()
        before = os.statvfs(folder).f_bavail
        made = bench.export(vm, folder / "out")
        os.sync()
        taken = (before - os.statvfs(folder).f_bavail) * os.statvfs(folder).f_frsize
        assert taken < 8 * MIB
        bench.check_export(made)
        vm.delete()


def test_user_who_stops_it_can_go_on(bench, large, monkeypatch):
    with monkeypatch.context() as patch:
        real = Exporter._manifest

        def stop(self, step):
            os.kill(os.getpid(), signal.SIGINT)
            self._tell(0)
            real(self, step)

        acts = {kind: stop if act is real else act for kind, act in Exporter._acts.items()}
        patch.setattr(Exporter, "_acts", acts)
        with pytest.raises(errors.Cancelled) as caught:
            bench.export(large)
    assert "run the same command again" in caught.value.hint
    assert left(bench.out) == [".web.hvmgr-export"]
    bench.check(large)
    folder = bench.export(large)
    bench.check_export(folder)
