"""Exports as one file: any tar reads it, and what comes out is the export."""

from __future__ import annotations

import os
import subprocess

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.model.manifest import Extent
from hvmgr.operations.exchange import export_

MIB = 1 << 20


@pytest.fixture
def unpack(bench):
    """``unpack(file)``: the folder that GNU tar makes of an archive."""

    def run(file):
        bench.out.mkdir(exist_ok=True)
        subprocess.run(["tar", "--zstd", "-xf", file, "-C", bench.out], check=True, timeout=60)
        return bench.out / "web"

    return run


def archive(bench, vm, **options):
    file = bench.place / "web.tar.zst"
    vm.export_archive(file, hvmgr.ExportOptions(**options))
    assert [path.name for path in bench.place.iterdir() if path.name.startswith(".")] == []
    assert file.stat().st_mode & 0o777 == 0o440
    return file


def test_archive_holds_the_export(bench, branched, unpack, untouched):
    seen, files = bench.photo(branched), untouched(branched)
    folder = unpack(archive(bench, branched))
    bench.check_export(folder)
    assert bench.photo_of_export(folder) == seen
    assert untouched(branched) == files
    bench.check(branched)


@pytest.mark.parametrize(
    "options",
    [{"snapshot": "two"}, {"keep": ("three",)}, {"snapshots": Extent.NONE}, {"config_only": True}],
    ids=str,
)
def test_what_is_made_beside_it_is_in_it(bench, branched, unpack, options):
    folder = unpack(archive(bench, branched, **options))
    assert bench.host.verify(folder) == []


def test_holes_stay_holes(bench, unpack):
    path = bench.place / "big.raw"
    with path.open("wb") as file:
        file.truncate(512 << 20)
        for offset in (0, 100 << 20, (512 << 20) - 4096):
            file.seek(offset)
            file.write(os.urandom(4096))
    vm = bench.make(bench.in_place(path))
    packed = archive(bench, vm)
    assert packed.stat().st_size < MIB
    folder = unpack(packed)
    assert bench.host.verify(folder) == []
    image = folder / "Virtual Hard Disks/hda.img"
    assert image.stat().st_size == 512 << 20
    assert image.stat().st_blocks * 512 < MIB
    bench.run("cmp", path, image)


def test_names_longer_than_an_old_tar_allows(bench, unpack):
    vm = bench.make(4, name="a-name-of-some-length")
    vm.create_snapshot("one")
    folder = unpack(archive(bench, vm)).with_name(vm.name)
    assert max(len(str(path.relative_to(bench.out))) for path in folder.rglob("*")) > 100
    bench.check_export(folder)


def test_pythons_tarfile_reads_it_too(bench, branched):
    import tarfile

    file = archive(bench, branched)
    plain = bench.place / "web.tar"
    bench.run("zstd", "-q", "-d", file, "-o", plain)
    with tarfile.open(plain) as one:
        one.extractall(bench.out, filter="tar")
        assert {member.uid for member in one.getmembers()} == {0}
    assert bench.host.verify(bench.out / "web") == []


def test_stream(bench, branched, unpack):
    file = bench.place / "stream"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    branched.export_archive(descriptor)
    os.close(descriptor)
    assert bench.host.verify(unpack(file)) == []


def test_reader_that_leaves_early_is_an_error(bench, branched):
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(errors.HostFailed, match="zstd"):
        branched.export_archive(writer)
    os.close(writer)
    bench.check(branched)


def test_existing_file_is_never_replaced(bench):
    vm = bench.make(4)
    (bench.place / "web.tar.zst").write_text("mine")
    with pytest.raises(errors.Conflict, match="exists already"):
        archive(bench, vm)
    assert (bench.place / "web.tar.zst").read_text() == "mine"


def test_failure_leaves_nothing(bench, branched, monkeypatch):
    from hvmgr.storage import tar

    def fail(*_, **__):
        raise errors.HostFailed("no")

    monkeypatch.setattr(tar.Writer, "file", fail)
    before = set(bench.place.iterdir())
    with pytest.raises(errors.HostFailed):
        archive(bench, branched, snapshots=Extent.NONE)
    assert set(bench.place.iterdir()) == before


def test_file_that_somebody_else_makes_meanwhile(bench, branched, monkeypatch):
    file, run = bench.place / "web.tar.zst", export_.run

    def late(*args):
        file.write_text("theirs")
        run(*args)

    monkeypatch.setattr(export_, "run", late)
    with pytest.raises(errors.Conflict, match="exists already"):
        branched.export_archive(file)
    assert file.read_text() == "theirs"
    assert [one.name for one in bench.place.iterdir() if "web.tar.zst" in one.name] == [file.name]
