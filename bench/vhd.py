"""VHDs, beside qemu-img on the same disks; what is written is on disk at the end of both."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import harness
from bench.harness import Result
from hvmgr import units, vhd

_PIECES = 16  # all over the disk


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 5
    warm_up: int = 1
    disk: int = units.GIB
    data: int = 512 * units.MIB
    chain: int = 10
    image_data: int = 32 * units.MIB  # of each image of the chain
    checked: int = 100 * units.GIB
    allocated: int = 10 * units.GIB
    opened: int = 2040 * units.GIB


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as name:
        for part in (_whole_disks, _stream, _chain, _check, _open):
            say(f"vhd: {part.__name__.strip('_').replace('_', ' ')}")
            results += part(Path(name), scale)
    return results


def _whole_disks(folder: Path, scale: Scale) -> list[Result]:
    """There and back."""
    raw, image, size = folder / "disk.raw", folder / "disk.vhd", units.format_size(scale.data)
    _fill(raw, scale.disk, scale.data)
    _to_vhd(raw, image)
    times = _in_turns(
        folder,
        scale,
        {
            "to vhd": partial(_to_vhd, raw),
            "qemu to vhd": partial(_convert, raw, "raw", "vpc"),
            "to raw": partial(_to_raw, image),
            "qemu to raw": partial(_convert, image, "vpc", "raw"),
        },
    )
    return [
        Result(f"raw to dynamic VHD, {size}", times["to vhd"], times["qemu to vhd"], "qemu-img convert", aim=1.1),
        Result(f"dynamic VHD to raw, {size}", times["to raw"], times["qemu to raw"], "qemu-img convert", aim=1.1),
    ]


def _stream(folder: Path, scale: Scale) -> list[Result]:
    """Into a pipe; QEMU cannot, so it makes a file, and that goes into the pipe."""
    raw, image = folder / "disk.raw", folder / "disk.vhd"

    def by_qemu(to: Path) -> None:
        _qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", raw, to)
        with drain() as pipe:
            subprocess.run(["cat", str(to)], stdout=pipe, check=True)

    def by_cat(_: Path) -> None:
        with drain() as pipe:
            subprocess.run(["cat", str(image)], stdout=pipe, check=True)

    def received(_: Path) -> None:
        with subprocess.Popen(["cat", str(image)], stdout=subprocess.PIPE, bufsize=0) as cat:
            assert cat.stdout is not None
            for _offset, _piece in vhd.StreamReader(cat.stdout):
                pass

    times = _in_turns(
        folder,
        scale,
        {
            "from raw": lambda _: _send(lambda: vhd.RawSource(raw)),
            "from vhd": lambda _: _send(lambda: vhd.open_chain(image)),
            "qemu": by_qemu,
            "cat": by_cat,
            "read": received,
        },
    )
    size = units.format_size(scale.data)
    return [
        Result(f"raw as a stream, {size}", times["from raw"], times["qemu"], "qemu-img convert, then cat", aim=1.1),
        Result("the same", times["from raw"], times["cat"], "cat of the finished VHD"),
        Result(f"VHD as a stream, {size}", times["from vhd"], times["cat"], "cat of the same file"),
        Result(f"stream taken apart, {size}", times["read"], times["cat"], "cat"),
    ]


def _chain(folder: Path, scale: Scale) -> list[Result]:
    """The end of a chain as one raw image; the same data lies in as many images of qcow2."""
    tops = {fmt: folder / f"chain{scale.chain - 1}.{fmt}" for fmt in ("vhd", "qcow2")}
    for number in range(scale.chain):
        _add_to_chain(folder, number, scale)
    times = _in_turns(
        folder,
        scale,
        {"ours": partial(_to_raw, tops["vhd"]), "qemu": partial(_convert, tops["qcow2"], "qcow2", "raw")},
    )
    size = units.format_size(scale.chain * scale.image_data)
    return [
        Result(
            f"chain of {scale.chain} to raw, {size}", times["ours"], times["qemu"], "qemu-img convert, qcow2", aim=1.1
        )
    ]


def _check(folder: Path, scale: Scale) -> list[Result]:
    """Of a disk on which a tenth is allocated; QEMU can only check qcow2."""
    image, other = folder / "checked.vhd", folder / "checked.qcow2"
    _allocate(image, scale.checked, scale.allocated)
    _qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", other, str(scale.allocated))

    def ours(_: Path) -> None:
        assert vhd.check(image) == []

    times = _in_turns(folder, scale, {"ours": ours, "qemu": lambda _: _qemu_img("check", "-q", other)})
    what = f"check, {units.format_size(scale.allocated)} in {units.format_size(scale.checked)}"
    return [Result(what, times["ours"], times["qemu"], "qemu-img check, a qcow2 with as much")]


def _open(folder: Path, scale: Scale) -> list[Result]:
    """The largest disk there is, all of it allocated, in a process of its own because of its memory."""
    image = folder / "large.vhd"
    _allocate(image, scale.opened, scale.opened, bitmaps=False)
    program = (
        "import sys, time; from hvmgr import vhd; vhd.open_chain\n"
        "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "before = peak(); start = time.perf_counter(); chain = vhd.open_chain(sys.argv[1])\n"
        "print(time.perf_counter() - start, peak() - before)"
    )
    seconds, kib = [], []
    for _ in range(scale.rounds):
        argv = [sys.executable, "-c", program, str(image)]
        opening, memory = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
        seconds.append(float(opening))
        kib.append(int(memory))
    taken = units.format_size(int(statistics.median(kib)) * units.KIB)
    what = f"open {units.format_size(scale.opened)}, full, in {taken}"
    return [Result(what, statistics.median(seconds), limit=1.0)]


# --- what takes turns -------------------------------------------------------------------------------------------------


def _in_turns(folder: Path, scale: Scale, acts: dict[str, Callable[[Path], object]]) -> dict[str, float]:
    return in_turns(folder, scale.rounds, scale.warm_up, acts)


def in_turns(folder: Path, rounds: int, warm_up: int, acts: dict[str, Callable[[Path], object]]) -> dict[str, float]:
    """Each act into a file of its own, which goes before the next one; what others left to be written is not measured."""
    times: dict[str, list[float]] = {name: [] for name in acts}
    to = folder / "to"
    for number in range(warm_up + rounds):
        for name, act in acts.items():
            os.sync()
            start = time.perf_counter()
            act(to)
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
            to.unlink(missing_ok=True)
    return {name: statistics.median(values) for name, values in times.items()}


def _to_vhd(raw: Path, to: Path) -> None:
    with vhd.RawSource(raw) as source:
        vhd.write_image(to, source)


def _to_raw(image: Path, to: Path) -> None:
    with vhd.open_chain(image) as chain:
        vhd.write_raw(to, chain)


def _convert(source: Path, fmt: str, target_fmt: str, to: Path) -> None:
    options = ["-o", "force_size=on"] if target_fmt == "vpc" else []
    _qemu_img("convert", "-f", fmt, "-O", target_fmt, *options, source, to)
    harness.program(["sync", str(to)])


def _send(opened: Callable[[], contextlib.AbstractContextManager[vhd.Source]]) -> None:
    with opened() as source, drain() as pipe:
        vhd.StreamWriter(source).send(pipe)


@contextlib.contextmanager
def drain() -> Iterator[int]:
    """A pipe whose other end reads as fast as it can."""
    program = "import os\nbuffer = bytearray(1 << 20)\nwhile os.readv(0, [buffer]): pass"
    with subprocess.Popen([sys.executable, "-S", "-c", program], stdin=subprocess.PIPE) as reader:
        assert reader.stdin is not None
        yield reader.stdin.fileno()
        reader.stdin.close()


def _qemu_img(*words: str | Path) -> None:
    harness.program(["qemu-img", *map(str, words)])


# --- what is measured -------------------------------------------------------------------------------------------------


def _fill(path: Path, size: int, data: int) -> None:
    piece = os.urandom(units.MIB)
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(_PIECES):
            file.seek(number * (size // _PIECES))
            for _ in range(max(1, data // _PIECES // units.MIB)):
                file.write(piece)


def _add_to_chain(folder: Path, number: int, scale: Scale) -> None:
    """One more image in both formats, with the same bytes at the same places."""
    image, other = folder / f"chain{number}.vhd", folder / f"chain{number}.qcow2"
    below, other_below = folder / f"chain{number - 1}.vhd", folder / f"chain{number - 1}.qcow2"
    if number:
        vhd.create(image, parent=below)
        _qemu_img("create", "-q", "-f", "qcow2", "-b", other_below.name, "-F", "qcow2", other)
    else:
        vhd.create(image, scale.disk)
        _qemu_img("create", "-q", "-f", "qcow2", other, str(scale.disk))
    megabytes = scale.disk // units.MIB
    places = [(number * 131 + 37 * index) % megabytes for index in range(max(1, scale.image_data // units.MIB))]
    with vhd.open_chain(image, writable=True) as chain:
        for place in places:
            chain.write(place * units.MIB, bytes([number + 1]) * units.MIB)
    words = [word for place in places for word in ("-c", f"write -q -P {number + 1} {place}M 1M")]
    harness.program(["qemu-io", "-f", "qcow2", *words, str(other)])


def _allocate(path: Path, size: int, allocated: int, *, bitmaps: bool = True) -> None:
    """A dynamic disk whose first blocks are allocated; their data is a hole of the file, as are bitmaps nobody reads."""
    writer = vhd.StreamWriter(_Empty(size, allocated), alignment=4096)
    with path.open("wb") as file:
        at = 0
        for number, chunk in enumerate(writer.chunks()):
            is_block = number >= 2 and at + len(chunk) < writer.length
            if not is_block or bitmaps:
                os.pwrite(file.fileno(), chunk[: len(chunk) - writer.block_size] if is_block else chunk, at)
            at += len(chunk)


class _Empty:
    """A disk that holds data at its start, which nobody wants to see."""

    def __init__(self, size: int, data: int) -> None:
        self.size = size
        self._data = data

    def stretches(self, _offset: int = 0, _length: int | None = None) -> Iterator[vhd.Stretch]:
        yield vhd.Stretch(0, self._data, data=True)
        if self._data < self.size:
            yield vhd.Stretch(self._data, self.size - self._data, data=False)

    def read_into(self, _offset: int, _buffer: memoryview) -> None: ...
