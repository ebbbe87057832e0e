"""What qemu-img tells about an image (``info``, ``map``, ``said``, ``check``, ``measure``, ``same``), and what it does to copies.

It changes little else: ``name_parent`` writes a header, ``create`` and ``flatten`` make new images, ``resize`` grows or
cuts one.

The format is always stated, never guessed. A differencing VHD must not get here: QEMU ignores its parent.
Raises everywhere: NotFound, Corrupt for a file of another format, Conflict when another process writes to it,
Unsupported for what a format cannot do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hvmgr import errors
from hvmgr.host import process, qemu_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

# Metadata only, yet a check reads all tables of an image from a slow disk.
_INFO_S = 60.0
_SCAN_S = 3600.0
_PROGRESS_S = 0.1

# qemu-img-check(1): 0 sound, 2 corrupt, 3 leaks only, 63 not supported by the format.
_CHECK_CODES = (0, 2, 3)
# qemu-img(1), compare: 0 the same, 1 not; more is a failure.
_COMPARE_CODES = (0, 1)


@dataclass(frozen=True, slots=True)
class Info:
    """The header of one image; sizes are bytes.

    ``backing_name`` is what the header says, ``backing_full`` what QEMU makes of it (a path, or a URI).
    ``data_file`` names another file that holds the bytes; an image from strangers should have none.
    """

    path: Path
    fmt: str
    size: int
    allocated: int
    cluster_size: int | None
    backing_name: str | None
    backing_full: str | None
    backing_fmt: str | None
    data_file: str | None
    is_corrupt: bool
    is_dirty: bool
    is_encrypted: bool
    internal_snapshots: tuple[str, ...]
    bitmaps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of a disk. ``depth`` counts images from the top (0); ``present``: that image or one below says so.

    ``offset`` is where the bytes lie in the file of that image; None when they lie nowhere (zeros) or are
    compressed or encrypted there.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Counts of clusters; ``leaks`` only waste space, ``corruptions`` mean lost data."""

    corruptions: int
    leaks: int
    check_errors: int
    leaks_fixed: int
    end_offset: int | None

    @property
    def is_sound(self) -> bool:
        """Whether all data can be trusted; leaks do not matter."""
        return not (self.corruptions or self.check_errors)


@dataclass(frozen=True, slots=True)
class Measure:
    """Bytes that a converted image will need, now and when it is full; ``bitmaps`` when those are copied too."""

    required: int
    fully_allocated: int
    bitmaps: int


def info(path: Path, fmt: str, *, force_share: bool = False) -> Info:
    """The image's header; its parents are not opened. ``force_share``: also while a VM writes to it."""
    answer = _run(path, "info", ["-f", fmt, *_share(force_share=force_share)], timeout_s=_INFO_S)
    specific = answer.get("format-specific", {}).get("data", {})
    return Info(
        path=path,
        fmt=answer["format"],
        size=answer["virtual-size"],
        allocated=answer.get("actual-size", 0),
        cluster_size=answer.get("cluster-size"),
        backing_name=answer.get("backing-filename"),
        backing_full=answer.get("full-backing-filename"),
        backing_fmt=answer.get("backing-filename-format"),
        data_file=specific.get("data-file"),
        is_corrupt=specific.get("corrupt", False),
        is_dirty=answer.get("dirty-flag", False),
        is_encrypted=answer.get("encrypted", False),
        internal_snapshots=tuple(entry["name"] for entry in answer.get("snapshots", ())),
        bitmaps=tuple(entry["name"] for entry in specific.get("bitmaps", ())),
    )


def map(path: Path, fmt: str, *, force_share: bool = False) -> list[Extent]:
    """The extents of the whole disk through its chain, in order and without gaps."""
    return _extents(_run(path, "map", ["-f", fmt, *_share(force_share=force_share)], timeout_s=_SCAN_S))


def said(chain: Sequence[tuple[Path, str]]) -> list[Extent]:
    """What these images of a chain (path and format, top first) say; what they stand on is not opened.

    ``present`` is True where one of them says something, be it zeros.
    """
    if not all(str(path.absolute()).isprintable() for path, _ in chain):  # JSON takes no name that is not UTF-8
        return [replace(one, present=one.present and one.depth < len(chain)) for one in map(*chain[0])]
    node: dict[str, object] | None = None
    for path, fmt in reversed(chain):
        node = {"driver": fmt, "file": _file(path)} | ({"backing": node} if fmt == "qcow2" else {})
    argv = ["qemu-img", "map", "--output=json", "json:" + json.dumps(node, ensure_ascii=False)]
    return _extents(json.loads(_translated(argv, chain[0][0], timeout_s=_SCAN_S)))


def _extents(answer: Any) -> list[Extent]:
    return [
        Extent(
            start=entry["start"],
            length=entry["length"],
            depth=entry["depth"],
            present=entry.get("present", True),
            zero=entry["zero"],
            data=entry["data"],
            offset=entry.get("offset"),
        )
        for entry in answer
    ]


def check(path: Path, fmt: str, *, repair_leaks: bool = False) -> CheckResult:
    """The tables of the image compared with each other. Its parents are not checked, and need not be there.

    ``repair_leaks`` gives lost clusters back; corruptions are never repaired here.
    """
    repair = ["-r", "leaks"] if repair_leaks else []
    argv: list[str | Path] = ["qemu-img", "check", "--output=json", *repair]
    argv += _alone(path) if fmt == "qcow2" else ["-f", fmt, path.absolute()]
    answer = json.loads(_translated(argv, path, timeout_s=_SCAN_S, ok_codes=_CHECK_CODES))
    return CheckResult(
        corruptions=answer.get("corruptions", 0),
        leaks=answer.get("leaks", 0),
        check_errors=answer.get("check-errors", 0),
        leaks_fixed=answer.get("leaks-fixed", 0),
        end_offset=answer.get("image-end-offset"),
    )


def measure(path: Path, fmt: str, *, target: str, force_share: bool = False) -> Measure:
    """The space that the disk, chain and all, takes as one image of format ``target`` (qcow2 or raw)."""
    options = ["-f", fmt, "-O", target, *_share(force_share=force_share)]
    answer = _run(path, "measure", options, timeout_s=_SCAN_S)
    return Measure(answer["required"], answer["fully-allocated"], answer.get("bitmaps", 0))


def name_parent(path: Path, parent: str, parent_fmt: str) -> None:
    """The header of a qcow2 image names another parent; neither that nor the image's data is looked at."""
    argv: list[str | Path] = [
        "qemu-img",
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-b",
        parent,
        "-F",
        parent_fmt,
        path.absolute(),
    ]
    _translated(argv, path)


def create(
    path: Path, fmt: str, *, size: int, options: Sequence[str] = (), backing: tuple[str, str] | None = None
) -> None:
    """A new image at ``path``, whose file may be there and is then overwritten.

    ``backing`` is (name as written into the header, its format); the parent is not looked at.
    """
    argv: list[str | Path] = ["qemu-img", "create", "-q", "-f", fmt]
    if options:
        argv += ["-o", ",".join(options)]
    if backing is not None:
        argv += ["-u", "-b", backing[0], "-F", backing[1]]
    _translated([*argv, path.absolute(), str(size)], path, timeout_s=_SCAN_S)


def resize(path: Path, fmt: str, *, size: int, shrink: bool = False) -> None:
    """The disk has ``size`` bytes; what lies behind is lost, and only with ``shrink``."""
    options = ["--shrink"] if shrink else []
    _translated(["qemu-img", "resize", "-q", "-f", fmt, *options, path.absolute(), str(size)], path, timeout_s=_SCAN_S)


def flatten(
    path: Path,
    fmt: str,
    target: Path,
    *,
    target_fmt: str,
    options: Sequence[str] = (),
    above: tuple[str, str] | None = None,
    force_share: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """All that a guest would read from the image, chain and all, in a new image of the format qcow2, raw or vpc.

    What reads as zeros is not written. Two to three times as fast as a job of the storage daemon (QEMU 7.2). A VHD has
    exactly the size of the disk. ``options`` are those of the new format; with ``above`` (a parent's name and format) only
    what lies above that parent of the image is taken, and the target names it. ``on_progress`` gets the bytes that the target takes so far, some ten times a second;
    when it raises, the program is stopped. A target that is not complete does not stay.
    """
    options = options or (["subformat=dynamic", "force_size=on"] if target_fmt == "vpc" else [])
    argv: list[str | Path] = ["qemu-img", "convert", "-W", "-m", "16", "-f", fmt, "-O", target_fmt]
    if options:
        argv += ["-o", ",".join(options)]
    if above is not None:
        argv += ["-B", above[0], "-F", above[1]]
    argv += [*_share(force_share=force_share), path.absolute(), target.absolute()]
    try:
        with process.spawned(argv) as program:
            while (code := program.wait(_PROGRESS_S)) is None:
                if on_progress is not None:
                    on_progress(_taken(target))
            if code != 0:
                words = program.stderr_text().strip().removeprefix("qemu-img: ")
                culprit = target if "No space" in words else path
                raise qemu_errors.translated(words or f"qemu-img ended with {code}", culprit)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _taken(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def same(first: tuple[Path, str], second: tuple[Path, str], *, force_share: bool = False) -> bool:
    """Whether two images (path, format), chains and all, show a guest the same bytes; the longer one may end in zeros."""
    formats = ["-f", first[1], "-F", second[1]]
    argv: list[str | Path] = ["qemu-img", "compare", *formats, *_share(force_share=force_share)]
    argv += [first[0].absolute(), second[0].absolute()]
    try:
        return process.run(argv, timeout_s=_SCAN_S, ok_codes=_COMPARE_CODES).code == 0
    except errors.HostFailed as error:
        words = error.facts.get("words")
        if not words:
            raise
        raise qemu_errors.translated(str(words).removeprefix("qemu-img: "), first[0]) from error


def _run(path: Path, verb: str, options: Sequence[str], *, timeout_s: float, ok_codes: Sequence[int] = (0,)) -> Any:
    # Absolute: a name that starts with "-" or holds a ":" would mean something else.
    argv: list[str | Path] = ["qemu-img", verb, "--output=json", *options, path.absolute()]
    return json.loads(_translated(argv, path, timeout_s=timeout_s, ok_codes=ok_codes))


def _alone(path: Path) -> list[str | Path]:
    """How QEMU is told of a qcow2 image without what it stands on; in JSON it takes no name that is not UTF-8."""
    name = str(path.absolute())
    if not name.isprintable():
        return ["-f", "qcow2", name]
    return ["json:" + json.dumps({"driver": "qcow2", "file": _file(path), "backing": None}, ensure_ascii=False)]


def _file(path: Path) -> dict[str, str]:
    return {"driver": "host_device" if path.is_block_device() else "file", "filename": str(path.absolute())}


def _translated(
    argv: Sequence[str | Path], path: Path, *, timeout_s: float = _INFO_S, ok_codes: Sequence[int] = (0,)
) -> bytes:
    try:
        return process.run(argv, timeout_s=timeout_s, ok_codes=ok_codes).stdout
    except errors.HostFailed as error:
        words = error.facts.get("words")
        if not words:
            raise
        told = str(words).removeprefix("qemu-img: ").replace(str(argv[-1]), str(path))
        raise qemu_errors.translated(told, path) from error


def _share(*, force_share: bool) -> list[str]:
    return ["-U"] if force_share else []
