"""One file system to look around in: paths, patterns, links, whole trees. Names are bytes, as they are on the disk.

Links are followed inside the file system alone: an absolute one starts at its root. A folder that lies in itself, as only
a damaged file system has it, is Corrupt.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hvmgr import errors
from hvmgr.model import names
from hvmgr.operations.inside.views import Volume
from hvmgr.storage.filesystems import reader
from hvmgr.storage.filesystems.reader import Content, Node, Reader, Type

DAMAGED = "what is damaged in the file system"
_LINKS_MAX = 40
_DEPTH_MAX = 4096
_REMEMBERED = 64
_GLOB = frozenset(b"*?[")


@dataclass(frozen=True, slots=True)
class Found:
    """A file by its path, which begins with ``/``; ``stream`` where a named stream of it is meant."""

    path: bytes
    node: Node
    stream: str = ""

    @property
    def name(self) -> bytes:
        """The last part of the path, with the stream's name."""
        name = self.path.rpartition(b"/")[2]
        return name + b":" + self.stream.encode("utf-8", "surrogatepass") if self.stream else name

    @property
    def size(self) -> int:
        """Bytes of the content that is meant."""
        return dict(self.node.streams)[self.stream] if self.stream else self.node.size


class Browser:
    """A volume's file system."""

    def __init__(self, volume: Volume, opened: Reader) -> None:
        self.volume = volume
        self.reader = opened
        self.unnameable = 0  # names that were left out because no path can have them
        self._known: dict[int, dict[bytes, Any]] = {}
        self._folded: dict[int, dict[str, bytes]] = {}

    # -- paths ---------------------------------------------------------------------------------------------------

    def root(self) -> Found:
        """The topmost folder."""
        return Found(b"/", self.reader.root())

    def find(self, path: bytes, *, follow: bool = True) -> Found:
        """What has the path; NotFound with near names. ``follow``: what a link at its end leads to."""
        parts = self._parts(path)
        found = self._walk_to(parts, follow=follow, links=0)
        if found is not None:
            return found
        streamed = self._find_stream(parts)
        if streamed is not None:
            return streamed
        raise self._not_found(parts)

    def expand(self, path: bytes, *, follow: bool = True) -> list[Found]:
        """All that a path with ``*``, ``?``, ``[…]`` and ``**`` means; one without, or that exists as it is, means itself."""
        if not _GLOB & set(path):
            return [self.find(path, follow=follow)]
        exact = self._walk_to(self._parts(path), follow=follow, links=0)
        if exact is not None:
            return [exact]
        matches = {one.path: one for one in self._match([self.root()], self._parts(path), follow=follow)}
        if not matches:
            raise errors.NotFound(f"nothing in {self.volume.title} matches {shown(path)}")
        return [matches[key] for key in sorted(matches)]

    def has(self, path: bytes) -> bool:
        """Whether the path, or a pattern, means anything here."""
        try:
            return bool(self.expand(path, follow=False))
        except (errors.NotFound, errors.UsageError):
            return False

    def _parts(self, path: bytes) -> list[bytes]:
        if self.reader.ignores_case and b"/" not in path:  # as Windows writes them
            path = path[2:] if path[1:2] == b":" else path
            path = path.replace(b"\\", b"/") if not _GLOB & set(path) or path.startswith(b"\\") else path
        return [one for one in path.split(b"/") if one not in {b"", b"."}]

    def _walk_to(self, parts: list[bytes], *, follow: bool, links: int) -> Found | None:
        trail = [self.root()]
        for index, part in enumerate(parts):
            if part == b"..":
                trail = trail[:-1] or trail
                continue
            here = trail[-1]
            if not here.node.is_folder:
                return None
            child = self.child(here, part)
            if child is None:
                return None
            if child.node.type is Type.LINK and (follow or index < len(parts) - 1):
                child = self._follow(child, trail, links)
                if child is None:
                    return None
            trail.append(child)
        return trail[-1]

    def _follow(self, link: Found, trail: list[Found], links: int) -> Found | None:
        if links >= _LINKS_MAX:
            raise errors.UsageError(f"{shown(link.path)} is a link that leads round in a circle")
        target = link.node.target or b""
        base = [] if target.startswith(b"/") else [part for part in trail[-1].path.split(b"/") if part]
        return self._walk_to(
            [*base, *(one for one in target.split(b"/") if one not in {b"", b"."})], follow=True, links=links + 1
        )

    def _find_stream(self, parts: list[bytes]) -> Found | None:
        """``FILE:STREAM``, where no file has that name."""
        if not parts or b":" not in parts[-1]:
            return None
        name, _, stream = parts[-1].partition(b":")
        found = self._walk_to([*parts[:-1], name], follow=True, links=0)
        wanted = stream.decode("utf-8", "surrogateescape").removesuffix(":$DATA")
        if found is None or not wanted:
            return found
        for one, _ in found.node.streams:
            if one.casefold() == wanted.casefold():
                return Found(found.path, found.node, one)
        raise names.not_found("stream", wanted, [one for one, _ in found.node.streams], where=f"in {shown(found.path)}")

    def _not_found(self, parts: list[bytes]) -> errors.HvmgrError:
        here = self.root()
        for index, part in enumerate(parts):
            step = self._walk_to(parts[: index + 1], follow=True, links=0)
            if step is None:
                where = f"in {shown(here.path)} of {self.volume.title} ({self.volume.disk.name})"
                if not here.node.is_folder:
                    return errors.NotFound(f"there is no '{shown(part)}' {where}: that is no folder")
                known = [shown(name) for name, _ in self._entries(here.node).items()]
                leaf = self.child(here, part)
                if leaf is not None and leaf.node.type is Type.LINK:
                    target = shown(leaf.node.target or b"")
                    return errors.NotFound(f"{shown(leaf.path)} is a link to {target}, which is not there")
                return names.not_found("file", shown(part), known, where=where)
            here = step
        return errors.NotFound(f"there is no {shown(b'/' + b'/'.join(parts))}")

    # -- folders -------------------------------------------------------------------------------------------------

    def child(self, folder: Found, name: bytes) -> Found | None:
        """What has a name in a folder; where the file system ignores case, case is ignored."""
        entries = self._entries(folder.node)
        if name not in entries and self.reader.ignores_case:
            folded = self._folded.setdefault(folder.node.id, {})
            if not folded:
                folded.update({_fold(one): one for one in entries})
            name = folded.get(_fold(name), name)
        if name not in entries:
            return None
        return Found(_join(folder.path, name), self.reader.stat(entries[name]))

    def children(self, folder: Found) -> Iterator[Found]:
        """All that is in a folder, by name."""
        entries = self._entries(folder.node)
        for name in sorted(entries):
            yield Found(_join(folder.path, name), self.reader.stat(entries[name]))

    def _entries(self, folder: Node) -> dict[bytes, Any]:
        found = self._known.get(folder.id)
        if found is None:
            found = {}
            for name, ref in self.reader.names(folder):
                if b"/" in name or b"\0" in name or name in found:
                    self.unnameable += 1
                else:
                    found[name] = ref
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
                self._folded.clear()
            self._known[folder.id] = found
        return found

    def walk(self, top: Found, *, depth: int | None = None) -> Iterator[tuple[int, Found]]:
        """``top`` and all below it, each folder before what is in it, with how deep it lies."""
        trail: list[tuple[Iterator[Found], int]] = []
        seen: set[int] = set()
        yield 0, top
        if top.node.is_folder and depth != 0:
            trail.append((self.children(top), top.node.id))
            seen.add(top.node.id)
        while trail:
            one = next(trail[-1][0], None)
            if one is None:
                trail.pop()
                continue
            yield len(trail), one
            if one.node.is_folder and (depth is None or len(trail) < depth):
                if one.node.id in seen or len(trail) > _DEPTH_MAX:
                    raise reader.damaged(f"the folder {shown(one.path)} is in two places, or in itself")
                seen.add(one.node.id)
                trail.append((self.children(one), one.node.id))

    def _match(self, places: list[Found], parts: list[bytes], *, follow: bool) -> Iterator[Found]:
        if not parts:
            yield from places
            return
        part, rest = parts[0], parts[1:]
        for place in places:
            here = place
            if here.node.type is Type.LINK:
                step = self._walk_to([one for one in here.path.split(b"/") if one], follow=True, links=0)
                here = Found(here.path, step.node) if step is not None else here
            if not here.node.is_folder:
                continue
            if part == b"**":
                below = [one for _, one in self.walk(here) if one.node.is_folder]
                yield from self._match(below, rest, follow=follow) if rest else iter(below)
            elif _GLOB & set(part):
                yield from self._match(list(self._matching(here, part)), rest, follow=follow)
            elif (one := self.child(here, part)) is not None:
                yield from self._match([one], rest, follow=follow)

    def _matching(self, folder: Found, pattern: bytes) -> Iterator[Found]:
        for name in sorted(self._entries(folder.node)):
            if name.startswith(b".") and not pattern.startswith((b".", b"[")):
                continue  # as in a shell, such a dot has to be meant
            if fits(name, pattern, ignoring_case=self.reader.ignores_case):
                child = self.child(folder, name)
                if child is not None:
                    yield child

    # -- contents ------------------------------------------------------------------------------------------------

    def content(self, found: Found) -> Content:
        """The bytes of a file or stream; UsageError for what has none."""
        if found.node.type is not Type.FILE and not found.stream:
            what = "a folder" if found.node.is_folder else f"no plain file ({found.node.type.value})"
            hint = "its files: hvmgr file list, or all of it: hvmgr file get" if found.node.is_folder else None
            raise errors.UsageError(f"{shown(found.path)} is {what}", hint=hint)
        try:
            return self.reader.content(found.node, found.stream)
        except errors.HvmgrError as error:
            raise type(error)(f"{shown(found.path)}: {error.message}", hint=error.hint, **error.facts) from error


def fits(name: bytes, pattern: bytes, *, ignoring_case: bool = False) -> bool:
    """Whether a name fits a pattern with ``*``, ``?`` and ``[…]``."""
    if ignoring_case:
        return fnmatch.fnmatchcase(_fold(name), _fold(pattern))
    return fnmatch.fnmatchcase(os.fsdecode(name), os.fsdecode(pattern))


def shown(path: bytes) -> str:
    """A path as text that can be turned back."""
    return os.fsdecode(path)


def _fold(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape").casefold()


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + name if folder.endswith(b"/") else folder + b"/" + name
