"""What a system is told when it starts for the first time, put onto its disk: unattend.xml, or cloud-init's user data."""

from __future__ import annotations

from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import e2fsprogs, ntfs
from hvmgr.operations.images import disks, volumes
from hvmgr.operations.images.recognition import Recognised
from hvmgr.operations.images.volumes import Found
from hvmgr.storage.catalog import AnswerKind
from hvmgr.vhd.source import RawSource

_ANSWER_MAX = 16 * units.MIB
_PANTHER = "Windows/Panther"
_SEED = "/var/lib/cloud/seed/nocloud"


def kind_of(path: Path) -> AnswerKind:
    """An XML file is Windows' answer file; what begins as cloud-init's user data is that."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise errors.NotFound(f"there is no {path}", path=str(path)) from None
    except IsADirectoryError:
        raise errors.UsageError(f"{path} is a folder, not an answer file") from None
    if path.stat().st_size > _ANSWER_MAX:
        raise errors.UsageError(f"{path} is too large for an answer file", hint="it has at most 16 MiB")
    if b"<unattend" in head or (path.suffix.lower() == ".xml" and head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<")):
        return AnswerKind.UNATTEND
    if head.startswith((b"#cloud-config", b"#!", b"#include", b"Content-Type: multipart", b"## template: jinja")):
        return AnswerKind.CLOUD_INIT
    raise errors.UsageError(
        f"{path} is no answer file", hint="give an unattend.xml of Windows, or cloud-init's user data (#cloud-config …)"
    )


def put(found: Recognised, kind: AnswerKind, answer: Path, place: Path, report: disks.Report) -> None:
    """The answer file is in the system on a disk, which is new: nobody uses it yet. ``place`` is for the work.

    NotFound when there is no system of that kind.
    """
    wanted = "ntfs" if kind is AnswerKind.UNATTEND else "ext"
    with disks.opened(found) as disk:
        there = [one for one in volumes.volumes_of(disk) if one.file_system == wanted]
    for one in there:
        file = place / f"volume{one.number}"
        volumes.copied_out(found, one, file, report)
        done = _put_unattend(file, answer) if kind is AnswerKind.UNATTEND else _put_seed(file, answer, place)
        if done:
            _write_back(found, file, one, report)
            return
    system = "Windows with a folder Windows\\Panther" if kind is AnswerKind.UNATTEND else "Linux with cloud-init"
    raise errors.NotFound(
        f"there is no {system} on the disk, which could read the answer file", hint="deploy it with --without-answer"
    )


def _put_unattend(volume: Path, answer: Path) -> bool:
    real = ntfs.find(volume, _PANTHER)
    if real is None:
        return False
    name = next((one for one in ntfs.names(volume, f"/{real}") if one.lower() == "unattend.xml"), "unattend.xml")
    ntfs.write(volume, f"{real}/{name}", answer)
    return True


def _put_seed(volume: Path, answer: Path, place: Path) -> bool:
    e2fsprogs.replay(volume)
    if e2fsprogs.entry(volume, "/usr/bin/cloud-init") is None:
        return False
    meta = place / "meta-data"
    meta.write_bytes(b"")
    commands, at = [], ""
    for word in _SEED.strip("/").split("/"):
        at += f"/{word}"
        if e2fsprogs.entry(volume, at) is None:
            commands.append(f"mkdir {e2fsprogs.quoted(at)}")
    commands.append(f"cd {_SEED}")
    for name, source in (("user-data", answer), ("meta-data", meta)):
        if e2fsprogs.entry(volume, f"{_SEED}/{name}") is not None:
            commands.append(f"rm {name}")
        commands.append(f"write {e2fsprogs.quoted(str(source))} {name}")
        # It may hold passwords: for root alone.
        commands += [
            f"set_inode_field {name} mode 0100600",
            f"set_inode_field {name} uid 0",
            f"set_inode_field {name} gid 0",
        ]
    e2fsprogs.change(volume, commands)
    e2fsprogs.check(volume)
    return True


def _write_back(found: Recognised, file: Path, volume: Found, report: disks.Report) -> None:
    with disks.written(found.path, found.format.value) as disk, RawSource(file) as source:
        disks.write_part(disk, source, volume.offset, what=f"write {found.path.name}", report=report)
