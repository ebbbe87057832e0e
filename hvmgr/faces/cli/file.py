"""``hvmgr file``: files inside the disks of VMs, snapshots, exports and images; each command is imported when it is wanted."""

from __future__ import annotations

import click

from hvmgr.faces.cli.groups import Group

_HERE = "hvmgr.faces.cli"

_COMMANDS = {
    "list": (
        f"{_HERE}.file_look:list_",
        "List what is in folders; without a path the file systems that there are.",
    ),
    "tree": (f"{_HERE}.file_look:tree", "Draw folders with all that is below them."),
    "stat": (
        f"{_HERE}.file_look:stat",
        "Show all that is known of files: times, modes, owners, links, streams, attributes.",
    ),
    "find": (f"{_HERE}.file_find:find", "Find files below folders by name, type, size and time."),
    "index": (
        f"{_HERE}.file_find:index",
        "Bring the index of the files in all snapshots up to date, for 'file find --index'.",
    ),
    "cat": (f"{_HERE}.file_take:cat", "Write what is in files to stdout, one after the other."),
    "get": (
        f"{_HERE}.file_take:get",
        "Copy files and folders out of a disk, with their times, modes, links and holes.",
    ),
    "hash": (
        f"{_HERE}.file_take:hash_",
        "Print the hashes of files, and of all files in folders, as sha256sum does.",
    ),
    "put": (
        f"{_HERE}.file_put:put",
        "Put files and folders of this host into a file system of a VM that is off.",
    ),
    "restore": (f"{_HERE}.file_put:restore", "Bring files and folders of a snapshot back into the present of the VM."),
    "diff": (
        f"{_HERE}.file_diff:diff",
        "Tell which files were added, changed, removed and renamed between two moments.",
    ),
}


@click.group("file", cls=Group, lazy=_COMMANDS)
def command() -> None:
    """Look at, take out and put in files inside the disks of VMs, snapshots, exports and images."""
