"""The script that adds a VHD with Windows to a boot menu of Windows, in the words of ``bcdedit``.

A boot configuration is Windows' own; its tool is run there. The portable kind names the file only and lets the boot manager
look for it on every volume, the qualified one names the volume too and starts faster.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import PureWindowsPath

from hvmgr import errors

_FORBIDDEN = re.compile(r'["%!^&|<>\x00-\x1f]')


class Kind(StrEnum):
    """How the entry names the VHD."""

    PORTABLE = "portable"
    QUALIFIED = "qualified"


def script(title: str, path: str, *, drive: str = "C:", kind: Kind = Kind.PORTABLE, default: bool = False) -> str:
    r"""A batch file, to be run by an administrator in Windows; ``path`` is the VHD's on its volume (``/VHD/os.vhd``)."""
    for what, text in (("title", title), ("path", path)):
        if _FORBIDDEN.search(text):
            raise errors.UsageError(f"the {what} has a character that no batch file can hold: {text!r}")
    if not re.fullmatch(r"[A-Za-z]:", drive):
        raise errors.UsageError(f"'{drive}' is no drive of Windows", hint="it is a letter and a colon: C:")
    place = str(PureWindowsPath("/", path.lstrip("/")))
    device = f"vhd=[{'locate' if kind is Kind.PORTABLE else drive.upper()}]{place}"
    lines = [
        "@echo off",
        f"rem Adds {place} to the boot menu. Run it in Windows as an administrator.",
        "setlocal",
        "chcp 65001 > nul",
        'set "entry="',
        f'for /f "tokens=2 delims={{}}" %%i in (\'bcdedit /copy {{current}} /d "{title}"\') do set "entry={{%%i}}"',
        "if not defined entry (echo bcdedit made no entry: is this an administrator's prompt? & exit /b 1)",
        f'bcdedit /set %entry% device "{device}" || goto undo',
        f'bcdedit /set %entry% osdevice "{device}" || goto undo',
        "bcdedit /set %entry% detecthal on || goto undo",
        *(["bcdedit /default %entry% || goto undo"] if default else []),
        "echo The boot menu has the entry %entry%",
        "exit /b 0",
        ":undo",
        "bcdedit /delete %entry%",
        "exit /b 1",
    ]
    return "".join(f"{line}\r\n" for line in lines)
