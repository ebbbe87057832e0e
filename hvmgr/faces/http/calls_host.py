"""Calls about sessions, the pool, the host and the place where disks are (SR): one of each."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path
from typing import Any

from hvmgr.faces.http.api import CALLS, Asked, call, shown, text
from hvmgr.faces.http.failure import TooMany, XenFailure
from hvmgr.faces.http.sessions import REF
from hvmgr.model.user import Role
from hvmgr.version import __version__

MAJOR, MINOR = 2, 21
_PRODUCT = "8.2.0"  # the version of the product whose calls these are
_SPACE = uuid.UUID("5f0b2bd4-3d0c-4d5f-9a6e-6a2f3a1f7c11")


class Place:
    """The references of this host, its pool and the root of its disks: the same after every start."""

    def __init__(self, root: Path) -> None:
        try:
            machine = Path("/etc/machine-id").read_text("ascii").strip()
        except (OSError, ValueError):
            machine = socket.gethostname()
        self.name = socket.gethostname()
        self.root = root
        self.host = REF + str(uuid.uuid5(_SPACE, f"host {machine}"))
        self.pool = REF + str(uuid.uuid5(_SPACE, f"pool {machine}"))
        self.sr = REF + str(uuid.uuid5(_SPACE, f"sr {machine} {root}"))


# -- sessions ----------------------------------------------------------------------------------------------------------


@call("session.login_with_password", role=None, least=2, most=4)
def login(asked: Asked, name: str, password: str, version: str = "", originator: str = "") -> str:
    """A new session; the version is of no interest."""
    del version
    service = asked.service
    who, word = text("uname", name), text("pwd", password, most=4096)
    try:
        user = service.find_user(who, word, asked.peer)
    except TooMany as error:
        raise XenFailure("SESSION_AUTHENTICATION_FAILED", who, str(error)) from error
    if user is None:
        raise XenFailure("SESSION_AUTHENTICATION_FAILED", who, "wrong user or password")
    service.audit.tell("login", peer=asked.peer, user=who, outcome="ok")
    return service.sessions.open(user, shown(originator)).ref


@call("session.logout")
def logout(asked: Asked) -> str:
    """The session is over."""
    asked.service.sessions.close(asked.known.ref)
    asked.service.audit.tell("logout", peer=asked.peer, user=asked.known.name)
    return ""


@call("system.listMethods", role=None, most=1)
def list_methods(asked: Asked, session: str = "") -> list[str]:
    """All calls; Xen Orchestra asks before it has a session."""
    del asked, session
    return sorted(CALLS)


# -- the pool and its host ---------------------------------------------------------------------------------------------


def pool_record(asked: Asked) -> dict[str, Any]:
    """The one pool."""
    place = asked.service.place
    return {
        "uuid": place.pool.removeprefix(REF),
        "name_label": place.name,
        "name_description": "",
        "master": place.host,
        "default_SR": place.sr,
        "other_config": asked.service.pool_notes.of(place.pool),
    }


def host_record(asked: Asked) -> dict[str, Any]:
    """The one host."""
    place = asked.service.place
    return {
        "uuid": place.host.removeprefix(REF),
        "name_label": place.name,
        "name_description": "",
        "hostname": place.name,
        "address": asked.local,
        "enabled": True,
        "API_version_major": MAJOR,
        "API_version_minor": MINOR,
        "PIFs": [],
        "software_version": {"product_version": _PRODUCT, "product_brand": "hvmgr", "hvmgr": __version__},
        "other_config": {},
    }


def sr_record(asked: Asked) -> dict[str, Any]:
    """The one place of disks: the root."""
    place = asked.service.place
    return {
        "uuid": place.sr.removeprefix(REF),
        "name_label": "hvmgr",
        "name_description": f"disks of {place.name}",
        "type": "hvmgr",
        "content_type": "user",
        "shared": False,
        "PBDs": [],
        "VDIs": [REF + one for one in asked.service.disks.uuids()],
        "other_config": {},
        "sm_config": {},
    }


def _own(kind: str, ref: Any, own: str) -> None:
    if ref != own:
        raise XenFailure("HANDLE_INVALID", kind, shown(ref))


@call("pool.get_all")
def pools(asked: Asked) -> list[str]:
    """The one pool."""
    return [asked.service.place.pool]


@call("pool.get_all_records")
def pool_records(asked: Asked) -> dict[str, Any]:
    """The one pool with its record."""
    return {asked.service.place.pool: pool_record(asked)}


@call("pool.get_record", least=1)
def pool_record_of(asked: Asked, ref: str) -> dict[str, Any]:
    """The pool's record."""
    _own("pool", ref, asked.service.place.pool)
    return pool_record(asked)


@call("pool.get_other_config", least=1)
def pool_notes(asked: Asked, ref: str) -> dict[str, str]:
    """What clients noted on the pool."""
    _own("pool", ref, asked.service.place.pool)
    return asked.service.pool_notes.of(ref)


@call("pool.add_to_other_config", role=Role.ADMIN, least=3)
def add_to_other_config(asked: Asked, ref: str, key: str, value: str) -> str:
    """A note on the pool, as long as the server runs. Xen Orchestra waits for its event to know that it has seen all before."""
    _own("pool", ref, asked.service.place.pool)
    asked.service.pool_notes.add(ref, text("key", key), text("value", value))
    _tell_pool(asked)
    return ""


@call("pool.remove_from_other_config", role=Role.ADMIN, least=2)
def remove_from_other_config(asked: Asked, ref: str, key: str) -> str:
    """The note is gone."""
    _own("pool", ref, asked.service.place.pool)
    asked.service.pool_notes.remove(ref, text("key", key))
    _tell_pool(asked)
    return ""


def _tell_pool(asked: Asked) -> None:
    asked.service.look_at_disks()  # what has become of disks comes before it
    asked.service.events.note("pool", "mod", asked.service.place.pool, pool_record(asked))


@call("pool.get_default_SR", least=1)
def default_sr(asked: Asked, ref: str) -> str:
    """Where new disks go."""
    _own("pool", ref, asked.service.place.pool)
    return asked.service.place.sr


@call("pool.get_master", least=1)
def master(asked: Asked, ref: str) -> str:
    """The one host."""
    _own("pool", ref, asked.service.place.pool)
    return asked.service.place.host


@call("host.get_all")
def hosts(asked: Asked) -> list[str]:
    """The one host."""
    return [asked.service.place.host]


@call("host.get_all_records")
def host_records(asked: Asked) -> dict[str, Any]:
    """The one host with its record."""
    return {asked.service.place.host: host_record(asked)}


@call("host.get_record", least=1)
def host_record_of(asked: Asked, ref: str) -> dict[str, Any]:
    """The host's record."""
    _own("host", ref, asked.service.place.host)
    return host_record(asked)


@call("host.get_API_version_major", least=1)
def version_major(asked: Asked, ref: str) -> int:
    """Of the Xen API."""
    _own("host", ref, asked.service.place.host)
    return MAJOR


@call("host.get_API_version_minor", least=1)
def version_minor(asked: Asked, ref: str) -> int:
    """Of the Xen API."""
    _own("host", ref, asked.service.place.host)
    return MINOR


@call("SR.get_all")
def srs(asked: Asked) -> list[str]:
    """The one place of disks."""
    return [asked.service.place.sr]


@call("SR.get_all_records")
def sr_records(asked: Asked) -> dict[str, Any]:
    """The one place of disks with its record."""
    return {asked.service.place.sr: sr_record(asked)}


@call("SR.get_record", least=1)
def sr_record_of(asked: Asked, ref: str) -> dict[str, Any]:
    """The record of the place of disks."""
    _own("SR", ref, asked.service.place.sr)
    return sr_record(asked)


@call("SR.get_by_uuid", least=1)
def sr_by_uuid(asked: Asked, wanted: str) -> str:
    """The reference of the place of disks."""
    if REF + text("uuid", wanted) != asked.service.place.sr:
        raise XenFailure("UUID_INVALID", "SR", wanted[:64])
    return asked.service.place.sr


@call("VM.get_all_records")
def vm_records(asked: Asked) -> dict[str, Any]:
    """None: VMs are not managed by this API, only their disks."""
    del asked
    return {}


@call("VBD.get_all_records")
def vbd_records(asked: Asked) -> dict[str, Any]:
    """None: which VM a disk belongs to, its name says."""
    del asked
    return {}
