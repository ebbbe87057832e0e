"""What no program writes is written by a kernel: a small machine of our own starts with the volume as its disk, and is gone.

The host's own kernel and its modules, a static busybox and a script of what is to be done are all that is in it; the contents are a second
disk. What a hostile file system does to that kernel stays in there: nothing is mounted on this host, and no root is needed. Under KVM
that takes a second or two, in emulation some ten.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hvmgr import errors
from hvmgr.host import bare_machine, file_systems, process
from hvmgr.host.bare_machine import Machine
from hvmgr.operations.inside.arranging import ACL, DEFAULT_ACL, Act
from hvmgr.operations.inside.browsing import Browser
from hvmgr.operations.inside.sources import Report
from hvmgr.storage import initramfs, kernel_modules, kernels
from hvmgr.storage.filesystems.reader import Type
from hvmgr.storage.filesystems.xfs import Xfs

_BLOCK = 4096
_MEMORY = 256 << 20
_TIME_S, _ACT_S, _SLOWEST = 300.0, 2.0, 1 << 20  # bytes a second, in emulation on a busy host
_SECOND = 1_000_000_000
_DISKS = ("virtio_pci", "virtio_blk")
# What file systems ask the kernel for by name, where it is no part of it.
_SUMS = ("crc32c_generic", "xxhash_generic", "sha256_generic", "blake2b_generic", "libcrc32c")
_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr cryptomgr.notests audit=0 nowatchdog"
_ATTRIBUTES = "setfattr"  # the one thing that busybox cannot
_SETTER = f"/lib/loader --library-path /lib /lib/{_ATTRIBUTES}"
_TOO_NEW = ("unknown incompat", "unknown read-only compat", "unknown compat", "unsupported optional features")
_DONE, _FAILED = "hvmgr-done", "hvmgr-failed "
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
fail() { echo "hvmgr-failed $*" | tr '\\n' ' '; echo; sync; poweroff -f; sleep 60; }
while read -r name; do insmod "/modules/$name.ko" 2> /dev/null; done < /order
mount -t %(driver)s -o %(options)s /dev/vda /volume 2> /said || fail "mount: $(cat /said) $(dmesg | tail -n 4)"
cd /volume
. /acts
cd /
umount /volume 2> /said || fail "unmount: $(cat /said)"
sync
echo hvmgr-done
poweroff -f
sleep 60
"""


@dataclass(frozen=True, slots=True)
class KernelWriter:
    """Writes one kind of file system; ``module`` is the kernel's name for it."""

    module: str
    keeps_owners: bool
    first: int = 0
    last: int = (1 << 63) - 1
    options: str = "rw"
    writes_in_place: ClassVar[bool] = False

    @property
    def title(self) -> str:
        return f"a small machine of its own ({self.module} of a Linux kernel)"

    def times(self, browser: Browser) -> tuple[int, int]:
        return self.first, browser.reader.last_time if isinstance(browser.reader, Xfs) else self.last

    def kept(self, extras: Mapping[str, bytes]) -> dict[str, bytes]:
        """Btrfs' own properties aside, which are inherited."""
        return {name: value for name, value in extras.items() if self.keeps_owners and not name.startswith("btrfs.")}

    def require(self, acts: Sequence[Act], browser: Browser) -> None:  # noqa: ARG002 - as its promise
        kernels.require((*_DISKS, self.module), self.module)
        initramfs.installed_busybox()
        for one in acts:
            if one.item.type is Type.LINK and not self.keeps_owners:
                raise errors.Unsupported(f"{one.item.origin} is a link, and none can be made on this file system")
        if _sets_attributes(acts):
            process.require(_ATTRIBUTES)

    def write(self, volume: Path, acts: Sequence[Act], spool: Path, report: Report) -> None:
        kernel = kernels.require((*_DISKS, self.module), self.module)
        with tempfile.TemporaryDirectory(dir=spool, prefix="put-") as folder:
            place = Path(folder)
            contents = place / "contents"
            script = "".join(_script(acts, _collected(acts, contents, report), with_owners=self.keeps_owners))
            programs = initramfs.with_libraries(_ATTRIBUTES) if _sets_attributes(acts) else {}
            entries = self._entries(kernel, os.fsencode(script), programs)
            (place / "initrd").write_bytes(initramfs.pack(entries))
            disks = ((volume, "raw", True), (contents, "raw", False))
            machine = Machine(disks, memory=_MEMORY, kernel=(kernel.image, place / "initrd", _ARGUMENTS))
            self._run(machine, place, _TIME_S + sum(_ACT_S + one.item.size / _SLOWEST for one in acts), report)

    def _run(self, machine: Machine, place: Path, time_s: float, report: Report) -> None:
        last = ""
        for line in bare_machine.lines(machine, place, time_s=time_s, hint="put less at a time"):
            report(0)
            if line.startswith(_FAILED):
                raise self._explained(line.removeprefix(_FAILED).strip())
            if line.startswith(_DONE):
                return
            last = line or last
        raise errors.HostFailed(f"{self.title} ended before it was done; its last words: '{last}'")

    def _explained(self, words: str) -> errors.HvmgrError:
        if "No space left" in words:
            return file_systems.full("the file system")
        if words.startswith("mount") and any(one in words for one in _TOO_NEW):
            return errors.Unsupported(
                f"the {self.module} file system has features that no Linux kernel of this host knows",
                hint="install a newer kernel, or start the VM: file restore --to running",
            )
        if words.startswith("mount"):
            return errors.Corrupt(
                f"the {self.module} file system cannot be mounted: {words}",
                hint="start the system and let it check its disk",
            )
        return errors.HostFailed(f"{self.title} failed: {words}")

    def _entries(
        self, kernel: kernels.Kernel, script: bytes, programs: Mapping[str, Path]
    ) -> Iterator[tuple[str, int, bytes]]:
        for folder in ("bin", "dev", "lib", "modules", "proc", "volume"):
            yield folder, 0o040755, b""
        yield "dev/console", 0o020600, b""
        yield "bin/busybox", 0o100755, initramfs.installed_busybox()
        modules = kernel_modules.of_folder(kernel.modules).in_order((*_DISKS, *_SUMS, self.module))
        for one in modules:
            yield f"modules/{one.name}.ko", 0o100644, one.data
        yield "order", 0o100644, "".join(f"{one.name}\n" for one in modules).encode()
        yield "init", 0o100755, (_INIT % {"driver": self.module, "options": self.options}).encode()
        for name, path in programs.items():
            yield f"lib/{name}", 0o100755, path.read_bytes()
        yield "acts", 0o100644, script


def _sets_attributes(acts: Sequence[Act]) -> bool:
    return any(one.extras or (one.anew and one.inherits) for one in acts)


def _stays(act: Act) -> bool:
    """Whether the file that is there is written anew, and keeps what is its own."""
    there = act.replaced
    return (
        not act.anew and there is not None and there.node.type is act.item.type is Type.FILE and there.node.links == 1
    )


def _collected(acts: Sequence[Act], target: Path, report: Report) -> list[int]:
    """All contents one after the other in a file, each on a block of its own; where each begins, in blocks."""
    starts, at = [], 0
    with target.open("wb") as file:
        for one in acts:
            starts.append(at // _BLOCK)
            if one.item.source is not None:
                place = at
                for piece in one.item.source.pieces(1 << 20):
                    if piece.count(0) != len(piece):
                        file.seek(place)
                        file.write(piece)
                    place += len(piece)
                    report(0)
                at += -(-(place - at) // _BLOCK) * _BLOCK
            report(one.item.size)
        file.truncate(max(at, _BLOCK))
    return starts


def _script(acts: Sequence[Act], starts: Sequence[int], *, with_owners: bool) -> Iterator[str]:
    for act, start in zip(acts, starts, strict=True):
        yield from _checked(_making(act, start) if with_owners else (*_required_new(act), *_making(act, start)))
        yield from _checked(_without_inherited(act))
        if act.item.type is not Type.FOLDER:
            yield from _checked(_settling(act, with_owners=with_owners))
    for act in reversed(acts):  # what is put into a folder changes its time, and would inherit its ACL
        if act.item.type is Type.FOLDER:
            yield from _checked(_settling(act, with_owners=with_owners))


def _checked(commands: Iterable[str]) -> Iterator[str]:
    for command in commands:
        yield f'{command} 2> /said || fail "$(tail -c 300 /said)"\n'


def _required_new(act: Act) -> Iterator[str]:
    """Where case is ignored, the kernel may take a name for that of another file."""
    if act.replaced is None:
        path = _word(b"." + act.path)
        yield f"{{ [ ! -e {path} ] || {{ echo {path} is there already >&2; false; }}; }}"


def _making(act: Act, start: int) -> Iterator[str]:
    path = _word(b"." + act.path)
    if act.replaced is not None and not _stays(act):
        yield f"rm -f {path}"
    if act.item.type is Type.FOLDER:
        yield f"mkdir {path}"
    elif act.item.type is Type.LINK:
        yield f"ln -s -- {_word(act.item.target)} {path}"
    else:
        yield f"true > {path}"
        blocks = -(-act.item.size // _BLOCK)
        if blocks:
            yield f"dd if=/dev/vdb of={path} bs={_BLOCK} skip={start} count={blocks}"
            yield f"truncate -s {act.item.size} {path}"


def _settling(act: Act, *, with_owners: bool) -> Iterator[str]:
    path = _word(b"." + act.path)
    if with_owners:
        yield f"chown -h {act.uid}:{act.gid} {path}"
        if act.item.type is not Type.LINK:
            yield f"chmod {act.mode:o} {path}"
        for key, value in act.extras.items():
            yield f"{_SETTER} -h -n {_word(key.encode())} -v 0x{value.hex()} {path}"
    if act.modified is not None:
        yield f"touch -h -d @{act.modified // _SECOND} {path}"


def _without_inherited(act: Act) -> Iterator[str]:
    if act.anew and act.inherits and act.item.type is not Type.LINK:
        for one in (ACL, DEFAULT_ACL) if act.item.type is Type.FOLDER else (ACL,):
            yield f"{_SETTER} -x {one} {_word(b'.' + act.path)}"


def _word(text: bytes) -> str:
    """A word of the shell, whatever is in it."""
    return "'" + os.fsdecode(text).replace("'", "'\\''") + "'"
