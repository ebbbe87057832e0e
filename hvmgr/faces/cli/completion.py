"""``hvmgr completion``: the script that makes a shell complete commands, VMs and snapshots."""

from __future__ import annotations

import click
from click import shell_completion

from hvmgr.faces.cli import json_out
from hvmgr.faces.cli.groups import Command
from hvmgr.faces.cli.request import Request

_SHELLS = ("bash", "zsh", "fish")


@click.command("completion", cls=Command, codes=(0, 1, 2), examples=[
    "hvmgr completion bash > /etc/bash_completion.d/hvmgr",
    "hvmgr completion zsh > /usr/local/share/zsh/site-functions/_hvmgr",
    "hvmgr completion fish > ~/.config/fish/completions/hvmgr.fish",
])  # fmt: skip
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    It completes commands, options, and the names of VMs and snapshots, which are read from the homes without libvirt.
    """
    request: Request = context.obj
    kind = shell_completion.get_completion_class(shell)
    assert kind is not None
    script = kind(context.find_root().command, {}, "hvmgr", "_HVMGR_COMPLETE").source()
    if request.json:
        json_out.show({"shell": shell, "script": script})
    else:
        click.echo(script)
