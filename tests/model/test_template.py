from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hvmgr import errors, settings, units
from hvmgr.model import template
from hvmgr.model.specification import (
    Acceleration,
    DiskSpecification,
    Firmware,
    NetworkKind,
    NetworkSpecification,
    Specification,
)
from hvmgr.model.template import HostFacts
from hvmgr.storage import templates

UUID = "01234567-89ab-4def-8123-456789abcdef"
GENID = "11111111-89ab-4def-8123-456789abcdef"
MAC = "52:54:00:12:34:56"
NVRAM = Path("/vm/Virtual Machines/x/VARS.fd")
HOST = HostFacts(
    emulator=Path("/opt/qemu & co/qemu-kvm"),
    arch="x86_64",
    machines={"pc": "pc-i440fx-7.2", "q35": "pc-q35-7.2"},
    kvm=True,
    uefi=True,
    tpm=True,
    networks=frozenset({"default"}),
)
POOR = HostFacts(
    emulator=Path("/q"), arch="x86_64", machines={"q35": "rhel9"}, kvm=False, uefi=False, tpm=False, genid=False
)
NEW = DiskSpecification(size=units.GIB)


def build(name="generation2", facts=HOST, **wishes):
    spec = Specification(name="web", template=name, **wishes)
    found = templates.load(name)
    disks = {slot: (Path(f"/vm/{slot}.qcow2"), "qcow2") for slot in template.slots(found, spec)}
    macs = [MAC] * len(template.networks(spec, facts))
    return template.build(found, spec, facts, disks, uuid=UUID, genid=GENID, macs=macs, nvram=NVRAM)


def slots(name, *wanted, cdrom=None):
    disks = tuple(dataclasses.replace(NEW, slot=slot) for slot in wanted)
    return template.slots(templates.load(name), Specification(name="x", disks=disks, cdrom=cdrom))


def test_generation1_is_a_bios_machine_with_drivers_everywhere():
    config = build("generation1", disks=(NEW, NEW))
    assert (config.type, config.machine, config.nvram, config.genid) == ("kvm", "pc-i440fx-7.2", None, GENID)
    assert config.root.find("os").get("firmware") is None
    assert [(disk.slot, disk.bus) for disk in config.disks()] == [("hda", "ide"), ("hdb", "ide")]
    assert config.nics()[0].model == "e1000"
    assert (config.memory, config.vcpus) == (units.GIB, 1)
    assert config.root.find("devices/controller[@type='scsi']") is None


def test_generation2_is_a_uefi_machine_with_virtio():
    config = build("generation2", disks=(NEW, NEW))
    assert (config.type, config.machine, config.nvram, config.genid) == ("kvm", "pc-q35-7.2", NVRAM, GENID)
    assert config.root.find("os").get("firmware") == "efi"
    assert config.root.find("os/firmware/feature[@name='secure-boot']").get("enabled") == "no"
    assert [(disk.slot, disk.bus) for disk in config.disks()] == [("vda", "virtio"), ("vdb", "virtio")]
    assert config.nics()[0].model == "virtio"
    assert (config.memory, config.vcpus) == (2 * units.GIB, 2)


@pytest.mark.parametrize("name", ["generation1", "generation2"])
def test_every_vm_can_be_reached(name):
    devices = build(name).root.find("devices")
    assert devices.find("serial").get("type") == "pty"
    assert devices.find("channel/target").get("name") == "org.qemu.guest_agent.0"
    assert devices.find("graphics/listen").get("address") == "127.0.0.1"
    assert devices.findtext("emulator") == "/opt/qemu & co/qemu-kvm"


def test_wishes_are_fulfilled():
    config = build(
        memory=units.MIB * 64 + 1,
        vcpus=7,
        disks=(NEW,),
        cdrom=Path("/iso/a.iso"),
        networks=(
            NetworkSpecification(NetworkKind.BRIDGE, "br0", "52:54:00:00:00:01"),
            NetworkSpecification(NetworkKind.NETWORK, "inner"),
        ),
        kernel=Path("/k"),
        initrd=Path("/i"),
        cmdline="a=<b> & c",
        accel=Acceleration.TCG,
        tpm=True,
        firmware=Firmware.BIOS,
        description="the <shop>",
    )
    assert (config.memory, config.vcpus, config.type) == (units.MIB * 64 + 1024, 7, "qemu")
    cdrom = config.find_disk("sda")
    assert (cdrom.device, cdrom.bus, cdrom.source, cdrom.readonly) == ("cdrom", "sata", "/iso/a.iso", True)
    nics = [(nic.mac, nic.type, nic.source) for nic in config.nics()]
    assert nics == [("52:54:00:00:00:01", "bridge", "br0"), (MAC, "network", "inner")]
    assert [config.root.findtext(f"os/{tag}") for tag in ("kernel", "initrd", "cmdline")] == ["/k", "/i", "a=<b> & c"]
    assert config.has_tpm
    assert config.has_persistent_tpm
    assert config.nvram is None
    assert config.root.findtext("description") == "the <shop>"


def test_without_wishes_the_host_decides():
    assert (build().nics()[0].type, build().nics()[0].source) == ("network", "default")
    config = build(facts=POOR)
    assert (config.type, config.machine, config.nvram, config.genid) == ("qemu", "rhel9", None, None)
    assert config.nics()[0].type == "user"
    assert not config.has_tpm
    assert config.root.findtext("cpu/model") == "Nehalem"
    assert build().root.find("cpu").attrib == {"mode": "host-model"}


def test_choices_of_the_host_are_said():
    found, spec = templates.load("generation2"), Specification(name="x")
    assert template.notes(found, spec, HOST) == ()
    said = template.notes(found, spec, POOR)
    assert [word in note for word, note in zip(["UEFI", "KVM", "default"], said, strict=True)] == [True] * 3
    wanted = dataclasses.replace(spec, firmware=Firmware.BIOS, accel=Acceleration.TCG, networks=())
    assert template.notes(found, wanted, POOR) == ()


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"accel": Acceleration.KVM}, "KVM"),
        ({"firmware": Firmware.EFI}, "UEFI"),
        ({"tpm": True}, "TPM"),
        ({"name": "generation1"}, "has no machine pc"),
    ],
    ids=["kvm", "efi", "tpm", "i440fx"],
)
def test_what_the_host_lacks_is_refused_when_asked_for(wishes, words):
    with pytest.raises(errors.Unsupported, match=words) as caught:
        build(facts=POOR, **wishes)
    assert caught.value.hint


def test_no_network_means_no_interface():
    assert build(networks=()).nics() == ()


def test_a_block_device_is_used_as_one():
    found, spec = templates.load("generation2"), Specification(name="x", networks=())
    disks = {"vda": (Path("/dev/vg/root"), "raw"), "vdb": (Path("/dev/shm/a.qcow2"), "qcow2")}
    config = template.build(found, spec, HOST, disks, uuid=UUID, genid=GENID, macs=[], nvram=NVRAM)
    assert [(disk.type, disk.source) for disk in config.disks()] == [
        ("block", "/dev/vg/root"),
        ("file", "/dev/shm/a.qcow2"),
    ]


def test_control_characters_are_refused():
    with pytest.raises(errors.UsageError, match="control character"):
        build(description="a\x00b")


def test_slots_follow_the_template():
    assert slots("generation1", *[None] * 5) == ("hda", "hdb", "hdd", "sda", "sdb")
    assert slots("generation2", *[None] * 3) == ("vda", "vdb", "vdc")
    assert slots("generation2", None, "vda", "sdb", None) == ("vdb", "vda", "sdb", "vdc")


def test_slots_run_out_and_clash():
    with pytest.raises(errors.UsageError, match="no slot hda"):
        slots("generation2", "hda")
    with pytest.raises(errors.UsageError, match="the CD drive's"):
        slots("generation2", "sda", cdrom=Path("/a"))
    assert slots("generation2", "sda") == ("sda",)
    with pytest.raises(errors.UsageError, match="no room for 40 disks"):
        slots("generation2", *[None] * 40)


def test_slots_go_on_behind_z():
    names = list(template.Bus("virtio", "vd", 54).slots())
    assert (names[0], names[25], names[26], names[53]) == ("vda", "vdz", "vdaa", "vdbb")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("firmware:", "frimware:"), "generation1.yaml, line .*: unknown key 'frimware'"),
        (lambda text: text.replace("count: 4", "count: four"), "disks\\[1\\].count: 'four'"),
        (lambda text: text.replace("network: e1000", ""), "'network' is missing"),
    ],
)
def test_a_broken_template_is_named_with_its_line(change, words):
    folder = settings.templates_folder()
    text, skeleton = ((folder / f"generation1.{suffix}").read_text() for suffix in ("yaml", "xml"))
    with pytest.raises(errors.UsageError, match=words):
        template.parse("x", change(text), skeleton, source="generation1")
    with pytest.raises(errors.Corrupt, match=r"generation1\.xml"):
        template.parse("x", text, skeleton.replace("</domain>", ""), source="generation1")


@pytest.mark.parametrize("name", ["generation1", "generation2"])
def test_built_xml_is_the_golden_one(name):
    """HVMGR_WRITE_GOLDEN=1 writes the files anew; the difference is then seen in the commit."""
    path = Path(__file__).parent / "golden" / f"{name}.xml"
    built = build(name, disks=(NEW, NEW), cdrom=Path("/iso/a.iso"), tpm=True).to_xml()
    if os.environ.get("HVMGR_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(built)
    assert built.splitlines() == path.read_text().splitlines()


VARIANTS = {
    "plain": {},
    "diskless": {"networks": (), "accel": Acceleration.TCG},
    "many disks": {"disks": (NEW,) * 5, "cdrom": Path("/iso/a.iso"), "tpm": True},
    "kernel": {"kernel": Path("/k"), "initrd": Path("/i"), "cmdline": "quiet", "firmware": Firmware.BIOS},
    "text": {"description": "a & b", "networks": (NetworkSpecification(NetworkKind.BRIDGE, "br0"),)},
    "poor host": {"facts": dataclasses.replace(POOR, machines=HOST.machines), "disks": (NEW,)},
}


@pytest.mark.parametrize("name", ["generation1", "generation2"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_built_xml_obeys_the_schema_of_libvirt(name, variant, tmp_path):
    program = shutil.which("virt-xml-validate") or pytest.skip("needs virt-xml-validate (Debian: libvirt-clients)")
    path = tmp_path / "vm.xml"
    path.write_text(build(name, **VARIANTS[variant]).to_xml())
    done = subprocess.run([program, path, "domain"], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + path.read_text()
