"""Whether this host can go on from a saved state, as far as that shows before anything is stopped for it.

What only QEMU finds out while it loads is another matter: the present is put back then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.host.capabilities import Capabilities
from hvmgr.model import configuration
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import SnapshotRecord
from hvmgr.operations.exchange import compare_host
from hvmgr.operations.session import Session

WITHOUT = "apply it with --without-state: its disks are whole"


def require_loadable(session: Session, record: SnapshotRecord, memory: Path) -> Configuration:
    """The configuration in a snapshot's saved state; Corrupt when the file is none, Unsupported when this host is in the way."""
    try:
        saved = saved_state.read(memory)
    except errors.HvmgrError as error:
        raise errors.Corrupt(
            f"the saved state of snapshot '{record.name}' cannot be used: {error}", hint=WITHOUT
        ) from error
    if not saved.complete:
        raise errors.Corrupt(f"the saved state of snapshot '{record.name}' is not complete", hint=WITHOUT)
    if not saved_state.has_stream(memory):
        raise errors.Corrupt(
            f"the saved state of snapshot '{record.name}' is damaged: no memory is in it", hint=WITHOUT
        )
    live = configuration.parse(saved.xml, source=str(memory))
    lacks = list(_lacks(session, record, live, saved.cookie))
    if lacks:
        raise errors.Unsupported(
            f"this host cannot go on from the saved state of snapshot '{record.name}': {'; '.join(lacks)}", hint=WITHOUT
        )
    return live


def _lacks(session: Session, record: SnapshotRecord, live: Configuration, cookie: str | None) -> Iterator[str]:
    """Sentences about what this host lacks for it."""
    connection = session.connection
    host = connection.capabilities()
    for finding in compare_host.machine_findings(connection, host, live):
        yield finding.sentence
    if (path := live.emulator) is not None and not path.exists():
        yield f"there is no {path}, which ran it"
    yield from _age(record, live, host)
    if (live.arch or host.arch) in host.emulators and compare_host.lacks_cpu(connection, live, cookie):
        yield "its CPU has features that this host does not offer"
    for nic in live.nics():
        if nic.type == "network" and nic.source is not None and connection.lacks_network(nic.source):
            yield f"there is no active network '{nic.source}', which card {nic.mac} needs"
        if nic.type in {"bridge", "direct"} and nic.source is not None and not compare_host.has_device(nic.source):
            yield f"there is no bridge or device '{nic.source}', which card {nic.mac} needs"
    if live.has_tpm and not connection.machine_facts(arch=live.arch, accel=live.type).has_tpm_emulator:
        yield "there is no swtpm for its TPM"


def _age(record: SnapshotRecord, live: Configuration, host: Capabilities) -> Iterator[str]:
    """QEMU reads the states of older ones; libvirt tells the version of this host's usual one only."""
    usual = live.arch in {None, host.arch} and live.emulator in {None, host.emulators.get(host.arch)}
    if record.qemu is not None and usual and _release(record.qemu) > _release(host.qemu_version):
        yield f"QEMU {record.qemu} saved it, and here is {host.qemu_version}, which is older"


def _release(version: str) -> tuple[int, ...]:
    """Major and minor: the third number is of corrections, which leave the format alone."""
    return tuple(int(part) if part.isdecimal() else 0 for part in version.split(".")[:2])
