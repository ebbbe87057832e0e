"""Images that a running VM has open are merged by the VM itself: the guest never stops, and no snapshot shows other bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.faces import guest
from hvmgr.host import pids
from hvmgr.host.domain import Domain
from hvmgr.model import configuration, plan, tree
from hvmgr.model.metadata import SnapshotType
from hvmgr.operations import merge
from hvmgr.operations.automatic import acts
from hvmgr.operations.session import Interrupts
from hvmgr.operations.steps import execution, live_images, live_jobs, live_pivot, live_steps
from hvmgr.storage import frozen, images, vm_home
from tests.operations.conftest import Kind

pytestmark = pytest.mark.guest

DISKS = SnapshotType.DISK_ONLY
TICK_S = 60


def write(machine, pattern, offset, length="64k", *, disk=0):
    """What a guest writes, besides its count: a pattern on one of its disks, flushed."""
    device = machine.domain.monitor("query-block")[disk]["qdev"]
    for command in (f"write -P {pattern} {offset} {length}", "flush"):
        answer = machine.domain.monitor("human-monitor-command", command_line=f'qemu-io -d {device} "{command}"')
        assert "rror" not in answer, answer


def shown(path, scratch):
    target = scratch / "shown.raw"
    command = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(path), str(target)]
    subprocess.run(command, check=True, timeout=60)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def contents(machine, scratch):
    """What the disks of each snapshot show."""
    return {
        (one.name, slot): shown(path, scratch) for one in machine.vm.snapshots() for slot, path in one.disks.items()
    }


def require_whole(machine, number_of_images):
    """Nothing waits, nothing is left over, every image is sound, and libvirt's views name what is there."""
    machine.check()
    assert not tree.pending(machine.vm.tree())
    forest = machine.vm.tree().images
    assert len(forest) == number_of_images
    private = machine.layout.private
    files = {str(file) for file in machine.vm.path.rglob("*.qcow2") if not file.is_relative_to(private)}
    assert files == set(forest)
    assert {one.name for one in machine.layout.frozen.iterdir()} <= {Path(path).name for path in forest}
    assert {one.name for one in private.iterdir() if one.is_file()} <= {"lock", "give-way", "reserve"}
    for path in forest:
        if path not in machine.vm.now().disks.values():  # that one changes while it is looked at
            subprocess.run(["qemu-img", "check", "-q", "-U", "-f", "qcow2", path], check=True, timeout=60)
    for path in forest.values():
        assert path.parent is None or not Path(images.read(Path(path.path), images.QCOW2).backing).is_absolute()
    for live in (True, False):
        text = machine.domain.xml(live=live)
        parsed = configuration.parse(text, source="libvirt")
        named = {vm_home.canonical(one.get("file")) for one in parsed.root.findall(".//disk//source[@file]")}
        assert named <= set(forest)


@contextlib.contextmanager
def watched(machine):
    """The guest's ticks meanwhile: it says each count once, one after the other, and never boots."""
    counts, over = [], threading.Event()

    def watch():
        with machine.screen() as screen:
            while not over.is_set():
                tick = screen.next_tick(TICK_S)
                assert tick.ok, tick
                counts.append(tick.memory)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()
    assert counts == list(range(counts[0], counts[0] + len(counts)))


def without(before, *names):
    return {key: value for key, value in before.items() if key[0] not in names}


def test_parent_of_the_present(machine, tmp_path):
    machine.vm.create_snapshot("one", type=DISKS)
    write(machine, 1, "64k")
    machine.vm.create_snapshot("two", type=DISKS)
    write(machine, 2, "64k", "128k")
    before = contents(machine, tmp_path)
    with watched(machine):
        machine.vm.snapshot("two").delete()
    assert contents(machine, tmp_path) == without(before, "two")
    require_whole(machine, 2)
    machine.tick()


def test_little_goes_into_much(machine, tmp_path):
    """The guest goes on in the parent, which nothing else needs, when that is what copies less."""
    machine.vm.create_snapshot("one", type=DISKS)
    write(machine, 1, "64k", "896k")
    machine.vm.create_snapshot("two", type=DISKS)
    write(machine, 2, "128k")
    before = contents(machine, tmp_path)
    parent = machine.vm.snapshot("two").disks["vda"]
    with watched(machine):
        machine.vm.snapshot("two").delete()
    assert machine.vm.now().disks["vda"] == parent
    assert contents(machine, tmp_path) == without(before, "two")
    require_whole(machine, 2)
    late = machine.tick()
    machine.vm.stop(force=True)
    assert machine.held() >= late.disk
    assert Path(parent).stat().st_mode & 0o777 == 0o600


def test_inner_snapshot_and_root(machine, tmp_path):
    for number, name in enumerate(("one", "two", "three", "four"), 1):
        write(machine, number, f"{number * 64}k", "128k")
        machine.vm.create_snapshot(name, type=DISKS)
    before = contents(machine, tmp_path)
    with watched(machine):
        machine.vm.snapshot("two").delete()
        require_whole(machine, 4)
        machine.vm.snapshot("one").delete()
    require_whole(machine, 3)
    assert contents(machine, tmp_path) == without(before, "one", "two")
    late = machine.tick()
    machine.vm.snapshot("three").apply(discard_state=True)
    machine.vm.undo(discard_state=True)
    assert machine.held() >= late.disk
    machine.check()


def test_only_snapshot(machine, tmp_path):
    machine.vm.create_snapshot("one", type=DISKS)
    write(machine, 1, "64k", "512k")
    with watched(machine):
        machine.vm.snapshot("one").delete()
    require_whole(machine, 1)
    assert machine.vm.now().parent is None
    late = machine.tick()
    machine.vm.create_snapshot("again", type=DISKS)
    machine.run_for(2)
    machine.vm.stop(force=True)
    assert machine.held() >= late.disk
    machine.check()
    machine.domain.start(paused=True)
    machine.check()


def test_branches_undo_slot_and_a_paused_guest(make_machine, two_disks, tmp_path):
    """base - one - two - three, two - left - (now); then ``two`` goes, which both stand on, and what that leaves."""
    machine = make_machine(two_disks)
    for number, name in enumerate(("one", "two", "three"), 1):
        for disk in (0, 1):
            write(machine, number + 8 * disk, f"{number * 64}k", "128k", disk=disk)
        machine.vm.create_snapshot(name, type=DISKS if name != "two" else SnapshotType.STANDARD)
    machine.vm.snapshot("two").apply(discard_state=True, keep_undo=False)
    write(machine, 7, "512k")
    machine.vm.create_snapshot("left", type=DISKS)
    write(machine, 8, "576k")
    machine.domain.suspend()
    before = contents(machine, tmp_path)
    machine.vm.snapshot("two").delete()
    assert machine.state() == "paused"
    assert len(tree.unnamed(machine.vm.tree())) == 2  # one of each disk, and two children of each
    machine.vm.snapshot("one").delete()
    assert contents(machine, tmp_path) == without(before, "one", "two")
    require_whole(machine, 2 * 4)  # base (one, two), three, left, now
    machine.vm.snapshot("three").delete()  # it is no more than the others' only child
    assert machine.state() == "paused"
    require_whole(machine, 2 * 2)
    assert contents(machine, tmp_path) == without(before, "one", "two", "three")
    machine.first_tick()
    machine.vm.snapshot("left").apply(discard_state=True)
    machine.check()


# --- while it runs ----------------------------------------------------------------------------------------------------


def waiting(machine, name="one"):
    """A snapshot whose image holds so much that merging it takes a while at ``SLOW``, deleted without that merge."""
    write(machine, 1, "0", "960k")
    machine.vm.create_snapshot(name, type=DISKS)
    write(machine, 2, "0", "128k")
    machine.vm.create_snapshot("two", type=DISKS)
    write(machine, 3, "64k", "384k")
    machine.vm.create_snapshot("three", type=DISKS)
    write(machine, 4, "512k", "448k")  # more than what is below, so that it takes that in


SLOW = 64 << 10


def has_job(machine):
    return machine.domain.has_block_job()


def when(condition, act):
    """Does something as soon as the condition holds, from another thread; call the answer to wait for that."""

    def watch():
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "the moment did not come"
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread.join


def test_stop_leaves_images_waiting_and_a_later_merge_ends_it(machine, tmp_path):
    waiting(machine)
    before = contents(machine, tmp_path)
    told = []
    machine.vm.host.reporter = dataclasses.replace(machine.vm.host.reporter, progress=told.append)
    wait = when(lambda: has_job(machine), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(errors.Cancelled, match="done, but images wait") as failure:
        machine.vm.snapshot("three").delete(bandwidth=SLOW)
    wait()
    assert "snapshot merge" in failure.value.hint
    assert told
    assert told[0].what.startswith("merge ")
    assert not has_job(machine)
    assert [one.name for one in machine.vm.snapshots()] == ["one", "two"]
    assert len(tree.pending(machine.vm.tree())) == 1
    assert contents(machine, tmp_path) == without(before, "three")
    machine.check()
    assert machine.vm.merge()
    require_whole(machine, 3)

    wait = when(lambda: has_job(machine), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(errors.Cancelled):
        machine.vm.snapshot("one").delete(bandwidth=SLOW)  # into the base
    wait()
    machine.check()
    assert contents(machine, tmp_path) == without(before, "one", "three")
    assert machine.vm.merge()
    require_whole(machine, 2)
    assert contents(machine, tmp_path) == without(before, "one", "three")
    machine.tick()


def test_other_commands_are_busy_and_readers_are_not(machine):
    waiting(machine)
    found = []

    def look():
        other = hvmgr.Host.open(machine.host.uri, root=machine.host.root, wait_s=0)
        same = other.vm(machine.vm.name)
        found.extend(one.name for one in same.snapshots())
        for act in (same.create_snapshot, same.merge, same.stop, same.snapshot("two").apply):
            with pytest.raises(errors.Busy, match="another command works on"):
                act()
        assert has_job(machine)
        found.append("all busy")

    wait = when(lambda: has_job(machine), look)
    begun = time.monotonic()
    machine.vm.snapshot("three").delete(bandwidth=SLOW)
    assert time.monotonic() - begun > 2  # some 900 KiB at 64 KiB a second: the limit was kept
    wait()
    assert found == ["one", "two", "all busy"]
    require_whole(machine, 3)


class Died(BaseException):
    """hvmgr is gone: nothing that it would still do is done."""


def die_in_the_middle(machine, monkeypatch, act):
    real = Domain.block_job

    def look(domain, slot):
        if real(domain, slot) is not None:
            raise Died

    with monkeypatch.context() as patched:
        patched.setattr(Domain, "block_job", look)
        with pytest.raises(Died):
            act()
    assert has_job(machine)


def test_job_that_outlives_its_command_is_found(machine, monkeypatch, tmp_path):
    waiting(machine)
    before = contents(machine, tmp_path)
    die_in_the_middle(machine, monkeypatch, lambda: machine.vm.snapshot("two").delete(bandwidth=SLOW))
    assert [one.name for one in machine.vm.snapshots()] == ["one", "three"]  # a reader does not wait for it
    assert has_job(machine)
    assert not machine.said
    with watched(machine):
        assert not machine.vm.merge(bandwidth=1 << 30)  # the interrupted one is all there is to do
    assert any("still merges images for the interrupted deletion of snapshot 'two'" in one for one in machine.said)
    assert any(one.startswith("completed the interrupted deletion") for one in machine.said)
    require_whole(machine, 3)
    assert contents(machine, tmp_path) == without(before, "two")

    die_in_the_middle(machine, monkeypatch, lambda: machine.vm.snapshot("one").delete(bandwidth=SLOW))
    machine.domain.end_block_job("vda")
    assert len(machine.vm.snapshots()) == 1
    assert not has_job(machine)  # it does not begin with what is left to do either
    assert machine.layout.journal.exists()
    machine.domain.destroy()
    machine.vm.snapshots()  # what is open is completed, now that nothing runs
    assert contents(machine, tmp_path) == without(before, "one", "two")
    assert not machine.layout.journal.exists()
    machine.vm.merge()
    assert not tree.pending(machine.vm.tree())
    assert len(machine.vm.tree().images) == 2
    machine.check()


def test_worker_waits_for_a_dead_commands_job_only_until_there_is_other_work(machine, monkeypatch, tmp_path):
    machine.vm.set(automatic_snapshots=True, schedule="hourly", keep="1")
    waiting(machine)
    before = contents(machine, tmp_path)
    die_in_the_middle(machine, monkeypatch, lambda: machine.vm.snapshot("two").delete(bandwidth=SLOW))
    now = datetime.now(UTC)
    for deeds in (
        acts.after_stop(machine.vm, "shutdown", now, now),
        acts.on_schedule(machine.vm, now + timedelta(hours=2)),
    ):
        with pytest.raises(errors.Busy, match="still merges images"):
            list(deeds)
    assert has_job(machine)
    with pytest.raises(errors.Busy, match="there is other work to do"):
        list(acts.merge_waiting(machine.vm, now, lambda: True))
    assert not has_job(machine)
    assert not machine.layout.journal.exists()
    assert len(tree.pending(machine.vm.tree())) == 1
    (deed,) = acts.merge_waiting(machine.vm, now, lambda: False)
    assert deed.action == acts.Action.MERGED
    require_whole(machine, 3)
    assert contents(machine, tmp_path) == without(before, "two")


@pytest.mark.parametrize("name", ["three", "one"])
def test_stop_while_a_left_over_job_is_found_ends_the_job(machine, monkeypatch, tmp_path, name):
    """Nobody would know of it once the journal is closed."""
    waiting(machine)
    before = contents(machine, tmp_path)
    die_in_the_middle(machine, monkeypatch, lambda: machine.vm.snapshot(name).delete(bandwidth=SLOW))
    with monkeypatch.context() as patched:
        patched.setattr(Interrupts, "wanted", True)
        with pytest.raises(errors.Cancelled, match="done, but images wait"):
            machine.vm.merge(bandwidth=SLOW)
    assert not has_job(machine)
    assert not machine.layout.journal.exists()
    machine.check()
    assert contents(machine, tmp_path) == without(before, name)
    assert machine.vm.merge()
    require_whole(machine, 3)
    assert contents(machine, tmp_path) == without(before, name)


def test_others_jobs_and_refusals_leave_images_waiting(machine, monkeypatch, tmp_path):
    waiting(machine)
    before = contents(machine, tmp_path)
    copy = machine.host.root / "copy.qcow2"
    xml = f"<disk type='file'><source file='{copy}'/><driver type='qcow2'/></disk>"
    handle = machine.domain._handle()
    handle.blockCopy("vda", xml, {}, 4)  # VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    machine.vm.snapshot("three").delete()
    assert any("images wait for a later" in one for one in machine.said)
    handle.blockJobAbort("vda", 0)
    assert len(tree.pending(machine.vm.tree())) == 1
    machine.check()

    def deny(*_, **__):
        raise errors.HostFailed("cannot merge: Could not reopen file: Permission denied")

    monkeypatch.setattr(Domain, "start_commit", deny)
    machine.vm.snapshot("one").delete()  # into the base
    assert any("Permission denied" in one and "is off, by 'hvmgr snapshot merge'" in one for one in machine.said)
    forest = machine.vm.tree()
    assert len(tree.pending(forest)) == 1  # what streams up was merged all the same
    assert forest.images[forest.present.disks["vda"]].parent == machine.vm.snapshot("two").disks["vda"]
    machine.check()
    monkeypatch.undo()
    assert machine.vm.merge()
    require_whole(machine, 2)
    assert contents(machine, tmp_path) == without(before, "one", "three")


def test_dry_run_tells_what_the_running_vm_would_do(machine):
    waiting(machine)
    seen = []

    def keep(one):
        seen.append(one)
        return False

    machine.vm.host.reporter = dataclasses.replace(machine.vm.host.reporter, approve=keep, dry_run=True)
    with pytest.raises(errors.Declined):
        machine.vm.snapshot("three").delete()
    assert any(isinstance(step, plan.StreamLive) for step in seen[0].finish)
    assert len(machine.vm.snapshots()) == 3


# --- under load -------------------------------------------------------------------------------------------------------

EVERY = os.environ.get("HVMGR_CRASH") == "all"
BLOCKS = 12
MEMORY = 512 if EVERY else 96
LOAD = Kind(memory=MEMORY << 20, load=f"hvmgr.check={BLOCKS} hvmgr.load={MEMORY * 2 // 5 if EVERY else 4}")


def rounds_on(path, scratch):
    """When the guest wrote each of its blocks; each is what its checksum says, and all are of one moment."""
    target = scratch / "blocks.raw"
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, target], check=True, timeout=60)
    with target.open("rb") as file:
        file.seek(guest.BLOCKS_OFFSET)
        return guest.block_rounds(file.read(BLOCKS * guest.BLOCK_SIZE))


def test_many_snapshots_under_load_half_of_them_deleted_in_any_order(make_machine, tmp_path):
    """The guest rewrites memory, and blocks with checksums, which it reads back itself.

    With HVMGR_CRASH=all it is a hundred snapshots, some with its memory, and hundreds of MiB of that.
    """
    machine = make_machine(LOAD)
    count, step = (100, 10) if EVERY else (8, 4)
    chance, wanted, states = random.Random(7), {}, set()
    with watched(machine):
        for number in range(count):
            has_memory = number % step == 2
            made = machine.vm.create_snapshot(str(number), type=SnapshotType.STANDARD if has_memory else DISKS)
            states |= {made.name} if has_memory else set()
            wanted[made.name, "vda"] = shown(made.disks["vda"], tmp_path)
            rounds_on(made.disks["vda"], tmp_path)
            if number % 2:
                gone = chance.choice([name for name, _ in wanted if name not in states])
                machine.vm.snapshot(gone).delete()
                del wanted[gone, "vda"]
            if number % step == step - 1:
                assert contents(machine, tmp_path) == wanted
    assert len(wanted) == count // 2
    require_whole(machine, 1 + len(wanted))
    assert (
        len({rounds_on(one.disks["vda"], tmp_path)[0] for one in machine.vm.snapshots()}) > 1
    )  # it wrote all the while
    for name in sorted(states, key=int)[:3]:
        count = machine.count_of(machine.vm.snapshot(name))
        machine.vm.snapshot(name).apply(discard_state=True, keep_undo=False)
        assert machine.tick().memory > count
        machine.run_for(10)  # it finds its blocks as this memory has written them
    late = machine.run_for(1)
    assert contents(machine, tmp_path) == wanted
    machine.domain.suspend()
    for place in (0, BLOCKS - 1):  # one of them it may have read already, and write before it reads it again
        write(machine, 0, f"{guest.BLOCKS_OFFSET + place * guest.BLOCK_SIZE}", "4k")
    with machine.screen() as screen:  # and says so when they are not
        machine.domain.resume()
        assert any(not screen.next_tick(TICK_S).ok for _ in range(500))
    machine.vm.stop(force=True)
    assert machine.held() >= late.disk
    assert contents(machine, tmp_path) == wanted


# --- deaths that leave something for the next command -----------------------------------------------------------------


def test_power_cut_between_header_and_data(machine, monkeypatch, tmp_path):
    """What QEMU says of a merge came to the disk, what it merged did not."""
    waiting(machine)
    before = contents(machine, tmp_path)
    machine.domain.suspend()
    write(machine, 9, "512k")
    working = Path(machine.vm.now().disks["vda"])
    old, showed = working.read_bytes(), shown(working, tmp_path)

    def die(*_):
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(live_steps, "_holds_all", die)
        with pytest.raises(Died):
            machine.vm.snapshot("three").delete()
    machine.domain.destroy()
    below = images.read(working, images.QCOW2).backing
    working.write_bytes(old)
    subprocess.run(["qemu-img", "rebase", "-u", "-b", below, "-F", "qcow2", working], check=True, timeout=60)
    assert shown(working, tmp_path) != showed

    machine.domain.start(paused=True)  # no hook kept libvirt from it
    with pytest.raises(errors.Conflict, match="does not hold all data") as failure:
        machine.vm.merge()
    assert "virsh destroy" in failure.value.hint
    machine.domain.destroy()
    machine.vm.snapshots()
    assert any("is taken back" in one for one in machine.said)
    assert shown(working, tmp_path) == showed
    assert contents(machine, tmp_path) == without(before, "three")
    assert machine.vm.merge()
    machine.domain.start(paused=True)
    require_whole(machine, 3)
    assert shown(working, tmp_path) == showed


def test_error_after_the_pivot_closes_no_journal(machine, monkeypatch):
    machine.vm.create_snapshot("one", type=DISKS)
    late = machine.tick()
    with monkeypatch.context() as patched:
        patched.setattr(live_pivot, "require_path", full)
        with pytest.raises(errors.OutcomeUnknown, match="no space left to say so"):
            machine.vm.snapshot("one").delete()
    assert machine.layout.journal.exists()
    with monkeypatch.context() as patched:  # nor does a wish to stop, in the command that finds it
        patched.setattr(Interrupts, "wanted", True)
        machine.vm.merge()
    assert not machine.layout.journal.exists()
    assert machine.state() == "running"
    assert machine.tick().memory > late.memory
    require_whole(machine, 1)


def test_error_before_a_left_over_job_is_followed_ends_it(machine, monkeypatch):
    machine.vm.create_snapshot("one", type=DISKS)
    write(machine, 1, "64k", "896k")
    die_in_the_middle(machine, monkeypatch, lambda: machine.vm.snapshot("one").delete(bandwidth=SLOW))
    with monkeypatch.context() as patched:
        patched.setattr(frozen, "make_writable", full)
        with pytest.raises(errors.NoSpace, match="images wait to be merged"):
            machine.vm.merge()
    assert not has_job(machine)
    machine.check()
    assert machine.vm.merge()
    require_whole(machine, 1)


@pytest.mark.parametrize("moment", ["before the pivot", "after the pivot"])
def test_guest_that_stands_still_for_a_pivot_is_not_forgotten(machine, monkeypatch, moment):
    machine.vm.create_snapshot("one", type=DISKS)
    late = machine.tick()

    def die(*_, **__):
        raise Died

    with monkeypatch.context() as patched:
        owner, name = (Domain, "end_block_job") if moment == "before the pivot" else (live_pivot, "require_path")
        patched.setattr(owner, name, die)
        with pytest.raises(Died):
            machine.vm.snapshot("one").delete()
    assert machine.state() == "paused"
    assert not machine.vm.merge()  # the interrupted one is all that there was
    assert machine.state() == "running"
    assert machine.tick().memory > late.memory
    require_whole(machine, 1)


@pytest.mark.parametrize("after", ["the next command", "virsh resume", "another start", "a refused pivot"])
def test_guest_that_cannot_go_on_yet_is_not_forgotten(machine, monkeypatch, after):
    machine.vm.create_snapshot("one", type=DISKS)
    late = machine.tick()

    def refuse(*_):
        raise errors.HostFailed("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(Domain, "resume", refuse)
        if after == "a refused pivot":
            real = Domain.end_block_job
            patched.setattr(Domain, "end_block_job", lambda *args, pivot=False: (refuse if pivot else real)(*args))
        for act in (machine.vm.snapshot("one").delete, machine.vm.merge):
            with pytest.raises(errors.OutcomeUnknown, match="stands still for a merge") as failure:
                act()
            assert "virsh resume" in failure.value.hint
            assert machine.layout.journal.exists()
    assert machine.state() == "paused"
    if after == "virsh resume":
        machine.domain.resume()
        assert machine.tick().memory > late.memory
    elif after == "another start":
        machine.domain.destroy()
        machine.domain.start(paused=True)
    machine.vm.merge()
    require_whole(machine, 1)
    if after == "another start":
        assert machine.state() == "paused", "whoever started it wants it so"
    else:
        assert machine.state() == "running"
        assert machine.tick().memory > late.memory


def test_end_of_the_vm_just_after_it_went_on_in_the_parent(machine, monkeypatch):
    """What QEMU had open cannot be asked any more; libvirt's configuration says where the guest was."""
    machine.vm.create_snapshot("one", type=DISKS)
    late = machine.tick()
    real, ask = live_steps._has_gone_on, Domain.writable_files
    with monkeypatch.context() as patched:

        def end(domain):
            patched.setattr(Domain, "writable_files", ask)
            domain.destroy()
            return domain.writable_files()

        def has_gone_on(*arguments):
            patched.setattr(Domain, "writable_files", end)
            return real(*arguments)

        patched.setattr(live_steps, "_has_gone_on", has_gone_on)
        machine.vm.snapshot("one").delete()
    assert machine.state() == "off"
    assert not any("ended before" in one for one in machine.said)
    machine.vm.merge()
    require_whole(machine, 1)
    assert machine.held() >= late.disk


def test_end_of_the_vm_just_before_a_job_begins(machine, monkeypatch, tmp_path):
    """libvirt knows no chain of a VM that is off."""
    machine.vm.create_snapshot("one", type=DISKS)
    machine.vm.create_snapshot("two", type=DISKS)
    machine.tick()
    before, real = contents(machine, tmp_path), live_images.links

    def end(domain, slot):
        domain.destroy()
        return real(domain, slot)

    with monkeypatch.context() as patched:
        patched.setattr(live_images, "links", end)
        machine.vm.snapshot("two").delete()
    assert machine.state() == "off"
    assert contents(machine, tmp_path) == without(before, "two")
    require_whole(machine, 2)


def test_guest_that_its_user_has_paused_stays_so(machine):
    machine.vm.create_snapshot("one", type=DISKS)
    machine.tick()
    machine.domain.suspend()
    for note in (b"", f"{os.getpid()} {pids.start_time(os.getpid())}\n".encode()):  # there is no journal
        (machine.layout.private / "stopped").write_bytes(note)
        machine.vm.merge()
        assert not (machine.layout.private / "stopped").exists()
        assert machine.state() == "paused"
    machine.vm.snapshot("one").delete()
    assert machine.state() == "paused"
    require_whole(machine, 1)


def test_reader_waits_for_no_job_of_a_dead_command(machine, monkeypatch):
    def die(*_):
        raise Died

    with monkeypatch.context() as patched:
        patched.setitem(execution.DO, plan.SwitchDisks, die)
        patched.setattr(execution, "_go_back", die)
        with pytest.raises(Died):
            machine.vm.create_snapshot("one", type=DISKS)
    with monkeypatch.context() as patched:
        patched.setattr(Domain, "has_job", lambda *_, **__: True)
        assert not machine.vm.snapshots()
    assert machine.layout.journal.exists()
    assert not machine.vm.snapshots()
    assert not machine.layout.journal.exists()
    require_whole(machine, 1)


def test_pivot_that_is_refused_leaves_the_guest_where_it_was(machine, monkeypatch):
    machine.vm.create_snapshot("one", type=DISKS)
    real = Domain.end_block_job

    def refuse(domain, slot, *, pivot=False):
        if pivot:
            raise errors.HostFailed("libvirt refused")
        real(domain, slot)

    with monkeypatch.context() as patched:
        patched.setattr(Domain, "end_block_job", refuse)
        with pytest.raises(errors.HostFailed, match="images wait to be merged"):
            machine.vm.snapshot("one").delete()
    assert machine.state() == "running"
    assert not has_job(machine)
    machine.tick()
    machine.check()
    assert machine.vm.merge()
    require_whole(machine, 1)


def full(*_, **__):
    raise errors.NoSpace("no space left to say so")


@pytest.mark.parametrize("moment", ["while the job runs", "before the guest is stopped"])
def test_failure_ends_the_job(machine, monkeypatch, moment):
    machine.vm.create_snapshot("one", type=DISKS)
    with monkeypatch.context() as patched:
        if moment == "while the job runs":
            patched.setattr(live_jobs, "follow", full)
        else:
            patched.setattr(Domain, "suspend", full)
        with pytest.raises(errors.NoSpace, match="images wait to be merged"):
            machine.vm.snapshot("one").delete()
    assert not has_job(machine)
    assert not machine.layout.journal.exists()
    machine.tick()
    machine.check()
    assert machine.vm.merge()
    require_whole(machine, 1)


def test_job_that_cannot_be_ended_is_not_forgotten(machine, monkeypatch):
    machine.vm.create_snapshot("one", type=DISKS)
    late = machine.tick()
    with monkeypatch.context() as patched:
        patched.setattr(Domain, "end_block_job", full)
        with pytest.raises(errors.OutcomeUnknown, match="could not be ended"):
            machine.vm.snapshot("one").delete()
    assert has_job(machine)
    assert machine.state() == "paused"
    assert machine.layout.journal.exists()
    machine.vm.snapshots()  # a reader does not leave the guest standing
    assert machine.state() == "running"
    assert machine.tick().memory > late.memory
    require_whole(machine, 1)


def test_pivot_that_is_done_although_it_failed_counts(machine, monkeypatch):
    machine.vm.create_snapshot("one", type=DISKS)
    real = Domain.end_block_job

    def fail(domain, slot, *, pivot=False):
        real(domain, slot, pivot=pivot)
        raise errors.HostFailed("libvirt did not answer")

    with monkeypatch.context() as patched:
        patched.setattr(Domain, "end_block_job", fail)
        machine.vm.snapshot("one").delete()
    machine.tick()
    require_whole(machine, 1)


def test_image_that_somebody_changed_is_not_written(machine, tmp_path):
    for number, name in enumerate(("one", "two", "three", "four"), 1):
        write(machine, number, f"{number * 64}k", "128k")
        machine.vm.create_snapshot(name, type=DISKS)
    before = contents(machine, tmp_path)
    (above,) = machine.vm.snapshot("four").disks.values()
    os.utime(above, (1, 1))
    showed = Path(above).read_bytes()
    machine.vm.snapshot("two").delete()  # "three" would go into it, and "four" would have to say so
    assert any(f"{above} was changed after it was frozen" in one for one in machine.said)
    assert Path(above).read_bytes() == showed
    assert len(tree.pending(machine.vm.tree())) == 1
    assert contents(machine, tmp_path) == without(before, "two")
    machine.tick()


def test_deletion_needs_no_space_for_what_can_wait(machine, monkeypatch, tmp_path):
    waiting(machine)
    before = contents(machine, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(merge.os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096, f_blocks=1))
        machine.vm.snapshot("three").delete()
    assert any("wait for a later" in one and "there are 4.0 KiB free" in one for one in machine.said), machine.said
    assert len(tree.pending(machine.vm.tree())) == 1
    assert contents(machine, tmp_path) == without(before, "three")
    assert machine.vm.merge()
    require_whole(machine, 3)
    assert contents(machine, tmp_path) == without(before, "three")


def test_export_is_complete_although_nothing_can_be_merged(machine, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr(merge, "_require_space", full)
        folder = machine.vm.export(tmp_path)
    assert machine.host.verify(folder) == []
    assert "the export is complete; no space left to say so" in machine.said
    assert len(tree.pending(machine.vm.tree())) == 1
    assert machine.vm.merge()
    require_whole(machine, 1)


def test_images_of_different_sizes(machine, tmp_path):
    """A shorter parent grows while the VM runs, with zeros over what it hid; QEMU makes none shorter."""
    write(machine, 9, "1984k")  # the end of the base, that a shorter image hides
    machine.vm.create_snapshot("one", type=DISKS)
    machine.vm.stop(force=True)
    machine.vm.resize_disk("vda", 1536 << 10, shrink=True)
    machine.vm.create_snapshot("short", type=DISKS)
    machine.vm.resize_disk("vda", 2 << 20)
    machine.vm.create_snapshot("two", type=DISKS)
    machine.vm.resize_disk("vda", 4 << 20)
    machine.vm.create_snapshot("three", type=DISKS)
    machine.domain.start(paused=True)  # its images are open, which is all that counts here
    before = contents(machine, tmp_path)
    machine.vm.snapshot("short").delete()
    require_whole(machine, 4)
    assert contents(machine, tmp_path) == without(before, "short")
    machine.vm.snapshot("one").delete()
    require_whole(machine, 3)
    machine.vm.snapshot("two").delete()
    require_whole(machine, 2)
    assert contents(machine, tmp_path) == without(before, "one", "short", "two")

    machine.vm.stop(force=True)
    machine.vm.create_snapshot("four", type=DISKS)
    machine.vm.resize_disk("vda", 2 << 20, shrink=True)
    machine.vm.create_snapshot("five", type=DISKS)
    machine.domain.start(paused=True)
    before = contents(machine, tmp_path)
    machine.vm.snapshot("four").delete()
    assert sum("the latter is shorter" in one for one in machine.said) == 1
    assert len(tree.pending(machine.vm.tree())) == 1
    machine.check()
    machine.vm.stop(force=True)
    assert machine.vm.merge()
    assert not tree.pending(machine.vm.tree())
    assert contents(machine, tmp_path) == without(before, "four")
    machine.check()


def test_where_a_commit_is_denied_the_guests_image_takes_in_what_it_can(machine, monkeypatch, tmp_path):
    machine.vm.create_snapshot("one", type=DISKS)
    write(machine, 1, "64k", "896k")
    machine.vm.create_snapshot("two", type=DISKS)
    write(machine, 2, "128k")
    before = contents(machine, tmp_path)

    def deny(*_, **__):
        raise errors.HostFailed("cannot merge: Could not reopen file: Permission denied")

    monkeypatch.setattr(Domain, "start_commit", deny)
    machine.vm.snapshot("two").delete()
    assert any("Permission denied: images are merged upwards instead" in one for one in machine.said)
    require_whole(machine, 2)
    assert contents(machine, tmp_path) == without(before, "two")
    machine.tick()


# --- several disks ----------------------------------------------------------------------------------------------------


def test_disks_go_on_in_their_parents_together_or_not_at_all(make_machine, two_disks, monkeypatch, tmp_path):
    """Both stand still once, when both jobs are ready; a refusal of the first leaves both, one of the second the second."""
    machine = make_machine(two_disks)
    machine.vm.create_snapshot("one", type=DISKS)
    for disk in (0, 1):
        write(machine, 1 + disk, "64k", "512k", disk=disk)
    acts, real = [], Domain.end_block_job

    def refuse(number):
        def end(domain, slot, *, pivot=False):
            if pivot:
                acts.append((slot, str(domain.state())))
                if len(acts) == number:
                    raise errors.HostFailed("libvirt refused")
            real(domain, slot, pivot=pivot)

        return end

    working = dict(machine.vm.now().disks)
    with monkeypatch.context() as patched:
        patched.setattr(Domain, "end_block_job", refuse(1))
        with pytest.raises(errors.HostFailed, match="images wait to be merged"):
            machine.vm.snapshot("one").delete()
    assert [state for _, state in acts] == ["paused"]
    assert machine.vm.now().disks == working
    assert not has_job(machine)
    assert machine.state() == "running"
    machine.check()
    machine.tick()

    acts.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Domain, "end_block_job", refuse(2))
        with pytest.raises(errors.HostFailed, match="images wait to be merged"):
            machine.vm.merge()
    assert [state for _, state in acts] == ["paused", "paused"]
    assert [machine.vm.now().disks[slot] == working[slot] for slot, _ in acts] == [False, True]
    assert not has_job(machine)
    assert len(tree.pending(machine.vm.tree())) == 1
    machine.check()
    machine.tick()
    assert machine.vm.merge()
    require_whole(machine, 2)

    machine.vm.create_snapshot("again", type=DISKS)
    acts.clear()
    with monkeypatch.context() as patched, watched(machine):
        patched.setattr(Domain, "end_block_job", refuse(0))
        machine.vm.snapshot("again").delete()
    assert sorted(acts) == [("vda", "paused"), ("vdb", "paused")]
    require_whole(machine, 2)
    late = machine.tick()
    machine.vm.stop(force=True)
    assert machine.held() >= late.disk


@pytest.mark.parametrize("moment", ["before the second job", "before the second pivot", "before the names are changed"])
def test_death_between_two_disks_is_made_good(make_machine, two_disks, monkeypatch, moment):
    machine = make_machine(two_disks)
    machine.vm.create_snapshot("one", type=DISKS)
    late = machine.tick()
    owner, name = {
        "before the second job": (Domain, "start_commit"),
        "before the second pivot": (Domain, "end_block_job"),
        "before the names are changed": (live_steps, "_go_by_the_parent"),
    }[moment]
    real, calls = getattr(owner, name), []

    def die(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            raise Died
        return real(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, die)
        with pytest.raises(Died):
            machine.vm.snapshot("one").delete()
    assert not machine.vm.merge()  # the interrupted one is all that there was
    assert machine.state() == "running"
    assert machine.tick().memory > late.memory
    require_whole(machine, 2)
