"""``hvmgr import`` and ``hvmgr compare``: a VM out of an export, a home or a domain's XML, and what is in its way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, json_out, render
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.finding import Finding
    from hvmgr.model.import_options import ImportOptions
    from hvmgr.operations.exchange.import_plan import ImportPlan
    from hvmgr.operations.host import Host

_HEADERS = ("", "Code", "Found", "What puts it right")


_OPTIONS = (
    click.option("--vm", metavar="NAME", help="Which VM, when SRC holds several."),
    click.option("--name", metavar="NEW", help="The VM's name, if not the one it had."),
    click.option("--mode", type=click.Choice(["copy", "register", "link"]), default="copy", show_default=True,
                 help="Copy the files, use them where they are, or put differencing images on them."),
    click.option("--new-id", is_flag=True, help="Another VM: all ids and addresses are new (copy and link)."),
    click.option("--keep-id", is_flag=True, help="The same VM: ids and addresses stay (register)."),
    click.option("--replace", is_flag=True, help="With --keep-id: in the place of the VM with that id."),
    click.option("--keep-mac", is_flag=True, help="With a new id: the addresses of the cards stay."),
    click.option("--network", "networks", multiple=True, metavar="OLD=NEW",
                 help="Another network for all cards of one: NAME or bridge=BRIDGE. Repeatable."),
    click.option("--nic", "nics", multiple=True, metavar="MAC=NETWORK|disconnected",
                 help="Another network for one card. Repeatable."),
    click.option("--vlan", "vlans", multiple=True, metavar="MAC=TAG", help="A VLAN for one card, or none. Repeatable."),
    click.option("--portgroup", "portgroups", multiple=True, metavar="MAC=NAME",
                 help="A port group for one card. Repeatable."),
    click.option("--path", "paths", multiple=True, metavar="OLD=NEW",
                 help="Files below OLD are below NEW; the longest OLD wins. Repeatable."),
    click.option("--disk", "disks", multiple=True, metavar="SLOT=SOURCE", help="Where a disk's image is. Repeatable."),
    click.option("--disk-target", "disk_targets", multiple=True, metavar="SLOT=TARGET",
                 help="Where the copy of a disk's base goes. Repeatable."),
    click.option("--vm-path", type=arguments.HERE_PATH, metavar="D", help="The folder that the home is made in."),
    click.option("--snapshot-path", type=arguments.HERE_PATH, metavar="D", help="The folder for snapshots, if not the home."),
    click.option("--disk-path", type=arguments.HERE_PATH, metavar="D", help="The folder for base images, if not the home."),
    click.option("--snapshot-source", type=arguments.HERE_PATH, metavar="DIR", help="Where snapshots are that SRC lacks."),
    click.option("--drop-snapshot", "drop_snapshots", multiple=True, metavar="SNAP",
                 help="Leave a snapshot out, be it there or missing. Repeatable."),
    click.option("--without-snapshots", is_flag=True, help="Leave all snapshots out."),
    click.option("--without-state", is_flag=True, help="Leave saved states out."),
    click.option("--owner", metavar="NAME", help="Whom the VM belongs to."),
    click.option("--tag", "tags", multiple=True, metavar="TAG", help="A word to find the VM by. Repeatable."),
)  # fmt: skip


def _import_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command("import", cls=Command, examples=["hvmgr import /exports/web",
                                                "hvmgr import /exports/web.tar.zst --name web2",
                                                "hvmgr import /exports/web --name web2 --network lan=dmz",
                                                "hvmgr import /gold/web --mode link --name web7",
                                                "hvmgr import /srv/web --mode register",
                                                "hvmgr import /exports/web --keep-id --replace",
                                                "hvmgr import --plan web.yaml"])  # fmt: skip
@click.argument("src", metavar="SRC", required=False, type=arguments.HERE_PATH)
@click.option(
    "--plan", "file", type=arguments.HERE_PATH, metavar="FILE", help="Everything from a plan that compare wrote."
)
@click.option("--if-exists", type=click.Choice(["fail", "same", "keep"]), default="fail", show_default=True,
              help="Where the VM is there: same leaves it if SRC is what it was made of, keep in any case.")  # fmt: skip
@_import_options
@click.pass_context
def import_command(
    context: click.Context, /, src: Path | None, file: Path | None, if_exists: str, **options: Any
) -> None:
    """Make a VM out of an export, a VM home, or a domain's XML.

    SRC is the folder, the folder above it, the configuration's file, or an archive of an export. All snapshots and saved states come along, and
    the maps reach each of them. The VM is off afterwards. What is in the way is told before anything is touched.
    """
    request: Request = context.obj
    with request.host() as host, request.changing():
        plan = _plan(context, host, src, file, options)
        if if_exists != "fail" and (there := plan.find_made()) is not None:
            if not (if_exists == "keep" or plan.is_made(there)):
                raise errors.Conflict(
                    f"the VM {there.name} is there already, and was not made of {plan.source} in this way",
                    hint="give the new one another name: --name NEW; or keep that one: --if-exists keep",
                    vm=there.id,
                )
            facts = {
                "vm": json_out.vm(there, request.state(there)),
                "source": str(plan.source),
                "mode": plan.mode.value,
            }
            request.done(f"{there.name} is there already", facts, changed=False)
            return
        made = plan.run()
        facts = {"vm": json_out.vm(made, request.state(made)), "source": str(plan.source), "mode": plan.mode.value}
        request.done(f"imported {made.name} into {made.path}", facts)


@click.command("compare", cls=Command, codes=READS,
               examples=["hvmgr compare /exports/web",
                         "hvmgr compare /exports/web --mode link --json",
                         "hvmgr compare /exports/web --plan-out web.yaml"])  # fmt: skip
@click.argument("src", metavar="SRC", required=False, type=arguments.HERE_PATH)
@click.option("--plan", "file", type=arguments.HERE_PATH, metavar="FILE", help="Compare what a plan says.")
@click.option(
    "--plan-out", type=arguments.HERE_PATH, metavar="FILE", help="Write a plan that can be edited; FILE must not exist."
)
@click.option("--thorough", is_flag=True, help="Also read every byte of images whose SHA-256 is recorded.")
@_import_options
@click.pass_context
def compare(
    context: click.Context,
    /,
    src: Path | None,
    file: Path | None,
    plan_out: Path | None,
    *,
    thorough: bool,
    **options: Any,
) -> None:
    """Report what an import would find in its way, and change nothing.

    Takes the options of import. The exit code is 0 when the report is complete, whatever it says.
    """
    request: Request = context.obj
    with request.host() as host:
        plan = _plan(context, host, src, file, options)
        comparison = plan.compare(thorough=thorough)
        found = comparison.findings
        if request.dry_run:
            plan_out = None
        if plan_out is not None:
            _write_plan(plan, found, plan_out)
    if request.json:
        json_out.show(_document(plan, found, plan_out, home=str(comparison.layout.home)))
        return
    if found:
        rows = [(str(one.severity), one.code, one.sentence, one.repair or "") for one in found]
        render.table(_HEADERS, rows)
    if render.is_terminal():
        render.say(_summary(found, plan_out))


def _plan(
    context: click.Context, host: Host, src: Path | None, file: Path | None, options: dict[str, Any]
) -> ImportPlan:
    given = [key for key in options if context.get_parameter_source(key) is click.core.ParameterSource.COMMANDLINE]
    if (src is None) == (file is None):
        what = "either SRC or --plan FILE, not both" if file else "SRC or --plan FILE is missing"
        raise errors.UsageError(what, hint=f"see: {context.command_path} --help")
    if file is not None:
        if given:
            option = given[0].rstrip("s").replace("_", "-")
            raise errors.UsageError(f"--{option} and --plan exclude each other", hint=f"put it into {file}")
        from hvmgr.operations.exchange import import_document

        return import_document.read_file(host, file)
    assert src is not None
    return host.plan_import(src, _to_options(options))


def _to_options(options: dict[str, Any]) -> ImportOptions:
    from hvmgr.model import maps
    from hvmgr.model.import_options import ImportOptions, Mode

    if options["new_id"] and options["keep_id"]:
        raise errors.UsageError("--new-id and --keep-id exclude each other")
    new_id = True if options.pop("new_id") else False if options["keep_id"] else None
    del options["keep_id"]
    mode = Mode(options.pop("mode"))
    for name, option in (
        ("networks", "network"),
        ("nics", "nic"),
        ("vlans", "vlan"),
        ("portgroups", "portgroup"),
        ("paths", "path"),
        ("disks", "disk"),
        ("disk_targets", "disk-target"),
    ):
        texts = [_from_here(name, text) for text in options[name]]
        options[name] = maps.to_mapping(maps.parse(option, texts))
    options["keep_macs"] = options.pop("keep_mac")
    return ImportOptions(mode=mode, new_id=new_id, **options)


def _from_here(name: str, text: str) -> str:
    """Relative files of disks count from where the user is."""
    old, equals, new = text.partition("=")
    if name in {"disks", "disk_targets", "paths"} and new:
        new = str(arguments.absolute(new))
    if name == "paths" and old:
        old = str(arguments.absolute(old))
    return f"{old}{equals}{new}"


def _write_plan(plan: ImportPlan, found: list[Finding], file: Path) -> None:
    from hvmgr.operations.exchange import import_document
    from hvmgr.storage import durable

    with durable.appearing(file, mode=0o644) as part:
        part.write_text(import_document.to_yaml(plan, found), "utf-8")


def _document(plan: ImportPlan, found: list[Finding], plan_out: Path | None, *, home: str) -> dict[str, Any]:
    return {
        "source": str(plan.source),
        "name": plan.name,
        "mode": plan.mode.value,
        "home": home,
        "ready": all(one.severity != "error" for one in found),
        "findings": [
            {
                "code": one.code,
                "severity": str(one.severity),
                "sentence": one.sentence,
                "where": one.where,
                "repair": one.repair,
            }
            for one in found
        ],
        "plan": None if plan_out is None else str(plan_out),
    }


def _summary(found: list[Finding], plan_out: Path | None) -> str:
    bad = sum(one.severity == "error" for one in found)
    what = f"{bad} in the way" if bad else "nothing is in the way"
    return what if plan_out is None else f"{what}; the plan is in {plan_out}"
