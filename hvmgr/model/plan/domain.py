"""Steps on the domain: what libvirt and QEMU are asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from hvmgr.model.plan.step import Step


@dataclass(frozen=True, slots=True)
class Define(Step):
    """libvirt's inactive configuration becomes ``xml``; as a switch this makes the new present."""

    xml: str

    def describe(self) -> str:
        return "define the configuration in libvirt"


@dataclass(frozen=True, slots=True)
class SwitchDisks(Step):
    """The running VM goes on in new images, all at one instant; with ``memory`` its memory of that instant is saved.

    ``copies`` (source, target) of files and folders are brought up to that instant. In the ``background`` the memory is
    saved while the guest goes on. Should QEMU refuse that at the last moment, the guest stands still for it, unless there is no ``fallback``.
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
