"""``hvmgr catalog``: from an image to VMs of it, a copy and a linked one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hvmgr.faces import console
from hvmgr.host import hypervisor
from hvmgr.operations.boot import machine
from hvmgr.storage.catalog import Catalog
from tests.operations.boot import mini

BOOT_S = 400  # beside other tests


@pytest.fixture
def place(root):
    """A folder that QEMU's user reaches, beside the root of the VMs."""
    folder = root.parent / "files"
    folder.mkdir()
    return folder


def test_way_from_an_image_to_vms(hvmgr, place):
    catalog = place / "catalog"
    words = ("--catalog", catalog)
    hvmgr.ok("image", "create", place / "gold.qcow2", "--size", "4M")
    added = hvmgr.ok("catalog", "add", place / "gold.qcow2", "--group", "Linux", "--description", "gold", *words)
    assert added.out.startswith(f"added gold (qcow2, 192 KiB) to {catalog}")
    assert hvmgr.ok("catalog", "list", "--verify", *words).lines == [
        ["Linux", "gold", "qcow2", "192 KiB", "4.0 MiB", "", "gold"]
    ]
    dry = hvmgr.ok("catalog", "deploy", "gold", "--to", "linked", "--linked", "--network", "none", "--dry-run", *words)
    assert " on gold.qcow2" in dry.out
    copied = hvmgr.ok("catalog", "deploy", "gold", "--to", "copied", "--network", "none", *words)
    assert copied.out.startswith("deployed gold to the VM copied in ")
    how = ("--linked", "--network", "none", "--memory", "64M", "--json")
    home = Path(hvmgr.ok("catalog", "deploy", "gold", "--to", "linked", *how, *words).json["path"])
    disks = [hvmgr.ok("vm", "show", name, "--json").json["now"]["disks"]["vda"] for name in ("copied", "linked")]
    parents = [hvmgr.ok("image", "info", disk, "--json").json["image"]["parent"] for disk in disks]
    assert parents[0] is None
    assert parents[1]["path"] == str(catalog / "images" / "gold.qcow2")
    told = hvmgr("catalog", "remove", "gold", *words)
    assert (told.code, "linked" in told.err) == (4, True), told
    # Its home may have been moved, or lie on a disk that is not mounted: only somebody can say that it is gone.
    away = home.rename(home.parent.parent / "away")
    told = hvmgr("catalog", "remove", "gold", "--yes", *words)
    assert (told.code, f"--gone {home}" in told.err) == (4, True), told
    assert hvmgr("catalog", "remove", "gold", "--gone", away, "--yes", *words).code == 2
    told = hvmgr("catalog", "remove", "gold", "--gone", home, "--dry-run", *words)
    assert (told.code, "remove 'gold'" in told.out) == (0, True), told
    away.rename(home)
    with Catalog(catalog).changing(0):
        told = hvmgr(
            "--wait", "0", "catalog", "deploy", "gold", "--to", "other", "--linked", "--network", "none", *words
        )
        assert told.code == 4, told
    hvmgr.ok("snapshot", "create", "linked", "one")  # it is a VM like any other
    hvmgr.ok("vm", "delete", "linked", "--with-disks", "--yes")
    document = hvmgr.ok("catalog", "remove", "gold", "--json", *words).json
    assert (document["changed"], document["image"]["name"]) == (True, "gold")
    assert hvmgr.ok("catalog", "list", *words).out == ""


def test_refusals_are_one_sentence(hvmgr, place):
    words = ("--catalog", place / "catalog")
    hvmgr.ok("image", "create", place / "gold.vhd", "--size", "4M")
    hvmgr.ok("catalog", "add", place / "gold.vhd", *words)
    for more, code, what in (
        (("deploy", "none", "--to", "./x"), 3, "it has gold"),
        (("deploy", "gold", "--to", f"{place}/none/"), 3, "there is no folder"),
        (("deploy", "gold"), 2, "--to"),
        (("group", "none", "Other"), 3, "has no image 'none'"),
        (("add", place / "gold.vhd"), 4, "already"),
    ):
        told = hvmgr("catalog", *more, *words)
        assert (told.code, what in told.err) == (code, True), told
    file = place / "catalog" / "images" / "gold.vhd"
    whole = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(whole[:700] + b"!" + whole[701:])
    told = hvmgr("catalog", "deploy", "gold", "--to", "web", "--network", "none", *words)
    assert (told.code, "its checksum is another" in told.err) == (6, True)
    file.write_bytes(whole + b"more")
    told = hvmgr("catalog", "list", "--verify", *words)
    assert (told.code, "was changed" in told.err) == (6, True)
    (place / "vms").mkdir()
    for linked in ((), ("--linked",)):
        assert hvmgr("catalog", "deploy", "gold", "--to", f"{place}/vms", *linked, *words).code == 6
    assert list((place / "vms").iterdir()) == []


@pytest.mark.guest
@pytest.mark.timeout(900)
def test_vms_of_an_image_boot(hvmgr, place, counting_guest, require_program):
    """An image with a boot loader and the counting guest: a copy and a linked VM start from it, and count on their disks."""
    for program in ("mke2fs", "grub-mkimage"):
        require_program(program)
    tree = place / "tree"
    (tree / "boot" / "grub").mkdir(parents=True)
    shutil.copy(counting_guest.kernel, tree / "kernel")
    shutil.copy(counting_guest.initrd, tree / "initrd")
    lines = f"linux /kernel {counting_guest.command_line}\ninitrd /initrd\nboot\n"
    (tree / "boot" / "grub" / "grub.cfg").write_text(lines)
    # The guest counts where the volume begins: in its first KiB, which belongs to nobody.
    machine.make_disk(place / "gold.raw", tree, mini.VOLUME, free=8 << 20)
    hvmgr.ok("image", "convert", place / "gold.raw", place / "gold.vhd")
    words = ("--catalog", place / "catalog")
    hvmgr.ok("catalog", "add", place / "gold.vhd", "--group", "Linux", *words)
    assert [line[:3] for line in hvmgr.ok("catalog", "list", *words).lines] == [["Linux", "gold", "vhd"]]
    how = ("--template", "generation1", "--memory", "128M", "--network", "none", "--accel", "tcg")
    for name, more in (("copied", ()), ("linked", ("--linked",))):
        told = hvmgr("catalog", "deploy", "gold", "--to", name, *more, *how, *words)
        assert told.code == 0, told
        assert hvmgr("vm", "start", name).code == 0
    with hypervisor.opened(os.environ["LIBVIRT_DEFAULT_URI"], wait_s=60) as connection:
        for domain in connection.domains():
            with console.Console(domain.serial_path()) as screen:
                tick = screen.next_tick(BOOT_S)
            assert tick.ok
            assert len(tick.disks) == 1
    assert hvmgr("catalog", "remove", "gold", *words).code == 4  # the linked one needs it
    for name in ("copied", "linked"):
        hvmgr.ok("vm", "stop", name, "--force", "--yes")
    hvmgr.ok("catalog", "list", "--verify", *words)
