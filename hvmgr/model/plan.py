"""Plans: the named steps of an operation, as values that a journal can store and ``--dry-run`` can print.

A plan has three parts. ``prepare`` makes new things only, so each of its steps can be undone. ``switch`` is the one act
that makes the new state the VM's present; afterwards anybody can tell whether it happened. ``finish`` steps may be run
again as often as needed. Before the switch a plan that was cut off is undone, after it the plan is completed. A plan
without a switch changes no guest-visible content and is completed from the start.

Steps hold strings, numbers and tuples of them, so that ``to_json`` and ``from_json`` are exact.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from hvmgr.errors import Corrupt

JOURNAL_FORMAT = 1


def _name(path: str) -> str:
    return PurePath(path).name


@dataclass(frozen=True, slots=True)
class Step:
    """One act of a plan."""

    def describe(self) -> str:
        """The act as a short sentence for people."""
        raise NotImplementedError


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateImage(Step):
    """A new qcow2 image; with a parent it is a differencing image, without one a blank base."""

    path: str
    size: int
    parent: str | None
    parent_format: str | None

    def describe(self) -> str:
        below = f" on {_name(self.parent)}" if self.parent else ""
        return f"create image {_name(self.path)}{below}"


@dataclass(frozen=True, slots=True)
class ResizeDisk(Step):
    """The working image of a disk has another size, in bytes; as a switch this makes the new present."""

    slot: str
    path: str
    format: str
    size: int
    old: int

    def describe(self) -> str:
        return f"give image {_name(self.path)} {self.size} bytes, it has {self.old}"


@dataclass(frozen=True, slots=True)
class FreezeImage(Step):
    """An image becomes read-only, because a snapshot or a child needs it."""

    path: str

    def describe(self) -> str:
        return f"freeze image {_name(self.path)}"


@dataclass(frozen=True, slots=True)
class ThawImage(Step):
    """An image can be written again; one outside the home as before it was frozen, when no other VM needs it."""

    path: str

    def describe(self) -> str:
        return f"give {self.path} its mode back, unless another VM needs it"


@dataclass(frozen=True, slots=True)
class MergeUp(Step):
    """The data of ``parent`` goes into its only child ``child``, whose parent is then ``below``; restartable at any point.

    ``hide`` is a range (offset, length) in bytes that the shorter ``parent`` hid from the child and that needs
    explicit zeros first, or old data of ``below`` would come back. It may reach beyond the child's end: what is within
    the child by its size when the step runs counts, and again each time the step is run again.
    """

    child: str
    parent: str
    below: str | None
    below_format: str | None
    hide: tuple[int, int] | None

    def describe(self) -> str:
        return f"merge image {_name(self.parent)} into its child {_name(self.child)}"


@dataclass(frozen=True, slots=True)
class MergeDown(Step):
    """The data of ``child`` goes into ``parent``, which then takes the child's name, so that nothing else changes.

    It needs equal sizes: when the child was resized since the plan, this merge and those after it are given up until
    the next plan. A part of it that was done before does no harm, because the child is the parent's only user.
    """

    child: str
    parent: str

    def describe(self) -> str:
        return f"merge image {_name(self.child)} down into {_name(self.parent)}"


@dataclass(frozen=True, slots=True)
class Flatten(Step):
    """Everything below ``path`` goes into it; it then stands alone."""

    path: str

    def describe(self) -> str:
        return f"make image {_name(self.path)} complete"


@dataclass(frozen=True, slots=True)
class RemoveImage(Step):
    """A differencing image that this plan left without a user goes away."""

    path: str

    def describe(self) -> str:
        return f"remove image {_name(self.path)}"


@dataclass(frozen=True, slots=True)
class CompleteImage(Step):
    """A new image that stands alone and holds all that the guest sees of ``source``; nobody starts the VM meanwhile."""

    source: str
    target: str
    size: int

    def describe(self) -> str:
        return f"make the complete image {_name(self.target)} of {_name(self.source)}"


@dataclass(frozen=True, slots=True)
class ConvertInternal(Step):
    """A new differencing image on ``parent`` shows what a snapshot inside ``source`` shows; compared before it counts."""

    source: str
    snapshot_id: str
    name: str
    target: str
    parent: str
    parent_format: str

    def describe(self) -> str:
        return f"make an image of the snapshot '{self.name}' inside {_name(self.source)}"


@dataclass(frozen=True, slots=True)
class DropInternal(Step):
    """A snapshot inside an image goes, and what it held; what a guest sees of the image stays."""

    path: str
    name: str

    def describe(self) -> str:
        return f"remove the snapshot '{self.name}' from inside {self.path}"


@dataclass(frozen=True, slots=True)
class CopyImage(Step):
    """A file's bytes under a new name; holes stay holes."""

    source: str
    target: str

    def describe(self) -> str:
        return f"copy {self.source} to {_name(self.target)}"


@dataclass(frozen=True, slots=True)
class MoveImage(Step):
    """An image gets another name in the same home."""

    source: str
    target: str

    def describe(self) -> str:
        return f"move image {_name(self.source)} to {self.target}"


@dataclass(frozen=True, slots=True)
class RecordFrozen(Step):
    """The size and time of frozen images are noted, so that a later change is seen."""

    paths: tuple[str, ...]

    def describe(self) -> str:
        return "note the state of " + ", ".join(_name(path) for path in self.paths)


# --- files beside the images ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MakeHome(Step):
    """The folders of a new home."""

    home: str
    vm_id: str

    def describe(self) -> str:
        return f"make the home {self.home}"


@dataclass(frozen=True, slots=True)
class NoteUses(Step):
    """The host-wide index knows the home of a new VM, and the images outside it that its snapshots and present need.

    It comes first: a home outside the root, whose journal is open, is found by it.
    """

    name: str
    paths: tuple[str, ...]

    def describe(self) -> str:
        return f"note who uses {len(self.paths)} image{'' if len(self.paths) == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class TakeFile(Step):
    """A state file that is somebody else's under a name of ours: the same file where that can be, else a copy."""

    source: str
    target: str

    def describe(self) -> str:
        return f"take {self.source} as {self.target}"


@dataclass(frozen=True, slots=True)
class DropOldName(Step):
    """The old name of a file that ``TakeFile`` took goes, when ``kept`` is that file or a whole copy of it."""

    path: str
    kept: str

    def describe(self) -> str:
        return f"remove the old name {self.path}"


@dataclass(frozen=True, slots=True)
class CopyFile(Step):
    """A small state file (NVRAM, saved memory) under a new name."""

    source: str
    target: str

    def describe(self) -> str:
        return f"copy {_name(self.source)} to {self.target}"


@dataclass(frozen=True, slots=True)
class CopyFolder(Step):
    """A folder of state files (TPM) under a new name, complete or not at all."""

    source: str
    target: str

    def describe(self) -> str:
        return f"copy folder {self.source} to {self.target}"


@dataclass(frozen=True, slots=True)
class ReplaceFolder(Step):
    """A folder of state files becomes a copy of ``source``, whatever was there."""

    source: str
    target: str

    def describe(self) -> str:
        return f"put {self.source} back to {self.target}"


@dataclass(frozen=True, slots=True)
class RemoveFolder(Step):
    """A folder of hvmgr's own that nothing needs any more."""

    path: str

    def describe(self) -> str:
        return f"remove {self.path}"


@dataclass(frozen=True, slots=True)
class MakeSnapshotFolder(Step):
    """The folder for the memory, NVRAM and TPM state of a new snapshot."""

    snapshot_id: str

    def describe(self) -> str:
        return f"make the folder of snapshot {self.snapshot_id}"


@dataclass(frozen=True, slots=True)
class WriteSnapshot(Step):
    """The configuration of a snapshot: with it the snapshot is in the tree."""

    snapshot_id: str
    xml: str

    def describe(self) -> str:
        return f"write the configuration of snapshot {self.snapshot_id}"


@dataclass(frozen=True, slots=True)
class ReplaceFile(Step):
    """A text file with new content."""

    path: str
    text: str

    def describe(self) -> str:
        return f"write {self.path}"


@dataclass(frozen=True, slots=True)
class RemoveFile(Step):
    """A file of hvmgr's own that nothing needs any more."""

    path: str

    def describe(self) -> str:
        return f"remove {self.path}"


@dataclass(frozen=True, slots=True)
class RemoveSnapshot(Step):
    """A snapshot's configuration and saved state go; its images are another step's matter."""

    snapshot_id: str

    def describe(self) -> str:
        return f"remove the configuration and saved state of snapshot {self.snapshot_id}"


@dataclass(frozen=True, slots=True)
class RemoveHome(Step):
    """What hvmgr keeps in a home goes; folders that still hold something stay."""

    def describe(self) -> str:
        return "remove the home's configuration"


# --- what comes from elsewhere --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MakeRoots(Step):
    """Folders of the home that lie elsewhere: pairs (name in the home, folder), each behind a link."""

    places: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        return "make the folders " + ", ".join(folder for _, folder in self.places)


@dataclass(frozen=True, slots=True)
class TakeHome(Step):
    """A folder with a home's files becomes a home of this host; ``made`` are the folders that it lacks."""

    home: str
    vm_id: str
    made: tuple[str, ...]

    def describe(self) -> str:
        return f"make {self.home} the home"


@dataclass(frozen=True, slots=True)
class CopyImages(Step):
    """Images of another home: (source, target, SHA-256 or ''). ``hold`` are those that a VM here could begin to write."""

    files: tuple[tuple[str, str, str], ...]
    hold: tuple[str, ...] = ()

    def describe(self) -> str:
        return "copy " + ", ".join(_name(source) for source, _, _ in self.files)


@dataclass(frozen=True, slots=True)
class UnpackFiles(Step):
    """Files of an archive: (name in it, target, SHA-256 or ''); ``size`` and ``mtime_ns`` tell that it is still the same."""

    archive: str
    size: int
    mtime_ns: int
    files: tuple[tuple[str, str, str], ...]

    def describe(self) -> str:
        return f"unpack {', '.join(_name(target) for _, target, _ in self.files)} from {_name(self.archive)}"


@dataclass(frozen=True, slots=True)
class ConvertVhd(Step):
    """What one VHD holds, without its parents, in a new qcow2 image; ``parent`` is how that names its own.

    ``sha256`` is what the VHD's file must have, '' when that is not known.
    """

    source: str
    target: str
    size: int
    parent: str | None
    parent_format: str | None
    sha256: str

    def describe(self) -> str:
        on = f" on {_name(self.parent)}" if self.parent else ""
        return f"convert {_name(self.source)} into {_name(self.target)}{on}"


@dataclass(frozen=True, slots=True)
class NameParent(Step):
    """The header of an image names its parent anew; its guest-visible content is the same.

    ``before`` is the old name, ``mode`` what the file has before and afterwards.
    """

    path: str
    parent: str
    parent_format: str
    before: str
    mode: int

    def describe(self) -> str:
        return f"let {_name(self.path)} name its parent {self.parent}"


@dataclass(frozen=True, slots=True)
class CopyMemory(Step):
    """A saved state under a new name, with another configuration in it."""

    source: str
    target: str
    xml: str

    def describe(self) -> str:
        return f"copy the saved state {self.source} to {self.target}"


@dataclass(frozen=True, slots=True)
class ChangeMemory(Step):
    """A saved state gets another configuration where it lies."""

    path: str
    before: str
    after: str

    def describe(self) -> str:
        return f"write the configuration in {self.path}"


@dataclass(frozen=True, slots=True)
class ChangeFile(Step):
    """A text file gets another content, and can get its old one back."""

    path: str
    before: str
    after: str

    def describe(self) -> str:
        return f"write {self.path}"


@dataclass(frozen=True, slots=True)
class RenameFile(Step):
    """A file or folder gets another name."""

    source: str
    target: str

    def describe(self) -> str:
        return f"rename {self.source} to {_name(self.target)}"


@dataclass(frozen=True, slots=True)
class SetModes(Step):
    """Files and folders get the modes and the owner that a home has: (path, mode, mode before, uid and gid before).

    A uid of -1 leaves the owner alone.
    """

    modes: tuple[tuple[str, int, int, int, int], ...]

    def describe(self) -> str:
        return f"set the modes of {len(self.modes)} files"


@dataclass(frozen=True, slots=True)
class NoteUse(Step):
    """It is known, before the VM is, which images outside its home it needs; ``beside`` says it at their source."""

    name: str
    outside: tuple[str, ...]
    beside: str | None

    def describe(self) -> str:
        return f"note that {self.name} needs {len(self.outside)} images outside its home"


@dataclass(frozen=True, slots=True)
class RecordGold(Step):
    """Size, time and SHA-256 ('' when unknown) of images that are shared read-only are noted."""

    images: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        return f"note the state of {len(self.images)} shared images"


@dataclass(frozen=True, slots=True)
class MakeFolders(Step):
    """Folders outside the home that is worked on, parents first."""

    folders: tuple[str, ...]

    def describe(self) -> str:
        return f"make the folders {', '.join(self.folders)}"


@dataclass(frozen=True, slots=True)
class WriteFile(Step):
    """A new text file."""

    path: str
    text: str

    def describe(self) -> str:
        return f"write {self.path}"


@dataclass(frozen=True, slots=True)
class PutManagedSave(Step):
    """The next start of the VM goes on from the saved memory of ``source``, with the configuration ``xml``.

    ``kept`` is the copy that is made first. It stays until the plan is finished, and tells when that was: a VM that was
    started from it in between has written to the disks of ``xml`` since.
    """

    source: str
    kept: str
    xml: str

    def describe(self) -> str:
        return f"let the next start go on from the saved memory {self.source}"


@dataclass(frozen=True, slots=True)
class ChangeManagedSave(Step):
    """libvirt's managed save gets another configuration."""

    before: str
    after: str

    def describe(self) -> str:
        return "point the saved state of the VM to its new place"


@dataclass(frozen=True, slots=True)
class SettleHome(Step):
    """The VM's home is another folder from now on: configuration, index, and the records of frozen images there."""

    home: str
    frozen: tuple[str, ...]

    def describe(self) -> str:
        return f"write the configuration into {self.home}"


@dataclass(frozen=True, slots=True)
class PullDisk(Step):
    """A running VM's working image takes in all that is below it."""

    slot: str
    path: str

    def describe(self) -> str:
        return f"pull the data of disk {self.slot} into {_name(self.path)}"


@dataclass(frozen=True, slots=True)
class LeaveHome(Step):
    """hvmgr's own files in a home go; what holds a guest's data stays, and so do its folders."""

    def describe(self) -> str:
        return "remove hvmgr's own files from the home"


# --- the domain -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Define(Step):
    """libvirt's inactive configuration becomes ``xml``; as a switch this makes the new present."""

    xml: str

    def describe(self) -> str:
        return "define the configuration in libvirt"


@dataclass(frozen=True, slots=True)
class SwitchDisks(Step):
    """The running VM goes on in new images, all at one instant; with ``memory`` its memory of that instant is saved.

    In the ``background`` the memory is saved while the guest goes on; ``copies`` (source, target) are brought up to that
    instant. Should QEMU refuse that at the last moment, the guest stands still for it, unless there is no ``fallback``.
    """

    children: tuple[tuple[str, str], ...]
    memory: str | None
    background: bool = False
    copies: tuple[tuple[str, str], ...] = ()
    fallback: bool = True

    def describe(self) -> str:
        what = "memory and disks" if self.memory else "disks"
        return f"take {what} of the running VM ({', '.join(slot for slot, _ in self.children)})"


@dataclass(frozen=True, slots=True)
class WritePresent(Step):
    """The home's configuration becomes what libvirt has."""

    def describe(self) -> str:
        return "write the configuration into the home"


@dataclass(frozen=True, slots=True)
class Suspend(Step):
    """The guest is paused for what follows."""

    def describe(self) -> str:
        return "pause the guest"


@dataclass(frozen=True, slots=True)
class Resume(Step):
    """The guest runs on."""

    def describe(self) -> str:
        return "let the guest run on"


@dataclass(frozen=True, slots=True)
class QuiesceGuest(Step):
    """The guest's own file systems are at rest for what follows; its agent sees to that."""

    def describe(self) -> str:
        return "let the guest's agent put its file systems to rest"


@dataclass(frozen=True, slots=True)
class WakeGuest(Step):
    """The guest's file systems take writes again."""

    def describe(self) -> str:
        return "wake the guest's file systems"


@dataclass(frozen=True, slots=True)
class SavePresent(Step):
    """The running VM is stopped; its memory goes to ``memory``, from which it can be put back."""

    memory: str
    paused: bool

    def describe(self) -> str:
        return "stop the VM, keeping its memory until the new state is in place"


@dataclass(frozen=True, slots=True)
class TakeManagedSave(Step):
    """libvirt's managed save of the present moves to ``memory``, from which it can be put back."""

    memory: str

    def describe(self) -> str:
        return "put the saved state of the VM away"


@dataclass(frozen=True, slots=True)
class PointManagedSave(Step):
    """libvirt's managed save goes on in new images: pairs (slot, old path, new path)."""

    disks: tuple[tuple[str, str, str], ...]

    def describe(self) -> str:
        return "point the saved state of the VM to its new images"


@dataclass(frozen=True, slots=True)
class DiscardPresent(Step):
    """The running or saved VM is stopped as by pulling the plug; its memory is lost."""

    def describe(self) -> str:
        return "stop the VM, discarding its memory"


@dataclass(frozen=True, slots=True)
class StartFrom(Step):
    """The VM goes on from saved memory with the disks of ``xml``."""

    memory: str
    xml: str
    paused: bool

    def describe(self) -> str:
        return "let the VM go on from its saved state"


@dataclass(frozen=True, slots=True)
class RenameDomain(Step):
    """libvirt's name for the VM changes."""

    name: str

    def describe(self) -> str:
        return f"rename the VM to {self.name}"


@dataclass(frozen=True, slots=True)
class RequireUnchanged(Step):
    """Nobody changed the domain or took a snapshot of it since the plan was made; else the plan ends here.

    ``configuration`` is the SHA-256 of libvirt's inactive XML, ``snapshots`` are the names that libvirt knows.
    """

    configuration: str
    snapshots: tuple[str, ...]

    def describe(self) -> str:
        return "see that nobody changed the VM meanwhile"


@dataclass(frozen=True, slots=True)
class ForgetLibvirtSnapshot(Step):
    """libvirt's own note of a snapshot goes; images and memory stay."""

    name: str

    def describe(self) -> str:
        return f"remove libvirt's note of its snapshot '{self.name}'"


@dataclass(frozen=True, slots=True)
class NoteLibvirtSnapshot(Step):
    """libvirt gets a note of a snapshot that hvmgr took; images and memory stay where they are."""

    name: str
    xml: str
    is_current: bool

    def describe(self) -> str:
        return f"give libvirt a note of the snapshot '{self.name}'"


@dataclass(frozen=True, slots=True)
class ReleaseDomain(Step):
    """libvirt's inactive configuration becomes ``xml``, in which hvmgr has no part any more."""

    xml: str

    def describe(self) -> str:
        return "define the configuration without hvmgr's part in libvirt"


@dataclass(frozen=True, slots=True)
class ForgetMetadata(Step):
    """The running or saved VM, too, holds nothing of hvmgr's."""

    def describe(self) -> str:
        return "take hvmgr's part off the running or saved VM"


@dataclass(frozen=True, slots=True)
class UndefineDomain(Step):
    """libvirt forgets the VM; files stay."""

    def describe(self) -> str:
        return "undefine the VM in libvirt"


# --- the whole ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What an operation will do; ``subject`` says it to people, ``hold`` names images (path, format) to lock meanwhile."""

    plan_id: str
    vm_id: str
    operation: str
    subject: str
    prepare: tuple[Step, ...] = ()
    switch: Step | None = None
    finish: tuple[Step, ...] = ()
    hold: tuple[tuple[str, str], ...] = ()

    STEPS: ClassVar[dict[str, type[Step]]]

    def steps(self) -> tuple[Step, ...]:
        """All steps in order."""
        middle = () if self.switch is None else (self.switch,)
        return (*self.prepare, *middle, *self.finish)

    @property
    def makes_or_removes_home(self) -> bool:
        """Whether there is no VM before it, or none after it."""
        return any(isinstance(step, MakeHome | TakeHome | RemoveHome | LeaveHome) for step in self.steps())

    def to_json(self) -> dict[str, Any]:
        """A JSON document that ``from_json`` turns into an equal plan."""
        return {
            "format": JOURNAL_FORMAT,
            "plan": self.plan_id,
            "vm": self.vm_id,
            "operation": self.operation,
            "subject": self.subject,
            "prepare": [_step_to_json(step) for step in self.prepare],
            "switch": None if self.switch is None else _step_to_json(self.switch),
            "finish": [_step_to_json(step) for step in self.finish],
            "hold": [list(pair) for pair in self.hold],
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Plan:
        """The plan of a journal; raises Corrupt for anything that ``to_json`` did not write."""
        try:
            if document["format"] != JOURNAL_FORMAT:
                raise Corrupt(f"the journal has format {document['format']}, this hvmgr reads {JOURNAL_FORMAT}")
            switch = document["switch"]
            plan = cls(
                plan_id=document["plan"],
                vm_id=document["vm"],
                operation=document["operation"],
                subject=document["subject"],
                prepare=tuple(_step_from_json(step) for step in document["prepare"]),
                switch=None if switch is None else _step_from_json(switch),
                finish=tuple(_step_from_json(step) for step in document["finish"]),
                hold=tuple((path, fmt) for path, fmt in document["hold"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"the journal holds no readable plan ({error})") from error
        if json.dumps(plan.to_json(), sort_keys=True) != json.dumps(document, sort_keys=True):
            raise Corrupt("the journal holds more than this hvmgr understands")
        return plan


def dumps(plan: Plan) -> str:
    """One line of JSON."""
    return json.dumps(plan.to_json(), separators=(",", ":"))


def _step_to_json(step: Step) -> dict[str, Any]:
    return {"step": type(step).__name__, **dataclasses.asdict(step)}


def _step_from_json(document: dict[str, Any]) -> Step:
    fields = {key: _frozen(value) for key, value in document.items() if key != "step"}
    return Plan.STEPS[document["step"]](**fields)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


Plan.STEPS = {cls.__name__: cls for cls in Step.__subclasses__()}
