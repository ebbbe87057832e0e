"""``hvmgr serve``: the HTTP server, in the foreground, until it is told to stop."""

from __future__ import annotations

import ipaddress
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hvmgr import errors, settings
from hvmgr.faces.cli import json_out, render
from hvmgr.faces.cli.groups import Command, Seconds
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.faces.http.audit import Audit
    from hvmgr.faces.http.server import Server

_PORT = 8006
_WAIT_S = 120.0  # many transfers of one VM begin at once, and each one needs its lock for a moment


@click.command(
    "serve",
    cls=Command,
    codes=(0, 1, 2, 5, 6, 8),
    examples=[
        "hvmgr serve",
        "hvmgr serve --listen 0.0.0.0 --tls-cert /etc/hvmgr/server.pem --tls-key /etc/hvmgr/server.key",
    ],
)
@click.option("--listen", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=_PORT, show_default=True, help="0: any free one.")
@click.option(
    "--tls-cert", type=click.Path(path_type=Path), metavar="FILE", help="Serve HTTPS with this certificate (PEM)."
)
@click.option(
    "--tls-key", type=click.Path(path_type=Path), metavar="FILE", help="Its key, when it is not in the same file."
)
@click.option("--insecure", is_flag=True, help="Listen on other addresses than this host's own without TLS.")
@click.option("--users", type=click.Path(path_type=Path), metavar="FILE", help="The file of users.")
@click.option("--audit", type=click.Path(path_type=Path), metavar="FILE", help="The audit log; else stderr.")
@click.option("--session-time", type=Seconds(), default=86400.0, metavar="S", show_default="a day",
              help="A session ends when it was not used for so long.")  # fmt: skip
@click.option("--stall-time", type=Seconds(), default=120.0, metavar="S", show_default="120",
              help="A transfer ends when no byte moved for so long.")  # fmt: skip
@click.option("--grace", type=Seconds(), default=30.0, metavar="S", show_default="30",
              help="What transfers get to finish when the server is stopped.")  # fmt: skip
@click.option("--connections", type=click.IntRange(1, 10000), default=256, show_default=True, help="The most at once.")
@click.pass_obj
def command(
    request: Request,
    *,
    listen: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    insecure: bool,
    users: Path | None,
    audit: Path | None,
    session_time: float,
    stall_time: float,
    grace: float,
    connections: int,
) -> None:
    """Serve disks over HTTP, with the Xen API that goes with them.

    Exports and imports of single disks, whole or as deltas, for backup programs that know XenServer or XCP-ng, and for curl.
    Only who has a name and a password gets in: see hvmgr user.
    """
    _require_library()
    from hvmgr.faces.http import audit as audit_log
    from hvmgr.faces.http.app import App
    from hvmgr.faces.http.connection import Limits
    from hvmgr.faces.http.server import Address, Server
    from hvmgr.faces.http.service import Service, Settings

    _require_safe(listen, tls_cert, tls_key, insecure=insecure)
    if request.dry_run:
        raise errors.UsageError("hvmgr serve has no dry run", hint="start it without --dry-run")
    file = users or settings.users_file()
    _tell_of_users(file)
    log = audit_log.to_stderr() if audit is None else audit_log.to_file(audit)
    wait_s = _WAIT_S if request.wait_s == settings.LOCK_WAIT_S else request.wait_s
    service = Service(
        Settings(
            uri=request.uri or settings.default_uri(),
            root=request.root or settings.default_root(),
            users=file,
            wait_s=wait_s,
            session_s=session_time,
        ),
        log,
    )
    app = App(service)
    server = Server(
        Address(listen, port, tls_cert, tls_key),
        app.serve,
        limits=Limits(stall_s=stall_time),
        most_connections=connections,
    )
    app.server = server
    _obey_signals(server)
    scheme = "http" if tls_cert is None else "https"
    places = [f"{scheme}://{_shown(host)}:{number}" for host, number in server.ports]
    log.tell("start", listen=places, root=str(service.place.root))
    if request.json:
        json_out.show({"listen": places})
    else:
        render.say("\n".join(places))
    _tell_manager("READY=1")
    server.run(grace_s=grace, on_stop=service.stop, on_reload=lambda: _reload(server, log))
    service.close()
    log.tell("stop")


def _require_library() -> None:
    try:
        import h11  # noqa: F401
    except ImportError as error:
        raise errors.Unsupported(
            "the HTTP server needs the library h11",
            hint="install it: pip install 'hvmgr[http]', or apt install python3-h11",
        ) from error


def _require_safe(listen: str, certificate: Path | None, key: Path | None, *, insecure: bool) -> None:
    if key is not None and certificate is None:
        raise errors.UsageError("--tls-key without --tls-cert", hint="give both")
    if certificate is None and not insecure and not _is_own(listen):
        raise errors.UsageError(
            f"on {listen} passwords and disks would pass the network in the clear",
            hint="give --tls-cert and --tls-key, listen on 127.0.0.1 behind a proxy that has TLS, or give --insecure if that is meant",
        )


def _is_own(listen: str) -> bool:
    """Whether only this host reaches the address."""
    try:
        return ipaddress.ip_address(listen.partition("%")[0]).is_loopback
    except ValueError:
        return listen == "localhost"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tell_of_users(file: Path) -> None:
    from hvmgr.storage import users

    if not users.read(file):
        render.notice(f"{file} has no user yet, so that nobody can log in: hvmgr user add NAME")


def _obey_signals(server: Server) -> None:
    """SIGTERM and Ctrl-C stop the server, a second one at once; SIGHUP reads the certificate again."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    signal.signal(signal.SIGHUP, lambda *_: server.wish_reload())


def _reload(server: Server, log: Audit) -> None:
    try:
        server.reload()
        log.tell("reload")
    except errors.HvmgrError as error:
        log.tell("reload", outcome=error.message)


def _tell_manager(word: str) -> None:
    """systemd hears that the service is there (sd_notify(3))."""
    import socket

    if place := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
            one.sendto(word.encode(), "\0" + place[1:] if place.startswith("@") else place)
