"""One libvirt domain: its state, its XML, its starts and ends, its saved state and its disks.

Narrow and without decisions. A Domain holds no libvirt object: each call looks its domain up by uuid, so that it
survives renames and redefinitions and never keeps a closed connection alive. Calls on a domain that is gone raise
NotFound; calls that its state forbids raise Conflict, also when another job runs on it (Busy).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lxml import etree

from hvmgr.errors import HostFailed
from hvmgr.host import libvirt_door
from hvmgr.host.block_jobs import BlockJobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Progress = Callable[[int, int], None]  # bytes done, bytes in all (0: not known yet)

_POLL_S = 0.1

# virDomainUndefineFlags with (keep) TPM came with this libvirt (major * 1000000 + minor * 1000 + release)
_TPM_FLAGS_SINCE = 8_009_000


class State(StrEnum):
    """What a domain does at present."""

    OFF = "off"
    SAVED = "saved"  # off, with a managed save that the next start would resume from
    RUNNING = "running"  # also while it shuts down
    PAUSED = "paused"
    SLEEPING = "sleeping"  # suspended by the guest itself (S3)
    CRASHED = "crashed"  # the guest crashed and its QEMU was kept


class StopReason(StrEnum):
    """How a domain came to be off, as far as libvirt's daemon has seen it: it forgets that when it ends."""

    SHUTDOWN = "shutdown"  # the guest switched itself off
    DESTROYED = "destroyed"
    CRASHED = "crashed"  # the guest, or its QEMU
    SAVED = "saved"
    OTHER = "other"
    UNKNOWN = "unknown"


class Domain(BlockJobs):
    """A domain of a connection, addressed by its uuid."""

    __slots__ = ("_connection", "_saves", "name", "uuid")

    def __init__(self, connection: Any, uuid: str, name: str, *, saves: Path) -> None:
        self._connection = connection
        self._saves = saves  # libvirt's folder of managed saves
        self.uuid = uuid
        self.name = name

    def __repr__(self) -> str:
        return f"Domain({self.name!r}, {self.uuid})"

    # What it is

    def state(self) -> State:
        """What it does now, as libvirt believes."""
        libvirt = libvirt_door.library()
        with libvirt_door.translated(f"ask for the state of {self.name}"):
            handle = self._handle()
            number = handle.state()[0]
            if number == libvirt.VIR_DOMAIN_SHUTOFF:
                return State.SAVED if self._has_managed_save(handle) else State.OFF
        states = {
            libvirt.VIR_DOMAIN_PAUSED: State.PAUSED,
            libvirt.VIR_DOMAIN_PMSUSPENDED: State.SLEEPING,
            libvirt.VIR_DOMAIN_CRASHED: State.CRASHED,
        }
        return states.get(number, State.RUNNING)

    def stop_reason(self) -> StopReason:
        """Why it is off; UNKNOWN also while it is not."""
        libvirt = libvirt_door.library()
        with libvirt_door.translated(f"ask for the state of {self.name}"):
            number, reason = self._handle().state()
        reasons = {
            libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN: StopReason.UNKNOWN,
            libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: StopReason.SHUTDOWN,
            libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: StopReason.DESTROYED,
            libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: StopReason.CRASHED,
            libvirt.VIR_DOMAIN_SHUTOFF_SAVED: StopReason.SAVED,
        }
        return reasons.get(reason, StopReason.OTHER) if number == libvirt.VIR_DOMAIN_SHUTOFF else StopReason.UNKNOWN

    def is_active(self) -> bool:
        """Whether a QEMU process runs it (also when paused or crashed)."""
        with libvirt_door.translated(f"ask for the state of {self.name}"):
            return bool(self._handle().isActive())

    def is_persistent(self) -> bool:
        """Whether its configuration outlives its end."""
        with libvirt_door.translated(f"ask for the kind of {self.name}"):
            return bool(self._handle().isPersistent())

    def has_managed_save(self) -> bool:
        """Whether the next start would resume from libvirt's managed save."""
        with libvirt_door.translated(f"ask for the managed save of {self.name}"):
            return self._has_managed_save(self._handle())

    def xml(self, *, live: bool) -> str:
        """The domain XML with its secrets: as the next start takes it, or (``live``) as QEMU runs it now.

        The live XML has the resolved backing chains with their indices, the aliases and the ptys: what reading and
        block jobs need. It is not what a save file holds: that is ``migratable_xml``.
        """
        libvirt = libvirt_door.library()
        flags = libvirt.VIR_DOMAIN_XML_SECURE | (0 if live else libvirt.VIR_DOMAIN_XML_INACTIVE)
        with libvirt_door.translated(f"read the configuration of {self.name}"):
            return str(self._handle().XMLDesc(flags))

    def migratable_xml(self) -> str:
        """The live XML as libvirt itself writes it into a save file: secrets in, this host's details out."""
        libvirt = libvirt_door.library()
        with libvirt_door.translated(f"read the live configuration of {self.name}"):
            return str(self._handle().XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE))

    def save_cookie(self) -> str | None:
        """What libvirt writes beside ``migratable_xml`` into a save file: the CPU as QEMU runs it, where that differs.

        Source: libvirt, src/qemu/qemu_domain.c (``qemuDomainSaveCookieNew``). A restore starts exactly that CPU.
        """
        migratable, live = (
            etree.fromstring(text.encode()).find("cpu") for text in (self.migratable_xml(), self.xml(live=True))
        )
        if live is None or (migratable is not None and _canonical(migratable) == _canonical(live)):
            return None
        return f"<cookie>\n  {etree.tostring(live, encoding='unicode', with_tail=False)}\n</cookie>\n"

    def serial_path(self) -> Path | None:
        """The pty of its first serial port; None when it is off or has none."""
        if not self.is_active():
            return None
        source = etree.fromstring(self.xml(live=True).encode()).find("devices/serial[@type='pty']/source")
        return Path(source.get("path", "")) if source is not None and source.get("path") else None

    # Start and end

    def start(self, *, paused: bool = False) -> None:
        """Starts it: from its managed save when there is one, else cold."""
        flags = libvirt_door.library().VIR_DOMAIN_START_PAUSED if paused else 0
        with libvirt_door.translated(f"start {self.name}", changing=True):
            self._handle().createWithFlags(flags)

    def resume(self) -> None:
        """Lets a paused guest run on."""
        with libvirt_door.translated(f"resume {self.name}", changing=True):
            self._handle().resume()

    def suspend(self) -> None:
        """Stops the guest's CPUs; it stays in memory."""
        with libvirt_door.translated(f"suspend {self.name}", changing=True):
            self._handle().suspend()

    def shutdown(self) -> None:
        """Presses the guest's power button, without waiting for what it does."""
        with libvirt_door.translated(f"shut down {self.name}", changing=True):
            self._handle().shutdown()

    def destroy(self) -> None:
        """Ends it at once, as a power cut does. Fine when it is off already."""
        libvirt = libvirt_door.library()
        with libvirt_door.translated(f"stop {self.name}", changing=True):
            handle = self._handle()
            try:
                handle.destroy()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or handle.isActive():
                    raise

    def undefine(self, *, keep_nvram: bool = True, keep_tpm: bool = True) -> None:
        """Makes libvirt forget it, with its managed save and the metadata of libvirt's own snapshots.

        Images stay. NVRAM and TPM state are libvirt's to remove: kept unless asked otherwise. A running one becomes
        transient: it ends for good when it stops.
        """
        libvirt = libvirt_door.library()
        flags = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        flags |= libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        flags |= libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM if keep_nvram else libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        with libvirt_door.translated(f"undefine {self.name}", changing=True):
            if self._connection.getLibVersion() >= _TPM_FLAGS_SINCE:
                flags |= libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM if keep_tpm else libvirt.VIR_DOMAIN_UNDEFINE_TPM
            self._handle().undefineFlags(flags)

    def rename(self, name: str) -> None:
        """Gives it another name; libvirt wants it off, without managed save or snapshots of its own."""
        with libvirt_door.translated(f"rename {self.name} to {name}", changing=True):
            self._handle().rename(name, 0)
        self.name = name

    # Saved state

    def save(self, path: Path, *, progress: Progress | None = None) -> None:
        """Writes memory and devices to a new libvirt save file and ends the domain.

        A transient domain is gone afterwards. An interrupt cancels the save, and the guest runs on.
        """
        with libvirt_door.translated(f"save {self.name}", changing=True):
            self._run_job(lambda handle: handle.saveFlags(os.fspath(path), None, 0), progress)

    def managed_save(self, *, progress: Progress | None = None) -> None:
        """Saves it to libvirt's own place, where the next start resumes from, and ends it."""
        with libvirt_door.translated(f"save {self.name}", changing=True):
            self._run_job(lambda handle: handle.managedSave(0), progress)

    def remove_managed_save(self) -> None:
        """Drops the managed save: the next start is a cold one. Fine when there is none."""
        with libvirt_door.translated(f"remove the managed save of {self.name}", changing=True):
            handle = self._handle()
            if handle.hasManagedSaveImage():
                handle.managedSaveRemove(0)
            else:
                self._managed_save_file(handle).unlink(missing_ok=True)

    def managed_save_xml(self) -> str:
        """The XML that the managed save would resume with, secrets included."""
        libvirt = libvirt_door.library()
        with libvirt_door.translated(f"read the managed save of {self.name}"):
            return str(self._handle().managedSaveGetXMLDesc(libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE))

    def define_managed_save_xml(self, xml: str) -> None:
        """Makes the managed save resume with this XML; it may differ in paths, not in hardware or identity."""
        with libvirt_door.translated(f"change the managed save of {self.name}", changing=True):
            self._handle().managedSaveDefineXML(xml, 0)

    def forget_live_metadata(self, namespace: str) -> None:
        """The live XML holds no metadata element of this namespace; fine when it had none."""
        libvirt = libvirt_door.library()
        element, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
        with libvirt_door.translated(f"change the metadata of {self.name}", changing=True):
            self._handle().setMetadata(element, None, None, namespace, live)

    # Disks of a running domain

    def switch_disks(
        self,
        children: Mapping[str, Path],
        *,
        others: Iterable[str] = (),
        memory: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Makes a running domain write to these existing qcow2 children, all slots at one instant.

        ``others`` names every slot that stays as it is. With ``memory`` the state of that instant goes into a new
        save file; the guest stands still meanwhile. On an error no disk has been switched.
        """
        if not children and memory is None:
            return
        libvirt = libvirt_door.library()
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        if memory is None:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        xml = _snapshot_xml(children, others, memory)
        with libvirt_door.translated(f"switch the disks of {self.name}", changing=True):
            self._run_job(lambda handle: handle.snapshotCreateXML(xml, flags), progress)

    def resize_disk(self, slot: str, size: int) -> None:
        """A disk of a running domain has another size, in bytes, and its guest is told."""
        flags = libvirt_door.library().VIR_DOMAIN_BLOCK_RESIZE_BYTES
        with libvirt_door.translated(f"resize disk {slot} of {self.name}", changing=True):
            self._handle().blockResize(slot, size, flags)

    def blocked_reasons(self) -> list[str]:
        """Why QEMU could not save its memory now, in QEMU's words; empty when nothing is in the way."""
        return [str(reason) for reason in self.monitor("query-migrate").get("blocked-reasons", [])]

    def qemu_version(self) -> str:
        """The version of the QEMU that runs it, which may be older than the one that is installed."""
        numbers = self.monitor("query-version")["qemu"]
        return f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}"

    def has_job(self, *, of_disks: bool = True) -> bool:
        """Whether libvirt works on it (save, migration, …) or, with ``of_disks``, QEMU has a block job for it."""
        libvirt = libvirt_door.library()
        with libvirt_door.translated(f"ask for the jobs of {self.name}"):
            handle = self._handle()
            if not handle.isActive():
                return False
            if handle.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
                return True
        return of_disks and self.has_block_job()

    def snapshot_count(self) -> int:
        """How many snapshots libvirt itself keeps metadata of."""
        with libvirt_door.translated(f"count libvirt's snapshots of {self.name}"):
            return int(self._handle().snapshotNum(0))

    def bitmap_count(self) -> int:
        """How many of libvirt's own checkpoints (dirty bitmaps) there is metadata of."""
        with libvirt_door.translated(f"count libvirt's checkpoints of {self.name}"):
            return len(self._handle().listAllCheckpoints(0))

    def monitor(self, command: str, *, files: Iterable[int] = (), **arguments: object) -> Any:
        """What the running QEMU's monitor returns; libvirt marks the domain tainted by it, nothing more.

        Never to change the block graph that libvirt knows: it would keep its old view of it.
        """
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        changing = not command.startswith("query-")
        descriptors = list(files) or None
        with libvirt_door.translated(f"ask the monitor of {self.name}: {command}", changing=changing):
            answer = json.loads(libvirt_door.monitor_command(self._handle(), json.dumps(request), descriptors))
        if "error" in answer:
            words = str(answer["error"].get("desc"))
            raise HostFailed(f"QEMU refused {command} for {self.name}: {words}", words=words)
        return answer["return"]

    def ask_agent(self, command: str, *, timeout_s: int, arguments: Mapping[str, object] | None = None) -> Any:
        """What the agent inside its guest returns; an error when it says none within ``timeout_s``, or refuses."""
        request = json.dumps({"execute": command, **({} if arguments is None else {"arguments": arguments})})
        with libvirt_door.translated(f"ask the guest agent of {self.name}: {command}"):
            return json.loads(libvirt_door.agent_command(self._handle(), request, timeout_s))["return"]

    def _handle(self) -> Any:
        return self._connection.lookupByUUIDString(self.uuid)

    def _has_managed_save(self, handle: Any) -> bool:
        """A start looks for the file alone; what libvirt says is as old as its own last save, removal or restart."""
        return bool(handle.hasManagedSaveImage()) or self._managed_save_file(handle).exists()

    def _managed_save_file(self, handle: Any) -> Path:
        return self._saves / f"{handle.name()}.save"

    def _run_job(self, call: Callable[[Any], object], progress: Progress | None) -> None:
        """Runs a long call in a thread, so that its progress is seen and an interrupt can cancel it."""
        handle = self._handle()
        worker = _Worker(call, handle)
        worker.start()
        try:
            while not worker.join_for(_POLL_S):
                if progress is not None:
                    _report(handle, progress)
        except BaseException:
            with contextlib.suppress(libvirt_door.library().libvirtError):
                handle.abortJob()
            worker.join()
            raise
        worker.raise_error()


class _Worker(threading.Thread):
    """A thread that keeps what its call raised."""

    def __init__(self, call: Callable[[Any], object], handle: Any) -> None:
        super().__init__(name="libvirt-job")
        self._call = call
        self._handle = handle
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._call(self._handle)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error.with_traceback(None)
        finally:
            del self._call, self._handle

    def join_for(self, timeout_s: float) -> bool:
        self.join(timeout_s)
        return not self.is_alive()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _report(handle: Any, progress: Progress) -> None:
    libvirt = libvirt_door.library()
    with contextlib.suppress(libvirt.libvirtError):  # the job may just have ended
        stats = handle.jobStats(0)
        if stats.get("type", 0) != libvirt.VIR_DOMAIN_JOB_NONE:
            progress(stats.get("data_processed", 0), stats.get("data_total", 0))


def _canonical(element: etree._Element) -> bytes:
    return b"".join(etree.tostring(element, method="c14n", with_tail=False).split())


def _snapshot_xml(children: Mapping[str, Path], others: Iterable[str], memory: Path | None) -> str:
    root = etree.Element("domainsnapshot")
    if memory is not None:
        etree.SubElement(root, "memory", snapshot="external", file=os.fspath(memory))
    disks = etree.SubElement(root, "disks")
    for slot, path in children.items():
        disk = etree.SubElement(disks, "disk", name=slot, snapshot="external")
        etree.SubElement(disk, "driver", type="qcow2")
        etree.SubElement(disk, "source", file=os.fspath(path))
    for slot in others:
        etree.SubElement(disks, "disk", name=slot, snapshot="no")
    return etree.tostring(root, encoding="unicode")
