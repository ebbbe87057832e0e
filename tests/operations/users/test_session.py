"""An ordinary user with a session libvirt: own root, own QEMU, everything but the system's networks."""

from __future__ import annotations

import os

import pytest

from tests import forking, full_disk
from tests.operations.users.conftest import CREATE, Person

pytestmark = pytest.mark.libvirtd


@pytest.fixture
def person(user):
    with forking.opened(["hvmgr"], command=user.command(user.python)) as commands:
        yield Person(user.run, user.python, "qemu:///session", commands)


def test_life_of_a_vm_from_its_creation_to_its_deletion(user, person):
    person.make("web")
    person.write("web", 1)
    person.hvmgr("snapshot", "create", "web", "off")
    person.write("web", 2)
    person.hvmgr("vm", "start", "web")
    person.hvmgr("snapshot", "create", "web", "running")
    person.hvmgr("snapshot", "create", "web", "disks", "--type", "disk-only")
    person.hvmgr("snapshot", "apply", "web", "off")
    assert person.hvmgr("vm", "show", "web")["vm"]["state"] == "off"
    assert person.holds("web", 1)
    person.hvmgr("snapshot", "undo", "web")
    assert person.holds("web", 2)
    person.hvmgr("snapshot", "apply", "web", "running")
    assert person.hvmgr("vm", "show", "web")["vm"]["state"] == "running"
    person.hvmgr("snapshot", "delete", "web", "disks")
    person.hvmgr("vm", "stop", "web", "--force")
    person.hvmgr("snapshot", "delete", "web", "off")
    assert person.holds("web", 2)
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in user.root.rglob("*")}
    assert owners == {(user.uid, user.gid)}
    assert [one for one in person.hvmgr("doctor")["findings"] if one["severity"] != "info"] == []
    person.hvmgr("vm", "delete", "web", "--with-disks", "--yes")
    assert not (user.root / "web").exists()
    assert person.virsh("list", "--all", "--name").strip() == ""


def test_saved_state_of_libvirts_own_is_part_of_the_present(person):
    person.make("web")
    person.hvmgr("vm", "start", "web")
    person.virsh("managedsave", "web")
    person.hvmgr("snapshot", "create", "web", "saved")
    person.hvmgr("snapshot", "apply", "web", "saved")
    assert person.hvmgr("vm", "show", "web")["vm"]["state"] == "running"


def test_network_of_the_systems_is_refused_before_anything_is_made(user, person):
    code, error = person.refused("vm", "create", "web", *CREATE[:-1], "default")
    assert code == 5
    assert error["message"] == "qemu:///session has no network 'default': libvirt's networks belong to the system"
    assert "--network user" in error["hint"]
    assert not (user.root / "web").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_snapshot_is_deleted_on_a_full_disk(user, person, tmp_path):
    user.root.mkdir(parents=True)
    with full_disk.mounted("ext4", tmp_path / "image", user.root):
        user.owns(user.home / ".local")
        person.make("web")
        for name in ("one", "two"):
            person.hvmgr("snapshot", "create", "web", name)
        person.hvmgr("snapshot", "apply", "web", "one", "--no-undo")
        full_disk.fill(user.root)
        assert person.refused("snapshot", "create", "web", "three")[0] == 7
        person.hvmgr("snapshot", "delete", "web", "two")
        assert [one["name"] for one in person.hvmgr("snapshot", "list", "web")["snapshots"]] == ["one"]
        full_disk.clear(user.root)
        person.hvmgr("snapshot", "create", "web", "three")
        assert (user.root / "web/.hvmgr/reserve").stat().st_uid == user.uid
        person.hvmgr("vm", "delete", "web", "--with-disks", "--yes")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a folder of another's")
def test_image_in_a_folder_that_cannot_be_listed_is_told(user, person):
    folder = user.home / "images"
    folder.mkdir()
    image = folder / "a.raw"
    image.write_bytes(bytes(1 << 20))
    image.chmod(0o644)
    folder.chmod(0o711)
    (one,) = person.hvmgr("image", "info", str(image))["image"]["used_by"]
    assert (one["use"], f"no permission for {folder}" in one["name"]) == ("unknown", True)
    code, error = person.refused("image", "convert", str(image), str(folder / "b.qcow2"))
    assert (code, error["message"]) == (8, f"no permission for {folder / 'b.qcow2'}")
    image.chmod(0o600)
    code, error = person.refused("vm", "create", "web", *CREATE[2:], "--disk", str(image))
    assert (code, error["hint"]) == (8, "run as root, or give your user access to it")
