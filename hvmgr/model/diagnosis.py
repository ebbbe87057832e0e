"""What doctor can find: every code, how much it stands in the way, and which error a command would meet.

The codes are a promise to machines; docs/commands.md has the table, and a test compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from hvmgr import errors
from hvmgr.model.finding import Finding, Severity


class Code(StrEnum):
    """One kind of finding."""

    # The host
    LIBVIRT_UNREACHABLE = "libvirt-unreachable"
    PROGRAM_MISSING = "program-missing"
    VERSION_OLD = "version-old"
    VERSIONS = "versions"
    ABILITY_MISSING = "ability-missing"
    KVM_CLOSED = "kvm-closed"
    HOOK_MISSING = "hook-missing"
    APPARMOR_COMMIT = "apparmor-commit"
    APPARMOR_RULE = "apparmor-rule"
    SELINUX_LABEL = "selinux-label"

    # The index
    INDEX_DAMAGED = "index-damaged"
    INDEX_STALE = "index-stale"
    INDEX_MISSING = "index-missing"
    ATTACHMENT_LEFT = "attachment-left"
    MOUNT_LEFT = "mount-left"
    KEPT_UNSEEN = "kept-unseen"

    # Image files outside all homes
    IMAGE_CHANGE_OPEN = "image-change-open"

    # A home as a whole
    OPERATION_RUNNING = "operation-running"
    OPERATION_OPEN = "operation-open"
    JOURNAL_DAMAGED = "journal-damaged"
    DAEMON_LEFT = "daemon-left"
    REMAINS = "remains"
    HOME_AMBIGUOUS = "home-ambiguous"
    HOME_NEWER = "home-newer"
    HOME_HALF_MADE = "home-half-made"
    HOME_MOVED = "home-moved"
    HOME_UNREADABLE = "home-unreadable"
    HOME_UNWRITABLE = "home-unwritable"
    ID_TWICE = "id-twice"
    OTHER_CONNECTION = "other-connection"
    FOLDER_MISSING = "folder-missing"
    CONFIGURATION_MISSING = "configuration-missing"
    CONFIGURATION_DAMAGED = "configuration-damaged"
    UNDO_DAMAGED = "undo-damaged"
    SNAPSHOT_DAMAGED = "snapshot-damaged"
    SNAPSHOT_WRITTEN = "snapshot-written"
    SNAPSHOT_MISSING = "snapshot-missing"
    MEMORY_MISSING = "memory-missing"
    MEMORY_STUCK = "memory-stuck"
    GUEST_AT_REST = "guest-at-rest"
    ORPHAN = "orphan"
    QUARANTINED = "quarantined"
    START_ALLOWED = "start-allowed"

    # Images
    IMAGE_MISSING = "image-missing"
    IMAGE_UNREADABLE = "image-unreadable"
    IMAGE_DAMAGED = "image-damaged"
    IMAGE_UNSUPPORTED = "image-unsupported"
    IMAGE_SWAPPED = "image-swapped"
    IMAGE_LEAKS = "image-leaks"
    CHAIN_CIRCLE = "chain-circle"
    CHAIN_DEEP = "chain-deep"
    IMAGE_CHANGED = "image-changed"
    IMAGE_TOUCHED = "image-touched"
    IMAGE_UNRECORDED = "image-unrecorded"
    DISK_DETACHED = "disk-detached"
    MERGE_PENDING = "merge-pending"
    IMAGE_UNNAMED = "image-unnamed"
    IMAGE_SHARED = "image-shared"
    IMAGE_WRITTEN = "image-written"
    IMAGE_FROZEN = "image-frozen"

    # Modes and owners
    USER_LIMITED = "user-limited"
    WAY_CLOSED = "way-closed"
    MODE_WRONG = "mode-wrong"
    IMAGE_NOT_WRITABLE = "image-not-writable"
    OWNER_WRONG = "owner-wrong"

    # libvirt
    DOMAIN_UNKNOWN = "domain-unknown"
    DOMAIN_EDITED = "domain-edited"
    DOMAIN_FOREIGN = "domain-foreign"
    DISKS_CHANGED = "disks-changed"
    NAME_TAKEN = "name-taken"
    HOME_MISSING = "home-missing"
    HOME_FOREIGN = "home-foreign"
    SAVE_STALE = "save-stale"
    LIBVIRT_SNAPSHOTS = "libvirt-snapshots"


@dataclass(frozen=True, slots=True)
class Kind:
    """What is true of every finding with one code; ``error`` is what a command would raise that meets it."""

    severity: Severity
    error: type[errors.HvmgrError] | None = None


_INFO, _WARNING = Kind(Severity.INFO), Kind(Severity.WARNING)
_CORRUPT, _CONFLICT = Kind(Severity.ERROR, errors.Corrupt), Kind(Severity.ERROR, errors.Conflict)
_UNSUPPORTED, _HOST_FAILED = Kind(Severity.ERROR, errors.Unsupported), Kind(Severity.ERROR, errors.HostFailed)

KINDS: Mapping[Code, Kind] = {
    Code.LIBVIRT_UNREACHABLE: _HOST_FAILED,
    Code.PROGRAM_MISSING: _UNSUPPORTED,
    Code.VERSION_OLD: _UNSUPPORTED,
    Code.VERSIONS: _INFO,
    Code.ABILITY_MISSING: _INFO,
    Code.KVM_CLOSED: _WARNING,
    Code.HOOK_MISSING: _INFO,
    Code.APPARMOR_COMMIT: _WARNING,
    Code.APPARMOR_RULE: _WARNING,
    Code.SELINUX_LABEL: _WARNING,
    Code.INDEX_DAMAGED: _WARNING,
    Code.INDEX_STALE: _WARNING,
    Code.INDEX_MISSING: _WARNING,
    Code.IMAGE_CHANGE_OPEN: _CONFLICT,
    Code.ATTACHMENT_LEFT: _WARNING,
    Code.MOUNT_LEFT: _WARNING,
    Code.KEPT_UNSEEN: _INFO,
    Code.OPERATION_RUNNING: _INFO,
    Code.OPERATION_OPEN: _CONFLICT,
    Code.JOURNAL_DAMAGED: _CORRUPT,
    Code.DAEMON_LEFT: _WARNING,
    Code.REMAINS: _INFO,
    Code.HOME_AMBIGUOUS: _CORRUPT,
    Code.HOME_NEWER: _UNSUPPORTED,
    Code.HOME_HALF_MADE: _WARNING,
    Code.HOME_MOVED: _CONFLICT,
    Code.HOME_UNREADABLE: _HOST_FAILED,
    Code.HOME_UNWRITABLE: _HOST_FAILED,
    Code.ID_TWICE: _CONFLICT,
    Code.OTHER_CONNECTION: _WARNING,
    Code.FOLDER_MISSING: _WARNING,
    Code.CONFIGURATION_MISSING: _CORRUPT,
    Code.CONFIGURATION_DAMAGED: _CORRUPT,
    Code.UNDO_DAMAGED: _CORRUPT,
    Code.SNAPSHOT_DAMAGED: _CORRUPT,
    Code.SNAPSHOT_WRITTEN: _CORRUPT,
    Code.SNAPSHOT_MISSING: _WARNING,
    Code.MEMORY_MISSING: _WARNING,
    Code.MEMORY_STUCK: _WARNING,
    Code.GUEST_AT_REST: _WARNING,
    Code.ORPHAN: _WARNING,
    Code.QUARANTINED: _INFO,
    Code.START_ALLOWED: _INFO,
    Code.IMAGE_MISSING: _CORRUPT,
    Code.IMAGE_UNREADABLE: _CORRUPT,
    Code.IMAGE_DAMAGED: _CORRUPT,
    Code.IMAGE_UNSUPPORTED: _UNSUPPORTED,
    Code.IMAGE_SWAPPED: _CORRUPT,
    Code.IMAGE_LEAKS: _INFO,
    Code.CHAIN_CIRCLE: _CORRUPT,
    Code.CHAIN_DEEP: _WARNING,
    Code.IMAGE_CHANGED: _CORRUPT,
    Code.IMAGE_TOUCHED: _WARNING,
    Code.IMAGE_UNRECORDED: _INFO,
    Code.DISK_DETACHED: _INFO,
    Code.MERGE_PENDING: _INFO,
    Code.IMAGE_UNNAMED: _INFO,
    Code.IMAGE_SHARED: _INFO,
    Code.IMAGE_WRITTEN: _CONFLICT,
    Code.IMAGE_FROZEN: _CONFLICT,
    Code.USER_LIMITED: _WARNING,
    Code.WAY_CLOSED: _CONFLICT,
    Code.MODE_WRONG: _WARNING,
    Code.IMAGE_NOT_WRITABLE: _CONFLICT,
    Code.OWNER_WRONG: _WARNING,
    Code.DOMAIN_UNKNOWN: _WARNING,
    Code.DOMAIN_EDITED: _INFO,
    Code.DOMAIN_FOREIGN: _WARNING,
    Code.DISKS_CHANGED: _WARNING,
    Code.NAME_TAKEN: _CONFLICT,
    Code.HOME_FOREIGN: _CONFLICT,
    Code.HOME_MISSING: Kind(Severity.ERROR, errors.NotFound),
    Code.SAVE_STALE: _CONFLICT,
    Code.LIBVIRT_SNAPSHOTS: _WARNING,
}

# What is said first, and which of several errors gives the exit code: damage before all.
_SEVERITIES = (Severity.ERROR, Severity.WARNING, Severity.INFO)
_WORST_FIRST = (errors.Corrupt, errors.Conflict, errors.Unsupported, errors.HostFailed, errors.NotFound)


def finding(code: Code, sentence: str, where: object, *, repair: str | None = None, vm: str | None = None) -> Finding:
    """A finding with the severity of its code."""
    return Finding(code, KINDS[code].severity, sentence, str(where), repair, vm)


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, the rest last; within these as they were found, each once."""
    return sorted(dict.fromkeys(found), key=lambda one: _SEVERITIES.index(one.severity))


def about(vm: str, found: Iterable[Finding]) -> list[Finding]:
    """The findings with the VM that they concern."""
    return [dataclasses.replace(one, vm=vm) for one in found]


def exit_code(found: Iterable[Finding]) -> int:
    """0 when nothing stands in the way, else the exit code of the worst error."""
    kinds = {KINDS[Code(one.code)].error for one in found if one.severity is Severity.ERROR}
    return next((error.exit_code for error in _WORST_FIRST if error in kinds), 0)
