"""File systems that were not unmounted, made by the kernel: what our readers show is what Linux shows after its own replay."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from hvmgr import errors
from hvmgr.operations.inside import looking, views
from tests.storage import file_trees

# Mounts, fills and cuts off; then the copy is mounted, and its files are hashed by other programs. All in a namespace of its own.
CUT = r"""
set -e
mount -o loop"$4" "$1" "$3"
cd "$3"
mkdir old new deep
for i in $(seq 1 200); do echo "$i" >old/file$i; done
head -c 300000 /dev/urandom >old/large
sync
for i in $(seq 1 150); do echo "new $i" >"new/a rather long name of file $i"; done
for i in $(seq 1 2 200); do rm old/file$i; done
mv old/file2 deep/moved; ln old/file4 deep/hard; ln -s ../old/file6 deep/link; mkfifo deep/pipe
chmod 640 old/file8; chown 12:70000 old/file10; echo more >>old/file12; truncate -s 100 old/large
setfattr -n user.word -v value old/file14
for i in $(seq 1 60); do dd if=/dev/urandom of=pieces bs=4096 count=1 seek=$((3 * i)) conv=notrunc,fsync status=none; done
sync deep/moved pieces
$5
cd /
umount "$3"
"""
JUDGE = r"""
set -e
mount -o loop "$1" "$2"
cd "$2"
find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
echo
find . ! -type d -printf '%p|%y|%m|%U:%G|%s|%n|%l\n' | LC_ALL=C sort
cd /
umount "$2"
"""
LETTERS = {"file": "f", "link": "l", "pipe": "p"}
SHUTDOWN = 'xfs_io -x -c "shutdown -f" "$3"'
LIVE = 'cp --sparse=always "$1" "$2"'  # as a snapshot of a running guest: at some point between two writes


@pytest.fixture
def cut(tmp_path, require, require_program):
    """``cut(mkfs, how, options)``: an image that was cut off, and what the kernel makes of a copy of it."""
    require(os.geteuid() == 0, "only root can mount")

    def make(mkfs, how, options="", size="96M"):
        image, dirty, judged, at = (tmp_path / name for name in ("image", "dirty", "judged", "at"))
        at.mkdir()
        require_program(mkfs[0])
        with image.open("wb") as file:
            file.truncate(int(size[:-1]) << 20)
        file_trees.run(*mkfs, image)
        run("-ec", CUT.replace("$5", how), "sh", image, dirty, at, options)
        if not dirty.exists():
            shutil.copyfile(image, dirty)
        shutil.copyfile(dirty, judged)
        return dirty, run("-ec", JUDGE, "sh", judged, at)

    def run(*words):
        argv = ["unshare", "-m", "sh", *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        require("unknown filesystem type" not in done.stderr, f"this kernel has it not: {done.stderr}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return make


def seen(image):
    """The same by our reader, and what it says of itself."""
    with looking.opened([views.of_image(image, "raw")]) as inside:
        browser = inside.choose(b"/")
        hashes, facts = [], []
        for _, one in browser.walk(browser.root()):
            node, path = one.node, f".{one.path.decode()}"
            if node.is_folder:
                continue
            letter, target = LETTERS[node.type.value], (node.target or b"").decode()
            owner = f"{node.uid}:{node.gid}"
            facts.append(f"{path}|{letter}|{node.mode:o}|{owner}|{node.size}|{node.links}|{target}")
            if letter == "f":
                hashes.append((path, f"{file_trees.hash_of(browser.reader, node)}  {path}"))
        words = browser.reader.extras(browser.find(b"/old/file14").node)
        assert words.get("user.word") == b"value"
        return "\n".join([one for _, one in sorted(hashes)] + ["", *sorted(facts)]) + "\n", browser.reader.notes


@pytest.mark.parametrize(
    ("mkfs", "how", "options"),
    [
        (["mkfs.xfs", "-q", "-f"], SHUTDOWN, ""),
        (["mkfs.xfs", "-q", "-f", "-b", "size=2048", "-i", "size=1024"], SHUTDOWN, ",logbsize=256k"),
        (["mkfs.xfs", "-q", "-f"], LIVE, ""),
    ],
    ids=["XFS", "XFS with large records", "XFS while it is written"],
)
def test_the_log_of_xfs_is_replayed_as_linux_does(cut, mkfs, how, options):
    dirty, judged = cut(mkfs, how, options, size="320M")
    before = dirty.stat().st_mtime_ns
    shown, notes = seen(dirty)
    assert shown == judged
    assert notes == ["the log was replayed in memory: the file system had not been unmounted"]
    assert dirty.stat().st_mtime_ns == before


REUSED = """
fallocate -l 180M rest; mkdir many; (cd many; seq 6000 | xargs touch); rm -rf many; sleep 0.5
head -c 300M /dev/zero >full || true; sync; rm rest; sync
"""


def test_contents_where_inodes_were_are_not_replaced_by_those(cut):
    """The log has the inodes as new ones, and later that their place was given up; by now it is the file's."""
    dirty, judged = cut(["mkfs.xfs", "-q", "-f"], f"{REUSED} {LIVE}", size="320M")
    shown, notes = seen(dirty)
    assert shown == judged
    assert notes == ["the log was replayed in memory: the file system had not been unmounted"]


SYNCED = r"""
mv old/file20 deep/file20; sync deep/file20
mv old/file22 old/renamed; sync old/renamed
ln old/file24 deep/second; sync old/file24
rm old/file26 deep/hard; sync old deep
printf changed | dd of=old/large bs=1 seek=5000 conv=notrunc status=none; sync old/large
head -c 200000 /dev/urandom >>old/large; dd if=/dev/urandom of=pieces bs=1000 count=70 seek=3 conv=notrunc status=none; sync old/large pieces
truncate -s 70000 pieces; sync pieces; truncate -s 900000 old/file28; echo end >>old/file28; sync old/file28
setfattr -x user.word old/file14; setfattr -n user.word -v value old/file14; setfattr -n user.b -v c old/file16; sync old/file14 old/file16
mkdir deep/below; echo x >deep/below/x; sync deep/below/x; echo y >deep/below/y; sync deep/below
rm old/file30; echo again >old/file30; sync old/file30; chmod 600 old/file32; sync old/file32; ln -s nowhere deep/late; sync deep
"""


def test_the_log_of_btrfs_is_replayed_as_linux_does(cut):
    dirty, judged = cut(
        ["mkfs.btrfs", "-q"], f"cd /; umount $3; mount -o loop $1 $3; cd $3; {SYNCED} {LIVE}", size="320M"
    )
    shown, notes = seen(dirty)
    assert shown == judged
    assert notes == ["the log was replayed in memory: the file system had not been unmounted"]
    with dirty.open("r+b") as file:  # the tree of the last commit is whole without it
        file.seek((64 << 10) + 0x60)
        file.write((12345).to_bytes(8, "little"))
    shown, (note,) = seen(dirty)
    assert shown != judged
    assert note.endswith("what single files were synced since its last commit is not seen")


FAST = r"""
echo first >old/first; sync old/first; sleep 0.1
echo begun >old/begun; sync old/begun
mv old/file22 old/renamed; ln old/file24 deep/second; rm old/file26; echo more >>old/file28; sync old/file28
printf changed | dd of=old/large bs=1 seek=5000 conv=notrunc status=none; head -c 200000 /dev/urandom >>old/large; sync old/large
dd if=/dev/urandom of=pieces bs=1000 count=70 seek=3 conv=notrunc status=none; truncate -s 700000 pieces; sync pieces
mkdir deep/below; echo x >deep/below/x; ln -s nowhere deep/late; sync deep/below/x
truncate -s 5000 pieces; chmod 600 old/file32; chown 3:4 old/file34; rm old/file30; echo again >old/file30; sync old/file30
"""


def test_fast_commits_of_ext4_are_replayed_as_linux_does(cut):
    how = f"cd /; umount $3; mount -o loop $1 $3; cd $3; {FAST} {LIVE}"
    dirty, judged = cut(["mkfs.ext4", "-q", "-O", "fast_commit"], how)
    shown, notes = seen(dirty)
    with looking.opened([views.of_image(dirty, "raw")]) as inside:
        assert inside.choose(b"/").reader._fast, "there are none"
    assert shown == judged
    assert notes == ["the journal was replayed in memory: the file system had not been unmounted"]


@pytest.mark.parametrize("how", [SHUTDOWN, LIVE], ids=["cut off", "while it is written"])
def test_the_journal_of_ext4_is_replayed_as_linux_does(cut, how):
    dirty, judged = cut(["mkfs.ext4", "-q"], how)
    shown, notes = seen(dirty)
    assert shown == judged
    assert notes == ["the journal was replayed in memory: the file system had not been unmounted"]


def test_a_damaged_log_of_xfs_is_an_error_and_no_hang(cut):
    """Bytes of the log changed at random: what is whole of it is replayed, or it is Corrupt; nothing else."""
    import random

    dirty, _ = cut(["mkfs.xfs", "-q", "-f"], SHUTDOWN, size="320M")
    chance = random.Random(11)
    with dirty.open("r+b") as file:
        file.seek(48)
        start = int.from_bytes(file.read(8), "big")
        file.seek(84)
        per_group = int.from_bytes(file.read(4), "big")
        file.seek(124)
        group_log = file.read(1)[0]
        log = ((start >> group_log) * per_group + (start & (1 << group_log) - 1)) * 4096
        for _ in range(6):
            for _ in range(200):
                file.seek(log + chance.randrange(2 << 20))
                file.write(bytes([chance.randrange(256)]))
            file.flush()
            try:
                with looking.opened([views.of_image(dirty, "raw")]) as inside:
                    browser = inside.choose(b"/")
                    assert len(list(browser.walk(browser.root()))) < 10000
            except errors.HvmgrError as error:
                assert error.code in {"Corrupt", "Unsupported"}  # noqa: PT017
