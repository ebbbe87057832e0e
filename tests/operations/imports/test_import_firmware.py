"""UEFI variables and the TPM of a VM come along, and are the new VM's own: real firmware, a real swtpm.

Guests are started and never run, but for one memory: the firmware takes its time under TCG. At its start swtpm reads the
state that it finds, and libvirt makes a new one where there is none, which shares next to no random bytes with the old.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import hvmgr
from hvmgr.host.domain import State
from tests.operations.rules.conftest import run

STATE = Path("tpm2") / "tpm2-00.permall"


@dataclass
class Made:
    """An export of a VM that had run, and the NVRAM and TPM state of its present and of its snapshot ``off``."""

    folder: Path
    nvram: dict[str, bytes]
    tpm: dict[str, bytes]


@pytest.fixture(scope="module")
def _shelf():
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    yield {"folder": folder}
    shutil.rmtree(folder)


@pytest.fixture
def made(bench, require, _shelf):
    """The export, made once; each test has a copy of its own, on a host without VMs."""
    if "made" not in _shelf:
        vm = bench.make(4, name="web", template="generation2", tpm=True)
        present = vm.home.present()
        require(present.nvram is not None and present.has_tpm, "no UEFI firmware or no swtpm: make setup installs them")
        bench.start(vm)
        vm.create_snapshot("memory")
        vm.stop(force=True)
        vm.create_snapshot("off")
        nvram, tpm = {"off": present.nvram.read_bytes()}, {"off": tpm_of(bench, vm)}
        present.nvram.write_bytes(bytes(1000) + present.nvram.read_bytes()[1000:])  # as a guest that sets variables
        state = bench.host.connection.tpm_folder(vm.id) / "marker"
        state.write_bytes(b"of the present")
        nvram["now"], tpm["now"] = present.nvram.read_bytes(), tpm_of(bench, vm)
        assert nvram["now"] != nvram["off"]
        made = Made(vm.export(_shelf["folder"]), nvram, tpm)
        vm.delete(with_disks=True)
        _shelf["made"] = made
    made = _shelf["made"]
    folder = bench.place / "exports" / "web"
    folder.parent.mkdir(mode=0o711)
    run("cp", "-a", made.folder, folder)
    return Made(folder, made.nvram, made.tpm)


def tpm_of(bench, vm):
    return (bench.host.connection.tpm_folder(vm.id) / STATE).read_bytes()


def check(bench, vm, made):
    """Present and snapshots have what was exported, in places of their own, and QEMU starts with it."""
    present, folder = vm.home.present(), bench.host.connection.tpm_folder(vm.id)
    assert present.nvram.is_relative_to(vm.path)
    assert present.nvram.read_bytes() == made.nvram["now"]
    assert tpm_of(bench, vm) == made.tpm["now"]
    assert (folder / "marker").read_bytes() == b"of the present"
    off = vm.snapshot("off")
    layout = vm.home.layout
    assert layout.snapshot_nvram(off.id).read_bytes() == made.nvram["off"]
    assert (layout.snapshot_tpm(off.id) / STATE).read_bytes() == made.tpm["off"]
    start_paused(bench, vm)
    assert tpm_of(bench, vm) == made.tpm["now"], "libvirt made a new TPM"
    vm.stop(force=True)
    bench.check(vm)


def start_paused(bench, vm):
    domain = bench.domain(vm)
    domain.start(paused=True)
    assert domain.state() is State.PAUSED


def test_copy_has_state_of_its_own(bench, made):
    first, second = bench.bring(made.folder, name="first"), bench.bring(made.folder, name="second")
    assert first.id != second.id
    check(bench, first, made)
    (bench.host.connection.tpm_folder(first.id) / STATE).write_bytes(b"worn out")
    first.home.present().nvram.write_bytes(b"worn out")
    check(bench, second, made)
    second.snapshot("off").apply()
    assert (second.home.present().nvram.read_bytes(), tpm_of(bench, second)) == (made.nvram["off"], made.tpm["off"])
    assert not (bench.host.connection.tpm_folder(second.id) / "marker").exists()
    start_paused(bench, second)
    second.stop(force=True)
    second.snapshot("memory").apply()  # the TPM's state of then is in the memory
    assert bench.domain(second).state() is State.RUNNING
    second.stop(force=True)
    bench.check(second)


def test_registered_home_keeps_no_second_state(bench, made):
    vm = bench.bring(made.folder, mode=hvmgr.Mode.REGISTER, new_id=True)
    assert not vm.home.layout.present_tpm.exists()
    for path in vm.home.layout.snapshots.rglob("*"):
        if "tpm" in path.parts:
            assert path.stat().st_mode & 0o077 == (0o011 if path.name == "tpm" else 0), path
    check(bench, vm, made)


def test_link(bench, made):
    vm = bench.bring(made.folder, mode=hvmgr.Mode.LINK)
    check(bench, vm, made)


def test_kept_id_and_replace(bench, made):
    vm = bench.bring(made.folder, new_id=False)
    assert vm.id == next((made.folder / "Virtual Machines").glob("*.xml")).stem
    (bench.host.connection.tpm_folder(vm.id) / STATE).write_bytes(b"worn out")
    vm.home.present().nvram.write_bytes(b"worn out")
    bench.bring(made.folder, new_id=False, replace=True)
    check(bench, vm, made)
    vm.undo()
    assert (vm.home.present().nvram.read_bytes(), tpm_of(bench, vm)) == (b"worn out", b"worn out")
    bench.check(vm)


def test_export_of_one_snapshot(bench, made):
    vm = bench.bring(made.folder)
    one = bench.bring(vm.export(bench.place / "one", hvmgr.ExportOptions(snapshot="off")), name="one")
    assert (one.home.present().nvram.read_bytes(), tpm_of(bench, one)) == (made.nvram["off"], made.tpm["off"])
    start_paused(bench, one)
    one.stop(force=True)
    bench.check(one)
