"""Exports of VMs on the embedded driver, and everything that must hold of them and of their source."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import hvmgr
from hvmgr.model import manifest
from hvmgr.storage import source_home
from tests.operations.rules.conftest import Bench, bytes_of, place, run  # noqa: F401 - a fixture


class Exporting(Bench):
    """A host whose VMs are exported to ``out``."""

    @property
    def out(self):
        return self.place / "out"

    def export(self, vm, dest=None, **options):
        return vm.export(dest or self.out, hvmgr.ExportOptions(**options))

    def look(self, folder):
        """The export as an import reads it; nothing may be wrong or missing in it."""
        source = source_home.open_source(folder)
        assert source.problems == ()
        assert source.missing == ()
        return source

    def told(self, folder):
        return manifest.parse((folder / manifest.FILE).read_text(), source=manifest.FILE)

    def photo_of_export(self, folder):
        """What the guest would see of every disk of every snapshot and of now, by the export alone."""
        source = self.look(folder)
        seen = {}
        for one in source.snapshots:
            for slot, path in one.disks.items():
                seen[f"{one.record.name} {slot}"] = bytes_of(path, source.images[path].format)
        for slot, path in source.disks.items():
            seen[f"now {slot}"] = bytes_of(path, source.images[path].format)
        return seen

    def check_export(self, folder):
        """Complete, closed, read-only, true to its sums and to its manifest; nothing is left beside it."""
        assert sums_agree(folder)
        assert self.host.verify(folder) == []
        told, source = self.told(folder), self.look(folder)
        listed = {line[66:] for line in (folder / manifest.SUMS).read_text().splitlines()}
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert listed == files - {manifest.SUMS}
        for path in [folder, *folder.rglob("*")]:
            assert path.stat().st_mode & 0o777 == (0o550 if path.is_dir() else 0o440), path
        assert {image.file for image in told.images} == {str(Path(one).relative_to(folder)) for one in source.images}
        for image in told.images:
            assert (folder / image.file).stat().st_size == image.bytes
        assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
        assert not (folder / ".hvmgr").exists()


def sums_agree(folder):
    done = subprocess.run(
        ["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"],
        cwd=folder,
        check=False,
        capture_output=True,
        timeout=60,
    )
    return done.returncode == 0


def tree_of(vm):
    """Every file of a home with its bytes' hash, size, inode and time: a source is only read."""
    from tests.operations.rules.conftest import file_of

    return {
        path: file_of(path) for path in vm.path.rglob("*") if path.is_file() and path.name not in ("lock", "daemon")
    }


@pytest.fixture
def bench(connection, place):  # noqa: F811
    """A host without VMs."""
    bench = Exporting(place, connection.uri)
    yield bench
    for host in bench.hosts:
        host.close()


@pytest.fixture
def untouched():
    """``untouched(vm)``: a value that is equal as long as nobody changed a file of the home."""
    return tree_of


@pytest.fixture
def branched(bench):
    """one < two < three, and one < left < now; each with bytes of its own."""
    return bench.kept(branch)


def branch(bench):
    vm = bench.make(4, name="web")
    for number, name in enumerate(("one", "two", "three"), 1):
        bench.write(vm, 0x10 * number, number << 16)
        vm.create_snapshot(name, notes=f"the {name}")
    vm.snapshot("one").apply()
    bench.write(vm, 0x77, 1 << 20)
    vm.create_snapshot("left")
    bench.write(vm, 0x88, 2 << 20)
    return vm
