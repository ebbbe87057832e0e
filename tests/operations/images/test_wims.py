"""WIM files: nothing of NTFS is lost on the way, nothing is changed by a failure, and no root is needed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import wimlib
from hvmgr.model.disk_layout import FileSystem, LayoutWish, TableKind
from hvmgr.model.wim_options import WimApplyOptions, WimCaptureOptions, WimCompression
from hvmgr.storage import index
from tests.operations.images import ntfs_volume

MIB = 1 << 20
# What a WIM says of a file that depends on the WIM, or on the order on the volume.
ITS_OWN = ("Offset in WIM", "Compressed size", "Flags  ", "Link Group ID")


@pytest.fixture(autouse=True)
def _programs(require_program):
    for name in ("wimlib-imagex", "mkntfs", "ntfsls", "sfdisk", "debugfs", "e2fsck"):
        require_program(name)


def run(*words):
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, timeout=60).stdout


def everything(wim, image=1):
    """All that wimlib tells of each file of an image."""
    lines = run("wimlib-imagex", "dir", wim, image, "--detailed").splitlines()
    return [line for line in lines if not line.startswith(ITS_OWN)]


@pytest.fixture
def tree(folder):
    """A few files in a folder."""
    place = folder / "tree"
    (place / "in it").mkdir(parents=True)
    (place / "one.txt").write_text("one")
    (place / "in it" / "random").write_bytes(os.urandom(200_000))
    return place


@pytest.fixture
def wim(folder, tree):
    """A WIM with one image of them."""
    folder.host.wims.capture(tree, folder / "a.wim", WimCaptureOptions("One", "the first", WimCompression.FAST))
    return folder / "a.wim"


def new_disk(size=16 * MIB, **more):
    return WimApplyOptions(size=size, layout=LayoutWish(FileSystem.NTFS, **more))


@pytest.fixture
def disk(folder):
    """A VHD with an empty NTFS volume."""
    folder.images.prepare(folder / "os.vhd", size=16 * MIB)
    return folder / "os.vhd"


def files(folder):
    return {name: (folder / name).read_bytes() for name in folder.names() if (folder / name).is_file()}


def test_ordinary_user_keeps_all_of_ntfs_on_the_way(user, require_program):
    """capture → apply → capture, as a user without any right: equal, with what only Windows has."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount the volume that is captured")
    for name in ("ntfs-3g", "unshare"):
        require_program(name)
    volume, place = user.home / "volume.raw", user.folder / "mounted"
    place.mkdir()
    with volume.open("wb") as file:
        file.truncate(16 * MIB)
    run("mkntfs", "-q", "-F", "-Q", volume)
    run("unshare", "-m", sys.executable, ntfs_volume.__file__, volume, place)
    user.owns(volume)

    def call(*words):
        answer = user.run(user.python, "-m", "hvmgr", "-c", "test:///default", *words)
        assert answer.returncode == 0, answer.stderr

    call("wim", "capture", "volume.raw", "first.wim", "--name", "all", "--compress", "fast")
    call("wim", "apply", "first.wim", "disk.vhd", "--size", "40M", "--table", "mbr")
    call("wim", "capture", "disk.vhd", "second.wim", "--name", "all", "--compress", "none")
    first = everything(user.home / "first.wim")
    assert first == everything(user.home / "second.wim")
    told = "\n".join(first)
    assert f'Short Name          = "{ntfs_volume.SHORT}"' in told
    assert f'Named data stream "{ntfs_volume.STREAM}"' in told
    assert f"Reparse Tag         = {ntfs_volume.JUNCTION:#010x}" in told
    assert f"Attributes          = {ntfs_volume.HIDDEN_ARCHIVE:#010x}" in told
    assert f"Security Descriptor = {ntfs_volume.security_descriptor().hex()}" in told
    assert told.count("Link Count          = 2") == 2
    assert not list(user.home.glob(".hvmgr-part-*"))


def test_wim_goes_onto_a_prepared_disk_and_back(folder, wim, tree, disk):
    done = folder.host.wims.apply(wim, disk)
    assert (done.partition, done.is_new, done.source) == (1, False, "One")
    folder.host.wims.capture(disk, folder / "back.wim")
    target = folder / "out"
    run("wimlib-imagex", "apply", folder / "back.wim", "1", target)
    assert {str(one.relative_to(target)): one.read_bytes() for one in target.rglob("*") if one.is_file()} == {
        str(one.relative_to(tree)): one.read_bytes() for one in tree.rglob("*") if one.is_file()
    }
    run("wimlib-imagex", "verify", folder / "back.wim")


@pytest.mark.parametrize("name", ["a.qcow2", "a.raw"])
def test_new_disk_holds_the_files(folder, wim, name):
    layout = {"table": TableKind.NONE} if name == "a.raw" else {}
    folder.host.wims.apply(wim, folder / name, new_disk(**layout))
    folder.host.wims.capture(folder / name, folder / "back.wim", WimCaptureOptions("One"))
    found = wimlib.info(folder / "back.wim").images[0]
    assert (found.files, found.total) == (2, 200_003)


def test_volume_with_files_is_kept_unless_that_is_given_up(folder, wim, disk):
    folder.host.wims.apply(wim, disk)
    before = files(folder)
    with pytest.raises(errors.Conflict, match=r"holds files: .*one\.txt"):
        folder.host.wims.apply(wim, disk)
    assert files(folder) == before
    folder.host.wims.apply(wim, disk, WimApplyOptions(reformat=True))
    folder.host.wims.capture(disk, folder / "back.wim")
    assert wimlib.info(folder / "back.wim").images[0].files == 2


def test_damaged_wim_changes_nothing(folder, wim, disk):
    raw = bytearray(wim.read_bytes())
    raw[1000:1400] = os.urandom(400)
    (folder / "bad.wim").write_bytes(raw)
    (folder / "cut.wim").write_bytes(wim.read_bytes()[:100_000])
    (folder / "junk.wim").write_bytes(b"no WIM at all")
    before = files(folder)
    for name, what in (("bad.wim", "damaged"), ("cut.wim", "damaged"), ("junk.wim", "no WIM file")):
        with pytest.raises(errors.Corrupt, match=what) as caught:
            folder.host.wims.apply(folder / name, disk)
        assert name in str(caught.value)
        with pytest.raises(errors.Corrupt, match=what):
            folder.host.wims.apply(folder / name, folder / "new.vhd", new_disk())
    with pytest.raises(errors.Corrupt, match="damaged"):
        folder.host.wims.info(folder / "bad.wim", verify=True)
    assert files(folder) == before
    assert not [name for name in folder.names() if name.startswith(".")]


def test_files_that_do_not_fit_change_nothing(folder, tree, disk):
    (tree / "more").write_bytes(os.urandom(13 * MIB))
    folder.host.wims.capture(tree, folder / "full.wim", WimCaptureOptions(compression=WimCompression.NONE))
    (tree / "much").write_bytes(os.urandom(8 * MIB))
    folder.host.wims.capture(tree, folder / "large.wim", WimCaptureOptions(compression=WimCompression.NONE))
    before = disk.read_bytes()
    for name in ("full.wim", "large.wim"):
        with pytest.raises(errors.NoSpace):
            folder.host.wims.apply(folder / name, disk)
    assert disk.read_bytes() == before


def test_wim_takes_more_images_and_one_is_chosen(folder, wim, tree, disk):
    wims = folder.host.wims
    (tree / "two.txt").write_text("two")
    made = wims.capture(tree, wim, WimCaptureOptions("Two", append=True))
    assert [(one.index, one.name, one.files) for one in made.images] == [(1, "One", 2), (2, "Two", 3)]
    run("wimlib-imagex", "verify", wim)
    with pytest.raises(errors.UsageError, match="holds 2 images"):
        wims.apply(wim, disk)
    with pytest.raises(errors.NotFound, match="no image 'Three'"):
        wims.apply(wim, disk, WimApplyOptions(image="Three"))
    with pytest.raises(errors.Conflict, match="has an image 'Two' already"):
        wims.capture(tree, wim, WimCaptureOptions("Two", append=True))
    with pytest.raises(errors.Conflict, match="exists already"):
        wims.capture(tree, wim)
    assert wims.apply(wim, disk, WimApplyOptions(image="Two")).source == "Two"


def test_disk_without_the_volume_says_what_it_has(folder, wim, disk):
    wims = folder.host.wims
    folder.images.prepare(folder / "linux.raw", LayoutWish(FileSystem.EXT4), size=16 * MIB)
    folder.images.create(folder / "blank.vhd", 16 * MIB)
    two = LayoutWish(FileSystem.NTFS, esp=34 * MIB)
    folder.images.prepare(folder / "two.raw", two, size=64 * MIB)
    before = files(folder)
    for name, options, error, what in (
        ("linux.raw", WimApplyOptions(), errors.NotFound, "no volume with ntfs"),
        ("blank.vhd", WimApplyOptions(), errors.NotFound, "no volume with ntfs"),
        ("two.raw", WimApplyOptions(partition=1), errors.Conflict, "holds no ntfs: fat"),
        ("two.raw", WimApplyOptions(partition=9), errors.NotFound, "no partition 9"),
        ("none.vhd", WimApplyOptions(), errors.NotFound, "there is no"),
        ("tree", WimApplyOptions(), errors.UsageError, "is a folder"),
    ):
        with pytest.raises(error, match=what):
            wims.apply(wim, folder / name, options)
    assert files(folder) == before


def test_image_with_a_child_is_refused(folder, wim, disk):
    folder.images.create(folder / "child.vhd", options=hvmgr.ImageOptions(parent=disk))
    before = files(folder)
    with pytest.raises(errors.Conflict, match=r"needed by .*child\.vhd"):
        folder.host.wims.apply(wim, disk)
    assert files(folder) == before
    folder.host.wims.apply(wim, folder / "child.vhd")  # the child itself takes it, and the base stays
    assert disk.read_bytes() == before["os.vhd"]
    folder.host.wims.capture(folder / "child.vhd", folder / "back.wim")
    assert wimlib.info(folder / "back.wim").images[0].files == 2


def test_stop_in_the_middle_leaves_everything(folder, wim, disk):
    before = files(folder)

    def stop(progress):
        if progress.what.startswith("apply"):
            raise errors.Cancelled("stopped")

    folder.host.reporter = hvmgr.Reporter(progress=stop)
    with pytest.raises(errors.Cancelled):
        folder.host.wims.apply(wim, disk)
    assert files(folder) == before
    assert not [name for name in folder.names() if name.startswith(".")]


@pytest.mark.parametrize("source", ["tree", "os.vhd"])
def test_one_command_at_a_time_makes_a_wim(folder, tree, disk, source):
    """A second one would share the first one's folder for the work, and remove it. It leaves all of that alone."""
    working = folder / ".hvmgr-part-new.wim.work"
    working.mkdir()
    folder.host.wait_s = 0
    with index.making(folder / "new.wim", wait_s=0), pytest.raises(errors.Busy, match=r"new\.wim"):
        folder.host.wims.capture(folder / source, folder / "new.wim")
    assert working.is_dir()


def test_number_that_nothing_can_have_is_none():
    xml = f"<WIM><IMAGE><FILECOUNT>7</FILECOUNT><TOTALBYTES>{'9' * 5000}</TOTALBYTES></IMAGE></WIM>"
    (found,) = wimlib._images(Path("a.wim"), xml.encode())
    assert (found.files, found.total) == (7, 0)


# --- Linux trees --------------------------------------------------------------------------------------------------------


def archive(path, *, with_root=True):
    """A tar with owners, a setuid program, a capability, a device node, links of both kinds, a way that leads out."""
    capability = bytes.fromhex("0100000200200000000000000000000000000000").decode("latin-1")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name, kind=tarfile.REGTYPE, data=b"", **facts):
            one = tarfile.TarInfo(name)
            one.type, one.size, one.mtime = kind, len(data), 1_700_000_000
            for key, value in facts.items():
                setattr(one, key, value)
            tar.addfile(one, io.BytesIO(data))

        if with_root:
            add("./", tarfile.DIRTYPE, mode=0o755)
        add("./usr/bin/ping", data=b"ping", mode=0o755, pax_headers={"SCHILY.xattr.security.capability": capability})
        add("./usr/bin/su", data=b"su", mode=0o4755)
        add("./bin", tarfile.SYMTYPE, linkname="/usr/bin", mode=0o777)
        add("./bin/through the link", data=b"inside", mode=0o644)
        add("./home/joe", tarfile.DIRTYPE, mode=0o700, uid=1000, gid=100_000)
        add('./home/joe/a "name"', data=b"joe", mode=0o600, uid=1000, gid=100_000)
        add("./usr/bin/other", tarfile.LNKTYPE, linkname="./usr/bin/su")
        add("./dev/null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)
        add("./run/pipe", tarfile.FIFOTYPE, mode=0o600)
    return path


def facts_of(volume, path):
    """What debugfs says of a file: mode, owner, group, links."""
    told = run("debugfs", "-R", f'stat "{path}"', volume)
    words = told.replace("\n", " ").split()
    return tuple(words[words.index(key) + 1] for key in ("Mode:", "User:", "Group:", "Links:")), told


def check_archive(volume):
    run("e2fsck", "-f", "-n", volume)
    assert facts_of(volume, "/")[0][:3] == ("0755", "0", "0")
    assert facts_of(volume, "/usr")[0][:3] == ("0755", "0", "0")
    assert facts_of(volume, "/usr/bin/su")[0] == ("04755", "0", "0", "2")
    assert facts_of(volume, "/home/joe")[0][:3] == ("0700", "1000", "100000")
    assert facts_of(volume, '/home/joe/a ""name""')[0] == ("0600", "1000", "100000", "1")
    assert "Device major/minor number: 01:03" in facts_of(volume, "/dev/null")[1]
    assert "Type: FIFO" in facts_of(volume, "/run/pipe")[1]
    assert "0x6553f100" in facts_of(volume, "/usr/bin/ping")[1]  # the time
    assert "cap_net_raw" in run("debugfs", "-R", 'ea_list "/usr/bin/ping"', volume) or "01 00 00 02 00 20" in run(
        "debugfs", "-R", "ea_get -x /usr/bin/ping security.capability", volume
    )
    assert run("debugfs", "-R", 'cat "/usr/bin/through the link"', volume) == "inside"


def test_ordinary_user_makes_a_root_file_system_of_an_archive(user):
    archive(user.home / "tree.tar")
    user.owns(user.home / "tree.tar")
    words = ("wim", "apply", "--rootfs", "tree.tar", "disk.raw", "--size", "16M", "--table", "none", "--label", "root")
    answer = user.run(user.python, "-m", "hvmgr", "-c", "test:///default", *words)
    assert answer.returncode == 0, answer.stderr
    check_archive(user.home / "disk.raw")


def test_folder_and_archive_go_onto_a_disk_that_is_there(folder, tree):
    layout = LayoutWish(FileSystem.EXT4, TableKind.NONE, "mine")
    folder.images.prepare(folder / "a.raw", layout, size=16 * MIB)
    folder.host.wims.apply(tree, folder / "a.raw", WimApplyOptions(rootfs=True))
    assert run("debugfs", "-R", "cat /one.txt", folder / "a.raw") == "one"
    assert run("e2label", folder / "a.raw") == "mine\n"
    archive(folder / "tree.tar", with_root=False)
    before = (folder / "a.raw").read_bytes()
    with pytest.raises(errors.Conflict, match="holds files"):
        folder.host.wims.apply(folder / "tree.tar", folder / "a.raw", WimApplyOptions(rootfs=True))
    assert (folder / "a.raw").read_bytes() == before
    folder.host.wims.apply(folder / "tree.tar", folder / "a.raw", WimApplyOptions(rootfs=True, reformat=True))
    check_archive(folder / "a.raw")


@pytest.mark.parametrize(
    ("members", "error", "what"),
    [
        (
            [("a", tarfile.SYMTYPE, "b"), ("b", tarfile.SYMTYPE, "a"), ("a/x", tarfile.REGTYPE, "")],
            errors.Corrupt,
            "circle",
        ),
        ([("a", tarfile.LNKTYPE, "nothing")], errors.Corrupt, "not in the archive"),
        ([("a\nb", tarfile.REGTYPE, "")], errors.Unsupported, "line break"),
    ],
)
def test_archive_that_cannot_be_unpacked_leaves_no_disk(folder, members, error, what):
    with tarfile.open(folder / "bad.tar", "w") as tar:
        for name, kind, link in members:
            one = tarfile.TarInfo(name)
            one.type, one.linkname = kind, link
            tar.addfile(one)
    options = WimApplyOptions(rootfs=True, size=16 * MIB, layout=LayoutWish(FileSystem.EXT4))
    with pytest.raises(error, match=what):
        folder.host.wims.apply(folder / "bad.tar", folder / "a.raw", options)
    (folder / "cut.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(errors.Corrupt, match="no tar archive"):
        folder.host.wims.apply(folder / "cut.tar", folder / "a.raw", options)
    assert folder.names() == {"bad.tar", "cut.tar"}


def test_way_out_of_the_archive_leads_nowhere(folder):
    secret = folder / "outside"
    with tarfile.open(folder / "bad.tar", "w") as tar:
        link = tarfile.TarInfo("way")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder.path)
        tar.addfile(link)
        for name in ("way/outside", "../../outside", f"{secret}"):
            tar.addfile(tarfile.TarInfo(name))
    options = WimApplyOptions(rootfs=True, size=16 * MIB, layout=LayoutWish(FileSystem.EXT4, TableKind.NONE))
    folder.host.wims.apply(folder / "bad.tar", folder / "a.raw", options)
    assert not secret.exists()
    assert Path(folder / "a.raw").exists()


@pytest.fixture
def linux(folder):
    """A raw image of nothing but an empty ext4 volume."""
    folder.images.prepare(folder / "a.raw", LayoutWish(FileSystem.EXT4, TableKind.NONE), size=16 * MIB)
    return folder / "a.raw"


def changed(volume, *commands):
    """The volume after these commands of debugfs."""
    subprocess.run(["debugfs", "-w", "-f", "-", volume], input="\n".join(commands), text=True, check=True, timeout=60)


def only_in_the_journal(folder, volume, *commands):
    """The commands are done to the volume, but stand in its journal only: the system stopped before it wrote them."""
    before = volume.read_bytes()
    size = int(run("debugfs", "-R", "stats -h", volume).partition("Block size:")[2].split()[0])
    changed(volume, *commands)
    after = volume.read_bytes()
    numbers = [at // size for at in range(0, len(after), size) if before[at : at + size] != after[at : at + size]]
    numbers = [one for one in numbers if one]  # the first one holds the superblock, which the journal's own state is in
    (folder / "blocks").write_bytes(b"".join(after[one * size : (one + 1) * size] for one in numbers))
    volume.write_bytes(before)
    changed(volume, "jo", f"jw -b {','.join(map(str, numbers))} {folder / 'blocks'}", "jc")
    (folder / "blocks").unlink()


def refused(folder, tree, disk, what):
    before = disk.read_bytes()
    with pytest.raises(errors.Conflict, match=what):
        folder.host.wims.apply(tree, disk, WimApplyOptions(rootfs=True))
    assert disk.read_bytes() == before


def test_what_e2fsck_saved_is_kept(folder, tree, linux):
    changed(linux, "cd lost+found", f"write {tree / 'one.txt'} #12")
    refused(folder, tree, linux, r"holds files: lost\+found/#12")


def test_folder_is_windows_own_on_ntfs_only(folder, tree, linux):
    changed(linux, "mkdir RECYCLER")
    refused(folder, tree, linux, "holds files: RECYCLER")


def test_what_the_journal_holds_is_kept(folder, tree, linux):
    only_in_the_journal(folder, linux, f"write {tree / 'one.txt'} one.txt")
    assert "one.txt" not in run("debugfs", "-R", "ls /", linux)
    refused(folder, tree, linux, r"holds files: one\.txt")


def test_volume_whose_root_cannot_be_read_is_not_empty(folder, tree, linux):
    changed(linux, "set_inode_field <2> mode 0100644")
    before = linux.read_bytes()
    with pytest.raises((errors.Corrupt, errors.HostFailed)):
        folder.host.wims.apply(tree, linux, WimApplyOptions(rootfs=True))
    assert linux.read_bytes() == before
