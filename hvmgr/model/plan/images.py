"""Steps that make, change, merge and remove images."""

from __future__ import annotations

from dataclasses import dataclass

from hvmgr.model.plan.step import Step, name


@dataclass(frozen=True, slots=True)
class CreateImage(Step):
    """A new qcow2 image; with a parent it is a differencing image, without one a blank base."""

    path: str
    size: int
    parent: str | None
    parent_format: str | None

    def describe(self) -> str:
        below = f" on {name(self.parent)}" if self.parent else ""
        return f"create image {name(self.path)}{below}"


@dataclass(frozen=True, slots=True)
class ResizeDisk(Step):
    """The working image of a disk has another size, in bytes; as a switch this makes the new present."""

    slot: str
    path: str
    format: str
    size: int
    old: int

    def describe(self) -> str:
        return f"give image {name(self.path)} {self.size} bytes, it has {self.old}"


@dataclass(frozen=True, slots=True)
class FreezeImage(Step):
    """An image becomes read-only, because a snapshot or a child needs it."""

    path: str

    def describe(self) -> str:
        return f"freeze image {name(self.path)}"


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
        return f"merge image {name(self.parent)} into its child {name(self.child)}"


@dataclass(frozen=True, slots=True)
class MergeDown(Step):
    """The data of ``child`` goes into ``parent``, which then takes the child's name, so that nothing else changes.

    It needs equal sizes: when the child was resized since the plan, this merge and those after it are given up until
    the next plan. A part of it that was done before does no harm, because the child is the parent's only user.
    """

    child: str
    parent: str

    def describe(self) -> str:
        return f"merge image {name(self.child)} down into {name(self.parent)}"


@dataclass(frozen=True, slots=True)
class StreamLive(Step):
    """As ``MergeUp``, for images that a running VM has open: its QEMU does it, into the image that the guest writes."""

    child: str
    parent: str
    below: str
    below_format: str

    def describe(self) -> str:
        return f"merge image {name(self.parent)} into {name(self.child)} while the VM goes on"


@dataclass(frozen=True, slots=True)
class CommitLive(Step):
    """The data of ``child`` goes into ``parent``, which takes its place: whoever named the child names the parent then.

    The running QEMU does it, and names stay as they are because it has both open. Until the end the child shows the same
    as ever: what it holds hides what is written below it. Where the guest ``writes`` the child, it goes on in the parent.
    """

    child: str
    parent: str
    writes: bool

    def describe(self) -> str:
        return f"merge image {name(self.child)} into its parent {name(self.parent)} while the VM goes on"


@dataclass(frozen=True, slots=True)
class CommitTogether(Step):
    """The first part of several ``CommitLive`` of images that the guest writes, ``pairs`` of child and parent.

    All of them are copied at the same time, and the guest goes on in all parents at one moment: or in none, and all wait.
    """

    pairs: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        names = ", ".join(name(parent) for _, parent in self.pairs)
        return f"let the VM go on in {names}, all at the same moment"


@dataclass(frozen=True, slots=True)
class Flatten(Step):
    """Everything below ``path`` goes into it; it then stands alone."""

    path: str

    def describe(self) -> str:
        return f"make image {name(self.path)} complete"


@dataclass(frozen=True, slots=True)
class RemoveImage(Step):
    """A differencing image that this plan left without a user goes away."""

    path: str

    def describe(self) -> str:
        return f"remove image {name(self.path)}"


@dataclass(frozen=True, slots=True)
class CompleteImage(Step):
    """A new image that stands alone and holds all that the guest sees of ``source``; nobody starts the VM meanwhile."""

    source: str
    target: str
    size: int

    def describe(self) -> str:
        return f"make the complete image {name(self.target)} of {name(self.source)}"


@dataclass(frozen=True, slots=True)
class ConvertBase(Step):
    """A new qcow2 image that stands alone shows what QEMU shows of the base ``source``; compared before it counts."""

    source: str
    format: str
    target: str
    size: int

    def describe(self) -> str:
        return f"make the qcow2 image {name(self.target)} of {self.source}"


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
        return f"make an image of the snapshot '{self.name}' inside {name(self.source)}"


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
        return f"copy {self.source} to {name(self.target)}"


@dataclass(frozen=True, slots=True)
class MoveImage(Step):
    """An image gets another name in the same home."""

    source: str
    target: str

    def describe(self) -> str:
        return f"move image {name(self.source)} to {self.target}"


@dataclass(frozen=True, slots=True)
class RecordFrozen(Step):
    """The size and time of frozen images are noted, so that a later change is seen."""

    paths: tuple[str, ...]

    def describe(self) -> str:
        return "note the state of " + ", ".join(name(path) for path in self.paths)


@dataclass(frozen=True, slots=True)
class ReceiveDisk(Step):
    """A disk that arrives goes into ``child``, an empty image on what the disk held before.

    ``uuid`` is the point that it then holds, which is remembered until somebody writes the image; None when nobody knows.
    """

    child: str
    parent: str
    parent_format: str
    uuid: str | None

    def describe(self) -> str:
        return f"write what arrives into image {name(self.child)}"


@dataclass(frozen=True, slots=True)
class PutFiles(Step):
    """Files go into the file system on ``volume``, in ``child``, an empty image on what the disk holds.

    ``work`` is the folder in which that file system is shown to a program meanwhile. ``in_memory``: nothing of it is to be on a
    disk of the host in clear, and so the copies that are made on the way are not.
    """

    child: str
    parent: str
    volume: str
    files: int
    size: int
    work: str
    in_memory: bool = False

    def describe(self) -> str:
        return f"put {self.files} file{'' if self.files == 1 else 's'} into {self.volume}, in image {name(self.child)}"
