"""Kills an operation before each of its durable acts, and looks at what the next command makes of it.

Run as a program, inside the mount namespace of a libvirtd that nobody else uses (``test_crash_*.py`` does that):

    python crash.py SHAPE [STRIDE [FIRST]]      kill before act FIRST, FIRST + STRIDE, … (default: every act)
    python crash.py SHAPE random COUNT SEED     kill at COUNT random moments
    python crash.py SHAPE start COUNT           kill before COUNT acts (0: every act), then start the VM as virsh does

For every kill: the VM is put into the shape's state, a forked child runs the operation and kills itself (SIGKILL, so
that no ``finally`` helps) before its n-th act, another child opens the home through the public API and describes all
that can be seen. The description has to equal that of the state before or of the state after, ids aside.

With ``start``, libvirt starts the VM before any command of hvmgr's has looked at the home: either it runs on the bytes of
the state before or after, as its own QEMU reads them, and what it writes reaches no snapshot, or libvirt refuses.

Each of these processes is forked from one that has imported everything but holds neither libvirt nor a thread.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")
os.environ.setdefault("LIBVIRT_DEBUG", "4")

import libvirt
import libvirt_qemu
import qemu.qmp  # noqa: F401 - imported before the forks

import hvmgr
from hvmgr import errors
from hvmgr.host import background_snapshot, libvirt_snapshots, qmp, saved_state
from hvmgr.host.domain import Domain
from hvmgr.model import configuration
from hvmgr.model.tree import Tree
from hvmgr.operations import working
from hvmgr.storage import durable, frozen, index, vm_home

for _one in pkgutil.walk_packages(hvmgr.__path__, "hvmgr."):
    if not _one.name.endswith("__main__"):
        importlib.import_module(_one.name)  # once, not in each child

NAME = "web"
DISK = 1 << 20
CHILD_S = 120.0

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]+Z")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d\.\d\d\.\d\d")
_PART = re.compile(re.escape(durable.TEMPORARY) + "[0-9a-f]+")

# What reaches the disk, and what libvirt is asked to change.
_OS_ACTS = ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "chmod", "fchmod", "chown", "fchown",
            "link", "utime")  # fmt: skip
_CONNECTION_ACTS = ("defineXMLFlags", "restoreFlags")
_DOMAIN_ACTS = [
    "snapshotCreateXML",
    "saveFlags",
    "managedSave",
    "managedSaveRemove",
    "managedSaveDefineXML",
    "rename",
    "undefineFlags",
    "destroy",
    "suspend",
    "resume",
    "createWithFlags",
    "abortJob",
    "blockRebase",
    "blockCommit",
    "blockJobAbort",
]


@dataclass(frozen=True)
class Shape:
    """A state and an operation on it. ``setup`` runs once and leaves the VM off, ``live`` after every reset.

    ``middle`` is the first part of an operation that is two of them: its result is a whole state, too. ``again``
    says that the operation is run once more where a kill left the state before it; ``foreign``, that what others did
    is taken over by whoever looks.
    """

    setup: Callable[[hvmgr.Host], object]
    act: Callable[[hvmgr.Host], object]
    live: Callable[[hvmgr.Host], object] | None = None
    middle: Callable[[hvmgr.Host], object] | None = None
    again: bool = False
    foreign: bool = False


@dataclass(frozen=True)
class Place:
    """Where the homes of this run are, and what every reset starts from."""

    folder: Path

    @property
    def homes(self) -> Path:
        return self.folder / "homes"

    @property
    def copies(self) -> Path:
        return self.folder / "copies"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"


# --- processes --------------------------------------------------------------------------------------------------------


def forked(call: Callable[[], object], *, kill_after_s: float | None = None) -> tuple[object, int, int]:
    """What the call returned in a child (None when it died), the child's wait status, and its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            os.close(reader)
            answer = json.dumps({"value": call()})
            with os.fdopen(writer, "w") as pipe:
                pipe.write(answer)
            code = 0
        except BaseException:  # noqa: BLE001 - a child never goes on in the parent's code
            with contextlib.suppress(OSError), os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps({"error": traceback.format_exc()}))
        finally:
            os._exit(code)
    os.close(writer)
    text = _read_all(reader, pid, kill_after_s)
    _, status = os.waitpid(pid, 0)
    answer = json.loads(text) if text else {"value": None}
    if "error" in answer:
        raise AssertionError(f"in the child:\n{answer['error']}")
    return answer["value"], status, pid


def _read_all(reader: int, pid: int, kill_after_s: float | None) -> bytes:
    """Everything until the child closes the pipe; it is killed at the given moment, or when it hangs."""
    pieces, deadline = [], time.monotonic() + (CHILD_S if kill_after_s is None else kill_after_s)
    with open(reader, "rb", buffering=0) as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.kill(pid, signal.SIGKILL)
                if kill_after_s is None:
                    raise AssertionError(f"a child did not end within {CHILD_S:.0f} seconds")
                return b""
            piece = pipe.read(1 << 16)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)


def left_over(session: int, *, wait_s: float = 30.0) -> list[str]:
    """Command lines of what still runs of a dead child; its storage daemon ends with it."""
    deadline = time.monotonic() + wait_s
    while (found := _running(session)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _running(session: int) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


# --- acts -------------------------------------------------------------------------------------------------------------


class Counter:
    """Counts the acts of this process, and kills it before the n-th."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.names: list[str] = []
        self._lock = threading.Lock()

    def act(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            if len(self.names) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    def install(self) -> None:
        for name in _OS_ACTS:
            self._wrap(os, name)
        for name in _CONNECTION_ACTS:
            self._wrap(libvirt.virConnect, name)
        for name in _DOMAIN_ACTS:
            self._wrap(libvirt.virDomain, name)
        self._wrap(libvirt.virDomainSnapshot, "delete")
        self._wrap_monitor("qemuMonitorCommand")
        self._wrap_monitor("qemuMonitorCommandWithFiles")
        original = qmp.Session.execute

        def execute(session: qmp.Session, command: str, *args: object, **kwargs: object) -> object:
            if not command.startswith("query-"):
                self.act(f"qmp {command}")
            return original(session, command, *args, **kwargs)

        qmp.Session.execute = execute

    def _wrap_monitor(self, name: str) -> None:
        """What a running QEMU is asked to change."""
        original = getattr(libvirt_qemu, name)

        def wrapped(handle: object, request: str, *args: object) -> object:
            command = json.loads(request)["execute"]
            if not command.startswith(("query-", "qom-list", "human-")):
                self.act(f"monitor {command}")
            return original(handle, request, *args)

        setattr(libvirt_qemu, name, wrapped)

    def _wrap(self, owner: object, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: object, **kwargs: object) -> object:
            what = next((str(arg) for arg in args if isinstance(arg, str | Path)), "")
            self.act(f"{name} {what[-60:]}".replace("\n", " "))
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)


# --- the state --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(place: Place, notices: list[str] | None = None) -> Iterator[hvmgr.Host]:
    """The host of this run."""
    os.environ["HVMGR_INDEX"] = str(place.index)
    reporter = hvmgr.Reporter(notice=(notices if notices is not None else []).append)
    uri = os.environ.get("HVMGR_CRASH_URI", "qemu:///system")
    with hvmgr.Host.open(uri, root=place.homes, wait_s=60, reporter=reporter) as host:
        yield host


def monitor(host: hvmgr.Host, line: str, *, name: str = NAME) -> str:
    """What the running VM's monitor says to a command for people."""
    domain = host.connection.find_domain_by_name(name)
    return str(domain.monitor("human-monitor-command", command_line=line))


def write_running(host: hvmgr.Host, pattern: int, offset: str = "0", *, disk: int = 0, name: str = NAME) -> None:
    """64 KiB of a byte on a disk of the running VM, flushed."""
    domain = host.connection.find_domain_by_name(name)
    device = domain.monitor("query-block")[disk]["qdev"]
    for command in (f"write -P {pattern} {offset} 64k", "flush"):
        answer = monitor(host, f'qemu-io -d {device} "{command}"', name=name)
        assert "rror" not in answer, answer


def write_off(host: hvmgr.Host, pattern: int, offset: str = "0", *, slot: str = "hda") -> None:
    """64 KiB of a byte on a disk of a VM that is off."""
    path = host.vm(NAME).now().disks[slot]
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} 64k", path]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def set_memory(host: hvmgr.Host, value: int) -> None:
    """A byte in the VM's saved state: the scratch register of its serial port."""
    monitor(host, f"o /b 0x3ff {value:#x}")


def get_memory(host: hvmgr.Host) -> str:
    """The byte of ``set_memory``."""
    return monitor(host, "i /b 0x3ff").strip()


def guest_reads(domain: Domain) -> list[str]:
    """What the running VM reads from each of its disks, through its own QEMU, in the words of ``content``."""
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        socket = f"{folder}/nbd"
        domain.monitor("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
        found = []
        for number, device in enumerate(domain.monitor("query-block")):
            name = f"disk{number}"
            if "inserted" in device:
                node = device["inserted"]["node-name"]
                domain.monitor("block-export-add", type="nbd", id=name, node_name=node, name=name)
                found.append(_words(f"nbd+unix:///{name}?socket={socket}", "raw"))
        domain.monitor("nbd-server-stop")
        return found


def describe(place: Place, host: hvmgr.Host) -> dict[str, object]:
    """All that can be seen of the VM, without ids and times."""
    # An empty folder is not known to be ours; the next creation takes it.
    homes = [path for path in sorted(place.homes.iterdir()) if any(path.iterdir())]
    folders = {path.name: _listing(path, {}) for path in homes}
    known = {vm.name: vm for vm in host.vms()}
    domains = {domain.name: str(domain.state()) for domain in host.connection.domains()}
    seen: dict[str, object] = {
        "domains": domains,
        "vms": sorted(known),
        "homes": sorted(folders),
        "outside": _outside(place),
        "libvirt snapshots": {one.name: libvirt_snapshots.names(one) for one in host.connection.domains()},
        "index": sorted((entry.name, _plain(place, str(entry.outside))) for entry in index.entries()),
    }
    if len(known) != 1:
        kept = sorted(place.homes.glob("*/Virtual Hard Disks/*"))
        ours = {vm.id for vm in known.values()}
        plain = {
            one.name: _renamed(one.xml(live=False), {}) if one.uuid in ours else _plain_domain(place, one)
            for one in host.connection.domains()
        }
        return {
            **seen,
            "plain": plain,
            "folders": folders,
            "kept": [[path.name, standing_alone(path)] for path in kept],
        }
    vm = next(iter(known.values()))
    forest = vm.tree()
    labels = _labels(vm, forest)
    seen["snapshots"] = {
        _renamed(one.name, {}): [one.notes, one.type, one.state, one.parent and labels[one.parent], _sizes(vm, one.id)]
        for one in vm.snapshots()
    }
    seen["present"] = [forest.present.parent and labels[forest.present.parent]]
    seen["state"] = vm.state()
    seen["reads"] = {slot: content(forest, path) for slot, path in sorted(forest.present.disks.items())}
    seen["frozen"] = {
        _renamed(one.name, {}): {slot: content(forest, path) for slot, path in one.disks.items()}
        for one in vm.snapshots()
    }
    save = host.connection.managed_save_path(vm.name)
    seen["managed save"] = _managed_save(save, labels) if save.exists() else None
    seen["memory"] = get_memory(host) if vm.state() in ("running", "paused") else None
    seen["images"] = {
        _label(labels, path): [
            image.parent and _label(labels, image.parent),
            image.format,
            image.size,
            image.keeper,
            oct(stat.S_IMODE(Path(path).stat().st_mode)),
            content(forest, path),
            checked(path, image.format),
            frozen.is_changed(vm.home.layout, Path(path)),
        ]
        for path, image in forest.images.items()
    }
    seen["files"] = _listing(vm.path, labels)
    xml = host.connection.find_domain(vm.id).xml(live=False)
    assert xml.encode() == vm.home.layout.configuration.read_bytes(), "home and libvirt differ"
    seen["xml"] = _renamed(xml, labels)
    seen["undo"] = _renamed(vm.home.layout.undo.read_text(), labels) if vm.can_undo() else None
    seen["snapshot xml"] = {
        _renamed(one.name, {}): _renamed(vm.home.layout.snapshot(one.id).read_text(), labels) for one in vm.snapshots()
    }
    return seen


def _plain_domain(place: Place, domain: Domain) -> list[object]:
    """A domain that is not hvmgr's: its XML, libvirt's snapshots of it, what its disks show, and its memory."""
    active = domain.is_active()
    xml = domain.xml(live=False)
    files = sorted(path for folder in (place.homes, place.outside) for path in folder.rglob("*") if path.is_file())
    hashes = [_hash(path) for path in files]
    disks = [
        _content(Path(disk.source), disk.format or "raw", ("plain", disk.source, *hashes))
        for disk in configuration.parse(xml, source=domain.name).disks()
        if disk.takes_part and disk.source
    ]
    save = domain.managed_save_xml() if domain.has_managed_save() else None
    live = "hvmgr:vm" in domain.xml(live=True)
    memory = str(domain.monitor("human-monitor-command", command_line="i /b 0x3ff")) if active else None
    snapshots = [one.xml for one in libvirt_snapshots.list_all(domain)]
    return [xml, live, snapshots, disks, save and "hvmgr:vm" in save, memory]


def _labels(vm: hvmgr.VM, forest: Tree) -> dict[str, str]:
    """A name that does not change from run to run for every id in the home."""
    labels = {vm.id: "VM"} | {one.id: f"snapshot {_renamed(one.name, {})}" for one in vm.snapshots()}
    slots: dict[str, list[str]] = {}
    for node in forest.nodes.values():
        for slot, path in node.disks.items():
            slots.setdefault(path, []).append(f"{labels[node.snapshot_id]} {slot}")
    for slot, path in forest.present.disks.items():
        slots.setdefault(path, []).append(f"now {slot}")
    for slot, path in ({} if forest.undo is None else forest.undo.disks).items():
        slots.setdefault(path, []).append(f"undo {slot}")
    below = forest.children()

    def label(path: str) -> str:
        own = sorted(slots.get(path, [])) or ["above " + " and ".join(sorted(map(label, below.get(path, []))))]
        return " ".join(own)

    for path in forest.images:
        if found := _UUID.findall(Path(path).name):
            labels[found[-1]] = f"[{label(path)}]"
    return labels


def _label(labels: dict[str, str], path: str) -> str:
    return _renamed(Path(path).name, labels)


def _renamed(text: str, labels: dict[str, str]) -> str:
    return _MOMENT.sub("MOMENT", _TIME.sub("TIME", _UUID.sub(lambda match: labels.get(match[0], "ID"), text)))


def _plain(place: Place, text: str) -> str:
    return _UUID.sub("ID", text).replace(str(place.folder), "")


def _listing(folder: Path, labels: dict[str, str]) -> list[str]:
    found = []
    for entry in [folder, *folder.rglob("*")]:
        if entry.parent.name == "contents" and entry.suffix == ".json":
            continue  # what a disk is known to hold; a kill in a merge may leave nobody knowing
        facts = entry.lstat()
        mode = oct(stat.S_IMODE(facts.st_mode))
        found.append(f"{_renamed(str(entry.relative_to(folder)), labels)} {mode}")
    return sorted(found)


def _outside(place: Place) -> list[str]:
    """Files beside the homes: name, mode, bytes; texts without ids and times. What a command keeps for itself is no part."""
    files = sorted(path for path in place.outside.rglob("*") if path.is_file()) if place.outside.is_dir() else []
    return sorted(
        f"{_plain(place, str(file))} {oct(file.stat().st_mode)} {_digest(file)}"
        for file in files
        if ".hvmgr" not in file.parts
    )


def _digest(file: Path) -> str:
    if file.suffix == ".save":
        state = saved_state.read(file)
        text, stream = _renamed(state.xml, {}), file.read_bytes()[state.data_offset :]
        return hashlib.sha256(text.encode() + stream).hexdigest()[:16]
    if file.suffix not in (".xml", ".json"):
        return _hash(file)
    return hashlib.sha256(_renamed(file.read_text(), {}).encode()).hexdigest()[:16]


def _sizes(vm: hvmgr.VM, snapshot_id: str) -> list[str]:
    """The files of a snapshot, and whether its memory is whole."""
    memory = vm.home.layout.memory(snapshot_id)
    if not memory.exists():
        return []
    state = saved_state.read(memory)
    return [f"complete {state.complete} running {state.was_running}"]


def _managed_save(save: Path, labels: dict[str, str]) -> list[str]:
    parsed = configuration.parse(saved_state.read(save).xml, source="the managed save")
    return sorted(_renamed(path, labels) for path in vm_home.disks_of(parsed).values())


# --- the bytes --------------------------------------------------------------------------------------------------------

_known: dict[tuple[str, ...], str] = {}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def content(forest: Tree, path: str) -> str:
    """What the guest reads from an image: each 64 KiB by its first byte when it is one byte all over."""
    chain = forest.chain(path)
    return _content(Path(path), chain[0].format, ("content", *(_hash(Path(image.path)) for image in chain)))


def standing_alone(path: Path) -> str:
    """What a guest would read from an image without parent."""
    info = subprocess.run(["qemu-img", "info", "-U", str(path)], check=True, capture_output=True, text=True, timeout=60)
    assert "backing file" not in info.stdout, info.stdout
    return _content(path, "qcow2", ("content", _hash(path)))


def _content(path: Path, fmt: str, key: tuple[str, ...]) -> str:
    if key not in _known:
        _known[key] = _words(str(path), fmt)
    return _known[key]


def _words(source: str, fmt: str) -> str:
    target = Path(f"/dev/shm/hvmgr-crash-{os.getpid()}")
    command = ["qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", source, str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    data = target.read_bytes()
    target.unlink()
    pieces = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    return " ".join(
        f"{piece[0]:x}" if len(set(piece)) == 1 else hashlib.sha256(piece).hexdigest()[:8] for piece in pieces
    )


def checked(path: str, fmt: str) -> str:
    """What qemu-img check says."""
    if fmt != "qcow2":
        return ""
    key = ("check", _hash(Path(path)))
    if key not in _known:
        command = ["qemu-img", "check", "-U", "-q", "-f", fmt, path]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        _known[key] = f"{done.returncode} {done.stdout}{done.stderr}".strip()
    return _known[key]


# --- one shape --------------------------------------------------------------------------------------------------------


class Run:
    """All kills of one shape."""

    def __init__(self, shape: Shape, place: Place) -> None:
        self.shape = shape
        self.place = place
        self.failures: list[str] = []
        self.outcomes: dict[str, int] = {}
        self.count = 0
        self._is_fresh = False

    def prepare(self) -> list[str]:
        """The state to start from, the two that may come out, and the names of the acts."""
        forked(self._setup)
        forked(self._reset)
        self.before = self._described()
        self.states = {"before": self.before}
        if self.shape.middle is not None:
            forked(self._middle)
            self.states["between"] = self._described()
            forked(self._reset)
        names, _, _ = forked(lambda: self._victim(None))
        self.after = self.states["after"] = self._described()
        self._is_fresh = False
        assert self.before != self.after, "the operation changes nothing that is looked at"
        assert isinstance(names, list)
        self.count = len(names)
        return names

    def kill_at(self, number: int, name: str) -> None:
        """One kill, and what came of it."""
        self._begin()
        _, status, session = forked(lambda: self._victim(number))
        # Whether the storage daemon removes its own socket before we clear its folder is a matter of luck.
        assert os.WIFSIGNALED(status) or number > self.count - 3, f"act {number} ({name}) was not reached"
        self._judge(f"killed before act {number}, {name}", session)

    def kill_after(self, delay_s: float) -> None:
        """One kill at some moment."""
        self._begin()
        _, _, session = forked(lambda: self._victim(None), kill_after_s=delay_s)
        self._judge(f"killed after {delay_s:.4f} s", session)

    def start_at(self, number: int, name: str) -> None:
        """One kill, and a start by libvirt alone: what the guest reads, and what becomes of what it writes."""
        self._begin()
        _, status, _ = forked(lambda: self._victim(number))
        assert os.WIFSIGNALED(status), f"act {number} ({name}) was not reached"
        try:
            reads, _, _ = forked(self._start)
            outcome = self._judge_start(reads)
        except AssertionError as error:
            self.failures.append(f"killed before act {number}, {name}, then started: {error}")
            return
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def _judge_start(self, reads: object) -> str:
        wanted = [state for state in self.states.values() if "reads" in state]
        if isinstance(reads, dict):
            assert any(reads == state["reads"] for state in wanted), f"the guest reads {reads}, not {wanted}"
        found = self._described()
        if isinstance(reads, dict) and "reads" in found:
            written = {
                slot: f"{text.rpartition(' ')[0]} ee" if slot == min(reads) else text for slot, text in reads.items()
            }
            assert found["reads"] == written, f"the present holds {found['reads']}, not {written}"
        if "frozen" in found:
            frozen = [{**state["frozen"]} for state in wanted]
            assert found["frozen"] in frozen, f"snapshots hold {found['frozen']}, not {frozen}"
        return "refused" if reads is None else "ran"

    def _begin(self) -> None:
        """The state before; where a kill left exactly that, the next one goes on from there."""
        if not self._is_fresh:
            forked(self._reset)
        self._is_fresh = False

    def _judge(self, what: str, session: int) -> None:
        stray = left_over(session)
        if stray:
            self.failures.append(f"{what}: left running: {stray}")
        try:
            found, notices = self._look()
        except AssertionError as error:
            self.failures.append(f"{what}: {error}")
            return
        outcome = next((name for name, state in self.states.items() if state == found), "neither")
        if outcome == "neither":
            self.failures.append(f"{what}: {self._difference(found)}; said {notices}")
        self._is_fresh = outcome == "before" and not self.shape.again and not self.shape.foreign
        if outcome == "before" and self.shape.again:
            forked(lambda: self._victim(None))
            if self._described() != self.after:
                self.failures.append(f"{what}: run again it ends in {self._difference(self._described())}")
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def _difference(self, found: dict[str, object]) -> str:
        """What is missing to the state that is nearest."""
        texts = []
        for title, state in self.states.items():
            parts = [_one_difference(key, state.get(key), found.get(key)) for key in sorted({*state, *found})]
            texts.append(f"nearest is {title}: " + "".join(part for part in parts if part))
        return min(texts, key=len)

    def _described(self) -> dict[str, object]:
        return self._look()[0]

    def _look(self) -> tuple[dict[str, object], list[str]]:
        answer, _, _ = forked(self._recover)
        assert isinstance(answer, dict)
        _known.update({tuple(key): value for key, value in answer["known"]})
        return answer["seen"], answer["notices"]

    # in children

    def _setup(self) -> None:
        shutil.rmtree(self.place.folder, ignore_errors=True)
        for folder in (self.place.folder, self.place.homes, self.place.outside):
            folder.mkdir(mode=0o711)
            folder.chmod(0o711)
        with opened(self.place) as host:
            remove_domains(host)
            self.shape.setup(host)
            self.place.copies.mkdir()
            for folder in (self.place.homes, self.place.index, self.place.outside):
                if folder.exists():
                    copy_tree(folder, self.place.copies / folder.name)
            texts = [(one.xml(live=False), _snapshots_of(one)) for one in host.connection.domains()]
            (self.place.copies / "domains.json").write_text(json.dumps(texts))

    def _reset(self) -> None:
        with opened(self.place) as host:
            remove_domains(host)
            for folder in (self.place.homes, self.place.index, self.place.outside):
                shutil.rmtree(folder, ignore_errors=True)
                if (self.place.copies / folder.name).exists():
                    copy_tree(self.place.copies / folder.name, folder)
            for text, snapshots in json.loads((self.place.copies / "domains.json").read_text()):
                domain = host.connection.define(text)
                for xml, is_current in snapshots:
                    libvirt_snapshots.redefine(domain, xml, current=is_current)
            if self.shape.live is not None:
                self.shape.live(host)

    def _middle(self) -> None:
        assert self.shape.middle is not None
        with opened(self.place) as host:
            self.shape.middle(host)

    def _victim(self, kill_at: int | None) -> list[str]:
        counter = Counter(kill_at)
        with opened(self.place) as host:
            host.connection.capabilities()
            counter.install()
            self.shape.act(host)
        return counter.names

    def _start(self) -> dict[str, str] | None:
        """What the VM reads that somebody started, who knows nothing of hvmgr; None when libvirt did not start it."""
        with opened(self.place) as host:
            for domain in host.connection.domains():
                if not domain.is_active():
                    try:
                        domain.start()
                    except errors.HvmgrError:
                        return None
                disks = vm_home.disks_of(configuration.parse(domain.xml(live=True), source="libvirt"))
                reads = dict(zip(sorted(disks), guest_reads(domain), strict=True))
                write_running(host, 0xEE, "960k", name=domain.name)
                domain.destroy()
                return reads
        return None

    def _recover(self) -> dict[str, object]:
        notices: list[str] = []
        with opened(self.place, notices) as host:
            open_before = any((home / ".hvmgr" / "journal").exists() for home in self.place.homes.iterdir())
            for vm in host.vms():
                with working.on(vm):  # what every changing command does first
                    pass
            assert notices or not open_before, "a command that found an open journal said nothing"
            seen = describe(self.place, host)
        return {"seen": json.loads(json.dumps(seen)), "notices": notices, "known": list(_known.items())}


def _one_difference(key: str, expected: object, found: object) -> str:
    if expected == found:
        return ""
    if isinstance(expected, dict) and isinstance(found, dict):
        parts = {one: (expected.get(one), found.get(one)) for one in {*expected, *found}}
        return "".join(_one_difference(f"{key}.{one}", a, b) for one, (a, b) in parts.items())
    if isinstance(expected, list) and isinstance(found, list):
        gone, new = [one for one in expected if one not in found], [one for one in found if one not in expected]
        return f"\n      {key}: missing {gone}, too much {new}"
    if isinstance(expected, str) and isinstance(found, str) and "\n" in expected:
        lines = difflib.unified_diff(expected.splitlines(), found.splitlines(), "expected", "found", "", "", 1, "")
        return f"\n      {key}: " + "\n        ".join(lines)
    return f"\n      {key}: {expected} -> {found}"


def _snapshots_of(domain: Domain) -> list[tuple[str, bool]]:
    """libvirt's own snapshots, as they are put back at each reset."""
    return [(one.xml, one.is_current) for one in libvirt_snapshots.list_all(domain)]


def copy_tree(source: Path, target: Path) -> None:
    """With owners, modes, times and holes."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True, timeout=60)


def remove_domains(host: hvmgr.Host) -> None:
    """libvirt knows no domain any more."""
    for domain in host.connection.domains():
        domain.destroy()
        host.connection.managed_save_path(domain.name).unlink(missing_ok=True)
        if host.connection.find_domain(domain.uuid) is not None:
            domain.undefine(keep_nvram=False, keep_tpm=False)


def specification(*sizes: int, **more: object) -> hvmgr.Specification:
    """A VM without an operating system."""
    disks = tuple(hvmgr.DiskSpecification(size=size) for size in sizes or (DISK,))
    options: dict[str, object] = {"template": "generation1", "accel": "tcg", "memory": 64 << 20, "networks": ()}
    return hvmgr.Specification(**{"name": NAME, "disks": disks, **options, **more})


def without_userfaultfd() -> None:
    """Memory is saved as where the kernel lets no QEMU save it in the background, whatever this host's kernel does.

    Not with HVMGR_CRASH_LIVE in the environment: both ways leave whole states, but not the same ones.
    """
    if "HVMGR_CRASH_LIVE" not in os.environ:
        background_snapshot.refusal = lambda _domain: "Background-snapshot is not supported by host kernel"


def main() -> int:
    """Runs one shape; what went wrong goes to stdout."""
    import shapes  # type: ignore[import-not-found]

    without_userfaultfd()
    name, *how = sys.argv[1:]
    folder = Path(os.environ["HVMGR_CRASH_FOLDER"]) / name
    run = Run(shapes.SHAPES[name], Place(folder))
    started = time.monotonic()
    names = run.prepare()
    if how[:1] == ["random"]:
        chance = random.Random(int(how[2]))
        forked(run._reset)
        middle = time.monotonic()
        forked(lambda: run._victim(None))
        length = time.monotonic() - middle
        moments = [chance.uniform(0, length) for _ in range(int(how[1]))]
        for moment in moments:
            run.kill_after(moment)
        done = len(moments)
    elif how[:1] == ["start"]:
        count = int(how[1]) or len(names)
        numbers = [1 + (2 * index + 1) * len(names) // (2 * count) for index in range(count)]
        for number in numbers:
            run.start_at(number, names[number - 1])
        done = len(numbers)
    else:
        stride, first = (int(how[0]) if how else 1), (int(how[1]) if len(how) > 1 else 1)
        numbers = range(first, len(names) + 1, stride)
        for number in numbers:
            run.kill_at(number, names[number - 1])
        done = len(numbers)
    forked(lambda: _clear(run.place))
    print(f"{name}: {len(names)} acts, {done} kills, {run.outcomes}, {time.monotonic() - started:.1f} s")
    for failure in run.failures:
        print(failure)
    return 1 if run.failures else 0


def _clear(place: Place) -> None:
    with opened(place) as host:
        remove_domains(host)
    shutil.rmtree(place.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
