"""``file restore --to running``: files of a snapshot into the guest that runs, by its agent.

Each file is written beside its place under a name of its own, compared by its hash, given its owner, mode and time, and only
then renamed. Where the agent may not run programs, or the guest is a Windows, it is written in place instead, and that is told.

| what happens                         | what is in the guest then                                                |
|--------------------------------------|--------------------------------------------------------------------------|
| an error, Ctrl-C                     | the file's old content; the new one's beginning is removed               |
| the agent dies or hangs              | the file's old content; the error names where the beginning of the new lies |
| the same while it is written in place| a part of the new content; the error says so                             |
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import guest_agent, guest_files
from hvmgr.host.domain import State
from hvmgr.host.guest_files import GuestFiles
from hvmgr.model.plan import Plan
from hvmgr.model.progress import Progress
from hvmgr.model.put_options import FilesWanted
from hvmgr.operations import occasions
from hvmgr.operations.inside import restoring
from hvmgr.operations.inside.browsing import Browser, shown
from hvmgr.operations.inside.putting import Put
from hvmgr.operations.inside.sources import Gathered, Item
from hvmgr.storage.filesystems.reader import Type

if TYPE_CHECKING:
    from hvmgr.operations.session import Session
    from hvmgr.operations.vm import VM

_CLEAN_S = 10.0
_LINKS = "links and folders (the agent may not run programs)"
# $1 is a path. A link to a folder counts as one: what is renamed to its name would go into that folder.
_LOOK = 'if [ -d "$1" ]; then echo folder; elif [ -e "$1" ] || [ -L "$1" ]; then echo file; fi'
_BEGIN = 'umask 077; set -C; : > "$1"'  # nobody else reads what is not yet whole, and nothing is written over
_HASH = 'sha256sum < "$1"'
_LABEL = 'if command -v restorecon > /dev/null 2>&1; then restorecon "$2" || :; fi'
# $1 the new file, $2 its place, then owner, group, mode, seconds since 1970
_PLACE = f'chown "$3:$4" "$1" && chmod "$5" "$1" && touch -d "@$6" "$1" && mv -f "$1" "$2" && {{ {_LABEL}; }}'
_FOLDER = f'mkdir "$2" && chown "$3:$4" "$2" && chmod "$5" "$2" && {{ {_LABEL}; }}'
_LINK = f'ln -s "$7" "$1" && chown -h "$3:$4" "$1" && mv -f "$1" "$2" && {{ {_LABEL}; }}'


def restore(session: Session, vm: VM, wanted: FilesWanted, *, overwrite: bool) -> Put:
    """The files are in the running guest as they were at the snapshot; what has its new content is compared."""
    state = session.state()
    if state is not State.RUNNING:
        raise errors.Conflict(
            f"{vm.name} is {state}: its guest takes no files", hint="start it, or leave out --to running when it is off"
        )
    guest = guest_files.opened(session.domain())
    if guest.is_windows and wanted.into is None:
        raise errors.UsageError("the guest is a Windows, and its drive has to be named", hint=r"--into 'C:\folder'")
    with restoring.opened(vm, wanted) as (browser, gathered):
        if wanted.into is None and not browser.has(b"/etc"):
            raise errors.UsageError(
                f"{browser.volume.title} is not the root of a system, and where it is mounted in the guest is not known",
                hint="name the folder in the guest: --into DIR",
            )
        return _put(session, guest, browser, gathered, wanted.into or b"/", overwrite=overwrite)


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
        session.say(f"the agent of {name} runs no programs here: files are written in place, without owner and mode")
    with occasions.operation(session, Plan(session.new_id(), session.home.vm_id, "file restore", subject)):
        for one, path in taken:
            work.put(one, path)
    for why, count in gathered.left_out.items():
        work.left_out[why] = work.left_out.get(why, 0) + count
    return Put(
        into, browser.volume.title, engine, work.files, work.replaced, work.size, left_out=work.left_out
    )  # fmt: skip


def _path(into: bytes, one: Item) -> str:
    path = into.rstrip(b"/") + b"/" + b"/".join(one.parts)
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
        if not self._guest.can_run:
            found = "file" if one.type is Type.FILE and self._guest.exists(path) else ""
        else:
            answer = self._guest.run(_LOOK, path)
            found = answer.said.strip() if answer.code == 0 else ""
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

    def put(self, one: Item, path: str) -> None:
        """It is in the guest."""
        self._session.progress(Progress(self._wrote, self._total, f"restore {path}"))
        if one.type is not Type.FILE and not self._guest.can_run:
            self.left_out[_LINKS] = self.left_out.get(_LINKS, 0) + 1
            return
        if one.type is Type.FOLDER:
            self._run(_FOLDER, path, path, one)
        elif self._guest.can_run:
            self._put_beside(one, path)
        else:
            self._put_in_place(one, path)
        self.files += 1
        self.replaced += path in self._there
        self.size += one.size

    def _put_beside(self, one: Item, path: str) -> None:
        folder, _, _ = path.rpartition("/")
        part = f"{folder}/.hvmgr-{uuid.uuid4().hex[:12]}.part"
        with self._cleaned(part, path):
            if one.type is Type.LINK:
                self._run(_LINK, part, path, one)
                return
            begun = self._guest.run(_BEGIN, part)
            if begun.code != 0:
                raise errors.HostFailed(f"{path} cannot be written in the guest: {_line(begun.said)}", path=path)
            sent = self._guest.write(part, "r+", self._pieces(one), self._count)
            answer = self._guest.run(_HASH, part, limit_s=600)
            told = answer.said.split()[0] if answer.code == 0 and answer.said.split() else self._guest.digest(part)
            self._require_same(sent, told, path)
            self._run(_PLACE, part, path, one)

    def _put_in_place(self, one: Item, path: str) -> None:
        try:
            sent = self._guest.write(path, "w", self._pieces(one), self._count)
            self._require_same(sent, self._guest.digest(path), path)
        except errors.HvmgrError as error:
            raise _with(error, f"{path} was written in place, and may hold a part of the new content only") from error

    def _run(self, script: str, part: str, path: str, one: Item) -> None:
        facts = (str(one.uid or 0), str(one.gid or 0), f"{one.mode:o}", str((one.modified or 0) // 1_000_000_000))
        target = () if one.type is not Type.LINK else (one.target.decode("utf-8", "surrogateescape"),)
        answer = self._guest.run(script, part, path, *facts, *target)
        if answer.code != 0:
            raise errors.HostFailed(f"{path} cannot be made in the guest: {_line(answer.said)}", path=path)

    @contextlib.contextmanager
    def _cleaned(self, part: str, path: str) -> Iterator[None]:
        """What was begun is removed after an error, or named where that cannot be done."""
        try:
            yield
        except errors.HvmgrError as error:
            left = "" if self._removes(part, error) else f"; what was written so far lies beside it as {part}"
            raise _with(error, f"{path} is what it was{left}") from error

    def _removes(self, part: str, error: errors.HvmgrError) -> bool:
        """Whether what was begun is gone; an agent that is silent is not asked once more."""
        if guest_agent.is_silence(error):
            return False
        try:
            return self._guest.run('rm -f "$1"', part, limit_s=_CLEAN_S).code == 0
        except errors.HvmgrError:
            return False

    def _pieces(self, one: Item) -> Iterator[bytes]:
        assert one.source is not None
        with one.source.opened(self._session.layout.private) as descriptor:
            at = 0
            while piece := os.pread(descriptor, guest_files.PIECE, at):
                yield piece
                at += len(piece)

    def _count(self, count: int) -> None:
        self._wrote += count
        self._session.progress(Progress(self._wrote, self._total, f"restore {self._total} bytes"))

    @staticmethod
    def _require_same(sent: str, told: str, path: str) -> None:
        if sent != told:
            raise errors.HostFailed(f"{path} reads back in the guest otherwise than it was written", path=path)


def _line(said: str) -> str:
    return " ".join(said.split())[:200] or "no reason was given"


def _with(error: errors.HvmgrError, more: str) -> errors.HvmgrError:
    """The same error, which says besides what became of the file."""
    return type(error)(f"{error.message}; {more}", hint=error.hint, **error.facts)
