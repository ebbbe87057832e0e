"""Which files differ: on real file systems of every kind that is read, whose changes the test made itself and knows."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvmgr.model.ranges import Ranges
from hvmgr.operations.inside import comparison, contents, differing, index_walk, indexing, looking, searching, views
from hvmgr.operations.inside.browsing import DAMAGED, Browser
from hvmgr.storage import file_index
from hvmgr.storage.filesystems import opening, reader, signatures
from hvmgr.storage.filesystems.reader import Runs, Type
from hvmgr.storage.filesystems.window import Run
from hvmgr.storage.partitions import File
from tests.storage import file_trees, moments, test_lvm

BIG = file_trees.pattern(3 << 20)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree that every file system can hold, XFS' protofiles included."""
    folder = tmp_path_factory.mktemp("tree") / "tree"
    (folder / "etc").mkdir(parents=True)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "many").mkdir()
    for number in range(150):
        (folder / "many" / f"file-{number:03}").write_bytes(file_trees.pattern(40 * number))
    for name in ("gone", "move", "kind", "same", "mode", "attr", "swap"):
        (folder / "etc" / name).write_bytes(file_trees.pattern(5000) + name.encode())
    (folder / "etc" / "log").write_text("begin\n")
    (folder / "deep" / "er" / "big").write_bytes(BIG)
    (folder / "deep" / "other").write_bytes(file_trees.pattern(2 << 20))
    return folder


def empty(image, size):
    with image.open("wb") as file:
        file.truncate(size << 20)
    return image


def copied(image, other):
    file_trees.run("cp", "--sparse=always", image, other)


def made(kind, image, tree):
    """An image with this file system, and the tree on it."""
    if kind.startswith("ext"):
        small = ("-b", "1024") if kind == "ext2" else ()
        file_trees.ext(image, tree, "-t", kind, *small, size="24M")
    elif kind == "xfs":
        file_trees.xfs(image, tree)
    elif kind == "ntfs":
        file_trees.ntfs(image, tree)
    elif kind == "btrfs":
        file_trees.run("mkfs.btrfs", "-q", "-f", "--rootdir", tree, empty(image, 128))
    elif kind == "fat":
        file_trees.run("mkfs.vfat", "-F", "16", empty(image, 24))
        file_trees.run("mcopy", "-s", "-Q", "-m", "-i", image, *sorted(tree.iterdir()), "::")
    elif kind == "iso":
        file_trees.run("genisoimage", "-quiet", "-R", "-o", image, tree)
    return image


PROGRAMS = {
    "xfs": "mkfs.xfs",
    "ntfs": "wimapply",
    "btrfs": "mkfs.btrfs",
    "fat": "mcopy",
    "iso": "genisoimage",
    "exfat": "mkfs.exfat",
}


class Spied(File):
    """A disk that remembers where it was read."""

    def __init__(self, path):
        super().__init__(path)
        self.asked = []

    def read_into(self, offset, buffer):
        self.asked.append((offset, offset + len(buffer)))
        super().read_into(offset, buffer)


VOLUME = SimpleNamespace(title="a volume", uuid="one", disk=SimpleNamespace(name="a disk"))


def browser(disk):
    return Browser(VOLUME, opening.open_reader(signatures.recognise(disk).kind, disk))


def compared(old, new, touched):
    with Spied(old) as one, Spied(new) as other:
        before, after = browser(one), browser(other)
        one.asked.clear()
        other.asked.clear()
        work = comparison.Comparison(before, after, touched)
        found = work.differences([(before.root(), after.root())])
        assert work.left_out == {}
        return found, one.asked + other.asked


def of_content(image):
    """For each file that lies on the disk: the parts of it that hold its data alone."""
    found = {}
    with File(image) as disk:
        reader = browser(disk).reader
        for path, node in file_trees.walked(reader):
            if node.type is Type.FILE:
                places = [place for one in reader.content(node).segments() for place in one.lies()]
                if places:
                    found[b"/" + path] = places
    return found


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4", "xfs", "btrfs", "ntfs", "fat", "iso"])
def test_bytes_changed_in_place_are_found_in_exactly_their_files_and_no_others_are_read(
    kind, tree, tmp_path, require_program
):
    if kind in PROGRAMS:
        require_program(PROGRAMS[kind])
    image, after = made(kind, tmp_path / "image", tree), tmp_path / "after"
    copied(image, after)
    chance = random.Random(kind)
    where = of_content(image)
    assert len(where) > 40
    for _ in range(4):
        chosen = sorted(chance.sample(sorted(where), chance.randrange(6)))
        spots = []
        with after.open("r+b") as file:
            for path in chosen:
                start, end = chance.choice(where[path])
                at = chance.randrange(start, end)
                (byte,) = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([byte ^ 255]), at)
                spots.append((at, byte))
            touched = Ranges((at, at + 1) for at, _ in spots)
            found, asked = compared(image, after, touched)
            assert [(one.path, one.change.value, one.what) for one in found] == [
                (path, "changed", ("content",)) for path in chosen
            ]
            data = Ranges(place for path, places in where.items() if path not in chosen for place in places)
            large = [one for one in asked if one[1] - one[0] > 64 << 10]
            assert not any(list(data.within(*one)) for one in large)
            for at, byte in spots:
                os.pwrite(file.fileno(), bytes([byte]), at)


def test_data_that_nobody_wrote_is_never_read(tree, tmp_path):
    """Two large files beside each other, one of them changed in the middle: only a page of it is read."""
    image, after = made("ext4", tmp_path / "image", tree), tmp_path / "after"
    copied(image, after)
    where = of_content(image)
    start, end = where[b"/deep/er/big"][0]
    page = (start + end) // 2 // 4096 * 4096
    with after.open("r+b") as file:
        os.pwrite(file.fileno(), b"changed", page)
    found, asked = compared(image, after, Ranges([(page, page + 4096)]))
    assert [one.path for one in found] == [b"/deep/er/big"]
    inside = Ranges(where[b"/deep/er/big"] + where[b"/deep/other"])
    small = 2 * 64 << 10  # metadata comes in pieces, which may reach into what lies beside it
    read = sum(last - first for one in asked for first, last in inside.within(*one))
    assert read <= 2 * 4096 + 2 * small


# What happens in between, on a mounted file system, and what is to be said of it.
SCRIPT = """
set -e
printf X | dd of=deep/er/big bs=1 seek=1500000 conv=notrunc status=none; touch -d @1600000000 deep/er/big
echo more >>etc/log
rm etc/gone
echo new >etc/new
mv etc/move deep/moved
mv many lots
echo changed >lots/file-005
rm etc/kind; mkdir etc/kind; echo x >etc/kind/x
truncate -s 100000 etc/sparse
cp etc/swap etc/swap.tmp; mv etc/swap.tmp etc/swap; touch -d @1700000000 etc/swap
"""
LINUX = """
chmod 600 etc/mode
setfattr -n user.word -v value etc/attr
ln -s log etc/link
ln etc/same deep/linked
"""
FOUND = {
    "/deep/er/big": ("changed", "content"),
    "/etc/log": ("changed", "content"),
    "/etc/gone": ("removed",),
    "/etc/new": ("added",),
    "/deep/moved": ("renamed", "/etc/move"),
    "/lots": ("renamed", "/many"),
    "/lots/file-005": ("changed", "content"),
    "/etc/kind": ("changed", "type"),
    "/etc/kind/x": ("added",),
    "/etc/sparse": ("added",),
    "/etc/swap": ("metadata", "modified"),
}
FOUND_ON_LINUX = {
    "/etc/mode": ("metadata", "mode"),
    "/etc/attr": ("metadata", "extended"),
    "/etc/link": ("added",),
    "/etc/same": ("metadata", "links"),
    "/deep/linked": ("added",),
}


def told(found):
    """Each difference in short: what became of it, and the first word of what of it, or where it was."""
    return {
        one.path.decode(): tuple(filter(None, (one.change.value, one.source and one.source.decode(), *one.what)))
        for one in found
    }


def assert_told(found, expected):
    said = told(found)
    assert said.keys() == expected.keys()
    for path, words in expected.items():
        assert set(words) <= set(said[path]), (path, said[path])
        assert said[path][0] == words[0]


def mounted(script, image, place, how="mount -o loop"):
    place.mkdir(exist_ok=True)
    script = f'{how} "$1" "$2"; cd "$2"; {script}\ncd /; umount "$2"; [ -z "$d" ] || losetup -d "$d"'
    file_trees.run("unshare", "-m", "bash", "-ec", script, "sh", image, place)


HOW = {
    "ntfs": "ntfs-3g -o streams_interface=xattr",
    "exfat": 'd=$(losetup -f --show "$1"); mount.exfat-fuse "$d" "$2"; :',
}


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "ntfs", "exfat"])
def test_what_was_done_to_a_mounted_file_system_is_told(kind, tree, tmp_path, require, require_program):
    """Between a raw disk and a child of it that holds what was written: by the real drivers, so as root only."""
    known = Path("/proc/filesystems").read_text() + "\tntfs\n\texfat\n"
    require(os.geteuid() == 0 and f"\t{kind}\n" in known, "only root can mount it, where the kernel knows it")
    if kind in PROGRAMS:
        require_program(PROGRAMS[kind])
    before, after = tmp_path / "before", tmp_path / "after"
    how = HOW.get(kind, "mount -o loop")
    if kind == "exfat":
        file_trees.run("mkfs.exfat", empty(before, 32))
        mounted(f"cp -r {tree}/* .", before, tmp_path / "place", how)
    else:
        made(kind, before, tree)
    copied(before, after)
    is_linux = kind in {"ext4", "xfs", "btrfs"}
    mounted(SCRIPT + (LINUX if is_linux else ""), after, tmp_path / "place", how)
    child = moments.next_moment(tmp_path / "child.qcow2", before, "raw", before, after)
    outcome = differing.between([views.of_image(before, "raw")], [views.of_image(child)])
    assert outcome.left_out == {}
    expected = FOUND | (FOUND_ON_LINUX if is_linux else {})
    if kind == "exfat":  # which has no numbers of files: what was renamed went and came
        gone = [path.relative_to(tree) for path in tree.rglob("*") if path.parent.name == "many"]
        expected = {path: words for path, words in expected.items() if words[0] != "renamed" and "lots" not in path}
        expected |= {f"/{path}": ("removed",) for path in (*gone, "many", "etc/move")}
        expected |= {f"/lots/{path.name}": ("added",) for path in gone} | {
            "/lots": ("added",),
            "/deep/moved": ("added",),
        }
    assert_told(outcome.differences, expected)
    back = differing.between([views.of_image(child)], [views.of_image(before, "raw")])
    turned = {"added": "removed", "removed": "added"}
    backwards = {one.source or one.path: turned.get(one.change.value, one.change.value) for one in outcome.differences}
    assert {one.path: one.change.value for one in back.differences} == backwards
    same = differing.between([views.of_image(child)], [views.of_image(child)])
    assert (same.differences, same.size, same.browsers) == ([], 0, [])
    assert_indexed([views.of_image(before, "raw")], [views.of_image(child)], tmp_path / "index")


def take_in(index, snapshot, disks, before=None, keys=()):
    """Takes a moment in, as what differs from the one that was taken in last; how many folders were read."""
    befores = [] if before is None else [index_walk.Before(index, index.points()[-1], lambda: before)]
    return index_walk.take_in(index, index.add_point(snapshot), disks, befores, keys).folders


def assert_indexed(old, new, file):
    """What the index says of the newer moment is the same, be it read as what differs, forwards or backwards, or as a whole."""
    found = []
    for first, second in ((old, new), (new, old)):
        with file_index.opened(file, "vm", wait_s=5, anew=True) as index:
            with index.writing():
                whole = take_in(index, "first", first)
                take_in(index, "second", second, first)
                part = take_in(index, "again", first, second)
                assert take_in(index, "same", first, first) == 0
            assert part <= whole
            hits = searching.search(index, searching.Wish(paths=(b"/",)))
            shown = {
                moment: {(one.path, one.entry) for one in hits if moment in one.snapshots}
                for moment in ("first", "second", "again", "same")
            }
            assert shown["first"] == shown["again"] == shown["same"]
            found.append((shown["first"], shown["second"]))
    assert found[0] == found[1][::-1]
    for disks, expected in zip((old, new), found[0], strict=True):
        with looking.opened(disks) as inside:
            browser = inside.choose(b"/")
            walked = {(one.path, index_walk.entry_of(one)) for _, one in browser.walk(browser.root())}
        assert walked == expected


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_journal_that_was_not_replayed_is_seen_through(kind, tree, tmp_path, require, require_program):
    """The moments are those of a mounted file system, whose newest metadata stand in its journal alone."""
    known = Path("/proc/filesystems").read_text()
    require(os.geteuid() == 0 and f"\t{kind}\n" in known, "only root can mount it, where the kernel knows it")
    require_program("mkfs.xfs")
    image, before, after = made(kind, tmp_path / "image", tree), tmp_path / "before", tmp_path / "after"
    script = (
        f"mkdir now; for i in 1 2 3 4 5 6; do echo $i >now/$i; done; chmod 600 etc/mode; sync; cp --sparse=always {image} "
        f"{before}; echo six >now/6; rm now/5; chmod 640 etc/mode; sync; cp --sparse=always {image} {after}"
    )
    mounted(script, image, tmp_path / "place")
    child = moments.next_moment(tmp_path / "child.qcow2", before, "raw", before, after)
    outcome = differing.between([views.of_image(before, "raw")], [views.of_image(child)])
    assert all("replayed in memory" in one.reader.notes[0] for pair in outcome.browsers for one in pair)
    assert_told(
        outcome.differences,
        {"/now/6": ("changed", "content"), "/now/5": ("removed",), "/etc/mode": ("metadata", "mode")},
    )
    assert_indexed([views.of_image(before, "raw")], [views.of_image(child)], tmp_path / "index")


def test_fat_by_its_own_tools(tree, tmp_path, require_program):
    require_program("mcopy")
    before, after, new = made("fat", tmp_path / "before", tree), tmp_path / "after", tmp_path / "new"
    copied(before, after)
    new.write_text("new")
    file_trees.run("mcopy", "-o", "-i", after, new, "::/etc/log")
    file_trees.run("mcopy", "-i", after, new, "::/etc/a long new name")
    file_trees.run("mdel", "-i", after, "::/etc/gone")
    file_trees.run("mattrib", "+h", "-i", after, "::/etc/mode")
    child = moments.next_moment(tmp_path / "child.qcow2", before, "raw", before, after)
    outcome = differing.between([views.of_image(before, "raw")], [views.of_image(child)])
    expected = {
        "/etc/log": ("changed", "content"),
        "/etc/a long new name": ("added",),
        "/etc/gone": ("removed",),
        "/etc/mode": ("metadata", "attributes"),
    }
    assert_told(outcome.differences, expected)


def test_a_folder_of_fat_whose_name_changes_in_case_alone_leaves_nothing_behind(tree, tmp_path, require_program):
    require_program("mren")
    before, after = made("fat", tmp_path / "before", tree), tmp_path / "after"
    copied(before, after)
    file_trees.run("mren", "-i", after, "::deep", "::elsewhere")
    file_trees.run("mren", "-i", after, "::elsewhere", "::Deep")
    file_trees.run("mdel", "-i", after, "::Deep/other")
    assert_indexed(*of(before, after), tmp_path / "index")


def test_streams_of_ntfs_are_part_of_their_files(tree, tmp_path, require_program):
    require_program("wimapply")
    before, after, data = made("ntfs", tmp_path / "before", tree), tmp_path / "after", tmp_path / "data"
    data.write_bytes(b"one" * 1000)
    file_trees.run("ntfscp", "-q", "-N", "zone", before, data, "etc/same")
    copied(before, after)
    data.write_bytes(b"two" * 1000)
    file_trees.run("ntfscp", "-q", "-N", "zone", after, data, "etc/same")
    file_trees.run("ntfscp", "-q", "-N", "zone", after, data, "etc/mode")
    outcome = differing.between([views.of_image(before, "raw")], [views.of_image(after, "raw")])
    assert_told(outcome.differences, {"/etc/same": ("changed", "streams"), "/etc/mode": ("changed", "streams")})


def test_damage_at_one_moment_is_left_out_and_not_taken_for_a_change(tree, tmp_path):
    image, after = made("ext4", tmp_path / "image", tree), tmp_path / "after"
    copied(image, after)
    file_trees.run("debugfs", "-w", "-R", "set_inode_field /etc/log size 99999999999999999", after)
    file_trees.run("debugfs", "-w", "-R", "rm /etc/gone", after)
    file_trees.run("debugfs", "-w", "-R", "set_inode_field /many block[0] 0x12345678", after)
    outcome = differing.between([views.of_image(image, "raw")], [views.of_image(after, "raw")])
    assert b"/etc/gone" in {one.path for one in outcome.differences}
    assert not any(one.path.startswith(b"/many/") for one in outcome.differences)
    assert sum(outcome.left_out.values()) >= 1


def test_a_folder_in_itself_does_not_go_round(tree, tmp_path):
    image, after = made("ext4", tmp_path / "image", tree), tmp_path / "after"
    file_trees.run("debugfs", "-w", "-R", "link /deep /deep/er/again", image)
    copied(image, after)
    with after.open("r+b") as file:
        file.seek(of_content(made("ext4", tmp_path / "sound", tree))[b"/deep/er/big"][0][0])
        file.write(b"x")
    outcome = differing.between([views.of_image(image, "raw")], [views.of_image(after, "raw")])
    assert outcome.uncompared == []
    assert outcome.left_out == {DAMAGED: 2}  # at each of the moments
    assert_told(outcome.differences, {"/deep/er/big": ("changed", "content")})
    sound = made("ext4", tmp_path / "sound", tree)
    outcome = differing.between([views.of_image(sound, "raw")], [views.of_image(after, "raw")])
    assert outcome.left_out == {DAMAGED: 1}
    assert not any(one.path.startswith(b"/deep/er/again") for one in outcome.differences)


def test_of_btrfs_only_folders_are_read_again_that_were_written_to(tmp_path, require):
    """Every change makes a new way from the root to all files; with small nodes there are many leaves, and few change."""
    require(os.geteuid() == 0 and "\tbtrfs\n" in Path("/proc/filesystems").read_text(), "only root can mount Btrfs")
    tree, before, after = tmp_path / "tree", tmp_path / "before", tmp_path / "after"
    for number in range(60):
        (tree / f"folder {number:02}").mkdir(parents=True)
        for one in range(20):
            (tree / f"folder {number:02}" / f"file {one}").write_bytes(b"x" * 100)
    file_trees.run("mkfs.btrfs", "-q", "-f", "-n", "4096", "-m", "single", "--rootdir", tree, empty(before, 128))
    mounted("btrfs subvolume create sub; echo x >sub/x", before, tmp_path / "place")
    copied(before, after)
    script = 'echo longer >>"folder 30/file 7"; rm "folder 40/file 3"; echo y >sub/y'
    mounted(script, after, tmp_path / "place")
    child = moments.next_moment(tmp_path / "child.qcow2", before, "raw", before, after)
    old, new = [views.of_image(before, "raw")], [views.of_image(child)]
    expected = {
        "/folder 30/file 7": ("changed", "content"),
        "/folder 40/file 3": ("removed",),
        "/sub/y": ("added",),
    }
    assert_told(differing.between(old, new).differences, expected)
    assert_indexed(old, new, tmp_path / "index")
    with file_index.opened(tmp_path / "index", "vm", wait_s=5, anew=True) as index, index.writing():
        whole = take_in(index, "first", old)
        part = take_in(index, "second", new, old)
        assert (whole, part < 50) == (62, True), part


def test_on_a_logical_volume_and_on_that_alone(tmp_path):
    tree, part = tmp_path / "tree", tmp_path / "part"
    (tree / "etc").mkdir(parents=True)
    for name in ("changed", "same"):
        (tree / "etc" / name).write_bytes(file_trees.pattern(9000) + name.encode())
    file_trees.ext(part, tree, "-t", "ext2", size="2M")
    before, after = tmp_path / "before", tmp_path / "after"
    data = bytearray(test_lvm.physical(test_lvm.UUID, test_lvm.METADATA.encode()).data)
    data[2 << 20 : 4 << 20] = part.read_bytes()  # where the second extent begins
    before.write_bytes(data)
    at = data.index(file_trees.pattern(9000)[:5000] + file_trees.pattern(9000)[5000:] + b"changed")
    data[at + 5000] ^= 255
    after.write_bytes(data)
    child = moments.next_moment(tmp_path / "child.qcow2", before, "raw", before, after)
    old, new = [views.of_image(before, "raw")], [views.of_image(child)]
    outcome = differing.between(old, new, partition="group/whole")
    assert_told(outcome.differences, {"/etc/changed": ("changed", "content")})
    (one,) = outcome.differences
    assert (one.volume.logical, outcome.size) == ("group/whole", 64 << 10)
    assert differing.between(old, new).differences == outcome.differences
    assert_indexed(old, new, tmp_path / "index")


def table(image, *parts):
    """A disk with a partition for each of these images."""
    starts = [2048 + number * 65536 for number in range(len(parts))]
    lines = "".join(f"start={start},size=61440\n" for start in starts)
    file_trees.run("truncate", "-s", f"{len(parts) * 32 + 2}M", image)
    file_trees.run("sfdisk", "-q", image, input=f"label: gpt\n{lines}".encode())
    with image.open("r+b") as file:
        for start, part in zip(starts, parts, strict=True):
            file.seek(start * 512)
            file.write(part)
    return image


def of(*images):
    return [[views.of_image(one, "raw")] for one in images]


def test_one_file_system_that_is_lost_at_one_moment_is_named_and_the_others_are_compared(tree, tmp_path):
    part = made("ext4", tmp_path / "part", tree)
    sound = part.read_bytes()
    file_trees.run("debugfs", "-w", "-R", "rm /etc/gone", part)
    changed, spoiled, unopened = part.read_bytes(), bytearray(sound), bytearray(sound)
    spoiled[1024:2048] = bytes(1024)  # the superblock: nothing known lies there
    unopened[1024 + 0x18] = 200  # a block size that cannot be
    old = table(tmp_path / "old", sound, sound)
    for number, damaged in enumerate((spoiled, unopened)):
        new = table(tmp_path / f"new{number}", changed, damaged)
        for before, after, change in ((*of(old, new), "removed"), (*of(new, old), "added")):
            outcome = differing.between(before, after)
            assert [one.volume.number for one in outcome.uncompared] == [2]
            assert_told(outcome.differences, {"/etc/gone": (change,)})
            assert differing.between(before, after, paths=[b"/etc/log"]).differences == []
        with file_index.opened(tmp_path / "index", "vm", wait_s=5, anew=True) as index, index.writing():
            take_in(index, "first", of(new)[0])
            (point,) = index.points()
            assert [one.partition for one in index.places(point)] == [1]
            assert point.left_out == number
    blank = table(tmp_path / "blank", changed, bytes(len(sound)))
    outcome = differing.between(*of(blank, old))
    assert outcome.uncompared == []
    assert {one.volume.number for one in outcome.differences if one.change.value == "added"} == {1, 2}


def test_of_another_file_system_the_same_numbers_are_no_renames(tree, tmp_path):
    """Both made alike, with generations of zero."""
    (tmp_path / "other").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "other" / name).write_text(name)
    one, other = made("ext4", tmp_path / "one", tree), made("ext4", tmp_path / "two", tmp_path / "other")
    found = differing.between(*of(one, other)).differences
    assert {each.change.value for each in found} <= {"added", "removed", "changed", "metadata"}


def logical(metadata, payload):
    data = bytearray(test_lvm.physical(test_lvm.UUID, metadata.encode()).data)
    data[2 << 20 : 4 << 20] = payload
    return data


def test_logical_volumes_that_cannot_be_read_are_named(tmp_path):
    tree, part = tmp_path / "tree", tmp_path / "part"
    tree.mkdir()
    (tree / "file").write_text("x")
    file_trees.ext(part, tree, "-t", "ext2", size="2M")
    sound, thin = test_lvm.METADATA, test_lvm.METADATA.replace('"striped"', '"thin"')
    images = {name: tmp_path / name for name in ("sound", "thin", "written", "damaged", "wiped")}
    images["sound"].write_bytes(logical(sound, part.read_bytes()))
    images["thin"].write_bytes(logical(thin, part.read_bytes()))
    images["written"].write_bytes(logical(thin, part.read_bytes().replace(b"file", b"fill")))
    images["damaged"].write_bytes(logical(sound.replace("{", "["), part.read_bytes()))
    wiped = logical(sound, part.read_bytes())
    wiped[: 4 * 512] = bytes(4 * 512)
    images["wiped"].write_bytes(wiped)
    for before, after in (("thin", "written"), ("sound", "damaged"), ("damaged", "sound"), ("sound", "wiped")):
        outcome = differing.between(*of(images[before], images[after]))
        assert outcome.differences == []
        assert "group/whole" in {one.volume.logical for one in outcome.uncompared}, (before, after)
    assert differing.between(*of(images["thin"], images["thin"])).uncompared == []


def test_the_index_lies_in_a_home_of_ones_own_alone(tmp_path, monkeypatch, require):
    require(os.geteuid() == 0, "only root can give folders away")
    home, cache = tmp_path / "home", tmp_path / "cache"
    (home / ".hvmgr").mkdir(parents=True)
    file = home / ".hvmgr" / "files.sqlite"
    vm = SimpleNamespace(id="x", home=SimpleNamespace(layout=SimpleNamespace(private=file.parent, file_index=file)))
    monkeypatch.setattr("hvmgr.settings.cache_folder", lambda: cache)
    assert indexing.place_of(vm) == file
    for folder, spoil, back in (
        (home, lambda: os.chown(home, 1234, 1234), lambda: os.chown(home, 0, 0)),
        (file.parent, lambda: os.chown(file.parent, 1234, 0), lambda: os.chown(file.parent, 0, 0)),
        (home, lambda: home.chmod(0o770), lambda: home.chmod(0o711)),
    ):
        spoil()
        assert indexing.place_of(vm) == cache / "files" / "x.sqlite", folder
        back()
    assert indexing.place_of(vm) == file
    os.rename(file.parent, home / "real")
    file.parent.symlink_to(home / "real")
    assert indexing.place_of(vm) != file


class Counted(list):
    """Runs that count how often they are looked at from the beginning."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def test_many_places_of_a_content_are_found_without_a_look_at_all_of_it_for_each(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(range(256)) * 16)
    plain = [Run(4, (number * 8) % 4096) for number in range(500)]
    runs = Counted(plain)
    with File(disk) as opened:
        content, other = Runs(opened, runs, 2000), Runs(opened, plain, 2000)
        assert contents.are_same(content, other, Ranges((at, at + 1) for at in range(0, 4096, 2)))
        for start in range(0, 1990, 7):
            data = b"".join(bytes(piece) for _, piece in content.pieces(start, start + 9))
            assert data == reader.whole(other, 2000)[start : start + 9]
    assert runs.times == 1
