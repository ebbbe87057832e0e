"""New image files: empty ones and copies of disks, in every format; complete or not there, and never in another's place."""

from __future__ import annotations

import json
import subprocess

import pytest

import hvmgr
from hvmgr import ImageFormat, ImageOptions, errors, vhd
from hvmgr.host import storage_daemon
from tests.operations.images.conftest import filled

MIB = 1 << 20
ALL = ["vhd", "vhdx", "qcow2", "raw"]


def told(path, fmt):
    """What qemu-img says of an image."""
    command = ["qemu-img", "info", "--output=json", "-f", fmt, path]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


class TestCreate:
    @pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
    @pytest.mark.parametrize("fmt", ALL)
    def test_empty_image_has_exactly_the_size(self, folder, fmt, fixed):
        made = folder.images.create(folder / f"new.{fmt}", 3 * MIB, ImageOptions(fixed=fixed))
        assert (made.format, made.size) == (fmt, 3 * MIB)
        assert told(made.path, fmt.replace("vhd", "vpc").replace("vpcx", "vhdx"))["virtual-size"] == 3 * MIB
        assert folder.names() == {f"new.{fmt}"}
        assert made.path.stat().st_mode & 0o077 == 0

    def test_child_of_a_vhd_is_a_vhd_that_names_it(self, folder):
        folder.images.create(folder / "base.vhd", 3 * MIB)
        made = folder.images.create(folder / "child.avhd", options=ImageOptions(parent=folder / "base.vhd"))
        assert (made.type, made.size, made.parent.path) == ("differencing", 3 * MIB, folder / "base.vhd")
        assert vhd.identify(made.path) is vhd.Kind.DIFFERENCING

    def test_child_of_qcow2_has_a_relative_name_and_a_stated_format(self, folder):
        folder.images.create(folder / "base.qcow2", 3 * MIB)
        made = folder.images.create(folder / "child.qcow2", options=ImageOptions(parent=folder / "base.qcow2"))
        header = told(made.path, "qcow2")
        assert (header["backing-filename"], header["backing-filename-format"]) == ("base.qcow2", "qcow2")

    @pytest.mark.parametrize(
        ("name", "size", "options", "error"),
        [
            pytest.param("a.vhd", 0, {}, errors.UsageError, id="nothing"),
            pytest.param("a.vhd", MIB + 1, {}, errors.UsageError, id="odd"),
            pytest.param("a.vhd", 2041 << 30, {}, errors.Unsupported, id="over-2040-gib"),
            pytest.param("a.vhdx", 65 << 40, {}, errors.Unsupported, id="over-64-tib"),
            pytest.param("a.vhd", None, {}, errors.UsageError, id="no-size"),
            pytest.param("a.tar", MIB, {}, errors.UsageError, id="suffix-says-nothing"),
            pytest.param("nowhere/a.vhd", MIB, {}, errors.NotFound, id="no-folder"),
            pytest.param("base.raw", MIB, {}, errors.Conflict, id="exists"),
            pytest.param("a.vhd", None, {"parent": "base.raw"}, errors.Unsupported, id="raw-parent"),
            pytest.param("a.vhd", None, {"parent": "base.qcow2"}, errors.Unsupported, id="qcow2-parent"),
            pytest.param("a.vhdx", None, {"parent": "base.vhd"}, errors.Unsupported, id="vhdx-child"),
            pytest.param("a.qcow2", None, {"parent": "child.vhd"}, errors.Unsupported, id="qcow2-on-differencing"),
            pytest.param("a.vhd", MIB, {"parent": "base.vhd"}, errors.UsageError, id="other-size-than-parent"),
            pytest.param("a.vhd", None, {"parent": "none.vhd"}, errors.NotFound, id="no-parent"),
            pytest.param("a.vhd", None, {"parent": "base.vhd", "fixed": True}, errors.UsageError, id="fixed-child"),
            pytest.param("a.vhd", MIB, {"block_size": 3 * MIB}, errors.UsageError, id="block-size"),
            pytest.param("a.raw", MIB, {"block_size": MIB}, errors.UsageError, id="raw-has-no-blocks"),
            pytest.param("a.vmdk", MIB, {"format": ImageFormat.VMDK}, errors.Unsupported, id="vmdk"),
        ],
    )
    def test_bad_wish_makes_nothing(self, folder, name, size, options, error):
        (folder / "base.raw").write_bytes(bytes(MIB))
        folder.images.create(folder / "base.qcow2", 3 * MIB)
        folder.images.create(folder / "base.vhd", 3 * MIB)
        folder.images.create(folder / "child.vhd", options=ImageOptions(parent=folder / "base.vhd"))
        before = folder.bytes_of_files()
        if "parent" in options:
            options = options | {"parent": folder / options["parent"]}
        with pytest.raises(error):
            folder.images.create(folder / name, size, ImageOptions(**options))
        assert folder.bytes_of_files() == before


class TestConvert:
    @pytest.mark.parametrize("target", [*ALL, "fixed.vhd"])
    @pytest.mark.parametrize("origin", ALL)
    def test_disk_stays_the_same(self, folder, origin, target):
        data = folder.raw("disk.raw")
        source = folder / f"from.{origin}"
        if origin == "raw":
            source = folder / "disk.raw"
        else:
            folder.images.convert(folder / "disk.raw", source)
        made = folder.images.convert(source, folder / f"to.{target}", ImageOptions(fixed="fixed" in target))
        assert made.size == len(data)
        assert folder.shown(made.path.name) == data
        if made.format == "vhd":
            assert folder.seen_by_qemu(made.path.name, "vpc") == data

    @pytest.mark.parametrize("target", [*ALL, "fixed.vhd"])
    @pytest.mark.parametrize("names", [["a.vhd", "b.avhd", "c.avhd"], ["a.qcow2", "b.qcow2"]], ids=["vhd", "qcow2"])
    def test_chain_becomes_one_image(self, folder, names, target):
        shown = folder.chain(*names)
        made = folder.images.convert(folder / names[-1], folder / f"to.{target}", ImageOptions(fixed="fixed" in target))
        assert folder.shown(made.path.name) == shown[-1]
        assert made.parent is None

    def test_parent_elsewhere_is_named(self, folder, tmp_path_factory):
        """Who made the image chose it: any file of the host."""
        folder.chain("a.qcow2", "b.qcow2")
        folder.images.convert(folder / "b.qcow2", folder / "to.raw")
        assert folder.notices == []
        place = tmp_path_factory.mktemp("elsewhere")
        (place / "secret").write_bytes(b"s" * (4 * MIB))
        command = ["qemu-img", "rebase", "-q", "-u", "-F", "raw", "-b", place / "secret", folder / "b.qcow2"]
        subprocess.run(command, check=True, timeout=60)
        folder.images.convert(folder / "b.qcow2", folder / "with.raw")
        assert len(folder.notices) == 1
        assert str(place / "secret") in folder.notices[0]

    @pytest.mark.parametrize("fmt", ["vhd", "qcow2"])
    def test_child_holds_only_what_differs(self, folder, fmt):
        data = folder.raw("base.raw", spots=20)
        folder.images.convert(folder / "base.raw", folder / f"base.{fmt}")
        changed = data[:MIB] + b"x" * 4096 + bytes(8192) + data[MIB + 12288 :]
        (folder / "new.raw").write_bytes(changed)
        options = ImageOptions(parent=folder / f"base.{fmt}")
        made = folder.images.convert(folder / "new.raw", folder / f"child.{fmt}", options)
        assert folder.shown(f"child.{fmt}") == changed
        assert made.taken < 1 * MIB

    def test_odd_size_is_kept_by_raw_and_refused_by_others(self, folder):
        (folder / "odd.raw").write_bytes(b"x" * 1000)
        assert folder.images.convert(folder / "odd.raw", folder / "same.raw").size == 1000
        with pytest.raises(errors.UsageError, match="sectors"):
            folder.images.convert(folder / "odd.raw", folder / "odd.vhd")

    def test_old_data_under_clear_bits_is_not_copied(self, folder):
        """QEMU shows it, ignoring the bitmap; a reader by the rules sees zeros."""
        folder.raw("disk.raw")
        folder.images.convert(folder / "disk.raw", folder / "disk.vhd")
        with vhd.open_image(folder / "disk.vhd") as image:
            block = next(iter(image.table.allocated()))
            place = image.table[block] * 512
        with (folder / "disk.vhd").open("r+b") as file:
            file.seek(place)
            file.write(bytes(512))
        with pytest.raises(errors.Unsupported, match="another way"):
            folder.images.create(folder / "child.qcow2", options=ImageOptions(parent=folder / "disk.vhd"))
        folder.images.convert(folder / "disk.vhd", folder / "disk.qcow2")
        assert folder.shown("disk.qcow2")[block * 2 * MIB : (block + 1) * 2 * MIB] == bytes(2 * MIB)

    def test_keep_id_keeps_it(self, folder):
        folder.images.create(folder / "one.vhd", 3 * MIB)
        made = folder.images.convert(folder / "one.vhd", folder / "two.vhd", ImageOptions(fixed=True, keep_id=True))
        other = folder.images.convert(folder / "one.vhd", folder / "three.vhd")
        assert made.id == folder.images.info(folder / "one.vhd").id != other.id

    def test_stated_source_format_wins_over_the_content(self, folder):
        folder.images.create(folder / "one.vhd", 3 * MIB)
        raw = (folder / "one.vhd").read_bytes()
        stated = ImageOptions(source_format=ImageFormat.RAW)
        made = folder.images.convert(folder / "one.vhd", folder / "two.raw", stated)
        assert (made.format, made.size) == ("raw", len(raw))
        assert (folder / "two.raw").read_bytes() == raw

    @pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
    def test_full_disk_leaves_nothing(self, small, fixed):
        small.raw("disk.raw", spots=40)
        before = small.bytes_of_files()
        with filled(small.path, MIB), pytest.raises(errors.NoSpace):
            small.images.convert(small / "disk.raw", small / "to.vhd", ImageOptions(fixed=fixed))
        assert small.bytes_of_files() == before

    def test_missing_parent_is_named_and_nothing_is_made(self, folder):
        folder.chain("base.vhd", "child.avhd")
        (folder / "base.vhd").unlink()
        with pytest.raises(errors.NotFound, match=r"base\.vhd"):
            folder.images.convert(folder / "child.avhd", folder / "to.qcow2")
        assert folder.names() == {"child.avhd"}

    def test_parent_in_another_folder_is_found_where_it_may_be_searched(self, folder):
        shown = folder.chain("base.vhd", "child.avhd")
        (folder / "other").mkdir()
        (folder / "base.vhd").rename(folder / "other" / "base.vhd")
        folder.images.convert(folder / "child.avhd", folder / "to.raw", ImageOptions(folders=(folder / "other",)))
        assert (folder / "to.raw").read_bytes() == shown[1]

    def test_qcow2_on_a_differencing_vhd_never_reaches_qemu(self, folder):
        folder.chain("base.vhd", "child.avhd")
        command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "child.avhd", "-F", "vpc"]
        subprocess.run([*command, folder / "top.qcow2", str(4 * MIB)], check=True, timeout=60)
        with pytest.raises(errors.Unsupported, match=r"differencing VHD of base\.vhd"):
            folder.images.convert(folder / "top.qcow2", folder / "to.raw")

    def test_image_that_is_being_written_is_not_copied(self, folder):
        """Nor is it made a parent: both would be a mix of two moments."""
        folder.raw("disk.raw")
        for name, fmt in (("disk.raw", "raw"), ("disk.vhd", "vpc"), ("disk.qcow2", "qcow2")):
            if name != "disk.raw":
                folder.images.convert(folder / "disk.raw", folder / name)
            with storage_daemon.started() as daemon:
                daemon.open(folder / name, fmt, writable=True)
                with pytest.raises(errors.Conflict, match="in use"):
                    folder.images.convert(folder / name, folder / "to.raw")
                with pytest.raises(errors.Conflict, match="in use"):
                    options = ImageOptions(parent=folder / name)
                    folder.images.create(folder / f"child.{'vhd' if fmt == 'vpc' else 'qcow2'}", options=options)
            assert not (folder / "to.raw").exists()

    def test_long_work_says_how_far_it_is(self, folder):
        folder.chain("a.vhd", "b.avhd")
        seen = []
        reporter = hvmgr.Reporter(progress=seen.append)
        with hvmgr.Host.open("test:///default", root=folder.host.root, reporter=reporter) as host:
            for target in ("to.vhd", "to.raw", "to.qcow2"):
                host.images.convert(folder / "b.avhd", folder / target)
                assert (seen[-1].done, seen[-1].what) == (seen[-1].total, f"write {target}")
            host.images.merge(folder / "b.avhd")
        assert (seen[-1].done, seen[-1].what) == (4 * MIB, "merge into a.vhd")
