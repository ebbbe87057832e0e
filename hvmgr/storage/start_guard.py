"""May this VM start? Told from files alone, and quickly: libvirt waits for the answer, and must not be asked anything.

| code              | severity | what is true                                                                       |
|-------------------|----------|------------------------------------------------------------------------------------|
| home-missing      | error    | the home that the configuration names is not there, or holds no VM                 |
| home-foreign      | error    | it is another VM's, and this one would write to images in it                        |
| home-unreadable   | error    | the home's configuration or its journal cannot be understood                       |
| operation-running | error    | a command works on the VM, and this is not the start that it makes itself           |
| operation-open    | error    | a command died in the middle                                                       |
| image-missing     | error    | an image of a chain is not there                                                   |
| image-unreadable  | error    | an image is damaged, or of another format than is stated, or none is stated        |
| image-frozen      | error    | the VM would write to an image that snapshots need unchanged                       |
| image-changed     | error    | a frozen image has another size or header than when it was frozen                  |
| image-attached    | error    | an image that the VM would write, or one that is written there, is a block device  |
| image-swapped     | error    | a working image does not stand on what the snapshot above it froze                 |
| image-touched     | warning  | a frozen image has another time alone: put back from a backup, or written in place |
| snapshot-missing  | warning  | the snapshot above the present is gone: nobody can compare                         |

A start that a command of hvmgr makes itself is named in the journal (``journal.start_named``) by the images that it
writes; it passes while that command lives.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, settings
from hvmgr.model.configuration import Configuration, Disk
from hvmgr.model.finding import Finding, Severity
from hvmgr.model.layout import Layout
from hvmgr.model.metadata import Metadata
from hvmgr.storage import attachments, durable, frozen, images, index, journal, locks, vm_home
from hvmgr.storage.frozen import Condition
from hvmgr.storage.images import Header
from hvmgr.storage.vm_home import VmHome

_ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)


def examine(present: Configuration) -> list[Finding]:
    """What speaks against a start with this configuration, the worst first; nothing for a VM that is not hvmgr's.

    Its metadata says where the home is; all else is the home's to say.
    """
    facts, layout = present.metadata(), layout_of(present)
    if facts is None or layout is None:
        return []
    found = _Case(present, layout, command_line(present.name, facts, "doctor", "--repair")).findings()
    return sorted(found, key=lambda one: _ORDER.index(one.severity))


def refusals(findings: Iterable[Finding]) -> list[Finding]:
    """Those for which a VM must not start."""
    return [one for one in findings if one.severity is Severity.ERROR]


def written_by(present: Configuration) -> frozenset[str]:
    """The images and devices that a VM writes to, links resolved: what names a start in the journal."""
    return frozenset(vm_home.canonical(disk.source) for disk in _writable(present) if disk.source is not None)


def command_line(name: str, facts: Metadata, *words: str) -> str:
    """A command of hvmgr's with what finds the VM whatever the settings are: ``hvmgr doctor --repair web``."""
    found = ["hvmgr"]
    try:
        uri, root = settings.default_uri(), settings.default_root()
    except errors.UsageError:  # a configuration file that nobody understands keeps no VM from starting
        uri, root = "", Path()
    if facts.uri != uri:
        found += ["-c", facts.uri]
    if facts.home.parent != root:
        found += ["--root", str(facts.home.parent)]
    return shlex.join([*found, *words, name])


# --- the start that passes whatever is found ------------------------------------------------------------------------


def is_allowed(layout: Layout) -> bool:
    """Whether the next start passes in any case."""
    return layout.allowed_start.exists()


def allow_once(layout: Layout) -> None:
    """The next start passes in any case."""
    durable.write_file(layout.allowed_start, b"")


def use_up(present: Configuration) -> bool:
    """Whether this start was allowed in any case; the one after it has to pass by itself."""
    layout = layout_of(present)
    if layout is None or not is_allowed(layout):
        return False
    durable.remove(layout.allowed_start)
    return True


def layout_of(present: Configuration) -> Layout | None:
    """The home that a configuration names; None when it is not hvmgr's."""
    facts = present.metadata()
    return None if facts is None else Layout(home=Path(os.path.realpath(facts.home)), vm_id=present.uuid)


# --- one examination ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Base:
    """What has to lie below a working image: the image that the snapshot above the present froze for this disk."""

    path: str
    format: str


@dataclass(frozen=True, slots=True)
class _Case:
    """One VM that is about to start, and what is found about it."""

    present: Configuration
    layout: Layout
    repair: str

    def findings(self) -> Iterator[Finding]:
        """Everything that is found; what the files say between two steps of an operation means nothing."""
        try:
            yield from self._look()
        except errors.HvmgrError as error:
            yield self._error("home-unreadable", str(error), self.layout.home)

    def _look(self) -> Iterator[Finding]:
        folder = self.layout.home
        if not folder.is_dir():
            yield self._error("home-missing", f"its home {folder} is not there", folder)
            return
        try:
            home = vm_home.open_home(folder)
        except errors.NotFound:  # also while a VM is made or deleted
            yield from self._operation() or [
                self._error("home-missing", f"its home {folder} holds no VM any more", folder)
            ]
            return
        if home.vm_id != self.layout.vm_id:
            yield from self._writes_into(home)
        elif operation := self._operation():
            yield from operation
        else:
            yield from self._disks(home)

    def _writes_into(self, home: VmHome) -> Iterator[Finding]:
        """A copy of a VM (``virt-clone``) still names the home of the one that it was copied from."""
        working = set(vm_home.disks_of(home.present()).values())
        for path in sorted(written_by(self.present)):
            if path in working or frozen.is_recorded(home.layout, Path(path)):
                yield self._error("home-foreign", f"{path} belongs to the VM '{home.name}' ({home.vm_id})", path)

    def _operation(self) -> list[Finding]:
        """An open operation, unless this is the start that it makes itself."""
        entry = journal.read(self.layout.journal)
        if entry is None:
            return []
        holder = locks.holder(self.layout.lock)
        if holder is None:
            sentence = f"the {entry.plan.subject} was interrupted and is still open"
            return [self._error("operation-open", sentence, self.layout.journal)]
        if entry.start is not None and entry.start.process == holder and entry.start.images == written_by(self.present):
            return []
        VmHome(self.layout).ask_to_give_way()
        sentence = f"the {entry.plan.subject} is under way (process {holder})"
        wait = "wait until that is done"
        return [Finding("operation-running", Severity.ERROR, sentence, str(self.layout.journal), wait)]

    def _disks(self, home: VmHome) -> Iterator[Finding]:
        stored = home.present()
        known = set(vm_home.disks_of(stored).values())
        bases = _bases(home, stored)
        if bases is None:
            sentence = "the snapshot above its present is gone, so that its disks cannot be compared with it"
            yield self._warning("snapshot-missing", sentence, home.path)
        try:
            vm_home.require_usable_disks(self.present)
        except errors.Unsupported as error:
            yield self._error("image-unreadable", str(error), str(error.facts["path"]))
        for disk in _writable(self.present):
            if disk.source is None:
                continue
            path = vm_home.canonical(disk.source)
            if self._is_frozen(path):
                sentence = f"disk {disk.slot} would write to {path}, which snapshots need unchanged"
                yield self._error("image-frozen", sentence, path)
            yield from self._attached(path, is_written=True)
            if disk.takes_part:
                yield from self._chain(disk, path, bases or {}, is_known=path in known)

    def _attached(self, path: str, *, is_written: bool) -> Iterator[Finding]:
        for one in attachments.users([path]).get(path, ()):
            if is_written or not one.read_only:
                sentence, end = attachments.use_of(one)
                yield Finding("image-attached", Severity.ERROR, f"{path} is {sentence}", path, end)

    def _is_frozen(self, path: str) -> bool:
        """By the home's records; in a home that came without them by its mode; outside by any VM of this host."""
        file = Path(path)
        if frozen.is_recorded(self.layout, file):
            return True
        if not file.is_file() or file.stat().st_mode & 0o7777 != frozen.FROZEN_MODE:
            return False
        return self.layout.owns(path) or index.kept_mode(file) is not None

    def _chain(self, disk: Disk, top: str, bases: Mapping[str, _Base], *, is_known: bool) -> Iterator[Finding]:
        formats: dict[str, str] = {}
        path: str | None = top
        fmt: str | None = disk.format or images.RAW
        while path is not None:
            header = self._link(path, fmt, top, formats)
            if isinstance(header, Finding):
                # A disk that was plugged in outside hvmgr may be of a kind that only libvirt knows.
                if is_known or header.code == "image-missing":
                    yield header
                return
            formats[path] = header.format
            if path != top:
                yield from self._since_frozen(path)
                yield from self._attached(path, is_written=False)
            path, fmt = (None, None) if header.parent is None else (str(header.parent), header.backing_format)
        for working in formats.keys() & bases.keys():
            base = bases[working]
            if formats.get(base.path) != base.format:
                sentence = f"{working} does not stand on {base.path} ({base.format}), which its snapshot froze"
                yield self._error("image-swapped", sentence, working)

    def _link(self, path: str, fmt: str | None, top: str, above: Mapping[str, str]) -> Header | Finding:
        """One image as its child, or the configuration, states it; or what is wrong with it."""
        if path in above:
            return self._error("image-unreadable", f"the chain of {top} runs in a circle at {path}", path)
        if fmt is None:
            sentence = f"an image above {path} does not state its format"
            return self._error("image-unreadable", sentence, path)
        try:
            return images.read(Path(path), fmt)
        except errors.NotFound as error:
            return self._error("image-missing", str(error), path)
        except errors.HvmgrError as error:
            return self._error("image-unreadable", str(error), path)

    def _since_frozen(self, path: str) -> Iterator[Finding]:
        condition = frozen.condition(self.layout, Path(path))
        if condition is Condition.CHANGED:
            yield self._error("image-changed", f"{path} was changed after it was frozen", path)
        elif condition is Condition.TOUCHED:
            sentence = f"{path} has another time than when it was frozen; its size and header are the same"
            yield self._warning("image-touched", sentence, path)

    def _error(self, code: str, sentence: str, where: str | Path) -> Finding:
        return Finding(code, Severity.ERROR, sentence, str(where), self.repair)

    def _warning(self, code: str, sentence: str, where: str | Path) -> Finding:
        return Finding(code, Severity.WARNING, sentence, str(where), self.repair)


def _writable(present: Configuration) -> list[Disk]:
    return [
        disk
        for disk in present.disks()
        if disk.device in {"disk", "lun"} and disk.type in {"file", "block"} and not disk.readonly
    ]


def _bases(home: VmHome, stored: Configuration) -> dict[str, _Base] | None:
    """For each working image what its snapshot froze; disks are the same by id. None when the snapshot is gone."""
    facts = vm_home.require_facts(stored)
    if facts.parent is None:
        return {}
    try:
        above = home.snapshot(facts.parent)
    except errors.NotFound:
        return None
    slots = {record.id: record.slot for record in vm_home.require_facts(above).disks}
    # A disk whose data was pulled from its snapshot's image by others stands apart from it, as the home then says.
    ids = {record.slot: record.id for record in facts.disks if not record.apart}
    paths = vm_home.disks_of(above)
    found = {}
    for slot, working in vm_home.disks_of(stored).items():
        disk = above.find_disk(slots.get(ids.get(slot, ""), ""))
        if disk is not None and disk.slot in paths:
            found[working] = _Base(paths[disk.slot], disk.format or images.RAW)
    return found
