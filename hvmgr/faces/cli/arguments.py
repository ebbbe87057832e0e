"""Arguments that name a VM or a snapshot, with the shell's completion from the homes, and options that name a size."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, units
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from hvmgr.operations.host import Host

_PLAIN = re.compile(r"[\w.+@%,-]+")  # what every shell takes as one word


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4, not before
    """A size with a unit, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes behind the text."""
        try:
            return value if isinstance(value, int) else units.parse_size(value)
        except errors.UsageError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


def moment(text: str, option: str) -> datetime:
    """``10m`` ago, or a time as people and programs write it; without an offset it is local."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        try:
            return datetime.now(UTC) - timedelta(seconds=units.parse_duration(text))
        except (errors.UsageError, OverflowError) as error:
            raise errors.UsageError(
                f"{option} {text}: neither a length of time nor a time",
                hint="write it as 10m, 2h, 1d, or as 2026-11-21 14:03",
            ) from error
    return found.astimezone(UTC)


class VmName(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4, not before
    """A VM's name or id."""

    name = "vm"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names of the VMs that have a home."""

        def find(host: Host) -> list[tuple[str, str]]:
            return [(one.name, one.id) for one in host.vms()]

        return _proposals(ctx, incomplete, find)


class LibvirtName(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4, not before
    """The name or id of a VM that libvirt has and hvmgr does not manage."""

    name = "vm"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that ``--all`` would take."""

        def find(host: Host) -> list[tuple[str, str]]:
            return [(name, name) for name in host.adoptable()]

        return _proposals(ctx, incomplete, find)


class SnapshotName(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4, not before
    """A snapshot's name or id."""

    name = "snapshot"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The snapshots of the VM that was named; by id where a name would need quotes."""

        def find(host: Host) -> list[tuple[str, str]]:
            return [(one.name, one.id) for one in host.vm(str(ctx.params.get("vm"))).snapshots()]

        return _proposals(ctx, incomplete, find)


def vm(function: Callable[..., Any]) -> Callable[..., Any]:
    """The argument VM."""
    return click.argument("vm", metavar="VM", type=VmName())(function)


def snapshot(function: Callable[..., Any]) -> Callable[..., Any]:
    """The argument SNAP."""
    return click.argument("snap", metavar="SNAP", type=SnapshotName())(function)


def _proposals(
    ctx: click.Context, incomplete: str, find: Callable[[Host], list[tuple[str, str]]]
) -> list[CompletionItem]:
    """The names that begin so, or ids where a name would need quotes; every failure means no proposal and no word."""
    from click.shell_completion import CompletionItem

    request = ctx.find_object(Request) or Request()
    with contextlib.suppress(errors.HvmgrError, OSError), request.host() as host:
        words = [(name if _PLAIN.fullmatch(name) else one, name) for name, one in find(host)]
        return [CompletionItem(word, help=name) for word, name in words if word.startswith(incomplete)]
    return []
