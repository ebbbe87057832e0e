"""Fixtures for the whole suite: the embedded libvirt driver, one root per test process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from hvmgr.host import hypervisor


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
        for path in [path for root in list(roots) for path in (root / "run" / "qemu").glob("*.pid")]:
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
