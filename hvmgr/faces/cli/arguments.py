"""Arguments that name a VM or a snapshot, with the shell's completion from the homes, and options that name a size."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, units
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from hvmgr.operations.host import Host

_PLAIN = re.compile(r"[\w.+@%,-]+")  # what every shell takes as one word


class HerePath(click.Path):
    """A path that counts from where the user is, as an absolute one: it goes into configurations."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The absolute path; symbolic links stay as they are named. An empty one is a variable that nobody set."""
        if not os.fspath(value):
            self.fail("it is empty", param, ctx)
        return absolute(value)


HERE_PATH = HerePath()


def absolute(path: str | Path) -> Path:
    """A path from where the user is."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute would keep '..'


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4, not before
    """A size with a unit, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes behind the text."""
        try:
            return value if isinstance(value, int) else units.parse_size(value)
        except errors.UsageError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


def from_stdin(*, line: bool = False) -> str:
    """The text that somebody writes to our stdin, or the first ``line`` of it."""
    try:
        return sys.stdin.readline() if line else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise errors.UsageError("what comes from stdin is no text in UTF-8") from error
    except OSError as error:
        raise errors.HostFailed(f"stdin cannot be read: {error.strerror}") from error


def moment(text: str, option: str) -> datetime:
    """``10m`` ago, or a time as people and programs write it; without an offset it is local."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):  # the latter of a time before or after all that have a time zone
        try:
            return datetime.now(UTC) - timedelta(seconds=units.parse_duration(text))
        except (errors.UsageError, OverflowError) as error:
            raise errors.UsageError(
                f"{option} {text}: neither a length of time nor a time",
                hint="write it as 10m, 2h, 1d, or as 2026-11-21 14:03",
            ) from error


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
