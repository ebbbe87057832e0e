"""The command ``hvmgr`` itself: what commands there are, and in which module each one lives."""

from __future__ import annotations

import importlib.util

import click

from hvmgr.faces.cli.groups import Group
from hvmgr.version import __version__

_HERE = "hvmgr.faces.cli"

# Name -> module and one line of help: the same line that the command's own help begins with (a test compares them).
COMMANDS = {
    "vm": (f"{_HERE}.vm:command", "Make, list, start, stop, rename and delete VMs."),
    "snapshot": (f"{_HERE}.snapshot:command", "Take, show, apply, undo, merge and delete snapshots."),
    "export": (
        f"{_HERE}.exchange:export",
        "Write a VM with its snapshots to a folder below DEST that is complete in itself.",
    ),
    "verify": (
        f"{_HERE}.exchange:verify",
        "Check an export against its manifest: every byte, every chain, every configuration.",
    ),
    "import": (f"{_HERE}.import_:import_command", "Make a VM out of an export, a VM home, or a domain's XML."),
    "compare": (f"{_HERE}.import_:compare", "Report what an import would find in its way, and change nothing."),
    "freeze": (
        f"{_HERE}.freeze:command",
        "Run a command of the host's own while the guests' file systems are at rest.",
    ),
    "disk": (f"{_HERE}.disk:command", "Work on the disks of a VM, each named by its slot."),
    "vdi-list": (
        f"{_HERE}.vdi:vdi_list",
        "List disks: of VMs, of their snapshots, snapshots of one disk alone, and free ones.",
    ),
    "vdi-create": (f"{_HERE}.vdi:vdi_create", "Make a blank disk of no VM, and print its uuid."),
    "vdi-snapshot": (f"{_HERE}.vdi:vdi_snapshot", "Take a snapshot of one disk alone, and print its uuid."),
    "vdi-export": (
        f"{_HERE}.vdi:vdi_export",
        "Write a disk into a new file: as a whole, or what changed since another point of it.",
    ),
    "vdi-import": (
        f"{_HERE}.vdi:vdi_import",
        "Replace what a disk holds by a file: a whole disk, or a delta on what it holds.",
    ),
    "vdi-destroy": (f"{_HERE}.vdi:vdi_destroy", "Remove a free disk, or a snapshot of one disk alone."),
    "image": (f"{_HERE}.image:command", "Work on image files, each named by its path: VHD, VHDX, qcow2, raw."),
    "wim": (f"{_HERE}.wim:command", "Work on WIM files: what is in one, capture into one, apply one to a disk image."),
    "catalog": (f"{_HERE}.catalog:command", "Keep images in a catalog, and make disks and VMs of them."),
    "file": (
        f"{_HERE}.file:command",
        "Look at, take out and put in files inside the disks of VMs, snapshots, exports and images.",
    ),
    "mount": (
        f"{_HERE}.mount:mount",
        "Mount a file system of a VM, of a snapshot, an export or an image in an empty directory.",
    ),
    "unmount": (
        f"{_HERE}.mount:unmount",
        "Unmount what 'mount' has mounted; what was written is thrown away, unless it is kept.",
    ),
    "mounts": (f"{_HERE}.mount:mounts", "List what 'mount' has mounted on this host, and what is left over of that."),
    "boot": (
        f"{_HERE}.boot:command",
        "Let a physical machine boot from VHDs: entries of its boot menu, and what the systems wrote.",
    ),
    "space": (f"{_HERE}.space:command", "Show what VMs take on disk, and what would give it back."),
    "doctor": (f"{_HERE}.doctor:command", "Say what is wrong with this host and its VMs, and put it right."),
    "hook": (f"{_HERE}.hook:command", "Let libvirt ask hvmgr before it starts a VM."),
    "automatic": (f"{_HERE}.automatic:command", "Do what hvmgr does with VMs by itself."),
    "watch": (
        f"{_HERE}.watch:command",
        "Follow what happens to VMs, until Ctrl-C: snapshots, applies, exports, starts and ends, jobs.",
    ),
    "serve": (f"{_HERE}.serve:command", "Serve disks over HTTP, with the Xen API that goes with them."),
    "user": (f"{_HERE}.user:command", "Say who may use the HTTP server, and what they may do."),
    "config": (f"{_HERE}.config:command", "Show the settings and where they come from."),
    "completion": (f"{_HERE}.completion:command", "Print the completion script of a shell."),
    "demo": (f"{_HERE}.demo:command", "Show snapshot trees at work, with a real guest."),
    "version": (f"{_HERE}.version:command", "Print the version."),
}


def _is_there(place: str) -> bool:
    return importlib.util.find_spec(place.partition(":")[0]) is not None


@click.group(
    "hvmgr",
    cls=Group,
    lazy={name: entry for name, entry in COMMANDS.items() if name != "demo" or _is_there(entry[0])},
    invoke_without_command=True,
)
@click.version_option(__version__, message="%(prog)s %(version)s", help="Print the version.")
@click.pass_context
def command(context: click.Context) -> None:
    """VM homes and snapshot trees, as Hyper-V has them, on KVM.

    Everything of a VM lies in one folder, its home. Snapshots form a tree in which any one can be applied or deleted at
    any time.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
