"""The administrator's hooks, seen from the command line: what they are given, what they refuse, what goes wrong."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from hvmgr import Host, preferences, settings
from hvmgr.host import hypervisor
from hvmgr.host.events import Kind
from hvmgr.model.event import Event
from hvmgr.operations.reporter import Reporter
from hvmgr.storage import event_log
from tests.faces.cli.conftest import files_of

KEEP = """#!/bin/sh
cat > '{place}'
"""


@pytest.fixture
def hooks(monkeypatch, tmp_path):
    """``hooks(event, name, script)``: a hook that is run; the folder of the configuration is the test's."""
    monkeypatch.setenv("HVMGR_CONFIG", str(tmp_path / "config"))

    def install(event, name, script, mode=0o755):
        path = tmp_path / "config" / "hooks.d" / event / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(mode)
        return path

    return install


@pytest.fixture
def told(hooks, tmp_path):
    """``told(event)``: from now on the documents of this event are kept; what it gives returns the last one."""

    def keep(event):
        place = tmp_path / f"{event}.json"
        hooks(event, "keep", KEEP.format(place=place))
        return lambda: json.loads(place.read_text()) if place.exists() else None

    return keep


def logged():
    return [one["event"] for one in event_log.Reader(from_start=True).documents()]


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "hooks.md").read_text("utf-8")
DOCUMENT = json.loads(re.search(r"<!-- document -->\n```json\n(.*?)```", PAGE, re.DOTALL)[1])
KEYS = set(DOCUMENT)


def example(name):
    """A hook of the page, as it stands."""
    return re.search(rf"<!-- hook: {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)[1]


def test_page_lists_the_events():
    named = re.findall(r"^\| `([a-z-]+)` \| .* \| (refuses it|is a warning) \|$", PAGE, re.MULTILINE)
    assert named == [(one.value, "refuses it" if one.may_refuse else "is a warning") for one in Event]


def test_page_lists_the_events_of_libvirt():
    table = PAGE[PAGE.index("| event | `detail` |") :].partition("\n\n")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines()[2:])
    assert set(re.findall(r"`([a-z-]+)`", first)) == set(Kind)


def test_page_gives_the_keys_of_the_configuration(tmp_path):
    text = re.search(r"<!-- configuration -->\n```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
    (tmp_path / settings.CONFIG_FILE).write_text(text)
    assert set(preferences.read(tmp_path / settings.CONFIG_FILE)) == set(preferences.KEYS)


def test_examples_of_the_page(hvmgr, vm, hooks, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    hook = hooks("before-apply", "50-production", example("before-apply/50-production"))
    hooks("snapshot-created", "50-book", example("snapshot-created/50-book"))
    hvmgr.ok("snapshot", "create", vm, "before the update")
    hvmgr.ok("snapshot", "apply", vm, "before the update")
    hvmgr.ok("vm", "rename", vm, f"prod-{vm}")
    answer = hvmgr("snapshot", "apply", f"prod-{vm}", "before the update")
    assert answer.code == 4
    assert answer.err == (
        f"hvmgr: the hook {hook} refuses the return of prod-{vm} to snapshot 'before the update': "
        f"prod-{vm} is in production: ask the team that owns it\n"
    )
    (book,) = (tmp_path / "snapshots.jsonl").read_text().splitlines()
    assert set(json.loads(book)) == KEYS
    assert json.loads(book)["subject"] == DOCUMENT["subject"].replace("web", vm)


def test_hooks_before_and_after_are_given_the_facts(hvmgr, vm, told, root):
    before, after = told("before-snapshot"), told("snapshot-created")
    hvmgr.ok("snapshot", "create", vm, "one")
    (snapshot,) = hvmgr.ok("snapshot", "list", vm, "--json").json["snapshots"]
    assert set(before()) == set(after()) == KEYS
    assert (before()["event"], after()["event"]) == ("before-snapshot", "snapshot-created")
    for facts in (before(), after()):
        assert facts["version"] == 1
        assert facts["operation"] == "snapshot create"
        assert facts["subject"] == f"creation of snapshot 'one' of {vm}"
        assert facts["snapshots"] == [{"id": snapshot["id"], "name": "one"}]
        assert facts["vm"]["name"] == vm
        assert facts["vm"]["home"] == str(root / vm)
        assert facts["vm"]["connection"] == os.environ["LIBVIRT_DEFAULT_URI"]
    assert before()["id"] == after()["id"]
    assert before()["time"] <= after()["time"]


def test_every_operation_has_its_events(hvmgr, vm, root, tmp_path):
    hvmgr.ok("snapshot", "create", vm, "one")
    hvmgr.ok("snapshot", "apply", vm, "one")
    hvmgr.ok("snapshot", "undo", vm)
    hvmgr.ok("snapshot", "delete", vm, "one")
    hvmgr.ok("export", vm, tmp_path / "out", "--no-checksums")
    hvmgr.ok("import", tmp_path / "out" / vm, "--name", f"{vm}b")
    hvmgr.ok("vm", "rename", f"{vm}b", f"{vm}c")
    hvmgr.ok("vm", "delete", f"{vm}c", "--with-disks", "--yes")
    found = list(event_log.Reader(from_start=True).documents())
    assert [(one["event"], one["operation"]) for one in found] == [
        ("after-operation", "vm create"),
        ("snapshot-created", "snapshot create"),
        ("after-apply", "snapshot apply"),
        ("after-apply", "snapshot undo"),
        ("snapshot-deleted", "snapshot delete"),
        ("after-export", "export"),
        ("after-import", "import"),
        ("after-operation", "vm rename"),
        ("after-operation", "vm delete"),
    ]
    assert [one["vm"]["name"] for one in found] == [vm] * 6 + [f"{vm}b", f"{vm}c", f"{vm}c"]
    assert [one["snapshots"] and one["snapshots"][0]["name"] for one in found[1:5]] == ["one", "one", [], "one"]
    assert found[5]["path"] == str(tmp_path / "out" / vm)
    assert found[6]["path"] == str(tmp_path / "out" / vm)
    assert all(set(one) == KEYS for one in found)


def test_export_of_a_disk_is_told_when_all_of_it_was_sent(hvmgr, vm, told, hooks, root, tmp_path):
    hvmgr.ok("snapshot", "create", vm, "one")
    before, after = told("before-export"), told("after-export")
    seen = tmp_path / "seen"
    hooks("after-export", "see", f"#!/bin/sh\nwc -c < '{tmp_path}/one.vhd' > '{seen}'\n")
    hvmgr.ok("disk", "export", vm, "vda", tmp_path / "one.vhd", "--snapshot", "one")
    for facts in (before(), after()):
        assert facts["operation"] == "disk export"
        assert facts["path"] == str(tmp_path / "one.vhd")
        assert "of snapshot 'one' of" in facts["subject"]
    assert before()["id"] == after()["id"]
    assert int(seen.read_text()) == (tmp_path / "one.vhd").stat().st_size  # it is there, and whole
    uuid = hvmgr.ok("vdi-list", f"vm-name-label={vm}", "kind=slot", "--minimal").out.strip()
    hvmgr.ok("vdi-export", f"uuid={uuid}", f"filename={tmp_path}/two.raw")
    assert after()["path"] == str(tmp_path / "two.raw")
    with Host.open(os.environ["LIBVIRT_DEFAULT_URI"], root=root) as host, open(os.devnull, "wb") as nowhere:
        wanted = host.vm(vm)
        with wanted.export_disk("vda") as stream:
            next(stream.chunks())
        with pytest.raises(ZeroDivisionError), wanted.export_disk("vda") as stream:
            stream.send(nowhere.fileno(), lambda *_: 1 // 0)
    documents = [one for one in event_log.Reader(from_start=True).documents() if one["operation"] == "disk export"]
    found = [(one["event"], one["error"] and one["error"]["code"]) for one in documents]
    assert found == [("after-export", None)] * 2 + [("operation-failed", "Cancelled")] * 2


def test_present_of_a_running_vm_is_read_with_everybodys_leave(hvmgr, vm, hooks, told, root):
    def look(*words):
        return hvmgr("file", "list", vm, "--present", *words)

    hvmgr.ok("vm", "start", vm)
    with hypervisor.opened(os.environ["LIBVIRT_DEFAULT_URI"], wait_s=60) as connection:
        (domain,) = connection.domains()
        before, events, live = files_of(root), logged(), domain.xml(live=True)
        for answer in (look("--dry-run"), look("--dry-run", "--json")):
            assert (answer.code, "leave out --dry-run" in answer.err + answer.out) == (4, True), answer
        no = hooks("before-operation", "no", "#!/bin/sh\necho not now >&2\nexit 1\n")
        answer = look()
        assert (answer.code, f"refuses the reading of the present of {vm}: not now" in answer.err) == (4, True), answer
        assert (files_of(root), logged(), domain.xml(live=True)) == (before, events, live)
        no.unlink()
        asked, ended = told("before-operation"), told("after-operation")
        domain.suspend()
        answer = look()
    assert (answer.code, f"{vm} is paused: this is what a power cut" in answer.err) == (0, True), answer
    assert asked()["id"] == ended()["id"]
    assert asked()["subject"] == f"reading of the present of {vm}"
    assert logged() == [*events, "after-operation"]


def test_before_apply_vetoes_and_nothing_is_changed(hvmgr, branched, hooks, root):
    hook = hooks("before-apply", "10-office-hours", "#!/bin/sh\necho 'not before 18:00' >&2\nexit 3\n")
    before, events = files_of(root), logged()
    answer = hvmgr("snapshot", "apply", branched, "one", "--json")
    assert answer.code == 4
    assert answer.json["error"]["code"] == "Vetoed"
    assert answer.json["error"]["message"].endswith(": not before 18:00")
    assert answer.json["error"]["facts"] == {"event": "before-apply", "hook": str(hook)}
    assert files_of(root) == before
    assert logged() == events
    hook.unlink()
    hvmgr.ok("snapshot", "apply", branched, "one")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ("before-snapshot", ["snapshot", "create", "VM"]),
        ("before-apply", ["snapshot", "undo", "VM"]),
        ("before-delete", ["snapshot", "delete", "VM", "two"]),
        ("before-export", ["export", "VM", "OUT"]),
        ("before-export", ["disk", "export", "VM", "vda", "OUT/one.tar.zst", "--format", "raw"]),
        ("before-export", ["export", "VM", "--archive", "OUT/one.tar.zst"]),
        ("before-import", ["vm", "clone", "VM", "copy"]),
        ("before-operation", ["vm", "rename", "VM", "other"]),
        ("before-operation", ["vm", "create", "other", "--network", "none"]),
    ],
)
def test_veto_leaves_everything(event, words, hvmgr, branched, hooks, root, tmp_path):
    (tmp_path / "out").mkdir()
    hooks(event, "no", "#!/bin/sh\necho no >&2\nexit 1\n")
    before, homes = files_of(root), sorted(root.iterdir())
    meant = {"VM": branched, "OUT": tmp_path / "out", "OUT/one.tar.zst": tmp_path / "out" / "one.tar.zst"}
    answer = hvmgr(*(meant.get(word, word) for word in words))
    assert (answer.code, answer.out) == (4, "")
    assert "refuses the" in answer.err
    assert files_of(root) == before
    assert sorted(root.iterdir()) == homes
    assert list((tmp_path / "out").iterdir()) == []


def test_hooks_run_in_alphabetical_order_and_the_first_veto_ends_it(hvmgr, vm, hooks, tmp_path):
    place = tmp_path / "order"
    for name in ("b", "a", "10", "9"):
        hooks("before-snapshot", name, f"#!/bin/sh\necho {name} >> '{place}'\n[ {name} != a ] || exit 1\n")
    answer = hvmgr("snapshot", "create", vm)
    assert answer.code == 4
    assert "ended with code 1 and said nothing" in answer.err
    assert place.read_text().split() == ["10", "9", "a"]


def test_what_is_no_hook_is_not_run(hvmgr, vm, hooks, tmp_path):
    for name in ("README", "x~", ".hidden", "x.rpmsave", "x.dpkg-old"):
        hooks("before-snapshot", name, "#!/bin/sh\nexit 1\n", mode=0o644 if name == "README" else 0o755)
    (tmp_path / "config" / "hooks.d" / "before-snapshot" / "folder").mkdir()
    (tmp_path / "config" / "hooks.d" / "before-snapshot" / "dead").symlink_to("/no/such/file")
    hvmgr.ok("snapshot", "create", vm)


def test_failing_hook_afterwards_is_a_warning(hvmgr, vm, hooks, told):
    hook = hooks("snapshot-created", "a", "#!/bin/sh\necho 'mail is down' >&2\nexit 7\n")
    after = told("snapshot-created")  # its name comes later
    answer = hvmgr("snapshot", "create", vm, "one")
    assert answer.code == 0
    assert answer.err == f"warning: the hook {hook} failed with code 7: mail is down\n"
    assert after()["snapshots"][0]["name"] == "one"


def test_hook_that_is_no_program(hvmgr, vm, hooks):
    hooks("before-snapshot", "a", "\x7fnonsense")
    answer = hvmgr("snapshot", "create", vm)
    assert answer.code == 4
    assert "gave no answer: cannot start" in answer.err


@pytest.mark.parametrize("event", ["before-snapshot", "snapshot-created"])
def test_hook_that_hangs_is_ended_with_all_its_processes(event, hvmgr, vm, hooks, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "HOOK_LIMIT_S", 3.0)
    pids = tmp_path / "pids"
    hooks(event, "slow", f"#!/bin/sh\nsleep 600 &\necho $! $$ > '{pids}'\nwait\n")
    answer = hvmgr("snapshot", "create", vm)
    assert answer.code == (4 if event == "before-snapshot" else 0)
    assert "did not end within 3 s and was stopped" in answer.err
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_hook_that_reads_nothing_and_says_much(hvmgr, vm, hooks):
    hooks("before-snapshot", "a", "#!/bin/sh\nexec <&-\nhead -c 3000000 /dev/zero | tr '\\0' x\n")
    hvmgr.ok("snapshot", "create", vm)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda hook: hook.chmod(0o777), "others may write"),
        (lambda hook: hook.chmod(0o775), "others may write"),
        (lambda hook: hook.parent.chmod(0o777), "others may write"),
        (lambda hook: hook.parents[2].chmod(0o777), "others may write"),
        (lambda hook: os.chown(hook, 65534, 65534), "belongs to another user"),
        (lambda hook: os.chown(hook.parents[1], 65534, 65534), "belongs to another user"),
    ],
    ids=["open-to-all", "open-to-the-group", "open-folder", "open-configuration", "foreign", "foreign-folder"],
)
@pytest.mark.parametrize(("event", "code"), [("before-snapshot", 4), ("snapshot-created", 0)])
def test_hook_that_others_may_change_is_not_run(event, code, damage, why, hvmgr, vm, hooks, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    place = tmp_path / "ran"
    damage(hooks(event, "a", f"#!/bin/sh\ntouch '{place}'\n"))
    answer = hvmgr("snapshot", "create", vm)
    assert answer.code == code
    assert why in answer.err
    assert not place.exists()


def test_link_is_judged_by_the_file_behind_it(hvmgr, vm, hooks, tmp_path):
    behind = tmp_path / "elsewhere"
    behind.write_text("#!/bin/sh\nexit 1\n")
    behind.chmod(0o757)
    hooks("before-snapshot", "b", "#!/bin/sh\n")
    (tmp_path / "config" / "hooks.d" / "before-snapshot" / "a").symlink_to(behind)
    assert f"others may write {behind}" in hvmgr("snapshot", "create", vm).err


@pytest.mark.parametrize("via", ["a folder above the file", "a link in between"])
def test_way_behind_a_link_is_judged_too(via, hvmgr, vm, hooks, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    open_to_all = tmp_path / "open"
    behind = (open_to_all / "bin" if via == "a folder above the file" else tmp_path / "bin") / "hook"
    behind.parent.mkdir(parents=True)
    open_to_all.mkdir(exist_ok=True)
    behind.write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")
    behind.chmod(0o755)
    link = behind if via == "a folder above the file" else open_to_all / "link"
    if link is not behind:
        link.symlink_to(behind)
    hooks("before-snapshot", "b", "#!/bin/sh\n")
    (tmp_path / "config" / "hooks.d" / "before-snapshot" / "a").symlink_to(link)
    hvmgr.ok("snapshot", "create", vm)
    (tmp_path / "ran").unlink()
    open_to_all.chmod(0o777)
    answer = hvmgr("snapshot", "create", vm)
    assert answer.code == 4
    assert f"others may write {open_to_all}" in answer.err
    assert not (tmp_path / "ran").exists()


def test_environment_holds_no_secrets(hvmgr, vm, hooks, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    place = tmp_path / "environment"
    hooks("before-snapshot", "a", f"#!/bin/sh\nenv > '{place}'\n")
    hvmgr.ok("snapshot", "create", vm)
    names = {line.partition("=")[0] for line in place.read_text().splitlines()}
    assert names <= {
        "PATH", "LANG", "HOME", "PWD", "SHLVL", "_", "OLDPWD", "HVMGR_HOOK", "HVMGR_HOOK_HOLDS", "HVMGR_ROOT",
        "HVMGR_INDEX", "HVMGR_CONFIG", "HVMGR_RUN", "LIBVIRT_DEFAULT_URI", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR",
    }  # fmt: skip


def test_dry_run_lists_hooks_and_runs_none(hvmgr, branched, hooks, tmp_path):
    place = tmp_path / "ran"
    first = hooks("before-apply", "a", f"#!/bin/sh\ntouch '{place}'\nexit 1\n")
    second = hooks("after-apply", "b", f"#!/bin/sh\ntouch '{place}'\n")
    events = logged()
    said = hvmgr.ok("snapshot", "apply", branched, "one", "--dry-run").out
    assert said.splitlines()[-2:] == [f"hook for before-apply: {first}", f"hook for after-apply: {second}"]
    document = hvmgr.ok("snapshot", "apply", branched, "one", "--dry-run", "--json").json
    assert document["hooks"] == [
        {"event": "before-apply", "path": str(first)},
        {"event": "after-apply", "path": str(second)},
    ]
    assert not place.exists()
    assert logged() == events


def test_operation_that_fails_is_told(hvmgr, vm, told, monkeypatch):
    from hvmgr import errors, model
    from hvmgr.operations.steps import execution

    failed = told("operation-failed")

    def no(_session, _step):
        raise errors.HostFailed("no", hint="try again")

    monkeypatch.setattr(execution, "DO", {**execution.DO, model.plan.Define: no})
    assert hvmgr("snapshot", "create", vm, "one").code == 8
    assert failed()["error"] == {"code": "HostFailed", "message": "no", "hint": "try again"}
    assert failed()["operation"] == "snapshot create"
    assert logged()[-1] == "operation-failed"


def test_images_that_wait_are_told(hvmgr, branched, told, monkeypatch):
    from hvmgr import errors
    from hvmgr.operations.steps import image_steps

    pending, deleted = told("merge-pending"), told("snapshot-deleted")

    def no(*_):
        raise errors.NoSpace("no space left")

    monkeypatch.setattr(image_steps, "_stream", no)
    monkeypatch.setattr(image_steps, "_commit", no)
    image = hvmgr.ok("snapshot", "show", branched, "three", "--json").json["snapshots"][0]["disks"]["vda"]
    assert hvmgr("snapshot", "delete", branched, "three").code == 7
    assert deleted()["snapshots"][0]["name"] == "three"
    assert pending()["images"] == [image]
    assert "operation-failed" not in logged()


def test_interrupted_operation_is_told_by_who_completes_it(hvmgr, vm, told, monkeypatch):
    from hvmgr import errors, model
    from hvmgr.operations.steps import execution

    failed, after = told("operation-failed"), told("snapshot-created")

    def no(_session, _step):
        raise errors.HostFailed("no")

    with monkeypatch.context() as broken:
        broken.setattr(execution, "DO", {**execution.DO, model.plan.WritePresent: no})
        assert hvmgr("snapshot", "create", vm, "one").code == 8
    assert failed()["recovered"] is False
    assert after() is None
    assert hvmgr("snapshot", "list", vm).code == 0
    assert (after()["recovered"], after()["snapshots"][0]["name"]) == (True, "one")


def test_part_of_something_is_no_event_of_its_own(hvmgr, vm, root):
    """What froze a VM for an export is completed: the export is not."""
    from hvmgr.model.plan import Plan
    from hvmgr.storage import journal

    (home,) = root.iterdir()
    before = logged()
    for operation in ("export", "take over"):
        journal.begin(home / ".hvmgr" / "journal", Plan("x", "y", operation, "part"))
        assert "completed the interrupted part" in hvmgr("snapshot", "list", vm).err
    assert logged() == before


def test_threads_do_not_tell_for_each_other(tmp_path):
    import threading

    from hvmgr.operations.occasions import Occasions

    one = Occasions(tmp_path, Reporter())
    with one.gathered():
        depths = []
        thread = threading.Thread(target=lambda: depths.append(one._depth))
        thread.start()
        thread.join(60)
    assert depths == [0]


def test_two_operations_of_one_command_have_two_events(hvmgr, branched):
    count = len(logged())
    hvmgr.ok("snapshot", "apply", branched, "one", "--snapshot-first")
    assert logged()[count:] == ["snapshot-created", "after-apply"]


def test_low_space_is_told(hvmgr, vm, told, monkeypatch):
    low = told("space-low")
    hvmgr.ok("snapshot", "create", vm)
    assert low() is None
    monkeypatch.setattr(settings, "SPACE_LOW", "100%")
    hvmgr.ok("snapshot", "create", vm)
    assert low()["free"] > 0


def test_wrong_configuration_file_undoes_nothing(hvmgr, vm, hooks, tmp_path):
    hook = hooks("snapshot-created", "a", "#!/bin/sh\n")
    (tmp_path / "config" / "hvmgr.yaml").write_text("compress: none\nspace: 5%\n")
    answer = hvmgr("snapshot", "create", vm, "--compress", "zstd")
    assert answer.code == 0
    assert answer.err.startswith(f"warning: the hook {hook} failed: ")
    assert "hvmgr.yaml, line 2: unknown key 'space'" in answer.err


def test_log_that_cannot_be_written_stops_nothing(hvmgr, vm, root):
    folder = settings.index_folder() / "events"
    for one in folder.iterdir():
        one.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    answer = hvmgr("snapshot", "create", vm)
    assert answer.code == 0
    assert "the event snapshot-created is not in the log" in answer.err
