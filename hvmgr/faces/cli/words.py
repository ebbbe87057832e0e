"""click's errors in hvmgr's words: one sentence, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import click

from hvmgr import errors

_CLOSED = re.compile(r"'(.*)' is not readable\.$", re.DOTALL)  # click's word for a file that the user may not read


def translate(error: click.ClickException) -> errors.HvmgrError:
    """The error of ours that says the same."""
    if (closed := _CLOSED.search(error.message)) is not None:
        return errors.HostFailed(f"no permission for {closed[1]}", hint="run as root, or give your user access to it")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "hvmgr"
    hint = f"see: {path} --help"
    if context is not None and isinstance(error, click.exceptions.NoArgsIsHelpError):
        known = context.command.list_commands(context) if isinstance(context.command, click.Group) else []
        found = errors.UsageError(f"{path} needs a command", hint=f"one of: {', '.join(known)}")
    elif isinstance(error, click.NoSuchOption):
        name = error.option_name
        found = errors.UsageError(
            f"{path} has no option '{name}'", hint=near(name, _options(context)) or _behind(hint, context)
        )
    elif isinstance(error, click.MissingParameter):
        name = _name(error, context)
        usage = context.command.get_usage(context).replace("Usage:", "usage:", 1) if context is not None else hint
        found = errors.UsageError(f"{name} is missing", hint=" ".join(usage.split()))
    elif isinstance(error, click.BadParameter):
        found = errors.UsageError(f"{_name(error, context)}: {_sentence(error.message)}", hint=hint)
    else:
        sentence = _sentence(error.format_message()).replace("requires an argument", "needs a value")
        if "extra argument" in sentence:
            hint = "options come before '--'" if "(-" in sentence else f"{hint}; a name with spaces needs quotes"
        found = errors.UsageError(sentence, hint=hint)
    return found


def _behind(hint: str, context: click.Context | None) -> str:
    """To a command that takes names, a word that begins with '-' may have been one."""
    takes_names = context is not None and any(isinstance(one, click.Argument) for one in context.command.params)
    if not takes_names:
        return hint
    return f"{hint}; a name that begins with '-' comes after all options and '--'"


def near(word: str, known: Iterable[str]) -> str | None:
    """A hint with the words that were perhaps meant."""
    import difflib

    by_core = {one.strip("-"): one for one in known}
    found = [by_core[core] for core in difflib.get_close_matches(word.strip("-"), list(by_core), n=2, cutoff=0.6)]
    return "did you mean " + " or ".join(f"'{one}'" for one in found) + "?" if found else None


def _options(context: click.Context | None) -> list[str]:
    if context is None:
        return []
    return [
        word
        for param in context.command.get_params(context)
        for word in (*param.opts, *param.secondary_opts)
        if word.startswith("--")
    ]


def _name(error: click.BadParameter, context: click.Context | None) -> str:
    if error.param is None:
        return "an argument"
    return error.param.get_error_hint(context).strip("'[]") if context is not None else str(error.param.name)


def _sentence(text: str) -> str:
    text = " ".join(text.split()).removesuffix(".")
    return text[:1].lower() + text[1:]
