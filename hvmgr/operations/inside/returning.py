"""``file restore --to running``: files of a snapshot into the guest that runs, by its agent.

Each file is written into a folder that only root can reach (``guest_scripts``), compared by its hash, given its owner, mode and time,
and only then moved to its place. Where the agent may not run programs, or the guest is a Windows, it is written in place instead,
and that is told.

| what happens                         | what is in the guest then                                                |
|--------------------------------------|--------------------------------------------------------------------------|
| an error, Ctrl-C                     | the file's old content; the new one's beginning is removed               |
| the agent dies or hangs              | the file's old content; the error names where the beginning of the new lies |
| the same while it is moved           | the old content or the new one, whole: OutcomeUnknown, unless asked again the agent says |
| the same while it is written in place| a part of the new content; the error says so                             |
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import guest_agent, guest_files
from hvmgr.host.domain import State
from hvmgr.host.guest_files import Answer, GuestFiles
from hvmgr.model.plan import Plan
from hvmgr.model.progress import Progress
from hvmgr.model.put_options import FilesWanted
from hvmgr.operations import occasions
from hvmgr.operations.inside import guest_scripts, restoring
from hvmgr.operations.inside.arranging import LABEL
from hvmgr.operations.inside.browsing import Browser, shown
from hvmgr.operations.inside.putting import Put
from hvmgr.operations.inside.sources import Gathered, Item
from hvmgr.operations.inside.unlocking import Key
from hvmgr.storage.filesystems.reader import Type

if TYPE_CHECKING:
    from hvmgr.operations.session import Session
    from hvmgr.operations.vm import VM

_CLEAN_S = 10.0
_ATTRIBUTES = "extended attributes and ACLs"
_IN_THE_WAY = (guest_scripts.REFUSED, guest_scripts.TAKEN)
_LINKS = "links and folders (the agent may not run programs)"


def restore(session: Session, vm: VM, wanted: FilesWanted, keys: Sequence[Key], *, overwrite: bool) -> Put:
    """The files are in the running guest as they were at the snapshot; what has its new content is compared."""
    state = session.state()
    if state is not State.RUNNING:
        raise errors.Conflict(
            f"{vm.name} is {state}: its guest takes no files", hint="start it, or leave out --to running when it is off"
        )
    guest = guest_files.opened(session.domain())
    if guest.is_windows and wanted.into is None:
        raise errors.UsageError("the guest is a Windows, and its drive has to be named", hint=r"--into 'C:\folder'")
    with restoring.opened(vm, wanted, keys) as (browser, gathered):
        if wanted.into is None and not browser.has(b"/etc"):
            raise errors.UsageError(
                f"{browser.volume.title} is not the root of a system, and where it is mounted in the guest is not known",
                hint="name the folder in the guest: --into DIR",
            )
        into = wanted.into or b"/"
        if not (guest.is_windows or into.startswith(b"/")):
            into = b"/" + into  # as on a disk: there is no other folder to start from
        return _put(session, guest, browser, gathered, into, overwrite=overwrite)


def _put(
    session: Session, guest: GuestFiles, browser: Browser, gathered: Gathered, into: bytes, *, overwrite: bool
) -> Put:
    name = session.home.name
    placed = [(one, _path(into, one)) for one in gathered.items]
    work = _Work(session, guest, gathered.size)
    taken = [(one, path) for one, path in placed if not work.is_there(one, path, overwrite=overwrite)]
    subject = f"restore of {len(taken)} file{'' if len(taken) == 1 else 's'} into the running {name}"
    engine = "the guest agent" if guest.can_run else "the guest agent, in place"
    if not guest.can_run:
        session.say(
            f"the agent of {name} runs no programs here: files are written in place, without owner and mode, and where a"
            " link of one of the guest's users leads"
        )
    with occasions.operation(session, Plan(session.new_id(), session.home.vm_id, "file restore", subject)):
        try:
            for one, path in taken:
                work.put(one, path)
        except errors.Cancelled as error:
            became = f"; {error.facts['became']}" if "became" in error.facts else ""
            raise errors.Cancelled(f"stopped; {work.files} of {len(taken)} files are in the guest{became}") from error
    for why, count in gathered.left_out.items():
        work.left_out[why] = work.left_out.get(why, 0) + count
    return Put(
        into, browser.volume.title, engine, work.files, work.replaced, work.size, left_out=work.left_out
    )  # fmt: skip


def _path(into: bytes, one: Item) -> str:
    path = b"/".join([into.rstrip(b"/"), *one.parts])
    if path.startswith(b"/"):
        path = b"/" + b"/".join(part for part in path.split(b"/") if part not in {b"", b"."})
    try:
        return path.decode()
    except UnicodeDecodeError:
        raise errors.Unsupported(
            f"{shown(path)} is not UTF-8, and a guest agent takes no other names", hint="get it: hvmgr file get"
        ) from None


class _Work:
    """What was put so far."""

    def __init__(self, session: Session, guest: GuestFiles, total: int) -> None:
        self._session, self._guest, self._total = session, guest, total
        self._there: set[str] = set()  # what is replaced
        self.files = self.replaced = self.size = self._wrote = 0
        self.left_out: dict[str, int] = {}

    def is_there(self, one: Item, path: str, *, overwrite: bool) -> bool:
        """Whether a folder is there already; Conflict for what is in the way. Nothing is changed."""
        self._session.interrupts.check()
        found = self._look(path) if self._guest.can_run else self._tried(one, path, overwrite=overwrite)
        if one.type is Type.FOLDER and found == "folder":
            return True
        if found and (found == "folder" or one.type is Type.FOLDER):
            what = "a folder" if found == "folder" else "no folder"
            raise errors.Conflict(f"{path} is {what} in the guest", hint="restore it elsewhere: --into DIR")
        if found and not overwrite:
            raise errors.Conflict(
                f"{path} exists in the guest", hint="replace it with --overwrite, or name a folder with --into"
            )
        if found:
            self._there.add(path)
        return False

    def _look(self, path: str) -> str:
        """Empty for nothing; what could not be looked at is never taken for that."""
        answer = self._guest.run(guest_scripts.LOOK, path)
        found = answer.said.strip()
        if answer.code != 0 or found not in {"folder", "file", "none"}:
            raise errors.HostFailed(f"{path} cannot be looked at in the guest: {_line(answer.said)}", path=path)
        return "" if found == "none" else found

    def _tried(self, one: Item, path: str, *, overwrite: bool) -> str:
        if one.type is not Type.FILE:
            return ""
        try:
            return "file" if self._guest.exists(path) else ""
        except errors.HvmgrError as error:
            if overwrite and not guest_agent.is_silence(error):
                return ""
            raise

    def put(self, one: Item, path: str) -> None:
        """It is in the guest."""
        self._session.progress(Progress(self._wrote, self._total, f"restore {path}"))
        if one.extras.keys() - {LABEL}:
            self.left_out[_ATTRIBUTES] = self.left_out.get(_ATTRIBUTES, 0) + 1
        if one.type is not Type.FILE and not self._guest.can_run:
            self.left_out[_LINKS] = self.left_out.get(_LINKS, 0) + 1
            return
        if self._guest.can_run:
            self._put_by_move(one, path)
        else:
            self._put_in_place(one, path)
        self.files += 1
        self.replaced += path in self._there
        self.size += one.size

    def _put_by_move(self, one: Item, path: str) -> None:
        folder, _, name = path.rpartition("/")
        made = self._begin(folder or "/", path)
        sent = ""
        with self._cleaned(made, path):
            if one.type is Type.FILE:
                part = f"{made}/{guest_scripts.NEW}"
                sent = self._guest.write(part, "w", self._pieces(one), self._count)
                self._require_same(sent, self._told(part, one.size), path)
            self._check()
        answer = self._move(one, (folder or "/", made, name), path, sent)
        if answer is None or answer.code == 0:
            return
        with self._cleaned(made, path):
            kind = errors.Conflict if answer.code in _IN_THE_WAY else errors.HostFailed
            raise kind(f"{path} cannot be made in the guest: {_line(answer.said)}", path=path)

    def _begin(self, folder: str, path: str) -> str:
        """Where it is made: a new folder, which only root can reach, in ``folder`` or above it."""
        own = f".hvmgr-{uuid.uuid4().hex[:12]}"
        try:
            answer = self._guest.run(guest_scripts.BEGIN, folder, own)
        except errors.HvmgrError as error:
            raise _with(error, f"{path} is what it was; an empty {own} may be in its folder or above it") from error
        told = answer.said.strip().rpartition("\n")[2].removeprefix("in ")
        names = [one for one in folder.split("/") if one]
        if answer.code == 0 and len(told) < 6 and told.isdecimal() and int(told) <= len(names):
            return "/" + "/".join([*names[: int(told)], own])
        kind = errors.Conflict if answer.code in _IN_THE_WAY else errors.HostFailed
        raise kind(
            f"{path} cannot be made in the guest: {_line(answer.said)}; {path} is what it was",
            hint="restore it elsewhere: --into DIR",
            path=path,
        )

    def _told(self, part: str, size: int) -> str:
        """The guest's hash of what was written."""
        limit_s = guest_files.limit_s(size)
        answer = self._guest.run(guest_scripts.HASH, part, limit_s=limit_s, waiting=self._check)
        if answer.code == 0 and answer.said.split():
            return answer.said.split()[0]
        return self._guest.digest(part, size, self._check)

    def _move(self, one: Item, place: tuple[str, str, str], path: str, sent: str) -> Answer | None:
        """What the guest says of it; None when it went silent, and is in its place all the same. OutcomeUnknown."""
        script = {Type.FILE: guest_scripts.FILE, Type.FOLDER: guest_scripts.FOLDER, Type.LINK: guest_scripts.LINK}
        facts = (f"{one.uid or 0}:{one.gid or 0}", f"{one.mode:o}", str((one.modified or 0) // 1_000_000_000))
        manner = "replace" if path in self._there else "new"
        target = one.target.decode("utf-8", "surrogateescape")
        try:
            return self._guest.run(script[one.type], *place, *facts, manner, target)
        except errors.HvmgrError as error:
            with contextlib.suppress(errors.HvmgrError):
                answer = self._guest.run(guest_scripts.IS_PLACED, path, place[1], limit_s=_CLEAN_S)
                if answer.code == 0 and (answer.said.split() or [""])[0] == sent:
                    return None
            what = "holds its old content or the new one, whole" if one.type is Type.FILE else "is made, or is not"
            raise errors.OutcomeUnknown(
                f"{error.message}; {path} {what}; {place[1]} is left where it is the old one",
                hint="see to the guest and its agent, look there, and run the command again with --overwrite",
                path=path,
            ) from error

    def _put_in_place(self, one: Item, path: str) -> None:
        try:
            sent = self._guest.write(path, "w", self._pieces(one), self._count)
            self._require_same(sent, self._guest.digest(path, one.size, self._check), path)
        except errors.HvmgrError as error:
            raise _with(error, f"{path} was written in place, and may hold a part of the new content only") from error

    @contextlib.contextmanager
    def _cleaned(self, made: str, path: str) -> Iterator[None]:
        """What was begun is removed after an error, or named where that cannot be done."""
        try:
            yield
        except errors.HvmgrError as error:
            left = "" if self._removes(made, error) else f"; what was written so far lies in {made}"
            raise _with(error, f"{path} is what it was{left}") from error

    def _removes(self, made: str, error: errors.HvmgrError) -> bool:
        """Whether what was begun is gone; an agent that is silent is not asked once more."""
        if guest_agent.is_silence(error):
            return False
        try:
            return self._guest.run(guest_scripts.CLEAN, made, limit_s=_CLEAN_S).code == 0
        except errors.HvmgrError:
            return False

    @staticmethod
    def _pieces(one: Item) -> Iterator[bytes]:
        assert one.source is not None
        return one.source.pieces(guest_files.PIECE)

    def _count(self, count: int) -> None:
        self._wrote += count
        self._check()

    def _check(self) -> None:
        self._session.progress(Progress(self._wrote, self._total, f"restore {self._total} bytes"))

    @staticmethod
    def _require_same(sent: str, told: str, path: str) -> None:
        if sent != told:
            raise errors.HostFailed(f"{path} reads back in the guest otherwise than it was written", path=path)


def _line(said: str) -> str:
    return " ".join(said.split())[:200] or "no reason was given"


def _with(error: errors.HvmgrError, more: str) -> errors.HvmgrError:
    """The same error, which says besides what became of the file."""
    return type(error)(f"{error.message}; {more}", hint=error.hint, **{**error.facts, "became": more})
