"""What the QEMU of a running domain does with the images of its disks: block jobs, and the files that it has open.

The part of ``Domain`` that merges stand on, narrow and without decisions as all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvmgr.errors import HvmgrError
from hvmgr.host import libvirt_door

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Progress = Callable[[int, int], None]  # bytes done, bytes in all (0: not known yet)

_POLL_S = 0.1


class BlockJobs(ABC):
    """A domain's disks, as far as its QEMU works on their images."""

    __slots__ = ()

    name: str

    @abstractmethod
    def is_active(self) -> bool:
        """Whether a QEMU process runs it."""

    @abstractmethod
    def monitor(self, command: str, *, files: Iterable[int] = (), **arguments: object) -> Any:
        """What the running QEMU's monitor returns."""

    @abstractmethod
    def _handle(self) -> Any: ...

    # Jobs

    def pull(self, slot: str, *, progress: Progress | None = None) -> None:
        """Brings everything below the image that a running domain writes into that image; the guest goes on meanwhile.

        An interrupt stops it: what was pulled stays, and the parent is still needed.
        """
        with libvirt_door.translated(f"pull the data of disk {slot} of {self.name}", changing=True):
            handle = self._handle()
            handle.blockPull(slot, 0, 0)
            try:
                while info := handle.blockJobInfo(slot, 0):
                    if progress is not None:
                        progress(info["cur"], info["end"])
                    time.sleep(_POLL_S)
            except BaseException:
                with contextlib.suppress(libvirt_door.library().libvirtError):
                    handle.blockJobAbort(slot, 0)
                raise

    def start_stream(self, slot: str, base: str, *, relative: bool, bandwidth: int) -> None:
        """Begins to bring what is above ``base`` into the image that a running domain writes, which then stands on it.

        Images are named as libvirt's live XML has them, ``vda[3]``. ``relative`` keeps the names of parents in headers
        relative; ``bandwidth`` is a limit in bytes a second, 0 none.
        """
        libvirt = libvirt_door.library()
        flags = libvirt.VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES
        flags |= libvirt.VIR_DOMAIN_BLOCK_REBASE_RELATIVE if relative else 0
        with libvirt_door.translated(f"merge images of disk {slot} of {self.name}", changing=True):
            self._handle().blockRebase(slot, base, bandwidth, flags)

    def start_commit(self, slot: str, base: str, top: str | None, *, relative: bool, bandwidth: int) -> None:
        """Begins to write what ``top`` (None: the image that the domain writes) holds into ``base``, just below it.

        An inner one ends by itself, and what stood on ``top`` then stands on ``base``. The other gets ready, and ends with
        ``end_block_job``.
        """
        libvirt = libvirt_door.library()
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE if relative else 0
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if top is None else 0
        with libvirt_door.translated(f"merge images of disk {slot} of {self.name}", changing=True):
            self._handle().blockCommit(slot, base, top, bandwidth, flags)

    def block_job(self, slot: str) -> tuple[int, int] | None:
        """How far libvirt's block job on a disk is, in bytes done and in all; None when there is none."""
        with libvirt_door.translated(f"ask for the merge of disk {slot} of {self.name}", changing=True):
            found = self._handle().blockJobInfo(slot, 0)
        return (found["cur"], found["end"]) if found else None

    def throttle_block_job(self, slot: str, bandwidth: int) -> None:
        """A block job goes at most at this speed from now on, in bytes a second."""
        flags = libvirt_door.library().VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        with libvirt_door.translated(f"slow down the merge of disk {slot} of {self.name}", changing=True):
            self._handle().blockJobSetSpeed(slot, bandwidth, flags)

    def end_block_job(self, slot: str, *, pivot: bool = False) -> None:
        """Cancels a block job, or, with ``pivot``, has the domain go on in the base of a commit that is ready."""
        flags = libvirt_door.library().VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT if pivot else 0
        with libvirt_door.translated(f"end the merge of disk {slot} of {self.name}", changing=True):
            self._handle().blockJobAbort(slot, flags)

    def has_block_job(self) -> bool:
        """Whether its QEMU has a block job."""
        return self.is_active() and bool(self.monitor("query-block-jobs"))

    # Files

    def writable_files(self) -> set[Path]:
        """Files that its guest's disks write to, asked from QEMU itself; empty when it is off.

        A file that QEMU has open for a switch that never came is none of them.
        """
        attached = _nodes_below(self._ask_unless_off("query-blockstats"))
        return _writable(self._ask_unless_off("query-named-block-nodes", flat=True), attached)

    def open_files(self) -> set[Path]:
        """All files that its QEMU has open as images, whoever uses them; empty when it is off."""
        nodes = self._ask_unless_off("query-named-block-nodes", flat=True)
        return {_path(node["file"]) for node in nodes if node["drv"] in {"file", "host_device"}}

    def _ask_unless_off(self, command: str, **arguments: Any) -> Any:
        """What the monitor answers; nothing of a guest that is off, or ends just now."""
        if not self.is_active():
            return []
        try:
            return self.monitor(command, **arguments)
        except HvmgrError:
            if self.is_active():
                raise
            return []

    def close_unused(self, path: Path) -> None:
        """Makes QEMU close a file that no disk of its guest uses: libvirt died between opening and switching to it.

        The names of its nodes would be in the way of the next switch.
        """
        used = _nodes_below(self.monitor("query-blockstats"))
        nodes = self.monitor("query-named-block-nodes", flat=True)
        names = {node["node-name"] for node in nodes}
        for node in nodes:
            name = node["node-name"]
            if node["drv"] == "file" and name not in used and _path(node["file"]) == path:
                for one in (name.replace("-storage", "-format"), name):
                    if one in names:
                        self.monitor("blockdev-del", node_name=one)
                        names.discard(one)

    def name_parent(self, child: Path, parent: Path | str) -> None:
        """Makes QEMU write into the header of an image that it has open what the image stands on."""
        nodes = self.monitor("query-named-block-nodes", flat=True)
        files = [node["node-name"] for node in nodes if node["drv"] == "file" and _path(node["file"]) == child]
        name = files[0].replace("-storage", "-format")
        self.monitor("change-backing-file", device=name, image_node_name=name, backing_file=os.fspath(parent))

    def flush_disks(self) -> None:
        """Makes QEMU write the tables of its disks' images to their files, for those who read them from outside."""
        for node in sorted(_nodes_below(self.monitor("query-blockstats"))):
            if node.endswith("-format"):
                self.monitor("human-monitor-command", command_line=f"qemu-io {node} flush")


def _nodes_below(devices: list[dict[str, Any]]) -> set[str]:
    """The nodes of the guest's disks, from formats and filters down to the files, with those of all parent images."""
    found: set[str] = set()
    todo = list(devices)
    while todo:
        node = todo.pop()
        found.add(node.get("node-name", ""))
        todo += [node[key] for key in ("parent", "backing") if key in node]
    return found


def _writable(nodes: list[dict[str, Any]], attached: set[str]) -> set[Path]:
    """Files behind those of the ``attached`` nodes that may write.

    Each file has a node of its own, ``libvirt-N-storage``, and mostly a format node ``libvirt-N-format`` on it. The
    former is opened with auto-read-only and then says nothing about writing: the latter decides where there is one.
    Names of format nodes are no use: QEMU cuts them off (a "json:…" of the whole chain) after 4 KiB.
    """
    read_only = {node["node-name"]: node["ro"] for node in nodes}
    files = [node for node in nodes if node["drv"] in {"file", "host_device"} and node["node-name"] in attached]
    deciding = {node["node-name"]: node["node-name"].replace("-storage", "-format") for node in files}
    return {
        _path(node["file"])
        for node in files
        if not read_only.get(deciding[node["node-name"]], read_only[node["node-name"]])
    }


def _path(filename: str) -> Path:
    # A node with options that a plain name cannot express is shown as "json:{…}". A name that QEMU put together of an
    # image's folder and the relative one in its header leads there and back.
    if filename.startswith("json:"):
        filename = json.loads(filename.removeprefix("json:"))["filename"]
    return Path(os.path.realpath(filename))
