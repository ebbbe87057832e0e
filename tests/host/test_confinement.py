"""What keeps QEMU from images: AppArmor by the helper's own profile, SELinux by labels that are really set."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from hvmgr.host import apparmor, confinement

MODULE = Path(__file__).resolve().parents[2] / "share" / "selinux" / "hvmgr.cil"

PROFILE = """\
#include <tunables/global>

profile virt-aa-helper /usr/lib/libvirt/virt-aa-helper {
  #include <abstractions/base>
  capability dac_override,
  deny @{PROC}/[0-9]*/mounts r,
  deny /dev/dm-* r,
  /sys/devices/ r,
  /etc/apparmor.d/libvirt/libvirt-[0-9a-f]*-[0-9a-f]* rw,
  audit deny @{HOME}/.*/** mrwkl,
  @{HOME}/** r,
  /{media,mnt,opt,srv}/** r,
  /**.qcow{,2} r,
  /**.[iI][sS][oO] r,
  /**/disk{,.*} r,
  /var/spool/** w,
  # /secret/** r,
  #include <local/usr.lib.libvirt.virt-aa-helper>
}
"""


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "etc" / "apparmor.d"
    (folder / "local").mkdir(parents=True)
    (folder / apparmor.HELPER).write_text(PROFILE)
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        "/anywhere/at/all/x.qcow2",
        "/anywhere/x.qcow",
        "/x/cd.IsO",
        "/x/disk",
        "/x/disk.local",
        "/srv/vms/image",
        "/home/bob/image",
        "/root/image",
    ],
)
def test_image_that_the_profile_allows(root, path):
    assert apparmor.judge(root, Path(path)) is None


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("/secret/image", "/secret/image r,"),
        ("/x/image.bin", "/x/image.bin r,"),
        ("/var/spool/image", "/var/spool/image r,"),
        ("/with blank/image", '"/with blank/image" r,'),
        ("/home/bob", "/home/bob r,"),
    ],
)
def test_image_for_which_a_line_is_missing(root, path, rule):
    assert apparmor.judge(root, Path(path)) == apparmor.Verdict(missing=rule)
    (root / apparmor.FOLDER / "local" / apparmor.HELPER).write_text(f"# of this site\n{rule}\n")
    assert apparmor.judge(root, Path(path)) is None


@pytest.mark.parametrize("path", ["/home/bob/.local/share/hvmgr/web/x.qcow2", "/root/.vms/image", "/dev/dm-0"])
def test_what_the_profile_denies_no_local_line_allows(root, path):
    (root / apparmor.FOLDER / "local" / apparmor.HELPER).write_text("/** r,\n")
    verdict = apparmor.judge(root, Path(path))
    assert verdict.missing is None
    assert "deny" in verdict.denied


def test_host_without_the_profile_is_judged_by_the_usual_one(tmp_path):
    assert apparmor.judge(tmp_path, Path("/vms/x.vhd")) is None
    assert apparmor.judge(tmp_path, Path("/vms/image")).missing == "/vms/image r,"


def test_profile_of_this_host_is_understood(require):
    file = Path("/", apparmor.FOLDER, apparmor.HELPER)
    require(file.is_file(), "libvirt's AppArmor profiles are missing: make setup installs them")
    allowing = [rule.line for rule in apparmor.rules(file.read_text()) if not rule.denies]
    assert "/**.qcow{,2} r," in allowing
    assert apparmor.judge(Path("/"), Path("/var/lib/hvmgr/web/Virtual Hard Disks/vda.qcow2")) is None


# --- SELinux ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path, monkeypatch, require):
    """``labelled(type)``: a folder with a real label, on a host where SELinux is said to be on."""
    require(os.geteuid() == 0, "only root sets labels")
    (tmp_path / "sys/fs/selinux").mkdir(parents=True)
    (tmp_path / "sys/fs/selinux/enforce").write_text("1")
    monkeypatch.setattr(confinement, "ROOT", tmp_path)
    folder = tmp_path / "home"
    folder.mkdir()

    def make(kind):
        os.setxattr(folder, "security.selinux", f"unconfined_u:object_r:{kind}:s0:c1,c2\0".encode())
        return folder

    return make


def label_of(path):
    return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("var_lib_t", "virt_image_t"),
        ("default_t", "virt_image_t"),
        ("user_home_t", "svirt_home_t"),
        ("data_home_t", "svirt_home_t"),
        ("virt_image_t", "virt_image_t"),
        ("virt_content_t", "virt_content_t"),
        ("svirt_image_t", "svirt_image_t"),
    ],
)
def test_home_gets_a_type_that_qemu_may_use_and_keeps_the_rest(labelled, was, becomes):
    folder = labelled(was)
    assert confinement.label(folder)
    assert label_of(folder) == f"unconfined_u:object_r:{becomes}:s0:c1,c2"
    assert confinement.is_labelled(folder)


def test_nothing_is_labelled_where_selinux_is_off(labelled):
    folder = labelled("var_lib_t")
    (confinement.ROOT / "sys/fs/selinux/enforce").unlink()
    assert confinement.label(folder)
    assert label_of(folder).split(":")[2] == "var_lib_t"


def test_folder_that_takes_no_label_is_said(labelled, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")  # as NFS does

    folder = labelled("nfs_t")
    monkeypatch.setattr(confinement.os, "setxattr", refuse)
    assert not confinement.label(folder)


# The least that SELinux's compiler wants around the module.
BASE = """
(handleunknown allow) (mls true)
(class file (read)) (classorder (file)) (sid kernel) (sidorder (kernel))
(sensitivity s0) (sensitivityorder (s0)) (category c0) (categoryorder (c0)) (sensitivitycategory s0 (c0))
(role object_r) (role system_r) (type kernel_t) (roletype system_r kernel_t)
(user system_u) (userrole system_u object_r) (userrole system_u system_r)
(userlevel system_u (s0)) (userrange system_u ((s0) (s0 (c0))))
(sidcontext kernel (system_u system_r kernel_t ((s0) (s0)))) (allow kernel_t kernel_t (file (read)))
"""


def test_shipped_module_is_one_and_labels_the_usual_places(tmp_path, require_program):
    compiler = require_program("secilc")
    types = sorted(set(re.findall(r"object_r (\w+)", MODULE.read_text())))
    base = tmp_path / "base.cil"
    base.write_text(BASE + "".join(f"(type {one}) (roletype object_r {one})\n" for one in types))
    contexts = tmp_path / "file_contexts"
    command = [compiler, "-o", tmp_path / "policy", "-f", contexts, base, MODULE]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert dict(line.split("\t") for line in contexts.read_text().splitlines()) == {
        "/var/lib/hvmgr(/.*)?": "system_u:object_r:virt_image_t:s0",
        "/var/cache/hvmgr(/.*)?": "system_u:object_r:virt_content_t:s0",
        r"HOME_DIR/\.local/share/hvmgr(/.*)?": "system_u:object_r:svirt_home_t:s0",
    }
    assert set(types) <= confinement._IMAGE_TYPES
