"""``hvmgr version``."""

from __future__ import annotations

import click

from hvmgr.faces.cli import json_out, render
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request
from hvmgr.version import __version__


@click.command("version", cls=Command, examples=["hvmgr version"], codes=(0,))
@click.pass_obj
def command(request: Request) -> None:
    """Print the version.

    The same as hvmgr --version.
    """
    if request.json:
        json_out.show({"version": __version__})
    else:
        render.say(f"hvmgr {__version__}")
