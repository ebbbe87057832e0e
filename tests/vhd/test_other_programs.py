"""What others wrote is read, what is written others read: qemu-img for whole disks, libvhdi for chains, real samples."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create, write_image
from hvmgr.vhd.format import Kind
from hvmgr.vhd.image import open_image
from hvmgr.vhd.reshaping import merge, resize
from hvmgr.vhd.source import RawSource, read
from hvmgr.vhd.structure import identify
from tests.vhd.disks import KIB, MIB, SAMPLES, content, make_chain, scribble

pyvhdi = pytest.importorskip("pyvhdi", reason="libvhdi-python is missing: make setup installs it")


@pytest.fixture
def qemu_img(require_program):
    program = require_program("qemu-img")

    def run(*arguments):
        command = [program, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    return run


def by_libvhdi(paths: list[Path], size: int) -> bytes:
    """The last of a chain as libvhdi shows it. It is read block by block: a read over several blocks it gets wrong."""
    opened = []
    for path in paths:
        one = pyvhdi.file()
        one.open(str(path))
        if opened:
            one.set_parent(opened[-1])
        opened.append(one)
    top = opened[-1]
    assert top.get_media_size() == size
    step = 512 * KIB
    data = b"".join(top.read_buffer_at_offset(min(step, size - at), at) for at in range(0, size, step))
    for one in reversed(opened):
        one.close()
    return data


@pytest.mark.parametrize("kind", [Kind.FIXED, Kind.DYNAMIC])
@pytest.mark.parametrize("size", [4 * MIB, 5_000_192])
def test_qemu_reads_what_is_written(tmp_path: Path, qemu_img, kind: Kind, size: int) -> None:
    path, model = tmp_path / "disk.vhd", bytearray(size)
    create(path, size, kind=kind)
    with open_chain(path, writable=True) as disk:
        scribble(disk, model, 1)
    qemu_img("convert", "-f", "vpc", "-O", "raw", path, tmp_path / "disk.raw")
    assert (tmp_path / "disk.raw").read_bytes() == model


@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_what_qemu_wrote_is_read_and_copied(tmp_path: Path, qemu_img, subformat: str) -> None:
    model = bytearray(6 * MIB)
    model[MIB : MIB + 700] = b"qemu" * 175
    (tmp_path / "raw").write_bytes(model)
    path = tmp_path / "disk.vhd"
    qemu_img("convert", "-O", "vpc", "-o", f"subformat={subformat},force_size=on", "-f", "raw", tmp_path / "raw", path)
    assert identify(path) == subformat
    assert content(path) == model
    with open_chain(path) as disk:
        assert disk.faults == ()
        write_image(tmp_path / "copy.vhd", disk, kind=Kind.DYNAMIC)
    assert qemu_img("compare", "-f", "vpc", "-F", "raw", tmp_path / "copy.vhd", tmp_path / "raw")
    with open_chain(path, writable=True) as disk:
        scribble(disk, model, 5)
    assert content(path) == model
    qemu_img("convert", "-f", "vpc", "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == model


def test_qemu_reads_what_was_merged_and_resized(tmp_path: Path, qemu_img) -> None:
    paths, shown = make_chain(tmp_path, 3)
    with open_chain(paths[-1]) as disk:
        merge(disk, 2)
    resize(paths[0], 300 * MIB)
    qemu_img("convert", "-f", "vpc", "-O", "raw", paths[0], tmp_path / "raw")
    with RawSource(tmp_path / "raw") as raw:
        assert raw.size == 300 * MIB
        assert read(raw, 0, 4 * MIB) == shown[2].ljust(4 * MIB, b"\0")
        assert [one for one in raw.stretches(4 * MIB) if one.data] == []


@pytest.mark.parametrize("block_size", [512 * KIB, 2 * MIB])
def test_libvhdi_reads_chains(tmp_path: Path, block_size: int) -> None:
    paths, shown = make_chain(tmp_path, 4, unit=4096, block_size=block_size)
    for number in range(4):
        assert by_libvhdi(paths[: number + 1], 3 * MIB) == shown[number]


def test_what_libvhdi_says_of_a_child(tmp_path: Path) -> None:
    paths, _ = make_chain(tmp_path, 2, unit=4096)
    child = pyvhdi.file()
    child.open(str(paths[1]))
    assert child.get_parent_filename() == "disk0.vhd"
    with open_image(paths[0]) as parent:
        assert child.get_parent_identifier().replace("-", "") == parent.uid.hex()
    child.close()


# --- samples ---

CLEAN = ["dfvfs-ext2.vhd", "dfvfs-fat-differential.vhd"]
WRONG_SUMS = {"dfvfs-image.vhd": ["F6"], "dfvfs-image-differential.vhd": ["F6", "F22", "F41"]}


@pytest.fixture
def sample():
    def find(name: str) -> Path:
        if not (SAMPLES / name).is_file():
            pytest.skip(f"the sample {name} is not beside the checkout")
        return SAMPLES / name

    return find


@pytest.mark.parametrize("name", CLEAN)
def test_clean_sample_has_no_fault(sample, name: str) -> None:
    with open_image(sample(name)) as image:
        assert image.structure.faults == ()


@pytest.mark.parametrize("name", WRONG_SUMS)
def test_sample_with_wrong_sums_is_read_on_demand_only(sample, name: str) -> None:
    with pytest.raises(errors.Corrupt, match="checksum"):
        open_image(sample(name))
    with open_image(sample(name), tolerant=True) as image:
        assert [one.code for one in image.structure.faults] == WRONG_SUMS[name]


def test_sample_with_ext2_is_as_qemu_reads_it(sample, qemu_img, tmp_path: Path) -> None:
    path = sample("dfvfs-ext2.vhd")
    qemu_img("convert", "-f", "vpc", "-O", "raw", path, tmp_path / "raw")
    data = content(path)
    assert data == (tmp_path / "raw").read_bytes()
    assert data[1080:1082] == b"\x53\xef"


def test_sample_of_a_chain_is_as_libvhdi_reads_it(sample) -> None:
    parent, child = sample("dfvfs-image.vhd"), sample("dfvfs-image-differential.vhd")
    assert content(child, tolerant=True, parent=parent) == by_libvhdi([parent, child], 104_448)


def test_sample_of_windows_10(sample) -> None:
    with open_image(sample("dfvfs-fat-differential.vhd")) as image:
        assert image.kind is Kind.DIFFERENCING
        assert image.size == 4 * MIB
        assert [text.text for text in image.structure.texts] == [
            "C:\\Projects\\dfvfs\\test_data\\fat-parent.vhd",
            ".\\fat-parent.vhd",
        ]
        held = [one for one in image.extents() if one.is_held]
        assert sum(one.length for one in held) == 18 * 512
        assert held[0].position % 512 == 0
    with pytest.raises(errors.NotFound, match=r"'fat-parent\.vhd' was not found; tried: "):
        open_chain(sample("dfvfs-fat-differential.vhd"))
