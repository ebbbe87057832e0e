"""Commands and groups of the command line.

Commands take the global options before and after their name, groups import a command when it is wanted, and the help
of all ends with the exit codes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from hvmgr import errors, settings
from hvmgr.faces.cli import CUT_OFF, arguments, words

EXIT_CODES = {
    0: "done",
    1: "a defect in hvmgr",
    2: "correct the request",
    3: "no such VM, snapshot, disk, file",
    4: "exists already, busy, wrong state, other users of an image",
    5: "this format, host or version cannot do it",
    6: "an image or a home is damaged; nothing was written",
    7: "no space; free some and run again",
    8: "libvirt, QEMU or a program said no",
    9: "contact was lost; the next command asks what happened",
    130: "stopped by the user; nothing half-done is left",
    CUT_OFF: "whoever read the bytes of files went before all were written",
}
READS = (0, 1, 2, 3, 4, 5, 6, 8, 130)  # the codes of a command that only looks
CHANGES = tuple(code for code in EXIT_CODES if code != CUT_OFF)


class Seconds(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4, not before
    """A time in seconds, 0 or more."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number behind the text."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"'{value}' is not a number of seconds", param, ctx)
        return seconds


def _store(context: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep what was said on the command line; what is not said there must not undo what was said before."""
    if param.name is not None and context.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
        setattr(context.obj, param.name, value)


def global_options() -> list[click.Parameter]:
    """The options that every command takes, before and after its name."""
    return [
        click.Option(["-c", "--connect", "uri"], metavar="URI", expose_value=False, callback=_store,
                     help="libvirt's connection; else LIBVIRT_DEFAULT_URI, else qemu:///system."),
        click.Option(["--root"], metavar="DIR", type=arguments.HERE_PATH, expose_value=False, callback=_store,
                     help="The folder that holds the VM homes."),
        click.Option(["--json"], is_flag=True, expose_value=False, callback=_store,
                     help="One JSON document on stdout, also for a failure."),
        click.Option(["--dry-run"], is_flag=True, expose_value=False, callback=_store,
                     help="Show the plan and change nothing."),
        click.Option(["--yes"], is_flag=True, expose_value=False, callback=_store, help="Do not ask."),
        click.Option(["--wait", "wait_s"], metavar="S", type=Seconds(), expose_value=False, callback=_store,
                     help=f"Seconds to wait for another command on the same VM ({settings.LOCK_WAIT_S:.0f})."),
        click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_store,
                     help="Show where a defect happened."),
    ]  # fmt: skip


class Command(click.Command):
    """A command with the global options; its help ends with examples and exit codes."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), codes: Sequence[int] = CHANGES, **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples = tuple(examples)
        self.codes = tuple(codes)
        self._globals: list[click.Parameter] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own and the global ones, made when they are needed."""
        if self._globals is None:
            self._globals = global_options()
        return [*super().get_params(ctx), *self._globals]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it; what is wrong is wrong with this command, which click forgets of an option without its value."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's options first, then the global ones."""
        _format_options(self, self._globals or [], ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples and exit codes."""
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), EXIT_CODES[code]) for code in self.codes])


class Group(click.Group):
    """Commands by name; those of ``lazy`` (name to ``module:attribute`` and short help) are imported when wanted."""

    command_class: type[click.Command] | None = Command

    def __init__(
        self,
        *args: Any,
        lazy: Mapping[str, tuple[str, str]] | None = None,
        aliases: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self.lazy = dict(lazy or {})
        self.aliases = dict(aliases or {})
        self._globals: list[click.Parameter] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The global options."""
        if self._globals is None:
            self._globals = global_options()
        return [*super().get_params(ctx), *self._globals]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names in the order in which they were given; aliases have no line of their own."""
        return [*self.lazy, *(name for name in self.commands if name not in self.lazy)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command with this name or alias."""
        name = self.aliases.get(cmd_name, cmd_name)
        if name in self.lazy and name not in self.commands:
            module, _, attribute = self.lazy[name][0].partition(":")
            self.add_command(getattr(importlib.import_module(module), attribute), name)
        return self.commands.get(name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the next word names; UsageError offers near ones."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            known = [*self.list_commands(ctx), *self.aliases]
            hint = words.near(name, known) or f"see: {ctx.command_path} --help"
            raise errors.UsageError(f"{ctx.command_path} has no command '{name}'", hint=hint)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands, each with one line; then the options."""
        rows = [(name, self._short_help(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        _format_options(self, self._globals or [], ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The exit codes that all commands share."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def _short_help(self, ctx: click.Context, name: str) -> str:
        if name in self.lazy:
            return self.lazy[name][1]
        found = self.get_command(ctx, name)
        return found.get_short_help_str(100) if found is not None else ""


def _format_options(
    command: click.Command, general: Sequence[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    own = [param for param in command.get_params(ctx) if param not in general]
    for title, params in (("Options", own), ("Global options", general)):
        rows = [row for param in params if (row := param.get_help_record(ctx)) is not None]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)
