"""The modules of a kernel in a folder as ``/lib/modules/VERSION``: which there are, what each needs, and what wants it.

What a module says of itself stands in it, as ``NAME=VALUE`` between zeros (modinfo(8) reads the same): its aliases are the devices
that it drives, its firmware the files that it asks for.
"""

from __future__ import annotations

import gzip
import lzma
import posixpath
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

_SUFFIX = re.compile(r"\.ko(\.xz|\.gz|\.zst)?$")
_FACT = re.compile(rb"(?<=\0)(alias|firmware)=([\x21-\x7e]+)(?=\0)")
_UNPACK_S = 60.0


@dataclass(frozen=True, slots=True)
class Module:
    """``needs`` are the names of all modules that have to be there before it, the one that comes first last."""

    name: str
    data: bytes
    needs: tuple[str, ...]
    aliases: tuple[str, ...]
    firmware: tuple[str, ...]


def name_of(path: str) -> str:
    """The name that the kernel knows a module by."""
    return _SUFFIX.sub("", posixpath.basename(path)).replace("-", "_")


def plain(path: str, data: bytes) -> bytes:
    """A module as the kernel takes it, by the suffix of its file; the errors of the formats for one that is damaged."""
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".gz"):
        return gzip.decompress(data)
    if path.endswith(".zst"):
        told = process.run(["zstd", "-dcq"], input=data, timeout_s=_UNPACK_S, ok_codes=(0, 1))
        if told.code != 0:
            raise EOFError(told.stderr.strip())
        return told.stdout
    return data


def require(folder: Path) -> None:
    """NotFound where the folder is none of a kernel."""
    if not (folder / "modules.dep").is_file():
        raise errors.NotFound(
            f"{folder} has no modules.dep: it holds no modules of a kernel", hint="make it with: depmod"
        )


def chosen(folder: Path, wanted: Callable[[str], bool]) -> list[Module]:
    """The modules whose paths are ``wanted``, with all that they need; NotFound where the folder is none of a kernel."""
    needs = _dependencies(folder)
    paths: dict[str, str] = {}
    for path, others in needs.values():
        if wanted(path):
            for one in (*others, path):
                paths.setdefault(name_of(one), one)
    return [_module(folder, name, path, needs) for name, path in sorted(paths.items())]


def _dependencies(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """By name: a module's path, and the paths of all that it needs, what comes first last (modules.dep(5))."""
    require(folder)
    text = (folder / "modules.dep").read_text("utf-8", "surrogateescape")
    lines = (line.partition(":") for line in text.splitlines())
    return {name_of(path): (path, rest.split()) for path, _, rest in lines}


def _module(folder: Path, name: str, path: str, needs: dict[str, tuple[str, list[str]]]) -> Module:
    try:
        data = plain(path, (folder / path).read_bytes())
    except FileNotFoundError:
        raise errors.NotFound(f"{folder} has no {path}", hint=f"run: depmod {folder.name}") from None
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise errors.Corrupt(f"{folder / path} is damaged: {error}", hint="install that kernel again") from error
    others = tuple(name_of(one) for one in needs.get(name, ("", []))[1])
    return Module(name, data, others, tuple(_facts(data, b"alias")), tuple(_facts(data, b"firmware")))


def _facts(data: bytes, kind: bytes) -> Iterator[str]:
    for match in _FACT.finditer(data):
        if match[1] == kind:
            yield match[2].decode("ascii")


def packed(modules: list[Module], folder: str) -> Iterator[tuple[str, bytes]]:
    """The files of a folder in which modprobe finds them by name and by the devices that they drive: paths, bytes."""
    needs = (f"{one.name}.ko:{''.join(f' {need}.ko' for need in one.needs)}\n" for one in modules)
    drives = (f"alias {alias} {one.name}\n" for one in modules for alias in one.aliases)
    yield f"{folder}/modules.dep", "".join(needs).encode()
    yield f"{folder}/modules.alias", "".join(drives).encode()
    for one in modules:
        yield f"{folder}/{one.name}.ko", one.data
