"""The folders and files of one VM home (docs/format.md); pure paths, nothing is touched."""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from pathlib import Path

CONFIGURATIONS = "Virtual Machines"
SNAPSHOTS = "Snapshots"
BASES = "Virtual Hard Disks"
PRIVATE = ".hvmgr"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of the VM with id ``vm_id`` lies below ``home``. File names are ids, never names.

    Snapshots and bases may lie on other file systems: the home then holds a link to ``snapshots_at`` or ``bases_at``.
    """

    home: Path
    vm_id: str
    snapshots_at: Path | None = None
    bases_at: Path | None = None

    @property
    def configuration(self) -> Path:
        """The present configuration."""
        return self.home / CONFIGURATIONS / f"{self.vm_id}.xml"

    @property
    def vm_folder(self) -> Path:
        """NVRAM of the present and of the undo slot."""
        return self.home / CONFIGURATIONS / self.vm_id

    @property
    def undo(self) -> Path:
        """The configuration in the undo slot; absent when the slot is empty."""
        return self.vm_folder / "undo.xml"

    def nvram(self, name: str) -> Path:
        """One NVRAM file of the present or the undo slot; each apply gets a new name."""
        return self.vm_folder / f"nvram_{name}.fd"

    def tpm_copy(self, change: str) -> Path:
        """The TPM state of a present that was put away, by the change that had made it the present."""
        return self.vm_folder / f"tpm_{change}"

    @property
    def present_memory(self) -> Path:
        """The saved state that the present of an export goes on from; a home leaves it to libvirt."""
        return self.vm_folder / "memory.save"

    @property
    def present_tpm(self) -> Path:
        """The TPM state of an export's present; a home leaves it to libvirt."""
        return self.vm_folder / "tpm"

    @property
    def snapshots(self) -> Path:
        """All snapshots' configurations."""
        return self.snapshots_at or self.home / SNAPSHOTS

    def snapshot(self, snapshot_id: str) -> Path:
        """One snapshot's configuration."""
        return self.snapshots / f"{snapshot_id}.xml"

    def snapshot_folder(self, snapshot_id: str) -> Path:
        """Memory, NVRAM and TPM state of one snapshot."""
        return self.snapshots / snapshot_id

    def memory(self, snapshot_id: str) -> Path:
        """The saved state of one snapshot, a libvirt save file."""
        return self.snapshot_folder(snapshot_id) / "memory.save"

    def snapshot_nvram(self, snapshot_id: str) -> Path:
        """The NVRAM as it was at one snapshot."""
        return self.snapshot_folder(snapshot_id) / "nvram"

    def snapshot_tpm(self, snapshot_id: str) -> Path:
        """The TPM state as it was at one snapshot, a folder."""
        return self.snapshot_folder(snapshot_id) / "tpm"

    @property
    def images(self) -> Path:
        """The differencing images of all snapshots and of the present."""
        return self.snapshots / self.vm_id

    def image(self, slot: str, image_id: str) -> Path:
        """One differencing image."""
        return self.images / f"{slot}_{image_id}.qcow2"

    @property
    def bases(self) -> Path:
        """Base images that belong to this home."""
        return self.bases_at or self.home / BASES

    @property
    def private(self) -> Path:
        """hvmgr's own working files: lock, journal, records, trash."""
        return self.home / PRIVATE

    @property
    def lock(self) -> Path:
        """Held while a command works on this home."""
        return self.private / "lock"

    @property
    def journal(self) -> Path:
        """There while an operation is open."""
        return self.private / "journal"

    @property
    def reserve(self) -> Path:
        """Space for what has to be written when there is none; may be missing."""
        return self.private / "reserve"

    @property
    def allowed_start(self) -> Path:
        """There while one start passes the guard, whatever it finds."""
        return self.private / "allow-start"

    @property
    def give_way(self) -> Path:
        """There while somebody waits for what hvmgr does by itself to let go of this home."""
        return self.private / "give-way"

    @property
    def diary(self) -> Path:
        """What hvmgr did with the VM by itself, and when; may be missing."""
        return self.private / "automatic"

    @property
    def frozen(self) -> Path:
        """One record per frozen image: its size, header and time when it was frozen."""
        return self.private / "frozen"

    @property
    def trash(self) -> Path:
        """Removed images wait here until the operation ends."""
        return self.private / "trash"

    @property
    def export(self) -> Path:
        """Memory, NVRAM and TPM state of a running VM while it is exported."""
        return self.private / "export"

    @property
    def guest_at_rest(self) -> Path:
        """The note that the guest's agent stayed silent when it was to wake the guest's file systems."""
        return self.private / "guest-at-rest"

    @property
    def disk_snapshots(self) -> Path:
        """One record per snapshot of one disk alone."""
        return self.private / "disk-snapshots"

    @property
    def contents(self) -> Path:
        """One record per working image of which an import said what it holds."""
        return self.private / "contents"

    @property
    def file_index(self) -> Path:
        """Which files are in which snapshot; may be missing, and is never the truth."""
        return self.private / "files.sqlite"

    @property
    def put_away(self) -> Path:
        """Memory of a running present while an apply replaces it."""
        return self.private / "present.save"

    @property
    def taken_in(self) -> Path:
        """Memory that comes with an import in the place of this VM, until the import is complete."""
        return self.private / "import.save"

    def folders(self) -> tuple[Path, ...]:
        """Every folder of a home, parents first."""
        return (
            self.home,
            self.private,
            self.frozen,
            self.disk_snapshots,
            self.contents,
            self.trash,
            self.configuration.parent,
            self.vm_folder,
            self.snapshots,
            self.images,
            self.bases,
        )

    def links(self) -> tuple[tuple[Path, Path], ...]:
        """The folders of the home that lie elsewhere: the name in the home, and the place."""
        pairs = ((self.home / SNAPSHOTS, self.snapshots_at), (self.home / BASES, self.bases_at))
        return tuple((name, place) for name, place in pairs if place is not None)

    def root_of(self, path: str) -> Path | None:
        """The part of the home that a file lies in, the home itself or a folder of it elsewhere; None outside."""
        roots = (self.home, *(place for _, place in self.links()))
        return next((root for root in roots if Path(path).is_relative_to(root)), None)

    def owns(self, path: str) -> bool:
        """Whether a file lies inside this home."""
        return self.root_of(path) is not None

    def parent_name(self, child: Path, parent: str) -> str:
        """How the header of an image names its parent: relative within the home, absolute to the outside.

        Never anything like a protocol; and absolute between folders of the home that may move apart.
        """
        root = self.root_of(parent)
        if root is None or root != self.root_of(str(child)):
            return parent
        name = os.path.relpath(parent, child.parent)
        return f"./{name}" if ":" in name.split("/", 1)[0] else name
