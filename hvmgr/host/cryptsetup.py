"""cryptsetup, for the one thing that it does better than anybody: the key of a LUKS volume, found with one of its keys.

It reads a copy of the header, needs no root for that and no device mapper. Keys go in by a pipe and come out by one: they
are on no command line, in no file and in no message.
"""

from __future__ import annotations

import re
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

PROGRAM = "cryptsetup"
_TIMEOUT_S = 300.0  # a slow host takes as long as the header wants, for that is what it is for
_NO_PERMISSION = 2
_DUMPED = re.compile(rb"dump:((?:\s+[0-9a-f]{2}\b)+)")


def volume_key(header: Path, secret: bytes) -> bytes | None:
    """The key that the volume is encrypted with; None where the secret opens none of the header's slots.

    Unsupported without the program; HostFailed where it cannot make anything of the header.
    """
    argv: list[str | Path] = [PROGRAM, "luksDump", "--batch-mode", "--dump-master-key", "--key-file", "-", header]
    done = process.run(argv, input=secret, timeout_s=_TIMEOUT_S, ok_codes=(0, _NO_PERMISSION))
    if done.code == _NO_PERMISSION:
        return None
    found = _DUMPED.search(done.stdout)
    if found is None:
        raise errors.HostFailed(f"{PROGRAM} has opened the volume and does not tell its key in a way that is known")
    return bytes.fromhex(found[1].decode())
