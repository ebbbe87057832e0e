"""``hvmgr file``: files inside the disks of VMs, snapshots, exports and images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from hvmgr.faces.cli import arguments, file_put, file_render, file_take, json_out, render
from hvmgr.faces.cli import file_options as options
from hvmgr.faces.cli.file_options import CODES
from hvmgr.faces.cli.groups import Group
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.inside.browsing import Browser, Found
    from hvmgr.operations.inside.looking import Inside
    from hvmgr.storage.filesystems.reader import Type

_TYPES = {
    "f": "file",
    "d": "folder",
    "l": "link",
    "b": "block-device",
    "c": "character-device",
    "p": "pipe",
    "s": "socket",
}


@click.group("file", cls=Group)
def command() -> None:
    """Look at, take out and put in files inside the disks of VMs, snapshots, exports and images."""


@command.command(
    "list",
    codes=CODES,
    examples=[
        "hvmgr file list web",
        "hvmgr file list web /etc --snapshot before",
        "hvmgr file list --image disk.vhd '/Users/*/Documents' --long",
    ],
)
@options.where("VM [PATH]...")
@click.option("-l", "--long", is_flag=True, help="With modes, owners, sizes and times.")
@click.option("--null", is_flag=True, help="Only the paths, as they are, each with a zero byte behind it.")
def list_(request: Request, where: options.Where, *, long: bool, null: bool) -> None:
    """List what is in folders; without a path the file systems that there are.

    A path may have *, ?, [...] and **, which means any number of folders. The VM may run: then its latest snapshot is shown.
    """
    with options.opened(request, where) as inside:
        if not where.paths:
            _list_volumes(request, inside)
            return
        found = options.found(request, inside, where.paths)
        entries = [(browser, one) for browser, top in found for one in _listed(browser, top)]
        about = options.about([one for one, _ in found])
        if request.json:
            json_out.show({**about, "entries": [file_render.entry(*one) for one in entries]})
        else:
            file_render.show_list([one for _, one in entries], long=long, null=null, whole=len(found) > 1)


def _listed(browser: Browser, top: Found) -> Iterator[Found]:
    if top.node.is_folder:
        yield from browser.children(top)
    else:
        yield top


def _list_volumes(request: Request, inside: Inside) -> None:
    if request.json:
        json_out.show({"volumes": [file_render.volume(one) for one in inside.volumes]})
        return
    rows = [file_render.volume_row(one) for one in inside.volumes]
    render.table(("Disk", "Partition", "Holds", "Label", "Size", "Files"), rows, right=("Partition", "Size"))


@command.command("tree", codes=CODES, examples=["hvmgr file tree web /etc/ssh", "hvmgr file tree web / --depth 2"])
@options.where("VM PATH...")
@click.option("--depth", metavar="N", type=click.IntRange(min=1), help="Not deeper than this.")
def tree(request: Request, where: options.Where, *, depth: int | None) -> None:
    """Draw folders with all that is below them."""
    options.require_paths(where)
    with options.opened(request, where) as inside:
        found = options.found(request, inside, where.paths)
        if request.json:
            walked = [(browser, one) for browser, top in found for _, one in browser.walk(top, depth=depth)]
            about = options.about([one for one, _ in found])
            json_out.show({**about, "entries": [file_render.entry(*one) for one in walked]})
            return
        for browser, top in found:
            file_render.draw_tree(browser.walk(top, depth=depth))
        options.about([one for one, _ in found])


@command.command(
    "stat", codes=CODES, examples=["hvmgr file stat web /etc/shadow", "hvmgr file stat web /etc/shadow --json"]
)
@options.where("VM PATH...")
def stat(request: Request, where: options.Where) -> None:
    """Show all that is known of files: times, modes, owners, links, streams, attributes.

    A link is shown itself, not what it leads to.
    """
    options.require_paths(where)
    with options.opened(request, where) as inside:
        found = options.found(request, inside, where.paths, follow=False)
        if request.json:
            entries = [file_render.entry(browser, one, extras=True) for browser, one in found]
            json_out.show({"sources": options.sources([one for one, _ in found]), "entries": entries})
            return
        for number, (browser, one) in enumerate(found):
            if number:
                render.put("\n")
            render.facts(file_render.facts(browser, one))


@command.command(
    "find",
    codes=CODES,
    examples=[
        "hvmgr file find web / --name '*.conf'",
        "hvmgr file find web /home --type f --larger 100M --newer '2026-11-01'",
        "hvmgr file find web / --name id_rsa --null | xargs -0 -n 1",
    ],
)
@options.where("VM PATH...")
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
def find(request: Request, where: options.Where, *, long: bool, null: bool, depth: int | None, **wish: Any) -> None:
    """Find files below folders by name, type, size and time.

    Without a condition all are listed. Exit code 0 also when nothing fits.
    """
    options.require_paths(where)
    fits = _condition(**wish)
    with options.opened(request, where) as inside:
        tops = options.found(request, inside, where.paths)
        found = [
            (browser, one) for browser, top in tops for _, one in browser.walk(top, depth=depth) if fits(browser, one)
        ]
        about = options.about([one for one, _ in tops])
        if request.json:
            json_out.show({**about, "entries": [file_render.entry(*one) for one in found]})
        else:
            file_render.show_list([one for _, one in found], long=long, null=null, whole=True)


def _condition(
    *, pattern: str | None, ignore_case: bool, kind: str | None, larger: int | None, smaller: int | None,
    newer: str | None, older: str | None,
) -> Callable[[Browser, Found], bool]:  # fmt: skip
    from hvmgr.operations.inside import browsing
    from hvmgr.storage.filesystems.reader import Type

    wanted: Type | None = None if kind is None else Type(_TYPES[kind])
    name = None if pattern is None else os.fsencode(pattern)
    since = None if newer is None else _nanoseconds(newer, "--newer")
    until = None if older is None else _nanoseconds(older, "--older")

    def fits(browser: Browser, one: Found) -> bool:
        node = one.node
        folded = ignore_case or browser.reader.ignores_case
        return (
            (wanted is None or node.type is wanted)
            and (name is None or browsing.fits(one.name, name, ignoring_case=folded))
            and (larger is None or node.size > larger)
            and (smaller is None or node.size < smaller)
            and (since is None or (node.modified or 0) >= since)
            and (until is None or (node.modified or 0) < until)
        )

    return fits


def _nanoseconds(text: str, option: str) -> int:
    return int(arguments.moment(text, option).timestamp()) * 1_000_000_000


file_take.register(command)
file_put.register(command)
