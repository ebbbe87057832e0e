"""What each program writes into a file system, and what it must never touch: on images alone, without a VM."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import struct

import pytest

from hvmgr import errors
from hvmgr.host import mtools, ntfs_library
from hvmgr.host.image_export import Link
from hvmgr.model.put_options import PutOptions
from hvmgr.operations.inside import arranging, asleep, kernel_writing, looking, putting, sources, views, writing
from hvmgr.operations.inside.browsing import Found
from hvmgr.storage import images
from hvmgr.storage.filesystems.reader import Node, Type
from tests.storage import file_trees, test_lvm

REPLACING = PutOptions(overwrite=True)


def made(image, size, *command):
    with image.open("wb") as file:
        file.truncate(size)
    file_trees.run(*command, image)
    return image


@pytest.fixture
def fat(tmp_path, require_program):
    require_program("mcopy")
    require_program("mkfs.fat")
    return made(tmp_path / "fat", 4 << 20, "mkfs.fat")


@pytest.fixture
def ntfs(tmp_path, require_program):
    require_program("mkntfs")
    return made(tmp_path / "ntfs", 4 << 20, "mkntfs", "-q", "-F", "-Q")


def put(image, items, folder=b"/", manner=REPLACING):
    """The items are in the file system that the image is, and read back as they were ordered."""
    disk = views.of_image(image, "raw")
    with looking.opened([disk]) as inside:
        browser = inside.choose(b"/")
        writer = writing.find(browser.volume.kind, browser.volume.title)
        arranged = arranging.arrange(browser, folder, items, manner)
        acts = writing.within(arranged.acts, *writer.times(browser))
        writer.require(acts, browser)
    writer.write(image, acts, image.parent, lambda _: None)
    one = putting._Putting(browser.volume, looking.Place(disk, 0, browser.volume.size), acts, writer)
    one._require_written((Link(image, images.RAW),), image.parent)
    return arranged


def host_file(folder, name, content="new", time=None):
    (folder / "put").mkdir(exist_ok=True)
    path = folder / "put" / name
    path.write_text(content)
    if time is not None:
        os.utime(path, (time, time))
    return path


def put_files(image, *files, **more):
    return put(image, sources.of_host(files).items, **more)


def read(image, *paths):
    with looking.opened([views.of_image(image, "raw")]) as inside:
        browser = inside.choose(b"/")
        return [
            b"".join(bytes(piece) for _, piece in browser.content(browser.find(one)).pieces()).decode() for one in paths
        ]


def node(image, path):
    with looking.opened([views.of_image(image, "raw")]) as inside:
        browser = inside.choose(b"/")
        found = browser.find(path).node
        return found, dict(browser.reader.extras(found))


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_short_name_on_fat_leads_to_no_other_file(fat, tmp_path):
    long, short = host_file(tmp_path, "LongFileName.txt", "the long one"), host_file(tmp_path, "longfi~1.txt")
    put_files(fat, long)
    with pytest.raises(errors.Conflict, match=r"short name \(8.3\) of 'LongFileName.txt'"):
        put_files(fat, short)
    assert read(fat, b"/LongFileName.txt") == ["the long one"]
    with pytest.raises(errors.Unsupported, match="may become the short name"):
        put_files(fat, host_file(tmp_path, "Another long one"), host_file(tmp_path, "ANOTHE~1"))
    put_files(fat, host_file(tmp_path, "ANOTHE~1"))
    put_files(fat, host_file(tmp_path, "LONGFILENAME.TXT", "replaced"))
    assert read(fat, b"/LongFileName.txt", b"/ANOTHE~1") == ["replaced", "new"]


def test_names_on_fat_with_letters_beyond_ascii(fat, tmp_path):
    names = ("é.txt", "Größe.txt", "ß", "日本.txt", "Ā— a longer name", "ΑΒΓ.txt", "voilà, a longer name")
    for name in names:
        put_files(fat, host_file(tmp_path, name, f"this is {name}"))
    put_files(fat, host_file(tmp_path, "Größe.txt", "replaced"))
    wanted = ["replaced" if name == "Größe.txt" else f"this is {name}" for name in names]
    assert read(fat, *(f"/{name}".encode() for name in names)) == wanted


@pytest.mark.parametrize(
    "name", ["à.txt", "ünï", "a….txt", "ǈ", "x©", "three dots … in a long one", "😀", "a long name with 😀", "a[b].txt"]
)
def test_a_name_that_mtools_cannot_write_is_refused_before_it_is_tried(fat, tmp_path, name):
    """It hangs on some of them."""
    before = fat.read_bytes()
    with pytest.raises(errors.Unsupported, match="mtools"):
        put_files(fat, host_file(tmp_path, name))
    assert fat.read_bytes() == before


def test_mtools_itself_replaces_nothing_unasked(fat, tmp_path):
    put_files(fat, host_file(tmp_path, "LongFileName.txt", "the long one"))
    source = str(host_file(tmp_path, "other"))
    for name in ("LONGFI~1.TXT", "longfilename.TXT"):
        with contextlib.suppress(errors.HostFailed):
            mtools.write(fat, f"/{name}", source, replaces=False)
        assert read(fat, b"/LongFileName.txt") == ["the long one"]


def library(image, function, *words):
    """A function of libntfs-3g that takes a file, its folder, and more, and closes both."""
    with ntfs_library._opened(str(image)) as one:
        folder = one._open(one._volume, 5)
        file = one._open(one._volume, one._look(folder, "LongFileName.txt"))
        types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, *(type(word) for word in words[1:]))
        assert ntfs_library._function(one._library, function, ctypes.c_int, *types)(file, folder, *words) == 0
        if function == "ntfs_link":
            one._close(file)
            one._close(folder)


def test_short_names_and_links_on_ntfs(ntfs, tmp_path):
    long = host_file(tmp_path, "LongFileName.txt", "the long one")
    put_files(ntfs, long)
    library(ntfs, "ntfs_set_ntfs_dos_name", b"LONGFI~1.TXT", ctypes.c_size_t(12), ctypes.c_int(0))
    born = node(ntfs, b"/LongFileName.txt")[0].born
    assert node(ntfs, b"/LongFileName.txt")[0].links == 1
    with pytest.raises(errors.Conflict, match=r"short name \(8.3\) of 'LongFileName.txt'"):
        put_files(ntfs, host_file(tmp_path, "longfi~1.TXT"))
    order = ntfs_library.Order(("LONGFI~1.TXT",), str(long), None, is_new=True)
    with pytest.raises(errors.HostFailed, match="File exists"):
        ntfs_library.write(ntfs, [order])
    assert put_files(ntfs, host_file(tmp_path, "LongFileName.txt", "later", time=2_000_000_000)).linked == []
    found, _ = node(ntfs, b"/LongFileName.txt")
    assert (found.born, found.modified, found.links) == (born, 2_000_000_000_000_000_000, 1)
    library(ntfs, "ntfs_link", "same".encode("utf-16-le"), ctypes.c_uint8(4))
    arranged = put_files(ntfs, host_file(tmp_path, "LongFileName.txt", "last"))
    assert (arranged.linked, writing.find(looking.Kind.NTFS, "").writes_in_place) == ([b"/LongFileName.txt"], True)
    assert read(ntfs, b"/LongFileName.txt", b"/same") == ["last", "last"]  # as Windows writes it, and as is said


def test_what_windows_calls_attributes_comes_back(ntfs, tmp_path):
    (item,) = sources.of_host([host_file(tmp_path, "hidden")]).items
    put(ntfs, [item])
    (_, extras) = node(ntfs, b"/hidden")
    wanted = {**extras, "system.ntfs_attrib": struct.pack("<I", 0x26)}
    put(ntfs, [dataclasses.replace(item, extras=wanted)], manner=PutOptions(overwrite=True, as_before=True))
    found, extras = node(ntfs, b"/hidden")
    assert (found.attributes, extras["system.ntfs_acl"]) == (("hidden", "system", "archive"), wanted["system.ntfs_acl"])


def test_what_reads_back_with_other_attributes_is_refused(ntfs, tmp_path, monkeypatch):
    (item,) = sources.of_host([host_file(tmp_path, "hidden")]).items
    put(ntfs, [item])
    wish = dataclasses.replace(item, extras=node(ntfs, b"/hidden")[1] | {"system.ntfs_attrib": struct.pack("<I", 2)})
    order = writing._order
    monkeypatch.setattr(
        writing, "_order", lambda *words, **more: dataclasses.replace(order(*words, **more), attributes=None)
    )
    with pytest.raises(errors.HostFailed, match=r"another system\.ntfs_attrib; nothing was changed"):
        put(ntfs, [wish], manner=PutOptions(overwrite=True, as_before=True))


def test_what_only_a_dictionary_takes_for_the_same_stays(ntfs, tmp_path):
    put_files(ntfs, host_file(tmp_path, "Straße"), host_file(tmp_path, "Strasse", "double"))
    put_files(ntfs, host_file(tmp_path, "STRASSE", "replaced"))
    assert read(ntfs, "/Straße".encode(), b"/Strasse") == ["new", "replaced"]


# --- times, quotas ----------------------------------------------------------------------------------------------------


def test_times_that_a_file_system_cannot_keep_become_the_nearest(fat, tmp_path):
    put_files(fat, host_file(tmp_path, "old", time=5), host_file(tmp_path, "late", time=5_000_000_000))
    assert read(fat, b"/old", b"/late") == ["new", "new"]
    assert [node(fat, one)[0].modified // 10**9 for one in (b"/old", b"/late")] == [315_532_800, 4_354_819_198]


@pytest.mark.parametrize(
    ("options", "last"), [(("-I", "128"), 2**31 - 1), (("-I", "256", "-O", "quota"), 2**33)], ids=["small", "quota"]
)
def test_ext_with_small_inodes_and_with_quotas(tmp_path, require_program, options, last):
    require_program("debugfs")
    (tmp_path / "tree").mkdir()
    image = file_trees.ext(tmp_path / "ext", tmp_path / "tree", "-t", "ext4", *options, size="4M")
    put_files(image, host_file(tmp_path, "old", time=-5), host_file(tmp_path, "late", "x" * 9000, time=2**33))
    assert [node(image, one)[0].modified // 10**9 for one in (b"/old", b"/late")] == [0, last]
    file_trees.run("e2fsck", "-f", "-n", image)


# --- what sleeps, what has a copy -------------------------------------------------------------------------------------


def swap(image, mark):
    page = bytearray(80 << 10)
    page[4086 : 4086 + len(mark)] = mark
    image.write_bytes(page)
    return image


@pytest.mark.parametrize("mark", [b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001"])
def test_a_linux_that_sleeps_on_another_disk_is_left_alone(fat, tmp_path, mark):
    disks = [views.of_image(fat, "raw"), views.of_image(swap(tmp_path / "swap", mark), "raw")]
    with looking.opened(disks) as inside, pytest.raises(errors.Conflict, match="sleeps, with its file systems"):
        asleep.require_awake(inside, looking.Kind.FAT)


def test_one_that_is_awake_and_one_in_a_logical_volume(fat, tmp_path):
    disks = [views.of_image(fat, "raw"), views.of_image(swap(tmp_path / "swap", b"SWAPSPACE2"), "raw")]
    with looking.opened(disks) as inside:
        asleep.require_awake(inside, looking.Kind.FAT)
    disk = bytearray(test_lvm.physical(test_lvm.UUID, test_lvm.METADATA.encode()).data)
    disk[(2 << 20) + 4086 : (2 << 20) + 4096] = b"S1SUSPEND\0"
    (tmp_path / "lvm").write_bytes(disk)
    disks = [views.of_image(tmp_path / "lvm", "raw")]
    with looking.opened(disks) as inside, pytest.raises(errors.Conflict, match="volume group/whole sleeps"):
        asleep.require_awake(inside, looking.Kind.EXT4)


def test_a_windows_that_sleeps_has_its_other_volumes_in_memory(ntfs, fat, tmp_path):
    put_files(ntfs, host_file(tmp_path, "hiberfil.sys", "\0" * 9000))
    disks = [views.of_image(fat, "raw"), views.of_image(ntfs, "raw")]
    with looking.opened(disks) as inside:
        asleep.require_awake(inside, looking.Kind.FAT)
    put_files(ntfs, host_file(tmp_path, "hiberfil.sys", "HIBR" + "\0" * 9000))
    with looking.opened(disks) as inside:
        asleep.require_awake(inside, looking.Kind.EXT4)
        with pytest.raises(errors.Conflict, match=r"the Windows of ntfs sleeps \(hiberfil.sys\)"):
            asleep.require_awake(inside, looking.Kind.FAT)


def with_metadata(image, at):
    with image.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<I", 0xA92B4EFC))
    return image


@pytest.mark.parametrize("at", [(4 << 20) - (64 << 10), (4 << 20) - (8 << 10)], ids=["0.90", "1.0"])
def test_one_leg_of_a_mirror_is_not_written(fat, at):
    with looking.opened([views.of_image(fat, "raw")]) as inside:
        assert inside.place(inside.volumes[0]).start == 0
    disks = [views.of_image(with_metadata(fat, at), "raw")]
    with looking.opened(disks) as inside, pytest.raises(errors.Unsupported, match="part of a RAID"):
        inside.place(inside.volumes[0])


def test_what_the_partition_table_calls_a_raid_is_not_written(fat, tmp_path, require_program):
    require_program("sfdisk")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20) + fat.read_bytes() + bytes(1 << 20))
    for kind, is_refused in (("fd", True), ("42", True), ("c", False)):
        file_trees.run("sfdisk", "-q", disk, input=f"label: dos\nstart=2048,size=8192,type={kind}\n".encode())
        with looking.opened([views.of_image(disk, "raw")]) as inside:
            if not is_refused:
                assert inside.place(inside.volumes[0]).start == 1 << 20
                continue
            with pytest.raises(errors.Unsupported, match="part of a RAID"):
                inside.place(inside.volumes[0])


def test_the_origin_of_a_snapshot_and_a_mirror_below_lvm_are_not_written(tmp_path):
    snapshot = """snap { id = "5" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
segment1 { start_extent = 0 extent_count = 2 type = "snapshot" chunk_size = 8 origin = "whole" cow_store = "hidden" } }
hidden {"""
    image = tmp_path / "lvm"
    for text, mark, said in (
        (test_lvm.METADATA, 0, "part of a RAID"),
        (test_lvm.METADATA.replace("hidden {", snapshot), None, "a snapshot of it"),
    ):
        image.write_bytes(test_lvm.physical(test_lvm.UUID, text.encode()).data)
        with looking.opened([views.of_image(image, "raw")]) as inside:
            (whole,) = [one for one in inside.volumes if one.logical == "group/whole"]
            assert mark is None or inside.place(whole).start == 2 << 20
        if mark is not None:
            with_metadata(image, (8 << 20) - (64 << 10))
        with looking.opened([views.of_image(image, "raw")]) as inside:
            (whole,) = [one for one in inside.volumes if one.logical == "group/whole"]
            with pytest.raises(errors.Unsupported, match=said):
                inside.place(whole)


# --- the script of the small machine ----------------------------------------------------------------------------------


def script(act, *, with_owners=True):
    return "".join(kernel_writing._script([act], [0], with_owners=with_owners))


def test_the_machine_is_told_everything_that_is_to_stay(tmp_path):
    (item,) = sources.of_host([host_file(tmp_path, "file")]).items
    old = Found(b"/file", Node(1, 1, Type.FILE, 3))
    extras = {"security.capability": b"\1\2"}
    kept = arranging.Act(b"/file", item, 0o640, 1, 2, 5, extras, old)
    assert "rm -f" not in script(kept)
    assert script(kept).index("chown") < script(kept).index("-n 'security.capability' -v 0x0102")
    before = script(dataclasses.replace(kept, anew=True, inherits=True))
    assert before.index("rm -f") < before.index("-x system.posix_acl_access") < before.index("-n 'security.capability'")
    link = dataclasses.replace(item, type=Type.LINK, target=b"-rf", source=None)
    assert "ln -s -- '-rf' './file'" in script(arranging.Act(b"/file", link, 0, 0, 0, None, {}))
    new = arranging.Act(b"/file", item, 0o640, 1, 2, 5, {})
    assert "is there already" in script(new, with_owners=False)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (
            "mount: mount: mounting failed: Invalid argument XFS (vda): unknown incompatible features",
            errors.Unsupported,
        ),
        ("mount: Structure needs cleaning", errors.Corrupt),
        ("mkdir: No space left on device", errors.NoSpace),
        ("chown: no", errors.HostFailed),
    ],
)
def test_what_the_kernel_says_is_understood(words, kind):
    assert isinstance(kernel_writing.KernelWriter("xfs", keeps_owners=True)._explained(words), kind)
