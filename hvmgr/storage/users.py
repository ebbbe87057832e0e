"""The file of the HTTP server's users (docs/http.md): only its owner may read or write it; a change is whole or not there."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from hvmgr import errors
from hvmgr.model import user
from hvmgr.model.user import Role, Secret, User
from hvmgr.storage import durable, locks

_FORMAT = 1
_WAIT_S = 10.0


def read(path: Path) -> dict[str, User]:
    """The users by name; none when there is no file. Corrupt when it is damaged, UsageError when others can get at it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise errors.HostFailed(f"{path} cannot be read: {error.strerror}") from error
    with file:
        _require_private(path, os.fstat(file.fileno()))
        return _parse(path, file.read())


def add(path: Path, name: str, role: Role, password: str, *, replace: bool) -> bool:
    """The user is in the file, with this role and password; whether it is a new one. Conflict when it is there already."""
    user.require_name(name)
    secret = user.make_secret(password, os.urandom(user.SALT_SIZE))
    _require_folder(path)
    with locks.held(_lock(path), wait_s=_WAIT_S, what=f"the users in {path}"):
        known = read(path)
        if name in known and not replace:
            raise errors.Conflict(
                f"there is a user '{name}' already", hint="--replace gives the user this role and password"
            )
        _write(path, {**known, name: User(name, role, secret)})
    return name not in known


def remove(path: Path, name: str) -> None:
    """The user is not in the file any more; NotFound when there was none."""
    require(path, name)
    with locks.held(_lock(path), wait_s=_WAIT_S, what=f"the users in {path}"):
        require(path, name)
        _write(path, {key: one for key, one in read(path).items() if key != name})


def require(path: Path, name: str) -> User:
    """The user; NotFound when there is none of this name."""
    known = read(path)
    if name not in known:
        raise errors.NotFound(f"there is no user '{name}' in {path}", hint="see: hvmgr user list")
    return known[name]


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _require_folder(path: Path) -> None:
    with durable.explained(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, known: Mapping[str, User]) -> None:
    entries = [
        {"name": one.name, "role": one.role.value, "password": one.secret.to_text()}
        for one in sorted(known.values(), key=lambda one: one.name)
    ]
    data = json.dumps({"format": _FORMAT, "users": entries}, indent=1).encode() + b"\n"
    durable.write_file(path, data, mode=0o600)


def _require_private(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise errors.UsageError(f"{path} is no file", hint="name the file of users with --users")
    if facts.st_mode & 0o077 or facts.st_uid not in {os.geteuid(), 0}:
        raise errors.UsageError(f"others can get at {path}, the file of users", hint=f"run: chmod 600 {path}")


def _parse(path: Path, data: bytes) -> dict[str, User]:
    try:
        facts = json.loads(data)
        if facts["format"] > _FORMAT:
            raise errors.Unsupported(f"{path} was written by a newer hvmgr", hint="use that one")
        found = [User(str(one["name"]), Role(one["role"]), Secret.from_text(one["password"])) for one in facts["users"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.Corrupt(
            f"{path} is no file of users: {error}", hint="put back a copy, or remove it and add the users again"
        ) from error
    return {one.name: one for one in found}
