"""The homes of a host: which there are, a new one, images that several share, and what dead commands left to be completed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, settings
from hvmgr.host import qemu_errors
from hvmgr.model.layout import Layout
from hvmgr.storage import durable, index, journal, locks, vm_home
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.session import Session

# What changes a VM is imported where that is done, as ``host`` does it.


# --- which there are ------------------------------------------------------------------------------------------------


def named(host: Host) -> list[tuple[str, VmHome]]:
    """The homes, each with the name of its VM; one that cannot be read is told to the reporter and left out."""
    found = []
    for home in _all(host):
        try:
            found.append((home.name, home))
        except errors.HvmgrError as error:
            _leave_out(host, error)
    return found


def _all(host: Host) -> list[VmHome]:
    """Homes directly below the root, and those that the index knows elsewhere for this connection."""
    below = vm_home.find_homes(host.root, left_out=lambda error: _leave_out(host, error))
    homes = {home.vm_id: home for home in below}
    for folder in _folders_elsewhere(host):
        with contextlib.suppress(errors.HvmgrError):
            home = vm_home.open_home(folder)
            homes.setdefault(home.vm_id, home)
    return list(homes.values())


def _leave_out(host: Host, error: errors.HvmgrError) -> None:
    host.reporter.notice(f"left out: {error}")


def _folders(host: Host) -> list[Path]:
    """Every folder that may be a home of this connection."""
    below = [folder for folder in host.root.iterdir() if folder.is_dir()] if host.root.is_dir() else []
    return [*below, *_folders_elsewhere(host)]


def _folders_elsewhere(host: Host) -> list[Path]:
    entries = (one for one in index.entries() if one.uri == host.uri)
    return [one.home for one in entries if one.home.parent != host.root]


# --- what dead commands left ----------------------------------------------------------------------------------------


def complete_unfinished(host: Host) -> None:
    """What a killed ``vm create``, ``adopt`` or ``delete`` left is undone or completed, before anybody is shown it."""
    if host.reporter.dry_run:
        return
    if (settings.index_folder() / "archives").is_dir():
        from hvmgr.storage import archives

        archives.sweep()
    for folder in _folders(host):
        if journal.is_open(Layout(home=folder, vm_id="").journal):
            complete(host, folder)
        elif vm_home.is_abandoned(folder):
            with contextlib.suppress(errors.HvmgrError):  # in use after all, or not ours to remove: no harm either way
                vm_home.remove_remains(folder)


def complete(host: Host, folder: Path) -> None:
    """The same for one folder."""
    from hvmgr.operations.steps import execution

    layout = Layout(home=folder, vm_id="")
    if host.reporter.dry_run or locks.is_held(layout.lock):
        return
    entry = journal.read(layout.journal)
    if entry is not None and entry.plan.makes_or_removes_home:
        with host.session(VmHome(vm_home.layout_of(folder, entry.plan.vm_id))) as session:
            execution.recover(session)


# --- a new one, and what it shares ----------------------------------------------------------------------------------


def require_free(host: Host, path: Path, *, hint: str = "choose another name, or another place with --home") -> None:
    """Conflict where a new home would not be alone."""
    qemu_errors.require_utf8(path)
    if (above := vm_home.around(path)) is not None:
        raise errors.Conflict(
            f"{path} lies in {above}, which is a VM's home or an export", hint="choose a place outside it"
        )
    if not path.is_dir():
        return
    complete(host, path)
    if path.is_dir() and not vm_home.holds_nothing(path):
        what = "exists already and is not empty"
        with contextlib.suppress(errors.HvmgrError):
            what = f"exists already: it is the home of the VM '{vm_home.open_home(path).name}'"
        raise errors.Conflict(f"{path} {what}", hint=hint)


@contextlib.contextmanager
def new(host: Host, home: VmHome) -> Iterator[Session]:
    """The folders that the journal needs; they go again when the plan does not come through."""
    from hvmgr.operations import roles

    roles.require_role(host.connection)
    layout = home.layout
    above = next(one for one in layout.home.parents if os.path.lexists(one))
    if not above.is_dir():
        raise errors.UsageError(f"{above} is no folder", hint="name another place with --root or --home")
    with durable.explained(layout.home):
        layout.home.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    durable.make_folder(layout.home)
    durable.make_folder(layout.private)
    try:
        with host.session(home) as session:
            yield session
    finally:
        if not layout.journal.exists() and not layout.configuration.exists():
            durable.remove_folder(layout.private)
            durable.remove_empty_folder(layout.home)
            for one in layout.home.parents[: layout.home.parents.index(above)]:
                durable.remove_empty_folder(one)


@contextlib.contextmanager
def sharing(host: Host, paths: Sequence[Path]) -> Iterator[None]:
    """Nobody else on this host counts, adds or removes users of the images that a new VM shares."""
    from hvmgr.storage import attachments

    with held(host, paths):
        attachments.require_free(map(str, paths))
        yield


@contextlib.contextmanager
def held(host: Host, paths: Sequence[Path]) -> Iterator[None]:
    """No other command works on these images, nor on the homes that they lie in."""
    from hvmgr.operations import image_users

    with contextlib.ExitStack() as stack:
        stack.enter_context(index.locked(paths, wait_s=host.wait_s))
        for entry in index.entries():
            if any(image_users.is_inside(path, entry.home) for path in paths):
                stack.enter_context(vm_home.open_home(entry.home).locked(wait_s=host.wait_s))
        yield
