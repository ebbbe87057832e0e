"""``hvmgr file find`` and ``hvmgr file index``: files by name, type, size and time, at one moment or in all snapshots."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, settings
from hvmgr.faces.cli import arguments, file_render, json_out, key_files, render
from hvmgr.faces.cli import file_options as options
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request
from hvmgr.model import patterns

if TYPE_CHECKING:
    from hvmgr.operations.inside.browsing import Browser, Found
    from hvmgr.operations.inside.indexing import Updated
    from hvmgr.operations.inside.searching import Hit
    from hvmgr.operations.inside.unlocking import Key
    from hvmgr.operations.snapshot import Snapshot
    from hvmgr.operations.vm import VM
    from hvmgr.storage.file_index import Entry, FileIndex, Locked, Point

_NAMED_MAX = 5  # snapshots in a sentence
_TYPES = {
    "f": "file",
    "d": "folder",
    "l": "link",
    "b": "block-device",
    "c": "character-device",
    "p": "pipe",
    "s": "socket",
}


@dataclass(frozen=True, slots=True)
class _Condition:
    """What has to be true of a file."""

    name: bytes | None
    ignore_case: bool
    type: str | None
    larger: int | None
    smaller: int | None
    since: int | None
    until: int | None

    def fits(self, browser: Browser, one: Found) -> bool:
        """Whether it is, of a file on a disk."""
        folded = self.ignore_case or browser.reader.ignores_case
        return self._suits(one.node.type.value, one.size, one.node.modified) and (
            self.name is None or patterns.fits(one.name, self.name, ignoring_case=folded)
        )

    def suits(self, entry: Entry) -> bool:
        """Whether it is, but for the name, of a file in the index."""
        return self._suits(entry.type, entry.size, entry.modified)

    def _suits(self, kind: str, size: int, modified: int | None) -> bool:
        return (
            (self.type is None or kind == self.type)
            and (self.larger is None or size > self.larger)
            and (self.smaller is None or size < self.smaller)
            and (self.since is None or (modified or 0) >= self.since)
            and (self.until is None or (modified or 0) < self.until)
        )


@click.command(
    "find",
    cls=Command,
    codes=READS,
    examples=[
        "hvmgr file find web / --name '*.conf'",
        "hvmgr file find web /home --type f --larger 100M --newer '2026-11-01'",
        "hvmgr file find web / --name id_rsa --null | xargs -0 -n 1",
        "hvmgr file find web /etc/nginx.conf --index",
    ],
)
@options.where("VM PATH...")
@click.option("--index", "indexed", is_flag=True, help="In all snapshots at once, by the index of files.")
@click.option("--name", "pattern", metavar="PATTERN", help="Whose name fits this pattern.")
@click.option("--ignore-case", is_flag=True, help="The name may differ in case.")
@click.option("--type", "kind", type=click.Choice(tuple(_TYPES)), help="Only files, folders (d), links, ...")
@click.option("--larger", metavar="SIZE", type=arguments.Size(), help="Larger than this.")
@click.option("--smaller", metavar="SIZE", type=arguments.Size(), help="Smaller than this.")
@click.option("--newer", metavar="TIME", help="Changed since this time.")
@click.option("--older", metavar="TIME", help="Not changed since this time.")
@click.option("--depth", metavar="N", type=click.IntRange(min=0), help="Not deeper than this.")
@click.option("-l", "--long", is_flag=True, help="With modes, owners, sizes and times.")
@click.option("--null", is_flag=True, help="Only the paths, as they are, each with a zero byte behind it.")
def find(
    request: Request, where: options.Where, *, indexed: bool, long: bool, null: bool, depth: int | None, **wish: Any
) -> None:
    """Find files below folders by name, type, size and time.

    Without a condition all are listed. With --index it is told which snapshots have them. Exit code 0 also when nothing fits.
    """
    options.require_paths(where)
    condition = _condition(**wish)
    if indexed:
        _find_in_index(request, where, condition, depth=depth, long=long, null=null)
        return
    with options.opened(request, where) as inside:
        tops = options.found(request, inside, where.paths)
        found = [
            (browser, one)
            for browser, top in tops
            for _, one in browser.walk(top, depth=depth)
            if condition.fits(browser, one)
        ]
        about = options.about([one for one, _ in tops])
        if request.json:
            json_out.show({**about, "entries": [file_render.entry(*one) for one in found]})
        else:
            file_render.show_list([one for _, one in found], long=long, null=null, whole=True)


def _condition(
    *, pattern: str | None, ignore_case: bool, kind: str | None, larger: int | None, smaller: int | None,
    newer: str | None, older: str | None,
) -> _Condition:  # fmt: skip
    return _Condition(
        name=None if pattern is None else os.fsencode(pattern),
        ignore_case=ignore_case,
        type=None if kind is None else _TYPES[kind],
        larger=larger,
        smaller=smaller,
        since=None if newer is None else _nanoseconds(newer, "--newer"),
        until=None if older is None else _nanoseconds(older, "--older"),
    )


def _nanoseconds(text: str, option: str) -> int:
    return int(arguments.moment(text, option).timestamp()) * 1_000_000_000


# --- in all snapshots -----------------------------------------------------------------------------------------------


def _find_in_index(
    request: Request, where: options.Where, condition: _Condition, *, depth: int | None, long: bool, null: bool
) -> None:
    if where.image is not None or where.home is not None:
        raise errors.UsageError("only VMs have an index of files", hint="name a VM, or leave out --index")
    if where.present:
        raise errors.UsageError("the index holds snapshots, and not the present", hint="leave out --index or --present")
    if where.reader != options.READERS[0]:
        raise errors.UsageError("the index is made by hvmgr's own readers", hint="leave out --index, or --reader")
    from hvmgr.operations.inside import indexing, searching

    keys = key_files.read(where.key_files)
    with request.host() as host:
        vm = host.vm(where.words[0])
        chosen = None if where.snapshot is None else frozenset([vm.snapshot(where.snapshot).id])
        wish = searching.Wish(
            paths=where.paths, name=condition.name, ignore_case=condition.ignore_case, depth=depth, suits=condition.suits,
            snapshots=chosen, disk=where.slot, partition=where.partition,
        )  # fmt: skip
        indexing.require_fitting(vm, keys, wait_s=_wait_s(request))
        with indexing.opened(vm, wait_s=_wait_s(request), reading=request.dry_run) as found:
            is_tried = not request.dry_run and _bring_up_to_date(request, vm, found, keys)
            locked = searching.locked(
                found.points(), wish
            )  # before: what another command takes in meanwhile may be told
            hits = searching.search(found, wish)
            left_out = _left_out(found)
        names = {one.id: one.name for one in vm.snapshots()}
        options.tell_left_out(left_out)
        _tell_locked(locked, names, keys, is_tried=is_tried)
        if request.json:
            entries = [_hit(one, names) for one in hits]
            json_out.show({"left_out": left_out, "locked": _locked(locked), "entries": entries})
        else:
            _show_hits(hits, names, long=long, null=null)


def _bring_up_to_date(request: Request, vm: VM, index: FileIndex, keys: Sequence[Key]) -> bool:
    """Whether it is; what is in the index already is answered all the same."""
    from hvmgr.operations.inside import indexing

    try:
        indexing.update(vm, index, request.report, keys)
        return True
    except (errors.Busy, errors.NotFound, errors.NoSpace) as error:
        coming, _ = indexing.missing(vm, index)
        if not index.points():
            raise
        missing = ", ".join(f"'{one.name}'" for one in coming) or "none"
        render.notice(
            f"the index could not be brought up to date: {error.message}; snapshots that are not in it: {missing}"
        )
        return False


def _left_out(index: FileIndex) -> dict[str, int]:
    count = sum(one.left_out for one in index.points())
    if not count:
        return {}
    from hvmgr.operations.inside.browsing import DAMAGED

    return {DAMAGED: count}


def _tell_locked(
    locked: Mapping[str, Sequence[Locked]], names: Mapping[str, str], keys: Sequence[Key], *, is_tried: bool
) -> None:
    """What is not in the index because no key opened it, in one line."""
    if not locked:
        return
    those = [f"'{names.get(one) or one}'" for one in locked]
    where = ", ".join(those) if len(those) <= _NAMED_MAX else f"{len(those)} snapshots"
    what = ", ".join(dict.fromkeys(one.title for volumes in locked.values() for one in volumes))
    why = ": its key can be given: --key-file FILE"
    if keys:
        why = ": none of the keys that were given opens it" if is_tried else " yet"
    render.notice(f"{what} of {where} is encrypted (LUKS), and not in the index{why}")


def _locked(locked: Mapping[str, Sequence[Locked]]) -> dict[str, list[str]]:
    return {snapshot: [one.title for one in volumes] for snapshot, volumes in locked.items()}


def _hit(one: Hit, names: dict[str, str]) -> dict[str, Any]:
    entry = one.entry
    return {
        **file_render.name_of(one.path),
        "type": entry.type,
        "size": entry.size,
        "mode": file_render.octal(entry.mode),
        "uid": entry.uid,
        "gid": entry.gid,
        "links": entry.links,
        "modified": file_render.stored(entry.modified),
        "disk": one.place.disk,
        "partition": one.place.partition,
        "logical": one.place.logical or None,
        "snapshots": [{"id": snapshot, "name": names.get(snapshot)} for snapshot in one.snapshots],
    }


def _show_hits(hits: Sequence[Hit], names: dict[str, str], *, long: bool, null: bool) -> None:
    if null:
        file_render.show_null(dict.fromkeys(one.path for one in hits))
        return
    several = len({(one.place.disk, one.place.partition, one.place.logical) for one in hits}) > 1
    headers = [*(file_render.HEADERS[:-1] if long else ()), "Path", "Snapshots", *(["On"] if several else [])]
    rows = []
    for one in hits:
        facts = file_render.index_row(one.entry) if long else ()
        where = [names.get(snapshot) or snapshot for snapshot in one.snapshots]
        row = [*facts, render.clean(os.fsdecode(one.path)), render.clean(", ".join(where))]
        place = one.place.logical or " ".join(filter(None, (one.place.disk, str(one.place.partition or ""))))
        rows.append([*row, place] if several else row)
    render.table(headers, rows, right=("Links", "Size"))


@click.command(
    "index",
    cls=Command,
    codes=(*READS[:-2], 7, *READS[-2:]),
    examples=["hvmgr file index web", "hvmgr file index web --rebuild", "hvmgr file index web --key-file /run/key"],
)
@arguments.vm
@click.option("--rebuild", is_flag=True, help="Forget all of it first.")
@click.option(
    "--key-file", "files", metavar="[VOLUME=]FILE", multiple=True,
    help="The key of what is encrypted with LUKS, which is taken in then: the names of its files lie in the index in clear"
    " (mode 0600), the key does not. As for 'file list'.",
)  # fmt: skip
@click.pass_obj
def index(request: Request, vm: str, *, rebuild: bool, files: tuple[str, ...]) -> None:
    """Bring the index of the files in all snapshots up to date, for 'file find --index'.

    A new snapshot costs what was written since the one before. The index lies in the VM's home and may be removed at any time.
    """
    from hvmgr.operations.inside import indexing, searching

    keys = key_files.read(files)
    with request.host() as host:
        found = host.vm(vm)
        path = indexing.place_of(found)
        indexing.require_fitting(found, keys, wait_s=_wait_s(request), anew=rebuild)
        if request.dry_run:
            _show_missing(request, found, keys, rebuild=rebuild)
            return
        with indexing.opened(found, wait_s=_wait_s(request), anew=rebuild) as opened:
            done = indexing.update(found, opened, request.report, keys)
            points, left_out = opened.points(), _left_out(opened)
        locked = searching.locked(points, searching.Wish(paths=()))
        options.tell_left_out(left_out)
        _tell_locked(locked, {one.id: one.name for one in found.snapshots()}, keys, is_tried=True)
        sentence = f"{len(points)} snapshot{'' if len(points) == 1 else 's'} in {path} ({_told(done)})"
        snapshots = [one.snapshot for one in points]
        request.done(
            sentence,
            {**_facts(path, done), "snapshots": snapshots, "left_out": left_out, "locked": _locked(locked)},
            changed=bool(done.added or done.completed or done.removed),
        )


def _facts(path: Any, done: Updated) -> dict[str, Any]:
    return {
        "file": str(path), "size": path.stat().st_size, "added": done.added, "completed": done.completed,
        "removed": done.removed, "folders": done.folders,
    }  # fmt: skip


def _told(done: Updated) -> str:
    parts = {"added": done.added, "completed": done.completed, "removed": done.removed}
    return ", ".join(f"{len(those)} {what}" for what, those in parts.items() if those) or "up to date"


def _show_missing(request: Request, vm: VM, keys: Sequence[Key], *, rebuild: bool) -> None:
    from hvmgr.operations.inside import indexing

    completed: list[Snapshot] = []
    gone: list[Point] = []
    coming = list(vm.snapshots())
    if not rebuild:
        with contextlib.suppress(errors.NotFound), indexing.opened(vm, wait_s=_wait_s(request), reading=True) as opened:
            coming, gone = indexing.missing(vm, opened)
            completed = indexing.to_complete(vm, opened) if keys else []
    if request.json:
        removed = [one.snapshot for one in gone]
        ids = {"added": [one.id for one in coming], "completed": [one.id for one in completed], "removed": removed}
        json_out.show({"plan": None, **ids})
    else:
        more = f", {len(completed)} completed" if completed else ""
        render.say(f"{len(coming)} snapshots would be added{more}, {len(gone)} removed")


def _wait_s(request: Request) -> float:
    return settings.LOCK_WAIT_S if request.wait_s is None else request.wait_s
