"""A QEMU of our own that plays a physical machine: firmware, disks, and a serial console that is read line by line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

PROGRAM = "qemu-system-x86_64"
_PROGRAMS = (PROGRAM, "/usr/libexec/qemu-kvm", "qemu-kvm")
_FIRMWARE = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_CODE.fd")
_POLL_S = 0.05
_PROMPTS = (b"login: ", b"(initramfs) ")  # lines that nobody ends


@dataclass(frozen=True, slots=True)
class Machine:
    """``disks`` are (file, format of QEMU's, written); ``loader_folder`` shows up as one more disk, for UEFI."""

    disks: Sequence[tuple[Path, str, bool]]
    memory: int = 1 << 30
    uefi: bool = False
    loader_folder: Path | None = None
    kernel: tuple[Path, Path, str] | None = None  # started directly: kernel, initramfs, arguments
    boot_url: str | None = None  # what its network card loads first; 10.0.2.2 is this host's loopback


def lines(machine: Machine, work: Path, *, time_s: float, hint: str = "give it more time with --time") -> Iterator[str]:
    """What the machine says on its serial console, line by line, until it turns itself off.

    HostFailed with the ``hint`` after ``time_s``. Whoever stops reading ends it, as pulling the plug does.
    """
    deadline = time.monotonic() + time_s
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        try:
            yield from _run(machine, work, "kvm", deadline, hint)
        except _NotStarted:
            pass  # some hosts have the device, and no guest of it can run
        else:
            return
    try:
        yield from _run(machine, work, "tcg", deadline, hint)
    except _NotStarted as error:
        raise errors.HostFailed(str(error)) from error


class _NotStarted(Exception):
    """QEMU ended before the machine said a word."""


def _run(machine: Machine, work: Path, accelerator: str, deadline: float, hint: str) -> Iterator[str]:
    log = work / "console"
    log.write_bytes(b"")
    has_spoken = False
    with process.spawned(_command(machine, log, accelerator)) as qemu, log.open("rb") as reader:
        rest = b""
        while True:
            ended = qemu.wait(_POLL_S)
            rest += reader.read()
            *whole, rest = rest.split(b"\n")
            if ended is not None or rest.endswith(_PROMPTS):
                whole, rest = [*whole, *([rest] if rest else [])], b""
            for line in whole:
                has_spoken = True
                yield _plain(line)
            if ended == 0:
                return
            if ended is not None:
                kind = errors.HostFailed if has_spoken else _NotStarted
                raise kind(f"{PROGRAM} ended with code {ended}: {qemu.stderr_text().strip()}")
            if time.monotonic() > deadline:
                raise errors.HostFailed(
                    f"the machine did not come to its end in time; its last words: '{_plain(rest)}'",
                    hint=hint,
                )


def _plain(line: bytes) -> str:
    """Without the escapes of a terminal."""
    import re

    text = line.decode("utf-8", "replace").rstrip("\r")
    return re.sub(r"\x1b(\[[0-9;?=]*[A-Za-z]|[()][A-Z0-9]|c)|[\x00-\x08\x0b-\x1f]", "", text)


def _command(machine: Machine, log: Path, accelerator: str) -> list[str | Path]:
    program = next((one for one in _PROGRAMS if _is_there(one)), None)
    if program is None:
        process.require(PROGRAM)
    assert program is not None
    argv: list[str | Path] = [program, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    argv += ["-machine", "q35", "-m", str(machine.memory >> 20)]
    argv += ["-accel", accelerator, "-cpu", "host" if accelerator == "kvm" else "max"]
    argv += ["-serial", f"file:{log}"]
    if machine.uefi:
        argv += ["-drive", f"if=pflash,format=raw,readonly=on,file={_escaped(_firmware())}"]
    if machine.loader_folder is not None:
        argv += ["-drive", f"if=none,id=loader,format=raw,readonly=on,file=fat:{_escaped(machine.loader_folder)}"]
        argv += ["-device", "virtio-blk-pci,drive=loader,bootindex=0"]
    for number, (path, fmt, written) in enumerate(machine.disks):
        keep = "off" if written else "on"
        argv += ["-drive", f"if=none,id=disk{number},format={fmt},snapshot={keep},file={_escaped(path)}"]
        argv += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    if machine.boot_url is not None:
        argv += ["-netdev", f"user,id=net,bootfile={machine.boot_url.replace(',', ',,')}"]
        argv += ["-device", "virtio-net-pci,netdev=net,bootindex=0"]
    if machine.kernel is not None:
        kernel, initrd, arguments = machine.kernel
        argv += ["-kernel", kernel, "-initrd", initrd, "-append", arguments]
    return argv


def _is_there(program: str) -> bool:
    try:
        process.require(program)
    except errors.Unsupported:
        return False
    return True


def _firmware() -> Path:
    for name in _FIRMWARE:
        if Path(name).exists():
            return Path(name)
    raise errors.Unsupported("there is no UEFI firmware for VMs", hint="install it, on Debian with: apt install ovmf")


def _escaped(path: Path) -> str:
    return os.fspath(path).replace(",", ",,")
