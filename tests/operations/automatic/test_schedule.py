"""What is done when its time has come: real homes and images of VMs that are off, on the embedded driver."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

import hvmgr
from hvmgr.model import plan
from hvmgr.model.policy import Origin
from hvmgr.operations.automatic import acts, worker
from hvmgr.operations.automatic.worker import Action
from hvmgr.operations.exchange.importing import CloneOptions
from hvmgr.storage import diary, journal, start_guard, vm_home

HOURLY = {"automatic_snapshots": True, "schedule": "hourly", "keep": "2"}


@pytest.fixture
def folder():
    place = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def host(connection, folder):
    with hvmgr.Host.open(connection.uri, root=folder / "homes", wait_s=60) as one:
        yield one


def make(host, name="web", **wishes):
    disks = (hvmgr.DiskSpecification(size=1 << 20),)
    one = host.create_vm(
        hvmgr.Specification(name=name, template="generation1", accel="tcg", memory=64 << 20, networks=(), disks=disks)
    )
    if wishes:
        one.set(**wishes)
    return one


def write(vm, pattern):
    (image,) = vm.now().disks.values()
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 256k 128k", image]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def holds(path, pattern):
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} 256k 128k", str(path)]
    return b"failed" not in subprocess.run(command, check=False, capture_output=True, timeout=60).stdout


def work(**wishes):
    said = []
    outcome = worker.run(hvmgr.Reporter(notice=said.append, **wishes), wait_s=0)
    return outcome, said


def done(outcome):
    return sorted((deed.name, str(deed.action)) for deed in outcome.done)


# --- the schedule ---------------------------------------------------------------------------------------------------


def test_turn_takes_what_was_written_and_keeps_as_many_as_wanted(host, ahead, tmp_path, monkeypatch):
    vm = make(host, **HOURLY)
    assert done(work()[0]) == []  # the schedule has just begun
    for number in range(1, 5):
        write(vm, number)
        if number == 2:
            vm.create_snapshot("mine")
            write(vm, 20)
        ahead(3 * number)
        outcome, _ = work()
        assert (outcome.failed, outcome.put_off) == ([], [])
        assert ("web", Action.SNAPSHOT) in done(outcome)
        ahead(3 * number + 1.5)
        assert work()[0].done == []  # nothing was written since
    mine, *scheduled = vm.snapshots()
    assert mine.name == "mine"
    assert [one.automatic for one in scheduled] == [Origin.SCHEDULE] * 2
    assert all(one.name.startswith("web scheduled (") for one in scheduled)
    for snapshot, pattern in zip([mine, *scheduled], (2, 3, 4), strict=True):
        assert holds(*snapshot.disks.values(), pattern)
    assert len(vm.tree().images) == 4  # what stood between them is merged
    monkeypatch.setenv("HVMGR_CONFIG", str(tmp_path))
    (tmp_path / "hvmgr.yaml").write_text("retention: last=1\n")
    assert work()[0].done == []  # the VM's own word comes before the host's file
    assert vm.set(keep="default")
    assert ("web", Action.DELETED) in done(work()[0])
    assert [one.id for one in vm.snapshots()] == [mine.id, scheduled[-1].id]
    vm.set(automatic_snapshots=False)
    ahead(100)
    assert work()[0].done == []


def test_snapshot_that_somebody_named_is_his(host, ahead):
    vm = make(host, **(HOURLY | {"keep": "1"}))
    for number in range(1, 4):
        write(vm, number)
        ahead(2 * number)
        work()
        if number == 1:
            vm.snapshots()[0].rename("the good one")
    assert [one.automatic for one in vm.snapshots()] == [None, Origin.SCHEDULE]
    assert holds(*vm.snapshots()[0].disks.values(), 1)


def test_what_somebody_put_away_lately_stays(host, ahead):
    vm = make(host, **HOURLY)
    write(vm, 1)
    vm.create_snapshot("one")
    write(vm, 2)
    vm.snapshot("one").apply()
    write(vm, 3)
    ahead(2)
    outcome, _ = work()
    assert [(name, error.code) for name, error in outcome.put_off] == [("web", "Busy")]
    assert vm.can_undo()
    ahead(25)
    assert done(work()[0]) == [("web", Action.SNAPSHOT)]


def test_dry_run_shows_and_changes_nothing(host, ahead):
    vm = make(host, **HOURLY)
    ahead(2)
    shown = []
    outcome, _ = work(dry_run=True, approve=lambda one: shown.append(one.subject))
    assert (outcome.done, outcome.failed, outcome.put_off) == ([], [], [])
    assert len(shown) == 1
    assert shown[0].startswith("creation of snapshot 'web scheduled (")
    assert vm.snapshots() == []
    assert not vm.home.layout.diary.exists()


def test_long_chain_gets_no_longer_by_itself(host, ahead, monkeypatch):
    monkeypatch.setattr(acts, "DEPTH_MAX", 2)
    vm = make(host, **(HOURLY | {"keep": "9"}))
    for number in range(1, 5):
        write(vm, number)
        ahead(2 * number)
        outcome, _ = work()
    ((_, error),) = outcome.failed
    assert "stand on chains of 3 images: no more are added automatically" in error.message
    assert len(vm.snapshots()) == 2


def test_merge_gives_way_to_others_and_goes_on_later(host, ahead, at_step):
    vm = make(host, **(HOURLY | {"keep": "1"}))
    for number in (1, 2):
        write(vm, number)
        ahead(3 * number)
        if number == 2:
            for step in (plan.MergeUp, plan.MergeDown):  # whichever way is the cheaper one
                at_step(step, before=vm.home.ask_to_give_way)
        outcome, _ = work()
    assert done(outcome) == [("web", Action.SNAPSHOT), ("web", Action.DELETED)]
    ((_, error),) = outcome.put_off
    assert "there is other work to do" in error.message
    assert len(vm.tree().images) == 3
    with vm.home.locked(wait_s=0):
        assert not vm.home.layout.give_way.exists()
    assert done(work()[0]) == [("web", Action.MERGED)]
    assert len(vm.tree().images) == 2
    assert holds(*vm.snapshots()[0].disks.values(), 2)


def test_who_waits_asks_the_other_to_give_way(host):
    vm = make(host)
    home = vm.home
    with home.locked(wait_s=0):
        assert not home.layout.give_way.exists()
        with pytest.raises(hvmgr.errors.Busy), home.locked(wait_s=0):
            pass
        assert home.layout.give_way.exists()
        home.layout.give_way.unlink()
        one = plan.Plan(plan_id="x", vm_id=vm.id, operation="o", subject="work on web")
        journal.begin(home.layout.journal, one)
        (finding,) = start_guard.examine(home.present())
        assert finding.code == "operation-running"
        assert home.layout.give_way.exists()
    home.layout.journal.unlink()


def test_who_waits_asks_whoever_has_it_next_as_well(host):
    home = make(host).home

    def wait():
        with home.locked(wait_s=120):
            pass

    thread = threading.Thread(target=wait)
    with home.locked(wait_s=0):
        thread.start()
        until(home.layout.give_way.exists)
        home.layout.give_way.unlink()  # as the next one does that has the lock
        until(home.layout.give_way.exists)
    thread.join(60)
    assert not home.layout.give_way.exists()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"scheduled": 7}', '{"recoveries": ["yesterday"]}'])
def test_diary_that_cannot_be_read_counts_for_nothing(host, text):
    vm = make(host, **HOURLY)
    vm.home.layout.diary.write_text(text)
    assert diary.read(vm.home.layout) == diary.Diary()
    assert work()[0].failed == []


# --- many VMs -------------------------------------------------------------------------------------------------------


def test_trouble_with_one_vm_holds_up_no_other(host, ahead, monkeypatch):
    vms = {name: make(host, name, **HOURLY) for name in ("broken", "busy", "dead", "defect", "fine", "gone", "ok")}
    vms["broken"].home.layout.configuration.write_text("<domain>")
    shutil.rmtree(vms["gone"].path)
    open_home, dead = vm_home.open_home, vms["dead"].path
    monkeypatch.setattr(worker, "_ANSWER_S", 3.0)  # the others answer in this time on a busy machine, too
    end = threading.Event()
    monkeypatch.setattr(
        vm_home, "open_home", lambda path: open_home(path) if Path(path) != dead else (end.wait(60) and None)
    )
    on_schedule, defect = acts.on_schedule, vms["defect"].id
    monkeypatch.setattr(acts, "on_schedule", lambda one, now: 1 / 0 if one.id == defect else on_schedule(one, now))
    ahead(2)
    with vms["busy"].home.locked(wait_s=5):
        outcome, _ = work()
    assert done(outcome) == [("fine", Action.SNAPSHOT), ("ok", Action.SNAPSHOT)]
    failed = dict(outcome.failed)
    assert sorted(failed) == ["broken", "dead", "defect"]
    assert failed["broken"].code == "Corrupt"
    assert "does not answer" in failed["dead"].message
    assert "a defect in hvmgr: ZeroDivisionError" in failed["defect"].message
    assert [(name, error.code) for name, error in outcome.put_off] == [("busy", "Busy")]
    assert done(work()[0]) == [("busy", Action.SNAPSHOT)]
    end.set()


def test_full_disk_leaves_the_vm_as_it_was(host, folder, ahead):
    place = folder / "small"
    place.mkdir(mode=0o711)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0711", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        disks = (hvmgr.DiskSpecification(size=1 << 20),)
        vm = host.create_vm(
            hvmgr.Specification(
                name="small", home=place / "small", template="generation1", accel="tcg", memory=64 << 20, networks=(),
                disks=disks,
            )
        )  # fmt: skip
        vm.set(**HOURLY)
        write(vm, 5)
        make(host, "zoo", **HOURLY)
        with contextlib.suppress(OSError), open(place / "filler", "wb") as filler:
            filler.write(bytes(8 << 20))
        ahead(2)
        outcome, _ = work()
        assert [(name, error.code) for name, error in outcome.failed] == [("small", "NoSpace")]
        assert done(outcome) == [("zoo", Action.SNAPSHOT)]
        assert vm.snapshots() == []
        assert holds(*vm.now().disks.values(), 5)
        os.unlink(place / "filler")
        assert done(work()[0]) == [("small", Action.SNAPSHOT)]
        assert holds(*vm.snapshots()[0].disks.values(), 5)
    finally:
        host.connection.find_domain_by_name("small").undefine(keep_nvram=False, keep_tpm=False)
        subprocess.run(["umount", str(place)], check=True)


def test_one_worker_at_a_time(host, ahead):
    vm = make(host, **HOURLY)
    ahead(2)
    second = []

    def tell(_deed):
        with pytest.raises(hvmgr.errors.Busy, match="what hvmgr does by itself"):
            worker.run(hvmgr.Reporter(), wait_s=0)
        second.append("refused")

    worker.run(hvmgr.Reporter(), wait_s=0, on_deed=tell)
    assert second == ["refused"]
    assert len(vm.snapshots()) == 1


@pytest.mark.parametrize("step", [plan.CreateImage, plan.Define, plan.WriteSnapshot], ids=lambda one: one.__name__)
def test_worker_that_is_killed_takes_it_the_next_time(host, ahead, kill_at, run_and_die, step):
    vm = make(host, **HOURLY)
    write(vm, 5)
    ahead(2)
    kill_at(step)
    run_and_die(work)
    work()
    (taken,) = vm.snapshots()
    assert (taken.automatic, holds(*taken.disks.values(), 5)) == (Origin.SCHEDULE, True)
    ahead(2.5)
    assert work()[0].done == []


# --- the policy -----------------------------------------------------------------------------------------------------


def test_policy_stays_with_the_vm_whatever_happens_to_it(host, folder):
    vm = make(host)
    assert vm.policy == hvmgr.Policy()
    before = vm.create_snapshot("before")
    assert vm.set(**HOURLY, snapshot_type="production", recovery="revert:before")
    assert not vm.set(**HOURLY)
    wanted = vm.policy
    assert wanted.recovery.snapshot == before.id
    before.apply()
    assert vm.policy == wanted
    vm.undo()
    assert vm.policy == wanted
    vm.rename("www")
    assert vm.policy == wanted
    copy = vm.clone("copy")
    assert copy.policy == dataclasses.replace(wanted, recovery=copy.policy.recovery)
    assert copy.policy.recovery.snapshot == copy.snapshot("before").id != before.id
    alone = vm.clone("alone", CloneOptions(without_snapshots=True))
    assert alone.policy == dataclasses.replace(wanted, recovery=None)
    exported = vm.export(folder / "export")
    vm.delete(with_disks=True)
    again = host.import_vm(exported, hvmgr.ImportOptions(new_id=False))
    assert again.policy == wanted


def test_snapshots_are_what_the_policy_says(host):
    vm = make(host, snapshot_type="disabled")
    with pytest.raises(hvmgr.errors.Conflict, match="snapshots of web are disabled"):
        vm.create_snapshot("one")
    vm.create_snapshot("two", type=hvmgr.SnapshotType.DISK_ONLY)
    vm.set(snapshot_type="standard")
    assert vm.create_snapshot("three").type is hvmgr.SnapshotType.STANDARD
    assert [one.automatic for one in vm.snapshots()] == [None, None]


@pytest.mark.parametrize(
    ("wishes", "kind"),
    [
        ({"snapshot_type": "disk-only"}, hvmgr.errors.UsageError),
        ({"keep": "none"}, hvmgr.errors.UsageError),
        ({"schedule": "often"}, hvmgr.errors.UsageError),
        ({"recovery": "restart"}, hvmgr.errors.UsageError),
        ({"recovery": "revert:"}, hvmgr.errors.UsageError),
        ({"recovery": "revert:nowhere"}, hvmgr.errors.NotFound),
    ],
    ids=str,
)
def test_wrong_wishes_change_nothing(host, wishes, kind):
    vm = make(host)
    before = vm.home.layout.configuration.read_bytes()
    with pytest.raises(kind):
        vm.set(automatic_snapshots=True, **wishes)
    assert vm.home.layout.configuration.read_bytes() == before


def test_policy_that_is_not_understood_asks_for_nothing_and_stays(host, ahead):
    vm = make(host, **HOURLY)
    path = vm.home.layout.configuration
    text = path.read_text()
    path.write_text(text.replace('schedule="hourly"', 'schedule="often"'))
    assert vm.policy == hvmgr.Policy(understood=False)
    facts = vm.home.present()
    facts.set_metadata(dataclasses.replace(facts.metadata(), owner="anna"))
    assert 'schedule="often"' in facts.to_xml()
    ahead(2)
    assert work()[0] == worker.Outcome()
    path.write_text(text.replace('schedule="hourly"', 'schedule="hourly" colour="blue"'))
    facts = vm.home.present()
    facts.set_metadata(dataclasses.replace(facts.metadata(), policy=hvmgr.Policy()))
    assert 'colour="blue"' in facts.to_xml()
    assert "hourly" not in facts.to_xml()
