"""The images of a source: where each one is now, and whether it may be looked at.

Configurations and headers name images as they were named where the home was written. Each name is tried as the maps
say, beside the child that names it, moved together with the home, and as it is recorded.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvmgr import errors
from hvmgr.model import manifest, maps
from hvmgr.model.compatibility import found
from hvmgr.model.configuration import Configuration, Disk
from hvmgr.model.finding import Finding
from hvmgr.model.maps import Entry, Used
from hvmgr.storage import images

_SLOT = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of the source: where it lies now, how it was named, and its parent's place now."""

    path: str
    recorded: str
    format: str
    size: int
    data: int
    length: int  # of the file
    identity: tuple[int, int]
    parent: str | None
    parent_format: str | None
    backing: str | None  # as the header names it
    inside: bool
    is_foreign: bool = False  # a VHD that QEMU would not read as it is: a copy of it becomes qcow2


@dataclass(frozen=True, slots=True)
class Missing:
    """An image that is named and not there; ``slot`` is the disk that needs it."""

    slot: str
    recorded: str
    looked: str


@dataclass(slots=True)
class Finder:
    """Finds the images of the home in ``folder``, which was written as ``home``; collects them and every problem."""

    folder: Path
    home: Path
    paths: tuple[Entry, ...]
    by_slot: tuple[Entry, ...]
    used: Used
    trusted: bool
    listed: Mapping[str, manifest.Image] = field(default_factory=dict)  # by the place in the folder, and where it was
    expected: dict[str, manifest.Image] = field(default_factory=dict)  # by the place where it was found
    vhd_parents: set[str] = field(default_factory=set)  # found by the words and the id that their children have
    left_out: dict[str, str] = field(default_factory=dict)  # disks that snapshots leave out: name, and place now
    images: dict[str, SourceImage] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)

    def problem(self, code: str, sentence: str, where: object, repair: str | None = None) -> None:
        """Note what does not fit."""
        self.problems.append(found(code, sentence, where, repair))

    def disks(self, one: Configuration) -> dict[str, str]:
        """The disks that snapshots freeze: slot and the image's place now; their chains are read."""
        disks: dict[str, str] = {}
        try:
            listed = one.disks()
            _require_slots(listed, one.source)
        except errors.HvmgrError as error:
            self.problem("damaged", str(error), one.source)
            return disks
        for disk in listed:
            if not disk.takes_part or disk.source is None:
                if not disk.is_left_out:
                    self._require_usable(disk)
                continue
            if disk.slot in disks:
                self.problem("double-slot", f"{one.source} has two disks {disk.slot}", one.source)
                continue
            disks[disk.slot] = self._image(disk.slot, disk.source, disk.format or images.RAW)
        return disks

    def disks_left_out(self, one: Configuration) -> dict[str, str]:
        """The hard disks that snapshots leave out and that have to come along: slot and the image's place now.

        Such a disk is written by its VM alone. One that is shared by its XML, or only read, may stay where it is, unless
        it is a file of the source itself.
        """
        disks: dict[str, str] = {}
        for disk in one.disks():
            if not disk.is_left_out or disk.source is None or disk.slot in disks:
                continue
            place = self.locate(disk.source)
            if (disk.readonly or disk.shareable) and not self._is_inside(place):
                self._require_usable(disk)
                continue
            disks[disk.slot] = self._image(disk.slot, disk.source, disk.format or images.RAW)
            self.left_out[disk.source] = disks[disk.slot]
        return disks

    def _require_usable(self, disk: Disk) -> None:
        """What stays where it is must be something that QEMU reads as it is."""
        if disk.source is None or disk.type not in {"file", "block"}:
            return
        path = self.locate(disk.source)
        try:
            images.require_usable(Path(path))
        except errors.Unsupported as error:
            self.problem("format-unsupported", str(error), path, error.hint)

    def _image(self, slot: str, recorded: str, fmt: str) -> str:
        """Where the image is now; it and its parents are read as far as they are there."""
        top = path = self.locate(recorded)
        self._check_name(recorded, path)
        below: str | None = path
        while below is not None and below not in self.images:
            below, fmt, recorded = self._read_image(slot, below, fmt, recorded)
        return top

    def _read_image(self, slot: str, path: str, fmt: str, recorded: str) -> tuple[str | None, str, str]:
        """Reads one header; the place of its parent, the parent's format and how it was named."""
        try:
            if os.path.lexists(path) and not self.may_read(path, recorded):
                return None, "", ""
            if self._is_foreign(path, fmt):
                return self._read_vhd(slot, path, recorded)
            header = images.read(Path(path), fmt)
        except errors.NotFound:
            self.missing.append(Missing(slot, recorded, path))
            return None, "", ""
        except errors.Unsupported as error:
            self.problem("format-unsupported", str(error), path, error.hint)
            return None, "", ""
        except errors.HvmgrError as error:
            self.problem("damaged", str(error), path, error.hint)
            return None, "", ""
        parent, named = None, ""
        if header.backing is not None:
            parent, named = self._parent(path, recorded, header.backing)
            if header.backing_format is None:
                self.problem("damaged", f"{path} does not state the format of its parent", path)
                parent = None
        self.images[path] = SourceImage(
            path=path, recorded=recorded, format=header.format, size=header.size, data=header.data,
            length=os.stat(path).st_size, identity=header.identity, parent=parent,
            parent_format=header.backing_format, backing=header.backing, inside=self._is_inside(path),
        )  # fmt: skip
        return parent, header.backing_format or images.RAW, named

    def _is_foreign(self, path: str, fmt: str) -> bool:
        """Whether it is a VHD that our own codec has to read: differencing, the parent of such a one, cut short by QEMU."""
        if fmt == images.QCOW2 or not os.path.isfile(path):
            return False
        found = images.identify(Path(path))
        if found.format != "vhd" or found.is_differencing or path in self.vhd_parents or fmt != images.VPC:
            return found.is_differencing or path in self.vhd_parents
        try:
            images.read(Path(path), fmt)
        except errors.Unsupported:
            return True
        except errors.Corrupt:
            return False
        return False

    def _read_vhd(self, slot: str, path: str, recorded: str) -> tuple[str | None, str, str]:
        from hvmgr import vhd  # rarely met

        parent = None
        with vhd.open_image(path) as image:
            if image.kind is vhd.Kind.DIFFERENCING:
                try:
                    parent = str(vhd.find_parent(image, folders=self._vhd_folders()))
                except (errors.NotFound, errors.Conflict, errors.Unsupported) as error:
                    repair = "say which folder it is in: --path DIR=DIR"
                    self.problem("missing-disk", f"disk {slot}: {error}", path, repair)
            self.images[path] = SourceImage(
                path=path, recorded=recorded, format=images.VPC, size=image.size, data=os.stat(path).st_blocks * 512,
                length=os.stat(path).st_size, identity=images.identity(Path(path)), parent=parent,
                parent_format=None if parent is None else images.VPC,
                backing=None if parent is None else os.path.relpath(parent, os.path.dirname(path)),
                inside=self._is_inside(path),
                is_foreign=image.kind is vhd.Kind.DIFFERENCING or path not in self.vhd_parents,
            )  # fmt: skip
        if parent is not None:
            self.vhd_parents.add(parent)
            self.used.entries |= {one for one in self.paths if Path(parent).is_relative_to(os.path.realpath(one.new))}
            if parent in self.listed:
                self.expected[parent] = self.listed[parent]
        return parent, images.VPC, parent or ""

    def _vhd_folders(self) -> list[Path]:
        """Where parents of VHDs may be: in the source, where maps lead, beside a file that the user named."""
        named = [Path(os.path.realpath(one.new)) for one in (*self.paths, *self.by_slot)]
        folders = [one if one.is_dir() else one.parent for one in named if one.exists()]
        return list(dict.fromkeys([self.folder, *folders]))

    def check_vhds(self) -> None:
        """Note a differencing VHD of another size than its parent, and one that an image of QEMU's stands on."""
        for path, image in self.images.items():
            below = self.images.get(image.parent or "")
            if below is None:
                continue
            if image.format != images.VPC and below.is_foreign and below.parent is not None:
                self.problem(
                    "vhd-differencing", f"{path} stands on the differencing VHD {below.path}, whose parent QEMU never read",
                    path, "take the VHD itself as the disk",
                )  # fmt: skip
            elif image.format == images.VPC and image.size != below.size:
                sizes = f"{image.size} bytes, its parent {below.path} has {below.size}"
                self.problem("wrong-size", f"{path} is a disk of {sizes}", path, "get the parent that it was made from")

    def _parent(self, child: str, recorded: str, backing: str) -> tuple[str, str]:
        """A parent's place now, and its name as the home knew it: beside the child, mapped, or moved with the home."""
        named = os.path.normpath(os.path.join(os.path.dirname(recorded), backing))
        beside = os.path.normpath(os.path.join(os.path.dirname(child), backing))
        if maps.map_path(named, self.paths)[1] is None and not os.path.isabs(backing) and os.path.exists(beside):
            place = beside if self._is_inside(beside) else os.path.realpath(beside)
            listed = self.listed.get(beside) or self.listed.get(named) or self.listed.get(self._moved(named))
            if listed is not None:
                self.expected[place] = listed
            return place, named
        return self.locate(named), named

    def locate(self, recorded: str) -> str:
        """Where a file of the home is now: as the maps say, moved with the home, or as recorded."""
        moved = self._moved(recorded)
        listed = self.listed.get(moved) or self.listed.get(recorded)
        original = recorded if listed is None else listed.path
        found = moved if self._is_inside(moved) else os.path.realpath(moved)
        for name in dict.fromkeys((recorded, moved, original)):
            mapped, entry = maps.map_path(name, self.paths)
            if entry is not None:
                self.used.entries.add(entry)
                found = os.path.realpath(mapped)
                break
        if listed is not None:
            self.expected[found] = listed
        return found

    def _moved(self, recorded: str) -> str:
        path = Path(os.path.normpath(recorded))
        return str(self.folder / path.relative_to(self.home)) if path.is_relative_to(self.home) else str(path)

    def _check_name(self, recorded: str, path: str) -> None:
        """A name with ``..`` inside a home is nothing that hvmgr writes, except between its own three folders."""
        if os.path.isabs(recorded) and ".." in Path(recorded).parts:
            self.problem("name-escapes", f"the name {recorded} has '..' in it", path)

    def may_read(self, path: str, recorded: str) -> bool:
        """Whether an image may be looked at; the reason is a finding."""
        if self._is_inside(path):
            return self.is_plain(Path(path))
        if self.trusted or self._is_mapped(path) or path in self.vhd_parents:
            return True
        self.problem(
            "image-outside", f"{recorded} lies outside {self.folder}; it is read only when you say so", path,
            f"allow it: --path '{os.path.dirname(path)}={os.path.dirname(path)}', or say where it is",
        )  # fmt: skip
        return False

    def _is_mapped(self, path: str) -> bool:
        targets = [os.path.realpath(one.new) for one in (*self.paths, *self.by_slot)]
        return any(path == one or path.startswith(one.rstrip("/") + "/") for one in targets)

    def _is_inside(self, path: str) -> bool:
        return Path(path).is_relative_to(self.folder)

    def is_plain(self, path: Path) -> bool:
        """Whether a file of the source is a file, reached without links; one that is missing is somebody else's."""
        for step in (path, *path.parents):  # up to the root, for what is in a second folder of snapshots
            if step == self.folder:
                break
            if step.is_symlink():
                if self.trusted and step.parent == self.folder:
                    return True  # a home of this host whose folder lies on another file system
                self.problem("link", f"{step} is a symbolic link", step)
                return False
        if path.exists() and not path.is_file():
            self.problem("link", f"{path} is no plain file", path)
            return False
        return True

    def replace_by_slot(self, present: Configuration, disks: dict[str, str], others: Sequence[dict[str, str]]) -> None:
        """Follow ``--disk SLOT=SOURCE``: the one image of the slot that is missing, or its only image."""
        for entry in self.by_slot:
            gone = sorted({one.looked for one in self.missing if one.slot == entry.old})
            of_slot = {one[entry.old] for one in (disks, *others) if entry.old in one}
            if not of_slot:
                continue  # said as a line that nothing matched
            self.used.entries.add(entry)
            if len(gone) > 1 or (not gone and not self._stands_alone(of_slot)):
                what = ", ".join(gone) if gone else "they are all there"
                self.problem(
                    "missing-disk", f"disk {entry.old} has several images, so that {entry} does not say which ({what})",
                    entry.old, "say where the folders are with --path OLD=NEW",
                )  # fmt: skip
                continue
            self._put_in_place(present, entry, gone[0] if gone else next(iter(of_slot)), disks, others)

    def _stands_alone(self, of_slot: set[str]) -> bool:
        return len(of_slot) == 1 and all(self.images[one].parent is None for one in of_slot if one in self.images)

    def _put_in_place(
        self,
        present: Configuration,
        entry: Entry,
        old: str,
        disks: dict[str, str],
        others: Sequence[dict[str, str]],
    ) -> None:
        new = os.path.realpath(entry.new)
        if old in self.expected:
            self.expected[new] = self.expected.pop(old)
        recorded = next((one.recorded for one in self.missing if one.looked == old), old)
        self.missing[:] = [one for one in self.missing if one.looked != old]
        self.problems[:] = [one for one in self.problems if not (one.code == "image-outside" and one.where == old)]
        self.images.pop(old, None)
        fmt = self._format_of(present, entry.old, old, new, disks)
        below: str | None = new
        while below is not None and below not in self.images:
            below, fmt, recorded = self._read_image(entry.old, below, fmt, recorded)
        for path, image in list(self.images.items()):
            if image.parent == old:
                self.images[path] = dataclasses.replace(image, parent=new)
        for each in (disks, *others):
            if each.get(entry.old) == old:
                each[entry.old] = new
        for name, place in self.left_out.items():
            if place == old:
                self.left_out[name] = new

    def _format_of(self, present: Configuration, slot: str, old: str, new: str, disks: dict[str, str]) -> str:
        """The format of a file that the user named: VHD by its content, else as its child or the configuration state."""
        if os.path.isfile(new) and images.identify(Path(new)).format == "vhd":
            return images.VPC
        stated = next((one.parent_format for one in self.images.values() if one.parent == old), None)
        disk = present.find_disk(slot)
        is_top = disks.get(slot) == old or old in self.left_out.values()
        named = disk.format if disk is not None and is_top else None
        return stated or named or images.QCOW2

    def check_cycles(self) -> None:
        """Note a circle of parents."""
        for path in self.images:
            seen, step = set[str](), path
            while step in self.images and step not in seen:
                seen.add(step)
                step = self.images[step].parent or ""
            if step in seen:
                self.problem("cycle", f"the parents of {path} form a circle", path)
                return


def _require_slots(disks: Sequence[Disk], where: str) -> None:
    """Names of files are made of slots."""
    for disk in disks:
        if not _SLOT.fullmatch(disk.slot):
            raise errors.Corrupt(f"{where}: no disk can be called {disk.slot!r}")
