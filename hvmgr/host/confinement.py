"""What this host lets QEMU do: AppArmor, SELinux, /dev/kvm and userfaultfd, read from the kernel's and QEMU's files.

Nothing is started for it, and nothing here is a decision. ``ROOT`` stands in front of every path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path("/")

# libvirt's helper that writes a VM's profile may read images with these names or below these folders (its own profile,
# /etc/apparmor.d/usr.lib.libvirt.virt-aa-helper, in all releases since 2010); others need a line in its local file.
_READABLE_NAMES = re.compile(r".*\.(img|raw|qcow2?|qed|vmdk|vhd|iso)|disk(\..*)?", re.IGNORECASE)
_READABLE_FOLDERS = ("var/lib/libvirt/images", "media", "mnt", "opt", "srv", "home", "root")
_HELPER = "usr.lib.libvirt.virt-aa-helper"

# The type of an SELinux context that QEMU may use: for its own images, shared ones, and what libvirt labels at a start.
_IMAGE_TYPES = frozenset({"virt_image_t", "svirt_image_t", "virt_content_t", "virt_var_lib_t", "svirt_home_t"})


def has_apparmor() -> bool:
    """Whether AppArmor is on, with a profile for libvirt's guests."""
    enabled = _read("sys/module/apparmor/parameters/enabled") == "Y"
    return enabled and (ROOT / "etc/apparmor.d/libvirt").is_dir()


def apparmor_rule(image: Path) -> str | None:
    """The line that libvirt's AppArmor helper lacks to read an image; None when it may, as far as its profile tells."""
    path = Path(os.path.realpath(image))
    if _READABLE_NAMES.fullmatch(path.name):
        return None
    if any(path.is_relative_to(Path("/") / folder) for folder in _READABLE_FOLDERS):
        return None
    local = _read(f"etc/apparmor.d/local/{_HELPER}") or ""
    rules = [line.strip() for line in local.splitlines() if not line.lstrip().startswith("#")]
    if any(_covers(rule, path) for rule in rules):
        return None
    return f"{path} r,"


def apparmor_local_file() -> Path:
    """Where an administrator adds lines for libvirt's AppArmor helper."""
    return Path("/etc/apparmor.d/local") / _HELPER


def has_selinux() -> bool:
    """Whether SELinux is on and enforces its policy."""
    return _read("sys/fs/selinux/enforce") == "1"


def is_labelled(path: Path) -> bool:
    """Whether the SELinux type of a file or folder is one that QEMU may use; also when there is no label to read."""
    try:
        label = os.getxattr(path, "security.selinux").rstrip(b"\0").decode(errors="replace")
    except OSError:
        return True
    fields = label.split(":")
    return len(fields) < 3 or fields[2] in _IMAGE_TYPES


def has_kvm() -> bool:
    """Whether the kernel offers KVM."""
    return (ROOT / "dev/kvm").exists()


def may_use_kvm(owner: tuple[int, int]) -> bool:
    """Whether a user (uid, gid) may open /dev/kvm, by its mode and the groups that it is in."""
    try:
        facts = (ROOT / "dev/kvm").stat()
    except OSError:
        return False
    uid, gid = owner
    if uid in (0, facts.st_uid):
        return True
    if facts.st_gid == gid or facts.st_gid in _groups(uid, gid):
        return bool(facts.st_mode & 0o060 == 0o060)
    return bool(facts.st_mode & 0o006 == 0o006)


def may_snapshot_in_background(libvirt_version: tuple[int, ...]) -> bool:
    """Whether QEMU gets userfaultfd here, so that the memory of a running VM can be saved while it goes on."""
    if _read("proc/sys/vm/unprivileged_userfaultfd") == "1":
        return True
    return libvirt_version >= (10, 1) and (ROOT / "dev/userfaultfd").exists()


def _groups(uid: int, gid: int) -> set[int]:
    import pwd

    try:
        return set(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    except KeyError:
        return set()


def _covers(rule: str, path: Path) -> bool:
    """Whether a line of a profile lets its program read a path: globs as AppArmor has them."""
    match = re.fullmatch(r'"?(/[^"]*?)"?\s+([a-zA-Z]+),', rule)
    if match is None or "r" not in match[2]:
        return False
    glob = re.escape(match[1]).replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.fullmatch(glob, str(path)) is not None


def _read(name: str) -> str | None:
    try:
        return (ROOT / name).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
