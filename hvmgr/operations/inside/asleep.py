"""Whether a system sleeps on the disks of a VM (hibernation): it goes on with its file systems as it left them, in its memory.

What is written to them meanwhile, it does not see and overwrites. A swap file, and what is encrypted, cannot be looked into.
"""

from __future__ import annotations

from hvmgr import errors
from hvmgr.operations.inside.browsing import Browser
from hvmgr.operations.inside.looking import Inside, is_readable
from hvmgr.storage.filesystems.signatures import Kind

_WINDOWS = {Kind.NTFS, Kind.FAT, Kind.EXFAT}
_HEADER = 4096  # bytes of hiberfil.sys; a smaller one says that the system is on another volume
_MARKS = (b"hibr", b"HIBR", b"HORM")
_HINT = "start it and shut it down; Windows with fast start off"


def require_awake(inside: Inside, kind: Kind | None) -> None:
    """Conflict where a system sleeps that may have a file system of this kind in its memory."""
    for one in inside.everything:
        if one.kind is Kind.SWSUSPEND:
            raise errors.Conflict(f"the system of {one.title} sleeps, with its file systems in its memory", hint=_HINT)
        if one.kind is Kind.NTFS and kind in _WINDOWS and is_readable(one):
            try:
                sleeps = _sleeps(inside.browser(one))
            except (errors.Corrupt, errors.Unsupported):
                continue  # whoever writes it, looks by itself
            if sleeps:
                raise errors.Conflict(
                    f"the Windows of {one.title} sleeps (hiberfil.sys), with its volumes in its memory", hint=_HINT
                )


def _sleeps(browser: Browser) -> bool:
    found = browser.child(browser.root(), b"hiberfil.sys")
    if found is None or found.node.is_folder:
        return False
    if found.node.size < _HEADER:
        return True
    offset, piece = next(iter(browser.content(found).pieces()), (0, b""))
    return offset == 0 and bytes(piece[:4]) in _MARKS
