"""Steps that bring in what comes from elsewhere: imports, clones, moves."""

from __future__ import annotations

from dataclasses import dataclass

from hvmgr.model.plan.step import Step, name


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
    """Images of another home: (source, target, SHA-256 or ''). ``hold`` are those that a VM here could begin to write.

    ``plain``: no link leads to a source; one that has become a link since it was looked at is somebody's trick.
    """

    files: tuple[tuple[str, str, str], ...]
    hold: tuple[str, ...] = ()
    plain: bool = False

    def describe(self) -> str:
        return "copy " + ", ".join(name(source) for source, _, _ in self.files)


@dataclass(frozen=True, slots=True)
class RequireImages(Step):
    """Copies are still what was looked at before they were made: (path, format, size, the parent's name or '')."""

    images: tuple[tuple[str, str, int, str], ...]

    def describe(self) -> str:
        return "check the copies of " + ", ".join(name(path) for path, *_ in self.images)


@dataclass(frozen=True, slots=True)
class UnpackFiles(Step):
    """Files of an archive: (name in it, target, SHA-256 or ''); ``size`` and ``mtime_ns`` tell that it is still the same."""

    archive: str
    size: int
    mtime_ns: int
    files: tuple[tuple[str, str, str], ...]

    def describe(self) -> str:
        return f"unpack {', '.join(name(target) for _, target, _ in self.files)} from {name(self.archive)}"


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
        on = f" on {name(self.parent)}" if self.parent else ""
        return f"convert {name(self.source)} into {name(self.target)}{on}"


@dataclass(frozen=True, slots=True)
class NameParent(Step):
    """The header of an image names its parent anew; its guest-visible content is the same.

    ``before`` is the old name, ``before_format`` the old parent's format ('': the same), ``mode`` what the file has before
    and afterwards.
    """

    path: str
    parent: str
    parent_format: str
    before: str
    mode: int
    before_format: str = ""

    def describe(self) -> str:
        return f"let {name(self.path)} name its parent {self.parent}"


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
        return f"rename {self.source} to {name(self.target)}"


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
        return f"pull the data of disk {self.slot} into {name(self.path)}"


@dataclass(frozen=True, slots=True)
class LeaveHome(Step):
    """hvmgr's own files in a home go; what holds a guest's data stays, and so do its folders."""

    def describe(self) -> str:
        return "remove hvmgr's own files from the home"
