"""Owners and modes as docs/users.md tells them, whatever user a host's qemu.conf gives QEMU, and whoever owns images."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import forking, private_libvirt
from tests.operations.users.conftest import CREATE, Person

pytestmark = pytest.mark.libvirtd

# The group of /dev/kvm: for a QEMU that may not open it, libvirt learns all about it again, which takes 8 s.
AS_NOBODY = 'user = "nobody"\ngroup = "kvm"\n'
STATIC = "dynamic_ownership = 0\n"


@dataclass(frozen=True)
class Host:
    """A host by its qemu.conf, and to whom images belong there as hvmgr makes them, and after a VM ran on them."""

    conf: str
    made: str
    after: str
    options: tuple[str, ...] = ()


HOSTS = {
    "libvirt-gives-nothing-away": Host(STATIC, "libvirt-qemu", "libvirt-qemu", ("--template", "generation2")),
    "another-user": Host(AS_NOBODY + STATIC, "nobody", "nobody"),
}
SIMPLER = {
    "root": Host('user = "root"\ngroup = "root"\n', "root", "root"),
    "owners-forgotten": Host("remember_owner = 0\n", "libvirt-qemu", "root"),
}


class Shell(Person):
    """Root at a shell of the host: what it runs sees the private libvirt under its usual names."""

    def __init__(self, daemon, place, commands):
        self.daemon = daemon
        self.place = place
        super().__init__(self._run, sys.executable, "qemu:///system", commands)

    def _run(self, *words):
        command = [*self.daemon.enter, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def home(self, name):
        return self.place / "homes" / name


@pytest.fixture
def place():
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def make_shell(new_embed_root, place, monkeypatch):
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    monkeypatch.setenv("HVMGR_ROOT", str(place / "homes"))
    monkeypatch.setenv("HVMGR_INDEX", str(place / "index"))
    with contextlib.ExitStack() as stack:

        def make(conf):
            daemon = stack.enter_context(private_libvirt.daemon(new_embed_root(), qemu_conf=conf))
            inside = [*daemon.enter, sys.executable]
            return Shell(daemon, place, stack.enter_context(forking.opened(["hvmgr"], command=inside)))

        yield make


def files_of(home, *patterns):
    found = [path for pattern in patterns for path in home.glob(pattern) if path.is_file()]
    assert found, patterns
    return found


def images_of(home):
    return files_of(home, "Virtual Hard Disks/*", "Snapshots/*/*.qcow2")


def owners_of(paths):
    return {pwd.getpwuid(path.stat().st_uid).pw_name for path in paths}


def check_modes(shell, home):
    """What docs/users.md promises of a home whose VM is off."""
    working = Path(shell.disk(home.name))
    for path in home.rglob("*"):
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o711, path
        elif ".hvmgr" not in path.parts:
            frozen = path.suffix == ".qcow2" and path != working
            assert mode == (0o400 if frozen else 0o600), path


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_vm_lives_on_what_belongs_to_whom_it_should(make_shell, host):
    shell = make_shell(host.conf)
    shell.make("web", *host.options)
    home = shell.home("web")
    assert owners_of([*images_of(home), *home.glob("Virtual Machines/*/*")]) == {host.made}
    check_modes(shell, home)
    shell.write("web", 1)
    shell.hvmgr("vm", "start", "web")
    shell.hvmgr("snapshot", "create", "web", "running")
    shell.hvmgr("vm", "stop", "web", "--force")
    assert owners_of(files_of(home, "Snapshots/*/memory.save")) == {"root"}
    shell.write("web", 2)
    shell.hvmgr("snapshot", "create", "web", "off")
    check_modes(shell, home)
    shell.hvmgr("vm", "start", "web")  # QEMU gets the chain and the NVRAM as hvmgr left them
    shell.hvmgr("snapshot", "apply", "web", "running")
    assert shell.hvmgr("vm", "show", "web")["vm"]["state"] == "running"
    shell.hvmgr("vm", "stop", "web", "--force")
    assert shell.holds("web", 1)
    shell.hvmgr("snapshot", "apply", "web", "off")
    assert shell.holds("web", 2)
    shell.hvmgr("vm", "start", "web")  # with the NVRAM of the snapshot
    shell.hvmgr("vm", "stop", "web", "--force")
    shell.hvmgr("snapshot", "delete", "web", "running")
    assert shell.holds("web", 2)
    assert owners_of([*images_of(home), *home.glob("Virtual Machines/*/*")]) == {host.made}
    check_modes(shell, home)
    assert [one for one in shell.hvmgr("doctor", "web")["findings"] if one["severity"] == "error"] == []


@pytest.mark.parametrize("host", SIMPLER.values(), ids=SIMPLER)
def test_vm_starts_again_on_what_libvirt_left(make_shell, host):
    shell = make_shell(host.conf)
    shell.make("web", *host.options)
    home = shell.home("web")
    assert owners_of(images_of(home)) == {host.made}
    shell.write("web", 1)
    shell.hvmgr("vm", "start", "web")
    shell.hvmgr("vm", "stop", "web", "--force")
    assert owners_of(images_of(home)) == {host.after}
    shell.hvmgr("snapshot", "create", "web", "one")
    shell.write("web", 2)
    check_modes(shell, home)
    shell.hvmgr("vm", "start", "web")
    shell.hvmgr("vm", "stop", "web", "--force")
    shell.hvmgr("snapshot", "delete", "web", "one")
    assert shell.holds("web", 2)
    assert owners_of(images_of(home)) <= {host.made, host.after}


def test_vm_of_a_user_that_qemu_no_longer_has_is_given_to_the_new_one(make_shell):
    shell = make_shell(STATIC)
    shell.make("web", "--template", "generation2")
    home = shell.home("web")
    shell.hvmgr("vm", "start", "web")
    shell.hvmgr("vm", "stop", "web", "--force")
    shell.hvmgr("snapshot", "create", "web", "one")
    shell.daemon.stop()
    with (shell.daemon.root / "etc" / "qemu.conf").open("a") as file:
        file.write(AS_NOBODY)
    shell.daemon.start()
    codes = [one["code"] for one in shell.hvmgr("doctor", "web")["findings"]]
    assert codes.count("owner-wrong") == 3  # two images, the NVRAM
    shell.hvmgr("doctor", "web", "--repair")
    assert owners_of([*images_of(home), *files_of(home, "Virtual Machines/*/*")]) == {"nobody"}
    shell.hvmgr("vm", "start", "web")
    shell.hvmgr("vm", "stop", "web", "--force")


@pytest.fixture
def gold(place):
    """An image that others keep: root's, and readable by the group of /dev/kvm, in which Debian's QEMU is."""
    path = place / "gold.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", path], check=True, capture_output=True)
    os.chown(path, 0, grp.getgrnam("kvm").gr_gid)
    path.chmod(0o600)
    return path


def in_place(name, path):
    return ("vm", "create", name, *(str(path) if word == "8M" else word for word in CREATE), "--in-place")


def test_image_that_qemu_may_not_use_is_refused_where_libvirt_gives_nothing_away(make_shell, gold):
    shell = make_shell(STATIC)
    code, error = shell.refused(*in_place("web", gold))
    assert code == 4
    assert error["message"].startswith(f"QEMU's user (libvirt-qemu) may not write {gold}")
    assert f"setfacl -m u:libvirt-qemu:rw '{gold}'" in error["hint"]
    assert not shell.home("web").exists()


def test_image_that_qemu_may_use_by_its_group_stays_readable_when_it_is_frozen(make_shell, gold):
    gold.chmod(0o660)
    shell = make_shell(STATIC)
    shell.hvmgr(*in_place("web", gold))
    shell.without_screen("web")
    shell.hvmgr("snapshot", "create", "web", "one")
    assert gold.stat().st_mode & 0o777 == 0o440
    shell.hvmgr("vm", "start", "web")
    shell.hvmgr("vm", "stop", "web", "--force")
    assert shell.holds("web", 7)
    findings = shell.hvmgr("doctor", "web")["findings"]
    assert [one for one in findings if one["code"] in {"mode-wrong", "owner-wrong"}] == []
    shell.hvmgr("snapshot", "delete", "web", "one")
    shell.hvmgr("vm", "delete", "web", "--with-disks", "--yes")
    assert gold.stat().st_mode & 0o777 == 0o660
