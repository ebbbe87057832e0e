"""``hvmgr vm``: make, list, start, stop, rename and delete VMs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hvmgr import errors, units
from hvmgr.faces.cli import arguments, json_out, policy, render
from hvmgr.faces.cli.groups import READS, Group, Seconds
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.model.specification import DiskSpecification, Specification
    from hvmgr.operations.vm import VM


_ELSEWHERE = {
    "adopt": ("hvmgr.faces.cli.adopt:command", "Make hvmgr manage VMs that libvirt has already."),
    "clone": ("hvmgr.faces.cli.relocate:clone", "Make another VM like this one, with ids and addresses of its own."),
    "move": ("hvmgr.faces.cli.relocate:move", "Give a VM that is off or saved another home."),
    "set": (
        "hvmgr.faces.cli.policy:command",
        "Say what a VM's snapshots are, which are automatic, what follows a crash.",
    ),
    "release": ("hvmgr.faces.cli.release:command", "Make a VM a plain domain of libvirt's again."),
}


@click.group("vm", cls=Group, lazy=_ELSEWHERE)
def command() -> None:
    """Make, list, start, stop, rename and delete VMs.

    A VM is named by its name or its id. Everything of it lies in its home, a folder below --root.
    """


# --- make -----------------------------------------------------------------------------------------------------------


@command.command("create", examples=["hvmgr vm create web --memory 4G --disk 40G",
                                     "hvmgr vm create old --template generation1 --disk /srv/old.vhd --in-place",
                                     "hvmgr vm create -f web.yaml"])  # fmt: skip
@click.argument("name", required=False)
@click.option("-f", "--file", type=click.Path(allow_dash=True), metavar="SPEC",
              help="Read everything from a YAML file ('-': stdin); see docs/specification.md.")  # fmt: skip
@click.option(
    "--home", type=arguments.HERE_PATH, metavar="DIR", help="The VM's folder, if not one named after it below the root."
)
@click.option("--template", metavar="T", help="generation1 (BIOS, IDE) or generation2 (UEFI, virtio), the default.")
@click.option("--memory", type=arguments.Size(), metavar="SIZE", help="Memory; the template decides otherwise.")
@click.option("--vcpus", type=click.IntRange(min=1), metavar="N", help="Virtual CPUs; the template decides otherwise.")
@click.option("--disk", "disks", multiple=True, metavar="SIZE|PATH",
              help="A new disk of a size, or one from an image, which is copied. Repeatable.")  # fmt: skip
@click.option("--in-place", is_flag=True, help="Use the images of --disk where they are, uncopied.")
@click.option("--cdrom", type=arguments.HERE_PATH, metavar="PATH", help="An ISO image in a CD drive.")
@click.option("--network", "networks", multiple=True, metavar="NET",
              help="A libvirt network, bridge=BRIDGE, user, or none; ',mac=ADDRESS' may follow. Repeatable.")  # fmt: skip
@click.option("--kernel", type=arguments.HERE_PATH, metavar="PATH", help="A kernel to start directly.")
@click.option("--initrd", type=arguments.HERE_PATH, metavar="PATH", help="The initial RAM disk of that kernel.")
@click.option("--cmdline", metavar="TEXT", help="The command line of that kernel.")
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True,
              help="What executes the guest; tcg is emulation.")  # fmt: skip
@click.option("--tpm/--no-tpm", default=None, help="An emulated TPM 2.0, or none.")
@click.option("--firmware", type=click.Choice(["bios", "efi"]), help="What starts the guest.")
@click.option("--uuid", metavar="ID", help="The VM's id, if not a new one.")
@click.option("--description", metavar="TEXT", help="A text that libvirt keeps with the VM.")
@click.pass_context
def create(context: click.Context, /, name: str | None, file: str | None, **options: Any) -> None:
    """Make a VM in a home of its own; it is off afterwards.

    A --disk that reads as a size is a new, empty disk; anything else is the path of an image (write ./40G for a file of
    that name).
    """
    request: Request = context.obj
    given = [key for key in options if context.get_parameter_source(key) is ParameterSource.COMMANDLINE]
    spec = _specification(name, file, options, given)
    with request.host() as host, request.changing():
        made = host.create_vm(spec)
        request.done(f"created {made.name} in {made.path}", {"vm": json_out.vm(made, request.state(made))})


def _specification(name: str | None, file: str | None, options: dict[str, Any], given: list[str]) -> Specification:
    if (name is None) == (file is None):
        what = "either a NAME or -f SPEC, not both" if file else "a NAME or -f SPEC is missing"
        raise errors.UsageError(what, hint="see: hvmgr vm create --help")
    if file is not None:
        if given:
            option = given[0].rstrip("s").replace("_", "-")
            raise errors.UsageError(f"--{option} and -f exclude each other", hint=f"put it into {file}")
        return _from_file(file)
    from hvmgr.model import specification
    from hvmgr.model.specification import Acceleration, Firmware, Specification

    networks: Sequence[str] = options.pop("networks")
    firmware, template = options.pop("firmware"), options.pop("template")
    spec = Specification(
        name=str(name),
        template=template or specification.DEFAULT_TEMPLATE,
        disks=_disks(options.pop("disks"), in_place=options.pop("in_place")),
        networks=specification.parse_networks(networks),
        accel=Acceleration(options.pop("accel")),
        firmware=Firmware(firmware) if firmware else None,
        **options,
    )
    specification.check(spec)
    return spec


def _from_file(file: str) -> Specification:
    from hvmgr.model import specification

    if file == "-":
        return specification.load(arguments.from_stdin(), source="stdin", folder=Path.cwd())
    path = arguments.absolute(file)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise errors.NotFound(f"there is no file {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return specification.load(text, source=file, folder=path.parent)


def _disks(texts: Sequence[str], *, in_place: bool) -> tuple[DiskSpecification, ...]:
    from hvmgr.model.specification import DiskSpecification

    disks = []
    for text in texts:
        try:
            disks.append(DiskSpecification(size=units.parse_size(text)))
        except errors.UsageError:
            if not text or not Path(text).exists():
                raise errors.NotFound(
                    f"--disk {text}: no size, and no file of that name", hint="write a size such as 20G, or a path"
                ) from None
            disks.append(DiskSpecification(path=arguments.absolute(text), in_place=in_place))
    if in_place and not any(disk.in_place for disk in disks):
        raise errors.UsageError("--in-place needs a --disk with the path of an image")
    return tuple(disks)


# --- look -----------------------------------------------------------------------------------------------------------


@command.command("list", codes=READS, examples=["hvmgr vm list", "hvmgr vm list --owner anna --json"])
@click.option("--owner", metavar="NAME", help="Only those that belong to NAME.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Only those with this tag. Repeatable.")
@click.option("--details", is_flag=True, help="With --json: of each VM all that 'vm show' says.")
@click.pass_obj
def show_list(request: Request, owner: str | None, tags: tuple[str, ...], *, details: bool) -> None:
    """List the VMs that have a home, by name.

    In a pipe each line holds name, state, id and home between tabs. The state is '-' (null in JSON) where libvirt cannot
    be asked.
    """
    if details and not request.json:
        raise errors.UsageError("--details is for --json", hint="hvmgr vm show VM says all of one VM")
    with request.host() as host:
        known = [one for one in host.vms() if _is_wanted(one, owner, tags)]
        if details:
            json_out.show({"details": [document for one in known if (document := _try_facts(request, one))]})
            return
        found = [(one, request.state(one)) for one in known]
        if request.json:
            json_out.show({"vms": [json_out.vm(one, state) for one, state in found]})
        else:
            rows = [(one.name, state or "-", one.id, str(one.path)) for one, state in found]
            render.table(("Name", "State", "Id", "Home"), rows)


def _is_wanted(one: VM, owner: str | None, tags: tuple[str, ...]) -> bool:
    if owner is None and not tags:
        return True
    facts = one.home.facts()
    return owner in (None, facts.owner) and set(tags) <= set(facts.tags)


@command.command("show", codes=READS, examples=["hvmgr vm show web"])
@arguments.vm
@click.pass_obj
def show(request: Request, vm: str) -> None:
    """Show a VM: its facts, its place in the snapshot tree, and its disks."""
    with request.host() as host:
        one = host.vm(vm)
        document = _facts(request, one)
    if request.json:
        json_out.show(document)
        return
    told = document["vm"]
    render.facts(
        [
            ("name", told["name"]),
            ("id", told["id"]),
            ("state", told["state"] or "-"),
            ("home", told["home"]),
            ("connection", document["connection"]),
            ("owner", document["owner"] or "-"),
            ("tags", ", ".join(document["tags"]) or "-"),
            ("created", units.format_local(units.from_rfc3339(document["created"]))),
            ("memory", units.format_size(document["memory"])),
            ("vcpus", str(document["vcpus"])),
            ("snapshots", str(document["snapshots"])),
            *policy.lines(document["policy"]),
            ("undo", "possible" if document["undo"] else "nothing to undo"),
        ]
    )
    headers = ("Disk", "Device", "Image", "Format", "Size", "On disk")
    rows = [
        (
            disk["slot"],
            disk["device"],
            disk["path"] or "-",
            disk["format"] or "-",
            "-" if disk["size"] is None else units.format_size(disk["size"]),
            "-" if disk["data"] is None else units.format_size(disk["data"]),
        )
        for disk in document["disks"]
    ]
    render.table(headers, rows, right=("Size", "On disk"))


def _try_facts(request: Request, one: VM) -> dict[str, Any] | None:
    """The facts of one of several; one whose home is damaged is told, and keeps nobody from the others."""
    try:
        return _facts(request, one)
    except errors.HvmgrError as error:
        render.notice(f"left out: {error}")
        return None


def _facts(request: Request, one: VM) -> dict[str, Any]:
    now, snapshots, tree = one.now(), one.snapshots(), one.tree()
    above = next((snapshot for snapshot in snapshots if snapshot.id == now.parent), None)
    present = one.home.present()
    disks = []
    for disk in present.disks():
        path = now.disks.get(disk.slot, disk.source)
        image = tree.images.get(path) if path is not None else None
        disks.append(
            {
                "slot": disk.slot,
                "device": disk.device,
                "path": path,
                "format": disk.format,
                "size": None if image is None else image.size,
                "data": None if image is None else image.data,
            }
        )
    facts = one.home.facts()
    return {
        "vm": json_out.vm(one, request.state(one)),
        "connection": facts.uri,
        "created": units.to_rfc3339(facts.created),
        "owner": facts.owner,
        "tags": list(facts.tags),
        "origin": None
        if facts.origin is None
        else {"vm": facts.origin.vm, "mode": facts.origin.mode, "digest": facts.origin.digest},
        "memory": present.memory,
        "vcpus": present.vcpus,
        "now": {"parent": now.parent, "disks": dict(now.disks)},
        "snapshot": None if above is None else {"id": above.id, "name": above.name},
        "undo": one.can_undo(),
        "snapshots": len(snapshots),
        "policy": json_out.policy(facts.policy),
        "disks": disks,
    }


# --- run ------------------------------------------------------------------------------------------------------------


@command.command("start", examples=["hvmgr vm start web"])
@arguments.vm
@click.pass_obj
def start(request: Request, vm: str) -> None:
    """Start a VM, or let a paused one go on; one that runs is left alone."""
    with request.host() as host, request.changing():
        one = host.vm(vm)
        changed = one.start()
        _say_change(request, one, "started" if changed else "runs already", changed=changed)


@command.command("stop", examples=["hvmgr vm stop web", "hvmgr vm stop web --force"])
@arguments.vm
@click.option("--force", is_flag=True, help="At once, like pulling the plug.")
@click.option("--timeout", type=Seconds(), default=60.0, metavar="S", show_default="60",
              help="Seconds that the guest may take to shut down.")  # fmt: skip
@click.pass_obj
def stop(request: Request, vm: str, timeout: float, *, force: bool) -> None:
    """Shut a VM down by asking its guest, and wait until it is off."""
    with request.host() as host, request.changing():
        one = host.vm(vm)
        changed = one.stop(force=force, timeout_s=timeout)
        _say_change(request, one, "stopped" if changed else "is off already", changed=changed)


def _say_change(request: Request, one: VM, what: str, *, changed: bool) -> None:
    request.done(f"{one.name} {what}", {"vm": json_out.vm(one, request.state(one))}, changed=changed)


# --- rename, delete -------------------------------------------------------------------------------------------------


@command.command("rename", examples=["hvmgr vm rename web www"])
@arguments.vm
@click.argument("name")
@click.pass_obj
def rename(request: Request, vm: str, name: str) -> None:
    """Give a VM that is off another NAME; its home keeps its folder."""
    with request.host() as host, request.changing():
        one = host.vm(vm)
        old = one.name
        if changed := name != old:
            one.rename(name=name)
        _say_change(request, one, f"was called {old} before" if changed else "is its name already", changed=changed)


@command.command("delete", examples=["hvmgr vm delete web", "hvmgr vm delete web --with-disks --yes"])
@arguments.vm
@click.option("--with-disks", is_flag=True, help="Also the disks; needs --yes where nobody can be asked.")
@click.pass_obj
def delete(request: Request, vm: str, *, with_disks: bool) -> None:
    """Delete a VM that is off, with all its snapshots.

    Of each disk one complete image stays in the home, as the disk is now; its path is said. Images outside the home are
    never deleted.
    """
    with request.host() as host, request.changing():
        one = host.vm(vm)
        facts = {"id": one.id, "name": one.name, "home": str(one.path)}
        if with_disks:
            files = [image.path for image in one.tree().images.values() if one.home.layout.owns(image.path)]
            request.require_consent(f"these disks of {one.name} will be deleted", files, always=True)
        kept = one.delete(with_disks=with_disks)
        told = "".join(f"; kept {path}" for path in kept)
        request.done(f"deleted {facts['name']}{told}", {"deleted": facts, "kept": kept})
