"""``hvmgr snapshot``: take, show, apply, undo, merge and delete snapshots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, units
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Group
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.host.domain import State
    from hvmgr.operations.snapshot import Snapshot
    from hvmgr.operations.vm import VM

_TYPES = ("standard", "production", "production-only", "disk-only")


@click.group("snapshot", cls=Group, aliases={"restore": "apply"})
def command() -> None:
    """Take, show, apply, undo, merge and delete snapshots.

    A snapshot is a copy of the VM's configuration, its saved memory when it was running, and its disks as they were. The
    command restore is another name for apply.
    """


# --- take and look --------------------------------------------------------------------------------------------------


@command.command("create", examples=["hvmgr snapshot create web 'before the update'",
                                     "hvmgr snapshot create web nightly --notes 'cron' --type disk-only"])  # fmt: skip
@arguments.vm
@click.argument("name", required=False)
@click.option("--notes", default="", metavar="T", help="A text that stays with the snapshot.")
@click.option("--type", "kind", type=click.Choice(_TYPES),
              help="standard saves the memory of a running VM too, disk-only does not; for production its agent puts its"
                   " file systems to rest, or else a standard one is taken, with production-only none. Without it: what"
                   " 'vm set' says.")  # fmt: skip
@click.option("--no-fallback", is_flag=True,
              help="Fail where a running guest would have to stand still while its memory is saved.")  # fmt: skip
@click.option("--compress", type=click.Choice(("zstd", "none")), help="Whether the saved memory is compressed.")
@click.pass_obj
def create(
    request: Request,
    vm: str,
    name: str | None,
    *,
    notes: str,
    kind: str | None,
    no_fallback: bool,
    compress: str | None,
) -> None:
    """Take a snapshot of a VM as it is now.

    A running VM keeps running, also while its memory is saved, where the host lets QEMU do that. Without NAME the snapshot is called after the VM and the time. The undo slot is emptied.
    """
    from hvmgr.model.metadata import SnapshotType

    with request.host() as host, request.changing():
        one = host.vm(vm)
        with request.seconded(one):
            made = one.create_snapshot(
                name,
                notes=notes,
                type=None if kind is None else SnapshotType(kind),
                fallback=not no_fallback,
                compress=None if compress is None else compress == "zstd",
            )
        request.done(f"created snapshot '{made.name}' of {one.name}", {"snapshot": json_out.snapshot(made)})


@command.command("list", codes=READS, examples=["hvmgr snapshot list web", "hvmgr snapshot list web --json"])
@arguments.vm
@click.pass_obj
def show_list(request: Request, vm: str) -> None:
    """List the snapshots of a VM, oldest first.

    In a pipe each line holds id, name, type, state, time, parent's id and, of an automatic one, why it was taken, between
    tabs. libvirt is asked for the VM's state with --json only.
    """
    with request.host() as host:
        one = host.vm(vm)
        found = one.snapshots()
        if request.json:
            json_out.show(json_out.snapshots(one, request.state(one), found))
            return
        if render.is_terminal():
            headers = ("Name", "Type", "State", "Created", "Id")
            rows = [
                (s.name, render.type_of(s), render.state_of(s), units.format_local(s.created), s.id[:8]) for s in found
            ]
        else:
            headers = ("Id", "Name", "Type", "State", "Created", "Parent", "Automatic")  # type: ignore[assignment]
            rows = [_line(s) for s in found]  # type: ignore[misc]
        render.table(headers, rows)


@command.command("tree", codes=READS, examples=["hvmgr snapshot tree web"])
@arguments.vm
@click.pass_obj
def show_tree(request: Request, vm: str) -> None:
    """Draw the snapshot tree of a VM.

    Each line has the snapshot's name, type, time, size on disk, and what applying it brings back: a running or paused VM,
    one that is off, or (disk-only) the disks alone. Now is the present, the undo slot what the last apply put away.
    Below the tree stand images that no snapshot names any more but that others need.
    """
    with request.host() as host:
        one = host.vm(vm)
        if request.json:
            json_out.show(json_out.snapshots(one, request.state(one), one.snapshots()))
        else:
            render.show_tree(one)


@command.command("show", codes=READS, examples=["hvmgr snapshot show web 'before the update'"])
@arguments.vm
@arguments.snapshot
@click.pass_obj
def show(request: Request, vm: str, snap: str) -> None:
    """Show one snapshot: its facts, and the chain of each disk with the size of each image."""
    with request.host() as host:
        one = host.vm(vm)
        found = one.snapshot(snap)
        if request.json:
            json_out.show(json_out.snapshots(one, request.state(one), [found]))
            return
        names = {s.id: s.name for s in one.snapshots()}
        render.facts(
            [
                ("name", found.name),
                ("id", found.id),
                ("vm", one.name),
                ("created", units.format_local(found.created)),
                ("type", found.type.value),
                ("automatic", found.automatic or "no"),
                ("state", render.state_of(found)),
                ("parent", names.get(found.parent or "", "-")),
                *([("notes", found.notes)] if found.notes else []),
            ]
        )
        tree = one.tree()
        rows = [
            (slot, str(depth), image.path, image.format, units.format_size(image.size), units.format_size(image.data))
            for slot, path in found.disks.items()
            for depth, image in enumerate(tree.chain(path))
        ]
        render.table(("Disk", "Depth", "Image", "Format", "Size", "On disk"), rows, right=("Depth", "Size", "On disk"))


# --- describe -------------------------------------------------------------------------------------------------------


@command.command("rename", examples=["hvmgr snapshot rename web 'before the update' 'before 2.0'"])
@arguments.vm
@arguments.snapshot
@click.argument("name")
@click.pass_obj
def rename(request: Request, vm: str, snap: str, name: str) -> None:
    """Give a snapshot another NAME of 1 to 100 printable characters."""
    with request.host() as host, request.changing():
        one = host.vm(vm)
        old = one.snapshot(snap)
        if changed := name != old.name:
            old.rename(name=name)
        made = one.snapshot(old.id)
        request.done(
            f"renamed snapshot '{old.name}' of {one.name} to '{made.name}'" if changed else "that is its name already",
            {"snapshot": json_out.snapshot(made)},
            changed=changed,
        )


@command.command("notes", examples=["hvmgr snapshot notes web nightly 'checked by Ana'", "hvmgr snapshot notes web nightly",
                                    "hvmgr snapshot notes web nightly - < notes.txt"])  # fmt: skip
@arguments.vm
@arguments.snapshot
@click.argument("text", required=False)
@click.pass_obj
def notes(request: Request, vm: str, snap: str, text: str | None) -> None:
    """Give a snapshot other notes, or print them.

    Without TEXT the notes are printed; '-' takes the text from stdin, an empty TEXT removes the notes.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        old = one.snapshot(snap)
        if text is None:
            _print_notes(request, old)
            return
        wanted = arguments.from_stdin() if text == "-" else text
        if changed := wanted != old.notes:
            old.set_notes(wanted)
        made = one.snapshot(old.id)
        request.done(
            f"changed the notes of snapshot '{made.name}' of {one.name}" if changed else "the notes said so already",
            {"snapshot": json_out.snapshot(made)},
            changed=changed,
        )


def _print_notes(request: Request, one: Snapshot) -> None:
    if request.json:
        json_out.show({"notes": one.notes})
    else:
        for line in one.notes.splitlines():
            render.say(line)


# --- go back --------------------------------------------------------------------------------------------------------


def _replacement(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of apply and revert."""
    for option in (
        click.option(
            "--if-needed",
            is_flag=True,
            help="Do nothing where the VM is off and still exactly what the snapshot holds.",
        ),
        click.option(
            "--discard-state", is_flag=True, help="Lose what the VM has in memory now; it is stopped at once."
        ),
        click.option("--no-undo", is_flag=True, help="Empty the undo slot; the present is lost."),
        click.option("--without-state", is_flag=True, help="Leave the saved memory; the VM is off afterwards."),
        click.option("--snapshot-first", is_flag=True, help="Take a snapshot of the present before."),
    ):
        function = option(function)
    return function


@command.command("apply", examples=["hvmgr snapshot apply web 'before the update'",
                                    "hvmgr snapshot apply web 'before the update' --snapshot-first"])  # fmt: skip
@arguments.vm
@arguments.snapshot
@_replacement
@click.pass_obj
def apply(request: Request, /, vm: str, snap: str, **how: bool) -> None:
    """Make the VM what it was at a snapshot.

    The present goes into the undo slot until the next snapshot operation; what a running VM has in memory is kept only
    with --snapshot-first. The VM then runs when it ran at the snapshot. Another name of this command is restore.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        _apply(request, one, one.snapshot(snap), **how)


@command.command("revert", context_settings={"allow_extra_args": True}, examples=["hvmgr snapshot revert web"])
@arguments.vm
@_replacement
@click.pass_context
def revert(context: click.Context, /, vm: str, **how: bool) -> None:
    """Return to the snapshot above the present: the one that was taken or applied last."""
    if context.args:
        import shlex

        wanted = shlex.join([vm, *context.args])
        raise errors.UsageError(
            "revert returns to the parent of the present and takes no snapshot",
            hint=f"to return to any other: hvmgr snapshot apply {wanted}",
        )
    request: Request = context.obj
    with request.host() as host, request.changing():
        one = host.vm(vm)
        parent = one.now().parent
        if parent is None:
            raise errors.NotFound(f"the present of {one.name} has no snapshot above it")
        _apply(request, one, one.snapshot(parent), **how)


def _apply(
    request: Request, one: VM, snapshot: Snapshot, *, if_needed: bool, snapshot_first: bool, no_undo: bool, **how: bool
) -> None:
    if if_needed and snapshot.is_still_present(without_state=how["without_state"]):
        facts = {"snapshot": json_out.snapshot(snapshot), "first": None}
        request.done(f"{one.name} is what it was at snapshot '{snapshot.name}' already", facts, changed=False)
        return
    if no_undo and not snapshot_first:
        request.require_consent(f"the present of {one.name} will be lost")
    if how["discard_state"]:
        _require_loss_of_memory(request, one)
    if request.dry_run and snapshot_first:
        # What the first part has not done yet cannot be planned on: each part is planned on the present as it is.
        first_plan = request.planned(one.create_snapshot)
        plan = request.planned(lambda: snapshot.apply(keep_undo=not no_undo, **how))
        request.show_plan(plan, first=first_plan)
        return
    first = snapshot.apply(snapshot_first=snapshot_first, keep_undo=not no_undo, **how)
    taken = f"; its present is snapshot '{first.name}' now" if first is not None else ""
    request.done(
        f"{one.name} is what it was at snapshot '{snapshot.name}'{taken}",
        {"snapshot": json_out.snapshot(snapshot), "first": None if first is None else json_out.snapshot(first)},
    )


def _require_loss_of_memory(request: Request, one: VM) -> None:
    state: State = one.state()
    if state.value != "off":
        request.require_consent(f"{one.name} is {state}: what it has in memory will be lost")


@command.command("undo", examples=["hvmgr snapshot undo web"])
@arguments.vm
@click.option("--discard-state", is_flag=True, help="Lose what the VM has in memory now; it is stopped at once.")
@click.pass_obj
def undo(request: Request, vm: str, *, discard_state: bool) -> None:
    """Take back the last apply or revert: present and undo slot change places.

    The disks and the configuration come back as after a power cut, and the VM is off; a second undo undoes the first.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        if discard_state:
            _require_loss_of_memory(request, one)
        one.undo(discard_state=discard_state)
        now = one.now()
        request.done(f"{one.name} is what it was before", {"now": {"parent": now.parent, "disks": dict(now.disks)}})


# --- delete and merge -----------------------------------------------------------------------------------------------


def _read_bandwidth(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """Bytes a second."""
    if text is None:
        return None
    hint = "write a number with a unit, such as 50M or 1.5GiB/s"
    try:
        size = units.parse_size(text.strip().removesuffix("/s"))
    except errors.UsageError as error:
        raise errors.UsageError(f"--bandwidth: {error.message}", hint=hint) from error
    if size < units.MIB:
        raise errors.UsageError(f"--bandwidth {text} is less than 1 MiB a second", hint=hint)
    return size


_bandwidth = click.option(
    "--bandwidth",
    metavar="RATE",
    callback=_read_bandwidth,
    help="Let a running VM merge at most so much a second: 50MiB.",
)


@command.command("delete", examples=["hvmgr snapshot delete web 'before the update'",
                                     "hvmgr snapshot delete web 'before the update' --subtree --yes"])  # fmt: skip
@arguments.vm
@arguments.snapshot
@click.option("--subtree", is_flag=True, help="Also all snapshots below it; needs --yes where nobody can be asked.")
@click.option("--state-only", is_flag=True, help="Only its saved memory; the disks stay.")
@_bandwidth
@click.pass_obj
def delete(request: Request, vm: str, snap: str, *, subtree: bool, state_only: bool, bandwidth: int | None) -> None:
    """Delete a snapshot; what others need of it is kept.

    Snapshots below it stay and move up. An image with one child left is merged with it, by the VM itself when it runs; what
    cannot be merged now waits for a 'snapshot merge'. The present never changes. The undo slot is emptied. Ctrl-C stops a
    merge; its images then wait.
    """
    if subtree and state_only:
        raise errors.UsageError("--subtree and --state-only exclude each other", hint="give one of them")
    with request.host() as host, request.changing():
        one = host.vm(vm)
        snapshot = one.snapshot(snap)
        if subtree:
            names = {s.id: s.name for s in one.snapshots()}
            below = [names[found] for found in one.tree().subtree(snapshot.id)]
            request.require_consent(f"these snapshots of {one.name} will be deleted", below, always=True)
        gone = snapshot.delete(subtree=subtree, state_only=state_only, bandwidth=bandwidth)
        what = "the saved state of snapshot" if state_only else "snapshot"
        more = f" and {len(gone) - 1} below it" if len(gone) > 1 else ""
        request.done(f"deleted {what} '{snapshot.name}'{more} of {one.name}", {"deleted": gone})


@command.command("merge", examples=["hvmgr snapshot merge web",
                                    "hvmgr snapshot merge web --image /srv/web.backup-overlay"])  # fmt: skip
@arguments.vm
@click.option("--image", "images", type=click.Path(path_type=Path), multiple=True, metavar="PATH",
              help="Also this image, which others made; it is removed. Repeatable.")  # fmt: skip
@_bandwidth
@click.pass_obj
def merge(request: Request, vm: str, images: tuple[Path, ...], bandwidth: int | None) -> None:
    """Merge the images that were left waiting when snapshots were deleted.

    A VM that runs or is paused merges them itself, and its guest goes on meanwhile. Ctrl-C stops that, and they wait on.
    Images that were made outside hvmgr (by virsh, by a backup tool) are only merged, and removed, when --image names them;
    'snapshot tree' says which ones wait for that.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        changed = one.merge(images, bandwidth=bandwidth)
        sentence = f"merged the unnamed images of {one.name}" if changed else f"nothing of {one.name} can be merged now"
        request.done(sentence, {}, changed=changed)


def _line(one: Snapshot) -> tuple[str, ...]:
    return (
        one.id,
        one.name,
        one.type.value,
        render.state_of(one),
        units.format_local(one.created),
        one.parent or "",
        one.automatic or "",
    )
