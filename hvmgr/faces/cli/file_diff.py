"""``hvmgr file diff``: what became of the files between two moments."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, file_render, json_out, key_files, render
from hvmgr.faces.cli import file_options as options
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.inside.comparison import Difference
    from hvmgr.operations.inside.differing import Outcome
    from hvmgr.operations.inside.views import Frozen
    from hvmgr.storage.filesystems.reader import Node

NOW = "now"


@dataclass(frozen=True, slots=True)
class _Moments:
    """Which disks at which two moments; ``words`` are the VM, the moments and the paths, as far as they have to be said."""

    words: tuple[str, ...]
    slot: str | None
    images: tuple[Path, ...]
    home: Path | None
    fmt: str | None
    key_files: tuple[str, ...]
    present: bool

    def check(self) -> None:
        """UsageError for what does not fit together."""
        if self.images and self.home is not None:
            raise errors.UsageError("--image and --home name two different things", hint="give one of them")
        if self.images and len(self.images) != 2:
            raise errors.UsageError(
                "two images are compared", hint="give --image twice: the older one, then the newer one"
            )
        if self.images and self.slot is not None:
            raise errors.UsageError("an image file has no slots", hint="leave out --disk")
        if self.fmt is not None and not self.images:
            raise errors.UsageError("--format says what the files of --image are", hint="leave it out")
        if self.present and (self.images or self.home is not None):
            raise errors.UsageError("--present is of a VM", hint="leave it out")
        if len(self.words) < self._said:
            what = "two moments are" if self.home is not None else "a VM and two moments of it are"
            what = "a VM and a snapshot of it are" if self.present else what
            raise errors.UsageError(f"{what} to be named", hint="name snapshots; 'now' is the present")

    @property
    def _said(self) -> int:
        """How many words are no paths."""
        return 0 if self.images else 2 if self.home is not None or self._adds_now else 3

    @property
    def _adds_now(self) -> bool:
        """Whether the present, which is asked for, is the second moment without being said."""
        return self.present and NOW not in self.words[1:3]

    @property
    def paths(self) -> list[bytes]:
        """The paths inside."""
        return [os.fsencode(one) for one in self.words[self._said :]]

    @contextlib.contextmanager
    def still(self, host: Host) -> Iterator[tuple[list[Frozen], list[Frozen]]]:
        """The disks at both moments, frozen as long as the block lasts."""
        from hvmgr.operations.inside import standing, views

        if self.images:
            old, new = ([views.of_image(one, self.fmt)] for one in self.images)
            yield old, new
            return
        words = self.words if self.home is not None else self.words[1:]
        moments = (words[0], NOW) if self._adds_now else words[:2]
        found: dict[str, list[Frozen]] = {}
        with contextlib.ExitStack() as stack:
            for one in sorted(moments, key=lambda one: one == NOW):  # a snapshot that is not there freezes nothing
                snapshot = None if one == NOW else one
                if self.home is not None:
                    found[one] = views.of_folder(self.home, snapshot=snapshot, slot=self.slot)
                elif one == NOW and self.present:
                    found[one] = stack.enter_context(standing.still(host.vm(self.words[0]), slot=self.slot))
                else:
                    found[one] = views.of_vm(host.vm(self.words[0]), snapshot=snapshot, slot=self.slot)
            yield found[moments[0]], found[moments[1]]


class _VmThenMoments(arguments.VmName):
    """The first word names a VM, the next two are snapshots of it, or the present, the others are paths."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Names of VMs, then of snapshots."""
        said = ctx.params.get("words") or ()
        if not said:
            return super().shell_complete(ctx, param, incomplete)
        ctx.params["vm"] = said[0]
        return arguments.SnapshotName().shell_complete(ctx, param, incomplete) if len(said) < 3 else []


@click.command(
    "diff",
    cls=Command,
    codes=READS,
    examples=[
        "hvmgr file diff web before after",
        "hvmgr file diff web before now /etc /usr/local",
        "hvmgr file diff web before --present",
        "hvmgr file diff --image old.qcow2 --image new.qcow2 --json",
    ],
)
@click.argument("words", metavar="VM A B [PATH]...", nargs=-1, type=_VmThenMoments())
@click.option(
    "--present", is_flag=True,
    help="'now' is this very moment of a running VM, and B where it is not said: it goes on in new images, which are merged afterwards.",
)  # fmt: skip
@click.option("--disk", "slot", metavar="SLOT", help="On this disk only.")
@click.option("--partition", metavar="N|GROUP/VOLUME", help="On this partition, or logical volume, only.")
@click.option(
    "--image", "images", metavar="FILE", multiple=True, type=click.Path(path_type=Path),
    help="Twice: the disks in two image files, the older one first; no VM is named.",
)  # fmt: skip
@click.option(
    "--home", metavar="DIR", type=click.Path(path_type=Path),
    help="The disks of an export, or of a VM home wherever it lies now; no VM is named.",
)  # fmt: skip
@click.option(
    "--format",
    "fmt",
    type=click.Choice(options.FORMATS),
    help="The format of both images, if it is not to be found out.",
)
@key_files.option
@click.option("--null", is_flag=True, help="Only the paths, as they are, each with a zero byte behind it.")
@click.pass_obj
def diff(request: Request, /, partition: str | None, *, null: bool, **given: Any) -> None:
    """Tell which files were added, changed, removed and renamed between two moments.

    A and B are snapshots, or 'now' for the present, which of a VM that runs is its latest snapshot without --present. Only what was written in between is looked at, and of that only what is
    needed to know. Exit code 0 also when nothing differs.
    """
    moments = _Moments(**given)
    moments.check()
    keys = key_files.read(moments.key_files)
    with request.host() as host, moments.still(host) as (old, new):
        for moment in dict.fromkeys(one.moment for one in (*old, *new) if one.moment is not None):
            render.notice(moment)
        from hvmgr.operations.inside import differing

        outcome = differing.between(old, new, paths=moments.paths, partition=partition, keys=keys)
        _tell(outcome)
        if request.json:
            json_out.show(_document(old, new, outcome))
        else:
            _show(outcome, null=null)


def _tell(outcome: Outcome) -> None:
    """What is to be known of the file systems, and what could not be compared."""
    for pair in outcome.browsers:
        notes = dict.fromkeys(
            f"{one.volume.title}: {note}" for one in pair if one is not None for note in one.reader.notes
        )
        for note in notes:
            render.notice(note)
    for volume in outcome.sealed_anew:
        render.notice(f"{volume.title} is not encrypted with the same key at both moments, and was compared as a whole")
    for one in outcome.uncompared:
        render.notice(f"{one.volume.title} was written to, and cannot be compared: {one.why}")
    options.tell_left_out(outcome.left_out)
    browsers = dict.fromkeys(one for pair in outcome.browsers for one in pair if one is not None)
    options.tell_damaged(list(dict.fromkeys(path for one in browsers for path in one.damaged)))


def _show(outcome: Outcome, *, null: bool) -> None:
    if null:
        sys.stdout.buffer.write(b"".join(one.path + b"\0" for one in outcome.differences))
        return
    if not outcome.differences:
        if render.is_terminal():
            render.say("no file differs")
        return
    several = len({one.volume.title for one in outcome.differences}) > 1
    rows = [_row(one, several=several) for one in outcome.differences]
    render.table(("Change", "Path", "What", *(("On",) if several else ())), rows)


def _row(one: Difference, *, several: bool) -> tuple[str, ...]:
    what = ", ".join(one.what)
    if one.source is not None:
        what = "; ".join(filter(None, (f"was {os.fsdecode(one.source)}", what)))
    row = (one.change.value, render.clean(os.fsdecode(one.path)), render.clean(what) or "-")
    return (*row, one.volume.title) if several else row


# --- the document ---------------------------------------------------------------------------------------------------


def _document(old: Sequence[Frozen], new: Sequence[Frozen], outcome: Outcome) -> dict[str, Any]:
    return {
        "old": [_moment(one) for one in old],
        "new": [_moment(one) for one in new],
        "sources": [file_render.source(after or before) for before, after in outcome.browsers],  # type: ignore[arg-type]
        "left_out": outcome.left_out,
        "not_compared": [{**file_render.volume(one.volume), "why": one.why} for one in outcome.uncompared],
        "differences": [_difference(one) for one in outcome.differences],
    }


def _moment(one: Frozen) -> dict[str, Any]:
    return {"disk": one.slot, "of": one.name, "moment": one.moment}


def _difference(one: Difference) -> dict[str, Any]:
    node = one.new or one.old
    assert node is not None
    source = {} if one.source is None else file_render.name_of(one.source)
    return {
        **file_render.name_of(one.path),
        "change": one.change.value,
        "what": list(one.what),
        "type": node.type.value,
        "from": source.get("path"),
        **({"from_base64": source["path_base64"]} if "path_base64" in source else {}),
        "old": _facts(one.old),
        "new": _facts(one.new),
        "disk": one.volume.disk.slot,
        "partition": one.volume.number,
        "logical": one.volume.logical or None,
    }


def _facts(node: Node | None) -> dict[str, Any] | None:
    if node is None:
        return None
    return {
        "size": node.size,
        "mode": None if node.mode is None else f"{node.mode:04o}",
        "uid": node.uid,
        "gid": node.gid,
        "modified": file_render.stored(node.modified),
    }
