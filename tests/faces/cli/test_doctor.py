"""``hvmgr doctor`` as it is typed: lines, exit codes, JSON, dry run; and the page's table of codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvmgr.model import diagnosis
from hvmgr.model.diagnosis import Code

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def home(root, vm):
    return root / vm


def image(hvmgr, vm):
    (path,) = hvmgr.ok("vm", "show", vm, "--json").json["now"]["disks"].values()
    return Path(path)


def test_page_has_every_code_with_severity_and_exit_code():
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (error|warning|info) \| (\d?) ?\|", page, re.MULTILINE)
    expected = {
        (str(code), kind.severity.value, "" if kind.error is None else str(kind.error.exit_code))
        for code, kind in diagnosis.KINDS.items()
    }
    assert set(rows) == expected
    assert len(rows) == len(Code) == len(diagnosis.KINDS)


def test_every_code_is_brought_about_by_a_test():
    files = [*(ROOT / "tests" / "operations").rglob("*.py"), ROOT / "tests" / "faces" / "cli" / "test_mount.py"]
    told = "".join(path.read_text("utf-8") for path in files)
    assert [str(code) for code in Code if f'"{code}"' not in told] == []


def test_exit_code_is_that_of_the_worst_error():
    def code(*codes):
        return diagnosis.exit_code([diagnosis.finding(one, "", "") for one in codes])

    assert code() == code(Code.MODE_WRONG, Code.VERSIONS) == 0
    assert code(Code.HOME_MISSING, Code.LIBVIRT_UNREACHABLE) == 8
    assert code(Code.LIBVIRT_UNREACHABLE, Code.OPERATION_OPEN, Code.MODE_WRONG) == 4
    assert code(Code.OPERATION_OPEN, Code.IMAGE_MISSING, Code.HOME_NEWER) == 6


def test_whole_vm_has_nothing_to_say(hvmgr, vm):
    answer = hvmgr.ok("doctor", vm)
    assert answer.out == ""
    assert hvmgr.ok("doctor", vm, "--json").json == {"schema": 1, "changed": False, "findings": [], "repaired": []}
    assert hvmgr.ok("doctor", vm, "--repair", "--json").json["changed"] is False


def test_line_has_six_values_and_the_exit_code_is_damage(hvmgr, vm):
    path = image(hvmgr, vm)
    path.rename(path.with_name("elsewhere"))
    answer = hvmgr("doctor", vm)
    assert answer.code == 6
    lines = {line[1]: line for line in answer.lines}
    severity, code, name, where, sentence, repair = lines["image-missing"]
    assert (severity, code, name, where) == ("error", "image-missing", vm, str(path))
    assert "is missing; needed by the present" in sentence
    assert "put the file back" in repair
    assert hvmgr("doctor").code == 6
    assert hvmgr("doctor", vm, "--repair").code == 6
    path.with_name("elsewhere").rename(path)
    hvmgr.ok("doctor", vm)


def test_repair_says_what_it_did_and_dry_run_what_it_would(hvmgr, vm, home):
    home.chmod(0o755)
    assert hvmgr.ok("doctor", vm).lines[0][:3] == ["warning", "mode-wrong", vm]
    would = hvmgr.ok("doctor", vm, "--repair", "--dry-run")
    assert would.lines[0][:2] == ["would", "mode-wrong"]
    assert home.stat().st_mode & 0o777 == 0o755
    planned = hvmgr.ok("doctor", vm, "--repair", "--dry-run", "--json").json
    assert (planned["changed"], planned["repaired"][0]["code"]) == (False, "mode-wrong")
    done = hvmgr.ok("doctor", vm, "--repair")
    assert done.lines == [["done", "mode-wrong", vm, str(home), f"give {home} the mode 0711", ""]]
    assert home.stat().st_mode & 0o777 == 0o711
    hvmgr.ok("doctor", vm, "--repair")


def test_failed_repair_says_why_and_keeps_the_exit_code(hvmgr, vm, monkeypatch):
    from hvmgr import errors
    from hvmgr.storage import durable

    path = image(hvmgr, vm)
    path.chmod(0o400)

    def refuse(*_):
        raise errors.HostFailed("no permission", hint="run as root")

    monkeypatch.setattr(durable, "set_mode", refuse)
    answer = hvmgr("doctor", vm, "--repair", "--json")
    assert answer.code == 4
    (one,) = answer.json["repaired"]
    assert (one["failure"], one["hint"]) == ("no permission", "run as root")
    assert answer.json["changed"] is False


def test_two_configurations_do_not_hide_the_other_vms(hvmgr, vm, root):
    hvmgr.ok("vm", "create", "other", "--disk", "8M", "--network", "none", "--accel", "tcg")
    stray = root / vm / "Virtual Machines" / "00000000-0000-4000-8000-000000000000.xml"
    stray.write_text("<broken")
    answer = hvmgr("vm", "list")
    assert answer.code == 0
    assert [line[0] for line in answer.lines] == ["other"]
    assert "left out: " in answer.err
    assert "2 configurations" in answer.err
    assert hvmgr("doctor", str(root / vm)).code == 6
    assert hvmgr("doctor", vm, "--repair").code == 0
    assert {line[0] for line in hvmgr.ok("vm", "list").lines} == {"other", vm}


def test_accept_touched_alone_is_a_usage_error(hvmgr, vm):
    answer = hvmgr("doctor", vm, "--accept-touched")
    assert answer.code == 2
    assert "--repair" in answer.err


def test_libvirt_out_of_reach_is_a_finding_and_a_wrong_connection_an_error(hvmgr, vm):
    answer = hvmgr("doctor", vm, "-c", "qemu+unix:///system?socket=/nowhere")
    assert answer.code == 8
    assert answer.lines[0][1] == "libvirt-unreachable"
    assert hvmgr("doctor", "-c", "qemu+ssh://host/system").code == 5
    assert hvmgr("doctor", "nobody").code == 3
