"""The door itself: what becomes of errors, defects, signals and broken pipes, and what a command has to load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from hvmgr import errors
from hvmgr.faces import cli
from hvmgr.faces.cli import version, words
from hvmgr.operations.host import Host
from tests.told import text as without_the_hosts_line

ROOT = Path(__file__).resolve().parents[3]


def spawn(*arguments, **more):
    """The command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "0", **more.pop("env", {})}
    command = [sys.executable, "-m", "hvmgr", *map(str, arguments)]
    return subprocess.run(command, env=environment, text=True, timeout=60, check=False, **more)


def failing(monkeypatch, error):
    """``hvmgr version`` raises."""

    def fail(_request):
        raise error

    monkeypatch.setattr(version.command, "callback", lambda: fail(None))


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.HvmgrError)]
)
def test_each_error_ends_with_its_exit_code(kind, hvmgr, monkeypatch):
    failing(monkeypatch, kind("it failed", hint="do that", file="x"))
    answer = hvmgr("version")
    assert (answer.code, answer.out, answer.err) == (kind.exit_code, "", "hvmgr: it failed\n  do that\n")
    document = hvmgr("version", "--json").json
    facts = {"code": kind.__name__, "message": "it failed", "hint": "do that", "facts": {"file": "x"}}
    assert document == {"schema": 1, "error": facts}


def test_defect_is_one_line_and_with_v_a_traceback(hvmgr, monkeypatch):
    failing(monkeypatch, KeyError("slot"))
    answer = hvmgr("version")
    assert answer.code == 1
    assert answer.err.splitlines() == [
        "hvmgr: a defect in hvmgr: KeyError: 'slot'",
        "  run it again with -v and report what that prints",
    ]
    assert "Traceback" in hvmgr("version", "-v").err
    assert hvmgr("version", "--json").json["error"]["code"] == "Defect"


def test_interrupt_ends_with_130(hvmgr, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert hvmgr("version").code == 130


@pytest.mark.parametrize(
    "when",
    ["raise KeyboardInterrupt", "Last(); [time.sleep(0.01) for _ in range(5000)]"],
    ids=["loading", "in-a-destructor"],
)
def test_interrupt_at_any_moment_ends_with_130(when):
    program = f"""import time
from hvmgr import __main__
from hvmgr.faces import cli
class Last:
    def __del__(self):
        raise KeyboardInterrupt
def run(_):
    {when}
cli.run = run
__main__.main()"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "hvmgr: stopped\n")


_LATE = """
import os, signal, sys
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT):
        kill(pid, number)
sys.modules["libvirt"], sys.argv = sys, ["hvmgr", "--version"]
sys.late = Late()
from hvmgr.__main__ import main
main()
"""


def test_interrupt_when_all_is_done_changes_no_exit_code():
    """Where libvirt is loaded Python's own end takes a moment, in which nobody hears Ctrl-C."""
    done = subprocess.run([sys.executable, "-c", _LATE], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_systems_no_is_no_defect(hvmgr, monkeypatch):
    failing(monkeypatch, PermissionError(13, "Permission denied", "/root/x"))
    answer = hvmgr("version")
    assert (answer.code, answer.err) == (
        8,
        "hvmgr: no permission for /root/x\n  run as root, or give your user access to it\n",
    )


def test_json_as_the_text_of_an_argument_is_no_wish(hvmgr):
    assert hvmgr("vm", "show", "--", "--json").out == ""


def test_messages_never_hold_control_characters(hvmgr, root):
    answer = hvmgr("vm", "show", "a\x1b[31mb")
    assert answer.code == 3
    assert "\x1b" not in answer.err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_who_leaves_is_no_error(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = spawn("--help", env={"PYTHONUNBUFFERED": unbuffered}, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_disk_below_stdout_is_said(unbuffered):
    with Path("/dev/full").open("w") as full:
        done = spawn("config", "show", env={"PYTHONUNBUFFERED": unbuffered}, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (8, "hvmgr: cannot write the output: No space left on device\n")


@pytest.mark.parametrize(
    ("closed", "command", "code", "said"),
    [
        ("<&-", "user add anna --users users.json", 8, "hvmgr: stdin cannot be read: Bad file descriptor\n"),
        (">&-", "config show", 8, "hvmgr: cannot write the output: Bad file descriptor\n"),
        (">&-", "--version", 8, "hvmgr: cannot write the output: Bad file descriptor\n"),
        ("2>&-", "vm show nobody", 3, ""),
    ],
)
def test_closed_descriptor_is_said_where_it_is_needed(closed, command, code, said, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = ["sh", "-c", f"exec {sys.executable} -m hvmgr {command} {closed}"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_bytes_that_are_no_text_are_said(tmp_path):
    line = [sys.executable, "-m", "hvmgr", "user", "add", "anna", "--users", "users.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, input=b"\xff\n", capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (2, b"hvmgr: what comes from stdin is no text in UTF-8\n")


def test_one_command_after_the_other_in_processes_of_their_own(root, new_embed_root):
    environment = {"LIBVIRT_DEFAULT_URI": f"qemu:///embed?root={new_embed_root()}"}
    lines = [
        ["vm", "create", "web", "--disk", "8M", "--memory", "64M", "--network", "none", "--accel", "tcg"],
        ["vm", "start", "web"],
        ["snapshot", "create", "web", "running"],
        ["vm", "stop", "web", "--force"],
        ["snapshot", "apply", "web", "running"],
        ["vm", "list"],
        ["vm", "stop", "web", "--force"],
        ["snapshot", "tree", "web"],
        ["vm", "delete", "web", "--with-disks", "--yes"],
    ]
    told = {}
    for line in lines:
        done = spawn(*line, env=environment, capture_output=True)
        assert (done.returncode, without_the_hosts_line(done.stderr)) == (0, ""), (line, done)
        told[" ".join(line[:2])] = done.stdout
    assert told["vm list"].split("\t")[:2] == ["web", "running"]
    assert "(undo slot)" in told["snapshot tree"]


def test_names_are_told_in_any_locale():
    done = spawn("vm", "show", "wäb", env={"LC_ALL": "C", "PYTHONUTF8": "0"}, capture_output=True)
    assert (done.returncode, done.stdout) == (3, "")


# The command line, which says when it sleeps.
TELLING = """import sys, time
sleep = time.sleep
time.sleep = lambda seconds: (print("waits", flush=True), sleep(seconds))
from hvmgr.__main__ import main
sys.exit(main())"""


def test_interrupt_of_a_wait_ends_at_once(hvmgr, vm, root):
    with (
        Host.open().vm(vm).home.locked(wait_s=1),
        subprocess.Popen(
            [sys.executable, "-c", TELLING, "snapshot", "create", vm, "--wait", "300"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as waiting,
    ):
        assert waiting.stdout.readline() == "waits\n"
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate(timeout=60)
    assert (waiting.returncode, told) == (130, "hvmgr: stopped\n")


def test_busy_vm_is_told_after_the_wait(hvmgr, vm):
    with Host.open().vm(vm).home.locked(wait_s=1):
        assert hvmgr.ok("snapshot", "list", vm).code == 0
        answer = hvmgr("snapshot", "create", vm, "--wait", "0.1")
    assert answer.code == 4
    assert "--wait" in answer.err


HEAVY = ("libvirt", "rich", "qemu.qmp", "asyncio", "subprocess", "yaml", "hvmgr.operations.session", "hvmgr.model.plan")


@pytest.mark.parametrize("command", [["snapshot", "list"], ["snapshot", "tree"], ["snapshot", "show"], ["space"]])
def test_reading_loads_nothing_heavy(command, hvmgr, branched):
    arguments = [*command, branched, *(["one"] if "show" in command else [])]
    program = f"import sys; from hvmgr.faces.cli import run; assert run({arguments!r}) == 0; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    allowed = {"hvmgr.model.plan"} if command != ["snapshot", "list"] else set()
    assert set(HEAVY) & set(loaded) <= allowed


def test_version_is_told_without_click():
    command = [sys.executable, "-X", "importtime", "-m", "hvmgr", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "click" not in done.stderr


def test_version_is_told_also_beside_other_options(hvmgr):
    assert hvmgr.ok("--json", "--version").out == hvmgr.ok("version").out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_calls_us(shell, hvmgr):
    assert "_HVMGR_COMPLETE" in hvmgr.ok("completion", shell).out


def test_completion_proposes_vms_and_snapshots(hvmgr, branched, monkeypatch, capsys):
    hvmgr.ok("snapshot", "create", branched, "with a space")
    spaced = hvmgr.ok("snapshot", "list", branched, "--json").json["snapshots"][-1]["id"]

    def complete(line):
        monkeypatch.setenv("_HVMGR_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.run([])
        monkeypatch.delenv("_HVMGR_COMPLETE")
        return capsys.readouterr().out.split()

    assert complete("hvmgr snapshot list we") == [f"plain,{branched}"]
    assert complete(f"hvmgr snapshot apply {branched} t") == ["plain,two", "plain,three"]
    assert complete(f"hvmgr snapshot apply {branched} {spaced[:4]}") == [f"plain,{spaced}"]
    assert complete("hvmgr snapshot ap") == ["plain,apply"]
    assert complete("hvmgr file diff we") == [f"plain,{branched}"]
    assert complete(f"hvmgr file diff {branched} one t") == ["plain,two", "plain,three"]
    assert complete(f"hvmgr file diff {branched} one two t") == []
    assert complete("hvmgr --root /etc/passwd vm show w") == []


def test_file_that_the_user_may_not_read_is_no_wrong_request():
    told = words.translate(click.BadParameter("Path '/srv/a b' is not readable."))
    assert (told.exit_code, str(told)) == (8, "no permission for /srv/a b")
