"""What else may befall an operation: a full disk, a dead daemon, another command, a signal, somebody's start.

Run as ``crash.py`` is: ``python faults.py CASE``. Each case asserts, and says nothing when all is well.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash
import shapes
from crash import NAME, Place, forked, opened

from hvmgr import errors
from hvmgr.host import pids, qmp, storage_daemon
from hvmgr.model import plan
from hvmgr.operations import working
from hvmgr.operations.steps import execution
from tests import full_disk

FOLDER = Path(os.environ["HVMGR_CRASH_FOLDER"])


class Case(crash.Run):
    """A shape whose operation is disturbed instead of killed."""

    def __init__(self, name: str, *, place: Path | None = None) -> None:
        super().__init__(shapes.SHAPES[name], Place(place or FOLDER / f"fault-{name}"))
        self.prepare()
        forked(self._reset)

    def attempt(self, disturb) -> dict:
        """The operation in a child that ``disturb`` has prepared: what it raised, and whether a journal stayed."""

        def act():
            notices: list[str] = []
            with opened(self.place, notices) as host:
                host.connection.capabilities()
                error = None
                with contextlib.ExitStack() as stack:
                    disturb(host, stack)
                    try:
                        self.shape.act(host)
                    except errors.HvmgrError as caught:
                        error = caught
                homes = list(self.place.homes.iterdir())
                return {
                    "error": None if error is None else error.code,
                    "exit": 0 if error is None else error.exit_code,
                    "message": str(error),
                    "open": any((home / ".hvmgr/journal").exists() for home in homes),
                    "notices": notices,
                }

        answer, status, session = forked(act)
        stray = crash.left_over(session)
        assert not stray, stray
        return {**(answer or {}), "status": status}

    def outcome(self) -> str:
        """Which whole state this is; AssertionError when it is none."""
        found = self._described()
        for name, state in reversed(
            self.states.items()
        ):  # where the host saves no memory in the background, two are alike
            if state == found:
                return name
        raise AssertionError(self._difference(found))

    def require(self, answer: dict, error: str | None, outcome: str) -> None:
        assert answer["error"] == error, answer
        assert answer["error"] == "OutcomeUnknown" or not answer["open"], answer
        assert self.outcome() == outcome, answer


@contextlib.contextmanager
def replaced(owner, name, value):
    """An attribute has another value."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield original
    finally:
        setattr(owner, name, original)


# --- a full disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_file_system(megabytes: int):
    """A loop-mounted ext4 that QEMU's user can enter."""
    folder = FOLDER / "small"
    folder.mkdir(exist_ok=True)
    with full_disk.mounted("ext4", FOLDER / "small.img", folder, "-O", "^has_journal", megabytes=megabytes):
        yield folder


def fill(folder: Path, leave: int) -> None:
    """All but ``leave`` bytes of a file system are taken."""
    with (folder / "ballast").open("wb") as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
                file.flush()
        file.truncate(max(0, file.tell() // 4096 * 4096 - leave))
        os.fsync(file.fileno())


def no_space(name: str, leave: int, *, megabytes: int, outcome: str, check_off: bool = False) -> None:
    """The operation meets a full disk, and leaves a whole state."""
    with small_file_system(megabytes) as folder:
        case = Case(name, place=folder / "place")

        def disturb(host, stack):
            if check_off:  # the space went after the plan was made
                from hvmgr.operations import merge

                stack.enter_context(replaced(merge, "_require_space", lambda *_: None))
            fill(folder, leave)

        answer = case.attempt(disturb)
        (folder / "ballast").unlink()
        assert answer["exit"] == 7, answer
        case.require(answer, "NoSpace", outcome)
        forked(lambda: crash._clear(case.place))


def no_space_create():
    no_space("create-off", 0, megabytes=24, outcome="before")


def no_space_memory():
    no_space("running-create", 1 << 20, megabytes=64, outcome="before")


def no_space_put_away():
    no_space("running-apply", 1 << 20, megabytes=64, outcome="before")


def no_space_convert():
    """The space went after the plan was made."""
    from hvmgr.operations.exchange import compare_place

    with small_file_system(24) as folder:
        case = Case("convert", place=folder / "place")

        def disturb(host, stack):
            stack.enter_context(replaced(compare_place, "space_finding", lambda *_: iter(())))
            fill(folder, 128 << 10)

        answer = case.attempt(disturb)
        (folder / "ballast").unlink()
        case.require(answer, "NoSpace", "before")
        forked(lambda: crash._clear(case.place))


def no_space_merge_up():
    no_space_merge("big-delete-up")


def no_space_merge_down():
    no_space_merge("big-delete-down")


def no_space_merge(name: str) -> None:
    """A merge that cannot go on waits: the snapshot is gone, every byte is there, and it goes on with space."""
    with small_file_system(64) as folder:
        case = Case(name, place=folder / "place")

        def disturb(host, stack):
            from hvmgr.operations import merge

            stack.enter_context(replaced(merge, "_require_space", lambda *_: None))
            fill(folder, 1 << 20)

        answer = case.attempt(disturb)
        assert (answer["error"], answer["exit"], answer["open"]) == ("NoSpace", 7, False), answer
        (folder / "ballast").unlink()
        pending, contents = forked(lambda: looked_at(case))[0]
        assert pending, "no merge is waiting"
        assert contents == contents_of(case.before, "two"), (contents, case.before["images"])
        forked(lambda: merged(case))
        # QEMU 7.2 leaks a cluster when a stream goes on in an image in which one broke: it costs space, nothing else.
        found = case._described()
        assert without_leaks(found) == without_leaks(case.after), case._difference(found)
        forked(lambda: crash._clear(case.place))


def without_leaks(state):
    images = {
        key: [
            re.sub(r"^3 (Leaked cluster [^\n]*\n?)*$", "0", part) if isinstance(part, str) else part for part in image
        ]
        for key, image in state["images"].items()
    }
    return {**state, "images": images}


def looked_at(case):
    """The pending merges, and what the guest would see of each named disk."""
    from hvmgr.model import tree

    with opened(case.place) as host:
        seen = crash.describe(case.place, host)
        return [len(tree.pending(host.vm(NAME).tree())), contents_of(seen, "two")]


def contents_of(state, gone):
    """Label to bytes of each image that something but the snapshot ``gone`` names."""
    return {
        key.replace(f"snapshot {gone} hda", "").strip(): image[5]
        for key, image in state["images"].items()
        if f"[snapshot {gone} hda]" not in key and "above" not in key
    }


def merged(case):
    with opened(case.place) as host:
        return host.vm(NAME).merge()


def read_only_home():
    """Nothing was changed, and the message says why."""
    case = Case("create-off")
    home = case.place.homes
    subprocess.run(["mount", "--bind", str(home), str(home)], check=True, timeout=60)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(home)], check=True, timeout=60)
    try:
        answer = case.attempt(lambda host, stack: None)
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True, timeout=60)
    assert "read-only" in answer["message"], answer
    case.require(answer, "HostFailed", "before")


# --- a daemon or a QEMU that dies -------------------------------------------------------------------------------------


def daemon_dies():
    """The storage daemon is killed before each of its commands in turn."""
    case = Case("delete-middle")
    for number in range(1, 60):
        forked(case._reset)
        commands = []

        def disturb(host, stack, number=number, commands=commands):
            original = qmp.Session.execute

            def execute(session, command, *args, **kwargs):
                if not command.startswith("query-"):
                    commands.append(command)
                    if len(commands) == number:
                        kill_daemon(case.place)
                return original(session, command, *args, **kwargs)

            stack.enter_context(replaced(qmp.Session, "execute", execute))

        answer = case.attempt(disturb)
        if answer["error"] is None:
            assert case.outcome() == "after"
            assert number > 5
            return
        outcome = case.outcome()
        assert outcome in ("before", "after"), answer
    raise AssertionError("the daemon has more commands than expected")


def kill_daemon(place: Path) -> None:
    for note in place.homes.glob("*/.hvmgr/daemon"):
        pid = int(note.read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while pids.start_time(pid) is not None and time.monotonic() < deadline:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.005)


def qemu_dies():
    """The VM's QEMU is killed before each step of a snapshot of the running VM: its disks are whole in any case."""
    case = Case("running-create")
    for kind in (plan.CreateImage, plan.MakeSnapshotFolder, plan.SwitchDisks, plan.Define, plan.WriteSnapshot):
        forked(case._reset)

        def disturb(host, stack, kind=kind):
            act = execution.DO[kind]

            def dying(session, step):
                kill_qemu(host)
                act(session, step)

            stack.enter_context(patched_step(kind, dying))

        answer = case.attempt(disturb)
        found = case._described()
        names = sorted(found["snapshots"])
        assert found["state"] == "off", (kind, answer)
        expected = case.after if "new" in names else case.before
        # What was in QEMU's memory is gone; every byte on the disks is there.
        assert contents(found) == contents(expected), (kind, answer, contents(found), contents(expected))
        assert found["files"] == expected["files"], (kind, sorted({*found["files"]} ^ {*expected["files"]}))


def contents(state):
    return {key: image[5] for key, image in state["images"].items()}


def kill_qemu(host) -> None:
    uuid = host.vm(NAME).id
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if b"qemu-system" in line and uuid.encode() in line:
                    os.kill(int(entry.name), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while host.connection.find_domain(uuid).is_active() and time.monotonic() < deadline:
        time.sleep(0.01)


@contextlib.contextmanager
def patched_step(kind, act):
    """A step is done in another way."""
    original = dict(execution.DO)
    with replaced(execution, "DO", {**original, kind: act}):
        yield


# --- somebody starts the VM -------------------------------------------------------------------------------------------


def started_between_steps(*names: str):
    """Another client of libvirt starts the VM before each step: the start fails, or the operation refuses or waits."""
    for name in names:
        case = Case(name)
        kinds, number, seen = [], 0, 0
        while number == 0 or number <= seen:
            number += 1
            forked(case._reset)
            marks = case.place.folder / "steps"

            def disturb(host, stack, number=number, marks=marks):
                done = []
                steps = {kind: starting(kind, act, host, done, number, marks) for kind, act in execution.DO.items()}
                stack.enter_context(replaced(execution, "DO", steps))

            answer = case.attempt(disturb)
            text = marks.read_text().split()
            seen, started = int(text[0]), text[1] == "True"
            what = f"{name}, started before step {number} ({text[2]}): {started}, {answer}"
            try:
                judge_start(case, answer, started)
            except AssertionError as error:
                kinds.append(f"{what}: {error}")
        assert not kinds, "\n".join(kinds)


def starting(kind, act, host, done, number, marks):
    def run(session, step):
        done.append(kind.__name__)
        if len(done) == number:
            started = True
            try:
                host.connection.find_domain_by_name(NAME).start()
            except (errors.HvmgrError, AttributeError):
                started = False
            marks.write_text(f"{len(done)} {started} {kind.__name__}")
            run.text = marks.read_text()
        elif marks.exists() and len(done) > number:
            first = marks.read_text().split()
            marks.write_text(f"{len(done)} {first[1]} {first[2]}")
        else:
            marks.write_text(f"{len(done)} False -")
        act(session, step)

    return run


def judge_start(case, answer, started) -> None:
    """A VM that runs writes only to working images; the bytes of everything are those of before or after."""
    found = forked(lambda: stopped_and_seen(case, started))[0]
    wanted = [contents(state) for state in case.states.values() if "images" in state]
    if found["vms"]:
        named = {key: value for key, value in contents(found).items() if "above" not in key}
        assert any(named.items() <= state.items() or state.items() <= named.items() for state in wanted), (
            named,
            wanted,
        )
        assert found["intact"], found
    else:
        assert found["kept"] == case.after.get("kept") or case.after.get("vms") == [], found


def stopped_and_seen(case, started):
    with opened(case.place) as host:
        vms = host.vms()
        intact = True
        for vm in vms:
            if vm.state() == "running":
                # The guest may write: nothing that is frozen may see it.
                crash.write_running(host, 0xEE, "960k")
                domain = host.connection.find_domain(vm.id)
                frozen = {path for one in vm.snapshots() for path in one.disks.values()}
                intact = not frozen & {str(path) for path in domain.writable_files()}
                vm.stop(force=True)
            with working.on(vm):
                pass
            vm.merge()
        seen = crash.describe(case.place, host)
        if "images" in seen:
            for image in seen["images"].values():
                image[5] = re.sub(r"ee$", "0", image[5])
        return {**seen, "intact": intact}


# --- two commands -----------------------------------------------------------------------------------------------------


def second_command():
    """A second command waits for the first, or says Busy; the lock of a dead one is free."""
    case = Case("create-off")
    home = next(case.place.homes.iterdir())
    reader, writer = os.pipe()
    first = os.fork()
    if first == 0:
        with opened(case.place) as host, working.on(host.vm(NAME)):
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(1)
    os.read(reader, 1)

    def hasty():
        with opened(case.place) as host:
            host.wait_s = 0.1
            try:
                host.vm(NAME).create_snapshot("hasty")
            except errors.Busy as error:
                return str(error)
        return None

    message, _, _ = forked(hasty)
    assert message is not None
    assert str(first) in message, message
    assert forked(lambda: read_only_look(case))[0] == [], "reading needs no lock"
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    case.require(case.attempt(lambda host, stack: None), None, "after")
    assert home.exists()


def read_only_look(case):
    with opened(case.place) as host:
        return [one.name for one in host.vm(NAME).snapshots()]


def waiting_command():
    """Two commands at once: both are done, one after the other."""
    case = Case("create-off")

    def one(name):
        with opened(case.place) as host:
            host.vm(NAME).create_snapshot(name)

    pids = []
    for name in ("a", "b", "c"):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                one(name)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert sorted(forked(lambda: read_only_look(case))[0]) == ["a", "b", "c"]


# --- signals ----------------------------------------------------------------------------------------------------------


def stopped_while_preparing():
    """SIGINT and SIGTERM before the switch: Cancelled, nothing left."""
    for name in ("create-off", "apply-off", "vm-create-copy", "running-create"):
        case = Case(name)
        for kind in (plan.CreateImage, plan.FreezeImage, plan.CopyImage, plan.MakeSnapshotFolder):
            for number in (signal.SIGINT, signal.SIGTERM)[: 2 if name == "create-off" else 1]:  # one handler has both
                forked(case._reset)
                answer = stopped(case, kind, number)
                if answer["error"] is None:
                    assert case.outcome() == "after", (name, kind)
                    break  # the operation has no such step
                assert answer["exit"] == 130, answer
                case.require(answer, "Cancelled", "after" if "complete already" in answer["message"] else "before")


def stopped(case, kind, number):
    """The answer to an operation that gets a signal in the middle of its first step of a kind."""
    return case.attempt(lambda host, stack: stack.enter_context(signalled(kind, number)))


@contextlib.contextmanager
def signalled(kind, number):
    """The process gets a signal in the middle of a step."""
    act = execution.DO[kind]

    def run(session, step):
        os.kill(os.getpid(), number)
        act(session, step)

    with patched_step(kind, run):
        yield


def stopped_while_finishing():
    """After the switch a stop comes too late: the operation comes through, and says both with the exit code of a stop."""
    for name in ("create-off", "apply-undo-full", "rename", "vm-delete"):
        case = Case(name)
        kind = plan.RemoveHome if name == "vm-delete" else plan.WritePresent
        for number in (signal.SIGINT, signal.SIGTERM):
            forked(case._reset)
            answer = stopped(case, kind, number)
            assert answer["exit"] == 130, answer
            case.require(answer, "Cancelled", "after")


def stopped_while_merging():
    """A merge that is stopped waits, and nothing is lost."""
    for name in ("delete-middle", "delete-two-disks"):
        case = Case(name)
        for kind in (plan.MergeDown, plan.MergeUp, plan.RemoveSnapshot):
            for number in (signal.SIGINT, signal.SIGTERM)[: 2 if name == "create-off" else 1]:  # one handler has both
                forked(case._reset)
                answer = stopped(case, kind, number)
                assert not answer["open"], answer
                if answer["error"] is None:
                    assert case.outcome() == "after", answer
                    break  # the operation has no such step
                assert answer["exit"] == 130, answer
                if "complete already" in answer["message"]:
                    assert case.outcome() == "after", answer
                    continue
                pending, seen = forked(lambda: looked_at(case))[0]
                assert pending, answer
                assert seen == contents_of(case.before, "two") or name == "delete-two-disks", seen
                forked(lambda: merged(case))
                assert case.outcome() == "after", answer


# --- what a power cut takes -------------------------------------------------------------------------------------------


def synced_in_order():
    """Before a file is renamed its bytes are synced, after it the folder; a merged image before the next step."""
    for name in ("create-off", "apply-undo-full", "delete-two-disks", "merge-pending", "vm-create-copy", "vm-delete"):
        case = Case(name)

        def disturb(host, stack):
            watch = Watch(case.place.homes)
            watch.install(stack)
            stack.callback(watch.judge)

        answer = case.attempt(disturb)
        case.require(answer, None, "after")


def name_of(descriptor: int) -> str:
    """The file behind a descriptor."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


class Watch:
    """What is written, synced and renamed below a folder, in its order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dirty: dict[tuple[int, int], str] = {}  # written and not synced: identity, name
        self.stale: dict[str, str] = {}  # folders with entries that are not synced
        self.wrong: list[str] = []

    def install(self, stack) -> None:
        for name in ("write", "pwrite", "copy_file_range", "ftruncate"):
            stack.enter_context(replaced(os, name, self._writing(getattr(os, name), name)))
        stack.enter_context(replaced(os, "fsync", self._syncing(os.fsync)))
        for name in ("rename", "unlink", "rmdir", "mkdir"):
            stack.enter_context(replaced(os, name, self._changing(getattr(os, name), name)))
        for name in ("stream", "commit", "create_qcow2"):
            stack.enter_context(replaced(storage_daemon.Daemon, name, self._imaging(name)))
        steps = {kind: self._step(kind, act) for kind, act in execution.DO.items()}
        stack.enter_context(replaced(execution, "DO", steps))

    def judge(self) -> None:
        self._next("the end")
        assert not self.wrong, "\n".join(self.wrong)

    def _next(self, what: str) -> None:
        for name in self.dirty.values():
            self.wrong.append(f"{name} is not synced before {what}")
        for folder, why in self.stale.items():
            if Path(folder).is_dir():
                self.wrong.append(f"{folder} is not synced before {what}: {why}")
        self.dirty.clear()
        self.stale.clear()

    def _step(self, kind, act):
        def run(session, step):
            self._next(f"step {kind.__name__}")
            act(session, step)

        return run

    def _imaging(self, name):
        original = getattr(storage_daemon.Daemon, name)

        def run(daemon, first, *args, **kwargs):
            original(daemon, first, *args, **kwargs)
            node = first if name == "stream" else args[0] if name == "commit" else None
            path = Path(first) if node is None else node.path
            facts = path.stat()
            self.dirty[facts.st_dev, facts.st_ino] = str(path)
            if name == "create_qcow2":
                self.stale[str(path.parent)] = f"made {path.name}"

        return run

    def _writing(self, original, name):
        def run(*args, **kwargs):
            descriptor = args[1] if name == "copy_file_range" else args[0]
            path = name_of(descriptor)
            # The lock's content is for people, and nothing follows from it.
            if path.startswith(str(self.root)) and not path.endswith("/lock"):
                facts = os.fstat(descriptor)
                self.dirty[facts.st_dev, facts.st_ino] = path
            return original(*args, **kwargs)

        return run

    def _syncing(self, original):
        def run(descriptor):
            original(descriptor)
            facts = os.fstat(descriptor)
            self.dirty.pop((facts.st_dev, facts.st_ino), None)
            self.stale.pop(name_of(descriptor), None)

        return run

    def _changing(self, original, name):
        def run(*args, **kwargs):
            paths = [os.fspath(arg) for arg in args[: 2 if name == "rename" else 1]]
            inside = kwargs.get("dir_fd") is not None or not str(paths[0]).startswith(str(self.root))
            if name == "rename" and not inside:
                facts = os.lstat(paths[0])
                if (facts.st_dev, facts.st_ino) in self.dirty:
                    self.wrong.append(f"{paths[0]} is renamed before it is synced")
            original(*args, **kwargs)
            for path in paths if not inside else ():
                self.stale[str(Path(path).parent)] = f"{name} {Path(path).name}"

        return run


CASES = {
    one.__name__: one
    for one in (
        no_space_create, no_space_memory, no_space_put_away, no_space_merge_up, no_space_merge_down, read_only_home,
        no_space_convert, daemon_dies, qemu_dies, started_between_steps, second_command, waiting_command, stopped_while_preparing,
        stopped_while_finishing, stopped_while_merging, synced_in_order,
    )
}  # fmt: skip


def main():
    crash.without_userfaultfd()
    case, *arguments = sys.argv[1:]
    CASES[case](*arguments)


if __name__ == "__main__":
    main()
