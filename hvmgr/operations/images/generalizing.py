"""``image generalize``: what makes a Linux system the one that it is goes, so that many machines can be made of its image.

The system makes all of it anew when it starts. Nothing is mounted: the volume is copied beside the image, its journal
replayed, names taken out by debugfs, the whole checked, and what differs written back (``volumes``). Of a Windows it is said
whether sysprep has done that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import e2fsprogs
from hvmgr.host.e2fsprogs import Entry
from hvmgr.model import image_plan
from hvmgr.operations import image_users
from hvmgr.operations.images import changes, disks, making, recognition, sysprep, volumes
from hvmgr.operations.images.recognition import Recognised
from hvmgr.operations.images.sysprep import Windows
from hvmgr.operations.images.volumes import Found
from hvmgr.storage import durable, index

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

_DEPTH_MAX = 40
_ROTATED = re.compile(r"\.(\d+|gz|xz|bz2|zst|old)$|-\d{8}(\.(gz|xz|bz2|zst))?$")
_HISTORIES = (
    ".bash_history", ".zsh_history", ".ash_history", ".sh_history", ".python_history", ".lesshst",
    ".local/share/fish/fish_history",
)  # fmt: skip
_HOST_KEY = re.compile(r"ssh_host_.*_key(\.pub)?$")
# Folders whose content goes: (what it is, folder, which names).
_CONTENTS = (
    ("DHCP leases and ids", "/var/lib/dhcp", ".*"),
    ("DHCP leases and ids", "/var/lib/dhclient", ".*"),
    ("DHCP leases and ids", "/var/lib/dhcpcd", ".*"),
    ("DHCP leases and ids", "/var/lib/NetworkManager", r".*\.lease(s)?|secret_key|.*-lease-.*|timestamps|seen-bssids"),
    ("cloud-init's state", "/var/lib/cloud", "(?!seed$).*"),
)
_SINGLE = (
    ("random seed and host secrets", "/var/lib/systemd/random-seed"),
    ("random seed and host secrets", "/var/lib/urandom/random-seed"),
    ("random seed and host secrets", "/var/lib/random-seed"),
    ("random seed and host secrets", "/var/lib/systemd/credential.secret"),
    ("DHCP leases and ids", "/etc/dhcpcd.duid"),
    ("names of network cards", "/etc/udev/rules.d/70-persistent-net.rules"),
    ("names of network cards", "/etc/udev/rules.d/75-persistent-net-generator.rules"),
)
# What makes new host keys when the system starts: without any of them sshd does not start.
_KEY_MAKERS = (
    "/usr/bin/cloud-init", "/usr/lib/systemd/system/sshd-keygen.target", "/usr/lib/systemd/system/sshdgenkeys.service",
    "/usr/lib/systemd/system/regenerate_ssh_host_keys.service", "/etc/init.d/sshd",
)  # fmt: skip
_SECRETS = {"ssh host keys", "random seed and host secrets"}
_OTHERS = {"xfs", "btrfs", "lvm", "luks", "bitlocker"}


@dataclass(frozen=True, slots=True)
class Gone:
    """One thing that goes: a file or link, a folder with all in it, or only what a file holds (``emptied``)."""

    what: str
    path: str
    is_folder: bool = False
    emptied: bool = False

    def describe(self) -> str:
        """For people."""
        return f"{'empty' if self.emptied else 'remove'} {self.path}{'/' if self.is_folder else ''} ({self.what})"


@dataclass(frozen=True, slots=True)
class Generalisation:
    """What became of an image: the partition, what went (of Linux), or what is known of its Windows."""

    path: Path
    partition: int
    gone: tuple[Gone, ...]
    windows: Windows | None = None

    @property
    def is_changed(self) -> bool:
        """Whether anything was written."""
        return bool(self.gone)


def generalize(host: Host, path: Path, partition: int | None) -> Generalisation:
    """The Linux in the image is nobody any more; of a Windows it is only looked up whether that is so."""
    changes.complete(host, [path])
    found = recognition.look(path)
    volumes.require_writable(found)
    with disks.opened(found) as disk:
        there = volumes.volumes_of(disk)
    linux = [one for one in there if one.file_system == "ext" and partition in (None, one.number)]
    if linux:
        return _generalize_linux(host, path, found, linux)
    if any(one.file_system == "ntfs" and partition in (None, one.number) for one in there):
        return _look_at_windows(host, path, found, there, partition)
    told = ", ".join(one.describe() for one in there) or "no partition"
    if any(one.file_system in _OTHERS for one in there):
        raise errors.Unsupported(
            f"{path} has no volume with ext2, ext3 or ext4, and others are not changed without mounting them",
            hint=f"it has {told}; run virt-sysprep, or generalise the system from inside",
        )
    raise errors.NotFound(f"{path} has no volume with a system", hint=f"it has {told}")


# --- Linux ------------------------------------------------------------------------------------------------------------


def _generalize_linux(host: Host, path: Path, found: Recognised, there: list[Found]) -> Generalisation:
    e2fsprogs.require()
    with changes.locked(host, [path], seen=[found]):
        changes.require_unused(host, path)
        _require_nobody(host, path)
        with volumes.changing(host, path, found, f"image generalize of {path}") as work:
            with volumes.stoppable(host) as report:
                volume, file = _root_of(path, found, there, work.place, report)
            e2fsprogs.check(file)
            gone = list(things(file))
            if not gone:
                return Generalisation(path, volume.number, ())
            work.approve(*(image_plan.PrepareWork(one.describe()) for one in gone))
            e2fsprogs.change(file, [command for one in gone for command in _commands(file, one)])
            e2fsprogs.check(file)
            if any(_HOST_KEY.search(one.path) for one in gone) and not _makes_keys(file):
                host.reporter.notice(
                    "nothing in this system makes new ssh host keys by itself: run 'ssh-keygen -A' in each machine "
                    "before sshd starts, or use cloud-init"
                )
            work.write(file, volume.offset)
    return Generalisation(path, volume.number, tuple(gone))


def _require_nobody(host: Host, path: Path) -> None:
    """A VM that is off would find itself without its keys: it is refused here, whoever's it is."""
    managed = {entry.name for entry in index.entries()}
    for user in image_users.of(host, path):
        raise changes.needed(path, user, managed)


def _root_of(
    path: Path, found: Recognised, there: list[Found], place: Path, report: disks.Report
) -> tuple[Found, Path]:
    """The volume that holds a root file system, copied out with its journal replayed."""
    for one in there:
        file = place / f"volume{one.number}"
        volumes.copied_out(found, one, file, report)
        e2fsprogs.replay(file)
        if any(entry.name == "etc" and entry.is_folder for entry in e2fsprogs.entries(file, "/")):
            return one, file
        durable.remove(file)
    told = ", ".join(one.describe() for one in there)
    raise errors.NotFound(f"{path} holds no Linux system: no volume has a folder /etc", hint=f"looked into: {told}")


def things(volume: Path) -> Iterator[Gone]:
    """What makes the system on a volume the one that it is."""
    yield from _machine_id(volume)
    for one in e2fsprogs.entries(volume, "/etc/ssh"):
        if _HOST_KEY.match(one.name):
            yield _whole("ssh host keys", "/etc/ssh", one)
    for what, folder, names in _CONTENTS:
        for one in e2fsprogs.entries(volume, folder):
            if re.fullmatch(names, one.name):
                yield _whole(what, folder, one)
    for what, path in _SINGLE:
        if (found := e2fsprogs.entry(volume, path)) is not None and not found.is_folder:
            yield Gone(what, path)
    yield from _logs(volume, "/var/log", 0)
    yield from _histories(volume)


def _histories(volume: Path) -> Iterator[Gone]:
    homes = ["/root", *(f"/home/{one.name}" for one in e2fsprogs.entries(volume, "/home") if one.is_folder)]
    for home in homes:
        for name in _HISTORIES:
            found = e2fsprogs.entry(volume, f"{home}/{name}")
            if found is not None and not found.is_folder:
                yield Gone("shell history", f"{home}/{name}")


def _machine_id(volume: Path) -> Iterator[Gone]:
    """An empty file is what systemd fills; a missing one would stay missing on a root that is mounted read-only."""
    found = e2fsprogs.entry(volume, "/etc/machine-id")
    if found is not None and not found.is_link and found.size:
        yield Gone("machine id", "/etc/machine-id", emptied=True)
    other = e2fsprogs.entry(volume, "/var/lib/dbus/machine-id")
    if other is not None and not other.is_link:
        yield Gone("machine id", "/var/lib/dbus/machine-id")


def _logs(volume: Path, folder: str, depth: int) -> Iterator[Gone]:
    """Logs are emptied, for who writes them needs their owner and mode; what was rotated, and journald's folders, go."""
    for one in e2fsprogs.entries(volume, folder) if depth < _DEPTH_MAX else ():
        path = f"{folder}/{one.name}"
        if folder == "/var/log/journal" or (not one.is_folder and _ROTATED.search(one.name)):
            yield _whole("logs", folder, one)
        elif one.is_folder:
            yield from _logs(volume, path, depth + 1)
        elif one.mode & 0o170000 == 0o100000 and one.size:
            yield Gone("logs", path, emptied=True)


def _whole(what: str, folder: str, one: Entry) -> Gone:
    return Gone(what, f"{folder}/{one.name}", is_folder=one.is_folder)


def _commands(volume: Path, one: Gone) -> Iterator[str]:
    word = e2fsprogs.quoted(one.path)
    if one.emptied:
        yield f"punch {word} 0"
        yield f"set_inode_field {word} size 0"
    elif one.is_folder:
        yield from _removal(volume, one.path, 0)
    else:
        if one.what in _SECRETS:  # a name that is gone leaves the bytes
            yield from (f"zap_block -p 0 {number}" for number in e2fsprogs.blocks(volume, one.path))
        yield f"rm {word}"


def _removal(volume: Path, folder: str, depth: int) -> Iterator[str]:
    if depth > _DEPTH_MAX:
        raise errors.Corrupt(f"the folders in {folder} are nested too deeply")
    for one in e2fsprogs.entries(volume, folder):
        path = f"{folder}/{one.name}"
        if one.is_folder:
            yield from _removal(volume, path, depth + 1)
        else:
            yield f"rm {e2fsprogs.quoted(path)}"
    yield f"rmdir {e2fsprogs.quoted(folder)}"


def _makes_keys(volume: Path) -> bool:
    return any(e2fsprogs.entry(volume, path) is not None for path in _KEY_MAKERS)


# --- Windows ----------------------------------------------------------------------------------------------------------


def _look_at_windows(
    host: Host, path: Path, found: Recognised, there: list[Found], partition: int | None
) -> Generalisation:
    """The NTFS volumes are only read; the first with a Windows on it is told."""
    with making.kept_still(host, found), volumes.working(path) as place, volumes.stoppable(host) as report:
        for one in there:
            if one.file_system != "ntfs" or partition not in (None, one.number):
                continue
            file = place / f"volume{one.number}"
            volumes.copied_out(found, one, file, report)
            windows = sysprep.in_volume(file)
            durable.remove(file)
            if windows is not None:
                return Generalisation(path, one.number, (), windows)
    raise errors.NotFound(f"{path} holds neither a Linux system nor a Windows on NTFS")
