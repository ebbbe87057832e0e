"""Images that other programs made, where they are at hand: what they say, and what is found wrong with them."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.vhd import checking, repairing
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.format import Kind
from hvmgr.vhd.image import open_image
from hvmgr.vhd.stream_reader import StreamReader

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples"
pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples are not at hand")

CHECKS = {
    "dfvfs-ext2.vhd": [],
    "dfvfs-fat-differential.vhd": [],
    "dfvfs-image.vhd": [("F6", 2099712), ("F34", 2048)],
    "dfvfs-image-differential.vhd": [("F6", 2099712), ("F22", 512), ("F41", None), ("F34", 2048)],
}
FACTS = {
    "dfvfs-ext2.vhd": (Kind.DYNAMIC, 4212736, b"qemu", (121, 4, 17), 2 << 20, "", []),
    "dfvfs-fat-differential.vhd": (
        Kind.DIFFERENCING,
        4 << 20,
        b"win ",
        (120, 4, 17),
        2 << 20,
        r"C:\Projects\dfvfs\test_data\fat-parent.vhd",
        [("W2ku", r"C:\Projects\dfvfs\test_data\fat-parent.vhd"), ("W2ru", r".\fat-parent.vhd")],
    ),
    "dfvfs-image.vhd": (Kind.DYNAMIC, 104448, b"qemu", (3, 4, 17), 2 << 20, "", []),
    "dfvfs-image-differential.vhd": (Kind.DIFFERENCING, 104448, b"qemu", (3, 4, 17), 2 << 20, "image.vhd", []),
}


@pytest.mark.parametrize("name", CHECKS)
def test_check_says_what_is_wrong(name) -> None:
    assert [(fault.code, fault.offset) for fault in checking.check(SAMPLES / name)] == CHECKS[name]


@pytest.mark.parametrize("name", FACTS)
def test_facts(name) -> None:
    with open_image(SAMPLES / name, tolerant=True) as image:
        geometry, header = image.footer.geometry, image.header
        facts = (
            image.kind,
            image.size,
            image.footer.creator,
            (geometry.cylinders, geometry.heads, geometry.sectors),
            image.block_size,
            header.name,
            [(text.code, text.text) for text in image.structure.texts],
        )
        assert facts == FACTS[name]


def test_missing_parent_is_named() -> None:
    found = checking.check(SAMPLES / "dfvfs-fat-differential.vhd", chain=True)
    assert [fault.code for fault in found] == ["F42"]
    assert "fat-parent.vhd" in found[0].text


def test_chain_reads_over_wrong_checksums_only_when_told() -> None:
    path, parent = SAMPLES / "dfvfs-image-differential.vhd", SAMPLES / "dfvfs-image.vhd"
    with pytest.raises(errors.Corrupt, match="checksum"):
        open_chain(path, parent=parent)
    with open_chain(path, parent=parent, tolerant=True) as chain:
        assert {fault.code for fault in chain.faults} >= {"F6", "F22"}
        data = bytearray(chain.size)
        chain.read_into(0, memoryview(data))
    assert data[1024 + 56 : 1024 + 58] == b"\x53\xef", "an ext2 file system"


@pytest.mark.parametrize("name", ["dfvfs-ext2.vhd", "dfvfs-fat-differential.vhd"])
def test_sound_sample_is_a_stream(name) -> None:
    path = SAMPLES / name
    with open_image(path) as image:
        wanted = bytearray(image.size)
        image.read_into(0, memoryview(wanted))
    got = bytearray(image.size)
    for offset, piece in StreamReader(io.BytesIO(path.read_bytes())):
        got[offset : offset + len(piece)] = piece
    assert hashlib.sha256(got).digest() == hashlib.sha256(wanted).digest()


def test_damaged_sample_is_no_stream() -> None:
    with pytest.raises(errors.Corrupt, match="checksum"):
        StreamReader(io.BytesIO((SAMPLES / "dfvfs-image.vhd").read_bytes()))


def test_checksums_of_a_sample_are_put_right(tmp_path: Path) -> None:
    path = tmp_path / "image.vhd"
    shutil.copyfile(SAMPLES / "dfvfs-image.vhd", path)
    assert [fault.code for fault in repairing.repair(path)] == ["F6"]
    assert [fault.code for fault in checking.check(path)] == ["F34"]
    changed = [
        at
        for at, (one, other) in enumerate(
            zip(path.read_bytes(), (SAMPLES / "dfvfs-image.vhd").read_bytes(), strict=True)
        )
        if one != other
    ]
    assert {at % 2099712 for at in changed} <= {64, 65, 66, 67}


def test_header_of_a_sample_needs_a_guess(tmp_path: Path) -> None:
    path = tmp_path / "image.vhd"
    shutil.copyfile(SAMPLES / "dfvfs-image-differential.vhd", path)
    with pytest.raises(errors.Corrupt, match="header"):
        repairing.repair(path)
