"""The counting guest with a real guest agent: Debian's qemu-guest-agent and its libraries, in a second part of its initramfs.

Its disk has, besides the counter, an ext4 on its first partition, which the guest writes all the time. Whether that was
at rest when a disk was frozen, the disk itself says: Linux clears "needs recovery" in the superblock of an ext4 while it
is frozen (ext4_freeze in fs/ext4/super.c), and sets it as long as it is mounted for writing otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from hvmgr import errors
from hvmgr.faces import guest
from hvmgr.host import guest_agent, libvirt_door

_PACKAGE = "qemu-guest-agent"
_INIT = Path(__file__).with_name("agent_init.sh")

_FILES_AT = 2 << 20  # behind the counter
_SIZE = 8 << 20
_FEATURES_AT = _FILES_AT + 1024 + 0x60  # s_feature_incompat of struct ext4_super_block
_NEEDS_RECOVERY = 0x4

AGENT_S = 120

# A shell inside the guest that can wait for a nudge: an NMI, which nothing else looks at.
_SHELL = """
b=/bin/busybox
nudges() { $b grep NMI: /proc/interrupts; }
await_nudge() {
    until [ "$(nudges)" != "$was" ]; do $b sleep 0.05; done
    was=$(nudges)
}
start() {
    for one in /sys/class/virtio-ports/*; do $b grep -q guest_agent "$one/name" && path=/dev/${one##*/}; done
    exec /bin/qemu-ga --method virtio-serial --path "$path" --statedir /agent --pidfile /agent/pid --logfile /agent/log "$@"
}
was=$(nudges)
: > /agent/ready
"""


class Agent:
    """The agent of a running guest, and what can happen to it."""

    def __init__(self, machine):
        self.machine = machine

    def ask(self, command, **arguments):
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_door.agent_command(self.machine.domain._handle(), request, 20))["return"]

    def run(self, script):
        """A shell in the guest is at it; the agent does not wait for it."""
        self.ask("guest-exec", path="/bin/busybox", arg=["sh", "-c", _SHELL + script])

    def nudge(self):
        self.machine.domain.monitor("inject-nmi")

    def stop(self):
        """It stops, and the channel stays open: its process sleeps."""
        self.run("$b killall -STOP qemu-ga")
        self.await_silence()

    def hang_at_nudge(self):
        """Nudged it sleeps, until it is nudged again."""
        self.run("await_nudge; $b killall -STOP qemu-ga; await_nudge; $b killall -CONT qemu-ga")
        self._await_shell()

    def die_at_nudge(self):
        """Nudged it is killed; nudged again a new one is there."""
        self.run("await_nudge; $b killall -KILL qemu-ga; await_nudge; start")
        self._await_shell()

    def forbid(self, command):
        """Another one is there, which refuses this command."""
        self.run(f"$b killall -KILL qemu-ga; start -b {command}")
        deadline = time.monotonic() + AGENT_S
        with contextlib.suppress(errors.HvmgrError, libvirt_door.library().libvirtError):
            while any(
                one["name"] == command and one["enabled"] for one in self.ask("guest-info")["supported_commands"]
            ):
                assert time.monotonic() < deadline, "the guest's agent was not replaced"
                time.sleep(0.05)
        self.await_answer()

    def _await_shell(self):
        """Until it waits for a nudge."""
        deadline = time.monotonic() + AGENT_S
        while True:
            with contextlib.suppress(libvirt_door.library().libvirtError):
                self.ask("guest-file-close", handle=self.ask("guest-file-open", path="/agent/ready"))
                return
            assert time.monotonic() < deadline, "the shell in the guest did not come"
            time.sleep(0.05)

    def await_silence(self):
        """It answers no more; it, too, comes a little later to what it was told."""
        deadline = time.monotonic() + AGENT_S
        self._greet(3)  # a busy one is not silent
        with contextlib.suppress(errors.HvmgrError):
            while True:
                self.machine.domain.ask_agent("guest-ping", timeout_s=3)
                assert time.monotonic() < deadline, "the guest's agent did not stop"
                time.sleep(0.05)
        self._greet(1)  # whoever asks now waits in vain

    def await_answer(self):
        """It holds the channel and answers."""
        self._greet(-1)  # 5 s, as everywhere
        deadline, words = time.monotonic() + AGENT_S, "nobody holds the channel"
        while True:
            if guest_agent.is_connected(self.machine.domain):
                try:
                    self.machine.domain.ask_agent("guest-ping", timeout_s=5)
                except errors.HvmgrError as error:
                    words = str(error)
                else:
                    return
            assert time.monotonic() < deadline, f"the guest's agent did not come: {words}"
            time.sleep(0.1)

    def _greet(self, seconds):
        """How long libvirt waits for an answer to the greeting that it sends before every command."""
        self.machine.domain._handle().agentSetResponseTimeout(seconds)

    def is_frozen(self):
        return guest_agent.is_frozen(self.machine.domain)


def build(counting, folder):
    """The guest; ``folder`` keeps the agent, which is downloaded once (0.4 MB)."""
    agent = folder / "qemu-ga"
    if not agent.is_file():
        with tempfile.TemporaryDirectory(prefix="hv") as place:
            files = guest.unpacked(_PACKAGE, Path(place) / "agent")
            shutil.copy(files / "usr/sbin/qemu-ga", folder / "qemu-ga.part")
        (folder / "qemu-ga.part").rename(agent)
    initrd = folder / "initrd"
    initrd.write_bytes(counting.initrd.read_bytes() + guest.pack(_contents(agent)))
    return dataclasses.replace(counting, initrd=initrd, memory_size=counting.memory_size + (16 << 20))


def _contents(agent):
    """Names, modes, bytes: the agent, the libraries that this host's loader finds for it, and an init around ours."""
    shown = subprocess.run(["ldd", agent], check=True, capture_output=True, text=True, timeout=60).stdout
    libraries = [Path(name) for name in re.findall(r"(/\S+) \(0x", shown)]
    folders = {"agent", "files"}
    for name in libraries:
        folders |= {str(one).lstrip("/") for one in name.parents if str(one) != "/"}
    for folder in sorted(folders):
        yield folder, 0o040755, b""
    for name in libraries:
        yield str(name).lstrip("/"), 0o100755, name.read_bytes()
    yield "bin/qemu-ga", 0o100755, agent.read_bytes()
    yield "bin/sh", 0o120777, b"busybox"  # for scripts that the agent is told to run
    yield "count", 0o100755, guest._INIT.read_bytes()
    yield "init", 0o100755, _INIT.read_bytes()


def make_disk(path):
    """A qcow2 with room for the counter, and one partition with an empty ext4."""
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        file.truncate(_SIZE)
        entry = struct.pack("<8BII", 0, 0, 0, 0, 0x83, 0, 0, 0, _FILES_AT // 512, (_SIZE - _FILES_AT) // 512)
        file.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")
    blocks = (_SIZE - _FILES_AT) // 1024
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-E", f"offset={_FILES_AT},lazy_journal_init=1"]
    subprocess.run([*command, raw, f"{blocks}"], check=True, timeout=60)
    subprocess.run(["qemu-img", "convert", "-q", "-O", "qcow2", raw, path], check=True, timeout=60)
    raw.unlink()
    return path


def was_at_rest(image, fmt="qcow2"):
    """Whether the ext4 on a disk's image was at rest when nobody wrote to the image any more."""
    command = ["qemu-io", "-r", "-U", "-f", fmt, "-c", f"read -v {_FEATURES_AT} 4", str(image)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"^[0-9a-f]{8}:  ((?:[0-9a-f]{2} ){4})", shown, re.MULTILINE)
    features = int.from_bytes(bytes.fromhex(found[1]), "little")
    assert features & 0x40, "no ext4 with extents is there"
    return not features & _NEEDS_RECOVERY
