"""A member of the group libvirt: may speak to the system's libvirt, and is told in one sentence what that is not enough for."""

from __future__ import annotations

import grp
import os
import shutil

import pytest

from tests import private_libvirt
from tests.operations.users.conftest import CREATE, Person

pytestmark = pytest.mark.libvirtd

GROUP = "libvirt"


@pytest.fixture
def system(new_embed_root):
    """A system libvirt that root and a group may speak to, as on every distribution."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    conf = f'unix_sock_group = "{GROUP}"\nunix_sock_rw_perms = "0770"\n'
    with private_libvirt.daemon(new_embed_root(), libvirtd_conf=conf) as daemon:
        yield daemon


def person(user, system, groups):
    return Person(lambda *words: user.run(*words, groups=groups), user.python, system.uri)


def test_member_is_told_what_is_missing_before_anything_is_made(user, system):
    member = person(user, system, [grp.getgrnam(GROUP).gr_gid])
    assert member.hvmgr("vm", "list")["vms"] == []
    home = user.home / "vms"
    home.mkdir()
    user.owns(home)
    for words in (["vm", "create", "web", *CREATE, "--home", str(home / "web")], ["vm", "create", "web", *CREATE]):
        code, error = member.refused(*words)
        assert code == 5
        assert error["message"] == (
            f"{user.name} cannot change VMs on {system.uri}: QEMU runs as libvirt-qemu there, "
            "and only root can keep the images and the saved memory of its VMs in order"
        )
        assert error["hint"] == "run it as root (sudo), or have VMs of your own with -c qemu:///session"
    assert list(home.iterdir()) == []
    assert not user.root.exists() or list(user.root.glob("[!.]*")) == []
    assert member.virsh("list", "--all", "--name").strip() == ""


def test_others_are_told_where_they_may_have_vms(user, system):
    stranger = person(user, system, [])
    code, error = stranger.refused("vm", "create", "web", *CREATE)
    assert code == 8
    assert "Permission denied" in error["message"]
    assert "-c qemu:///session" in error["hint"]


def test_member_reads_what_there_is_to_be_read(user, system):
    member = person(user, system, [grp.getgrnam(GROUP).gr_gid])
    found = {one["code"]: one for one in member.hvmgr("doctor")["findings"] if one["severity"] != "info"}
    assert "libvirt-unreachable" not in found
    assert "only root" in found["user-limited"]["sentence"]
