"""The demo from outside: every proof holds, it can be stopped at any time, and nothing of it stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.faces import cli, demo, stage
from hvmgr.faces.witness import Content, Kind, Witness
from tests import told

COMMAND = [sys.executable, "-m", "hvmgr", "demo"]


def folder_of(output: str) -> Path:
    """The demo's folder, by its first line."""
    found = re.search(r"/tmp/hvdemo-\w+", output)
    assert found is not None, output
    return Path(found[0])


def commands_in(folder: Path) -> list[str]:
    """The command lines of all processes that have to do with the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def assert_nothing_left(output: str) -> None:
    folder = folder_of(output)
    assert not folder.exists()
    assert commands_in(folder) == []
    assert not Path(os.environ["HVMGR_INDEX"]).exists()
    assert not Path(os.environ["HVMGR_ROOT"]).exists()


@pytest.mark.guest
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("counting_guest")
def test_every_proof_holds_and_nothing_is_left():
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    proofs = re.findall(r"^ +proof: (.*)$", done.stdout, re.MULTILINE)
    end = done.stdout.splitlines()[-1]
    assert re.fullmatch(rf"demo: every proof held \({len(proofs)} of {len(proofs)}\), in \d+ s", end)
    # Of each kind at least as many as the story has steps of that kind: none is skipped silently.
    counted = {what: sum(what in proof for proof in proofs) for what in ("memory goes on", "sha256", "boots and finds")}
    assert counted["memory goes on"] == 4
    assert counted["sha256"] >= 20
    assert counted["boots and finds"] >= 5
    assert "\x1b" not in done.stdout
    assert told.text(done.stderr) == ""
    assert_nothing_left(done.stdout)


@pytest.mark.guest
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("counting_guest")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_demo_that_is_stopped_ends_its_guest_and_leaves_nothing(number):
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output = ""
        for line in process.stdout:
            output += line
            if "web started" in line:
                break
        assert commands_in(folder_of(output)) != []
        process.send_signal(number)
        rest, complaint = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "stopped" in complaint
    assert_nothing_left(output + rest)


# --- on a connection of the user's ------------------------------------------------------------------------------------

SESSION = ["-m", "hvmgr", "-c", "qemu:///session", "demo"]
# Its second part is told to its end on the demo's own libvirt; here no more than that its VM is made, and cleared away.
SHORTER = """
from hvmgr.faces import cli, demo
whole = demo.Story.tell_life
def tell(story, name, template, base, *, running):
    if running:
        whole(story, name, template, base, running=running)
    else:
        with demo.Host.open() as host:
            story._snapshot(story._create(host, name, template, base), "installed")
demo.Story.tell_life = tell
raise SystemExit(cli.run(["-c", "qemu:///session", "demo"]))
"""
MINE = """<domain type='qemu'><name>mine</name><memory>65536</memory>
  <os><type arch='x86_64'>hvm</type></os></domain>"""


@pytest.fixture
def mine(user):
    """A VM that the ordinary user has already: what libvirt says of it, now and later."""

    def say(*words):
        done = user.run("virsh", "-q", "-c", "qemu:///session", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = user.home / "mine.xml"
    file.write_text(MINE)
    file.chmod(0o644)
    say("define", file)
    return lambda: (say("list", "--all", "--name").split(), say("dumpxml", "mine"))


def assert_only_mine_left(user, mine, before, output):
    assert mine() == before
    folder = folder_of(output)
    assert not folder.exists()
    assert commands_in(folder) == []
    assert not user.root.exists()


@pytest.mark.guest
@pytest.mark.libvirtd
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("counting_guest")
def test_ordinary_user_has_the_demo_on_the_session_and_keeps_what_is_his(user, mine):
    before = mine()
    done = user.run(user.python, "-c", SHORTER, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    proofs = re.findall(r"^ +proof: (.*)$", done.stdout, re.MULTILINE)
    assert f"demo: every proof held ({len(proofs)} of {len(proofs)})" in done.stdout.splitlines()[-1]
    assert sum("memory goes on" in proof for proof in proofs) == 4
    assert "created hvmgr-demo-web in" in done.stdout
    assert "created hvmgr-demo-old in" in done.stdout
    assert told.text(done.stderr) == ""
    assert_only_mine_left(user, mine, before, done.stdout)


@pytest.mark.guest
@pytest.mark.libvirtd
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("counting_guest")
def test_demo_on_the_session_that_is_stopped_leaves_what_is_the_users(user, mine):
    before = mine()
    command = user.command(user.python, "-u", *SESSION)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output = ""
        for line in process.stdout:
            output += line
            if "hvmgr-demo-web started" in line:
                break
        assert "hvmgr-demo-web" in mine()[0]
        process.send_signal(signal.SIGINT)
        rest, complaint = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "stopped" in complaint
    assert_only_mine_left(user, mine, before, output + rest)


@pytest.mark.libvirtd
def test_demo_does_not_take_a_name_that_somebody_has(user):
    file = user.home / "mine.xml"
    file.write_text(MINE.replace("mine", "hvmgr-demo-old"))
    file.chmod(0o644)
    assert user.run("virsh", "-c", "qemu:///session", "define", file).returncode == 0
    done = user.run(user.python, *SESSION)
    assert done.returncode == 4
    assert "has a VM 'hvmgr-demo-old' already" in done.stderr
    assert "virsh -c qemu:///session undefine hvmgr-demo-old" in done.stderr
    assert done.stdout == ""


# --- around it --------------------------------------------------------------------------------------------------------


def test_failed_proof_ends_with_1_and_says_which(monkeypatch, capsys):
    def fail(_tell, *, keep, uri):
        raise AssertionError("proof failed: the sky is green")

    monkeypatch.setattr(demo, "run", fail)
    assert cli.run(["demo"]) == 1
    assert "the sky is green" in capsys.readouterr().err


def test_json_is_one_document_with_the_proofs(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda _tell, *, keep, uri: ["a proof"])
    assert cli.run(["demo", "--json"]) == 0
    assert '"proofs": [\n    "a proof"\n  ]' in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--dry-run"], ["--root", "/var/lib/hvmgr"]], ids=lambda words: words[0])
def test_options_that_would_mean_something_of_the_users_are_refused(option, capsys):
    assert cli.run(["demo", *option]) == 2
    assert "of its own" in capsys.readouterr().err


def test_stage_is_reached_through_the_environment_and_gone_afterwards(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    root = os.environ["HVMGR_ROOT"]
    with stage.opened() as place:
        assert os.environ["LIBVIRT_DEFAULT_URI"] == place.uri
        assert Path(os.environ["HVMGR_ROOT"]).parent == place.folder
        assert place.folder.stat().st_mode & 0o777 == 0o711
    assert not place.folder.exists()
    assert "LIBVIRT_DEFAULT_URI" not in os.environ
    assert os.environ["HVMGR_ROOT"] == root


def test_stage_that_is_kept_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with stage.opened(keep=True) as place:
        pass
    assert (place.libvirt / "etc" / "qemu.conf").is_file()
    subprocess.run(["rm", "-r", place.folder], check=True)


def test_stage_is_gone_after_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ZeroDivisionError), stage.opened() as place:
        raise ZeroDivisionError
    assert not place.folder.exists()


def test_signal_that_an_operation_swallowed_is_still_heard():
    wishes = stage.Wishes()
    with wishes.heard():
        wishes.check()
        old = signal.signal(signal.SIGINT, lambda _number, _frame: None)  # as an operation holds it back
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        signal.signal(signal.SIGINT, old)
        with pytest.raises(errors.Cancelled, match="stopped"):
            wishes.check()
    wishes.close()


def test_witness_tells_what_it_proved_and_raises_what_it_did_not(tmp_path):
    told = []
    witness = Witness(lambda kind, text: told.append((kind, text)), tmp_path)
    witness.prove("water is wet", held=True)
    with pytest.raises(AssertionError, match="water is dry"):
        witness.prove("water is dry", held=False)
    assert witness.proofs == ["water is wet"]
    assert told == [(Kind.PROOF, "water is wet")]


class FrozenVm:
    """A VM as the witness looks at it: images by path, and snapshots."""

    def __init__(self, snapshots):
        self._snapshots = snapshots

    def snapshots(self):
        return self._snapshots


class FrozenSnapshot:
    id, name, disks = "1", "before", {"vda": "x"}


@pytest.mark.parametrize(
    ("now", "holds"),
    [(Content("aa", 7), True), (Content("ab", 7), False)],
    ids=["the-same-bytes", "one-byte-differs"],
)
def test_witness_sees_a_disk_of_a_snapshot_that_changed(tmp_path, monkeypatch, now, holds):
    witness = Witness(lambda _kind, _text: None, tmp_path)
    contents = iter([{"vda": Content("aa", 7)}, {"vda": now}])
    monkeypatch.setattr(Witness, "read", lambda _self, _vm, _disks: next(contents))
    vm, snapshot = FrozenVm([FrozenSnapshot]), FrozenSnapshot
    witness.remember(vm, snapshot, expected=None)
    if holds:
        witness.prove_snapshots(vm)
    else:
        with pytest.raises(AssertionError):
            witness.prove_snapshots(vm)
