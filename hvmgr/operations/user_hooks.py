"""The administrator's own programs: executable files in ``hooks.d/<event>/`` of the configuration's folders.

They are run in alphabetical order with the event's document on stdin (``model/event``). One that comes before an
operation refuses it by any exit code but 0; what goes wrong with another one is a warning. A hook has a time limit, and
its whole process group is ended there. Without any hook all this costs a failed look at each folder.

What is run with root's rights must be nobody else's to write: a file, or a folder on the way, that is not root's or the
caller's own, or that others may write, is not run. A before-event is then refused, for nobody was asked.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, settings
from hvmgr.host import process
from hvmgr.model.event import Event, Occurrence, events_of

if TYPE_CHECKING:
    from hvmgr.model.plan import Plan

FOLDER = "hooks.d"

# What a hook finds in its environment, and what tells a command that it was run by one.
_RUNNING = "HVMGR_HOOK"  # the events whose hooks are being run, the innermost last
_HELD = "HVMGR_HOOK_HOLDS"  # the VMs whose operations wait for these hooks

FROZEN = "HVMGR_FROZEN"  # the VMs whose guests are at rest while the command of 'hvmgr freeze' runs

_WORDS_MAX = 500
_LEFT_BEHIND = ("~", ".bak", ".rpmnew", ".rpmorig", ".rpmsave", ".dpkg-dist", ".dpkg-new", ".dpkg-old", ".swp")
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def listed(event: Event) -> list[Path]:
    """The files that are run for an event, in their order: those of the system, then those of the user."""
    found: list[Path] = []
    for folder in settings.config_folders():
        try:
            paths = sorted((folder / FOLDER / event).iterdir())
        except OSError:
            continue
        found += [
            path for path in paths if not _is_left_behind(path.name) and path.is_file() and os.access(path, os.X_OK)
        ]
    return found


def foreseen(one: Plan) -> list[tuple[Event, Path]]:
    """What would be run for a plan that comes through; nothing for acts without steps, such as a start."""
    if not one.vm_id or not one.steps():
        return []
    return [(which, path) for which in events_of(one.operation) for path in listed(which)]


def ask(occurrence: Occurrence, root: Path, notice: Callable[[str], None]) -> None:
    """Every hook lets the operation pass; Vetoed when one does not, or when nobody can know.

    ``root`` is that of the homes, for the hook's own hvmgr.
    """
    for path in _to_run(occurrence.event, notice):
        if (why := _unsafe(path)) is not None:
            raise _vetoed(occurrence, path, f"the hook {path} is not run: {why[0]}", why[1])
        try:
            done = _run(path, occurrence, root, holds=True)
        except errors.HvmgrError as error:
            raise _vetoed(occurrence, path, f"the hook {path} gave no answer: {error}", None) from error
        if done.code != 0:
            words = _words(done) or f"it ended with code {done.code} and said nothing"
            raise _vetoed(occurrence, path, f"the hook {path} refuses the {occurrence.subject}: {words}", None)


def tell(occurrence: Occurrence, root: Path, notice: Callable[[str], None]) -> None:
    """Every hook has heard of it; what goes wrong is said and changes nothing."""
    for path in _to_run(occurrence.event, notice):
        if (why := _unsafe(path)) is not None:
            notice(f"warning: the hook {path} is not run: {why[0]}; {why[1]}")
            continue
        try:
            done = _run(path, occurrence, root, holds=False)
        except errors.HvmgrError as error:
            notice(f"warning: the hook {path} failed: {error}")
            continue
        if done.code != 0:
            words = _words(done)
            notice(f"warning: the hook {path} failed with code {done.code}" + (f": {words}" if words else ""))


def require_not_inside(vm_id: str, name: str) -> None:
    """Busy for a command that a hook runs on the very VM whose operation waits for that hook: it would wait for ever."""
    if vm_id in os.environ.get(_HELD, "").split(","):
        event = os.environ.get(_RUNNING, "").rpartition(",")[2]
        raise errors.Busy(
            f"a {event} hook of {name} runs this command, and the operation on {name} waits for that hook",
            hint="let the hook work on other VMs, or use a hook for what comes after the operation",
        )
    if vm_id in os.environ.get(FROZEN, "").split(","):
        raise errors.Busy(
            f"hvmgr freeze holds {name} still for this very command, which would wait for itself",
            hint="run what works on the VM before or after hvmgr freeze; listing and showing it is fine",
        )


def _to_run(event: Event, notice: Callable[[str], None]) -> list[Path]:
    paths = listed(event)
    if paths and event in os.environ.get(_RUNNING, "").split(","):
        notice(f"the hooks for {event} are not run again: one of them runs this command")
        return []
    return paths


def _run(path: Path, occurrence: Occurrence, root: Path, *, holds: bool) -> process.Completed:
    vm = occurrence.vm
    environment = {
        _RUNNING: _and(os.environ.get(_RUNNING), occurrence.event),
        "HVMGR_ROOT": str(root),
        "LIBVIRT_DEFAULT_URI": vm.connection,
    }
    held = os.environ.get(_HELD)
    if holds or held:
        environment[_HELD] = _and(held, vm.id) if holds else str(held)
    for name in ("HVMGR_INDEX", "HVMGR_CONFIG", "HVMGR_RUN", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        if value := os.environ.get(name):
            environment[name] = value  # so that the hook's own hvmgr means the same host
    document = json.dumps(occurrence.to_json()).encode() + b"\n"
    limit = settings.hook_time_limit_s()
    return process.run([path], input=document, timeout_s=limit, ok_codes=range(256), environment=environment)


def _unsafe(path: Path) -> tuple[str, str] | None:
    """What is wrong with a hook, or with the way to it, and what puts it right; None when only we can have written it."""
    real = Path(os.path.realpath(path))
    own = (real, real.parent, *list(path.parents)[:3])
    for place in dict.fromkeys((*own, *_way(path))):
        try:
            facts = place.stat()
        except OSError as error:
            return f"{place}: {error.strerror}", "remove the hook, or put it right"
        if facts.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user (uid {facts.st_uid})", f"chown root '{place}'"
        is_sticky = (
            place not in own and facts.st_mode & stat.S_ISVTX
        )  # in /tmp nobody takes the place of what is another's
        if facts.st_mode & _WRITABLE and not is_sticky:
            return f"others may write {place}", f"chmod go-w '{place}'"
    return None


def _way(path: Path) -> Iterator[Path]:
    """For root every folder in which somebody could put something else in the place of the hook, or of a link to it.

    Others are careful with what is in their home themselves; whose group may write there is their system's custom.
    """
    todo, seen = [path] if os.geteuid() == 0 else [], set[Path]()
    while todo:
        one = todo.pop()
        for place in (one, *one.parents):
            if place not in seen:
                seen.add(place)
                yield place
                if place.is_symlink():
                    todo.append(place.parent / place.readlink())


def _vetoed(occurrence: Occurrence, path: Path, message: str, hint: str | None) -> errors.Vetoed:
    return errors.Vetoed(message, hint=hint, event=occurrence.event.value, hook=str(path))


def _words(done: process.Completed) -> str:
    """The last line that it said, on stderr if there was any."""
    text = done.stderr if done.stderr.strip() else done.stdout.decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return last if len(last) <= _WORDS_MAX else last[:_WORDS_MAX] + "…"


def _and(before: str | None, one: str) -> str:
    return f"{before},{one}" if before else one


def _is_left_behind(name: str) -> bool:
    """What editors and packages leave beside a file."""
    return name.startswith(".") or name.endswith(_LEFT_BEHIND)
