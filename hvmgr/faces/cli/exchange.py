"""``hvmgr export`` and ``hvmgr verify``: VMs leave as folders, and are looked at there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.export_options import ExportOptions
    from hvmgr.model.finding import Finding
    from hvmgr.operations.vm import VM

_HEADERS = ("", "Code", "Found", "What puts it right")


@click.command("export", cls=Command, examples=["hvmgr export web /srv/exports",
                                                "hvmgr export web /srv/exports --snapshot 'before the update'",
                                                "hvmgr export web /srv/exports --snapshots none --format vhd",
                                                "hvmgr export web --archive - | ssh other 'cat > web.tar.zst'"])  # fmt: skip
@arguments.vm
@click.argument("dest", required=False, type=arguments.HERE_PATH)
@click.option("--archive", metavar="FILE", type=click.Path(dir_okay=False, allow_dash=True),
              help="One file in place of DEST: tar, compressed with zstd; '-' is stdout.")  # fmt: skip
@click.option("--snapshots", type=click.Choice(["all", "none"]), default="all", show_default=True,
              help="All snapshots, or the present alone with one image for each disk.")  # fmt: skip
@click.option("--keep-snapshot", "keep", multiple=True, metavar="SNAP",
              help="Only this snapshot of the tree, with the present. Repeatable.")  # fmt: skip
@click.option("--snapshot", metavar="SNAP", help="This snapshot as an independent VM, with one image for each disk.")
@click.option("--config-only", is_flag=True, help="No disks; their sizes and hashes are recorded.")
@click.option("--without-state", is_flag=True, help="Leave all saved memory out.")
@click.option("--with-state", is_flag=True, help="Keep the memory of a running VM too, saved as by 'snapshot create'.")
@click.option("--quiesce", is_flag=True, help="Let the guest's agent put its file systems to rest first.")
@click.option("--exclude-disk", "exclude", multiple=True, metavar="SLOT", help="Leave this disk out. Repeatable.")
@click.option("--format", "image_format", type=click.Choice(["qcow2", "raw", "vhd"]),
              help="The format of flattened disks (--snapshot, --snapshots none); vhd also of a whole tree.")  # fmt: skip
@click.option("--no-checksums", is_flag=True, help="Hash nothing; where blocks are shared that makes it instant.")
@click.option("--if-exists", type=click.Choice(["fail", "same", "keep"]), default="fail", show_default=True,
              help="Where an export of this VM is there: same leaves it if nothing of the VM changed since, keep in any case.")  # fmt: skip
@click.pass_obj
def export(request: Request, /, vm: str, dest: Path | None, archive: str | None, if_exists: str, **wishes: Any) -> None:
    """Write a VM with its snapshots to a folder below DEST that is complete in itself.

    The folder is called after the VM and never replaces anything; it can be imported as often as wanted. The VM is only
    read, and may run: it goes on in new images meanwhile. An export that was interrupted goes on when the same command is
    run again.
    """
    if (dest is None) == (archive is None):
        what = "DEST or --archive FILE is missing" if dest is None else "DEST and --archive exclude each other"
        raise errors.UsageError(what, hint="see: hvmgr export --help")
    options = _options(wishes)
    if archive is not None and if_exists == "same":
        raise errors.UsageError(
            "an archive cannot be compared with the VM", hint="give --if-exists keep, or export to a folder"
        )
    if archive == "-":
        _require_pipe(request)
    with request.host() as host, request.changing():
        one = host.vm(vm)
        facts = {"id": one.id, "name": one.name}
        if archive is not None:
            _to_archive(request, one, archive, options, keep=if_exists == "keep")
            return
        assert dest is not None
        if if_exists != "fail" and (found := one.find_export(dest, options)) is not None:
            if not (found.is_current or if_exists == "keep"):
                raise errors.Conflict(
                    f"{found.folder} is an export of {one.name}, which may have changed since",
                    hint="export to another folder, remove that one, or keep it with --if-exists keep",
                    path=str(found.folder),
                )
            facts_now = {"vm": facts, "export": str(found.folder)}
            request.done(f"{found.folder} is there already", facts_now, changed=False)
            return
        made = one.export(dest, options)
        request.done(f"exported {one.name} to {made}", {"vm": facts, "export": str(made)})


def _to_archive(request: Request, one: VM, archive: str, options: ExportOptions, *, keep: bool) -> None:
    if archive == "-":
        one.export_archive(sys.stdout.fileno(), options)
        return
    file = arguments.absolute(archive)
    if keep and file.is_file():
        facts = {"vm": {"id": one.id, "name": one.name}, "export": str(file)}
        request.done(f"{file} is there already", facts, changed=False)
        return
    one.export_archive(file, options)
    request.done(f"exported {one.name} to {file}", {"vm": {"id": one.id, "name": one.name}, "export": str(file)})


def _require_pipe(request: Request) -> None:
    """Stdout takes the archive, and nothing else."""
    if request.dry_run:
        return
    if request.json:
        raise errors.UsageError("--json and '--archive -' both write to stdout", hint="give --archive a file")
    if sys.stdout.isatty():
        raise errors.UsageError("an archive is nothing for a terminal", hint="pipe it on, or give --archive a file")


def _options(wishes: dict[str, Any]) -> ExportOptions:
    from hvmgr.model.export_options import ExportOptions
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.model.manifest import Extent

    image_format = wishes["image_format"]
    return ExportOptions(
        snapshots=Extent(wishes["snapshots"]),
        keep=tuple(wishes["keep"]),
        snapshot=wishes["snapshot"],
        config_only=wishes["config_only"],
        without_state=wishes["without_state"],
        with_state=wishes["with_state"],
        quiesce=wishes["quiesce"],
        exclude=tuple(wishes["exclude"]),
        format=None if image_format is None else ImageFormat(image_format),
        checksums=not wishes["no_checksums"],
    )


@click.command("verify", cls=Command, codes=READS, examples=["hvmgr verify /srv/exports/web"])
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.pass_context
def verify(context: click.Context, /, folder: Path) -> None:
    """Check an export against its manifest: every byte, every chain, every configuration.

    DIR is the export's folder, the one above it, or an archive of it. Nothing is written, and libvirt is not needed. The exit code is 6
    when something is wrong.
    """
    request: Request = context.obj
    with request.host() as host:
        found = host.verify(folder)
    is_whole = not any(one.severity.value == "error" for one in found)
    if request.json:
        json_out.show({"whole": is_whole, "findings": [json_out.finding(one) for one in found]})
    else:
        render.table(_HEADERS, [_row(one) for one in found])
        if render.is_terminal():
            render.say("the export is whole" if is_whole else "the export is damaged")
    context.exit(0 if is_whole else errors.Corrupt.exit_code)


def _row(one: Finding) -> tuple[str, ...]:
    cells = (one.severity.value, one.code, one.sentence, one.repair or "")
    return cells if render.is_terminal() else (*cells[:2], one.where, *cells[2:])
