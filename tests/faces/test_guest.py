"""The guest boots under plain QEMU, counts on its disks, survives a restore of its memory and obeys its button."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hvmgr import errors, units
from hvmgr.faces import console, guest

BOOT_S = 120.0  # two seconds when the machine has nothing else to do
DISK_SIZE = 4 * units.MIB


class Machine:
    """A QEMU without libvirt, its monitor on stdin and stdout."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.said = self.answer = b""
        self.pty = Path(self._expect(rb"redirected to (\S+) ").decode())

    def command(self, line: str, answer: bytes = rb"\(qemu\) ") -> None:
        self.process.stdin.write(line.encode() + b"\n")
        # The monitor echoes what it reads; its answer comes after the line's end.
        self._expect(rb"\n")
        self.answer = self._expect(answer)

    def resume(self) -> None:
        """The guest runs; ``cont`` is lost on a machine that is still reading a memory saved while it stood still."""
        self.command("info status", rb"VM status: (.+)\n")
        while b"inmigrate" in self.answer:
            time.sleep(0.02)
            self.command("info status", rb"VM status: (.+)\n")
        self.command("cont")

    def _expect(self, pattern: bytes) -> bytes:
        while not (match := re.search(pattern, self.said)):
            assert select.select([self.process.stdout], [], [], BOOT_S)[0], self.said
            piece = os.read(self.process.stdout.fileno(), 65536)
            assert piece, f"QEMU ended: {self.said!r}"
            self.said += piece
        self.said = self.said[match.end() :]
        return match[match.lastindex or 0]


@pytest.fixture
def power_on(counting_guest: guest.Guest, require_program):
    """``power_on(disks, options)``: a paused machine; the test says ``cont`` when its console is open."""
    emulator = require_program("qemu-system-x86_64")

    @contextlib.contextmanager
    def start(disks: Sequence[str], *options: str) -> Iterator[Machine]:
        command = [emulator, "-S", "-accel", "tcg", "-m", f"{counting_guest.memory_size // units.MIB}", "-no-reboot"]
        command += ["-display", "none", "-nodefaults", "-serial", "pty", "-monitor", "stdio"]
        command += [
            "-kernel",
            counting_guest.kernel,
            "-initrd",
            counting_guest.initrd,
            "-append",
            counting_guest.command_line,
        ]
        command += [word for disk in disks for word in ("-drive", disk)]
        with subprocess.Popen(
            [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        ) as process:
            try:
                yield Machine(process)
            finally:
                process.kill()

    return start


def make_disk(path: Path, counter: int | None = None) -> Path:
    with path.open("wb") as file:
        file.truncate(DISK_SIZE)
        if counter is not None:
            file.seek(guest.COUNTER_OFFSET)
            file.write(b"HVMGR-COUNT %06d\n" % counter)
    return path


def counter_of(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(guest.COUNTER_OFFSET)
        return guest.read_counter(file.read(guest.COUNTER_SIZE))


@pytest.mark.guest
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("if=virtio", ["-M", "pc"], id="virtio-pc"),
        pytest.param("if=virtio", ["-M", "q35"], id="virtio-q35"),
        pytest.param("if=ide", ["-M", "pc"], id="ide"),
        pytest.param(
            "if=none,id=disk", ["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"], id="virtio-scsi"
        ),
    ],
)
def test_guest_counts_in_memory_and_on_the_disk(tmp_path, power_on, kind, options):
    disk = make_disk(tmp_path / "disk.raw")
    with (
        power_on([f"file={disk},format=raw,{kind}"], *options) as machine,
        console.Console(machine.pty) as screen,
    ):
        machine.command("cont")
        assert screen.next_boot(BOOT_S) == (0,)
        ticks = [screen.next_tick(BOOT_S) for _ in range(5)]
        machine.command("stop")
        assert [(tick.memory, tick.disk, tick.ok) for tick in ticks] == [(n, n - 1, True) for n in range(1, 6)]
        assert counter_of(disk) in (4, 5, 6)


@pytest.mark.guest
def test_cold_boot_goes_on_from_the_first_disk_and_brings_the_others_up(tmp_path, power_on):
    first, second = make_disk(tmp_path / "a.raw", 123), make_disk(tmp_path / "b.raw", 89)
    drives = [f"file={disk},format=raw,if=virtio" for disk in (first, second)]
    with power_on(drives) as machine, console.Console(machine.pty) as screen:
        machine.command("cont")
        assert screen.next_boot(BOOT_S) == (123, 89)
        assert screen.next_tick(BOOT_S) == console.Tick(124, (123, 123), ok=True)


@pytest.mark.guest
def test_guest_without_disks_counts_in_memory(power_on):
    with power_on([]) as machine, console.Console(machine.pty) as screen:
        machine.command("cont")
        assert screen.next_boot(BOOT_S) == ()
        assert screen.next_tick(BOOT_S) == console.Tick(1, (), ok=True)


@pytest.mark.guest
def test_power_button_ends_the_guest_with_memory_and_disk_equal(tmp_path, power_on):
    disk = make_disk(tmp_path / "disk.raw")
    with (
        power_on([f"file={disk},format=raw,if=virtio"]) as machine,
        console.Console(machine.pty) as screen,
    ):
        machine.command("cont")
        while (tick := screen.next_tick(BOOT_S)).memory < 3:
            pass
        machine.command("system_powerdown")
        last = int(screen.wait_for("poweroff disk=", BOOT_S).partition("=")[2])
        assert machine.process.wait(BOOT_S) == 0
        assert last >= tick.memory
        assert counter_of(disk) == last


@pytest.mark.guest
def test_restored_memory_goes_on_where_its_disk_stands_and_notices_another_disk(tmp_path, power_on):
    disk, state = make_disk(tmp_path / "disk.raw"), tmp_path / "memory"
    drive = f"file={disk},format=raw,if=virtio"
    with power_on([drive]) as machine, console.Console(machine.pty) as screen:
        machine.command("cont")
        while (before := screen.next_tick(BOOT_S)).memory < 3:
            pass
        machine.command("stop")
        machine.command(f'migrate "exec:cat > {state}"')
        frozen = counter_of(disk)
        assert frozen - before.memory in (-1, 0, 1)

    incoming = ["-incoming", f"exec:cat {state}"]
    with power_on([drive], *incoming) as machine, console.Console(machine.pty) as screen:
        machine.resume()
        after = screen.next_tick(BOOT_S)
        assert after.follows(frozen)
        for number in range(after.memory, after.memory + 4):  # far enough: a write under way is made again unseen
            assert screen.next_tick(BOOT_S) == console.Tick(number + 1, (number,), ok=True)

    # The disk has gone on: memory and disk are now of different moments.
    with power_on([drive], *incoming) as machine, console.Console(machine.pty) as screen:
        machine.resume()
        screen.next_tick(BOOT_S)  # may have been saved after it had read the disk
        assert not screen.next_tick(BOOT_S).ok
        assert not screen.next_tick(BOOT_S).ok


DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='b'>{guest.memory_size}</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{guest.kernel}</kernel><initrd>{guest.initrd}</initrd><cmdline>{guest.command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <serial type='pty'/>
  </devices>
</domain>
"""


@pytest.fixture
def open_folder():
    """A folder that QEMU's user can enter: pytest's own is private to root."""
    with tempfile.TemporaryDirectory(prefix="hvg", dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.mark.guest
def test_guest_under_libvirt_is_saved_restored_and_shut_down(open_folder, counting_guest, connection):
    disk, state = make_disk(open_folder / "disk.raw", 700), open_folder / "memory.save"
    xml = DOMAIN.format(name=open_folder.name, guest=counting_guest, disk=disk)
    domain = connection.define(xml)
    domain.start(paused=True)
    with console.Console(domain.serial_path()) as screen:
        domain.resume()
        assert screen.next_boot(BOOT_S) == (700,)
        before = screen.next_tick(BOOT_S)
        domain.save(state)
    frozen = counter_of(disk)
    assert frozen >= before.disk

    connection.restore(state, domain.xml(live=False), running=False)
    with console.Console(domain.serial_path()) as screen:
        domain.resume()
        assert screen.next_tick(BOOT_S).follows(frozen)
        domain.shutdown()
        last = int(screen.wait_for("poweroff disk=", BOOT_S).partition("=")[2])
    deadline = time.monotonic() + BOOT_S
    while domain.is_active():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert counter_of(disk) == last > frozen


def sectors(*texts: bytes) -> bytes:
    return b"".join(text.ljust(512, b"\0") for text in texts)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (bytes(1024), 0),
        (sectors(b"HVMGR-COUNT 000124\n", b"HVMGR-COUNT 000123\n"), 124),
        (sectors(b"HVMGR-COUNT 000124\n", b"HVMGR-COUNT 000125\n"), 125),
        (sectors(b"", b"HVMGR-COUNT 000001\n"), 1),
    ],
    ids=["blank", "even", "odd", "first"],
)
def test_counter_is_the_newer_of_the_two_sectors(data, count):
    assert guest.read_counter(data) == count


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1" * 1024,
        sectors(b"HVMGR-COUNT 000123\n"),
        sectors(b"HVMGR-COUNT 000123\n", b"HVMGR-COUNT 000122\n".ljust(512, b"x")),
    ],
    ids=["empty", "foreign", "short", "rest-not-zero"],
)
def test_bytes_without_a_counter_are_refused(data):
    with pytest.raises(errors.Corrupt):
        guest.read_counter(data)


@pytest.mark.guest
def test_second_build_makes_nothing_and_asks_nobody(counting_guest, monkeypatch):
    monkeypatch.setattr(guest, "_build", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(guest.process, "run", lambda *_, **__: pytest.fail("asked a program"))
    assert guest.build() == counting_guest


def test_build_without_package_lists_says_what_to_do(tmp_path, fake_program):
    fake_program("apt-cache", "echo 'E: No packages found' >&2; exit 100")
    with pytest.raises(errors.HostFailed) as failure:
        guest.build(tmp_path / "cache")
    assert "apt-get update" in failure.value.hint
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_build_whose_download_fails_leaves_nothing(tmp_path, fake_program):
    fake_program("apt-cache", "echo 'Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1)'")
    fake_program("apt-get", "echo 'E: Unable to fetch' >&2; exit 100")
    with pytest.raises(errors.HostFailed, match="Unable to fetch") as failure:
        guest.build(tmp_path / "cache")
    assert "apt-get update" in failure.value.hint
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.fixture
def fake_program(tmp_path, monkeypatch):
    """``fake_program(name, script)``: a shell script in front of the real program."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


def test_archive_is_read_by_cpio(tmp_path, require_program):
    cpio = require_program("cpio")
    archive = guest.pack([("bin", 0o040755, b""), ("bin/one", 0o100755, b"12345"), ("two", 0o100644, b"")])
    subprocess.run([cpio, "-idm"], input=archive, cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert (tmp_path / "bin/one").read_bytes() == b"12345"
    assert (tmp_path / "bin/one").stat().st_mode == 0o100755
    assert (tmp_path / "two").stat().st_size == 0


def test_modules_come_after_what_they_depend_on_and_once(tmp_path):
    for name, needs in {"virtio-net": "net,virtio", "net": "", "virtio": "ring", "ring": ""}.items():
        (tmp_path / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=" + needs.encode() + b"\0")
    paths = {path.stem.replace("-", "_"): path for path in tmp_path.iterdir()}
    packed: dict[str, bytes] = {}
    assert list(guest._ordered(["virtio", "absent"], paths, packed)) == ["ring", "virtio"]
    assert list(guest._ordered(["virtio_net"], paths, packed)) == ["net", "virtio_net"]
    assert list(packed) == ["ring", "virtio", "net", "virtio_net"]


def test_loaded_program_is_not_static(require_program):
    assert not guest.is_static(require_program("true").resolve().read_bytes())
    assert not guest.is_static(b"#!/bin/sh\n")


def a_block(place: int, number: int) -> bytes:
    line = b"HVMGR-BLOCK %d %06d\n" % (place, number)
    text = (line * (guest.BLOCK_SIZE // len(line) + 1))[: guest.BLOCK_SIZE - 32]
    return text + hashlib.md5(text, usedforsecurity=False).hexdigest().encode()


def test_blocks_are_those_of_one_moment() -> None:
    assert guest.block_rounds(a_block(0, 3) + a_block(1, 2) + a_block(2, 2)) == [3, 2, 2]
    assert guest.block_rounds(a_block(0, 1) + bytes(guest.BLOCK_SIZE)) == [1, 0]
    torn = a_block(0, 3)[:4096] + a_block(0, 2)[4096:]
    for bad in (a_block(0, 2) + a_block(1, 3), a_block(0, 3) + a_block(1, 1), a_block(1, 1), torn):
        with pytest.raises(errors.Corrupt):
            guest.block_rounds(bad)
