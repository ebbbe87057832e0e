"""One file system to look around in: paths, patterns, links, whole trees. Names are bytes, as they are on the disk.

Links are followed inside the file system alone: an absolute one starts at its root, and ``..`` is the folder above the one
that was reached, as a kernel has it. A folder that lies in itself, as only a damaged file system has it, is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hvmgr import errors
from hvmgr.model import names, patterns
from hvmgr.operations.inside.views import Volume
from hvmgr.storage.extraction import UNNAMEABLE
from hvmgr.storage.filesystems import reader
from hvmgr.storage.filesystems.reader import Content, HasShortNames, Node, Reader, Type

DAMAGED = "what is damaged in the file system"
_LINKS_MAX = 40
_DEPTH_MAX = 4096
_PATH_MAX = 64 << 10
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Found:
    """A file by its path, which begins with ``/``; ``stream`` where a named stream of it is meant."""

    path: bytes
    node: Node
    stream: str = ""

    @property
    def name(self) -> bytes:
        """The last part of the path, with the stream's name."""
        return self.path.rpartition(b"/")[2] + self._suffix

    @property
    def whole_path(self) -> bytes:
        """The path, with the stream's name."""
        return self.path + self._suffix

    @property
    def _suffix(self) -> bytes:
        return b":" + self.stream.encode("utf-8", "surrogatepass") if self.stream else b""

    @property
    def size(self) -> int:
        """Bytes of the content that is meant."""
        return dict(self.node.streams)[self.stream] if self.stream else self.node.size


class Browser:
    """A volume's file system."""

    def __init__(self, volume: Volume, opened: Reader) -> None:
        self.volume = volume
        self.reader = opened
        self._unnameable: dict[int, int] = {}  # names that no path can have, by their folder
        self._damaged: set[bytes] = set()
        self._known: dict[int, dict[bytes, Any]] = {}
        self._folded: dict[int, dict[str, bytes]] = {}
        self._short: dict[int, dict[str, bytes]] = {}

    @property
    def left_out(self) -> dict[str, int]:
        """What was come by and is not shown, by the reason."""
        found = {UNNAMEABLE: sum(self._unnameable.values()), DAMAGED: len(self._damaged)}
        return {why: count for why, count in found.items() if count}

    @property
    def damaged(self) -> list[bytes]:
        """The paths of what was come by and cannot be read."""
        return sorted(one for one in self._damaged if one.startswith(b"/"))

    # -- paths ---------------------------------------------------------------------------------------------------

    def root(self) -> Found:
        """The topmost folder; Corrupt where it is none."""
        node = self.reader.root()
        if not node.is_folder:
            raise reader.damaged("its root is no folder")
        return Found(b"/", node)

    def find(self, path: bytes, *, follow: bool = True) -> Found:
        """What has the path; NotFound with near names. ``follow``: what a link at its end leads to."""
        parts = self._parts(path)
        found = self._walk_to(parts, follow=follow)
        if found is not None:
            return found
        streamed = self._find_stream(parts)
        if streamed is not None:
            return streamed
        raise self._not_found(parts)

    def expand(self, path: bytes, *, follow: bool = True) -> list[Found]:
        """All that a path with ``*``, ``?``, ``[…]`` and ``**`` means; one without, or that exists as it is, means itself."""
        if not patterns.is_pattern(path):
            return [self.find(path, follow=follow)]
        exact = self._walk_to(self._parts(path), follow=follow)
        if exact is not None:
            return [exact]
        matches = {one.path: one for one in self._match([self.root()], self._parts(path), follow=follow)}
        if not matches and self._damaged:
            raise reader.damaged(f"nothing that can be read matches {shown(path)}")
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
        return patterns.parts_of(path, ignoring_case=self.reader.ignores_case)

    def _walk_to(self, parts: Sequence[bytes], *, follow: bool) -> Found | None:
        """What has the path, by a path without links and ``..``."""
        trail = self._trail([self.root()], parts, follow=follow, budget=iter(range(_LINKS_MAX)))
        return None if trail is None else trail[-1]

    def _trail(
        self, start: Sequence[Found], parts: Sequence[bytes], *, follow: bool, budget: Iterator[int]
    ) -> list[Found] | None:
        """All folders from the root down to what has the path from ``start`` on, each in the one before it.

        ``budget``: as many links may yet be followed for it, wherever on the way they lie.
        """
        trail = list(start)
        for index, part in enumerate(parts):
            if not trail[-1].node.is_folder:
                return None
            if part == b"..":
                trail = trail[:-1] or trail
                continue
            child = self.child(trail[-1], part)
            if child is None:
                return None
            if child.node.type is Type.LINK and (follow or index < len(parts) - 1):
                led = self._follow(child, trail, budget)
                if led is None:
                    return None
                trail = led
            else:
                trail.append(child)
        return trail

    def _follow(self, link: Found, trail: list[Found], budget: Iterator[int]) -> list[Found] | None:
        if next(budget, None) is None:
            raise errors.UsageError(
                f"{shown(link.path)} is a link that leads round in a circle, or over more than {_LINKS_MAX} links"
            )
        target = link.node.target or b""
        start = trail[:1] if target.startswith(b"/") else trail
        return self._trail(start, _names(target), follow=True, budget=budget)

    def _find_stream(self, parts: list[bytes]) -> Found | None:
        """``FILE:STREAM``, where no file has that name."""
        if not parts or b":" not in parts[-1]:
            return None
        name, _, stream = parts[-1].partition(b":")
        found = self._walk_to([*parts[:-1], name], follow=True)
        wanted = stream.decode("utf-8", "surrogateescape").removesuffix(":$DATA")
        if found is None or not wanted:
            return found
        for one, _ in found.node.streams:
            if patterns.folded(one) == patterns.folded(wanted):
                return Found(found.path, found.node, one)
        raise names.not_found("stream", wanted, [one for one, _ in found.node.streams], where=f"in {shown(found.path)}")

    def _not_found(self, parts: list[bytes]) -> errors.HvmgrError:
        here = self.root()
        for index, part in enumerate(parts):
            step = self._walk_to(parts[: index + 1], follow=True)
            if step is None:
                title, disk = self.volume.title, self.volume.disk.name
                where = f"in {shown(here.path)} of {title}" + ("" if title == disk else f" ({disk})")
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
                folded.update({patterns.folded_name(one): one for one in entries})
            name = folded.get(patterns.folded_name(name), name)
        if name not in entries:
            return None
        return Found(_join(folder.path, name), self.reader.stat(entries[name]))

    def by_short_name(self, folder: Found, name: bytes) -> bytes | None:
        """The name of another file in the folder, whose short name (8.3) is this one."""
        if not isinstance(self.reader, HasShortNames):
            return None
        known = self._short.get(folder.node.id)
        if known is None:
            pairs = self.reader.short_names(folder.node)
            known = {
                patterns.folded_name(short): long
                for short, long in pairs
                if patterns.folded_name(short) != patterns.folded_name(long)
            }
            self._short[folder.node.id] = known
        return known.get(patterns.folded_name(name))

    def children(self, folder: Found) -> Iterator[Found]:
        """All that is in a folder, by name; what is damaged is left out and counted."""
        entries = self._entries(folder.node)
        for name in sorted(entries):
            found = self.sound(folder, name, entries[name])
            if found is not None:
                yield found

    def entries(self, folder: Found) -> dict[bytes, Any]:
        """The names in a folder, each with what its reader finds it by; read anew."""
        self.forget()
        return dict(self._entries(folder.node))

    def forget(self) -> None:
        """What is asked next is read anew."""
        self._known.clear()
        self._folded.clear()

    def is_damaged(self, path: bytes) -> bool:
        """Whether something of this path was come by, and could not be read."""
        return _key(path) in self._damaged

    def sound(self, folder: Found, name: bytes, ref: Any) -> Found | None:
        """What has a name in a folder; None where that is damaged, which is counted."""
        path = _join(folder.path, name)
        try:
            if len(path) <= _PATH_MAX:
                return Found(path, self.reader.stat(ref))
        except errors.Corrupt:
            pass  # the other names may be sound
        self.leave_out(path)
        return None

    def leave_out(self, path: bytes) -> None:
        """What has the path is counted as damaged."""
        self._damaged.add(_key(path))

    def _entries(self, folder: Node) -> dict[bytes, Any]:
        found = self._known.get(folder.id)
        if found is None:
            found, unnameable = {}, 0
            for name, ref in self.reader.names(folder):
                if b"/" in name or b"\0" in name or name in found:
                    unnameable += 1
                else:
                    found[name] = ref
            if unnameable:
                self._unnameable[folder.id] = unnameable
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
                self._folded.clear()
                self._short.clear()
            self._known[folder.id] = found
        return found

    def walk(self, top: Found, *, depth: int | None = None) -> Iterator[tuple[int, Found]]:
        """``top`` and all below it, each folder before what is in it, with how deep it lies.

        A folder that was here already, as it lies in itself or in two places, is left out and counted.
        """
        trail: list[tuple[Iterator[Found], Found]] = []
        seen = {top.node.id}
        yield 0, top
        if top.node.is_folder and depth != 0:
            trail.append((self.children(top), top))
        while trail:
            try:
                one = next(trail[-1][0], None)
            except errors.Corrupt:
                if len(trail) == 1:
                    raise
                self.leave_out(trail[-1][1].path)  # this folder cannot be read, and the others may be
                one = None
            if one is None:
                trail.pop()
                continue
            if one.node.is_folder and (one.node.id in seen or len(trail) > _DEPTH_MAX):
                self.leave_out(one.path)
                continue
            yield len(trail), one
            if one.node.is_folder:
                seen.add(one.node.id)
                if depth is None or len(trail) < depth:
                    trail.append((self.children(one), one))

    def _match(self, places: list[Found], parts: list[bytes], *, follow: bool) -> Iterator[Found]:
        if not parts:
            yield from places
            return
        part, rest = parts[0], parts[1:]
        if part == b"..":
            above = [self._walk_to([*_names(one.path), part], follow=True) for one in places]
            yield from self._match(
                list({one.path: one for one in above if one is not None}.values()), rest, follow=follow
            )
            return
        for place in places:
            here = place
            if here.node.type is Type.LINK:
                step = self._walk_to(_names(here.path), follow=True)
                here = Found(here.path, step.node) if step is not None else here
            if not here.node.is_folder:
                continue
            try:
                below = list(self._step(here, part))
            except errors.Corrupt:
                if len(places) == 1:
                    raise
                self.leave_out(here.path)  # the others may be sound
                continue
            yield from self._match(below, rest, follow=follow)

    def _step(self, folder: Found, part: bytes) -> Iterator[Found]:
        """What one part of a pattern means in a folder."""
        if part == b"**":
            yield from (one for _, one in self.walk(folder) if one.node.is_folder)
        elif patterns.is_pattern(part):
            yield from self._matching(folder, part)
        elif (one := self.child(folder, part)) is not None:
            yield one

    def _matching(self, folder: Found, pattern: bytes) -> Iterator[Found]:
        entries = self._entries(folder.node)
        for name in sorted(entries):
            if name.startswith(b".") and not pattern.startswith((b".", b"[")):
                continue  # as in a shell, such a dot has to be meant
            if patterns.fits(name, pattern, ignoring_case=self.reader.ignores_case):
                child = self.sound(folder, name, entries[name])
                if child is not None:
                    yield child

    # -- contents ------------------------------------------------------------------------------------------------

    def content(self, found: Found) -> Content:
        """The bytes of a file or stream; UsageError for what has none."""
        self.require_plain(found)
        try:
            return self.reader.content(found.node, found.stream)
        except errors.HvmgrError as error:
            raise type(error)(f"{shown(found.path)}: {error.message}", hint=error.hint, **error.facts) from error

    def require_plain(self, found: Found) -> None:
        """UsageError for what is neither a file nor a stream."""
        if found.node.type is not Type.FILE and not found.stream:
            what = "a folder" if found.node.is_folder else f"no plain file ({found.node.type.value})"
            hint = "its files: hvmgr file list, or all of it: hvmgr file get" if found.node.is_folder else None
            raise errors.UsageError(f"{shown(found.path)} is {what}", hint=hint)


def left_out(browsers: Sequence[Browser]) -> dict[str, int]:
    """What is not shown of several file systems, by the reason."""
    found: dict[str, int] = {}
    for browser in dict.fromkeys(browsers):
        for why, count in browser.left_out.items():
            found[why] = found.get(why, 0) + count
    return found


def shown(path: bytes) -> str:
    """A path as text that can be turned back."""
    return os.fsdecode(path)


def _names(path: bytes) -> list[bytes]:
    return [one for one in path.split(b"/") if one not in {b"", b"."}]


def _key(path: bytes) -> bytes:
    return path if len(path) <= _PATH_MAX else hashlib.sha256(path).digest()


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + name if folder.endswith(b"/") else folder + b"/" + name
