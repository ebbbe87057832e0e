"""Streams as other programs read them: a full disk and the deltas above it, each stored as it was sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvmgr.vhd import checking
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create, write_image
from hvmgr.vhd.source import read
from hvmgr.vhd.stream_writer import StreamWriter
from tests.vhd.test_streams import DISK, UNIT, Memory, written

pyvhdi = pytest.importorskip("pyvhdi", reason="libvhdi-python is missing: make setup installs it")


@pytest.mark.parametrize("alignment", [512, 4096])
def test_libvhdi_reads_a_full_stream_and_its_deltas(tmp_path: Path, alignment) -> None:
    disk, sent = tmp_path / "disk", tmp_path / "sent"
    disk.mkdir()
    sent.mkdir()
    names = ["0.vhd", "1.vhd", "2.vhd"]
    write_image(disk / names[0], Memory(DISK), block_size=UNIT)
    for number, name in enumerate(names):
        if number:
            create(disk / name, parent=disk / names[number - 1])
            with open_chain(disk / name, writable=True) as chain:
                chain.write(number * 3 * UNIT, bytes([number]) * 70_144)
        with open_chain(disk / name) as chain:
            writer = StreamWriter.of_chain(chain, 1 if number else None, alignment=alignment)
            (sent / name).write_bytes(written(writer))
            wanted = read(chain, 0, chain.size)
        below = None
        for path in [sent / one for one in names[: number + 1]]:
            top = pyvhdi.file()
            top.open(str(path))
            if below is not None:
                top.set_parent(below)
            below = top
        # It gets a read over several blocks of a child wrong.
        found = b"".join(top.read_buffer_at_offset(min(UNIT, len(DISK) - at), at) for at in range(0, len(DISK), UNIT))
        assert found == wanted
        faults = checking.check(sent / name, chain=True)
        assert {fault.code for fault in faults} <= {"F44"}, "the parent's file is another one than was read"
