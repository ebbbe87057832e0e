"""A VM that is off, on the embedded driver, to be damaged and looked at; the bench is that of the rules."""

from __future__ import annotations

import pytest

import hvmgr
from tests.operations.rules import conftest as rules

MIB = 1 << 20


class Bench(rules.Bench):
    """One host, how its VMs look, and what doctor says of them."""

    def find(self, vm=None, **wishes):
        """What is found about a VM (a VM, a name or a folder), or about everything."""
        return self.host.doctor(None if vm is None else str(getattr(vm, "path", vm)), **wishes)

    def codes(self, vm=None, **wishes):
        """The codes of errors and warnings, of a VM or of everything but the machine that runs the tests."""
        found = [one for one in self.find(vm, **wishes) if one.severity != "info"]
        return {str(one.code) for one in found} - {"kvm-closed", "apparmor-commit", "version-old"}

    def one(self, code, vm=None, **wishes):
        """The one finding with this code."""
        found = [one for one in self.find(vm, **wishes) if one.code == code]
        assert len(found) == 1, found
        return found[0]

    def repair(self, vm=None, **wishes):
        """The codes of what was put right; nothing may fail."""
        done = self.host.repair(None if vm is None else str(getattr(vm, "path", vm)), **wishes)
        assert [one for one in done if one.failure] == []
        return [str(one.finding.code) for one in done]

    def would(self, vm=None, **wishes):
        """What a dry run says it would put right; it must not change a byte."""
        reporter = hvmgr.Reporter(dry_run=True)
        before = files_of(self.place)
        with hvmgr.Host.open(self.uri, root=self.host.root, wait_s=1, reporter=reporter) as host:
            done = host.repair(None if vm is None else str(getattr(vm, "path", vm)), **wishes)
        assert files_of(self.place) == before
        return [str(one.finding.code) for one in done]

    def healthy(self, vm):
        """Nothing is found, and everything holds that holds between two commands."""
        assert self.codes() == set()
        assert self.codes(vm, thorough=True) == set()
        self.check(vm)


def files_of(folder):
    """Every file below a folder: name, mode, bytes."""
    return {
        path: (path.lstat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != "lock"
    }


@pytest.fixture
def place():
    """A folder that QEMU's user can pass."""
    yield from rules.place.__wrapped__()


@pytest.fixture
def bench(connection, place):
    """A host without VMs."""
    bench = Bench(place, connection.uri)
    yield bench
    for host in bench.hosts:
        host.close()


@pytest.fixture
def vm(bench):
    """Two disks, two snapshots (a, then b below it), each with bytes of its own."""
    return bench.kept(two_disks)


def two_disks(bench):
    vm = bench.make(4, 4)
    bench.write(vm, 1)
    bench.write(vm, 2, slot="hdb")
    vm.create_snapshot("a")
    bench.write(vm, 3, MIB)
    vm.create_snapshot("b")
    bench.write(vm, 4, 2 * MIB)
    bench.write(vm, 5, 2 * MIB, slot="hdb")
    return vm
