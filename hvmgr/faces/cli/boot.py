"""``hvmgr boot``: VHDs that a physical machine boots from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, units
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Group, Seconds
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.boot_entry import BootEntry
    from hvmgr.operations.boot.entries import Shown

_boot_dir = click.option(
    "--boot-dir", metavar="DIR", type=click.Path(path_type=Path), default=Path("/boot"), show_default=True,
    help="The machine's boot folder, with grub/grub.cfg in it.",
)  # fmt: skip
_entry = click.argument("name", metavar="NAME")


@click.group("boot", cls=Group)
def command() -> None:
    """Let a physical machine boot from VHDs: entries of its boot menu, and what the systems wrote."""


def _placing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where the VHD is when the machine boots."""
    options = (
        click.option("--volume", metavar="DIR", type=click.Path(path_type=Path),
                     help="The folder that is the root of the machine's volume; without it the volume is asked."),
        click.option("--volume-id", metavar="UUID", help="The id of that volume's file system."),
        click.option("--volume-type", metavar="TYPE", help="Its file system: ext4, ext3, ext2 or ntfs."),
        click.option("--search", "folders", multiple=True, metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
                     help="Look for parents of a VHD here, too. Repeatable."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@command.command("add", examples=["hvmgr boot add /VHD/os.vhd --name Blue",
                                  "hvmgr boot add /VHD/os.vhd --replace",
                                  "hvmgr boot add win.vhd --windows --output add.cmd"])  # fmt: skip
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--name", "title", metavar="TITLE", help="What the menu calls it; without it the VHD's name.")
@click.option("--layer/--no-layer", default=None,
              help="Let the system write into a layer beside the VHD; the default for all but fixed VHDs.")  # fmt: skip
@click.option("--kernel", metavar="VERSION", help="The kernel in the VHD that is started; without it the newest.")
@click.option("--append", "arguments", metavar="ARGS", default="", help="More arguments of the kernel.")
@click.option(
    "--copy-kernel", is_flag=True, help="Copy kernel and initramfs beside the VHD instead of reading them in it."
)
@click.option("--replace", is_flag=True, help="Make the entry that the VHD has already anew.")
@_placing
@click.option("--windows", is_flag=True, help="Write the script that adds a VHD with Windows to Windows' own menu.")
@click.option(
    "--qualified", is_flag=True, help="With --windows: name the drive too; faster, and only for this machine."
)
@click.option("--drive", metavar="C:", default="C:", help="With --windows --qualified: the drive that holds the VHD.")
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path), help="With --windows: a file for the script."
)
@_boot_dir
@click.pass_obj
def add(request: Request, /, path: Path, boot_dir: Path, *, windows: bool, **wish: Any) -> None:
    """Add a VHD to the machine's boot menu, so that the machine starts the system in it.

    The VHD itself is not changed. Fixed VHDs are written by their system; of others the system writes a layer beside the
    VHD, which boot revert throws away and boot merge keeps.
    """
    script = {key: wish.pop(key) for key in ("qualified", "drive", "output")}
    if windows:
        _script(request, path, wish, **script)
        return
    if script["qualified"] or script["output"]:
        raise errors.UsageError("--qualified and --output belong to --windows")
    from hvmgr.model.boot_options import BootOptions

    with request.host() as host, request.changing():
        made = host.boot_menu(boot_dir).add(path, BootOptions(**wish))
        layer = ", which writes a layer" if made.layer else ""
        request.done(f"the boot menu has '{made.title}'{layer}", {"entry": _document(made)})


def _script(
    request: Request, path: Path, wish: dict[str, Any], *, qualified: bool, drive: str, output: Path | None
) -> None:  # fmt: skip
    from hvmgr.model.boot_windows import Kind

    kind = Kind.QUALIFIED if qualified else Kind.PORTABLE
    with request.host() as host:
        text = host.windows_boot_script(
            path,
            wish["title"],
            kind=kind,
            drive=drive,
            volume=wish["volume"],
            write_to=None if request.dry_run else output,
        )
    if request.json:
        json_out.show({"script": text, "kind": kind.value, "file": None if output is None else str(output)})
    elif output is None or request.dry_run:
        render.put(text.replace("\r\n", "\n"))
    else:
        render.say(f"run {output} in Windows as an administrator")


@command.command("list", codes=READS, examples=["hvmgr boot list", "hvmgr boot list --boot-dir /mnt/boot"])
@_boot_dir
@click.pass_obj
def list_entries(request: Request, boot_dir: Path) -> None:
    """List the entries for VHDs in the boot menu, what their systems wrote, and whether they would boot."""
    with request.host() as host:
        found = host.boot_menu(boot_dir).shown()
    if request.json:
        json_out.show({"entries": [_shown(one) for one in found]})
        return
    rows = [
        (
            one.entry.title,
            one.entry.kind,
            units.format_size(one.entry.size),
            "-" if one.written is None else units.format_size(one.written),
            one.entry.image,
            ("default, " if one.default else "") + (one.problem or "ready"),
        )
        for one in found
    ]
    render.table(("Name", "Type", "Size", "Layer", "VHD", "State"), rows)


@command.command("remove", examples=["hvmgr boot remove Blue", "hvmgr boot remove Blue --yes"])
@_entry
@_boot_dir
@click.pass_obj
def remove(request: Request, name: str, boot_dir: Path) -> None:
    """Remove an entry from the boot menu, with what its system wrote into the layer. The VHD stays as it is."""
    with request.host() as host, request.changing():
        menu = host.boot_menu(boot_dir)
        entry = menu.entry(name)
        written = next(one.written for one in menu.shown() if one.entry.id == entry.id)
        if written or (written is None and Path(entry.layer_file).exists()):  # one that is damaged holds something, too
            size = "what" if written is None else f"{units.format_size(written)} that"
            request.require_consent(f"{size} '{entry.title}' wrote into its layer is thrown away", always=True)
        menu.remove(entry.id)
        request.done(f"the boot menu has no '{entry.title}' any more", {"entry": _document(entry)})


@command.command("default", examples=["hvmgr boot default Blue", "hvmgr boot default Blue --once",
                                      "hvmgr boot default --none"])  # fmt: skip
@click.argument("name", metavar="NAME", required=False)
@click.option("--once", is_flag=True, help="At the next start only.")
@click.option("--none", "nothing", is_flag=True, help="The menu's own default is back.")
@_boot_dir
@click.pass_obj
def default(request: Request, /, name: str | None, boot_dir: Path, *, once: bool, nothing: bool) -> None:
    """Start an entry when nobody chooses another one, always or at the next start only."""
    if (name is None) is not nothing or (nothing and once):
        raise errors.UsageError("say an entry, or --none", hint="hvmgr boot list shows the entries")
    with request.host() as host, request.changing():
        entry = host.boot_menu(boot_dir).choose(name, once=once)
        if entry is None:
            said = "the menu's own default is started"
        else:
            said = f"'{entry.title}' is started {'at the next start' if once else 'by default'}"
        request.done(said, {"entry": None if entry is None else _document(entry), "once": once})


@command.command("test", codes=(*READS[:-2], 7, *READS[-2:]), examples=["hvmgr boot test Blue", "hvmgr boot test Blue --uefi",
                                                         "hvmgr boot test Blue --until 'Reached target'"])  # fmt: skip
@_entry
@click.option("--uefi", is_flag=True, help="With UEFI firmware; otherwise with a BIOS.")
@click.option("--until", metavar="TEXT", default="login:", show_default=True, help="End at a line that holds this.")
@click.option("--time", "time_s", metavar="S", type=Seconds(), default=300.0, show_default=True,
              help="Seconds that it may take.")  # fmt: skip
@click.option(
    "--memory", metavar="S", type=arguments.Size(), default="1G", show_default=True, help="The machine's memory."
)
@_boot_dir
@click.pass_obj
def test(request: Request, /, name: str, boot_dir: Path, *, until: str, **how: Any) -> None:
    """Start an entry in a VM that plays the machine, on copies of all files, and show its serial console.

    It ends when the system says what it is waited for or turns itself off; the exit code is 8 when neither comes in time.
    """
    on_line = None if request.json else render.say
    with request.host() as host:
        told = host.boot_menu(boot_dir).test(name, until=until, on_line=on_line, **how)
    if request.json:
        json_out.show({"lines": list(told.lines), "found": told.found, "ended": told.ended})


@command.command("revert", examples=["hvmgr boot revert Blue"])
@_entry
@_boot_dir
@click.pass_obj
def revert(request: Request, name: str, boot_dir: Path) -> None:
    """Throw away what a system wrote into its layer: the VHD is as it was when the entry was made."""
    with request.host() as host, request.changing():
        menu = host.boot_menu(boot_dir)
        entry = menu.entry(name)
        request.require_consent(f"what '{entry.title}' wrote goes")
        gone = menu.revert(entry.id)
        request.done(
            f"'{entry.title}' starts from its VHD as it is; {units.format_size(gone)} are gone",
            {"entry": _document(entry), "bytes": gone},
        )


@command.command("merge", examples=["hvmgr boot merge Blue", "hvmgr boot merge Blue --to /VHD/blue-monday.vhd"])
@_entry
@click.option(
    "--to", metavar="FILE", type=click.Path(path_type=Path), help="Make a new differencing VHD of it instead."
)
@_boot_dir
@click.pass_obj
def merge(request: Request, name: str, to: Path | None, boot_dir: Path) -> None:
    """Write what a system wrote into its layer into its VHD, and start with an empty layer; or make a VHD of it.

    A merge that was cut off is completed by the next one.
    """
    with request.host() as host, request.changing():
        menu = host.boot_menu(boot_dir)
        entry = menu.entry(name)
        held = menu.merge(entry.id, to=to)
        where = to or entry.image
        request.done(
            f"{units.format_size(held)} that '{entry.title}' wrote are in {where}",
            {"entry": _document(menu.entry(entry.id)), "bytes": held, "file": str(where)},
        )


def _document(one: BootEntry) -> json_out.Document:
    """An entry of the boot menu; sizes are bytes."""
    return {
        "id": one.id,
        "name": one.title,
        "image": one.image,
        "type": one.kind,
        "size": one.size,
        "volume": {"id": one.volume, "type": one.volume_type.value},
        "files": [{"path": file.path, "length": file.length} for file in one.files],
        "layer": one.layer_file if one.layer else None,
        "kernel": one.kernel_version,
        "arguments": one.arguments,
        "root": one.root,
        "copied": one.copied,
        "added": one.added,
    }


def _shown(one: Shown) -> json_out.Document:
    return {**_document(one.entry), "default": one.default, "written": one.written, "problem": one.problem}
