"""``file restore --to running`` against an agent that fails, lies or goes silent: one that works on a folder of this host."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
from types import SimpleNamespace

import pytest

from hvmgr import errors
from hvmgr.host import guest_files, libvirt_door
from hvmgr.operations.inside import guest_scripts, returning
from hvmgr.operations.inside.sources import Gathered, Item
from hvmgr.storage.filesystems.reader import Type

USER = 4321


class Agent:
    """What a guest's agent does, on this host; ``faults`` are called before a command, or instead of it."""

    name = "web"

    def __init__(self):
        self.faults = {}
        self.ended, self.open = {}, {}

    def ask_agent(self, command, *, timeout_s, arguments=None):
        assert timeout_s <= 30
        arguments = arguments or {}
        if command in self.faults and (answer := self.faults[command](arguments)) is not None:
            return answer
        return getattr(self, "_" + command.replace("-", "_"))(
            **{key.replace("-", "_"): arguments[key] for key in arguments}
        )

    def _guest_exec(self, path, arg, capture_output):
        assert (path, capture_output) == ("sh", True)
        self.ended[len(self.ended) + 1] = subprocess.run([path, *arg], capture_output=True, timeout=60, check=False)
        return {"pid": len(self.ended)}

    def _guest_exec_status(self, pid):
        done = self.ended[pid]
        streams = {"out-data": done.stdout, "err-data": done.stderr}
        return {
            "exited": True,
            "exitcode": done.returncode,
            **{k: base64.b64encode(v).decode() for k, v in streams.items()},
        }

    def _guest_file_open(self, path, mode):
        try:
            file = open(path, mode + "b")  # noqa: SIM115 - kept open
        except OSError as error:
            raise errors.HostFailed(f"cannot ask: failed to open file '{path}': {error.strerror}") from error
        self.open[file.fileno()] = file
        return file.fileno()

    def _guest_file_write(self, handle, buf_b64):
        return {"count": self.open[handle].write(base64.b64decode(buf_b64)), "eof": False}

    def _guest_file_read(self, handle, count):
        data = self.open[handle].read(count)
        return {"count": len(data), "buf-b64": base64.b64encode(data).decode(), "eof": not data}

    def _guest_file_flush(self, handle):
        self.open[handle].flush()
        return {}

    def _guest_file_close(self, handle):
        self.open.pop(handle).close()
        return {}

    def before(self, script, do):
        """Called when this script is about to run."""
        self.faults["guest-exec"] = lambda arguments: do() if arguments["arg"][1] == script else None


class Bytes:
    def __init__(self, data):
        self.data = data

    def pieces(self, at_once):
        for at in range(0, len(self.data), at_once):
            yield self.data[at : at + at_once]


def silence():
    raise errors.HostFailed("no answer", libvirt_code=libvirt_door.library().VIR_ERR_AGENT_UNRESPONSIVE)


def file(name, data=b"new", **facts):
    return Item((name,), Type.FILE, len(data), 0o640, USER, USER, 10**18, source=Bytes(data), **facts)


@pytest.fixture
def agent(require):
    require(os.geteuid() == 0, "only root can give files away")
    return Agent()


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(returning.occasions, "operation", lambda *_: contextlib.nullcontext())
    interrupts = SimpleNamespace(check=lambda: None)
    made = SimpleNamespace(home=SimpleNamespace(name="web", vm_id="1"), new_id=lambda: "2", interrupts=interrupts)
    made.progress = lambda progress: made.interrupts.check()
    made.said = []
    made.say = made.said.append
    return made


@pytest.fixture
def put(agent, session):
    def put(folder, *items, overwrite=True, can_run=True):
        guest = guest_files.GuestFiles(agent, can_run=can_run, is_windows=False)
        browser = SimpleNamespace(volume=SimpleNamespace(title="vda"))
        return returning._put(
            session, guest, browser, Gathered(list(items), {}), os.fsencode(folder), overwrite=overwrite
        )

    return put


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "folder"
    made.mkdir()
    (made / "data").write_text("old")
    return made


def names(path):
    return sorted(one.relative_to(path).as_posix() for one in path.rglob("*"))


@pytest.mark.parametrize("answer", [(1, ""), (0, ""), (0, "sh: cannot fork\n")], ids=["failed", "nothing", "words"])
def test_a_look_that_fails_is_not_taken_for_nothing(agent, put, folder, monkeypatch, answer):
    monkeypatch.setattr(guest_scripts, "LOOK", f"printf '{answer[1]}'; exit {answer[0]}")
    with pytest.raises(errors.HostFailed, match="data cannot be looked at in the guest"):
        put(folder, file(b"data"), overwrite=False)
    agent.faults["guest-file-open"] = lambda _: agent._guest_file_open("/proc/1/mem/x", "r")
    with pytest.raises(errors.HostFailed, match=r"whether .*/data is there in the guest cannot be told: .*Not a dir"):
        put(folder, file(b"data"), overwrite=False, can_run=False)
    assert (folder / "data").read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_came_after_the_look_is_not_replaced(agent, put, folder, kind):
    made = Item((b"late",), Type.FOLDER if kind == "folder" else Type.LINK, 0, 0o755, 0, 0, 0, target=b"-x")
    made = file(b"late") if kind == "file" else made
    agent.before(guest_scripts.BEGIN, lambda: (folder / "late").write_text("mine") and None)
    with pytest.raises(errors.Conflict, match=r"late cannot be made .* is there by now; .* is what it was$"):
        put(folder, made, overwrite=False)
    assert ((folder / "late").read_text(), names(folder)) == ("mine", ["data", "late"])
    (folder / "late").unlink()
    agent.faults.clear()
    assert put(folder, made, overwrite=False).files == 1
    assert names(folder) == ["data", "late"]
    assert {"file": os.path.isfile, "folder": os.path.isdir, "link": os.path.islink}[kind](folder / "late")


def test_a_user_of_the_guest_gains_nothing_by_his_folder(agent, put, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "data").write_text("root's")
    os.chown(folder, USER, USER)
    opened = []
    agent.faults["guest-file-open"] = lambda asked: opened.append(asked["path"])
    assert put(folder, file(b"data")).replaced == 1
    (path,) = opened
    assert path.startswith(f"{tmp_path}/.hvmgr-")
    facts = (folder / "data").stat()
    assert (facts.st_uid, facts.st_mode & 0o7777, int(facts.st_mtime), (folder / "data").read_text()) == (
        USER,
        0o640,
        10**9,
        "new",
    )

    def swap():
        folder.rename(tmp_path / "away")
        folder.symlink_to(secret)

    agent.before(guest_scripts.FILE, swap)
    with pytest.raises(errors.Conflict, match=r"leads through a link to .*/secret.* is what it was$"):
        put(folder, file(b"data", b"evil"))
    agent.faults.clear()
    with pytest.raises(errors.Conflict, match=r"leads through a link to .*/secret: name that; .*/data is what it was"):
        put(folder, file(b"data", b"evil"))
    (tmp_path / "away" / "data").unlink()
    (tmp_path / "away" / "data").symlink_to(secret / "data")
    put(tmp_path / "away", file(b"data", b"mine"))  # the link goes, not what it leads to
    assert ((secret / "data").read_text(), (secret / "data").stat().st_uid) == ("root's", 0)
    assert (tmp_path / "away" / "data").read_text() == "mine"
    assert names(tmp_path) == ["away", "away/data", "folder", "secret", "secret/data"]


def test_whatever_names_there_are(put, folder):
    inner = folder / "a\nb '\u200b*"
    inner.mkdir()
    os.chown(inner, USER, USER)
    put(inner, file(b"-n\n"), Item((b"-l",), Type.LINK, 0, 0o777, 0, 0, 0, target=b"-t"))
    put(f"/{folder}//./", file(b"data", b"other"), overwrite=True)
    assert sorted(os.listdir(inner)) == ["-l", "-n\n"]
    assert (inner / "-l").readlink().name == "-t"
    assert (folder / "data").read_text() == "other"


def test_without_a_folder_of_roots_it_is_refused(put, folder, monkeypatch):
    monkeypatch.setattr(guest_scripts, "BEGIN", "stat() { echo 1000 755; }\n" + guest_scripts.BEGIN)
    with pytest.raises(
        errors.Conflict, match=r"no folder above it on its file system is root's alone; .*/data is what it was"
    ):
        put(folder, file(b"data"))
    assert (folder / "data").read_text() == "old"


def test_silence_while_a_file_is_moved_is_asked_about_once_more(agent, put, folder):
    silent = []

    def status(asked):
        if len(silent) == 0 and "mv -fT" in str(agent.ended[asked["pid"]].args):
            silent.append(asked)
            silence()

    agent.faults["guest-exec-status"] = status
    assert put(folder, file(b"data")).replaced == 1
    assert ((folder / "data").read_text(), names(folder), len(silent)) == ("new", ["data"], 1)


def test_silence_for_good_while_a_file_is_moved_is_an_outcome_unknown(agent, put, folder):
    agent.before(guest_scripts.FILE, lambda: agent.faults.update({"guest-exec-status": lambda _: silence()}))
    with pytest.raises(errors.OutcomeUnknown, match=r"/data holds its old content or the new one, whole") as failure:
        put(folder, file(b"data"))
    assert "is what it was" not in failure.value.message
    assert (folder / "data").read_text() == "new"


def test_an_interrupt_says_how_many_files_are_there(session, agent, put, folder):
    def stop():
        if agent.open and (folder / "one").exists():
            raise errors.Cancelled("stopped; nothing was changed")

    session.interrupts.check = stop
    with pytest.raises(errors.Cancelled, match=r"^stopped; 1 of 3 files are in the guest; \S+/two is what it was$"):
        put(folder, file(b"one"), file(b"two"), file(b"three"))
    assert names(folder) == ["data", "one"]


def test_a_lying_agent_holds_nobody_up(agent, put, folder, session, monkeypatch):
    guest = guest_files.GuestFiles(agent, can_run=True, is_windows=False)
    endless = {"buf-b64": base64.b64encode(bytes(1000)).decode(), "eof": False, "count": 1000}
    agent.faults["guest-file-read"] = lambda _: endless
    guest.digest(str(folder / "data"), 3)
    for code in (None, "x", [1], True):
        agent.faults["guest-exec-status"] = lambda _, code=code: {"exited": True, "exitcode": code}
        assert guest.run("true").code == 255
    agent.faults["guest-exec-status"] = lambda _: {"exited": False}

    def stop():
        raise errors.Cancelled("stopped; nothing was changed")

    with pytest.raises(errors.Cancelled):
        guest.run(guest_scripts.HASH, "x", limit_s=600, waiting=stop)
    with pytest.raises(errors.Cancelled):
        guest.digest(str(folder / "data"), 3, stop)
    monkeypatch.setattr(guest_files, "_SCRIPT_S", 0)
    agent.faults["guest-file-read"] = lambda _: {**endless, "buf-b64": "AA=="}
    with pytest.raises(errors.HostFailed, match="takes longer than"):
        guest.digest(str(folder / "data"), 1)


def test_attributes_that_no_agent_sets_are_counted(put, folder):
    done = put(folder, file(b"data", extras={"user.note": b"x"}), file(b"b", extras={"security.selinux": b"etc_t"}))
    assert done.left_out == {"extended attributes and ACLs": 1}
