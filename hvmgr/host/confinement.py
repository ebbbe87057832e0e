"""What this host lets QEMU do: AppArmor, SELinux, /dev/kvm and userfaultfd, read from the kernel's and QEMU's files.

Nothing is started for it, and nothing here is a decision. ``ROOT`` stands in front of every path.
"""

from __future__ import annotations

import os
from pathlib import Path

from hvmgr.host import apparmor

ROOT = Path("/")

# The type of an SELinux context that QEMU may use: for its own images, shared ones, and what libvirt labels at a start.
_IMAGE_TYPES = frozenset({"virt_image_t", "svirt_image_t", "virt_content_t", "virt_var_lib_t", "svirt_home_t"})
# What the policy of all distributions calls homes of VMs: the system's (below /var/lib/libvirt/images), a user's own.
HOME_TYPE, USER_HOME_TYPE = "virt_image_t", "svirt_home_t"
_USER_TYPES = frozenset({"user_home_t", "user_home_dir_t", "data_home_t", "config_home_t", "cache_home_t"})
_LABEL = "security.selinux"


def has_apparmor() -> bool:
    """Whether AppArmor is on, with a profile for libvirt's guests."""
    enabled = _read("sys/module/apparmor/parameters/enabled") == "Y"
    return enabled and (ROOT / "etc/apparmor.d/libvirt").is_dir()


def apparmor_verdict(image: Path) -> apparmor.Verdict | None:
    """What keeps libvirt's AppArmor helper from an image, as far as its profile tells; None when nothing does."""
    return apparmor.judge(ROOT, image)


def apparmor_local_file() -> Path:
    """Where an administrator adds lines for libvirt's AppArmor helper."""
    return Path("/") / apparmor.FOLDER / "local" / apparmor.HELPER


def has_selinux() -> bool:
    """Whether SELinux is on and enforces its policy."""
    return _read("sys/fs/selinux/enforce") == "1"


def is_labelled(path: Path) -> bool:
    """Whether the SELinux type of a file or folder is one that QEMU may use; also when there is no label to read."""
    context = _context(path)
    return context is None or context[2] in _IMAGE_TYPES


def label(folder: Path) -> bool:
    """The folder has an SELinux type that QEMU may use, which whatever is made in it inherits; False when it cannot be.

    Where SELinux is off, and where the policy or an administrator chose such a type before, nothing is changed. A file
    system without labels of its own (NFS) refuses: there booleans of the policy decide.
    """
    context = _context(folder) if (ROOT / "sys/fs/selinux/enforce").exists() else None
    if context is None or context[2] in _IMAGE_TYPES:
        return True
    context[2] = USER_HOME_TYPE if context[2] in _USER_TYPES else HOME_TYPE
    try:
        os.setxattr(folder, _LABEL, ":".join(context).encode() + b"\0")
    except OSError:
        return False
    return True


def _context(path: Path) -> list[str] | None:
    """User, role, type and level of a file's SELinux context; None without one."""
    try:
        text = os.getxattr(path, _LABEL).rstrip(b"\0").decode(errors="replace")
    except OSError:
        return None
    fields = text.split(":", 3)
    return fields if len(fields) >= 3 else None


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
    if facts.st_gid in groups_of(uid, gid):
        return bool(facts.st_mode & 0o060 == 0o060)
    return bool(facts.st_mode & 0o006 == 0o006)


def may_snapshot_in_background(libvirt_version: tuple[int, ...], qemu_version: tuple[int, ...]) -> bool:
    """Whether QEMU gets userfaultfd here, so that the memory of a running VM can be saved while it goes on.

    By the kernel's setting, or from /dev/userfaultfd, which newer libvirts grant and newer QEMUs use.
    """
    if _read("proc/sys/vm/unprivileged_userfaultfd") == "1":
        return True
    return libvirt_version >= (10, 1) and qemu_version >= (8, 0) and (ROOT / "dev/userfaultfd").exists()


def has_userfaultfd() -> bool:
    """Whether the kernel has it at all, and says whom it allows it."""
    return (ROOT / "proc/sys/vm/unprivileged_userfaultfd").exists()


def groups_of(uid: int, gid: int) -> set[int]:
    """The groups with which libvirt starts QEMU: the one it is told, and all that the user is in."""
    import pwd

    if uid == os.geteuid():
        return {gid, *os.getgroups()}  # our own: nothing is looked up, and nothing is known better
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return {gid}
    # Debian's libvirt-qemu: gid 64055 by libvirt, kvm by /etc/passwd; QEMU gets both.
    return {gid, *os.getgrouplist(user.pw_name, user.pw_gid)}


def _read(name: str) -> str | None:
    try:
        return (ROOT / name).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
