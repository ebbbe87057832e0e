"""The catalog: what is served is what was added, what is deployed is that again, and nothing goes that is needed."""

from __future__ import annotations

import json
import subprocess

import pytest

import hvmgr
from hvmgr import errors, vhd
from hvmgr.model.disk_layout import FileSystem, LayoutWish, TableKind
from hvmgr.model.wim_options import WimApplyOptions
from hvmgr.operations.images import making
from hvmgr.storage import copy, index
from hvmgr.storage.catalog import AnswerKind, Catalog
from hvmgr.vhd.source import read

MIB = 1 << 20


@pytest.fixture
def catalog(folder):
    """An empty catalog."""
    return folder.host.catalog(folder / "catalog")


@pytest.fixture
def target(folder):
    (folder / "vms").mkdir()
    return folder / "vms"


def test_folder_says_what_is_in_it(folder, catalog):
    """Any web server serves it: the document names the files, and their checksums are right."""
    folder.raw("a.raw")
    folder.images.convert(folder / "a.raw", folder / "b.vhd")
    catalog.add(folder / "a.raw", group="Linux", description="the first")
    catalog.add(folder / "b.vhd", name="second")
    document = json.loads((folder / "catalog" / "catalog.json").read_text())
    assert [(one["name"], one["group"], one["kind"], one["disk"]) for one in document["images"]] == [
        ("a", "Linux", "raw", 4 * MIB),
        ("second", "Default", "vhd", 4 * MIB),
    ]
    for one in document["images"]:
        file = folder / "catalog" / one["file"]
        assert (copy.sha256(file), file.stat().st_size, file.stat().st_mode & 0o777) == (
            one["sha256"],
            one["size"],
            0o444,
        )
    assert catalog.verify() == []
    catalog.move(["second", "a"], "All of them")
    assert [one.name for one in catalog.entries("All of them")] == ["a", "second"]
    assert catalog.entries("Linux") == []


def test_copy_is_what_was_added_and_a_changed_file_is_not_deployed(folder, catalog, target):
    folder.raw("a.raw")
    folder.images.convert(folder / "a.raw", folder / "a.qcow2")
    entry = catalog.add(folder / "a.qcow2")
    made = catalog.deploy("a", target)
    assert made == target / "a.qcow2"
    assert made.read_bytes() == (folder / "a.qcow2").read_bytes()
    with pytest.raises(errors.Conflict, match="exists already"):
        catalog.deploy("a", target)
    made.unlink()
    file = folder / "catalog" / entry.file
    file.chmod(0o600)
    with file.open("r+b") as raw:
        raw.seek(300_000)
        raw.write(b"other bytes")
    assert catalog.verify() == ["images/a.qcow2 of 'a' was changed"]
    with pytest.raises(errors.Corrupt, match="checksum"):
        catalog.deploy("a", target)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(("name", "fmt"), [("a.vhd", "vhd"), ("a.qcow2", "qcow2"), ("a.raw", "qcow2")])
def test_linked_image_stands_on_the_catalogs_own_which_stays(folder, catalog, target, name, fmt):
    data = folder.raw("a.raw")
    if name != "a.raw":
        folder.images.convert(folder / "a.raw", folder / name)
    entry = catalog.add(folder / name)
    made = catalog.deploy("a", target, linked=True)
    found = folder.images.info(made, folders=[folder / "catalog" / "images"])
    assert (found.format, found.type.value, found.parent.path) == (fmt, "differencing", folder / "catalog" / entry.file)
    whole = folder / "whole.raw"
    folder.images.convert(made, whole, hvmgr.ImageOptions(folders=(folder / "catalog" / "images",)))
    assert whole.read_bytes() == data
    with pytest.raises(errors.Conflict, match="stands on 'a'"):
        catalog.remove("a")
    made.unlink()
    catalog.remove("a", gone=[made])
    assert list((folder / "catalog" / "images").iterdir()) == []
    assert catalog.entries() == []


def test_user_data_is_in_the_system_that_reads_it(folder, catalog, target, require_program):
    for program in ("mke2fs", "debugfs", "sfdisk"):
        require_program(program)
    tree = folder / "tree"
    (tree / "usr" / "bin").mkdir(parents=True)
    (tree / "usr" / "bin" / "cloud-init").touch()
    layout = LayoutWish(FileSystem.EXT4, TableKind.NONE)
    options = WimApplyOptions(rootfs=True, size=16 * MIB, layout=layout)
    folder.host.wims.apply(tree, folder / "linux.raw", options)
    (folder / "user-data").write_text("#cloud-config\nhostname: one\n")
    entry = catalog.add(folder / "linux.raw", answer=folder / "user-data")
    assert entry.answer.kind is AnswerKind.CLOUD_INIT

    def seen(disk):
        words = ["debugfs", "-R", "cat /var/lib/cloud/seed/nocloud/user-data", disk]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout

    made = catalog.deploy("linux", target)
    assert seen(made) == "#cloud-config\nhostname: one\n"
    subprocess.run(["e2fsck", "-f", "-n", made], check=True, capture_output=True, timeout=60)
    made.unlink()
    assert seen(catalog.deploy("linux", target, answered=False)) == ""
    made.unlink()
    linked = catalog.deploy("linux", target, linked=True).rename(folder / "linked.qcow2")
    assert seen(folder / "catalog" / entry.file) == ""  # the base has none
    folder.images.convert(linked, folder / "whole.raw")
    assert seen(folder / "whole.raw") == "#cloud-config\nhostname: one\n"


def test_unattend_file_is_where_windows_looks_and_a_wim_becomes_a_disk(folder, catalog, target, require_program):
    for program in ("wimlib-imagex", "mkntfs", "ntfscp", "ntfscat", "sfdisk"):
        require_program(program)
    (folder / "tree" / "windows" / "Panther").mkdir(parents=True)
    folder.host.wims.capture(folder / "tree", folder / "a.wim")
    entry = catalog.add(folder / "a.wim", group="Windows")
    assert (entry.kind, entry.disk, entry.parts) == ("wim", None, ((1, "tree"),))
    with pytest.raises(errors.UsageError, match="is a WIM"):
        catalog.deploy("a", target)
    layout = LayoutWish(FileSystem.NTFS, TableKind.NONE)
    disk = catalog.deploy("a", target, wim=WimApplyOptions(size=16 * MIB, layout=layout))
    (folder / "a.xml").write_text("<?xml version='1.0'?><unattend/>")
    catalog.add(disk, name="disk", answer=folder / "a.xml")
    made = catalog.deploy("disk", target)
    (folder / "volume").write_bytes(folder.shown(str(made.relative_to(folder.path))))
    words = ["ntfscat", "-f", folder / "volume", "windows/Panther/unattend.xml"]
    told = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
    assert told == "<?xml version='1.0'?><unattend/>"


def test_disk_without_the_system_for_its_answer_leaves_nothing(folder, catalog, target):
    folder.images.create(folder / "a.vhd", 4 * MIB)
    (folder / "a.xml").write_text("<unattend/>")
    catalog.add(folder / "a.vhd", answer=folder / "a.xml")
    for linked in (False, True):
        with pytest.raises(errors.NotFound, match="no Windows"):
            catalog.deploy("a", target, linked=linked)
        assert list(target.iterdir()) == []
    assert catalog.deploy("a", target, answered=False).exists()


def test_what_cannot_be_added_is_one_sentence_and_nothing_is_there(folder, catalog):
    folder.chain("base.vhd", "child.vhd")
    (folder / "note").write_text("no answer")
    (folder / "empty").mkdir()
    for source, more, error, what in (
        ("child.vhd", {}, errors.Unsupported, "differencing image"),
        ("none.vhd", {}, errors.NotFound, "there is no"),
        ("empty", {}, errors.UsageError, "is a folder"),
        ("base.vhd", {"name": "../out"}, errors.UsageError, "is no name"),
        ("base.vhd", {"group": ""}, errors.UsageError, "no name for a group"),
        ("base.vhd", {"answer": folder / "note"}, errors.UsageError, "no answer file"),
        ("base.vhd", {"answer": folder / "nothing"}, errors.NotFound, "there is no"),
    ):
        with pytest.raises(error, match=what):
            catalog.add(folder / source, **more)
    assert not (folder / "catalog").exists()
    catalog.add(folder / "base.vhd")
    with pytest.raises(errors.Conflict, match="has an image 'base' already"):
        catalog.add(folder / "base.vhd")
    with pytest.raises(errors.NotFound, match="no image 'other'"):
        catalog.remove("other")


def test_document_that_leads_out_of_the_folder_is_damaged(folder, catalog):
    folder.images.create(folder / "a.vhd", 4 * MIB)
    catalog.add(folder / "a.vhd")
    document = folder / "catalog" / "catalog.json"
    good = document.read_text()
    for bad in (
        good.replace("images/a.vhd", "../a.vhd"),
        good.replace("images/a.vhd", "/etc/passwd"),
        good.replace("images/a.vhd", "images/a\\u0000.vhd"),
        good.replace('"kind": "vhd"', '"kind": "floppy"'),
        good.replace(f'"disk": {4 * MIB}', '"disk": Infinity'),
        good[:50],
        "[]",
        "[" * 100_000,
    ):
        assert bad != good
        document.write_text(bad)
        with pytest.raises(errors.Corrupt, match=r"catalog\.json is damaged"):
            catalog.entries()
    document.write_text(good.replace('"version": 1', '"version": 2'))
    with pytest.raises(errors.Unsupported, match="newer"):
        catalog.entries()


def test_linked_image_and_removal_wait_for_each_other(folder, catalog, target):
    folder.images.create(folder / "a.vhd", 4 * MIB)
    path = catalog.folder / catalog.add(folder / "a.vhd").file
    folder.host.wait_s = 0
    for held in (Catalog(catalog.folder).changing(0), index.locked([path], wait_s=0)):
        with held:
            with pytest.raises(errors.Busy):
                catalog.deploy("a", target, linked=True)
            with pytest.raises(errors.Busy):
                catalog.remove("a")
    assert list(target.iterdir()) == []
    assert catalog.verify() == []


def test_what_happens_while_somebody_is_asked_counts(folder, catalog, target):
    """Another command may add, link or remove while the question stands: what was looked at is looked at again."""
    for name in "abc":
        folder.images.create(folder / f"{name}.vhd", 4 * MIB)
    catalog.add(folder / "a.vhd")
    with hvmgr.Host.open("test:///default", root=folder / "homes") as host:
        other = host.catalog(catalog.folder)

        def meanwhile(action):
            def approve(_):
                action()
                return True

            folder.host.reporter = hvmgr.Reporter(approve=approve)

        meanwhile(lambda: other.deploy("a", target, linked=True))
        with pytest.raises(errors.Conflict, match="stands on 'a'"):
            catalog.remove("a")
        meanwhile(lambda: other.add(folder / "c.vhd", name="b"))
        with pytest.raises(errors.Conflict, match="has an image 'b' already"):
            catalog.add(folder / "b.vhd")
        meanwhile(lambda: other.remove("b"))
        with pytest.raises(errors.NotFound, match="no image 'b'"):
            catalog.deploy("b", target, linked=True)
        assert not (target / "b.vhd").exists()
        assert catalog.verify() == []


def test_image_that_nobody_can_read_may_stand_on_the_catalogs_own(folder, catalog, target):
    folder.images.create(folder / "a.vhd", 4 * MIB)
    catalog.add(folder / "a.vhd")
    made = catalog.deploy("a", target, linked=True)
    with made.open("r+b") as file:
        file.seek(512 + 40)  # where the parent's id stands
        file.write(b"damage!!")
    with pytest.raises(errors.Conflict, match="stands on 'a'"):
        catalog.remove("a")
    assert catalog.verify() == []


def test_linked_image_that_was_moved_is_not_lost(folder, catalog, target):
    """Its place tells nothing of where it went, on whatever disk: only somebody can say that it is gone."""
    data = folder.raw("a.raw")
    folder.images.convert(folder / "a.raw", folder / "a.vhd")
    catalog.add(folder / "a.vhd")
    made = catalog.deploy("a", target, linked=True)
    moved = made.rename(folder / "moved.vhd")
    with pytest.raises(errors.Conflict, match="if it was moved, it needs 'a'"):
        catalog.remove("a")
    target.rmdir()
    with pytest.raises(errors.Conflict, match="is not there any more"):
        catalog.remove("a")
    with pytest.raises(errors.UsageError, match="was not made on 'a'"):
        catalog.remove("a", gone=[moved])
    with vhd.open_chain(moved, folders=[catalog.folder / "images"]) as disk:
        assert read(disk, 0, disk.size) == data
    target.mkdir()
    moved.rename(made)
    with pytest.raises(errors.Conflict, match="stands on 'a'"):  # whatever anybody says
        catalog.remove("a", gone=[made])
    made.unlink()
    catalog.remove("a", gone=[made])
    folder.images.create(folder / "b.vhd", 4 * MIB)
    catalog.add(folder / "b.vhd", name="a")
    catalog.remove("a")  # nothing was made on this one


def test_each_linked_image_that_was_moved_counts(folder, catalog, target, monkeypatch):
    """Two of one place are two; neither a failed third nor a whole image that stands there now makes them less."""
    folder.images.create(folder / "a.vhd", 4 * MIB)
    catalog.add(folder / "a.vhd")
    for number in (1, 2):
        made = catalog.deploy("a", target, linked=True)
        made.rename(folder / f"moved{number}.vhd")

    def fail(*_):
        raise errors.NoSpace("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(making, "make", fail)
        with pytest.raises(errors.NoSpace):
            catalog.deploy("a", target, linked=True)
    with pytest.raises(errors.Conflict, match="2 images were made on 'a'") as told:
        catalog.remove("a", gone=[made])
    assert told.value.hint.endswith(f"remove a --gone {made} --gone {made}")
    assert catalog.deploy("a", target) == made  # a copy
    with pytest.raises(errors.Conflict, match="needs 'a'"):
        catalog.remove("a", gone=[made])
    catalog.remove("a", gone=[made, made])


def test_whole_image_in_the_place_of_a_linked_one_is_not_that(folder, catalog, target):
    folder.images.create(folder / "a.vhd", 4 * MIB)
    catalog.add(folder / "a.vhd")
    catalog.deploy("a", target, linked=True).rename(folder / "moved.vhd")
    made = catalog.deploy("a", target)
    with pytest.raises(errors.Conflict, match="another image than that which was made there"):
        catalog.remove("a")
    # The folder may be reached in another way by now; the place is named as it was.
    target.rename(folder / "elsewhere")
    target.symlink_to(folder / "elsewhere")
    catalog.remove("a", gone=[made])


def test_linked_image_that_could_not_be_made_is_asked_for_by_nobody(folder, catalog, target, monkeypatch):
    folder.images.create(folder / "a.vhd", 4 * MIB)
    catalog.add(folder / "a.vhd")

    def fail(*_):
        raise errors.NoSpace("no space left")

    monkeypatch.setattr(making, "make", fail)
    with pytest.raises(errors.NoSpace):
        catalog.deploy("a", target, linked=True)
    catalog.remove("a")
