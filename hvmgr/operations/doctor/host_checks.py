"""What doctor says of the host: libvirt, QEMU and what they can do here, and the index of homes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host import confinement, process, userfault
from hvmgr.host.hypervisor import Capabilities, Connection, Driver
from hvmgr.model.diagnosis import Code, finding
from hvmgr.model.finding import Finding
from hvmgr.operations import attaching, mounting, roles, start_hook
from hvmgr.operations.doctor.surroundings import Surroundings, is_home_like
from hvmgr.storage import attachments, index, journal
from hvmgr.storage.kept_images import Kept

# Older ones lack what hvmgr is built on; nobody has tried them.
OLDEST_LIBVIRT = (9, 0)
OLDEST_QEMU = (7, 2)
# From here on libvirt's AppArmor profiles let a running VM write to what it had opened for reading.
_APPARMOR_COMMIT = (12, 1)

# What ``where`` says when memory cannot be saved while the guest goes on.
BACKGROUND = "background-snapshot"

_PROGRAMS = ("qemu-img", "qemu-storage-daemon")


def examine(around: Surroundings) -> Iterator[Finding]:
    """The host, without a look at any home."""
    for program in _PROGRAMS:
        try:
            process.require(program)
        except errors.Unsupported as error:
            yield finding(Code.PROGRAM_MISSING, str(error), program, repair=error.hint)
    if around.connection is None or around.capabilities is None:
        assert around.failure is not None
        sentence = f"{around.failure}; the homes were examined without it"
        yield finding(Code.LIBVIRT_UNREACHABLE, sentence, around.uri, repair=around.failure.hint)
    else:
        if (limit := roles.find_limit(around.connection)) is not None:
            yield finding(Code.USER_LIMITED, str(limit), around.uri, repair=limit.hint)
        yield from _versions(around.capabilities)
        yield from _abilities(around.connection, around.capabilities)
        yield from _confinement(around.connection, around.capabilities)
    yield from _index(around)
    yield from _image_changes()
    yield from _attachments()


def _versions(facts: Capabilities) -> Iterator[Finding]:
    for name, text, oldest in (
        ("libvirt", facts.libvirt_version, OLDEST_LIBVIRT),
        ("QEMU", facts.qemu_version, OLDEST_QEMU),
    ):
        if version(text) < oldest:
            needed = ".".join(map(str, oldest))
            sentence = f"{name} is {text}; hvmgr needs {needed} or later"
            yield finding(Code.VERSION_OLD, sentence, name, repair=f"install {name} {needed} or later")
    sentence = f"libvirt {facts.libvirt_version}, QEMU {facts.qemu_version}, {facts.arch}"
    yield finding(Code.VERSIONS, sentence, "libvirt")


def _abilities(connection: Connection, facts: Capabilities) -> Iterator[Finding]:
    user = facts.qemu_owner or (os.geteuid(), os.getegid())
    if not (facts.has_kvm and confinement.has_kvm()):
        yield _missing("kvm", "this host has no KVM: VMs are emulated, which is slow", "switch on virtualisation")
    elif not confinement.may_use_kvm(user):
        sentence = (
            f"QEMU's user (uid {user[0]}) may not open /dev/kvm: "
            "VMs are emulated, and each start of libvirt takes seconds longer"
        )
        yield finding(Code.KVM_CLOSED, sentence, "/dev/kvm", repair="add that user to the group of /dev/kvm")
    if not confinement.may_snapshot_in_background(version(facts.libvirt_version), version(facts.qemu_version)):
        sentence = (
            "QEMU gets no userfaultfd here: a guest stands still while the memory for its snapshot is saved, "
            "the longer the more it has"
        )
        remedy = userfault.REMEDY if confinement.has_userfaultfd() else "run a kernel with userfaultfd (5.7 or later)"
        yield _missing(BACKGROUND, sentence, remedy)
    if not _reads_vhd():
        yield _missing("vhd", "this host's qemu-img cannot read VHD images", "install a QEMU with the format vpc")
    try:
        machine = connection.machine_facts()
    except errors.HvmgrError as error:
        yield _missing("machine", f"libvirt offers no machine for {facts.arch}: {error}", "install qemu-system")
        return
    if not machine.has_tpm_emulator:
        yield _missing("tpm", "there is no emulated TPM on this host", "install swtpm")
    if not machine.has_efi:
        yield _missing("uefi", "there is no UEFI firmware for guests on this host", "install ovmf (or edk2-ovmf)")


def _missing(name: str, sentence: str, repair: str) -> Finding:
    return finding(Code.ABILITY_MISSING, sentence, name, repair=repair)


def _reads_vhd() -> bool:
    try:
        told = process.run(["qemu-img", "--help"], timeout_s=20).stdout.decode(errors="replace")
    except errors.HvmgrError:
        return False
    formats = told.rpartition("Supported formats:")[2]
    return "vpc" in formats.split()


def _confinement(connection: Connection, facts: Capabilities) -> Iterator[Finding]:
    if connection.driver is not Driver.SYSTEM:
        return
    who = start_hook.asked(start_hook.FOLDER)
    if who is not start_hook.Asked.US:
        sentence = (
            "no hook guards the starts of VMs: virsh or autostart can start one that is half-merged or damaged"
            if who is start_hook.Asked.NOBODY
            else "the hook that guards the starts of VMs is that of another hvmgr, or of other folders than now: "
            "it does not see what this one is in the middle of"
        )
        yield finding(Code.HOOK_MISSING, sentence, start_hook.path_in(start_hook.FOLDER), repair="hvmgr hook install")
    confined = "apparmor" in facts.security_models and confinement.has_apparmor()
    if confined and version(facts.libvirt_version) < _APPARMOR_COMMIT:
        sentence = (
            f"AppArmor is on and libvirt is {facts.libvirt_version}: before 12.1 it denies a running VM to write to the "
            "images below its own, so that 'virsh blockcommit' fails, and some merges wait until the VM is off"
        )
        yield finding(
            Code.APPARMOR_COMMIT, sentence, "AppArmor", repair="stop the VM for a merge: hvmgr snapshot merge"
        )


# --- the index --------------------------------------------------------------------------------------------------------


def _index(around: Surroundings) -> Iterator[Finding]:
    for note in around.notes:
        entry = note.entry
        if entry is None:
            sentence = f"{note.file} cannot be understood, so that the users of shared images are not all counted"
            yield finding(Code.INDEX_DAMAGED, sentence, note.file, repair="doctor --repair writes it again")
        elif entry.home not in around.folders and not is_home_like(entry.home):
            sentence = f"the index knows a VM '{entry.name}' whose home {entry.home} is gone"
            yield finding(Code.INDEX_STALE, sentence, note.file, repair=_put_back(entry.home), vm=entry.name)


def _image_changes() -> Iterator[Finding]:
    for place in index.open_changes():
        try:
            entry = journal.read(place)
        except errors.HvmgrError as error:
            yield finding(Code.JOURNAL_DAMAGED, str(error), place)
            continue
        if entry is not None:
            sentence = f"a command on image files was cut off: {entry.plan.subject}"
            repair = "the next 'hvmgr image' command on one of these images completes it"
            yield finding(Code.IMAGE_CHANGE_OPEN, sentence, place, repair=repair)


def _attachments() -> Iterator[Finding]:
    for one in attaching.left_over():
        sentence = f"an attachment of {one.path} was broken off, and something of it may be left"
        yield finding(Code.ATTACHMENT_LEFT, sentence, one.path, repair="doctor --repair cleans it up")
    for one in mounting.left_over():
        assert one.mount is not None
        where = one.mount.directory
        sentence = f"the mount of {one.mount.title} at {where} was broken off, and something of it is left"
        repair = "doctor --repair cleans it up"
        if mounting.is_worth_keeping(one):
            repair = f"hvmgr unmount '{where}' throws away what was written, with --keep FILE it is kept"
        yield finding(Code.MOUNT_LEFT, sentence, where, repair=repair)
    yield from _kept()


def _kept() -> Iterator[Finding]:
    """Nothing but a person knows whether a disk that is not there comes back: so there is no repair."""
    for one in attachments.all_records():
        if one.kept is Kept.UNKNOWN:
            assert one.mount is not None and one.mount.kept is not None  # noqa: PT018
            sentence = f"{one.mount.kept}, kept of a mount, cannot be seen or read: what it stands on stays as it is"
            record = shlex.quote(str(attachments.record_of(one)))
            repair = f"put back the disk or share that it is on; when it is gone for good: rm {record}"
            yield finding(Code.KEPT_UNSEEN, sentence, one.mount.kept, repair=repair)


def _put_back(home: Path) -> str:
    return f"mount or put back {shlex.quote(str(home))}, or let doctor --repair set the entry aside"


def version(text: str) -> tuple[int, ...]:
    """A version that can be compared."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())
