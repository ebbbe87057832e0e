"""WIM files through wimlib's program: what is in one, capturing into a new one, applying one to an NTFS volume.

A volume is an ordinary file that holds NTFS: wimlib reads and writes it by libntfs-3g, with security descriptors, named
streams, reparse points, short names and attributes, and needs neither root nor a mount.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvmgr import errors
from hvmgr.host import process
from hvmgr.model.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = "wimlib-imagex"
COMPRESSIONS = {"none": "none", "fast": "XPRESS", "maximum": "LZX", "solid": "LZMS"}

Report = Callable[[Progress], None]

_LIMIT_S = 600.0
# Exit codes of wimlib-imagex are wimlib's own (wimlib.h, enum wimlib_error_code).
_CODE_NO_IMAGE, _CODE_NO_WIM, _CODE_NTFS, _CODE_SPLIT, _CODE_NAME_TAKEN = 18, 43, 46, 33, 11
_CODES_DAMAGED = {2, 13, 17, 19, 20, 21, 22, 27, 28, 30, 36, 55, 56, 65, 73}
_CODES_FOREIGN = {33: "it is one part of a split WIM", 67: "its version is not known", 74: "it is encrypted"}
_UNITS = {b"bytes": 1, b"B": 1, b"KiB": 1 << 10, b"MiB": 1 << 20, b"GiB": 1 << 30, b"TiB": 1 << 40}
_PROGRESS = re.compile(rb"(?P<what>[A-Z][a-z ]+): (?P<done>\d+) (?P<unit>\w+) of (?P<all>\d+) (?P<of>\w+) \(\d+%\)")
_COMPRESSED = re.compile(r"WIM_HDR_FLAG_COMPRESS_(\w+) is set")
_FOREIGN_NAME = re.compile(r'"([^"\n]*)": filename is not valid UTF-8')
_WARNING = re.compile(r"^\[WARNING\] (.*(?:\n {8}.*)*)", re.MULTILINE)
_DIGITS_MAX = 20  # of a number of 64 bits
_EPOCH = datetime(1601, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class WimImage:
    """One image in a WIM. ``total`` is the size of all files, ``windows`` what the WIM says of a Windows in it."""

    index: int
    name: str
    description: str
    files: int
    folders: int
    total: int
    created: datetime | None
    changed: datetime | None
    windows: dict[str, str]


@dataclass(frozen=True, slots=True)
class WimInfo:
    """A WIM file; ``boot`` is the index of the image that boots, 0 for none."""

    path: Path
    size: int
    guid: str
    compression: str
    chunk_size: int
    part: tuple[int, int]
    boot: int
    has_integrity: bool
    images: tuple[WimImage, ...]


def require() -> None:
    """Unsupported, with the package, where wimlib is missing."""
    process.require(PROGRAM)


def info(path: Path) -> WimInfo:
    """What is in a WIM; NotFound, Corrupt when it is none or damaged."""
    _require_file(path)
    told = _run(path, ["info", path, "--header"])
    header = dict(_pairs(told))
    with tempfile.TemporaryDirectory(prefix="hvmgr-") as folder:
        file = Path(folder) / "info.xml"
        _run(path, ["info", path, f"--extract-xml={file}"])
        images = _images(path, file.read_bytes())
    return WimInfo(
        path=path,
        size=path.stat().st_size,
        guid=header.get("GUID", ""),
        compression=found[1] if (found := _COMPRESSED.search(told)) else "none",
        chunk_size=int(header.get("Chunk Size", 0)),
        part=(int(header.get("Part Number", 1)), int(header.get("Total Parts", 1))),
        boot=int(header.get("Boot Index", 0)),
        has_integrity=int(header.get("Integrity Size", 0)) > 0,
        images=images,
    )


def verify(path: Path, report: Report) -> None:
    """Every byte that the WIM holds is what its hashes say; Corrupt otherwise."""
    _require_file(path)
    _follow(path, ["verify", path], f"verify {path.name}", report)


def apply(path: Path, image: int, volume: Path, report: Report) -> list[str]:
    """The files of an image are on the NTFS volume in the file ``volume``; what wimlib warned of.

    The volume is half-written when this raises: it has to be one that can be thrown away.
    """
    return _follow(path, ["apply", path, str(image), volume], f"apply {path.name}", report)


def capture(
    source: Path, wim: Path, options: Sequence[str], *, name: str, description: str, report: Report
) -> list[str]:
    """A new WIM with one image of ``source``, a folder or a file that holds an NTFS volume; what wimlib warned of."""
    words: list[str | Path] = ["capture", source, wim, name, *([description] if description else []), *options]
    return _follow(wim, words, "capture", report, of=source)


def append(
    source: Path, wim: Path, options: Sequence[str], *, name: str, description: str, report: Report
) -> list[str]:
    """One more image in a WIM, which is half-written when this raises; what wimlib warned of."""
    words: list[str | Path] = ["append", source, wim, name, *([description] if description else []), *options]
    return _follow(wim, words, "capture", report, of=source)


def extract(path: Path, image: int, name: str, folder: Path) -> Path | None:
    """One file of an image, in whatever case its names are, written into a folder; None when the image has no such file."""
    argv: list[str | Path] = [
        "extract",
        path,
        str(image),
        name,
        f"--dest-dir={folder}",
        "--no-acls",
        "--no-attributes",
        "--nullglob",
    ]
    _run(path, argv, environment={"WIMLIB_IMAGEX_IGNORE_CASE": "1"})  # as Windows does
    return next((one for one in folder.iterdir() if one.is_file()), None)


# --- the program ------------------------------------------------------------------------------------------------------


def _run(path: Path, words: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    try:
        return process.run([PROGRAM, *words], timeout_s=_LIMIT_S, environment=environment).stdout.decode(
            "utf-8", "replace"
        )
    except errors.HostFailed as error:
        raise _translated(error, path, None) from error


def _follow(path: Path, words: Sequence[str | Path], what: str, report: Report, *, of: Path | None = None) -> list[str]:
    rest = b""

    def hear(piece: bytes) -> None:
        nonlocal rest
        *lines, rest = re.split(rb"[\r\n]", rest + piece)
        for line in lines[-1:]:
            if found := _PROGRESS.search(line):
                done = int(found["done"]) * _UNITS.get(found["unit"], 1)
                report(Progress(done, int(found["all"]) * _UNITS.get(found["of"], 1), what))
        if len(rest) > 1 << 16:
            rest = b""

    report(Progress(0, 0, what))
    try:
        said = process.followed([PROGRAM, *words], hear)
    except errors.HostFailed as error:
        raise _translated(error, path, of) from error
    report(Progress(1, 1, what))
    return [" ".join(one.split()) for one in _WARNING.findall(said)]


def _translated(error: errors.HostFailed, path: Path, source: Path | None) -> errors.HvmgrError:
    code, words = error.facts.get("code"), str(error.facts.get("words", ""))
    if source is not None and (found := _FOREIGN_NAME.search(words)):
        return errors.Unsupported(
            f"the name of {found[1]} is not UTF-8: no WIM can hold it",
            hint="rename the file, or capture without its folder",
        )
    if "No space left on device" in words or "ENOSPC" in words:
        return errors.NoSpace(f"no space left for {path.name}", hint="free space and run it again")
    if code in _CODES_FOREIGN:
        return errors.Unsupported(f"{path} cannot be read: {_CODES_FOREIGN[int(str(code))]}", path=str(path))
    if code == _CODE_NO_WIM:
        return errors.Corrupt(f"{path} is no WIM file", path=str(path))
    if code in _CODES_DAMAGED and source is None:
        return errors.Corrupt(f"{path} is damaged: {_reason(words)}", path=str(path))
    return error


def _reason(words: str) -> str:
    """wimlib's last sentence says what the code means."""
    return words.rpartition("; ")[2].rstrip(".") or "wimlib cannot read it"


def _require_file(path: Path) -> None:
    require()
    if path.is_dir():
        raise errors.UsageError(f"{path} is a folder, not a WIM file")
    if not path.exists():
        raise errors.NotFound(f"there is no {path}", path=str(path))
    with path.open("rb") as file:
        if file.read(8) not in (b"MSWIM\0\0\0", b"WLPWM\0\0\0"):
            raise errors.Corrupt(f"{path} is no WIM file", path=str(path))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, found, value = line.partition("=")
        if found:
            yield key.strip(), value.strip()


# --- what a WIM says of itself ----------------------------------------------------------------------------------------


def _images(path: Path, raw: bytes) -> tuple[WimImage, ...]:
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    try:
        root = etree.fromstring(raw, parser)
    except etree.XMLSyntaxError as error:
        raise errors.Corrupt(f"{path} is damaged: what it says of its images cannot be read", path=str(path)) from error
    return tuple(_image(number, one) for number, one in enumerate(root.findall("IMAGE"), 1))


def _image(number: int, one: Any) -> WimImage:
    def text(name: str) -> str:
        return str(one.findtext(name) or "").strip()

    def count(name: str) -> int:
        told = text(name)
        return int(told) if told.isdecimal() and len(told) <= _DIGITS_MAX else 0

    return WimImage(
        index=number,
        name=text("NAME"),
        description=text("DESCRIPTION"),
        files=count("FILECOUNT"),
        folders=count("DIRCOUNT"),
        total=count("TOTALBYTES"),
        created=_time(one.find("CREATIONTIME")),
        changed=_time(one.find("LASTMODIFICATIONTIME")),
        windows=dict(_windows(one.find("WINDOWS"))),
    )


def _time(node: Any) -> datetime | None:
    if node is None:
        return None
    try:
        ticks = int(node.findtext("HIGHPART"), 16) << 32 | int(node.findtext("LOWPART"), 16)
        return _EPOCH + timedelta(microseconds=ticks // 10)
    except (TypeError, ValueError, OverflowError):
        return None


_ARCHITECTURES = {"0": "x86", "5": "arm", "9": "x86_64", "12": "arm64"}


def _windows(node: Any) -> Iterator[tuple[str, str]]:
    """What Windows' own tools note: edition, version, architecture, languages."""
    if node is None:
        return
    for key, name in (("edition", "EDITIONID"), ("installation", "INSTALLATIONTYPE"), ("product", "PRODUCTNAME")):
        if value := node.findtext(name):
            yield key, str(value)
    if arch := node.findtext("ARCH"):
        yield "architecture", _ARCHITECTURES.get(str(arch), str(arch))
    if (version := node.find("VERSION")) is not None:
        parts = [version.findtext(part) or "0" for part in ("MAJOR", "MINOR", "BUILD")]
        yield "version", ".".join(parts)
    if languages := [str(one.text) for one in node.findall("LANGUAGES/LANGUAGE") if one.text]:
        yield "languages", ", ".join(languages)
