"""An index of the files in all snapshots of a VM: SQLite, with a full-text index over their names. Never the truth.

The files of a file system at a snapshot are told by what differs from it at another one, its ``base``: a path is what the nearest
row says, of the snapshot itself, then of its base, and so on. So a snapshot costs what differs in it, whatever the tree looks
like; and a file system that comes to a snapshot later, for its key was not there before, changes nothing of the others.

| table | holds |
|---|---|
| `points` | the snapshots, each with what is encrypted there and was opened by no key (``locked``) |
| `volumes` | the file systems of each, with their bases and what the reader knew of them |
| `paths` | each name once, below its folder; the topmost ones are the file systems (``root``) |
| `words` | the full-text index over the names |
| `entries` | what a path is from a snapshot on; without a type it is gone |
| `units`, `asked` | at which snapshot a folder was read, and which blocks of the volume that followed from |

It may be removed at any time, and is made anew where it does not fit. Each snapshot is taken in by one transaction. No key is in
it; the names of encrypted files are, in clear, once a key was given: the file is nobody's but its owner's.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hvmgr.model import patterns
from hvmgr.model.ranges import Range
from hvmgr.storage import index_file
from hvmgr.storage.filesystems.reader import Geometry
from hvmgr.storage.index_file import IndexFile

BLOCK = 4096  # bytes of a volume
_MOST = (1 << 63) - 1  # what SQLite can hold
_TIME = 16  # bytes of a time that SQLite cannot hold: seconds may have 64 bits
_AT_ONCE = 500
_LEAST = 3  # characters that the full-text index can look for
_UNPACKED_MOST = 256 << 20


class Entry(NamedTuple):
    """What is known of a file; ``ref`` is what its reader finds it by, of folders alone."""

    type: str
    size: int
    mode: int | None
    uid: int | None
    gid: int | None
    links: int
    modified: int | None
    ref: bytes | None


@dataclass(frozen=True, slots=True)
class Place:
    """A file system at one snapshot: where it lay, what its reader knew of it (``known``), what a journal had newer bytes of.

    ``base`` is the point that it is told by the differences from; ``seal`` is the same as long as it is encrypted alike.
    """

    root: int
    disk: str | None
    partition: int | None
    logical: str
    ignores_case: bool
    parts: list[tuple[str, int | None, int]]  # which disk, where on it (None: zeros), how many bytes
    geometry: Geometry | None
    replaced: list[Range]
    base: int | None = None
    seal: str = ""


class Locked(NamedTuple):
    """What is encrypted, and was opened by none of the keys that were given, if any were.

    ``header`` is the same as long as the same keys open it.
    """

    title: str
    disk: str | None
    partition: int | None
    header: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """A snapshot in the index."""

    id: int
    snapshot: str
    left_out: int = 0
    locked: tuple[Locked, ...] = ()


@contextlib.contextmanager
def opened(path: Path, vm_id: str, *, wait_s: float, anew: bool = False, reading: bool = False) -> Iterator[FileIndex]:
    """The index of a VM in this file, made or emptied where it does not fit, or with ``anew``. Busy when another writes.

    What turns out to be damaged is removed, and said. With ``reading`` nothing is made or written: NotFound where it does not fit.
    A link is never followed.
    """
    index: FileIndex | None = None
    try:
        with index_file.translated(path, keep=reading):
            index = FileIndex(path, wait_s, reading=reading)
            if reading:
                index.require_fit(vm_id)
            else:
                index.make_fit(vm_id, anew=anew)
            yield index
    finally:
        if index is not None:
            index.close()


class FileIndex(IndexFile):
    """An open index."""

    # -- snapshots -----------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """All snapshots, in the order in which they were taken in."""
        return [_point(*row) for row in self._rows("SELECT id, snapshot, left_out, locked FROM points ORDER BY id")]

    def add_point(self, snapshot: str) -> Point:
        """A snapshot that has, so far, no file system."""
        cursor = self._database.execute(
            "INSERT INTO points (snapshot, left_out, locked) VALUES (?, 0, '[]')", (snapshot,)
        )
        assert cursor.lastrowid is not None
        return Point(cursor.lastrowid, snapshot)

    def note(self, point: Point, left_out: int, locked: Sequence[Locked]) -> None:
        """So much of it could not be read, and this is encrypted."""
        self._database.execute(
            "UPDATE points SET left_out = ?, locked = ? WHERE id = ?", (left_out, json.dumps(locked), point.id)
        )

    def remove_point(self, point: Point) -> None:
        """The snapshot is gone, with all rows that nobody else stands on: the others show what they showed."""
        run = self._database.execute
        candidates = [row[0] for row in self._rows("SELECT path FROM entries WHERE point = ?", (point.id,))]
        for root, base in self._rows("SELECT root, base FROM volumes WHERE point = ?", (point.id,)):
            for (heir,) in self._rows("SELECT point FROM volumes WHERE root = ? AND base = ?", (root, point.id)):
                self._hand_down(point.id, heir, root)
            run("UPDATE volumes SET base = ? WHERE root = ? AND base = ?", (base, root, point.id))
        for table in ("entries", "asked", "units", "volumes"):
            run(f"DELETE FROM {table} WHERE point = ?", (point.id,))  # noqa: S608 - names of ours
        run("DELETE FROM points WHERE id = ?", (point.id,))
        self._forget_paths(candidates)

    def _hand_down(self, point: int, heir: int, root: int) -> None:
        """The heir has the rows of a file system that it stood on."""
        run = self._database.execute
        run(
            "INSERT OR IGNORE INTO entries SELECT path, ?, type, size, mode, uid, gid, links, modified, ref FROM entries "
            "WHERE point = ? AND (SELECT root FROM paths WHERE id = path) = ?",
            (heir, point, root),
        )
        run(
            "INSERT OR IGNORE INTO asked SELECT root, block, path, ? FROM asked "
            "WHERE point = ? AND root = ? AND path NOT IN (SELECT path FROM units WHERE point = ?)",
            (heir, point, root, heir),
        )
        run(
            "INSERT OR IGNORE INTO units SELECT path, ? FROM units "
            "WHERE point = ? AND (SELECT root FROM paths WHERE id = path) = ?",
            (heir, point, root),
        )

    def _forget_paths(self, candidates: Sequence[int]) -> None:
        """Names that are nowhere any more, with the folders that nothing is left in."""
        pending = list(candidates)
        while pending:
            path = pending.pop()
            if self._one("SELECT 1 FROM entries WHERE path = ? AND type IS NOT NULL", (path,)) is not None:
                continue
            row = self._one("SELECT name, folder FROM paths WHERE id = ?", (path,))
            self._database.execute("DELETE FROM entries WHERE path = ?", (path,))
            if row is None or self._one("SELECT 1 FROM paths WHERE folder = ?", (path,)) is not None:
                continue
            self._database.execute("DELETE FROM paths WHERE id = ?", (path,))
            name, folder = row
            if folder:
                self._database.execute(
                    "INSERT INTO words (words, rowid, name) VALUES ('delete', ?, ?)", (path, as_text(name))
                )
                pending.append(folder)

    # -- file systems --------------------------------------------------------------------------------------------

    def places(self, point: Point) -> list[Place]:
        """The file systems of a snapshot."""
        return [
            _place(*row)
            for row in self._rows(
                "SELECT root, base, disk, partition, logical, ignores_case, parts, facts FROM volumes WHERE point = ?",
                (point.id,),
            )
        ]

    def put_place(self, point: Point, place: Place) -> None:
        """The snapshot has this file system."""
        geometry = place.geometry
        facts = [None if geometry is None else [geometry.facts[0], geometry.table], place.replaced, place.seal]
        where = (place.disk, place.partition, place.logical, place.ignores_case, _packed(place.parts))
        self._database.execute(
            "INSERT OR REPLACE INTO volumes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (point.id, place.root, place.base, *where, _packed(facts)),
        )

    def root(self, name: str) -> int:
        """The topmost path of a file system, by a name of its own."""
        return self.path(0, name.encode())

    # -- paths ---------------------------------------------------------------------------------------------------

    def path(self, folder: int, name: bytes) -> int:
        """The number of a path, made where it is new."""
        row = self._one("SELECT id FROM paths WHERE folder = ? AND name = ?", (folder, name))
        if row is not None:
            return int(row[0])
        run = self._database.execute
        if folder:
            cursor = run(
                "INSERT INTO paths (root, folder, name) SELECT root, id, ? FROM paths WHERE id = ?", (name, folder)
            )
            assert cursor.rowcount == 1, "its folder is no path"
            run("INSERT INTO words (rowid, name) VALUES (?, ?)", (cursor.lastrowid, as_text(name)))
        else:
            cursor = run("INSERT INTO paths (folder, name) VALUES (0, ?)", (name,))
            run("UPDATE paths SET root = id WHERE id = ?", (cursor.lastrowid,))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def above(self, path: int) -> tuple[int, bytes] | None:
        """A path's folder and its name there; None for what is no path."""
        row = self._one("SELECT folder, name FROM paths WHERE id = ?", (path,))
        return None if row is None else (int(row[0]), bytes(row[1]))

    def below(self, folder: int) -> list[tuple[int, bytes]]:
        """The names in a folder, at whatever snapshot."""
        return self._rows("SELECT id, name FROM paths WHERE folder = ?", (folder,))

    def all_below(self, paths: Sequence[int]) -> Iterator[int]:
        """These paths and all that ever was below them."""
        for path in paths:
            rows = self._rows(
                "WITH RECURSIVE found (id) AS (VALUES (?) UNION SELECT paths.id FROM paths JOIN found ON folder = found.id) "
                "SELECT id FROM found",
                (path,),
            )
            yield from (row[0] for row in rows)

    def all_paths(self) -> list[tuple[int, bytes]]:
        """Every name with its number."""
        return self._rows("SELECT id, name FROM paths WHERE folder != 0")

    def with_words(self, texts: Sequence[str]) -> list[tuple[int, bytes]] | None:
        """The names that hold all these folded texts; None where they are too short to be looked for."""
        wanted = " ".join('"' + one.replace('"', '""') + '"' for one in texts if len(one) >= _LEAST and "\0" not in one)
        if not wanted:
            return None
        return self._rows(
            "SELECT id, name FROM paths WHERE id IN (SELECT rowid FROM words WHERE words MATCH ?)", (wanted,)
        )

    # -- what they are -------------------------------------------------------------------------------------------

    def line(self, point: Point | None, root: int) -> dict[int, int]:
        """A snapshot and what a file system of it stands on, by their numbers: how far away each is."""
        bases = dict(self._rows("SELECT point, base FROM volumes WHERE root = ?", (root,)))
        found: dict[int, int] = {}
        at = None if point is None else point.id
        while at is not None and at not in found:
            found[at] = len(found)
            at = bases.get(at)
        return found

    def children(self, line: dict[int, int], folder: int) -> dict[bytes, tuple[int, Entry]]:
        """What is in a folder at the snapshot that the line is of, with the numbers of the paths."""
        rows = self._rows(
            "SELECT paths.id, name, point, type, size, mode, uid, gid, links, modified, ref FROM paths "
            "JOIN entries ON path = paths.id WHERE folder = ?",
            (folder,),
        )
        nearest: dict[bytes, tuple[int, int, Entry]] = {}
        for path, name, point, *facts in rows:
            far = line.get(point)
            if far is not None and (name not in nearest or far < nearest[name][0]):
                nearest[name] = (far, path, _entry(facts))
        return {name: (path, one) for name, (_, path, one) in nearest.items() if one.type is not None}

    def entry(self, line: dict[int, int], path: int) -> Entry | None:
        """What a path is at the snapshot that the line is of."""
        found = [(line[point], one) for point, one in self.entries([path]).get(path, {}).items() if point in line]
        return min(found, key=lambda one: one[0])[1] if found else None

    def entries(self, paths: Iterable[int]) -> dict[int, dict[int, Entry | None]]:
        """All rows of paths: by snapshot what they are from there on, None where they are gone."""
        found: dict[int, dict[int, Entry | None]] = {}
        wanted = list(paths)
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            for path, point, *facts in self._rows(f"SELECT * FROM entries WHERE path IN ({marks})", some):  # noqa: S608
                found.setdefault(path, {})[point] = None if facts[0] is None else _entry(facts)
        return found

    def put(self, path: int, point: Point, entry: Entry | None) -> None:
        """What a path is from this snapshot on; None: it is gone."""
        facts = (None,) * len(Entry._fields) if entry is None else _facts(held(entry))
        self._database.execute(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (path, point.id, *facts)
        )

    # -- what they follow from -----------------------------------------------------------------------------------

    def put_unit(self, root: int, path: int, point: Point, blocks: Iterable[Range]) -> None:
        """A folder was read at this snapshot, and what was found followed from these blocks of its file system."""
        self._database.execute("INSERT OR REPLACE INTO units VALUES (?, ?)", (path, point.id))
        self._database.executemany(
            "INSERT OR IGNORE INTO asked VALUES (?, ?, ?, ?)",
            ((root, block, path, point.id) for first, last in blocks for block in range(first, last)),
        )

    def touched(self, line: dict[int, int], root: int, blocks: Iterable[Range]) -> set[int]:
        """The folders of a file system that do not follow from other blocks than these alone, at the line's snapshot."""
        found: set[tuple[int, int]] = set()
        for first, last in blocks:
            found.update(
                self._rows(
                    "SELECT DISTINCT path, point FROM asked WHERE root = ? AND block >= ? AND block < ?",
                    (root, min(first, _MOST), min(last, _MOST)),
                )
            )
        return {path for path, point in found if point in line and self._unit(line, path) == point}

    def _unit(self, line: dict[int, int], path: int) -> int | None:
        """The snapshot at which a folder was read last."""
        points = [row[0] for row in self._rows("SELECT point FROM units WHERE path = ?", (path,)) if row[0] in line]
        return min(points, key=lambda one: line[one], default=None)


def as_text(name: bytes) -> str:
    """A name as the full-text index has it: folded, and a sign for each byte that is no text."""
    return "".join("\ufffd" if "\udc80" <= one <= "\udcff" else one for one in patterns.folded_name(name))


def held(entry: Entry) -> Entry:
    """An entry as it comes back."""
    return entry if entry.size <= _MOST else entry._replace(size=_MOST)


def _facts(entry: Entry) -> tuple[object, ...]:
    """What SQLite holds of an entry: a time that is none of its numbers, as all after the year 2262 are, as bytes."""
    modified = entry.modified
    if modified is None or -_MOST <= modified <= _MOST:
        return entry
    return (*entry[:-2], modified.to_bytes(_TIME, "big", signed=True), entry.ref)


def _entry(facts: Sequence[Any]) -> Entry:
    *others, modified, ref = facts
    if isinstance(modified, bytes):
        modified = int.from_bytes(modified, "big", signed=True)
    return Entry._make([*others, modified, ref])


def known(geometry: Geometry | None) -> Geometry | None:
    """What a reader knows, as it comes back."""
    return None if geometry is None else Geometry((repr(geometry.facts),), geometry.table)


def _packed(value: object) -> bytes:
    return zlib.compress(json.dumps(value).encode(), 1)


def _unpacked(data: bytes) -> Any:
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(data, _UNPACKED_MOST)
    if not unpacking.eof:
        raise ValueError(data[:16])
    return json.loads(text)


def _place(
    root: int, base: int | None, disk: str | None, partition: int | None, logical: str, ignores_case: int,
    parts: bytes, facts: bytes,
) -> Place:  # fmt: skip
    try:
        geometry, replaced, seal = _unpacked(facts)
        return Place(
            root,
            disk,
            partition,
            logical,
            bool(ignores_case),
            [(name, start, length) for name, start, length in _unpacked(parts)],
            None if geometry is None else Geometry((geometry[0],), tuple(geometry[1])),
            [(start, end) for start, end in replaced],
            base,
            seal,
        )
    except (zlib.error, ValueError, TypeError, LookupError, RecursionError) as error:
        raise sqlite3.DatabaseError("what it says of a file system makes no sense") from error


def _point(number: int, snapshot: str, left_out: int, locked: str) -> Point:
    try:
        return Point(number, snapshot, left_out, tuple(Locked(*one) for one in json.loads(locked)))
    except (ValueError, TypeError, RecursionError) as error:
        raise sqlite3.DatabaseError("what it says of a snapshot makes no sense") from error
