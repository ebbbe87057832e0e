"""The file of the index of files: opened, made and replaced, never through a link; damage is told from what another process does."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.storage import durable

FORMAT = 3  # 2: without times after the year 2262
_POLL_S = 0.05
_FILES = ("", "-wal", "-shm")  # what SQLite keeps beside each other

_TABLES = """
CREATE TABLE about (vm TEXT);
CREATE TABLE points (id INTEGER PRIMARY KEY, snapshot TEXT UNIQUE, left_out INTEGER, locked TEXT);
CREATE TABLE volumes (point INTEGER, root INTEGER, base INTEGER, disk TEXT, partition INTEGER, logical TEXT,
                      ignores_case INTEGER, parts BLOB, facts BLOB, PRIMARY KEY (point, root)) WITHOUT ROWID;
CREATE TABLE paths (id INTEGER PRIMARY KEY, root INTEGER, folder INTEGER, name BLOB, UNIQUE (folder, name));
CREATE VIRTUAL TABLE words USING fts5 (name, content = '', tokenize = 'trigram');
CREATE TABLE entries (path INTEGER, point INTEGER, type TEXT, size INTEGER, mode INTEGER, uid INTEGER, gid INTEGER,
                      links INTEGER, modified INTEGER, ref BLOB, PRIMARY KEY (path, point)) WITHOUT ROWID;
CREATE INDEX entries_of_point ON entries (point);
CREATE TABLE units (path INTEGER, point INTEGER, PRIMARY KEY (path, point)) WITHOUT ROWID;
CREATE TABLE asked (root INTEGER, block INTEGER, path INTEGER, point INTEGER,
                    PRIMARY KEY (root, block, path, point)) WITHOUT ROWID;
CREATE INDEX asked_of_unit ON asked (point, path);
"""


@contextlib.contextmanager
def translated(path: Path, *, keep: bool) -> Iterator[None]:
    """What SQLite says, as hvmgr's errors; what is damaged is removed, unless it is to be kept."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            said = str(error)
            if "locked" in said or "busy" in said:
                raise errors.Busy(
                    f"another command writes the index of files {path}",
                    hint="run it again later, or wait longer with --wait",
                ) from error
            if "full" in said:
                raise _no_space(path) from error
            keep = keep or not said.startswith("no such ")
        if keep:
            raise errors.HostFailed(
                f"the index of files {path} cannot be used: {error}", hint="remove the file"
            ) from error
        remove(path)
        raise errors.HostFailed(
            f"the index of files {path} cannot be used, and was removed: {error}",
            hint="run the command again: the index is made anew",
        ) from error


def _no_space(path: Path) -> errors.NoSpace:
    return errors.NoSpace(f"there is no space for the index of files {path}")


def remove(file: Path) -> None:
    """There is no index there."""
    for name in _FILES:
        with contextlib.suppress(errors.NotFound):
            durable.remove(file.with_name(file.name + name))


class IndexFile:
    """An open file with the tables of the index."""

    def __init__(self, file: Path, wait_s: float, *, reading: bool = False) -> None:
        self.file = file
        self._wait_s = wait_s
        self._reading = reading
        self._database = self._connected()

    def close(self) -> None:
        """The file is closed."""
        self._database.close()

    def _connected(self) -> sqlite3.Connection:
        """The file is opened, or made; Conflict where what has its name is no file."""
        flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
        with durable.explained(self.file):
            if not self._reading:
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self.file, flags, 0o600))
            mode = self.file.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise errors.Conflict(
                f"{self.file}, where the index of files is to be, is no regular file",
                hint="remove it",
                path=str(self.file),
            )
        if mode & 0o077 and not self._reading:
            with durable.explained(self.file):
                self.file.chmod(0o600)  # there are names of encrypted files in it
        name = self.file.absolute().as_uri() + ("?mode=ro" if self._reading else "?mode=rw")
        return sqlite3.connect(name, uri=True, timeout=self._wait_s, isolation_level=None)

    def require_fit(self, vm_id: str) -> None:
        """NotFound where it is not one of this VM and of this format."""
        if not (self._is_ours() and self._fits(vm_id)):
            raise errors.NotFound(
                f"{self.file} is not an index of the VM's files that fits", hint="make it: hvmgr file index VM"
            )

    def make_fit(self, vm_id: str, *, anew: bool) -> None:
        """It is one of this VM and of this format; what is damaged, or somebody else's database, is replaced."""
        try:
            if self._make_fit(vm_id, anew=anew):
                return
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            pass
        self._database.close()
        remove(self.file)
        self._database = self._connected()
        self._make_fit(vm_id, anew=False)

    def _make_fit(self, vm_id: str, *, anew: bool) -> bool:
        """False for a database that this is no index."""
        if not self._is_ours():
            return False
        self._change_to_wal()
        self._database.execute("PRAGMA synchronous = NORMAL")
        if not anew and self._fits(vm_id):
            return True
        with self.writing():
            if not anew and self._fits(vm_id):  # another process was faster
                return True
            for kind, name in self._rows(
                "SELECT type, name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'words\\_%' ESCAPE '\\'"
            ):
                self._database.execute(f'DROP {kind} "{name}"')
            for statement in filter(str.strip, _TABLES.split(";")):
                self._database.execute(statement)
            self._database.execute("INSERT INTO about VALUES (?)", (vm_id,))
            self._database.execute(f"PRAGMA user_version = {FORMAT}")
        return True

    def _change_to_wal(self) -> None:
        """SQLite does not wait by itself for who writes to a new file, which has no write-ahead log yet."""
        end = time.monotonic() + self._wait_s
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(_POLL_S)

    def _is_ours(self) -> bool:
        """Whether it is an index, or an empty file."""
        tables = {row[0] for row in self._rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return not tables or tables >= {"about", "points", "volumes", "paths", "words", "entries"}

    def _fits(self, vm_id: str) -> bool:
        (version,) = self._one("PRAGMA user_version") or (0,)
        return version == FORMAT and self._one("SELECT vm FROM about") == (vm_id,)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Within ``writing``: of a block that fails nothing is kept."""
        self._database.execute("SAVEPOINT attempt")
        try:
            yield
        except BaseException:
            if self._database.in_transaction:  # where no space is left all of it is gone by itself
                self._database.execute("ROLLBACK TO attempt")
                self._database.execute("RELEASE attempt")
            raise
        self._database.execute("RELEASE attempt")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """All that is written inside the block is there afterwards, or nothing of it. Busy when another writes."""
        with translated(self.file, keep=True):
            self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.commit()
        except BaseException as error:
            self._database.rollback()
            if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
                raise _no_space(self.file) from error
            raise

    def _rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple]:  # type: ignore[type-arg]  # as SQL says
        return self._database.execute(statement, values).fetchall()

    def _one(self, statement: str, values: Sequence[object] = ()) -> tuple | None:  # type: ignore[type-arg]
        found: tuple | None = self._database.execute(statement, values).fetchone()  # type: ignore[type-arg]
        return found
