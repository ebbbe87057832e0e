"""``--key-file``: the keys of encrypted volumes, from files, from stdin, or from whoever sits at the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.os_errors import explained

if TYPE_CHECKING:
    from hvmgr.operations.inside.unlocking import Key

_TARGET = re.compile(r"(?P<target>\w*:\d+|\w[\w.+-]*/[\w.+-]+|\w+)=(?P<file>.+)", re.DOTALL)
_STANDARD = "-"
_MAX = 8 << 20  # as cryptsetup has it

option: Callable[[Any], Any] = click.option(
    "--key-file", "key_files", metavar="[VOLUME=]FILE", multiple=True,
    help="The key of what is encrypted with LUKS, in a file; - for stdin. VOLUME: SLOT, SLOT:N, :N or GROUP/VOLUME.",
)  # fmt: skip


def read(values: Sequence[str]) -> list[Key]:
    """The keys that were named; NotFound for a file that is not there, UsageError for one that holds no key."""
    if not values:
        return []
    from hvmgr.host import kept_secrets
    from hvmgr.operations.inside.unlocking import Key

    kept_secrets.leave_no_core()  # before there is anything in it
    found = []
    for value in values:
        fits = _TARGET.fullmatch(value)
        target, file = (fits["target"], fits["file"]) if fits is not None else ("", value)
        if file == _STANDARD and sum(_file_of(one) == _STANDARD for one in values) > 1:
            raise errors.UsageError("stdin can give one key only", hint="put the others into files")
        found.append(Key(_secrets(file), target))
    return found


def _file_of(value: str) -> str:
    fits = _TARGET.fullmatch(value)
    return value if fits is None else fits["file"]


def _secrets(file: str) -> tuple[bytes, ...]:
    """What the file holds, and the same without the newline that editors and ``echo`` leave."""
    if file == _STANDARD and sys.stdin.isatty():
        return (click.prompt("Key", hide_input=True, err=True).encode(),)
    if file == _STANDARD:
        secret = sys.stdin.buffer.read(_MAX + 1)
    else:
        with explained(Path(file)), Path(file).open("rb") as opened:
            secret = opened.read(_MAX + 1)
    if not secret or len(secret) > _MAX:
        where = "stdin" if file == _STANDARD else file
        what = "is empty" if not secret else "is larger than any key"
        raise errors.UsageError(f"{where} {what}", hint="name the file that holds the key with --key-file")
    return tuple(dict.fromkeys(one for one in (secret, secret.removesuffix(b"\n")) if one))
