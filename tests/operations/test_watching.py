"""``hvmgr watch`` and hooks that use hvmgr themselves, below a real libvirtd; each command is a process of its own."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from lxml import etree

from tests import private_libvirt

pytestmark = pytest.mark.libvirtd

WAIT_S = 90


class Watch:
    """A running ``hvmgr watch``; its lines are taken as they come."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hvmgr", "watch", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def line(self):
        line = self.lines.get(timeout=WAIT_S)
        assert line is not None, self.process.stderr.read()
        return line

    def until(self, event, **facts):
        """The documents up to the first one of this event (and with these facts), which is the last of them."""
        found = []
        while True:
            found.append(json.loads(self.line()))
            last = found[-1]
            if last["event"] == event and all(last[key] == value for key, value in facts.items()):
                return found

    def end(self, number=signal.SIGINT):
        self.process.send_signal(number)
        code = self.process.wait(timeout=WAIT_S)
        return code, self.process.stderr.read()


@pytest.fixture(scope="module")
def daemon(new_embed_root):
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    with private_libvirt.daemon(new_embed_root()) as daemon:
        yield daemon


@pytest.fixture
def hvmgr(daemon, monkeypatch, tmp_path):
    """The command line as a process of its own, on this libvirtd."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    monkeypatch.setenv("HVMGR_ROOT", str(folder / "homes"))
    monkeypatch.setenv("HVMGR_INDEX", str(folder / "index"))
    monkeypatch.setenv("HVMGR_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", daemon.uri)

    def call(*words):
        command = [sys.executable, "-m", "hvmgr", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)

    yield call
    for name in virsh(daemon, "list", "--all", "--name").split():
        subprocess.run(["virsh", "-c", daemon.uri, "destroy", name], capture_output=True, timeout=60, check=False)
        virsh(daemon, "undefine", name)
    shutil.rmtree(folder)


@pytest.fixture
def watch(hvmgr):
    running = []

    def start(*words):
        running.append(Watch(*words))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        one.process.stdout.close()
        one.process.stderr.close()


def virsh(daemon, *words):
    command = ["virsh", "-c", daemon.uri, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def make(hvmgr, daemon, name="web"):
    words = ["--memory", "64M", "--disk", "1M", "--network", "none", "--accel", "tcg", "--template", "generation1"]
    done = hvmgr("vm", "create", name, *words)
    assert done.returncode == 0, done.stderr
    root = etree.fromstring(virsh(daemon, "dumpxml", "--inactive", name))
    devices = root.find("devices")
    for device in [*devices.findall("graphics"), *devices.findall("video"), *devices.findall("channel")]:
        devices.remove(device)
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(etree.tostring(root, encoding="unicode"))
        file.flush()
        virsh(daemon, "define", file.name)


def ok(done):
    assert done.returncode == 0, done.stderr
    return done


def test_watch_tells_what_everybody_does_and_waits_for_libvirt(hvmgr, daemon, watch):
    make(hvmgr, daemon)
    watching = watch("--json")
    first = watching.until("watching")[0]
    assert (first["schema"], first["source"], first["vm"], first["connection"]) == (1, "watch", None, daemon.uri)
    ok(hvmgr("snapshot", "create", "web", "one"))
    made = watching.until("snapshot-created")
    assert (made[-1]["source"], made[-1]["snapshots"][0]["name"]) == ("hvmgr", "one")
    virsh(daemon, "start", "web")
    started = watching.until("vm-started")[-1]
    assert (started["source"], started["detail"], started["vm"]["name"]) == ("libvirt", "booted", "web")
    ok(hvmgr("snapshot", "create", "web", "two", "--type", "disk-only"))
    watching.until("snapshot-created")
    virsh(daemon, "blockpull", "web", "hda", "--wait")
    pulled = watching.until("job-completed")[-1]
    assert (pulled["slot"], pulled["detail"]) == ("hda", "pull")
    virsh(daemon, "desc", "web", "--title", "--new-desc", "the web server")
    assert watching.until("metadata-changed")[-1]["detail"] == "title"
    virsh(daemon, "suspend", "web")
    assert watching.until("vm-suspended")[-1]["detail"] == "paused"
    virsh(daemon, "destroy", "web")
    assert watching.until("vm-stopped")[-1]["detail"] == "destroyed"
    ok(hvmgr("snapshot", "apply", "web", "one"))
    watching.until("after-apply")
    daemon.stop()
    watching.until("connection-lost")
    daemon.start()
    watching.until("connection-restored")
    virsh(daemon, "start", "web")
    watching.until("vm-started")
    assert watching.end() == (0, "")


def test_watch_of_one_vm_and_of_the_past(hvmgr, daemon, watch):
    make(hvmgr, daemon)
    make(hvmgr, daemon, "db")
    ok(hvmgr("snapshot", "create", "web", "old"))
    watching = watch("db", "--since", "1h")
    assert watching.line().rstrip("\n").split("\t")[1:] == ["db", "after-operation", "creation of db"]
    ok(hvmgr("snapshot", "create", "db", "mine"))
    lines = []
    while not lines or lines[-1][1] != "snapshot-created":
        lines.append(watching.line().rstrip("\n").split("\t")[1:])
    assert lines[-1] == ["db", "snapshot-created", "creation of snapshot 'mine' of db"]
    assert {line[0] for line in lines} == {"db"}
    assert watching.end()[0] == 0
    none = hvmgr("watch", "nobody")
    assert (none.returncode, none.stdout) == (3, "")


def test_watch_ends_when_its_reader_does(hvmgr, daemon, watch):
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "hvmgr", "watch", "--json"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    with os.fdopen(reader) as file:
        assert json.loads(file.readline())["event"] == "watching"
    assert process.wait(timeout=WAIT_S) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("since", ["soon", "10 parsecs", "2026-13-01", "999999999d", "-5m", ""])
def test_watch_since_never(since, hvmgr):
    done = hvmgr("watch", "--since", since)
    assert done.returncode == 2, done
    assert "neither a length of time nor a time" in done.stderr


def test_watch_without_libvirt_says_so(hvmgr):
    done = hvmgr("-c", "qemu+unix:///system?socket=/no/such/socket", "watch")
    assert (done.returncode, done.stdout) == (8, "")


# --- hooks that use hvmgr -----------------------------------------------------------------------------------------------


@pytest.fixture
def hook(tmp_path):
    """``hook(event, *words)``: a hook that runs hvmgr with these words; where its answer is kept."""

    def install(event, *words):
        answer = tmp_path / f"{event}.answer"
        path = tmp_path / "config" / "hooks.d" / event / "hvmgr"
        path.parent.mkdir(parents=True)
        line = " ".join([sys.executable, "-m", "hvmgr", *words])
        path.write_text(f"#!/bin/sh\ncd '{Path.cwd()}'\n{line} > '{answer}' 2>&1\necho \"code $?\" >> '{answer}'\n")
        path.chmod(0o755)
        return answer

    return install


def test_hook_before_is_busy_on_its_own_vm_and_free_on_others(hvmgr, daemon, hook):
    make(hvmgr, daemon)
    answer = hook("before-apply", "snapshot", "create", "web", "inner")
    other = hook("before-snapshot", "vm", "create", "db", "--network", "none")
    ok(hvmgr("snapshot", "create", "web", "one"))
    assert other.read_text().endswith("code 0\n")
    ok(hvmgr("snapshot", "apply", "web", "one"))
    told = answer.read_text()
    assert "a before-apply hook of web runs this command, and the operation on web waits for that hook" in told
    assert told.endswith("code 4\n")
    assert len(ok(hvmgr("snapshot", "list", "web")).stdout.splitlines()) == 1


def test_hook_afterwards_may_work_on_the_same_vm_and_ends(hvmgr, daemon, hook):
    make(hvmgr, daemon)
    answer = hook("snapshot-created", "snapshot", "create", "web")
    ok(hvmgr("snapshot", "create", "web", "one"))
    told = answer.read_text()
    assert "the hooks for snapshot-created are not run again: one of them runs this command" in told
    assert told.endswith("code 0\n")
    assert len(ok(hvmgr("snapshot", "list", "web")).stdout.splitlines()) == 2
