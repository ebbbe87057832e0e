"""What people read: tables and trees. Colours and frames on a terminal, plain lines without any ANSI in a pipe.

A line in a pipe has its values between tabs. Whatever comes from names, notes and files is shown with unprintable
characters escaped, so that no name can speak to a terminal.
"""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from hvmgr import errors, units

if TYPE_CHECKING:
    from hvmgr.model.tree import Tree
    from hvmgr.operations.snapshot import Snapshot
    from hvmgr.operations.usage import Usage
    from hvmgr.operations.vm import VM

_FOLDED = 12  # the least that a part of a long cell may take

_BRANCH, _LAST, _BAR, _GAP = "├── ", "└── ", "│   ", "    "


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a drawn tree: its place, its name, the columns behind it, and how a terminal shows it."""

    place: str
    name: str
    columns: tuple[str, ...] = ()
    style: str = ""


def is_terminal() -> bool:
    """Whether a person looks at stdout."""
    return sys.stdout.isatty()


def clean(text: str) -> str:
    """The text on one line, what cannot be printed as an escape."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def put(text: str) -> None:
    """Text on stdout as it is; HostFailed when it cannot be written, but for a reader who has gone."""
    try:
        sys.stdout.write(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.HostFailed(f"cannot write the output: {error.strerror}") from error


def say(sentence: str) -> None:
    """A line on stdout."""
    put(clean(sentence) + "\n")


def notice(sentence: str) -> None:
    """A line on stderr; that nobody can read it never stops an operation."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(clean(sentence) + "\n")
        sys.stderr.flush()


def complain(message: str, hint: str | None) -> None:
    """What failed, and what to do."""
    notice(f"hvmgr: {message}")
    if hint:
        for line in hint.splitlines():
            notice(f"  {line}")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table on a terminal, lines of tab-separated values in a pipe; ``right`` names the columns of numbers.

    Where a terminal is too narrow for words to stay whole, each row is a paragraph.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    if not is_terminal():
        for row in cells:
            put("\t".join(row) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if cells and _least_width(headers, cells) > console.width:
        for number, row in enumerate(cells):
            put("\n" if number else "")
            facts((header, cell) for header, cell in zip(headers, row, strict=True) if cell)
        return
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header in headers:
        drawn.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    console.print(drawn)


def _least_width(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """How wide a table has to be, with its padding; of long cells a part stands in each line."""
    columns = zip(headers, *cells, strict=True)
    return sum(min(max(map(_width, column)), _FOLDED) + 3 for column in columns)


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    found = list(pairs)
    width = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        if is_terminal():
            put(f"{name + ':' if name else '':<{width + 1}}  {clean(value)}\n")
        else:
            put(f"{name}\t{clean(value)}\n")


def state_of(one: Snapshot) -> str:
    """What a snapshot brings back: a running, paused or switched off VM, nothing but its disks, or nothing at all."""
    if one.damaged:
        return "damaged"
    if one.type.value == "disk-only":
        return "disk-only"
    return "off" if one.state.value == "none" else one.state.value


def type_of(one: Snapshot) -> str:
    """What kind of snapshot it is, and that nobody asked for it."""
    return one.type.value if one.automatic is None else f"{one.type.value}, automatic"


def draw_tree(vm: VM) -> str:
    """The snapshot tree of a VM as text: snapshots, the present (``Now``), the undo slot, images without a name."""
    lines, remarks = _tree_lines(vm)
    return "\n".join([*(text for text, _ in _aligned(lines)), *remarks])


def show_tree(vm: VM) -> None:
    """The drawn tree on stdout, with colours on a terminal."""
    lines, remarks = _tree_lines(vm)
    if not is_terminal():
        put("\n".join([*(text for text, _ in _aligned(lines)), *remarks]) + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for text, style in _aligned(lines):
        console.print(Text(text, style=style), soft_wrap=True)
    for remark in remarks:
        console.print(Text(remark, style="dim"), soft_wrap=True)


def _tree_lines(vm: VM) -> tuple[list[_Line], list[str]]:
    snapshots, tree, usage = vm.snapshots(), vm.tree(), vm.usage()
    lines = [_Line("", clean(vm.name), style="bold"), *_branches(snapshots, tree, usage)]
    return lines, _remarks(vm.name, tree)


def _outside(snapshots: list[Snapshot], tree: Tree) -> dict[str, int]:
    """What images outside the home take, each for the oldest that names it: ``space`` sums up what is inside alone."""
    from hvmgr.model.tree import Keeper

    disks = {one.id: tree.nodes[one.id].disks for one in snapshots} | {"now": tree.present.disks}
    if tree.undo is not None:
        disks["undo"] = tree.undo.disks
    left = {path: image.data for path, image in tree.images.items() if image.keeper is Keeper.OUTSIDE}
    return {key: sum(left.pop(path, 0) for path in slots.values()) for key, slots in disks.items()}


def _branches(snapshots: list[Snapshot], tree: Tree, usage: Usage) -> Iterator[_Line]:
    """The tree's lines from its roots down; without recursion, for trees may be deep."""
    known = {one.id: one for one in snapshots}
    outside = _outside(snapshots, tree)
    sizes = {one.snapshot_id: one.images + one.memory + outside[one.snapshot_id] for one in usage.snapshots}
    below: dict[str | None, list[str]] = {}
    for one in snapshots:
        below.setdefault(one.parent if one.parent in known else None, []).append(one.id)
    leaves = {"now": ("Now", usage.now + outside["now"], "bold green", tree.present.parent)}
    if tree.undo is not None:
        leaves["undo"] = ("(undo slot)", usage.undo + outside["undo"], "dim", tree.undo.parent)
    for key in reversed(leaves):
        parent = leaves[key][3]
        below.setdefault(parent if parent in known else None, []).append(key)
    todo = [(one, "", one == below[None][-1]) for one in reversed(below.get(None, []))]
    while todo:
        key, prefix, is_last = todo.pop()
        place = prefix + (_LAST if is_last else _BRANCH)
        if key in leaves:
            name, size, style, _ = leaves[key]
            yield _Line(place, name, ("", "", units.format_size(size), ""), style)
            continue
        one = known[key]
        columns = (type_of(one), units.format_local(one.created), units.format_size(sizes[key]), state_of(one))
        yield _Line(place, clean(one.name), columns)
        children = below.get(key, [])
        deeper = prefix + (_GAP if is_last else _BAR)
        todo += [(child, deeper, child == children[-1]) for child in reversed(children)]


def _aligned(lines: list[_Line]) -> Iterator[tuple[str, str]]:
    """Each line as text with its style; columns stand below each other, sizes to the right."""
    name_width = max(_width(line.place + line.name) for line in lines)
    count = max(len(line.columns) for line in lines)
    widths = [max((len(line.columns[i]) for line in lines if line.columns), default=0) for i in range(count)]
    for line in lines:
        start = line.place + line.name
        cells = [
            cell.rjust(width) if i == 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line.columns, widths, strict=False))
        ]
        text = "  ".join([start + " " * (name_width - _width(start)), *cells])
        yield text.rstrip(), line.style


def _remarks(vm: str, tree: Tree) -> list[str]:
    """Images that no snapshot names: those that wait to be merged, and those that several children need."""
    import shlex

    from hvmgr.model import outside_images
    from hvmgr.model import tree as trees

    waiting = dict(trees.pending(tree))
    to_name = outside_images.names_needed(tree)
    children = tree.children()
    remarks = []
    for path in trees.unnamed(tree):
        image = tree.images[path]
        size = units.format_size(image.data)
        if path not in waiting and path not in to_name and image.keeper is not trees.Keeper.IMAGES:
            continue  # a base needs no name
        if path in to_name:
            words = " ".join(f"--image {shlex.quote(name)}" for name in to_name[path])
            what = f"merged only by name: hvmgr snapshot merge {shlex.quote(vm)} {words}"
        elif tree.strangers.get(path):
            what = f"needed by {', '.join(tree.strangers[path])}"
        elif path in waiting:
            what = f"waits to be merged into {PurePath(waiting[path]).name}"
        else:
            what = f"kept for the {len(children[path])} images that stand on it"
        remarks.append(f"unnamed image {PurePath(path).name} ({size}): {what}")
    return remarks


def _width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )
