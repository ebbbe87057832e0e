"""Native boot as a whole: a machine with a GRUB of its own boots systems in VHDs on its volume, writes, and goes down."""

from __future__ import annotations

import hashlib

import pytest

from hvmgr import vhd
from hvmgr.host import bare_machine, volumes
from hvmgr.operations.boot import guest_system
from hvmgr.storage import durable, layer
from tests.operations.boot import mini, physical
from tests.operations.boot.physical import Physical

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1200)]  # five machines, which a busy host takes minutes for

FOLDER = "V $HD's"  # what shells and GRUB would like to read as something else


@pytest.fixture(scope="module")
def machine(tmp_path_factory, counting_guest, require_program, require):
    """The machine, with the small system in a fixed and a dynamic VHD, and in a differencing one on a base."""
    for program in ("mke2fs", "e2fsck", "grub-mkimage", "dmsetup", "qemu-system-x86_64"):
        require_program(program)
    found = Physical(tmp_path_factory.mktemp("machine"))
    (found.tree / FOLDER).mkdir()
    raw = found.folder / "raw"
    mini.make_raw(raw, counting_guest, found.folder)
    for name, kind in (("fixed", vhd.Kind.FIXED), ("dynamic", vhd.Kind.DYNAMIC), ("base", vhd.Kind.DYNAMIC)):
        mini.make_vhd(found.tree / FOLDER / f"{name}.vhd", raw, kind)
    with vhd.RawSource(raw) as source:
        blank = found.tree / FOLDER / "child.vhd"
        vhd.create(blank, parent=found.tree / FOLDER / "base.vhd")
        with vhd.open_chain(blank, writable=True) as chain:  # some of the disk is in the child
            piece = bytearray(3 << 20)
            source.read_into(8 << 20, memoryview(piece))
            chain.write(8 << 20, piece)
            chain.flush()
    raw.unlink()
    return found


@pytest.fixture
def done(hvmgr):
    """A command that goes well; it may say that there is no libvirt to ask."""

    def call(*arguments):
        answer = hvmgr(*arguments)
        assert answer.code == 0, answer
        return answer

    return call


def test_machine_boots_from_vhds(machine, done, monkeypatch):
    volume = machine.tree / FOLDER
    for name in ("fixed", "dynamic", "child"):
        done("boot", "add", volume / f"{name}.vhd", "--name", name, *machine.options)
    done("boot", "default", "dynamic", *machine.boot_dir)
    monkeypatch.setattr(volumes, "is_stacked", lambda _device: False)  # wherever the tests' folder lies
    done("boot", "default", "fixed", "--once", *machine.boot_dir)
    shown = {one["name"]: one for one in done("boot", "list", "--json", *machine.boot_dir).json["entries"]}
    assert {name: (one["problem"], one["written"], one["copied"]) for name, one in shown.items()} == {
        "fixed": (None, None, False),
        "dynamic": (None, 0, False),
        "child": (None, 0, True),
    }
    before = {one.name: digest(one) for one in volume.glob("*.vhd")}
    machine.build()

    # Once the fixed one: its system writes the VHD itself.
    assert "MINI boot=1 root=/dev/mapper/hvmgr-disk1" in machine.boot()
    assert machine.is_clean()
    machine.take_back("/V $HD's/fixed.vhd")
    with vhd.open_chain(volume / "fixed.vhd") as chain:
        assert physical.inside(chain, "/count") == b"1\n"
    # After that the default: a layer takes what is written, and the VHD stays as it is.
    said = machine.boot()
    assert "MINI boot=1 root=/dev/mapper/hvmgr-disk1" in said
    assert "hvmgr: the image is released" in said
    for name in ("dynamic", "base", "child"):
        assert hashlib.sha256(machine.content(f"/V $HD's/{name}.vhd")).hexdigest() == before[f"{name}.vhd"]

    # What is written is there at the next boot.
    said = machine.boot()
    assert "MINI boot=2 " in said
    assert "MINI lost" not in said
    assert machine.is_clean()

    # Kept, it is a differencing VHD; merged, it is in the VHD, which then is the disk of a VM.
    machine.take_back("/V $HD's/dynamic.vhd.boot/layer")
    kept = done("boot", "merge", "dynamic", "--to", volume / "kept.vhd", "--json", *machine.boot_dir).json
    assert kept["bytes"] > 1500000
    with vhd.open_chain(volume / "kept.vhd") as chain:
        assert physical.inside(chain, "/count") == b"2\n"
    durable.remove(volume / "kept.vhd")
    done("boot", "merge", "dynamic", *machine.boot_dir)
    with vhd.open_chain(volume / "dynamic.vhd") as chain:
        assert physical.inside(chain, "/count") == b"2\n"
        vhd.write_raw(machine.folder / "merged", chain)
    assert physical.is_clean(machine.folder / "merged", mini.START)
    said = as_vm(machine, volume / "dynamic.vhd")
    assert "MINI boot=3 root=/dev/vda1" in said
    assert "MINI lost" not in said
    listed = done("boot", "list", "--json", *machine.boot_dir).json["entries"]
    assert [(one["problem"], one["written"]) for one in listed if one["name"] == "dynamic"] == [(None, 0)]

    # The differencing one: what its layer held would not boot; without that the clean state is back.
    rubbish = dict.fromkeys(range(mini.START // layer.CHUNK, 2 * mini.START // layer.CHUNK), b"\xff" * layer.CHUNK)
    physical.write_layer(volume / "child.vhd.boot" / "layer", rubbish)
    assert done("boot", "revert", "child", "--yes", "--json", *machine.boot_dir).json["bytes"] == mini.START
    tried = done(
        "boot", "test", "child", "--uefi", "--until", "MINI boot=", "--memory", "256M", "--json", *machine.boot_dir
    ).json
    assert tried["found"], tried
    assert "MINI boot=1 root=/dev/mapper/hvmgr-disk1" in tried["lines"][-1]
    assert {one.name for one in (volume / "child.vhd.boot").iterdir()} == {"initrd", "kernel", "layer", "supplement"}
    assert digest(volume / "child.vhd") == before["child.vhd"]


def as_vm(machine, path):
    """What the system says when the VHD is an ordinary disk of a VM."""
    with vhd.open_chain(path) as chain:
        system = guest_system.find(chain, str(path))
        for name, data in zip(("vmlinuz", "initrd"), system.kernel_files(), strict=True):
            (machine.folder / name).write_bytes(data)
    start = (machine.folder / "vmlinuz", machine.folder / "initrd", f"root=/dev/vda1 {mini.ARGUMENTS}")
    own = bare_machine.Machine([(path, "vpc", False)], physical.MEMORY, kernel=start)
    return "\n".join(bare_machine.lines(own, machine.folder, time_s=physical.TIME_S))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
