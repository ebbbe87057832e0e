"""Steps on what stands beside the images: homes, folders, configurations, notes of uses."""

from __future__ import annotations

from dataclasses import dataclass

from hvmgr.model.plan.step import Step, name


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
    """A small state file (NVRAM, saved memory) under a new name; ``plain`` as in ``CopyImages``."""

    source: str
    target: str
    plain: bool = False

    def describe(self) -> str:
        return f"copy {name(self.source)} to {self.target}"


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
