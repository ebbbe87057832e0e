"""Whether a file system waits for its journal to be replayed, as its superblock tells."""

from __future__ import annotations

from pathlib import Path

from hvmgr.storage.filesystems.signatures import Kind

# Where the superblock says so, how many bytes that is, and which of their bits: ext's needs_recovery, Btrfs' root of the log.
_RECOVER, _LOG = (1024 + 0x60, 4, 0x4), ((64 << 10) + 0x60, 8, (1 << 64) - 1)
_TOLD = {Kind.EXT3: _RECOVER, Kind.EXT4: _RECOVER, Kind.BTRFS: _LOG}


def is_pending(kind: Kind | None, file: Path) -> bool:
    """Whether the file system in a file or device waits for that; XFS may: its superblock does not tell."""
    if kind is Kind.XFS:
        return True
    if kind not in _TOLD:
        return False
    start, size, bits = _TOLD[kind]
    try:
        with file.open("rb", buffering=0) as source:
            source.seek(start)
            return bool(int.from_bytes(source.read(size), "little") & bits)
    except OSError:
        return False
