"""The command line. ``run`` is its only door: arguments in, exit code out; everything else is imported when needed.

What failed goes to stderr as two lines (what, then what to do), or with ``--json`` to stdout as one document. This is the
one place that turns errors into exit codes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hvmgr import errors
from hvmgr.errors import HvmgrError

DEFECT = 1
CUT_OFF = 141  # as of a program that ends by SIGPIPE


def run(argv: Sequence[str]) -> int:
    """Carry out one command line and return its exit code; never raises but for SystemExit of a shell's completion."""
    arguments = list(argv)
    try:
        code = _tell_version() if arguments == ["--version"] else _carry_out(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        forget_stdout()  # whoever read our lines has seen enough; what was asked for is done
        return 0
    except OSError as error:
        forget_stdout()
        return _fail(errors.HostFailed(f"cannot write the output: {error.strerror}"), [])
    return code


def _carry_out(arguments: list[str]) -> int:
    """The exit code of a command, whose failure is told; but for a reader of stdout who has gone."""
    try:
        return invoke(arguments)
    except (HvmgrError, OSError, KeyboardInterrupt, EOFError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        return _fail(_foreseen(error), arguments)
    except Exception as error:  # noqa: BLE001 - the outermost edge: a defect is one sentence, not a wall of text
        return _fail_by_defect(error, arguments)


def _tell_version() -> int:
    """Before anything heavy is imported."""
    from hvmgr.version import __version__

    sys.stdout.write(f"hvmgr {__version__}\n")
    return 0


def exit_code(kind: type[HvmgrError]) -> int:
    """The exit code for a class of errors."""
    return kind.exit_code


def invoke(argv: Sequence[str]) -> int:
    """Carry out one command line and return its exit code; a failure is raised as the HvmgrError that it is."""
    import click

    from hvmgr.faces.cli import words
    from hvmgr.faces.cli.request import Request
    from hvmgr.faces.cli.root import command

    arguments = list(argv)  # click takes it apart
    if "_HVMGR_COMPLETE" in os.environ:
        command.main(arguments, prog_name="hvmgr", obj=Request())
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold what the locale cannot say
    try:
        with command.make_context("hvmgr", arguments, obj=Request()) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort as error:
        raise errors.Cancelled("stopped") from error
    except click.ClickException as error:
        raise words.translate(error) from error
    return 0


def _foreseen(error: BaseException) -> HvmgrError:
    if isinstance(error, HvmgrError):
        return error
    if isinstance(error, FileNotFoundError) and not error.filename:
        return errors.NotFound("the folder that you are in is not there any more", hint="change to another one")
    if isinstance(error, OSError):  # the system's own no, met where nobody expected it
        from hvmgr.os_errors import translated

        found = translated(error) if error.filename else errors.HostFailed(error.strerror or str(error))
        found.__cause__ = error
        return found
    return errors.Cancelled("stopped")


def _fail(error: HvmgrError, arguments: list[str]) -> int:
    from hvmgr.faces.cli import json_out, render

    if _wants(arguments, "--json"):
        json_out.show_error(error.code, error.message, error.hint, error.facts)
    else:
        render.complain(error.message, error.hint)
    if error.__cause__ is not None and isinstance(error.__cause__, OSError) and _is_verbose(arguments):
        _trace(error.__cause__)
    return exit_code(type(error))


def _fail_by_defect(error: Exception, arguments: list[str]) -> int:
    from hvmgr.faces.cli import json_out, render

    verbose = _is_verbose(arguments)
    if verbose:
        _trace(error)
    message = f"a defect in hvmgr: {type(error).__name__}: {error}"
    hint = "report it, please, with all of the above" if verbose else "run it again with -v and report what that prints"
    if _wants(arguments, "--json"):
        json_out.show_error("Defect", message, hint, {})
    else:
        render.complain(message, hint)
    return DEFECT


def _trace(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error, file=sys.stderr)


def _is_verbose(arguments: list[str]) -> bool:
    return _wants(arguments, "-v") or _wants(arguments, "--verbose")


def _wants(arguments: list[str], option: str) -> bool:
    """Whether an option is there, also when the rest could not be understood."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return option in arguments[:end]


def forget_stdout() -> None:
    """Nothing more can be written: not by us, and not by Python when it ends."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
    except (OSError, ValueError):
        pass  # a stdout that is no file needs no forgetting
