"""cryptsetup, for the one thing that it does better than anybody: the key of a LUKS volume, found with one of its keys.

It reads a copy of the header in memory, needs no root for that and no device mapper. Keys go in by a pipe and come out by
one: they are on no command line, in no file and in no message. It ends with us, and no header makes it take more than it may.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import process
from hvmgr.host.process import Confined

PROGRAM = "cryptsetup"
_TIMEOUT_S = 300.0  # a slow host takes as long as the header wants, for that is what it is for
_MEMORY_MAX = 4 << 30  # what cryptsetup itself gives a slot at most
_ITS_OWN = 512 << 20  # of addresses: libraries, stacks, the copy of a slot
_NOT_UNDERSTOOD, _NO_PERMISSION, _NO_MEMORY = 1, 2, 3
_ENDS: Collection[int] = (0, _NOT_UNDERSTOOD, _NO_PERMISSION, _NO_MEMORY)
_DUMPED = re.compile(rb"dump:((?:\s+[0-9a-f]{2}\b)+)")
_AVAILABLE = re.compile(r"^MemAvailable:\s+([0-9]+) kB$", re.MULTILINE)
_HINT = "what it wants is shown by 'cryptsetup luksDump', and changed inside the guest by 'cryptsetup luksConvertKey'"


def volume_key(header: int, secret: bytes, *, memory: int) -> bytes | None:
    """The key that the volume is encrypted with; None where the secret opens none of the header's slots.

    ``header`` is a descriptor of the copy, ``memory`` what its slots may take at most. Corrupt where the program can make
    nothing of the header, Unsupported where that is too much, or the program does not come to an end or is not there.
    """
    _require_memory(memory)
    argv = [PROGRAM, "luksDump", "--batch-mode", "--dump-master-key", "--key-file", "-", f"/proc/self/fd/{header}"]
    confined = Confined(memory + _ITS_OWN, (header,))
    try:
        done = process.run(argv, input=secret, timeout_s=_TIMEOUT_S, ok_codes=_ENDS, confined=confined)
    except errors.HostFailed as error:
        raise errors.Unsupported(f"its key was not found: {error.message}", hint=_HINT) from error
    if done.code == _NO_PERMISSION:
        return None
    words = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip()) or "it does not say why"
    if done.code == _NOT_UNDERSTOOD:
        raise errors.Corrupt(f"{PROGRAM} makes nothing of the header of LUKS: {words}", hint=_HINT)
    if done.code == _NO_MEMORY:
        raise errors.Unsupported(f"{PROGRAM} had not enough memory to find its key: {words}", hint=_HINT)
    found = _DUMPED.search(done.stdout)
    if found is None:
        raise errors.Unsupported(f"{PROGRAM} has opened the volume and does not tell its key in a way that is known")
    return bytes.fromhex(found[1].decode())


def _require_memory(wanted: int) -> None:
    found = _AVAILABLE.search(Path("/proc/meminfo").read_text())
    most = _MEMORY_MAX if found is None else min(_MEMORY_MAX, int(found[1]) * 1024 // 2)
    if wanted > most:
        raise errors.Unsupported(
            f"each try of a key takes {units.format_size(wanted)} of memory, and at most {units.format_size(most)} is given here",
            hint=_HINT,
        )
