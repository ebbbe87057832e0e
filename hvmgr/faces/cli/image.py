"""``hvmgr image``: image files."""

from __future__ import annotations

import click

from hvmgr.faces.cli import attach
from hvmgr.faces.cli.groups import Group


@click.group("image", cls=Group)
def command() -> None:
    """Attach image files as block devices."""


attach.register(command)
