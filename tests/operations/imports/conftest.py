"""Sources to import from: copies of homes, and exports with their manifests, beside a host that is empty again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import hvmgr
from hvmgr.model import manifest
from hvmgr.model.metadata import SavedState
from hvmgr.storage import copy, source_home
from tests.operations.rules.conftest import Bench, place, run  # noqa: F401 - a fixture


class Exchange(Bench):
    """A host whose VMs go away as folders and come back."""

    def take_away(self, vm, name=None, *, export=True):
        """The VM as a folder elsewhere, the VM itself gone from the host: what an export leaves."""
        folder = self.copy(vm, name)
        vm.delete(with_disks=True)
        if export:
            self.make_export(folder)
        return folder

    def copy(self, vm, name=None):
        """The home as somebody copies it by hand."""
        folder = self.place / "exports" / (name or vm.name)
        folder.parent.mkdir(exist_ok=True, mode=0o711)
        folder.parent.chmod(0o711)
        run("cp", "-a", vm.path, folder)
        shutil.rmtree(folder / ".hvmgr")
        return folder

    def make_export(self, folder):
        """A manifest and sums beside it, and nothing that can be written."""
        source = source_home.open_source(folder)
        facts = source.facts
        (folder / manifest.FILE).write_text(self.manifest(source).to_yaml())
        (folder / manifest.SUMS).write_text("")
        for path in [*folder.rglob("*"), folder]:
            path.chmod(0o551 if path.is_dir() else 0o444)
        assert facts is not None
        return folder

    def manifest(self, source):
        def inside(path):
            return str(Path(path).relative_to(source.folder))

        listed = tuple(
            manifest.Image(
                file=inside(one.path), format=one.format, size=one.size, bytes=one.length, path=one.recorded,
                parent=None if one.parent is None else inside(one.parent),
                sha256=copy.sha256(Path(one.path)),
            )
            for one in source.images.values()
        )  # fmt: skip
        return manifest.Manifest(
            vm_id=source.vm_id, name=source.present.name, home=str(source.recorded_home), created=source.facts.created,
            source=manifest.Source(hvmgr="0.1.0", libvirt="9.0.0", qemu="7.2.0", uri="qemu:///system"),
            options=manifest.Used(), state=SavedState.NONE, images=listed,
        )  # fmt: skip

    def bring(self, source, **options):
        """The VM that an import of it makes."""
        return self.host.import_vm(source, hvmgr.ImportOptions(**options))

    def codes(self, source, **options):
        """What a comparison finds, information aside."""
        found = self.host.plan_import(source, hvmgr.ImportOptions(**options)).check()
        return [one.code for one in found if one.severity != "info"]

    def states(self):
        """Everything that a failed import must leave as it was: files, domains, index."""
        files = {
            path: (path.lstat().st_mode, None if path.is_dir() else path.lstat().st_mtime_ns)
            for path in self.place.rglob("*")
            if path.name != "lock"
        }
        return files, [domain.name for domain in self.host.connection.domains()]

    def tree(self, vm):
        """Names, parents and states of all snapshots, and the parent of the present."""
        names = {one.id: one.name for one in vm.snapshots()} | {None: None}
        return {one.name: (names[one.parent], str(one.state)) for one in vm.snapshots()}, names[vm.now().parent]


@pytest.fixture
def bench(connection, place):  # noqa: F811
    """A host without VMs, and a folder for exports."""
    bench = Exchange(place, connection.uri)
    yield bench
    for host in bench.hosts:
        host.close()


def branch(bench, vm):
    """one < two < three, and one < left < now; each with bytes of its own."""
    for number, name in enumerate(("one", "two", "three"), 1):
        bench.write(vm, 0x10 * number, number << 16)
        vm.create_snapshot(name, notes=f"the {name}")
    vm.snapshot("one").apply()
    bench.write(vm, 0x77, 1 << 20)
    vm.create_snapshot("left")
    bench.write(vm, 0x88, 2 << 20)
    return vm


@pytest.fixture
def branched(bench):
    """A VM with a forked tree."""
    return bench.kept(forked_tree)


def forked_tree(bench):
    return branch(bench, bench.make(4, name="web"))
