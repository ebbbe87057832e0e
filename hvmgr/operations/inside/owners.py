"""Users and groups by the names that the system on a disk has for them."""

from __future__ import annotations

from hvmgr import errors
from hvmgr.model import names
from hvmgr.operations.inside.browsing import Browser
from hvmgr.storage.filesystems import reader

_LIMIT = 16 << 20
_MOST = (1 << 32) - 2


def resolve(browser: Browser, owner: str) -> tuple[int, int | None]:
    """The numbers of ``USER`` or ``USER:GROUP``, each a number or a name of the system on the disk; UsageError, NotFound.

    Without a group it is the user's own, or None where that is not known.
    """
    user, colon, group = owner.partition(":")
    uid = _number(user)
    gid = _number(group) if colon else None
    if uid is None:
        fields = _entry(browser, b"/etc/passwd", "user", user, 4)
        uid, own = int(fields[2]), int(fields[3])
        gid = own if not colon else gid
    if colon and gid is None:
        gid = int(_entry(browser, b"/etc/group", "group", group, 3)[2])
    return uid, gid


def _number(text: str) -> int | None:
    if not text:
        raise errors.UsageError("an owner has a name or a number", hint="--owner USER, or --owner USER:GROUP")
    if not text.isascii() or not text.isdigit():
        return None
    if len(text) > 10 or int(text) > _MOST:
        raise errors.UsageError(f"{text} is no number of a user", hint="the largest is 4294967294")
    return int(text)


def _entry(browser: Browser, path: bytes, what: str, name: str, least: int) -> list[str]:
    try:
        text = reader.whole(browser.content(browser.find(path)), _LIMIT).decode("utf-8", "replace")
    except (errors.NotFound, errors.UsageError) as error:
        raise errors.NotFound(
            f"who '{name}' is cannot be told: there is no {path.decode()} in {browser.volume.title}",
            hint="give its number",
        ) from error
    lines = [line.split(":") for line in text.splitlines()]
    known = [one for one in lines if len(one) >= least and all(part.isdigit() for part in one[2:least])]
    for fields in known:
        if fields[0] == name:
            return fields
    raise names.not_found(what, name, [one[0] for one in known], where=f"in {path.decode()} of {browser.volume.title}")
