"""What the tests of the codec share: disks of random bytes, made and read by the codec itself."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import HealthCheck, settings

from hvmgr.vhd.chain import Chain, open_chain
from hvmgr.vhd.creation import create
from hvmgr.vhd.source import Source, Stretch, is_zero, read

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples"
KIB, MIB = 1 << 10, 1 << 20
# The same examples each time, however slow the machine is.
STEADY = settings(
    derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)


class Memory:
    """A disk in memory: a ``Source`` whose zeros are not data."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def stretches(self, offset=0, length=None):
        end = self.size if length is None else offset + length
        for at in range(offset, end, 4096):
            stop = min(at + 4096, end)
            yield Stretch(at, stop - at, not is_zero(self.data[at:stop]))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]


def content(path: Path, **options) -> bytes:
    """All bytes of a disk, by way of its parents."""
    with open_chain(path, **options) as disk:
        return read_in_pieces(disk)


def read_in_pieces(disk: Source) -> bytes:
    step = 700 * KIB + 512  # crosses blocks, and begins within them
    return b"".join(read(disk, at, min(step, disk.size - at)) for at in range(0, disk.size, step))


def scribble(disk: Chain, model: bytearray, seed: int, *, count: int = 12, unit: int = 1) -> None:
    """Random writes to both, at multiples of ``unit`` bytes."""
    dice = random.Random(seed)
    for _ in range(count):
        start = dice.randrange(0, disk.size // unit) * unit
        length = min(dice.choice([1, 3, 8, 40, 400]) * max(unit, 512), disk.size - start)
        data = dice.randbytes(length)
        disk.write(start, data)
        model[start : start + length] = data


def make_chain(folder: Path, depth: int = 3, *, size: int = 3 * MIB, unit: int = 512, block_size: int = 512 * KIB):
    """``disk0.vhd`` and its descendants, each with writes of its own: the paths, and what each shows."""
    paths, shown, model = [], [], bytearray(size)
    for number in range(depth):
        path = folder / ("disk0.vhd" if number == 0 else f"disk{number}.avhd")
        if number:
            create(path, parent=paths[-1])
        else:
            create(path, size, block_size=block_size)
        with open_chain(path, writable=True) as disk:
            scribble(disk, model, number, unit=unit)
        paths.append(path)
        shown.append(bytes(model))
    return paths, shown
