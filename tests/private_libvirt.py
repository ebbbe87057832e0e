"""A libvirt of our own, beside the machine's: roots for the embedded driver, and a daemon in a mount namespace.

For the tests and for ``bench``: without pytest. As a program it only learns about QEMU:

    python -m tests.private_libvirt FOLDER
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

# A QEMU that keeps root's rights gets userfaultfd whatever the host's setting is. The files of others stay theirs.
WITH_RIGHTS = 'user = "root"\ngroup = "root"\nclear_emulator_capabilities = 0\ndynamic_ownership = 0\n'

# Without a /dev of its own for each QEMU, the embedded driver needs a fifth less for a start: for each look
# into such a /dev libvirt forks the test process, which is large. A daemon's QEMUs have them, as on a host.
SIMPLE = "namespaces = []\n"

# Under TCG libvirt asks QEMU for each of 500 properties of a CPU at every start, and QEMU reads its monitor byte by byte, each
# by six system calls: a third of what a test with a guest costs. Without this capability libvirt asks in one word.
BRIEF = 'capability_filters = ["cpu-unavailable-features"]\n'


def has_userfaultfd():
    """Whether a process with our rights gets userfaultfd with write protection: not in every container (x86-64)."""
    if platform.machine() != "x86_64":
        return False
    descriptor = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        return False
    try:
        # UFFDIO_API of linux/userfaultfd.h: the version goes in, the features come out; the lowest is write protection.
        answer = fcntl.ioctl(descriptor, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return bool(struct.unpack("QQQ", answer)[1] & 1)


@contextlib.contextmanager
def roots(capability_cache):
    """Gives a function that makes fresh roots for the embedded driver; their guests and files go at the end.

    ``capability_cache`` keeps what libvirt learnt about this host's QEMUs (8 s to learn) from one run to the next.
    """
    made = []

    def keep_learnt(root):
        learnt = root / "cache" / "qemu" / "capabilities"
        if learnt.is_dir():
            shutil.copytree(learnt, capability_cache, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.new"))

    def make():
        for root in made:
            keep_learnt(root)
        root = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
        root.chmod(0o711)
        (root / "etc").mkdir()
        # Each finds a VNC port that is free and leaves it to its QEMU: two libvirts must not look at the same ones.
        port = 5900 + 64 * random.randrange(400)
        (root / "etc" / "qemu.conf").write_text(f'stdio_handler = "file"\nremote_display_port_min = {port}\n')
        shutil.copytree(capability_cache, root / "cache" / "qemu" / "capabilities")
        with (root / "etc" / "qemu.conf").open("a") as conf:
            conf.write(SIMPLE + BRIEF)
        made.append(root)
        return root

    try:
        yield make
    finally:
        for root in list(made):
            keep_learnt(root)
            end_guests(root)
            made.remove(root)
            shutil.rmtree(root, ignore_errors=True)


def learn(capability_cache):
    """What libvirt learns about this host's QEMUs is in the folder, for all processes of a run."""
    ask = "import sys; from hvmgr.host import hypervisor as one\nwith one.opened(sys.argv[1], wait_s=60) as it: it.capabilities()"
    capability_cache.mkdir(parents=True, exist_ok=True)
    with roots(capability_cache) as make:
        subprocess.run([sys.executable, "-c", ask, f"qemu:///embed?root={make()}"], check=True, timeout=120)


@dataclass
class Libvirtd:
    """A private libvirt daemon: reached from anywhere by ``uri``, or as qemu:///system below ``enter``.

    Its /run/libvirt, /etc/libvirt and /var/{lib,cache,log}/libvirt are run, etc, lib, cache and log in ``root``, by a
    mount namespace of its own. What has to see these paths under their usual names (managed save, TPM and NVRAM
    folders) is run with ``enter`` in front of its command.
    """

    root: Path
    process: subprocess.Popen
    own_network: bool = False
    host_name: str | None = None

    @property
    def uri(self):
        return f"qemu+unix:///system?socket={self.root}/run/libvirt-sock"

    @property
    def enter(self):
        network = ["--net"] if self.own_network else []
        return ["nsenter", f"--target={self.process.pid}", "--mount", *network, f"--wd={Path.cwd()}"]

    def stop(self, *, signal_=signal.SIGTERM):
        """Ends the daemon; its guests run on."""
        self.process.send_signal(signal_)
        self.process.wait(timeout=60)

    def start(self):
        """Starts the daemon again after ``stop``."""
        self.process = start_libvirtd(self.root, own_network=self.own_network, host_name=self.host_name)


@contextlib.contextmanager
def daemon(root, *, qemu_conf="", libvirtd_conf="", own_network=False, host_name=None):
    """A running Libvirtd on a fresh root; its guests are gone afterwards. The texts are added to its settings.

    With ``own_network`` it is another host as far as networks go: a network namespace with nothing in it. With a
    ``host_name`` VMs can migrate to it.
    """
    if host_name is not None:
        libvirtd_conf += f'host_uuid = "{uuid.uuid4()}"\n'
    for name in ("run", "lib", "log"):
        (root / name).mkdir(mode=0o711)
    (root / "etc" / "libvirtd.conf").write_text(
        f'auth_unix_rw = "none"\nauth_unix_ro = "none"\nlog_outputs = "3:file:{root}/libvirtd.log"\n{libvirtd_conf}'
    )
    conf = root / "etc" / "qemu.conf"
    conf.write_text(conf.read_text().replace(SIMPLE, "") + qemu_conf)
    process = start_libvirtd(root, own_network=own_network, host_name=host_name)
    running = Libvirtd(root, process, own_network, host_name)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()
        end_guests(root)


def start_libvirtd(root, *, own_network=False, host_name=None):
    """A running libvirtd whose folders are those of ``root``."""
    places = {"run": "/run", "etc": "/etc", "lib": "/var/lib", "cache": "/var/cache", "log": "/var/log"}
    for place in places.values():
        Path(place, "libvirt").mkdir(exist_ok=True)
    binds = "".join(f"mount --bind {root}/{name} {place}/libvirt; " for name, place in places.items())
    if own_network:  # what /sys tells of devices is what was there when it was mounted
        (root / "cgroup").mkdir(exist_ok=True)
        binds += f"mount --rbind /sys/fs/cgroup {root}/cgroup; mount -t sysfs sysfs /sys; "
        binds += f"mount --rbind {root}/cgroup /sys/fs/cgroup; "
    daemon = f"exec libvirtd --config /etc/libvirt/libvirtd.conf --pid-file {root}/libvirtd.pid"
    if host_name is not None:
        binds += f"hostname {host_name}; "
    door = root / "run" / "libvirt-sock"
    door.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            "unshare",
            *["--net"] * own_network,
            *["--uts"] * bool(host_name),
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-ec",
            binds + daemon,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not _listens(door):
        assert process.poll() is None, "libvirtd ended at once"
        assert time.monotonic() < deadline, "libvirtd opens no socket"
        time.sleep(0.02)
    return process


def _listens(door):
    """Whether somebody answers at the socket: it is there a moment before."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        return one.connect_ex(os.fspath(door)) == 0


def end_guests(root):
    """Kills the QEMUs of a root that no process holds any more."""
    for pid in guest_pids(root):
        with contextlib.suppress(OSError):
            if is_guest(pid, root):
                os.kill(pid, signal.SIGKILL)
                wait_for_end(pid)


def is_guest(pid, root):
    """Whether a process is a QEMU of this root: pid files may be stale and their numbers used again."""
    if not Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system"):
        return False
    if os.fspath(root) in Path(f"/proc/{pid}/cmdline").read_text():
        return True
    return Path(f"/proc/{pid}/root/var/lib/libvirt").samefile(root / "lib")  # a private libvirtd's


def take_place_of_init():
    """From here on this process is the child of one that collects whatever process loses its parent, at once.

    libvirt waits until a QEMU that it ended is gone. As a daemon that is a child of init, and the init of a container
    may take two seconds to collect it: stopping a guest and probing for capabilities are five times as fast with one of
    our own (PR_SET_CHILD_SUBREAPER). It has to be a process that waits for nothing else, and for all of them: a QEMU that
    it overlooked would keep libvirt waiting for a quarter of a minute.
    """
    if os.environ.setdefault("HVMGR_TESTS_INIT", str(os.getpid())) != str(os.getpid()):
        return
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the whole process group has it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: os.kill(child, number))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def guest_pids(root):
    """Processes that libvirt's pid files name: guests, and QEMUs that are asked for their capabilities."""
    pids = []
    with contextlib.suppress(OSError):  # folders come and go
        for path in [*(root / "run/qemu").glob("*.pid"), *(root / "lib/qemu").glob("qmp-*/qmp.pid")]:
            if path.name != "driver.pid":  # opening and closing it would drop this process's own lock
                with contextlib.suppress(OSError, ValueError):
                    pids.append(int(path.read_text()))
    return pids


def is_alive(pid):
    """Whether a process still runs; one that nobody has collected yet (a zombie) does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def wait_for_end(pid, timeout_s=60):
    """Waits until a process that is not our child is gone."""
    deadline = time.monotonic() + timeout_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    learn(Path(sys.argv[1]))
