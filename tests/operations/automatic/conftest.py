"""VMs without an operating system below a libvirtd with the hook, and the worker that its markers ask for."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest

import hvmgr
from hvmgr.operations import start_hook
from hvmgr.operations.automatic import acts, worker
from hvmgr.storage import spool
from tests import private_libvirt
from tests.operations.test_start_hook import Bench as _Bench

WAIT_S = 60


class Bench(_Bench):
    """The bench of the start guard, with a worker."""

    said: list[str]

    def work(self, *, wait_s=0, **wishes):
        """One run; what became of it."""
        self.said = []
        return worker.run(hvmgr.Reporter(notice=self.said.append, **wishes), wait_s=wait_s)

    def done(self, **wishes):
        """The actions of one run in which nothing fails or waits."""
        outcome = self.work(**wishes)
        assert (outcome.failed, outcome.put_off) == ([], [])
        return [deed.action for deed in outcome.done]

    def new(self):
        """The events that nobody has seen yet."""
        folder = spool.folder()
        return sorted(path.name.split("_")[2] for path in folder.iterdir()) if folder.is_dir() else []

    def wait_until_off(self, *events):
        """The VM is off and libvirt has run its hook."""
        deadline = time.monotonic() + WAIT_S
        while self.is_running or any(one not in self.new() for one in events):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def switch_off(self):
        """The guest ends by itself, as its kernel would: it writes to the power management's port, once there is a BIOS."""
        deadline = time.monotonic() + WAIT_S
        while self.is_running:
            assert time.monotonic() < deadline
            with contextlib.suppress(hvmgr.errors.HvmgrError):  # it may end in between
                self.domain.monitor("human-monitor-command", command_line="o /w 0x604 0x2000")
            time.sleep(0.05)
        self.wait_until_off("release")

    def crash(self):
        """QEMU dies."""
        pid = int((self.daemon.root / "run" / "qemu" / "web.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        self.wait_until_off("release")

    @property
    def domain(self):
        return self.host.connection.find_domain_by_name("web")


@pytest.fixture(scope="module")
def run_folder():
    """Where the hook leaves its markers: said in the script that libvirt runs."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HVMGR_RUN", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hooked(new_embed_root, run_folder):
    """A libvirtd that found the hook when it started."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    root = new_embed_root()
    start_hook.install(root / "etc" / "hooks")
    with private_libvirt.daemon(root) as daemon:
        yield daemon


@pytest.fixture
def bench(hooked, run_folder, monkeypatch):
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    monkeypatch.setenv("HVMGR_INDEX", str(folder / "index"))
    monkeypatch.setenv("HVMGR_RUN", str(run_folder))
    monkeypatch.setattr(acts, "QUIET", timedelta(0))  # nobody waits two minutes here
    bench = Bench(hooked, folder / "homes")
    yield bench
    for domain in bench.host.connection.domains():
        domain.destroy()
        domain.remove_managed_save()
        if bench.host.connection.find_domain(domain.uuid) is not None:
            domain.undefine(keep_nvram=False, keep_tpm=False)
    bench.host.close()
    shutil.rmtree(folder)
    shutil.rmtree(run_folder / "events", ignore_errors=True)
