from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model import specification
from hvmgr.model.specification import (
    Acceleration,
    DiskSpecification,
    Firmware,
    ImageFormat,
    NetworkKind,
    NetworkSpecification,
    Specification,
)

FULL = """\
name: web
template: generation1
memory: 2G
vcpus: 2
disks:
  - size: 20G
  - path: images/data.vhd
    in_place: yes
    slot: vdc
    format: vhd
cdrom: /iso/debian.iso
networks:
  - default
  - bridge=br0,mac=52:54:00:12:34:56
  - network: inner
    mac: 52:54:00:12:34:57
  - user
  - user: yes
    mac: 52:54:00:12:34:58
kernel: /boot/vmlinuz
initrd: initrd.img
cmdline: console=ttyS0 quiet
accel: tcg
tpm: true
firmware: bios
uuid: 01234567-89ab-cdef-0123-456789abcdef
home: /srv/vms/web
description: the shop
"""


def load(text: str) -> Specification:
    return specification.load(text, source="web.yaml", folder=Path("/specs"))


def test_every_field_is_read():
    network = NetworkSpecification
    assert load(FULL) == Specification(
        name="web",
        template="generation1",
        memory=2 << 30,
        vcpus=2,
        disks=(
            DiskSpecification(size=20 << 30),
            DiskSpecification(path=Path("/specs/images/data.vhd"), in_place=True, slot="vdc", format=ImageFormat.VHD),
        ),
        cdrom=Path("/iso/debian.iso"),
        networks=(
            network(NetworkKind.NETWORK, "default"),
            network(NetworkKind.BRIDGE, "br0", "52:54:00:12:34:56"),
            network(NetworkKind.NETWORK, "inner", "52:54:00:12:34:57"),
            network(NetworkKind.USER),
            network(NetworkKind.USER, None, "52:54:00:12:34:58"),
        ),
        kernel=Path("/boot/vmlinuz"),
        initrd=Path("/specs/initrd.img"),
        cmdline="console=ttyS0 quiet",
        accel=Acceleration.TCG,
        tpm=True,
        firmware=Firmware.BIOS,
        uuid="01234567-89ab-cdef-0123-456789abcdef",
        home=Path("/srv/vms/web"),
        description="the shop",
    )


def test_every_field_is_documented():
    text = Path(__file__).parents[2].joinpath("docs/specification.md").read_text()
    keys = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    disk_keys, network_keys = (
        {"size", "path", "in_place", "linked", "slot", "format"},
        {"network", "bridge", "user", "mac"},
    )
    assert keys == set(Specification.__dataclass_fields__) | disk_keys | network_keys
    assert disk_keys == set(DiskSpecification.__dataclass_fields__)


def test_the_documented_example_is_valid():
    text = Path(__file__).parents[2].joinpath("docs/specification.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        assert load(example).name


def test_a_name_is_enough():
    assert load("name: web") == Specification(name="web")


def test_networks_may_be_left_out_or_be_none():
    assert load("name: web").networks is None
    assert load("name: web\nnetworks: none").networks == ()
    assert load("name: web\nnetworks: []").networks == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memroy: 1G", "line 2: unknown key 'memroy'"),
        ("memory: 2048", "line 2, memory: 2.0 KiB of memory is too little"),
        ("vcpus: 0", "line 2, vcpus: '0' is not a whole number"),
        ("initrd: x", "line 2, initrd: initrd is only used with a kernel"),
        ("cmdline: x", "line 2, cmdline: cmdline is only used with a kernel"),
        ("uuid: 42", "line 2, uuid: '42' is not a UUID"),
        ("uuid: '{01234567-89ab-cdef-0123-456789abcdef}'", "line 2, uuid: "),
        ("accel: xen", "line 2, accel: 'xen' is unknown"),
        ("firmware: uefi", "line 2, firmware: 'uefi' is unknown"),
        ("disks: 20G", "line 2, disks: a list is expected"),
        ("disks:\n  - sise: 1G", "line 3, disks\\[1\\]: unknown key 'sise'"),
        ("disks:\n  - size: 1G\n  - slot: vda", "line 4, disks\\[2\\]: a disk has either"),
        ("disks:\n  - {size: 1G, path: x}", "line 3, disks\\[1\\]: a disk has either"),
        ("disks:\n  - {size: 1G, linked: yes}", "line 3, disks\\[1\\]: only an image that is there"),
        ("disks:\n  - {size: 1G, in_place: yes}", "line 3, disks\\[1\\]: only an image that is there"),
        ("disks:\n  - {size: 0}", "line 3, disks\\[1\\]: a disk cannot have 0 bytes"),
        ("disks:\n  - {size: 1G, slot: ../x}", "is not a slot"),
        ("disks:\n  - {size: 1G, slot: vda}\n  - {size: 1G, slot: vda}", "slot vda is there twice"),
        ("networks:\n  - none", "line 3, networks\\[1\\]: 'none' excludes"),
        ("networks:\n  - tap=x", "line 3, networks\\[1\\]: 'tap=x' is not a network"),
        ("networks:\n  - {mac: 52:54:00:00:00:01}", "line 3, networks\\[1\\]: one of network"),
        ("networks:\n  - {user: no}", "line 3, networks\\[1\\]: one of network"),
        ("networks:\n  - {user: yes, nic: x}", "line 3, networks\\[1\\]: unknown key 'nic'"),
        ("networks:\n  - user,mac=53:54:00:00:00:01", "line 3, networks: '53:54:00:00:00:01' is not the address"),
        ("networks: ['user,mac=52:54:00:00:00:0A', 'user,mac=52:54:00:00:00:0a']", "is there twice"),
    ],
)
def test_errors_name_file_line_and_key(text, words):
    with pytest.raises(errors.UsageError, match="web.yaml, " + words if words.startswith("line") else words) as caught:
        load("name: web\n" + text)
    assert caught.value.facts["file"] == "web.yaml"


def test_a_missing_unit_is_guessed_in_the_hint():
    with pytest.raises(errors.UsageError) as caught:
        load("name: web\nmemory: 2048")
    assert caught.value.hint == "write the unit: 2048M"


@pytest.mark.parametrize("name", ["web", "Büro 1", "a.b-c_d", "x" * 200])
def test_names_that_libvirt_and_folders_take(name):
    specification.require_name(name)


@pytest.mark.parametrize("name", ["", " web", "web ", "a/b", ".", "..", ".hidden", "a\nb", "a\x7f", "é" * 101])
def test_names_that_cannot_be(name):
    with pytest.raises(errors.UsageError):
        specification.require_name(name)


def test_networks_of_the_command_line():
    assert specification.parse_networks([]) is None
    assert specification.parse_networks(["none"]) == ()
    assert specification.parse_networks(["default", "bridge=br0"]) == (
        NetworkSpecification(NetworkKind.NETWORK, "default"),
        NetworkSpecification(NetworkKind.BRIDGE, "br0"),
    )
    assert specification.parse_networks(["network=user"]) == (NetworkSpecification(NetworkKind.NETWORK, "user"),)


@pytest.mark.parametrize("texts", [["none", "user"], [""], ["bridge="], ["tap=x"]])
def test_networks_that_make_no_sense(texts):
    with pytest.raises(errors.UsageError):
        specification.parse_networks(texts)
