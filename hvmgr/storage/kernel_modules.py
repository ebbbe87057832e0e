"""The modules of a kernel in a folder as ``/lib/modules/VERSION``, wherever that lies: which there are, and what each needs.

What a module says of itself stands in it, as ``NAME=VALUE`` between zeros (modinfo(8) reads the same): its aliases are the devices
that it drives, its firmware the files that it asks for.
"""

from __future__ import annotations

import functools
import gzip
import lzma
import posixpath
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
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


class Modules:
    """The modules of one kernel; ``read`` gives a file of their folder, and None for one that is not there."""

    def __init__(self, where: str, read: Callable[[str], bytes | None]) -> None:
        """NotFound where the folder is none of a kernel."""
        listed = read("modules.dep")
        if listed is None:
            raise errors.NotFound(
                f"{where} has no modules.dep: it holds no modules of a kernel", hint="make it there with: depmod"
            )
        lines = (line.partition(":") for line in _text(listed).splitlines())
        # By name: a module's path, and the paths of all that it needs, what comes first last (modules.dep(5)).
        self._listed = {name_of(path): (path, rest.split()) for path, _, rest in lines}
        self._where = where
        self._read = read

    def has(self, name: str) -> bool:
        """Whether there is such a module."""
        return name in self._listed

    @functools.cached_property
    def built_in(self) -> frozenset[str]:
        """The names of those that are part of the kernel."""
        return frozenset(map(name_of, _text(self._read("modules.builtin") or b"").splitlines()))

    def chosen(self, wanted: Callable[[str], bool]) -> list[Module]:
        """Those whose paths are ``wanted``, with all that they need."""
        paths: dict[str, str] = {}
        for path, others in self._listed.values():
            if wanted(path):
                for one in (*others, path):
                    paths.setdefault(name_of(one), one)
        return [self._module(name, path) for name, path in sorted(paths.items())]

    def in_order(self, names: Iterable[str]) -> list[Module]:
        """Those of these names that are there, each behind all that it needs."""
        paths: dict[str, str] = {}
        for path, others in (self._listed[name] for name in names if name in self._listed):
            for one in (*reversed(others), path):
                paths.setdefault(name_of(one), one)
        return [self._module(name, path) for name, path in paths.items()]

    def _module(self, name: str, path: str) -> Module:
        packed = self._read(path)
        if packed is None:
            raise errors.NotFound(f"{self._where} has no {path}", hint="bring its list up to date there with: depmod")
        try:
            data = plain(path, packed)
        except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise errors.Corrupt(
                f"{self._where}: {path} is damaged: {error}", hint="install that kernel again"
            ) from error
        needs = tuple(name_of(one) for one in self._listed.get(name, ("", []))[1])
        return Module(name, data, needs, tuple(_facts(data, b"alias")), tuple(_facts(data, b"firmware")))


def of_folder(folder: Path) -> Modules:
    """The modules in a folder of this host; NotFound where it is none of a kernel."""

    def read(path: str) -> bytes | None:
        try:
            return (folder / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    return Modules(str(folder), read)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


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
