"""FAT in an ordinary file, written through mtools: folders, files, their times. No root, no mount.

Names are UTF-8 on the command line. mtools takes ``*``, ``?`` and ``[`` in any name for a pattern, and no quoting helps.

A name that fits in 8.3 is kept as a short one alone where mtools takes its code page (850) to have the letters, and it takes those
for there that iconv spells otherwise (``à`` as ``a``, ``…`` as three dots, over which it does not end). So of short names only
those are tried whose letters are the same in the code pages 437, which Linux reads, and 850, or that iconv cannot spell.
"""

from __future__ import annotations

import re
from pathlib import Path

from hvmgr import errors
from hvmgr.host import file_systems, process

_LIMIT_S = 3600.0
# The user's own settings mean other drives; times on FAT have no zone.
_LOCALE = {"LC_ALL": "C.UTF-8"}
_ENVIRONMENT = {"MTOOLSRC": "/dev/null", "HOME": "/nonexistent", **_LOCALE, "TZ": "UTC"}
_PATTERN = re.compile(r"[*?\[\]]")
_SHORT = re.compile(r"[^.]{1,8}(\.[^.]{0,3})?")  # 8.3


def require() -> None:
    """Unsupported, with the package, where a program is missing."""
    for program in ("mcopy", "mmd", "fsck.fat"):
        process.require(program)


def require_possible(path: str) -> None:
    """Unsupported where mtools cannot write the last name of a path as it is."""
    name = path.rpartition("/")[2]
    if _PATTERN.search(name):
        raise errors.Unsupported(f"{path}: mtools takes no name with * ? [ ]", hint="rename it")
    if max(name) > "\uffff":
        raise errors.Unsupported(f"{path}: mtools writes no character beyond U+FFFF", hint="rename it")
    letters = [one for one in name if not one.isascii() and not _is_common(one)]
    spelled = _spelled(letters) if letters else ""
    if "." in spelled:
        raise errors.Unsupported(
            f"{path}: mtools would make several dots of a letter in its short name", hint="rename it"
        )
    if _SHORT.fullmatch(name) and spelled != "?" * len(letters):
        raise errors.Unsupported(
            f"{path}: mtools loses such letters in a short name (8.3)", hint="give it a longer name"
        )


def _is_common(letter: str) -> bool:
    """Whether both code pages have it, as a capital too, at the same places."""
    both = letter + (letter.upper() if len(letter.upper()) == 1 else "")
    try:
        return both.encode("cp437") == both.encode("cp850")
    except UnicodeEncodeError:
        return False


def _spelled(letters: list[str]) -> str:
    """What iconv makes of them in ASCII; a question mark for each that it knows nothing for."""
    argv = ["iconv", "-f", "UTF-8", "-t", "ASCII//TRANSLIT"]
    words = "".join(letters).encode()
    done = process.run(argv, input=words, timeout_s=_LIMIT_S, ok_codes=(0, 1), environment=_LOCALE)
    return done.stdout.decode("ascii")


def make_folder(volume: Path, path: str) -> None:
    """The folder, which was not there, is there."""
    _run(volume, ["mmd", "-D", "s", "-i", volume, f"::{path}"])


def write(volume: Path, path: str, source: str, *, replaces: bool = False) -> None:
    """The file holds the bytes of ``source`` and has its time.

    Where it is not to replace one, and the name leads to one all the same, as the short names of others do, that stays what it is.
    """
    clash = "o" if replaces else "s"
    _run(volume, ["mcopy", "-n", "-m", "-D", clash, "-i", volume, source, f"::{path}"])


def check(volume: Path) -> None:
    """The whole file system is consistent; Corrupt otherwise. Nothing is changed."""
    done = process.run(["fsck.fat", "-n", volume], timeout_s=_LIMIT_S, ok_codes=range(128))
    if done.code != 0:
        words = "; ".join(done.stdout.decode("utf-8", "replace").splitlines()[1:4])
        raise errors.Corrupt(f"the file system is damaged: {words}", hint="let the guest check it, or: fsck.fat")


def _run(volume: Path, argv: list[str | Path]) -> None:
    done = process.run(argv, timeout_s=_LIMIT_S, ok_codes=range(128), environment=_ENVIRONMENT)
    if done.code == 0:
        return
    words = " ".join(done.stderr.split())
    if "full" in words:
        raise file_systems.full("the FAT volume")
    raise errors.HostFailed(f"{argv[0]} failed: {words.replace(str(volume), 'the volume')}", words=words)
