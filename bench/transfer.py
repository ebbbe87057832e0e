"""Single disks as streams, beside copying the bytes, qemu-img and nbdcopy; what is written is on disk at the end of both.

The disk has far more clusters than bytes: what a delta costs beyond its changes is looking through the tables of all of them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from bench import harness
from bench.harness import Result
from bench.vhd import drain, in_turns
from hvmgr import units
from hvmgr.model.image_format import ImageFormat
from hvmgr.operations.transfer import outgoing
from hvmgr.operations.transfer.incoming import Incoming
from hvmgr.operations.transfer.outgoing import Outgoing
from hvmgr.operations.transfer.points import Point

_PIECES = 16  # all over the disk


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 3
    warm_up: int = 1
    disk: int = 100 * units.GIB
    allocated: int = 40 * units.GIB  # of the disk, without taking so much space
    data: int = units.GIB
    changed: int = units.GIB


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as name:
        folder = Path(name)
        say("transfer: a disk, and a snapshot of it")
        points = _points(folder, scale)
        return [*_delta(folder, scale, points, say), *_whole(folder, scale, points, say)]


def _delta(folder: Path, scale: Scale, points: tuple[Point, Point], say: Callable[[str], None]) -> list[Result]:
    """What changed, as a file."""
    say("transfer: delta")
    now, base = points
    changed, top = folder / "changed", now.top[0]
    noise = os.urandom(units.MIB)
    with changed.open("wb") as file:
        for _ in range(scale.changed // units.MIB):
            file.write(noise)

    def ours(to: Path) -> None:
        with _opened(now, base) as stream, to.open("wb") as file:
            stream.send(file.fileno())
            os.fsync(file.fileno())

    def copied(to: Path) -> None:
        harness.program(["cp", "--sparse=never", "--reflink=never", str(changed), str(to)])
        harness.program(["sync", str(to)])

    def by_qemu(to: Path) -> None:
        below = str(base.top[0])
        harness.program(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-B", below, "-F", "qcow2", str(top), str(to)]
        )
        harness.program(["sync", str(to)])

    times = in_turns(folder, scale.rounds, scale.warm_up, {"ours": ours, "cp": copied, "qemu": by_qemu})
    what = f"delta, {units.format_size(scale.changed)} changed in {units.format_size(scale.disk)}"
    return [
        Result(what, times["ours"], times["cp"], "cp of as many bytes", aim=1.3),
        Result("the same", times["ours"], times["qemu"], "qemu-img convert -B, a qcow2"),
    ]


def _whole(folder: Path, scale: Scale, points: tuple[Point, Point], say: Callable[[str], None]) -> list[Result]:
    """Into a pipe, for which QEMU needs a file in between; and a stream taken apart again."""
    say("transfer: whole disk")
    now, _ = points
    sent = folder / "sent"
    with _opened(now) as stream, sent.open("wb") as file:
        stream.send(file.fileno())

    def ours(_: Path) -> None:
        with _opened(now) as stream, drain() as pipe:
            stream.send(pipe)

    def by_qemu(to: Path) -> None:
        argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "vpc", "-o", "force_size=on", str(now.top[0]), str(to)]
        harness.program(argv)
        with drain() as pipe, to.open("rb") as file:
            while os.sendfile(pipe, file.fileno(), None, 16 << 20):
                pass

    def received(_: Path) -> None:
        with sent.open("rb", buffering=0) as file, Incoming(file, ImageFormat.VHD, spool=folder) as stream:
            stream.write(_Nowhere(), now.size, [], lambda _: None)  # type: ignore[arg-type]

    def by_nbdcopy(_: Path) -> None:
        served = ["[", "qemu-nbd", "--read-only", "--format=qcow2", str(now.top[0]), "]"]
        harness.program(["nbdcopy", "--", *served, "null:"])

    def by_cat(_: Path) -> None:
        with drain() as pipe, sent.open("rb") as file:
            while os.sendfile(pipe, file.fileno(), None, 16 << 20):
                pass

    acts = {"ours": ours, "qemu": by_qemu, "received": received, "cat": by_cat, "nbdcopy": by_nbdcopy}
    times = in_turns(folder, scale.rounds, scale.warm_up, acts)
    size = units.format_size(scale.data + scale.changed)
    return [
        Result(f"whole disk as VHD into a pipe, {size}", times["ours"], times["qemu"], "qemu-img convert", aim=1.0),
        Result("the same", times["ours"], times["nbdcopy"], "nbdcopy out of qemu-nbd, read and dropped"),
        Result("the same", times["ours"], times["cat"], "sending the finished VHD"),
        Result(f"a VHD taken apart, {size}", times["received"], times["cat"], "sending the same file"),
    ]


class _Nowhere:
    """A disk that forgets."""

    def write(self, _offset: int, _data: memoryview) -> None: ...

    def write_zeroes(self, _offset: int, _length: int) -> None: ...

    def flush(self) -> None: ...


@contextmanager
def _opened(point: Point, base: Point | None = None) -> Iterator[Outgoing]:
    outgoing.check(point, base, ImageFormat.VHD)
    with outgoing.opened(point, base, ImageFormat.VHD, report=lambda _: None) as stream:
        yield stream


def _points(folder: Path, scale: Scale) -> tuple[Point, Point]:
    """A disk as it is now, and a snapshot of it: the changes lie in pieces, elsewhere than the data."""
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    clusters = ["-o", "preallocation=metadata", str(base), str(scale.allocated)]
    harness.program(["qemu-img", "create", "-q", "-f", "qcow2", *clusters])
    harness.program(["qemu-img", "resize", "-q", "-f", "qcow2", str(base), str(scale.disk)])
    _fill(base, scale.disk, scale.data, 0)
    harness.program(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top)])
    _fill(top, scale.disk, scale.changed, scale.disk // _PIECES // 2)
    disk = str(uuid4())
    older = Point(str(uuid4()), disk, "base", ((base, "qcow2"),), scale.disk, is_frozen=True)
    chain = ((top, "qcow2"), (base, "qcow2"))
    return Point(str(uuid4()), disk, "now", chain, scale.disk, is_frozen=True), older


def _fill(path: Path, size: int, data: int, start: int) -> None:
    piece = data // _PIECES
    with tempfile.NamedTemporaryFile(dir=path.parent) as noise:
        data = os.urandom(units.MIB)
        for _ in range(max(1, piece // units.MIB)):
            noise.write(data)
        noise.flush()
        places = [start + number * (size // _PIECES) for number in range(_PIECES)]
        words = [word for place in places for word in ("-c", f"write -q -s {noise.name} {place} {piece}")]
        harness.program(["qemu-io", "-f", "qcow2", *words, str(path)])
