from __future__ import annotations

import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest

from hvmgr import errors, settings, units
from hvmgr.host.domain import State
from hvmgr.model import configuration, template
from hvmgr.model.specification import DiskSpecification, Specification
from hvmgr.model.template import HostFacts
from hvmgr.storage import templates


def test_every_shipped_template_loads():
    assert templates.names() == ["generation1", "generation2"]
    for name in templates.names():
        assert templates.load(name).description


def test_unknown_template_is_answered_with_the_near_one():
    with pytest.raises(errors.NotFound) as caught:
        templates.load("generation3")
    assert caught.value.hint.startswith("did you mean 'generation")
    with pytest.raises(errors.NotFound):
        templates.load("../generation1")


def test_a_template_without_skeleton_is_damaged(tmp_path):
    shutil.copy(settings.templates_folder() / "generation1.yaml", tmp_path / "mine.yaml")
    with pytest.raises(errors.Corrupt, match=r"mine\.xml"):
        templates.load("mine", tmp_path)


@pytest.fixture
def home():
    """A folder that QEMU's user can look into."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["generation1", "generation2"])
def test_a_built_vm_starts(connection, home, name):
    host, machine = connection.capabilities(), connection.machine_facts(accel="qemu")
    facts = HostFacts(
        emulator=machine.emulator,
        arch=machine.arch,
        machines=host.machines[machine.arch],
        kvm=False,
        uefi=connection.machine_facts(accel="qemu", machine="q35").has_efi,
        tpm=machine.has_tpm_emulator,
    )
    (home / "cd.iso").write_bytes(bytes(units.MIB))
    spec = Specification(
        name=f"built-{name}",
        template=name,
        memory=128 * units.MIB,
        disks=(DiskSpecification(size=units.MIB),) * 4,
        cdrom=home / "cd.iso",
        tpm=facts.tpm,
    )
    found = templates.load(name)
    disks = {slot: (home / f"{slot}.qcow2", "qcow2") for slot in template.slots(found, spec)}
    for path, _ in disks.values():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True, timeout=60)
    ids = {"uuid": str(uuid.uuid4()), "genid": str(uuid.uuid4()), "macs": ["52:54:00:12:34:56"]}
    config = template.build(found, spec, facts, disks, **ids, nvram=home / "VARS.fd")
    domain = connection.define(config.to_xml())
    domain.start()
    assert domain.state() is State.RUNNING
    assert domain.serial_path() is not None
    live = configuration.parse(domain.xml(live=True), source="live")
    assert (live.root.find("os/loader") is not None) is (name == "generation2")
    assert (home / "VARS.fd").exists() is (name == "generation2")
    defined = configuration.parse(domain.xml(live=False), source="inactive")
    assert {disk.slot for disk in defined.disks()} == {disk.slot for disk in config.disks()}
    assert (defined.nvram, defined.genid, defined.machine) == (config.nvram, config.genid, config.machine)
    domain.destroy()
