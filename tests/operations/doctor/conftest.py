"""A VM that is off, on the embedded driver, to be damaged and looked at; the bench is that of the rules."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.operations.rules import conftest as rules


@pytest.fixture
def place():
    """A folder that QEMU's user can pass."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


class Bench(rules.Bench):
    """One host, how its VMs look, and what doctor says of them."""

    def codes(self, vm=None, **wishes):
        """The codes of what is found about a VM (a name or a home), errors and warnings only."""
        found = self.host.doctor(None if vm is None else str(getattr(vm, "path", vm)), **wishes)
        return sorted({str(one.code) for one in found if one.severity != "info"})


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
    vm = bench.make(4, 4)
    bench.write(vm, 1)
    bench.write(vm, 2, slot="hdb")
    vm.create_snapshot("a")
    bench.write(vm, 3, 1 << 20)
    vm.create_snapshot("b")
    bench.write(vm, 4, 2 << 20)
    bench.write(vm, 5, 2 << 20, slot="hdb")
    bench.said.clear()
    return vm
