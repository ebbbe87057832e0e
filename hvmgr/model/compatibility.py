"""What a comparison of an import with this host can find: one stable code each, its weight, and how an import ends on it.

The table is part of docs/commands.md (a test compares them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hvmgr import errors
from hvmgr.model.finding import Finding, Severity


@dataclass(frozen=True, slots=True)
class Kind:
    """One code: its weight, what it means, and the error that an import ends with when it is still open."""

    severity: Severity
    meaning: str
    error: type[errors.HvmgrError] = errors.Conflict


def _error(meaning: str, error: type[errors.HvmgrError] = errors.Conflict) -> Kind:
    return Kind(Severity.ERROR, meaning, error)


def _warning(meaning: str) -> Kind:
    return Kind(Severity.WARNING, meaning)


def _info(meaning: str) -> Kind:
    return Kind(Severity.INFO, meaning)


KINDS: Mapping[str, Kind] = {
    # the source
    "damaged": _error("a file of the source cannot be understood", errors.Corrupt),
    "name-escapes": _error("a name in the source leads out of its folder", errors.Corrupt),
    "link": _error("a symbolic link or a special file stands where a file should", errors.Corrupt),
    "double-slot": _error("two disks have one slot", errors.Corrupt),
    "cycle": _error("parents form a circle", errors.Corrupt),
    "missing-snapshot": _error("a snapshot that others name is not there", errors.Corrupt),
    "missing-disk": _error("an image is not where it should be", errors.Corrupt),
    "wrong-size": _error("an image has another size than was recorded", errors.Corrupt),
    "wrong-hash": _error("an image holds other bytes than were recorded", errors.Corrupt),
    "saved-state-damaged": _error("a saved state cannot be used", errors.Corrupt),
    "newer-format": _error("the source was written by a newer hvmgr", errors.Unsupported),
    "format-unsupported": _error("a VM cannot run on an image of this format", errors.Unsupported),
    "vhd-differencing": _error(
        "a differencing VHD, which QEMU must never open, would be used as it is", errors.Unsupported
    ),
    "image-outside": _error("an image lies outside the source, and nobody has said that it may be read"),
    "source-in-use": _error("the source's disks are being written"),
    "source-shared": _error("other VMs stand on images that would be changed or renamed"),
    "source-writable": _error("images that would be shared can still be written"),
    "source-of-others": _warning("somebody else can change at any time what would be shared or become the home"),
    # this host
    "missing-network": _error("a network of libvirt is not up here"),
    "missing-bridge": _error("a bridge or device is not there"),
    "missing-pool": _error("a disk comes from a storage pool that is not up here"),
    "missing-file": _error("a file outside the home that the VM needs is not there"),
    "machine-unknown": _error("this host's QEMU does not know the machine type", errors.Unsupported),
    "emulator-missing": _error("this host has no emulator for the VM", errors.Unsupported),
    "accelerator-missing": _error("this host cannot run a VM of this type (KVM)", errors.Unsupported),
    "firmware-missing": _error("the firmware is not installed here", errors.Unsupported),
    "cpu-unavailable": _warning("this host's CPU differs: saved states will not run here, a cold start may not"),
    "newer-host": _warning("the source's libvirt or QEMU is newer than this host's"),
    # the place
    "id-in-use": _error("a VM with this id is there already"),
    "name-in-use": _error("a VM of this name is there already"),
    "mac-in-use": _warning("another VM of this host has this address"),
    "target-exists": _error("something is at the place where the VM is to be"),
    "no-space": _error("there is too little space", errors.NoSpace),
    "not-readable": _error("QEMU's user cannot reach the place or read an image"),
    # worth knowing
    "export-used-up": _warning("the export becomes the VM, and is no export any more"),
    "drive-emptied": _warning("a medium is not there: the drive will be empty"),
    "host-access": _warning("the VM would have, or run, something else of the host"),
    "host-path": _info("the VM names a file or device of the host"),
    "address-in-state": _info("a guest that goes on from a saved state keeps its old addresses until it restarts"),
    "vhd-kept": _info("a VHD stays one: the memory of a VM that runs on it cannot be saved"),
    "vhd-converted": _info("a VHD that QEMU does not read as it is becomes a qcow2 image"),
    "default-map": _info("a map of the configuration file is followed"),
    "undo-left-behind": _info("the undo slot of the source does not come along"),
}


def found(code: str, sentence: str, where: object, repair: str | None = None) -> Finding:
    """A finding with the weight that its code has."""
    return Finding(code=code, severity=KINDS[code].severity, sentence=sentence, where=str(where), repair=repair)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then the rest; each once."""
    order = [Severity.ERROR, Severity.WARNING, Severity.INFO]
    return sorted(dict.fromkeys(findings), key=lambda one: order.index(one.severity))


def is_open(finding: Finding) -> bool:
    """Whether an import ends on it."""
    return finding.severity is Severity.ERROR


def to_error(findings: Iterable[Finding], subject: str) -> errors.HvmgrError | None:
    """The error that an import with these findings ends with; None when nothing stands in its way."""
    bad = [one for one in findings if is_open(one)]
    if not bad:
        return None
    first = bad[0]
    rest = f" (and {len(bad) - 1} more: see hvmgr compare)" if len(bad) > 1 else ""
    return KINDS[first.code].error(
        f"{subject}: {first.sentence}{rest}",
        hint=first.repair,
        findings=[{"code": one.code, "sentence": one.sentence, "where": one.where} for one in bad],
    )
