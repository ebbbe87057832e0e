"""``hvmgr config``: the settings, and where each one comes from."""

from __future__ import annotations

import click

from hvmgr import settings
from hvmgr.faces.cli import json_out, render
from hvmgr.faces.cli.groups import Group
from hvmgr.faces.cli.request import Request


@click.group("config", cls=Group)
def command() -> None:
    """Show the settings and where they come from."""


@command.command("show", codes=(0, 1, 2), examples=["hvmgr config show", "hvmgr --root /srv/vms config show --json"])
@click.pass_obj
def show(request: Request) -> None:
    """Show each setting, its value, and where it comes from: an option, the environment, a file's line, or hvmgr itself."""
    uri, root = request.uri or settings.default_uri(), request.root or settings.default_root()
    has_waited = request.wait_s != settings.LOCK_WAIT_S
    rows = [
        ("uri", uri, "-c" if request.uri else settings.origin("connection", "LIBVIRT_DEFAULT_URI")),
        ("root", str(root), "--root" if request.root else settings.origin("root", "HVMGR_ROOT")),
        ("index", str(settings.index_folder()), settings.origin("", "HVMGR_INDEX")),
        ("cache", str(settings.cache_folder()), settings.origin("", "XDG_CACHE_HOME")),
        ("templates", str(settings.templates_folder()), settings.BUILT_IN),
        ("wait", f"{request.wait_s:g}", "--wait" if has_waited else settings.BUILT_IN),
        ("compress", settings.compression(), settings.origin("compress")),
        ("hook-time-limit", f"{settings.hook_time_limit_s():g}", settings.origin("hook-time-limit")),
        ("space-low", settings.space_low_text(), settings.origin("space-low")),
        ("retention", str(settings.retention()), settings.origin("retention")),
    ]
    maps = [(key, old, new, where) for key in ("networks", "paths") for old, new, where in settings.import_maps(key)]
    if request.json:
        shown = {name: {"value": value, "source": source} for name, value, source in rows}
        document = [{"map": key, "old": old, "new": new, "source": where} for key, old, new, where in maps]
        json_out.show({"config": shown, "maps": document})
    else:
        rows += [(f"maps: {key}", f"{old} = {new}", where) for key, old, new, where in maps]
        render.table(("Setting", "Value", "From"), rows)
