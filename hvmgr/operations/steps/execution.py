"""Running a plan through the journal, and what the next command does about one that was cut off.

| cut off                  | what the next command finds                | what it does                  |
|--------------------------|--------------------------------------------|-------------------------------|
| before the journal       | nothing                                    | nothing                       |
| while preparing          | journal without ``switch``                 | undoes, last step first       |
| at the switch            | journal with ``switch``; asks libvirt/QEMU | undoes or completes           |
| after the VM went on     | it has written to the new images           | defines them, then completes  |
| while finishing          | the same, the switch happened              | does all finishing steps again|
| at the end               | nothing, or an empty trash                 | nothing                       |
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import memory_plan, plan
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import occasions, resting_guest
from hvmgr.operations.exchange import import_steps, move_steps, vhd_steps
from hvmgr.operations.session import Session
from hvmgr.operations.steps import (
    domain_steps,
    file_steps,
    guest_steps,
    image_steps,
    live_steps,
    memory_steps,
    put_steps,
    resize_steps,
    transfer_steps,
)
from hvmgr.storage import durable, journal, reserve

_Act = Callable[[Session, Any], None]

DO: Mapping[type[Step], _Act] = {
    plan.CreateImage: image_steps.create,
    plan.ResizeDisk: resize_steps.resize,
    plan.FreezeImage: image_steps.freeze,
    plan.ThawImage: image_steps.thaw,
    plan.MergeUp: image_steps.merge_up,
    plan.MergeDown: image_steps.merge_down,
    plan.StreamLive: live_steps.stream,
    plan.CommitLive: live_steps.commit,
    plan.CommitTogether: live_steps.together,
    plan.Flatten: image_steps.flatten,
    plan.RemoveImage: image_steps.remove,
    plan.CompleteImage: image_steps.complete,
    plan.ConvertBase: image_steps.convert_base,
    plan.ConvertInternal: image_steps.convert_internal,
    plan.DropInternal: image_steps.drop_internal,
    plan.CopyImage: image_steps.copy,
    plan.MoveImage: image_steps.move,
    plan.RecordFrozen: image_steps.record,
    plan.ReceiveDisk: transfer_steps.receive,
    plan.PutFiles: put_steps.put,
    plan.MakeHome: file_steps.make_home,
    plan.NoteUses: file_steps.note_uses,
    plan.TakeFile: file_steps.take_file,
    plan.DropOldName: file_steps.drop_old_name,
    plan.CopyFile: file_steps.copy_file,
    plan.CopyFolder: file_steps.copy_folder,
    plan.ReplaceFolder: file_steps.replace_folder,
    plan.RemoveFolder: file_steps.remove_folder,
    plan.MakeSnapshotFolder: file_steps.make_snapshot_folder,
    plan.WriteSnapshot: file_steps.write_snapshot,
    plan.RemoveSnapshot: file_steps.remove_snapshot,
    plan.ReplaceFile: file_steps.replace_file,
    plan.RemoveFile: file_steps.remove_file,
    plan.RemoveHome: file_steps.remove_home,
    plan.LeaveHome: file_steps.leave_home,
    plan.Define: domain_steps.define,
    plan.WritePresent: domain_steps.write_present,
    plan.SwitchDisks: domain_steps.switch_disks,
    memory_plan.ReserveMemory: memory_steps.reserve,
    memory_plan.AwaitMemory: memory_steps.await_memory,
    memory_plan.CompressMemory: memory_steps.compress,
    plan.Suspend: domain_steps.suspend,
    plan.Resume: domain_steps.resume,
    plan.QuiesceGuest: guest_steps.quiesce,
    plan.WakeGuest: guest_steps.wake,
    plan.SavePresent: domain_steps.save_present,
    plan.TakeManagedSave: domain_steps.take_managed_save,
    plan.PointManagedSave: domain_steps.point_managed_save,
    plan.DiscardPresent: domain_steps.discard_present,
    plan.StartFrom: domain_steps.start_from,
    plan.RenameDomain: domain_steps.rename,
    plan.RequireUnchanged: domain_steps.require_unchanged,
    plan.ForgetLibvirtSnapshot: domain_steps.forget_libvirt_snapshot,
    plan.NoteLibvirtSnapshot: domain_steps.note_libvirt_snapshot,
    plan.ReleaseDomain: domain_steps.define,
    plan.ForgetMetadata: domain_steps.forget_metadata,
    plan.UndefineDomain: domain_steps.undefine,
    plan.MakeRoots: import_steps.make_roots,
    plan.MakeFolders: move_steps.make_folders,
    plan.WriteFile: move_steps.write_file,
    plan.ChangeManagedSave: move_steps.change_managed_save,
    plan.SettleHome: move_steps.settle_home,
    plan.PullDisk: move_steps.pull_disk,
    plan.TakeHome: import_steps.take_home,
    plan.CopyImages: import_steps.copy_images,
    plan.RequireImages: import_steps.require_images,
    plan.UnpackFiles: import_steps.unpack_files,
    plan.ConvertVhd: vhd_steps.convert,
    plan.NameParent: import_steps.name_parent,
    plan.CopyMemory: import_steps.copy_memory,
    plan.PutManagedSave: import_steps.put_managed_save,
    plan.ChangeMemory: import_steps.change_memory,
    plan.ChangeFile: import_steps.change_file,
    plan.RenameFile: import_steps.rename_file,
    plan.SetModes: import_steps.set_modes,
    plan.NoteUse: import_steps.note_use,
    plan.RecordGold: import_steps.record_gold,
}

UNDO: Mapping[type[Step], _Act] = {
    plan.CreateImage: image_steps.uncreate,
    plan.FreezeImage: image_steps.unfreeze,
    plan.CompleteImage: image_steps.uncopy,
    plan.ConvertBase: image_steps.uncopy,
    plan.ConvertInternal: image_steps.uncopy,
    plan.CopyImage: image_steps.uncopy,
    plan.ReceiveDisk: transfer_steps.unreceive,
    plan.PutFiles: put_steps.unput,
    plan.MakeHome: file_steps.unmake_home,
    plan.NoteUses: file_steps.unnote_uses,
    plan.TakeFile: file_steps.untake_file,
    plan.CopyFile: file_steps.uncopy_file,
    plan.CopyFolder: file_steps.uncopy_folder,
    plan.MakeSnapshotFolder: file_steps.unmake_snapshot_folder,
    plan.NoteLibvirtSnapshot: domain_steps.forget_libvirt_snapshot,
    memory_plan.ReserveMemory: memory_steps.unreserve,
    plan.Suspend: domain_steps.resume,
    plan.QuiesceGuest: guest_steps.wake,
    plan.SavePresent: domain_steps.unsave_present,
    plan.TakeManagedSave: domain_steps.untake_managed_save,
    plan.PointManagedSave: domain_steps.unpoint_managed_save,
    plan.RequireUnchanged: lambda _session, _step: None,
    plan.DiscardPresent: lambda _session, _step: None,  # memory that was thrown away on request does not come back
    plan.StartFrom: domain_steps.unstart,
    plan.WriteSnapshot: file_steps.unwrite_snapshot,
    plan.MakeRoots: import_steps.unmake_roots,
    plan.MakeFolders: move_steps.unmake_folders,
    plan.WriteFile: move_steps.unwrite_file,
    plan.ChangeManagedSave: move_steps.unchange_managed_save,
    plan.PullDisk: lambda _session, _step: None,  # the image holds the same, whoever holds it
    plan.TakeHome: import_steps.untake_home,
    plan.CopyImages: import_steps.uncopy_images,
    plan.RequireImages: lambda _session, _step: None,
    plan.UnpackFiles: import_steps.pack_files_away,
    plan.ConvertVhd: vhd_steps.unconvert,
    plan.NameParent: import_steps.unname_parent,
    plan.CopyMemory: import_steps.uncopy_memory,
    plan.PutManagedSave: import_steps.unput_managed_save,
    plan.ChangeMemory: import_steps.unchange_memory,
    plan.ChangeFile: import_steps.unchange_file,
    plan.RenameFile: import_steps.unrename_file,
    plan.SetModes: import_steps.unset_modes,
    plan.NoteUse: import_steps.unnote_use,
}

HAPPENED: Mapping[type[Step], Callable[[Session, Any], bool]] = {
    plan.Define: domain_steps.is_defined,
    plan.ResizeDisk: resize_steps.is_resized,
    plan.SwitchDisks: domain_steps.is_switched,
    plan.RenameDomain: domain_steps.is_renamed,
    plan.ReleaseDomain: domain_steps.is_released,
    plan.UndefineDomain: domain_steps.is_undefined,
}

_HOME_ENDS = (plan.RemoveHome, plan.LeaveHome)
_STOPPING = (plan.SavePresent, plan.TakeManagedSave, plan.DiscardPresent)

_JOB_WAIT_S = 60.0
_GOES_ON = "the journal holds what is open; the next command on this VM goes on with it"


def run(session: Session, one: Plan) -> None:
    """Carry a plan out; an error leaves the state before it, or, once the switch happened, the state after it."""
    _begin(session, one)
    with _contact(session, one):
        if one.switch is not None:
            _prepare(session, one)
            _switch(session, one)
        try:
            _finish(session, one)
        except errors.HvmgrError:
            resting_guest.tell(session)
            raise
    if session.unwoken is not None:
        error, session.unwoken = session.unwoken, None
        raise errors.HostFailed(
            f"{one.subject}: done, but {error}", hint=error.hint, **{**error.facts, "done": True}
        ) from error


def _begin(session: Session, one: Plan) -> None:
    """The journal is begun; on a full disk only that of a plan that gives space back, which the reserve then serves."""
    if not one.only_frees:
        journal.begin(session.layout.journal, one)
        return
    if reserve.is_needed(session.layout):
        reserve.give_up(session.layout)
    try:
        journal.begin(session.layout.journal, one)
    except errors.NoSpace:  # a quota
        if not reserve.give_up(session.layout):
            raise
        journal.begin(session.layout.journal, one)


@contextlib.contextmanager
def _contact(session: Session, one: Plan) -> Iterator[None]:
    """What was not ended because libvirt is out of reach has neither failed nor been done: the next command asks."""
    try:
        yield
    except errors.HostFailed as error:
        if not error.facts.get("lost") or not journal.is_open(session.layout.journal):
            raise
        raise errors.OutcomeUnknown(f"{one.subject}: {error.message}", hint=_GOES_ON, **error.facts) from error


def recover(session: Session) -> bool:
    """Undo or complete what a dead command left open, and say so; whether there was something."""
    session.end_left_over_daemon()
    entry = journal.read(session.layout.journal)
    if entry is None:
        _empty_trash(session)
        return False
    one = entry.plan
    if entry.start is not None:
        journal.take_back_start(session.layout.journal)  # it was the dead command's, not ours
    session.recovering = True
    if reserve.is_needed(session.layout):
        reserve.give_up(session.layout)
    with session.interrupts.held_back():
        _wait_for_jobs(session, one)
        if one.switch is None or (entry.switch_reached and _happened(session, one)) or _catch_up(session, one):
            with occasions.completion(session, one):
                _finish(session, one)
                session.say(f"completed the interrupted {one.subject}")
        else:
            _undo(session, one.prepare)
            _end_undone(session, one)
            session.say(f"undid the interrupted {one.subject}")
            occasions.undone(session, one)
    resting_guest.tell(session)
    session.recovering = False
    return True


def _prepare(session: Session, one: Plan) -> None:
    done: list[Step] = []
    try:
        holds = _hold_when_off(session, one)
        for step in one.prepare:
            session.interrupts.check()
            done.append(step)
            DO[type(step)](session, step)
            holds = holds or (type(step) in _STOPPING and _hold_when_off(session, one))
        session.interrupts.check()
        journal.reach_switch(session.layout.journal)
    except BaseException as error:
        _go_back(session, one, done, error)
        raise


def _hold_when_off(session: Session, one: Plan) -> bool:
    """From the moment that the VM is off, QEMU's own locks on its working images are ours: nobody starts it."""
    if not one.hold or session.state() not in (State.OFF, State.SAVED):
        return False
    for path, fmt in one.hold:
        session.hold(path, fmt)
    if session.state() not in (State.OFF, State.SAVED):
        raise errors.Conflict("the VM was started in the meantime", hint="run the command again")
    return True


def _switch(session: Session, one: Plan) -> None:
    assert one.switch is not None
    try:
        if isinstance(one.switch, plan.Define | plan.ReleaseDomain):
            domain_steps.require_unedited(session)
        DO[type(one.switch)](session, one.switch)
    except errors.OutcomeUnknown:
        raise  # the journal stays open; the next command asks
    except BaseException as error:
        if not _ask_after(session, one, error):
            _go_back(session, one, list(one.prepare), error)
            raise
        session.say(f"{error}, but the new state is in place")
    session.release()


def _ask_after(session: Session, one: Plan, error: BaseException) -> bool:
    """Whether the switch happened although it failed; not being able to ask is an answer of its own."""
    try:
        return _happened(session, one)
    except errors.HvmgrError as second:
        raise errors.OutcomeUnknown(
            f"{one.subject}: {error}; and nobody can say now whether it happened ({second})", hint=_GOES_ON
        ) from error


def _finish(session: Session, one: Plan) -> None:
    try:
        try:
            _do_finish(session, one)
        except errors.NoSpace:
            if not reserve.give_up(session.layout):
                raise
            _do_finish(session, one)
    except errors.HvmgrError as error:
        error.hint = error.hint or _GOES_ON
        raise
    _say_what_waits(session, one)


def _do_finish(session: Session, one: Plan) -> None:
    with session.interrupts.held_back(), _finishing(session):
        for step in _still_to_finish(session, one):
            DO[type(step)](session, step)
        if any(isinstance(step, _HOME_ENDS) for step in one.finish):
            file_steps.remove_private(session)
        else:
            _end(session)


@contextlib.contextmanager
def _finishing(session: Session) -> Iterator[None]:
    session.finishing = True
    try:
        yield
    finally:
        session.finishing = False


def _still_to_finish(session: Session, one: Plan) -> tuple[Step, ...]:
    """The finishing steps; of a home whose configuration is gone, its removal is all that is left to do."""
    removal = tuple(step for step in one.finish if isinstance(step, _HOME_ENDS))
    return removal if removal and not session.layout.configuration.exists() else one.finish


def _say_what_waits(session: Session, one: Plan) -> None:
    error, session.put_off = session.put_off, None
    if session.interrupts.wanted and not session.recovering:
        session.interrupts.clear()
        if not session.waiting:
            raise errors.Cancelled(f"stopped, but the {one.subject} was complete already", complete=True, done=True)
        error = errors.Cancelled("stopped")
    if error is None:
        return
    raise type(error)(
        f"{one.subject}: done, but images wait to be merged ({error})",
        hint="nothing is lost; run 'hvmgr snapshot merge' on this VM later",
        **{**error.facts, "done": True, **({"recovered": True} if session.recovering else {})},
    ) from error


def _go_back(session: Session, one: Plan, done: list[Step], error: BaseException) -> None:
    with session.interrupts.held_back():
        session.release()
        try:
            _undo(session, tuple(done))
            _end_undone(session, one)
        except errors.HvmgrError as second:
            session.say(f"going back failed as well ({second}); the next command on this VM tries again")
        resting_guest.tell(session)
    if isinstance(error, errors.Cancelled):
        session.interrupts.clear()


def _undo(session: Session, steps: tuple[Step, ...]) -> None:
    for step in reversed(steps):
        UNDO[type(step)](session, step)


def _end(session: Session) -> None:
    journal.end(session.layout.journal)
    _empty_trash(session)


def _end_undone(session: Session, one: Plan) -> None:
    """A home that was to be made leaves nothing behind."""
    _end(session)
    if any(isinstance(step, plan.MakeHome | plan.TakeHome) for step in one.prepare):
        file_steps.remove_private(session)


def _empty_trash(session: Session) -> None:
    if session.layout.trash.is_dir():
        for file in session.layout.trash.iterdir():
            durable.remove(file)


def _happened(session: Session, one: Plan) -> bool:
    assert one.switch is not None
    return HAPPENED[type(one.switch)](session, one.switch)


def _catch_up(session: Session, one: Plan) -> bool:
    """Define the new state after all when the VM went on in it before the dead command could; whether it did.

    What the guest has written since is in the new images: undoing would lose it.
    """
    made = {step.path for step in one.prepare if isinstance(step, plan.CreateImage) and step.parent is not None}
    made -= {step.child for step in one.prepare if isinstance(step, plan.ReceiveDisk | plan.PutFiles)}  # data of ours
    if not isinstance(one.switch, plan.Define):
        return False
    put = [step for step in one.prepare if isinstance(step, plan.PutManagedSave)]
    if not any(import_steps.has_gone_on(session, step) for step in put) and not domain_steps.has_gone_on(session, made):
        return False
    DO[plan.Define](session, one.switch)
    return True


def _wait_for_jobs(session: Session, one: Plan) -> None:
    """What a dead command asked libvirt or QEMU for may still be under way. Merges have steps that wait for them."""
    domain = session.find_domain()
    merges = live_steps.is_live(one)
    if merges and domain is not None and domain.is_active():
        live_steps.take_up(session, domain, one)
    deadline = time.monotonic() + _JOB_WAIT_S
    while domain is not None and domain.is_active() and domain.has_job(of_disks=not merges):
        if not session.patient:
            raise errors.Busy(f"libvirt still works on {domain.name}", goes_on=True)
        if time.monotonic() > deadline:
            raise errors.Busy(f"libvirt still works on {domain.name}", hint="wait until it is done, then run it again")
        time.sleep(0.1)
