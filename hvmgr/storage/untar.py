"""Reads a tar archive of foreign origin as a stream, and refuses whatever an export does not hold.

POSIX pax with GNU's sparse format 1.0, as ``storage/tar`` writes it, and the long names of GNU tar, as somebody may have
packed an export again. Sources: POSIX pax; GNU tar's manual, "GNU tar and POSIX tar", "PAX Format, Version 1.0". A link,
a device, a name that leads out or stands twice, a number that contradicts another one, an end that is missing: Corrupt,
with the place in the archive. Python's tarfile would end silently at a header that it does not understand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hvmgr import errors
from hvmgr.model import manifest

BLOCK = 512
_PIECE = 256 << 10
_ZEROS = bytes(BLOCK)
_PAX_MAX = 1 << 20
_NAME_MAX, _PART_MAX = 4096, 255  # what Linux takes
_COUNT_MAX = 200_000
_TABLE_MAX = 64 << 20
_SIZE_MAX = 1 << 62
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
}  # fmt: skip

Take = Callable[[memoryview], int]  # fills the front of a buffer; 0 at the end


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder: ``size`` of the file, and where its data lies in it (offset, length); the rest are holes."""

    name: str
    is_folder: bool
    size: int = 0
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def data(self) -> int:
        """The bytes that are no holes."""
        return sum(length for _, length in self.runs)


@dataclass(slots=True)
class Reader:
    """One pass over an archive. ``where`` names it in errors."""

    take: Take
    where: str
    position: int = 0
    _left: deque[tuple[int, int]] = field(default_factory=deque)  # runs of the entry that nobody has read yet
    _padding: int = 0
    _buffer: bytearray = field(default_factory=lambda: bytearray(_PIECE))
    _seen: dict[str, bool] = field(default_factory=dict)  # name: whether it is a folder

    def entries(self) -> Iterator[Entry]:
        """All of them; the ``pieces`` of one have to be asked for before the next."""
        while (entry := self._next()) is not None:
            yield entry
            for _ in self.pieces():
                pass
            if any(self._exactly(self._padding)):
                raise self._corrupt("there are bytes between two files")
            self._padding = 0

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """The data of the entry: where each piece belongs, and its bytes, valid until the next is asked for."""
        view = memoryview(self._buffer)
        while self._left:
            offset, length = self._left.popleft()
            while length:
                count = self.take(view[: min(length, len(view))])
                if count == 0:
                    raise self._cut()
                self.position += count
                yield offset, view[:count]
                offset, length = offset + count, length - count

    def _next(self) -> Entry | None:
        more: dict[str, str] = {}
        long_name: str | None = None
        while True:
            block = self._exactly(BLOCK)
            if block == _ZEROS:
                if more or long_name is not None:
                    raise self._corrupt("a name stands for no file")
                self._end()
                return None
            kind, size = self._header(block)
            if kind == b"x":
                if more:
                    raise self._corrupt("two headers for one file")
                more = self._pax(size)
            elif kind == b"L":
                long_name = self._text(self._body(size).rstrip(b"\0"))
            else:
                return self._entry(kind, size, long_name or self._name(block), more)

    def _entry(self, kind: bytes, size: int, name: str, more: dict[str, str]) -> Entry:
        if kind in _KINDS:
            raise self._corrupt(f"{name} is {_KINDS[kind]}, and an export holds none")
        if kind not in (b"0", b"\0", b"5"):
            raise errors.Unsupported(
                f"{self.where}: {name} is stored in a way that is not read here (type {kind!r})",
                hint="pack it again with: tar --format=pax --zstd",
            )
        size = self._number(more["size"]) if "size" in more else size
        name = more.get("GNU.sparse.name", more.get("path", name))
        if kind == b"5":
            if size:
                raise self._corrupt(f"the folder {name} has a size")
            return Entry(self._require_new(name.rstrip("/"), is_folder=True), is_folder=True)
        name = self._require_new(name, is_folder=False)
        self._padding = -size % BLOCK
        if any(key.startswith("GNU.sparse.") for key in more):
            entry = self._sparse(name, size, more)
        else:
            entry = Entry(name, is_folder=False, size=size, runs=((0, size),) if size else ())
        self._left = deque(entry.runs)
        return entry

    # -- headers -----------------------------------------------------------------------------------------------------

    def _header(self, block: bytes) -> tuple[bytes, int]:
        """The type and the size, of a header whose checksum is right."""
        unsigned = sum(block) - sum(block[148:156]) + 8 * 0x20
        if block[257:262] != b"ustar" or self._octal(block[148:156]) != unsigned:
            raise self._corrupt("there is no header of a file where one should be")
        return block[156:157], self._octal(block[124:136])

    def _octal(self, raw: bytes) -> int:
        if raw[0] == 0x80:  # GNU: the number itself, big-endian
            number = int.from_bytes(raw[1:], "big")
        else:
            text = raw.strip(b" \0")
            if text.strip(b"01234567"):
                raise self._corrupt("a number in a header is none")
            number = int(text or b"0", 8)
        if number > _SIZE_MAX:
            raise self._corrupt("a number in a header is too large")
        return number

    def _name(self, block: bytes) -> str:
        name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
        is_posix = block[257:263] == b"ustar\0"
        return self._text(prefix + b"/" + name if is_posix and prefix else name)

    def _pax(self, size: int) -> dict[str, str]:
        """``length key=value`` lines; the last of two counts, as in every tar."""
        raw, found, start = self._body(size), dict[str, str](), 0
        while start < len(raw):
            digits, blank, _ = raw[start : start + 20].partition(b" ")
            length = int(digits) if blank and digits.isdigit() else 0
            record = raw[start : start + length]
            if length <= len(digits) + 1 or len(record) != length or not record.endswith(b"\n") or b"=" not in record:
                raise self._corrupt("a header with long values is damaged")
            key, _, value = record[len(digits) + 1 : -1].partition(b"=")
            found[self._text(key)] = self._text(value)
            start += length
        return found

    def _sparse(self, name: str, size: int, more: dict[str, str]) -> Entry:
        """GNU sparse 1.0: the table stands in front of the data, in whole blocks."""
        if (more.get("GNU.sparse.major"), more.get("GNU.sparse.minor")) != ("1", "0"):
            raise errors.Unsupported(
                f"{self.where}: {name} has holes in an old notation",
                hint="pack it again with: tar --format=pax --sparse-version=1.0 -S --zstd",
            )
        real, start = self._number(more.get("GNU.sparse.realsize", "")), self.position
        lines = self._lines(size)
        runs, end = [], 0
        for _ in range(self._number(next(lines))):
            offset, length = self._number(next(lines)), self._number(next(lines))
            if offset < end or offset + length > real:
                raise self._corrupt(f"the holes of {name} contradict each other")
            end = offset + length
            if length:
                runs.append((offset, length))
        entry = Entry(name, is_folder=False, size=real, runs=tuple(runs))
        if self.position - start + entry.data != size:
            raise self._corrupt(f"{name} has {size} bytes in the archive, and its holes leave another number")
        return entry

    def _lines(self, size: int) -> Iterator[str]:
        """The numbers in front of a file with holes, read block by block."""
        rest = b""
        for _ in range(min(size, _TABLE_MAX) // BLOCK):
            *whole, rest = (rest + self._exactly(BLOCK)).split(b"\n")
            yield from (line.decode("ascii", "replace") for line in whole)
        raise self._corrupt("the table of a file's holes does not end")

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _body(self, size: int) -> bytes:
        """The content of a header that is a file of its own."""
        if size > _PAX_MAX:
            raise self._corrupt("a header is too long")
        raw = self._exactly(size)
        self._exactly(-size % BLOCK)
        return raw

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            count = self.take(view[done:])
            if count == 0:
                raise self._cut()
            done += count
        self.position += size
        return bytes(data)

    def _end(self) -> None:
        """A second block of zeros, and nothing but zeros behind it."""
        if self._exactly(BLOCK) != _ZEROS:
            raise self._corrupt("half an end")
        view = memoryview(self._buffer)
        while count := self.take(view):
            if view[:count].tobytes().strip(b"\0"):
                raise self._corrupt("there are bytes behind the end")
            self.position += count

    # -- values ------------------------------------------------------------------------------------------------------

    def _require_new(self, name: str, *, is_folder: bool) -> str:
        """The name, when it leads to a place below the archive's top that nothing has yet."""
        name = name.removeprefix("./")
        if is_folder and name in ("", "."):
            return "."
        try:
            manifest.require_inside(name)
        except ValueError as error:
            raise self._corrupt(f"the name '{name}' leads out of it, or is none") from error
        parts = name.split("/")
        raw = [part.encode(errors="surrogateescape") for part in parts]
        if len(name) > _NAME_MAX or max(map(len, raw)) > _PART_MAX:
            raise self._corrupt(f"the name '{name[:100]}…' is too long")
        above = ["/".join(parts[:count]) for count in range(1, len(parts))]
        if name in self._seen and not (is_folder and self._seen[name]):
            raise self._corrupt(f"{name} is in it twice")
        if not all(self._seen.setdefault(one, True) for one in above):
            raise self._corrupt(f"{name} lies in a file")
        self._seen[name] = is_folder
        if len(self._seen) > _COUNT_MAX:
            raise self._corrupt(f"it holds more than {_COUNT_MAX} files")
        return name

    def _number(self, text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > _SIZE_MAX:
            raise self._corrupt(f"'{text[:40]}' is no number of bytes")
        return int(text)

    def _text(self, raw: bytes) -> str:
        return raw.decode("utf-8", "surrogateescape")

    def _cut(self) -> errors.Corrupt:
        return errors.Corrupt(
            f"{self.where} ends in the middle, at byte {self.position} of what it holds",
            hint="get a whole copy of the archive",
        )

    def _corrupt(self, what: str) -> errors.Corrupt:
        return errors.Corrupt(
            f"{self.where} is no sound archive: {what} (at byte {self.position} of what it holds)",
            hint="get a whole copy of the archive",
        )
