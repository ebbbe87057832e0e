"""Files out of ext file systems that mke2fs makes, compared with what went in; damaged ones are refused."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest

from hvmgr import errors
from hvmgr.storage import ext, partitions

START = 1 << 16
KINDS = {
    "ext2-1k": ["-t", "ext2", "-b", "1024"],
    "ext3": ["-t", "ext3", "-b", "1024"],
    "ext4": ["-t", "ext4"],
    "ext4-32bit": ["-t", "ext4", "-O", "^64bit,^metadata_csum", "-I", "128"],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Small and large files, one with holes, a folder of many, links of every sort."""
    root = tmp_path_factory.mktemp("tree")
    (root / "etc").mkdir()
    (root / "etc" / "small").write_bytes(b"hello")
    (root / "large").write_bytes(os.urandom(700_001))
    with (root / "holes").open("wb") as file:
        for at in (0, 300_000, 2_000_000):
            file.seek(at)
            file.write(b"here")
    (root / "many").mkdir()
    for number in range(300):
        (root / "many" / f"a-file-with-a-long-name-{number:04}").touch()
    (root / "short").symlink_to("etc/small")
    (root / "absolute").symlink_to("/etc")
    (root / "up").symlink_to("../../../etc/small")
    (root / "far").symlink_to("./" * 40 + "large")
    (root / "circle").symlink_to("circle")
    (root / "other" / "in").mkdir(parents=True)
    (root / "other" / "small").write_bytes(b"the other one")
    (root / "folder").symlink_to("other/in")
    (root / "back").symlink_to("folder/../small")
    (root / "small").write_bytes(b"at the root")
    return root


@pytest.fixture(params=KINDS)
def volume(request, tree, tmp_path, require_program):
    program = require_program("mke2fs")
    path = tmp_path / "disk"
    command = [program, "-q", "-F", *KINDS[request.param], "-d", tree, "-E", f"offset={START}", path, "12m"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture
def system():
    """``system(path)``: the file system in a disk."""
    with contextlib.ExitStack() as stack:
        yield lambda path: ext.FileSystem(stack.enter_context(partitions.File(path)), START, "the volume")


def test_reads_what_is_there(volume, tree, system):
    found = system(volume)
    for name in ("etc/small", "large", "holes"):
        assert found.read(f"/{name}") == (tree / name).read_bytes()
    assert found.listing("/many") == sorted(one.name for one in (tree / "many").iterdir())
    assert found.read("/short") == found.read("/absolute/small") == found.read("/up") == b"hello"
    for name in ("/folder/../small", "/back"):  # as the kernel finds it
        assert found.read(name) == (tree / name[1:]).read_bytes() == b"the other one"
    assert found.read("/far") == (tree / "large").read_bytes()
    for name in ("/circle", "/nothing", "/etc/small/below", "/etc"):
        assert found.read(name) is None
    assert not found.exists("/nothing")
    assert found.listing("/large") == []


def test_journal_that_waits_is_refused(volume, system):
    with volume.open("r+b") as file:
        file.seek(START + 1024 + 96)
        flags = file.read(1)[0]
        file.seek(START + 1024 + 96)
        file.write(bytes([flags | 4]))
    with pytest.raises(errors.Conflict, match="not unmounted cleanly"):
        system(volume)


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_said_and_never_a_defect(volume, seed, system):
    """Random bytes over the metadata: an error of ours, or data; nothing else."""
    import random

    chance = random.Random(seed)
    with volume.open("r+b") as file:
        for _ in range(200):
            file.seek(START + 1024 + chance.randrange(200_000))
            file.write(chance.randbytes(2))
    try:
        found = system(volume)
        for name in ("/etc/small", "/large", "/holes", "/far", "/many/none"):
            found.read(name)
        found.listing("/many")
    except errors.HvmgrError:
        pass


def test_other_file_system_is_unsupported(tmp_path, system):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with pytest.raises(errors.Unsupported):
        system(tmp_path / "disk")
