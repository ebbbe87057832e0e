"""Records what is done to a file, and makes the files that a crash at any point would have left.

A crash loses any of the writes since the last sync, and may cut the last one between two sectors.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

from hvmgr.vhd import file as file_module
from hvmgr.vhd.file import File

SYNC = "sync"


class Recording:
    """The file before, and the writes, cuts and syncs that followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = path.read_bytes()
        self.acts: list[tuple] = []

    def states(self, dice: random.Random, *, lossy: int = 2) -> Iterator[tuple[int, bytes]]:
        """What a crash may leave, with the number of acts that were begun before it."""
        for number in range(len(self.acts) + 1):
            yield number, self._replay(self.acts[:number])
            if number == len(self.acts):
                return
            act = self.acts[number]
            if act[0] == "write" and len(act[2]) > 512:
                yield number + 1, self._replay([*self.acts[:number], _torn(act, dice)])
            for _ in range(lossy):
                yield number + 1, self._replay(self._lossy(number + 1, dice))

    def _lossy(self, number: int, dice: random.Random) -> list[tuple]:
        begun = self.acts[:number]
        synced = max((at for at, act in enumerate(begun) if act[0] == SYNC), default=-1) + 1
        return [*begun[:synced], *(act for act in begun[synced:] if dice.random() < 0.5)]

    def _replay(self, acts: list[tuple]) -> bytes:
        data = bytearray(self.before)
        for act in acts:
            if act[0] == "write":
                _, offset, piece = act
                data.extend(bytes(max(0, offset + len(piece) - len(data))))
                data[offset : offset + len(piece)] = piece
            elif act[0] == "length":
                del data[act[1] :]
                data.extend(bytes(act[1] - len(data)))
        return bytes(data)


def _torn(act: tuple, dice: random.Random) -> tuple:
    kept = 512 * dice.randrange(1, -(-len(act[2]) // 512)) - act[1] % 512
    return "write", act[1], act[2][:kept]


@contextlib.contextmanager
def recorded(path: Path) -> Iterator[Recording]:
    """Everything that is done to the file at ``path`` while the block runs."""
    recording = Recording(path)
    originals = {name: getattr(File, name) for name in ("write", "sync", "set_length", "copy_from")}

    def write(self, offset, data):
        if self.path == path:
            recording.acts.append(("write", offset, bytes(data)))
        originals["write"](self, offset, data)

    def sync(self):
        if self.path == path:
            recording.acts.append((SYNC,))
        originals["sync"](self)

    def set_length(self, length):
        if self.path == path:
            recording.acts.append(("length", length))
        originals["set_length"](self, length)

    def copy_from(self, other, source, target, length):
        write(self, target, other.read(source, length))

    wrappers = {"write": write, "sync": sync, "set_length": set_length, "copy_from": copy_from}
    for name, wrapper in wrappers.items():
        setattr(file_module.File, name, wrapper)
    try:
        yield recording
    finally:
        for name, original in originals.items():
            setattr(file_module.File, name, original)
