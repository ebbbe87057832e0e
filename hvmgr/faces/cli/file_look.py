"""``hvmgr file list``, ``tree`` and ``stat``: what is in file systems inside of disks, and all that is known of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from hvmgr.faces.cli import file_options as options
from hvmgr.faces.cli import file_render, json_out, render
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.inside.browsing import Browser, Found
    from hvmgr.operations.inside.looking import Inside


@click.command(
    "list",
    cls=Command,
    codes=READS,
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


@click.command(
    "tree", cls=Command, codes=READS, examples=["hvmgr file tree web /etc/ssh", "hvmgr file tree web / --depth 2"]
)
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


@click.command(
    "stat",
    cls=Command,
    codes=READS,
    examples=["hvmgr file stat web /etc/shadow", "hvmgr file stat web /etc/shadow --json"],
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
