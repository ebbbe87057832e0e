"""Disks against a bytearray: whatever is written, put on top, merged, resized and compacted, the bytes are right."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create, describe_parent, write_image
from hvmgr.vhd.format import Kind
from hvmgr.vhd.reshaping import compact, merge, reparent, resize
from hvmgr.vhd.source import is_zero
from tests.vhd.disks import KIB, MIB, STEADY, content

SECTORS = st.integers(1, 2 * MIB // 512)
BLOCKS = st.sampled_from([512 * KIB, 1 * MIB])


class Disks(RuleBasedStateMachine):
    """A chain of files; ``shown[n]`` is what the n-th of them, the base first, has to show."""

    @initialize(sectors=SECTORS, block=BLOCKS, kind=st.sampled_from([Kind.FIXED, Kind.DYNAMIC]))
    def begin(self, sectors: int, block: int, kind: Kind) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hvmgr-vhd-"))
        self.number = 0
        self.paths, self.shown = [self.folder / "base.vhd"], [bytes(512 * sectors)]
        create(self.paths[0], 512 * sectors, kind=kind, block_size=block)

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            for path, shown in zip(self.paths, self.shown, strict=True):
                assert content(path, any_size=True) == shown
        finally:
            shutil.rmtree(self.folder)

    @rule(seed=st.integers(0, 1 << 30), zeros=st.booleans())
    def write(self, seed: int, zeros: bool) -> None:
        dice, model = random.Random(seed), bytearray(self.shown[-1])
        with open_chain(self.paths[-1], writable=True, any_size=True) as disk:
            for _ in range(3):
                start = dice.randrange(disk.size)
                length = min(dice.choice([1, 512, 4096, 70_000, 800_000]), disk.size - start)
                data = bytes(length) if zeros else dice.randbytes(length)
                if zeros and seed % 2:
                    disk.write_zeros(start, length)
                else:
                    disk.write(start, data)
                model[start : start + length] = data
        self.shown[-1] = bytes(model)

    @rule(block=BLOCKS)
    def snapshot(self, block: int) -> None:
        self.number += 1
        path = self.folder / f"{self.number}.avhd"
        create(path, parent=self.paths[-1], block_size=block)
        self.paths.append(path)
        self.shown.append(self.shown[-1])

    @precondition(lambda self: len(self.paths) > 1)
    @rule(levels=st.integers(1, 4))
    def merge(self, levels: int) -> None:
        levels = min(levels, len(self.paths) - 1)
        with open_chain(self.paths[-1], any_size=True) as disk:
            merge(disk, levels)
        for path in self.paths[-levels:]:
            path.unlink()
        self.paths, self.shown = self.paths[:-levels], [*self.shown[: -levels - 1], self.shown[-1]]

    @rule(sectors=SECTORS)
    def resize(self, sectors: int) -> None:
        resize(self.paths[-1], 512 * sectors, allow_shrink=True)
        self.shown[-1] = self.shown[-1][: 512 * sectors].ljust(512 * sectors, b"\0")

    @rule()
    def compact(self) -> None:
        with open_chain(self.paths[-1], any_size=True) as disk:
            kind = disk.top.kind
        if kind is not Kind.FIXED:
            before, after = compact(self.paths[-1])
            assert after <= before

    @precondition(lambda self: len(self.paths) > 1)
    @rule()
    def put_on_a_copy(self) -> None:
        """The whole disk below the top one as one file, and the top one on it."""
        self.number += 1
        path = self.folder / f"{self.number}.vhd"
        with open_chain(self.paths[-2], any_size=True) as disk:
            write_image(path, disk)
        reparent(self.paths[-1], path, ignore_id=True, any_size=True, prove=True)
        self.paths, self.shown = [path, self.paths[-1]], self.shown[-2:]

    @precondition(lambda self: len(self.paths) > 1)
    @rule()
    def copy_the_delta(self) -> None:
        """The top file written anew from what it holds."""
        self.number += 1
        path = self.folder / f"{self.number}.avhd"
        with open_chain(self.paths[-1], any_size=True) as disk:
            write_image(path, disk.top, kind=Kind.DIFFERENCING, parent=describe_parent(path, self.paths[-2]))
        self.paths[-1] = path

    @invariant()
    def shows_its_bytes(self) -> None:
        with open_chain(self.paths[-1], any_size=True) as disk:
            assert [one.describe() for one in disk.faults] == []
            assert disk.size == len(self.shown[-1])
            for stretch in disk.stretches():
                stop = stretch.offset + stretch.length
                if not stretch.data:
                    assert is_zero(self.shown[-1][stretch.offset : stop])
        assert content(self.paths[-1], any_size=True) == self.shown[-1]


TestDisks = Disks.TestCase
TestDisks.settings = settings(STEADY, max_examples=25, stateful_step_count=12)


@pytest.mark.parametrize("seed", range(4))
def test_long_life(seed: int) -> None:
    """Many acts in a row on larger disks, more merges among them than a short life has."""
    dice, disks = random.Random(seed), Disks()
    sectors = lambda: dice.randrange(1, 5 * MIB // 512)  # noqa: E731
    block = lambda: dice.choice([512 * KIB, 1 * MIB, 2 * MIB])  # noqa: E731
    acts = {
        "write": lambda: disks.write(seed=dice.randrange(1 << 30), zeros=dice.random() < 0.3),
        "snapshot": lambda: disks.snapshot(block=block()),
        "merge": lambda: len(disks.paths) > 1 and disks.merge(levels=dice.randrange(1, 4)),
        "resize": lambda: disks.resize(sectors=sectors()),
        "compact": disks.compact,
        "move": lambda: len(disks.paths) > 1 and disks.put_on_a_copy(),
        "copy": lambda: len(disks.paths) > 1 and disks.copy_the_delta(),
    }
    names = ["write"] * 4 + ["snapshot"] * 3 + ["merge"] * 2 + ["resize"] * 2 + ["compact", "move", "copy"]
    try:
        disks.begin(sectors=sectors(), block=block(), kind=dice.choice([Kind.FIXED, Kind.DYNAMIC]))
        for _ in range(40):
            acts[dice.choice(names)]()
            disks.shows_its_bytes()
    finally:
        disks.teardown()
