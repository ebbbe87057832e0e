"""``image generalize``: what goes, what stays byte by byte, and what is said of a Windows."""

from __future__ import annotations

import os
import subprocess

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import e2fsprogs
from hvmgr.model.disk_layout import FileSystem, LayoutWish, TableKind
from hvmgr.model.wim_options import WimApplyOptions
from hvmgr.operations.images.sysprep import Generalised
from tests.storage import hives

MIB = 1 << 20
GONE = {
    "etc/ssh/ssh_host_rsa_key": b"SECRET OF THE HOST",
    "etc/ssh/ssh_host_rsa_key.pub": b"public",
    "var/lib/dbus/machine-id": b"0123456789abcdef",
    "var/lib/dhcp/dhclient.eth0.leases": b"lease",
    "var/lib/NetworkManager/secret_key": b"key",
    "var/lib/systemd/random-seed": b"SEED OF THE HOST",
    "var/lib/cloud/instances/i-1/user-data": b"data",
    "var/lib/cloud/data/status.json": b"{}",
    "var/log/journal/0123/system.journal": b"J" * 70_000,
    "var/log/syslog.1": b"old",
    'var/log/apt/a "strange" name.gz': b"older",
    "etc/udev/rules.d/70-persistent-net.rules": b"rule",
    "root/.bash_history": b"history",
    "home/joe/.zsh_history": b"history",
}
EMPTIED = {"etc/machine-id": b"0123456789abcdef\n", "var/log/syslog": b"L" * 300_000, "var/log/apt/term.log": b"term"}
KEPT = {
    "etc/ssh/sshd_config": b"config",
    "etc/passwd": b"root:x:0:0",
    "var/lib/cloud/seed/nocloud/meta-data": b"seed",
    "var/lib/NetworkManager/NetworkManager.state": b"state",
    "home/joe/notes": os.urandom(100_000),
    "var/log-of-mine/keep.log": b"mine",
}


@pytest.fixture(autouse=True)
def _programs(require_program):
    for name in ("mke2fs", "debugfs", "e2fsck", "sfdisk"):
        require_program(name)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """The tree of a Linux system that was somebody."""
    place = tmp_path_factory.mktemp("system")
    for name, data in {**GONE, **EMPTIED, **KEPT}.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (place / "var/lib/cloud/instance").symlink_to("instances/i-1")
    (place / "var/log/link").symlink_to("/dev/null")
    return place


@pytest.fixture
def make(folder, system):
    """``make(name)``: an image with that system on it."""

    def act(name, table=TableKind.MBR):
        layout = LayoutWish(FileSystem.EXT4, table)
        folder.host.wims.apply(system, folder / name, WimApplyOptions(rootfs=True, size=32 * MIB, layout=layout))
        return folder / name

    return act


def content(folder, name, start):
    """Every file in the volume with its bytes, as debugfs copies them out; and the volume is sound."""
    volume, target = folder / "seen", folder / "content"
    volume.write_bytes(folder.shown(name)[start:])
    target.mkdir()
    for words in (["e2fsck", "-f", "-n", volume], ["debugfs", "-R", f"rdump / {target}", volume]):
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    found = {
        str(one.relative_to(target)): one.read_bytes()
        for one in target.rglob("*")
        if one.is_file() and not one.is_symlink()
    }
    volume.unlink()
    return found


@pytest.mark.parametrize("name", ["a.vhd", "a.qcow2"])
def test_what_makes_a_system_the_one_that_it_is_goes_and_all_else_stays(folder, make, name):
    make(name)
    done = folder.images.generalize(folder / name)
    assert {one.path.lstrip("/") for one in done.gone if one.emptied} == set(EMPTIED)
    assert content(folder, name, MIB) == {**KEPT, **dict.fromkeys(EMPTIED, b"")}
    assert "sshd starts" in " ".join(folder.notices)
    shown = folder.shown(name)
    assert b"SECRET OF THE HOST" not in shown
    assert b"SEED OF THE HOST" not in shown
    assert folder.images.generalize(folder / name).gone == ()
    assert not [one for one in folder.names() if one.startswith(".")]


def test_dry_run_says_what_would_go_and_changes_nothing(folder, make):
    make("a.raw", TableKind.NONE)
    before = (folder / "a.raw").read_bytes()
    plans = []
    folder.host.reporter = hvmgr.Reporter(approve=plans.append, dry_run=True)
    with pytest.raises(errors.Declined):
        folder.images.generalize(folder / "a.raw")
    told = [step.describe() for step in plans[0].steps()]
    assert "empty /etc/machine-id (machine id)" in told
    assert "remove /etc/ssh/ssh_host_rsa_key (ssh host keys)" in told
    assert (folder / "a.raw").read_bytes() == before
    assert folder.names() == {"a.raw"}


def test_journal_of_a_system_that_was_cut_off_is_replayed_first(folder, make):
    """A block that only the journal holds: it is in its place afterwards."""
    disk = make("a.raw", TableKind.NONE)
    (folder / "block").write_bytes(b"N" * 1024)
    place = e2fsprogs.blocks(disk, "/etc/passwd")[0]
    e2fsprogs.change(disk, ["jo", f"jw -b {place} {folder / 'block'}", "jc"])
    facts = subprocess.run(["dumpe2fs", "-h", disk], check=True, capture_output=True, text=True, timeout=60).stdout
    assert "needs_recovery" in facts
    folder.images.generalize(disk)
    assert content(folder, "a.raw", 0)["etc/passwd"] == b"N" * len(KEPT["etc/passwd"])


def test_damaged_file_system_is_left_alone(folder, make):
    disk = make("a.raw", TableKind.NONE)
    inode = e2fsprogs.entry(disk, "/etc").inode
    e2fsprogs.change(disk, [f"clri <{inode}>"])
    before = disk.read_bytes()
    with pytest.raises((errors.Corrupt, errors.NotFound)):
        folder.images.generalize(disk)
    assert disk.read_bytes() == before


def test_image_that_another_stands_on_is_refused(folder, make):
    make("a.vhd")
    folder.images.create(folder / "child.qcow2", options=hvmgr.ImageOptions(parent=folder / "a.vhd"))
    before = folder.bytes_of_files()
    with pytest.raises(errors.Conflict, match=r"needed by .*child\.qcow2"):
        folder.images.generalize(folder / "a.vhd")
    assert folder.bytes_of_files() == before


def test_disk_without_a_system_says_what_it_has(folder):
    folder.images.prepare(folder / "a.raw", LayoutWish(FileSystem.EXT4), size=16 * MIB)
    folder.images.create(folder / "b.raw", MIB)
    (folder / "c.raw").write_bytes(b"XFSB".ljust(MIB, b"\0"))
    for name, error, what in (
        ("a.raw", errors.NotFound, "no Linux system"),
        ("b.raw", errors.NotFound, "no volume with a system"),
        ("c.raw", errors.Unsupported, "without mounting"),
    ):
        with pytest.raises(error, match=what):
            folder.images.generalize(folder / name)


@pytest.mark.parametrize(
    ("state", "known"),
    [
        ("IMAGE_STATE_GENERALIZE_RESEAL_TO_OOBE", Generalised.YES),
        ("IMAGE_STATE_COMPLETE", Generalised.NO),
        (None, Generalised.UNKNOWN),
    ],
)
def test_windows_is_asked_whether_sysprep_was_there(folder, require_program, state, known):
    for name in ("wimlib-imagex", "mkntfs", "ntfscat"):
        require_program(name)
    place = folder / "windows" / "Windows" / "System32" / "Config"
    place.mkdir(parents=True)
    (place / "SOFTWARE").write_bytes(hives.software(state))
    folder.host.wims.capture(folder / "windows", folder / "a.wim")
    folder.host.wims.apply(folder / "a.wim", folder / "a.vhd", WimApplyOptions(size=16 * MIB))
    folder.host.wims.capture(folder / "a.vhd", folder / "b.wim")
    warned = [one for one in folder.notices if "generalised" in one]
    before = (folder / "a.vhd").read_bytes()
    found = folder.images.generalize(folder / "a.vhd").windows
    assert found.generalised is known
    assert found.product == "Windows Server 2025 Standard"
    assert len(warned) == (0 if known is Generalised.YES else 3)  # by whoever makes an image of it, or uses one
    assert (folder / "a.vhd").read_bytes() == before
