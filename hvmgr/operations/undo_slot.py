"""The undo slot: the configuration, NVRAM and TPM state of the present that the last apply put away."""

from __future__ import annotations

from hvmgr.model import plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.plan import Step
from hvmgr.operations.session import Session
from hvmgr.storage import vm_home


def filled_by(session: Session, present: Configuration, *, keep: bool) -> list[Step]:
    """The undo slot holds this present, or nothing; what it held before leaves no file behind."""
    old = session.home.undo()
    if not keep:
        return [*emptied(session, old), *_firmware_files(session, present)]
    steps = [] if old is None else _firmware_files(session, old)
    return [*steps, plan.ReplaceFile(path=str(session.layout.undo), text=present.to_xml())]


def emptied(session: Session, undo: Configuration | None) -> list[Step]:
    """The files of the undo slot go; its images are the planner's matter."""
    if undo is None:
        return []
    return [plan.RemoveFile(path=str(session.layout.undo)), *_firmware_files(session, undo)]


def _firmware_files(session: Session, gone: Configuration) -> list[Step]:
    """NVRAM and TPM state that belonged to a present which is dropped for good."""
    steps: list[Step] = []
    facts = vm_home.require_facts(gone)
    if gone.nvram is not None and gone.nvram.parent == session.layout.vm_folder:
        steps.append(plan.RemoveFile(path=str(gone.nvram)))
    if gone.has_tpm and facts.change is not None:
        steps.append(plan.RemoveFolder(path=str(session.layout.tpm_copy(facts.change))))
    return steps
