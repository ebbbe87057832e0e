"""The readers of file systems, against file systems that the systems' own tools made: names, bytes, links, times, modes."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.operations.inside import looking, views
from hvmgr.storage.filesystems import opening, signatures, window
from hvmgr.storage.filesystems.reader import Type
from hvmgr.storage.filesystems.signatures import Kind
from hvmgr.storage.partitions import File
from tests.storage import file_trees

EXT = {
    "ext2": ("-t", "ext2", "-b", "1024"),
    "ext3": ("-t", "ext3", "-b", "4096"),
    "ext4": ("-t", "ext4"),
    "ext4 of small inodes": ("-t", "ext4", "-I", "128"),
    "ext4 with clusters": ("-t", "ext4", "-O", "bigalloc"),
    "ext4 with groups of descriptors": ("-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"),
    "ext4 with contents in inodes": ("-t", "ext4", "-O", "inline_data", "-I", "256"),
}
LOST = b"lost+found"


@pytest.fixture(scope="module")
def trees(tmp_path_factory, require_program):
    """Two trees: one with everything, one with what FAT, Joliet and wimlib can hold."""
    for name in ("mke2fs", "mkntfs", "wimapply", "mkfs.vfat", "mcopy", "genisoimage"):
        require_program(name)
    folder = tmp_path_factory.mktemp("trees")
    file_trees.make(folder / "full")
    file_trees.make(folder / "plain", file_trees.MODEST, special=False)
    return folder


def opened(disk):
    found = signatures.recognise(disk)
    return opening.open_reader(found.kind, disk)


def seen(image):
    with File(image) as disk:
        found = file_trees.of_reader(opened(disk))
    return {path: what for path, what in found.items() if not path.startswith(LOST)}


@pytest.mark.parametrize("options", EXT.values(), ids=EXT)
def test_ext_shows_the_tree(trees, tmp_path, options):
    image = file_trees.ext(tmp_path / "image", trees / "full", *options)
    expected = file_trees.of_host(trees / "full")
    found = seen(image)
    if "inline_data" in options:  # mke2fs forgets the end of a sparse file there, and debugfs sees what we see
        assert found.pop(b"sparse")[1] == sha256(debugfs(image, "cat /sparse"))
        expected.pop(b"sparse")
    assert found == expected


def sha256(data):
    import hashlib

    return hashlib.sha256(data).hexdigest()


def debugfs(image, *commands):
    words = [word for one in commands for word in ("-R", one)]
    return subprocess.run(["debugfs", *words, image], capture_output=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def ext4_image(trees, tmp_path_factory):
    image = tmp_path_factory.mktemp("ext4") / "image"
    file_trees.ext(image, trees / "full", "-b", "1024", "-t", "ext4", "-L", "a label", "-E", "root_owner=12:70000")
    commands = ["set_inode_field /deep/size60 uid 70001", "ea_set /deep/size60 user.word value"]
    for one in commands:
        subprocess.run(["debugfs", "-w", "-R", one, image], capture_output=True, check=True, timeout=60)
    return image


class TestExt4:
    @pytest.fixture
    def image(self, ext4_image):
        return ext4_image

    def test_knows_what_an_inode_says(self, image, trees):
        with File(image) as disk:
            reader = opened(disk)
            nodes = dict(file_trees.walked(reader))
            root = reader.root()
        assert (root.uid, root.gid) == (12, 70000)
        assert nodes[b"deep/size60"].uid == 70001
        for path, node in nodes.items():
            if path.startswith(LOST) or path == b"deep/size60":
                continue
            facts = os.lstat(os.fsencode(trees / "full") + b"/" + path)
            if node.type in {Type.FILE, Type.LINK}:
                assert (path, node.size) == (path, facts.st_size)
            assert (path, node.mode) == (path, stat.S_IMODE(facts.st_mode))
            assert (path, node.modified // 10**9) == (path, file_trees.TIME // 10**9)
        assert nodes[b"hard"].id == nodes[b"deep/size4097"].id
        assert nodes[b"hard"].links == 2

    def test_has_extended_attributes(self, image):
        with File(image) as disk:
            reader = opened(disk)
            node = dict(file_trees.walked(reader))[b"deep/size60"]
            assert reader.extras(node) == {"user.word": b"value"}

    def test_is_recognised_with_its_label(self, image):
        with File(image) as disk:
            found = signatures.recognise(disk)
        assert (found.kind, found.label) == (Kind.EXT4, "a label")

    @pytest.mark.parametrize("journal", ["jo", "jo -c"], ids=["plain", "with checksums"])
    def test_replays_its_journal_as_e2fsck_does(self, image, tmp_path, journal):
        blocks = debugfs(image, "blocks /deep/size1048576").split()
        dirty, fresh = tmp_path / "dirty", tmp_path / "fresh"
        shutil.copyfile(image, dirty)
        escaped = bytes.fromhex("c03b3998").ljust(1024, b"e")  # begins as a block of a journal does
        fresh.write_bytes(escaped + os.urandom(2048))
        numbers = ",".join(one.decode() for one in blocks[:3])
        again = tmp_path / "again"
        again.write_bytes(os.urandom(1024))
        last = blocks[1].decode()
        script = f"{journal}\njw -b {numbers} {fresh}\njw -b {last} {again}\njw -r {blocks[5].decode()} \njc\n"
        subprocess.run(
            ["debugfs", "-w", "-f", "-", dirty], input=script.encode(), capture_output=True, check=True, timeout=60
        )
        before = dirty.read_bytes()
        judged = tmp_path / "judged"
        shutil.copyfile(dirty, judged)
        subprocess.run(["e2fsck", "-E", "journal_only", "-p", judged], capture_output=True, timeout=60, check=False)
        expected = debugfs(judged, "cat /deep/size1048576")
        assert expected != debugfs(dirty, "cat /deep/size1048576"), "there is nothing to replay"
        with File(dirty) as disk:
            reader = opened(disk)
            node = dict(file_trees.walked(reader))[b"deep/size1048576"]
            assert file_trees.hash_of(reader, node) == sha256(expected)
            assert "the journal was replayed" in reader.notes[0]
        assert dirty.read_bytes() == before

    def test_damage_is_an_error_and_no_hang(self, image, tmp_path):
        """Random bytes in the places where file systems keep their facts: hvmgr's errors or an answer, nothing else."""
        chance = random.Random(7)

        def places():
            return [chance.choice((chance.randrange(1024, 2048), chance.randrange(2048, 2 << 20))) for _ in range(100)]

        outcomes = {outcome(image, places(), chance, tmp_path) for _ in range(10)}
        assert outcomes <= {"whole", "Corrupt", "Unsupported"}
        assert "Corrupt" in outcomes

    def test_a_folder_in_itself_does_not_go_round(self, image, tmp_path):
        looped = tmp_path / "looped"
        shutil.copyfile(image, looped)
        subprocess.run(
            ["debugfs", "-w", "-R", "link /deep /deep/er/again", looped], capture_output=True, check=True, timeout=60
        )
        with looking.opened([views.of_image(looped)]) as inside:
            browser = inside.choose(b"/")
            found = {one.path for _, one in browser.walk(browser.find(b"/deep"))}
            assert browser.damaged == [b"/deep/er/again"]
            assert {b"/deep/er/est/bottom", b"/deep/size1"} <= found
            assert not any(one.startswith(b"/deep/er/again") for one in found)


def outcome(image, places, chance, folder):
    """What becomes of looking at everything in an image that has other bytes at these places."""
    damaged = folder / "damaged"
    if not damaged.exists():
        shutil.copyfile(image, damaged)
    with image.open("rb") as whole, damaged.open("r+b") as file:
        before = [(at, os.pread(whole.fileno(), 1, at)) for at in places]
        for at in places:
            os.pwrite(file.fileno(), bytes([chance.randrange(256)]), at)
        try:
            with looking.opened([views.of_image(damaged, "raw")]) as inside:
                browser = inside.choose(b"/")
                for count, (_, one) in enumerate(browser.walk(browser.root())):
                    if count > 2000:
                        break
                    if one.node.type is Type.FILE and one.node.size < 1 << 24:
                        for _ in browser.content(one).pieces():
                            pass
                    browser.reader.extras(one.node)
        except errors.HvmgrError as error:
            return error.code
        finally:
            for at, byte in before:
                os.pwrite(file.fileno(), byte, at)
    return "whole"


@pytest.fixture(scope="module")
def ntfs_image(trees, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ntfs")
    tree = folder / "tree"
    shutil.copytree(trees / "plain", tree)
    (tree / "hard").hardlink_to(tree / "deep" / "size4097")
    (tree / "link").symlink_to("deep/size1")
    image = file_trees.ntfs(folder / "image", tree)
    (folder / "stream").write_bytes(b"of the stream" * 100)
    words = ["ntfscp", "-q", "-N", "zone", image, folder / "stream", "deep/size1"]
    subprocess.run(words, capture_output=True, check=True, timeout=60)
    return image, tree


class TestNtfs:
    @pytest.fixture
    def image(self, ntfs_image):
        return ntfs_image

    def test_shows_the_tree(self, image):
        assert seen(image[0]) == file_trees.of_host(image[1])

    def test_has_streams_security_and_hard_links(self, image):
        with File(image[0]) as disk:
            reader = opened(disk)
            nodes = dict(file_trees.walked(reader))
            node = nodes[b"deep/size1"]
            assert node.streams == (("zone", 1300),)
            assert file_trees.hash_of(reader, node, "zone") == sha256(b"of the stream" * 100)
            assert reader.extras(node)["system.ntfs_acl"][:1] == b"\1"
        assert nodes[b"hard"].id == nodes[b"deep/size4097"].id
        assert nodes[b"deep/size60"].modified == file_trees.TIME

    def test_damage_is_an_error_and_no_hang(self, image, tmp_path):
        chance = random.Random(3)
        with image[0].open("rb") as file:
            mft = int.from_bytes(os.pread(file.fileno(), 8, 48), "little") * 4096

        def places():
            return [mft + chance.randrange(900 << 10) for _ in range(30)]

        outcomes = {outcome(image[0], places(), chance, tmp_path) for _ in range(8)}
        assert outcomes <= {"whole", "Corrupt", "Unsupported"}
        assert "Corrupt" in outcomes

    def test_compressed_and_sparse_files(self, trees, tmp_path, require):
        """Through ntfs-3g, which compresses as Windows does: in a mount namespace of its own, so as root only."""
        require(os.geteuid() == 0 and Path("/dev/fuse").exists(), "only root can mount NTFS")
        image, place = tmp_path / "image", tmp_path / "mounted"
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(32 << 20)
        file_trees.run("mkntfs", "-q", "-F", "-Q", image)
        script = (
            'ntfs-3g -o compression,streams_interface=xattr "$1" "$2" && cd "$2" && mkdir c && '
            "setfattr -n system.ntfs_attrib_be -v 0x00000800 c && seq 1 60000 >c/seq && "
            'head -c 3000000 /dev/zero >c/zeros && cat c/seq c/zeros "$3" c/seq >c/mixed && cp --sparse=always "$4" sparse && '
            'cat c/mixed >"$5" && cd / && umount "$2"'
        )
        words = [
            "unshare",
            "-m",
            "sh",
            "-c",
            script,
            "sh",
            image,
            place,
            trees / "full/deep/size1048576",
            trees / "full/sparse",
        ]
        file_trees.run(*words, tmp_path / "mixed")
        found = seen(image)
        assert found[b"c/mixed"] == (Type.FILE, sha256((tmp_path / "mixed").read_bytes()))
        assert found[b"c/zeros"] == (Type.FILE, sha256(bytes(3_000_000)))
        assert found[b"sparse"] == file_trees.of_host(trees / "full")[b"sparse"]


@pytest.fixture(scope="module")
def blankless(tmp_path_factory):
    """A tree for XFS' protofiles, with folders of each kind: in the inode, in one block, in many."""
    tree = tmp_path_factory.mktemp("blankless") / "tree"
    for name, count in (("few", 3), ("some", 60), ("many", 600)):
        (tree / name).mkdir(parents=True)
        for number in range(count):
            (tree / name / f"a-file-ünder-number-{number:05}").write_bytes(b"%d" % number)
    for size in (0, 1, 511, 4096, 1 << 20):
        (tree / f"size{size}").write_bytes(file_trees.pattern(size))
    (tree / "short").symlink_to("few/x")
    (tree / "long").symlink_to("/" + "l" * 500)
    (tree / "size1").chmod(0o4750)
    return tree


@pytest.mark.parametrize(
    "options",
    [(), ("-m", "crc=0"), ("-b", "size=1024", "-n", "size=8192"), ("-m", "bigtime=0"), ("-i", "size=2048")],
    ids=["version 5", "version 4", "large folder blocks", "old times", "large inodes"],
)
def test_xfs_shows_the_tree(blankless, tmp_path, options, require_program):
    require_program("mkfs.xfs")
    image = file_trees.xfs(tmp_path / "image", blankless, *options)
    assert seen(image) == file_trees.of_host(blankless)
    with File(image) as disk:
        reader = opened(disk)
        node = dict(file_trees.walked(reader))[b"size1"]
    assert (node.mode, node.uid, node.gid) == (0o4750, 12, 70000)
    assert abs(node.modified - image.stat().st_mtime_ns) < 3600 * 10**9
    assert reader.notes == []


def test_xfs_of_a_mounted_volume(trees, tmp_path, require):
    """What only a kernel makes: trees of extents, attributes in blocks, a log that was not replayed. As root only."""
    require(
        os.geteuid() == 0 and "\txfs\n" in Path("/proc/filesystems").read_text(), "only root can mount XFS, where it is"
    )
    image, place = tmp_path / "image", tmp_path / "mounted"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    file_trees.run("mkfs.xfs", "-q", image)
    script = (
        'mount -o loop "$1" "$2" && cd "$2" && for i in $(seq 200); do '
        'dd if="$3" of=pieces bs=4096 seek=$((2*i)) count=1 conv=notrunc status=none; done && '
        "for i in 1 2 3 4 5 6 7 8; do setfattr -n user.n$i -v $(head -c 700 /dev/zero | tr '\\0' $i) pieces; done && "
        'cp pieces "$4" && ln pieces other && mkdir none && cd / && sync -f "$2" && cp "$1" "$1.dirty" && umount "$2"'
    )
    source, copy = trees / "full/deep/size1048576", tmp_path / "copy"
    file_trees.run("unshare", "-m", "sh", "-c", script, "sh", image, place, source, copy)
    with File(image) as disk:
        reader = opened(disk)
        nodes = dict(file_trees.walked(reader))
        assert reader.notes == []
        assert nodes[b"pieces"].id == nodes[b"other"].id
        assert file_trees.hash_of(reader, nodes[b"pieces"]) == sha256(copy.read_bytes())
        assert reader.extras(nodes[b"pieces"]) == {f"user.n{one}": b"%d" % one * 700 for one in range(1, 9)}
        assert reader.extras(nodes[b"none"]) == {}
    with File(Path(f"{image}.dirty")) as disk:
        assert opened(disk).notes[0].startswith("the log was replayed in memory")


@pytest.mark.parametrize("options", [(), ("-n", "4096", "-m", "single")], ids=["as usual", "small nodes"])
def test_btrfs_shows_the_tree(trees, tmp_path, options, require_program):
    require_program("mkfs.btrfs")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    file_trees.run("mkfs.btrfs", "-q", "-f", *options, "--rootdir", trees / "full", image)
    assert seen(image) == file_trees.of_host(trees / "full")
    with File(image) as disk:
        reader = opened(disk)
        nodes = dict(file_trees.walked(reader))
    assert {path.decode(): oct(nodes[path].mode) for path in nodes if path.startswith(b"mode")} == {
        f"mode{mode}": f"0o{mode}" for mode in ("4755", "1777", "0", "640")
    }
    assert nodes[b"deep/size60"].modified // 10**9 == file_trees.TIME // 10**9


def test_btrfs_of_a_mounted_volume(trees, tmp_path, require):
    """Subvolumes, snapshots, all compressions: what only a kernel makes. As root only."""
    require(os.geteuid() == 0 and "\tbtrfs\n" in Path("/proc/filesystems").read_text(), "only root can mount Btrfs")
    image, place = tmp_path / "image", tmp_path / "mounted"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    file_trees.run("mkfs.btrfs", "-q", "-f", image)
    script = (
        'mount -o loop "$1" "$2" && cd "$2" && btrfs subvolume create root && btrfs subvolume create root/inner && '
        "echo inner >root/inner/file && for c in zlib lzo zstd; do mkdir root/$c && "
        "btrfs property set root/$c compression $c && seq 1 60000 >root/$c/seq && seq 1 150 >root/$c/small && "
        'cat root/$c/seq "$3" root/$c/seq >root/$c/mixed; done && setfattr -n user.word -v value root/zlib/seq && '
        "btrfs subvolume snapshot root before && btrfs subvolume snapshot root again && echo changed >root/zlib/small && "
        'btrfs subvolume set-default "$(btrfs inspect-internal rootid root)" . && '
        'cp root/zlib/mixed "$4" && cp root/zlib/seq "$5" && cd / && sync -f "$2" && umount "$2"'
    )
    words = ["unshare", "-m", "sh", "-c", script, "sh", image, place, trees / "full/deep/size1048576"]
    file_trees.run(*words, tmp_path / "mixed", tmp_path / "seq")
    mixed, seq = (sha256((tmp_path / name).read_bytes()) for name in ("mixed", "seq"))
    with File(image) as disk:
        reader = opened(disk)
        nodes = dict(file_trees.walked(reader))
        assert sorted(one for one in nodes if b"/" not in one) == [b"inner", b"lzo", b"zlib", b"zstd"]
        for kind in (b"zlib", b"lzo", b"zstd"):
            assert file_trees.hash_of(reader, nodes[kind + b"/mixed"]) == mixed
            assert file_trees.hash_of(reader, nodes[kind + b"/seq"]) == seq
            kinds = {one.compression for one in reader.content(nodes[kind + b"/seq"])._extents}
            assert kinds == {{b"zlib": 1, b"lzo": 2, b"zstd": 3}[kind]}
        assert file_trees.hash_of(reader, nodes[b"inner/file"]) == sha256(b"inner\n")
        assert reader.extras(nodes[b"zlib/seq"])["user.word"] == b"value"
        reader._start = 5  # the top, in which the default subvolume and its snapshot are
        nodes = dict(file_trees.walked(reader))
        assert file_trees.hash_of(reader, nodes[b"before/zlib/small"]) != sha256(b"changed\n")
        assert file_trees.hash_of(reader, nodes[b"root/zlib/small"]) == sha256(b"changed\n")
        assert b"before/inner" in nodes
        assert b"before/inner/file" not in nodes
        assert nodes[b"before/inner"].id != nodes[b"again/inner"].id


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_damage_of_others_is_an_error_and_no_hang(blankless, tmp_path, kind, require_program):
    require_program(f"mkfs.{kind}")
    image, chance = tmp_path / "image", random.Random(5)
    if kind == "xfs":
        file_trees.xfs(image, blankless)
        ranges = [range(512), range(2048, 256 << 10), range(512 << 10, 1 << 20)]
    else:
        image.write_bytes(bytes(1))
        os.truncate(image, 128 << 20)
        file_trees.run("mkfs.btrfs", "-q", "-f", "-m", "single", "--rootdir", blankless, image)
        with File(image) as disk:
            super_block = window.read(disk, 64 << 10, 4096)
        root = int.from_bytes(super_block[0x50:0x58], "little")
        ranges = [range(64 << 10, (64 << 10) + 3000), range(root, root + (512 << 10))]
    outcomes = {
        outcome(image, [chance.choice(chance.choice(ranges)) for _ in range(60)], chance, tmp_path) for _ in range(8)
    }
    assert outcomes <= {"whole", "Corrupt", "Unsupported"}
    assert outcomes - {"whole"}


@pytest.mark.parametrize(
    ("size", "options"),
    [(4, ("-F", "12", "-s", "8")), (60, ("-F", "16")), (600, ("-F", "32", "-s", "1"))],
    ids=["FAT12", "FAT16", "FAT32"],
)
def test_fat_shows_the_tree(trees, tmp_path, size, options):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(size << 20)
    file_trees.run("mkfs.vfat", *options, image)
    words = ["mcopy", "-s", "-Q", "-m", "-i", image, *sorted((trees / "plain").iterdir()), "::"]
    file_trees.run(*words, env={**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"})
    assert seen(image) == file_trees.of_host(trees / "plain")
    with File(image) as disk:
        times = {node.modified for path, node in file_trees.walked(opened(disk)) if b"size" in path}
    assert times == {file_trees.TIME // 10**9 * 10**9}  # FAT counts in steps of two seconds, and this one is even


def test_exfat_shows_the_tree(trees, tmp_path, require, require_program):
    require(os.geteuid() == 0 and Path("/dev/loop-control").exists(), "only root can fill an exFAT volume")
    require_program("mkfs.exfat")
    image, place = tmp_path / "image", tmp_path / "mounted"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    file_trees.run("mkfs.exfat", image)
    script = (
        'd=$(losetup -f --show "$1") && mount.exfat-fuse "$d" "$2" && cp -r "$3"/* "$2"; umount "$2"; losetup -d "$d"'
    )
    file_trees.run("unshare", "-m", "sh", "-c", script, "sh", image, place, trees / "plain")
    assert seen(image) == file_trees.of_host(trees / "plain")


@pytest.mark.parametrize("label", ["", "Dätei 1"])
@pytest.mark.parametrize(("kind", "argv"), [(Kind.NTFS, ["mkntfs", "-q", "-F", "-Q"]), (Kind.EXFAT, ["mkfs.exfat"])])
def test_label_that_lies_inside_is_told(tmp_path, require_program, kind, argv, label):
    require_program(argv[0])
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    file_trees.run(*argv, *(["-L", label] if label else []), image, env={**os.environ, "LC_ALL": "C.UTF-8"})
    with File(image) as disk:
        found = signatures.recognise(disk)
    assert (found.kind, found.label) == (kind, label)
    serial = found.uuid
    data = bytearray(image.read_bytes())
    data[512:] = bytes(len(data) - 512)  # the boot sector alone is left
    image.write_bytes(data)
    with File(image) as disk:
        found = signatures.recognise(disk)
    assert (found.kind, found.label, found.uuid) == (kind, "", serial)


@pytest.mark.parametrize("extension", ["-R", "-J"], ids=["Rock Ridge", "Joliet"])
def test_iso_shows_the_tree(trees, tmp_path, extension):
    tree = trees / ("full" if extension == "-R" else "plain")
    options = ["-R"] if extension == "-R" else ["-J", "-joliet-long", "-input-charset", "utf-8"]
    file_trees.run("genisoimage", "-quiet", "-V", "A VOLUME", *options, "-o", tmp_path / "image", tree)
    expected = file_trees.of_host(tree)
    if extension == "-J":  # whose names end at 103 characters
        expected = {path: what for path, what in expected.items() if b"yyy" not in path}
    found = {path: what for path, what in seen(tmp_path / "image").items() if b"yyy" not in path}
    assert found == expected


def test_iso_knows_its_root_and_the_sizes_of_what_is_compressed(tmp_path, require_program):
    for name in ("genisoimage", "mkzftree"):
        require_program(name)
    tree, packed = tmp_path / "tree", tmp_path / "packed"
    (tree / "sub").mkdir(parents=True)
    (tree / "large").write_bytes(bytes(100_000))
    (tree / "small").write_bytes(b"s" * 10)
    file_trees.run("mkzftree", tree, packed)
    packed.chmod(0o1750)
    os.utime(packed, (1_500_000_000, 1_500_000_000))
    file_trees.run("genisoimage", "-quiet", "-R", "-z", "-o", tmp_path / "image", packed)
    expected = packed.stat()
    with File(tmp_path / "image") as disk:
        reader = opened(disk)
        root, nodes = reader.root(), dict(file_trees.walked(reader))
    assert (packed / "large").stat().st_size < 1000
    assert (nodes[b"large"].size, nodes[b"small"].size) == (100_000, 10)
    assert (root.mode, root.uid, root.gid) == (0o1750, expected.st_uid, expected.st_gid)
    assert (root.links, root.modified) == (expected.st_nlink, 1_500_000_000 * 10**9)


@pytest.mark.parametrize(
    ("place", "data", "kind"),
    [
        (0, b"LUKS\xba\xbe\0\2", Kind.LUKS),
        (3, b"-FVE-FS-", Kind.BITLOCKER),
        (4086, b"SWAPSPACE2", Kind.SWAP),
        (512, b"LABELONE".ljust(24, b"\0") + b"LVM2 001", Kind.LVM),
        (0, b"XFSB", Kind.XFS),
        ((64 << 10) + 64, b"_BHRfS_M", Kind.BTRFS),
        (4096, b"\xfc\x4e\x2b\xa9\1\0\0\0", Kind.RAID),
        (3, b"ReFS\0", Kind.REFS),
        (32, b"NXSB", Kind.APFS),
        (0, b"hsqs", Kind.SQUASHFS),
        (1024, b"\xe2\xe1\xf5\xe0", Kind.EROFS),
        (1024, b"\x10\x20\xf5\xf2", Kind.F2FS),
        (1024, b"H+\0\4", Kind.HFSPLUS),
        (4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), Kind.BCACHEFS),
        (32768, b"JFS1", Kind.JFS),
        (32769, b"BEA01".ljust(2048, b"\0") + b"NSR02", Kind.UDF),
        ((64 << 10) + 52, b"ReIsEr2Fs", Kind.REISERFS),
        ((64 << 10) + 1372, b"\x19\1\x54\x19", Kind.UFS),
    ],
    ids=lambda one: one.value if isinstance(one, Kind) else "",
)
def test_what_is_no_file_system_of_ours_is_named(tmp_path, place, data, kind):
    image = tmp_path / "image"
    image.write_bytes(bytes(place) + data + bytes(256 << 10))
    with File(image) as disk:
        assert signatures.recognise(disk).kind is kind


def test_memory_of_a_system_that_sleeps_is_never_taken_for_an_array(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(4086) + b"S1SUSPEND\0" + b"\xfc\x4e\x2b\xa9\1\0\0\0" + bytes(256 << 10))
    with File(image) as disk:
        assert signatures.recognise(disk).kind is Kind.SWSUSPEND


def test_an_empty_disk_holds_nothing(tmp_path):
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    with File(tmp_path / "image") as disk:
        assert signatures.recognise(disk) is None
