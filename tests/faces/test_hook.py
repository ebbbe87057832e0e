"""The hook as libvirt runs it: a program of its own, with an XML on stdin. The starts themselves: test_start_hook.py."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.faces import hook
from hvmgr.host import libvirt_door
from hvmgr.model import metadata
from hvmgr.operations import start_hook
from hvmgr.storage import index, spool, start_guard

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = b"<domain type='kvm'><name>web</name><uuid>11111111-2222-4333-8444-555555555555</uuid></domain>"
ELEMENT = (
    b"<metadata><hvmgr:vm xmlns:hvmgr='urn:hvmgr:vm:1' format='1' home='/no/such/home' uri='qemu:///system'"
    b" created='2026-11-21T13:03:05.000000Z'/></metadata>"
)
OURS = FOREIGN.replace(b"</uuid>", b"</uuid>" + ELEMENT)
MANY = b"<a/>" * 2_600_000  # 10 MB


class Unread(io.BytesIO):
    def read(self, *_):
        raise AssertionError("nobody has to read this")


def answer(xml, *, operation="prepare", name="web"):
    return hook.main([name, operation, "begin", "-"], xml if isinstance(xml, io.BytesIO) else io.BytesIO(xml))


@pytest.fixture
def said(capsys):
    """What the hook said: one line, or nothing."""

    def get():
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == (1 if told.err else 0)
        return told.err

    return get


@pytest.mark.parametrize("operation", ["start", "stopped", "reconnect", "attach", "new-one", ""])
def test_every_other_phase_passes_unread(operation, said):
    assert answer(Unread(OURS), operation=operation) == 0
    assert said() == ""


# --- word of starts and ends ------------------------------------------------------------------------------------------

VM_ID = "11111111-2222-4333-8444-555555555555"


def told():
    """What the worker would find."""
    return [(one.vm_id, str(one.event), one.reason) for one in spool.look(take=False)]


@pytest.mark.parametrize("operation", list(spool.Event))
def test_word_is_left_of_vms_of_ours(operation, said):
    before = datetime.now(UTC)
    assert answer(OURS, operation=operation) == 0
    assert answer(OURS.replace(b"<name>", b"<title>\xf0\x9f\x90\xa7 <!-- cut off"), operation=operation) == 0
    assert answer(FOREIGN, operation=operation) == 0
    assert told() == [(VM_ID, operation, "")] * 2
    assert all(before <= one.time <= datetime.now(UTC) for one in spool.look(take=False))
    assert spool.folder().stat().st_mode & 0o777 == 0o700
    assert said() == ""


@pytest.mark.parametrize(
    ("extra", "reason"),
    [("crashed", "crashed"), ("-", ""), ("from snapshot", ""), ("../../x", ""), ("x" * 999, "x" * 32)],
)
def test_reason_of_an_end_is_told_where_libvirt_says_it(extra, reason):
    assert hook.main(["web", "release", "end", extra], io.BytesIO(OURS)) == 0
    assert told() == [(VM_ID, "release", reason)]


@pytest.mark.parametrize(
    "xml",
    [OURS.replace(VM_ID.encode(), b"../../../../../../../../../../etc/x"), OURS.replace(b"uuid", b"u"), Unread(OURS)],
    ids=["path", "no-id", "unreadable"],
)
@pytest.mark.parametrize("operation", list(spool.Event))
def test_guest_lives_when_no_word_can_be_left(xml, operation, capsys):
    assert answer(xml, operation=operation) == 0
    assert f"hvmgr: no word of '{operation}' of web could be left" in capsys.readouterr().err
    assert told() == []


def test_guest_lives_when_the_folder_is_none(capsys):
    spool.folder().parent.mkdir(parents=True)
    spool.folder().write_text("")
    assert answer(OURS, operation="started") == 0
    assert "FileExistsError" in capsys.readouterr().err


def test_taken_events_stay_until_they_are_settled(tmp_path):
    for operation in spool.Event:
        answer(OURS, operation=operation)
    (spool.folder() / "nonsense").touch()
    (spool.folder() / f"1_{VM_ID}_exploded_").touch()
    first = spool.look(take=True)
    assert [str(one.event) for one in first] == ["started", "release"]
    assert list(spool.folder().iterdir()) == []
    assert spool.look(take=True) == first
    spool.settle(first[:1])
    assert spool.look(take=True) == first[1:]


@pytest.mark.parametrize("arguments", [[], ["web"]])
def test_too_few_arguments_pass(arguments):
    assert hook.main(arguments, Unread(OURS)) == 0


@pytest.mark.parametrize(
    "xml",
    [
        FOREIGN,
        b"",
        b"<domain",
        b"\xff\xfe\x00",
        b"<!DOCTYPE a [<!ENTITY b 'c'>]><domain>&b;</domain>",
        FOREIGN[:-9] + MANY + b"</domain>",
        bytes(20 << 20),
        FOREIGN.replace(b"<name>", b"<description>not urn:hvmgr:vm:1</description><name>"),
    ],
    ids=["plain", "empty", "broken", "no-text", "doctype", "10-MB", "20-MiB-of-nothing", "mentions-us"],
)
def test_vm_that_is_not_ours_passes(xml, said):
    assert answer(xml) == 0
    assert said() == ""


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        (OURS, "its home /no/such/home is not there; hvmgr --root /no/such doctor --repair web"),
        (OURS[:-5], "libvirt's XML, line 1, column"),
        (b"<!DOCTYPE a>" + OURS, "has a DOCTYPE"),
        (b"<?xml version='1.0' encoding='klingon'?>" + OURS, "not XML"),
        (b"<?xml version='1.0' encoding='utf-8'?>" + OURS.replace(b"web", b"w\xe9b"), "not XML"),
        (OURS.decode().encode("utf-16"), "its home /no/such/home is not there"),
        (OURS[:-9] + MANY + b"</domain>", "its home /no/such/home is not there"),
        (OURS + b" " * (16 << 20), "its XML is larger than 16 MiB"),
        (OURS.replace(b"format='1'", b"format='2'"), "was written by a newer hvmgr"),
        (OURS.replace(b" home='/no/such/home'", b""), "hvmgr's <vm> has no home"),
        (OURS.replace(b"<name>web</name>", b""), "no <name>"),
        (OURS.replace(b"/no/such/home", b"/no/such&#10;/home"), r"its home /no/such\n/home is not there"),
    ],
    ids=[
        "no-home", "cut-off", "doctype", "unknown-encoding", "wrong-encoding", "utf-16", "10-MB", "17-MB", "newer",
        "no-attribute", "no-name", "line-feed",
    ],
)  # fmt: skip
def test_vm_of_ours_is_refused_in_one_line(xml, why, said):
    assert answer(xml) == 1
    line = said()
    assert line.startswith("hvmgr: web must not start: ")
    assert why in line


def test_defect_is_a_refusal_with_a_way_out(monkeypatch, said):
    monkeypatch.setattr(start_guard, "examine", lambda _: 1 / 0)
    assert answer(OURS) == 1
    line = said()
    assert "a defect in hvmgr's hook: ZeroDivisionError" in line
    assert "to start it all the same: hvmgr hook allow --once web" in line


def test_nobody_listening_changes_no_answer(monkeypatch):
    with open(os.devnull) as unwritable:
        monkeypatch.setattr(sys, "stderr", unwritable)
        assert answer(OURS) == 1


def patient(xml, operation, patience_s):
    """The same by a process that another one waits for, which has to be one without threads."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from hvmgr.faces import hook\n"
        f"sys.exit(hook.main(['web', {operation!r}, 'begin', '-'], sys.stdin.buffer, patience_s={patience_s}))"
    )
    return subprocess.run([sys.executable, "-c", program], input=xml, capture_output=True, check=False, timeout=90)


def test_home_that_does_not_answer_is_a_refusal_after_a_while(tmp_path):
    """Reading a pipe that nobody writes to hangs as a file server does that is not there."""
    place = tmp_path / "Virtual Machines"
    place.mkdir()
    os.mkfifo(place / "11111111-2222-4333-8444-555555555555.xml")
    done = patient(OURS.replace(b"/no/such/home", os.fsencode(tmp_path)), "prepare", 0.5)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"web must not start: its home did not answer within 0.5 seconds" in done.stderr


@pytest.mark.parametrize("operation", ["prepare", "restore"])
def test_answer_of_another_process_is_the_same(operation, tmp_path):
    done = patient(domain("/no/such/home", tmp_path / "disk", below=STALE), operation, 60)
    if operation == "prepare":
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"its home /no/such/home is not there" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, b"")
        assert plain(done.stdout) == plain(domain("/no/such/home", tmp_path / "disk"))


# --- restore and migrate ----------------------------------------------------------------------------------------------


@pytest.fixture
def rewritten(capfdbinary, monkeypatch):
    """``rewritten(xml)``: what the hook gives libvirt in place of the XML, and what it says."""

    def call(xml, operation="restore"):
        with open(1, "w", closefd=False) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert answer(xml, operation=operation) == 0
        told = capfdbinary.readouterr()
        return told.out, told.err.decode()

    return call


def domain(home, source, *, below="", card=""):
    """A VM of ours with a disk and a card, as a save file holds it."""
    return (
        FOREIGN[:-9]
        + ELEMENT.replace(b"/no/such/home", os.fsencode(home))
        + f"<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{source}'/>"
        f"{below}<target dev='vda' bus='virtio'/></disk>{card}</devices></domain>".encode()
    )


def plain(xml):
    return xml.replace(b'"', b"'").strip()


STALE = "<backingStore type='file'><format type='qcow2'/><source file='/gone'/><backingStore/></backingStore>"


@pytest.mark.parametrize("operation", ["restore", "migrate"])
def test_stale_chain_goes_and_all_else_stays(operation, rewritten, tmp_path):
    disk = tmp_path / "disk"
    disk.touch()
    out, said = rewritten(domain(tmp_path, disk, below=STALE), operation)
    assert (plain(out), said) == (plain(domain(tmp_path, disk)), "")
    assert rewritten(out, operation) == (b"", "")  # it is as it should be


def test_home_that_was_moved_is_followed(rewritten, tmp_path):
    new = tmp_path / "new"
    (new / "Virtual Machines").mkdir(parents=True)
    vm_id = "11111111-2222-4333-8444-555555555555"
    (new / "Virtual Machines" / f"{vm_id}.xml").write_bytes(OURS)
    (new / "disk").touch()
    (new / "nvram.fd").touch()
    index.record(index.Entry(vm_id, "web", new, "qemu:///system", ()))
    firmware = f"<os><type>hvm</type><nvram>{tmp_path}/old/nvram.fd</nvram></os><devices>".encode()
    xml = domain(tmp_path / "old", tmp_path / "old" / "disk").replace(b"<devices>", firmware)
    out, said = rewritten(xml)
    assert said == ""
    assert f"<nvram>{new}/nvram.fd</nvram>".encode() in out
    assert f"home='{new}'".encode() in plain(out)
    assert f"file='{new}/disk'".encode() in plain(out)


MAPS = """maps:
- networks: [{{old: lan, new: dmz}}, {{old: lo, new: dmz}}]
  paths: [{{old: /old, new: {place}}}]
"""


def test_maps_say_where_what_is_missing_is(rewritten, tmp_path):
    folder = Path(os.environ["HVMGR_CONFIG"])
    folder.mkdir()
    (folder / "hvmgr.yaml").write_text(MAPS.format(place=tmp_path))
    (tmp_path / "disk").touch()
    cards = "".join(f"<interface type='bridge'><source bridge='{name}'/></interface>" for name in ("lan", "lo", "x"))
    out, said = rewritten(domain(tmp_path, "/old/disk", card=cards))
    assert said == ""
    expected = domain(tmp_path, tmp_path / "disk", card=cards.replace("'lan'", "'dmz'"))
    assert plain(out) == plain(expected)  # the loopback device is there, and stays


@pytest.mark.parametrize(
    "xml",
    [
        OURS[:-5],
        b"<!DOCTYPE a>" + OURS,
        OURS.replace(b"format='1'", b"format='2'"),
        OURS + b" " * (16 << 20),
        OURS.replace(b"<domain", b"<other").replace(b"</domain", b"</other"),
    ],
    ids=["cut-off", "doctype", "newer", "17-MB", "no-domain"],
)
def test_what_cannot_be_rewritten_stays_and_is_said(xml, rewritten):
    out, said = rewritten(xml)
    assert out == b""
    assert "hvmgr: restore of web: its configuration is left as it is: " in said


@pytest.fixture
def wrong_configuration():
    folder = Path(os.environ["HVMGR_CONFIG"])
    folder.mkdir()
    (folder / "hvmgr.yaml").write_text("nonsense: [")


@pytest.mark.usefixtures("wrong_configuration")
def test_wrong_configuration_file_keeps_no_saved_vm_from_going_on(rewritten, tmp_path):
    out, told = rewritten(domain(tmp_path, "/old/disk"))
    assert out == b""
    assert "hvmgr.yaml, line 1" in told


@pytest.mark.usefixtures("wrong_configuration")
def test_wrong_configuration_file_is_no_reason_to_refuse(said):
    assert answer(OURS) == 1
    assert "its home /no/such/home is not there; hvmgr -c qemu:///system --root /no/such doctor" in said()


@pytest.mark.parametrize("operation", ["restore", "migrate"])
@pytest.mark.parametrize("xml", [FOREIGN, b"", b"<domain", FOREIGN[:-9] + MANY + b"</domain>"])
def test_saved_vm_that_is_not_ours_stays_as_it_is(xml, operation, rewritten):
    assert rewritten(xml, operation) == (b"", "")


def test_mark_is_the_namespace():
    assert hook._MARK == metadata.NAMESPACE


# --- as a program -----------------------------------------------------------------------------------------------------


def modules_after(xml):
    program = (
        f"import sys, io; sys.path.insert(0, {str(ROOT)!r}); from hvmgr.faces import hook\n"
        f"hook.main(['web', 'prepare', 'begin', '-'], io.BytesIO({xml!r})); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in done.stdout.split()}, set(done.stdout.split())


def test_foreign_vm_costs_no_import():
    tops, names = modules_after(FOREIGN)
    assert not tops & {"lxml", "dataclasses", "re", "json", "pathlib", "hashlib", "subprocess"}
    assert not {name for name in names if name.startswith("hvmgr.") and not name.startswith("hvmgr.faces")} - {
        "hvmgr.version"
    }


def test_vm_of_ours_is_judged_without_libvirt(tmp_path):
    """A whole examination, of a home that is there."""
    tops, _ = modules_after(OURS.replace(b"/no/such/home", os.fsencode(tmp_path)))
    assert "lxml" in tops
    assert not tops & {"libvirt", "libvirtmod", "qemu", "rich", "click", "yaml", "subprocess", "asyncio"}


@pytest.fixture
def script(tmp_path):
    return start_hook.install(tmp_path / "hooks").path


def run(script, xml, operation="prepare"):
    argv = [script, "web", operation, "begin", "-"]
    environment = {"LC_ALL": "C", "PATH": "/usr/bin:/bin"}  # what libvirt gives
    return subprocess.run(argv, input=xml, capture_output=True, check=False, env=environment, timeout=30)


def test_script_answers(script):
    assert run(script, FOREIGN).returncode == 0
    assert run(script, OURS, "started").returncode == 0
    assert told() == [(VM_ID, "started", "")]
    refused = run(script, OURS)
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert b"its home /no/such/home is not there" in refused.stderr


def test_script_speaks_of_names_beyond_ascii(script):
    refused = run(script, OURS.replace(b"/no/such/home", "/no/Zürich".encode()))
    assert refused.returncode == 1
    assert b"its home /no/Z" in refused.stderr


def time_of_children():
    """What a loaded machine does not stretch: the processors' own time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_other_phases_and_other_vms_pass_in_well_under_a_tenth_of_a_second(script):
    for xml, operation in ((OURS, "stopped"), (FOREIGN, "prepare")):
        seconds = []
        for _ in range(9):
            start = time_of_children()
            run(script, xml, operation)
            seconds.append(time_of_children() - start)
        assert min(seconds) < 0.05, seconds


@pytest.mark.parametrize("operation", ["prepare", "restore", "migrate", "reconnect", "no-such-phase"])
def test_script_without_stdin_lets_everything_pass(script, operation):
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" <&-', script, "web", operation, "begin", "-"],
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"")


def test_script_gives_libvirt_the_xml(script, tmp_path):
    (tmp_path / "disk").touch()
    done = run(script, domain(tmp_path, tmp_path / "disk", below=STALE), "restore")
    assert (done.returncode, done.stderr) == (0, b"")
    assert plain(done.stdout) == plain(domain(tmp_path, tmp_path / "disk"))


@pytest.mark.parametrize("gone", ["python", "hook"])
def test_script_lets_everything_pass_when_hvmgr_is_gone(script, gone):
    lines = script.read_text().splitlines(keepends=True)
    script.write_text("".join(f"{gone}=/no/such\n" if line.startswith(f"{gone}=") else line for line in lines))
    assert run(script, OURS).returncode == 0


def test_half_removed_hvmgr_lets_everything_pass(tmp_path):
    faces = tmp_path / "hvmgr" / "faces"
    faces.mkdir(parents=True)
    (tmp_path / "hvmgr" / "__init__.py").touch()
    (faces / "hook.py").write_bytes(Path(hook.__file__).read_bytes())
    done = subprocess.run(
        [sys.executable, "-I", "-S", faces / "hook.py", "web", "prepare", "begin", "-"],
        input=OURS, capture_output=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0
    assert b"web was not examined" in done.stderr


# --- installing -------------------------------------------------------------------------------------------------------


def test_install_twice_changes_nothing_the_second_time(tmp_path):
    first = start_hook.install(tmp_path)
    assert (first.changed, first.alone) == (True, True)
    assert first.path == tmp_path / "qemu.d" / "50-hvmgr"
    assert first.path.stat().st_mode & 0o777 == 0o755
    assert start_hook.asked(tmp_path) is start_hook.Asked.US
    before = first.path.stat()
    assert not start_hook.install(tmp_path).changed
    assert first.path.stat() == before


def test_install_mends_mode_and_content(tmp_path):
    path = start_hook.install(tmp_path).path
    path.chmod(0o644)
    assert start_hook.install(tmp_path).changed
    path.write_text(path.read_text() + "# of an older hvmgr\n")
    assert start_hook.asked(tmp_path) is start_hook.Asked.ANOTHER
    assert start_hook.install(tmp_path).changed
    assert start_hook.asked(tmp_path) is start_hook.Asked.US


def test_foreign_file_of_that_name_stays(tmp_path):
    path = start_hook.path_in(tmp_path)
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nexit 0\n")
    for act in (start_hook.install, start_hook.uninstall):
        with pytest.raises(errors.Conflict, match="is not hvmgr's"):
            act(tmp_path)
    assert path.read_text() == "#!/bin/sh\nexit 0\n"


def test_other_hooks_stay(tmp_path):
    other = tmp_path / "qemu.d" / "10-other"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    assert not start_hook.install(tmp_path).alone
    assert start_hook.uninstall(tmp_path).changed
    assert list(tmp_path.rglob("*")) == [other.parent, other]
    assert not start_hook.uninstall(tmp_path).changed


def test_old_libvirt_is_unsupported(tmp_path, monkeypatch):
    monkeypatch.setattr(libvirt_door, "version", lambda: (6, 4))
    with pytest.raises(errors.Unsupported, match=r"libvirt 6\.4 runs no scripts in qemu\.d: that came with 6\.5"):
        start_hook.install(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(tmp_path):
    assert start_hook.install(tmp_path / "hooks", dry_run=True).changed
    assert list(tmp_path.iterdir()) == []
