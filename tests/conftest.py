"""What every test may count on: nothing of this machine is touched, and a missing program is never silent.

And the embedded libvirt driver, one root per test process.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hvmgr.faces import guest
from hvmgr.host import hypervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_numbers = itertools.count()


def is_complete_run() -> bool:
    """Whether everything that tests need has to be there: in continuous integration and under ``.ci/run``."""
    return os.environ.get("HVMGR_REQUIRE_ALL", "0") == "1" or os.environ.get("CI") == "true"


@pytest.fixture(scope="session")
def require() -> Callable[[bool, str], None]:
    """``require(condition, reason)``: skips with the reason at a desk, fails in a complete run."""

    def check(condition: bool, reason: str) -> None:
        if condition:
            return
        if is_complete_run():
            pytest.fail(f"{reason} (a complete run skips nothing)", pytrace=False)
        pytest.skip(reason)

    return check


@pytest.fixture(scope="session")
def require_program(require: Callable[[bool, str], None]) -> Callable[[str], Path]:
    """``require_program(name)``: the path of a program in PATH or sbin; without it as ``require``."""

    def find(name: str) -> Path:
        found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        require(found is not None, f"the program {name} is missing: make setup installs it")
        return Path(str(found))

    return find


@pytest.fixture(scope="session")
def _own_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hvmgr")


@pytest.fixture(autouse=True)
def _own_settings(_own_place: Path) -> Iterator[None]:
    """Each test has a root and a host-wide index of its own (not made yet), never those of the machine."""
    number = next(_numbers)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HVMGR_ROOT", str(_own_place / f"root{number}"))
        environment.setenv("HVMGR_INDEX", str(_own_place / f"index{number}"))
        yield


@pytest.fixture(scope="session")
def counting_guest(require_program):
    """The kernel and the initrd of the counting guest, from the cache, made there by the first test that asks."""
    require_program("apt-get")
    return guest.build()


@pytest.fixture(scope="session")
def capability_cache(request):
    """A folder with what libvirt learnt about this host's QEMUs (8 s to learn); kept from one run to the next.

    libvirt checks each entry against the binary and the host, and learns anew by itself.
    """
    return request.config.cache.mkdir("libvirt-capabilities")


@pytest.fixture(scope="session")
def new_embed_root(capability_cache):
    """Makes fresh roots for the embedded driver, for other processes; their guests and files go at the end."""
    roots = []
    threading.Thread(target=reap_guests, args=(roots,), daemon=True).start()

    def make():
        root = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
        root.chmod(0o711)
        (root / "etc").mkdir()
        (root / "etc" / "qemu.conf").write_text('stdio_handler = "file"\n')
        shutil.copytree(capability_cache, root / "cache" / "qemu" / "capabilities")
        roots.append(root)
        return root

    yield make
    for root in roots:
        learnt = root / "cache" / "qemu" / "capabilities"
        if learnt.is_dir():
            shutil.copytree(learnt, capability_cache, dirs_exist_ok=True)
        end_guests(root)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def embed_root(new_embed_root):
    """The root that this test process holds: libvirt allows one per process, until the process ends."""
    return new_embed_root()


@pytest.fixture
def connection(embed_root):
    """A connection to the embedded driver without any domain; those of the test are gone afterwards."""
    with hypervisor.opened(f"qemu:///embed?root={embed_root}", wait_s=10) as connection:
        yield connection
        remove_domains(connection)


@dataclass
class Libvirtd:
    """A private libvirt daemon: reached from anywhere by ``uri``, or as qemu:///system below ``enter``.

    Its /run/libvirt, /etc/libvirt and /var/{lib,cache,log}/libvirt are run, etc, lib, cache and log in ``root``, by a
    mount namespace of its own. What has to see these paths under their usual names (managed save, TPM and NVRAM
    folders) is run with ``enter`` in front of its command.
    """

    root: Path
    process: subprocess.Popen

    @property
    def uri(self):
        return f"qemu+unix:///system?socket={self.root}/run/libvirt-sock"

    @property
    def enter(self):
        return ["nsenter", f"--target={self.process.pid}", "--mount", f"--wd={Path.cwd()}"]

    def stop(self, *, signal_=signal.SIGTERM):
        """Ends the daemon; its guests run on."""
        self.process.send_signal(signal_)
        self.process.wait(timeout=20)

    def start(self):
        """Starts the daemon again after ``stop``."""
        self.process = start_libvirtd(self.root)


@pytest.fixture(scope="session")
def new_libvirtd(new_embed_root):
    """Starts libvirt daemons on fresh folders; whoever asks for one stops it."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")

    def make():
        root = new_embed_root()
        for name in ("run", "lib", "log"):
            (root / name).mkdir(mode=0o711)
        (root / "etc" / "libvirtd.conf").write_text(
            f'auth_unix_rw = "none"\nauth_unix_ro = "none"\nlog_outputs = "3:file:{root}/libvirtd.log"\n'
        )
        return Libvirtd(root, start_libvirtd(root))

    return make


@pytest.fixture
def libvirtd(new_libvirtd):
    """A libvirtd that only this test uses, on fresh folders; its guests are gone afterwards."""
    daemon = new_libvirtd()
    yield daemon
    if daemon.process.poll() is None:
        daemon.stop()
    end_guests(daemon.root)


def start_libvirtd(root):
    """A running libvirtd whose folders are those of ``root``."""
    places = {"run": "/run", "etc": "/etc", "lib": "/var/lib", "cache": "/var/cache", "log": "/var/log"}
    for place in places.values():
        Path(place, "libvirt").mkdir(exist_ok=True)
    binds = "".join(f"mount --bind {root}/{name} {place}/libvirt; " for name, place in places.items())
    daemon = f"exec libvirtd --config /etc/libvirt/libvirtd.conf --pid-file {root}/libvirtd.pid"
    socket = root / "run" / "libvirt-sock"
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", binds + daemon],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    while not socket.exists():
        assert process.poll() is None, "libvirtd ended at once"
        assert time.monotonic() < deadline, "libvirtd opens no socket"
        time.sleep(0.02)
    return process


def remove_domains(connection):
    """Ends and undefines every domain of a connection."""
    for domain in connection.domains():
        domain.destroy()
        if connection.find_domain(domain.uuid) is not None:
            domain.undefine(keep_nvram=False, keep_tpm=False)


def end_guests(root):
    """Kills the QEMUs of an embedded root that no process holds any more, by their pid files."""
    for path in (root / "run" / "qemu").glob("*.pid"):
        if path.name == "driver.pid":  # opening and closing it would drop this process's own lock
            continue
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)


def reap_guests(roots):
    """Collects ended QEMUs at once, for ever.

    libvirt waits until a killed QEMU is gone. As a daemon it is a child of init, and the init of a container may
    take two seconds to collect it: so this process takes init's place for its descendants (PR_SET_CHILD_SUBREAPER).
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    pids = set()
    while True:
        for root in list(roots):
            for path in [*(root / "run/qemu").glob("*.pid"), *(root / "lib/qemu").glob("qmp-*/qmp.pid")]:
                if path.name != "driver.pid":
                    with contextlib.suppress(OSError, ValueError):
                        pids.add(int(path.read_text()))
        for pid in list(pids):
            try:
                ended, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # never ours, or collected
                pids.discard(pid)
            else:
                pids -= {ended}
        time.sleep(0.02)


def is_alive(pid):
    """Whether a process still runs; one that nobody has collected yet (a zombie) does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def wait_for_end(pid, timeout_s=10):
    """Waits until a process that is not our child is gone."""
    deadline = time.monotonic() + timeout_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
