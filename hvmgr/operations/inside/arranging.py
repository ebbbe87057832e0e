"""Where each thing that is put goes in a file system, worked out on the file system as it is: nothing is written.

The rules are those of ``cp``: into a folder that is there, or under the name that is given; folders of one name become one. What
stands there already is replaced only when that is asked for, a folder never by a file, nor a file by a folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hvmgr import errors
from hvmgr.model import patterns
from hvmgr.model.put_options import PutOptions
from hvmgr.operations.inside.browsing import Browser, Found, shown
from hvmgr.operations.inside.sources import Item
from hvmgr.storage.filesystems.reader import Type

LABEL = "security.selinux"
ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"
_NAME_MAX, _TARGET_MAX = 255, 4095


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that is to be made at ``path``, with all that is to be set; ``replaced`` stands there now.

    ``anew``: nothing of what is replaced stays. ``inherits``: its folder gives what is made in it an ACL.
    """

    path: bytes
    item: Item
    mode: int
    uid: int
    gid: int
    modified: int | None
    extras: Mapping[str, bytes]
    replaced: Found | None = None
    anew: bool = False
    inherits: bool = False

    @property
    def parts(self) -> tuple[bytes, ...]:
        """The names from the root on."""
        return tuple(self.path.strip(b"/").split(b"/"))


@dataclass(slots=True)
class Arrangement:
    """All that is to be made, folders before what is in them; ``folder`` is where it goes, for people."""

    folder: bytes
    acts: list[Act] = field(default_factory=list)
    linked: list[bytes] = field(default_factory=list)  # replaced under one of several names

    @property
    def size(self) -> int:
        """Bytes of all contents."""
        return sum(one.item.size for one in self.acts)

    @property
    def files(self) -> int:
        """How many names are made or replaced."""
        return len(self.acts)

    @property
    def replaced(self) -> int:
        """How many of them were there before."""
        return sum(one.replaced is not None for one in self.acts)


def arrange(browser: Browser, destination: bytes, items: Sequence[Item], manner: PutOptions) -> Arrangement:
    """What is to be made, so that the items are at the destination.

    NotFound for a folder that is not there, Conflict for what is in the way.
    """
    top, missing, renamed = _resolve(browser, destination, items, manner)
    one = _Arranger(browser, top, manner)
    for depth in range(1, len(missing) + 1):
        one.place(missing[:depth], _plain_folder(missing[:depth]))
    for item in items:
        rest = (renamed, *item.parts[1:]) if renamed is not None else item.parts
        one.place((*missing, *rest), item)
    one.arranged.folder = b"/".join([top.path.rstrip(b"/"), *missing]) or b"/"
    return one.arranged


def _resolve(
    browser: Browser, destination: bytes, items: Sequence[Item], manner: PutOptions
) -> tuple[Found, tuple[bytes, ...], bytes | None]:
    """The folder that is there, the folders below it that are not, and the new name of the only thing that is put."""
    parts = [one for one in destination.split(b"/") if one not in {b"", b"."}]
    found, count = _deepest(browser, parts)
    rest = tuple(parts[count:])
    tops = {one.parts[0] for one in items}
    if b".." in rest:
        raise errors.UsageError(f"{shown(destination)} leads back out of what is not there", hint="write it without ..")
    if not rest and found.node.is_folder:
        return found, (), None
    is_named = len(tops) == 1 and not destination.endswith(b"/") and not manner.as_before
    if not rest and is_named:
        folder, _, name = found.path.rpartition(b"/")
        return browser.find(folder or b"/"), (), name
    if not found.node.is_folder:
        raise errors.Conflict(f"{shown(found.path)} is no folder", hint="name a folder, or another place")
    above = rest[:-1] if is_named else rest
    if above and not manner.parents:
        browser.find(b"/" + b"/".join(parts[: count + 1]))  # NotFound, with names that are near
    return (found, above, rest[-1]) if is_named else (found, rest, None)


def _deepest(browser: Browser, parts: Sequence[bytes]) -> tuple[Found, int]:
    """How far the path is there, links followed."""
    for count in range(len(parts), 0, -1):
        try:
            return browser.find(b"/" + b"/".join(parts[:count])), count
        except errors.NotFound:
            continue
    return browser.root(), 0


def _plain_folder(parts: tuple[bytes, ...]) -> Item:
    return Item(parts, Type.FOLDER, 0, 0o755, None, None, None)


class _Arranger:
    """Where things go below ``top``, with what is there already and what is going to be."""

    def __init__(self, browser: Browser, top: Found, manner: PutOptions) -> None:
        self.arranged = Arrangement(top.path)
        self._browser, self._wish = browser, manner
        self._there: dict[tuple[bytes, ...], Found] = {(): top}
        self._made: dict[tuple[bytes, ...], Act] = {}

    def place(self, parts: tuple[bytes, ...], item: Item) -> None:
        """One thing more, whose folder was placed before."""
        key = self._key(parts)
        if key in self._made and item.type is self._made[key].item.type is Type.FOLDER:
            return
        if key in self._made:
            raise errors.UsageError(
                f"{item.origin}: the file system takes its name for that of another one that is put"
            )
        above = self._there.get(key[:-1])
        _require_name(parts[-1])
        there = self._there.get(key) or (None if above is None else self._browser.child(above, parts[-1]))
        if above is not None and (other := self._browser.by_short_name(above, parts[-1])) is not None:
            raise errors.Conflict(
                f"'{shown(parts[-1])}' is the short name (8.3) of '{shown(other)}' in {shown(above.path)}",
                hint="put it under another name",
            )
        if item.type is Type.FOLDER and there is not None and there.node.is_folder:
            self._there[key] = there
            return
        if there is not None:
            _require_replaceable(there, item, self._wish)
            if there.node.links > 1:
                self.arranged.linked.append(there.path)
            path = there.path
        else:
            folder = self._made[key[:-1]].path if above is None else above.path
            path = folder.rstrip(b"/") + b"/" + parts[-1]
        act = _act(self._browser, path, item, above, there, self._wish)
        self._made[key] = act
        self.arranged.acts.append(act)

    def _key(self, parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
        if not self._browser.reader.ignores_case:
            return parts
        return tuple(os.fsencode(patterns.folded_name(one)) for one in parts)


def _require_name(name: bytes) -> None:
    if name in {b"", b".", b".."} or b"/" in name or b"\0" in name or len(name) > _NAME_MAX:
        raise errors.UsageError(f"'{shown(name)}' can be no name in a file system", hint="give it another one")


def _require_replaceable(there: Found, item: Item, manner: PutOptions) -> None:
    what = shown(there.path)
    if there.node.is_folder:
        raise errors.Conflict(f"{what} is a folder, and {item.origin} is none", hint="put it under another name")
    if item.type is Type.FOLDER:
        raise errors.Conflict(
            f"{what} is no folder, and {item.origin or 'what is put'} is one", hint="name another place"
        )
    if there.node.type not in {Type.FILE, Type.LINK}:
        raise errors.Conflict(f"{what} is a {there.node.type.value}", hint="put it under another name")
    if not manner.overwrite:
        raise errors.Conflict(f"{what} exists already", hint="replace it with --overwrite, or name another place")


def _act(
    browser: Browser, path: bytes, item: Item, above: Found | None, there: Found | None, manner: PutOptions
) -> Act:
    if len(item.target) > _TARGET_MAX:
        raise errors.Unsupported(f"the target of the link {item.origin} is longer than a link can be")
    keeps = there is not None and there.node.type is item.type and not manner.as_before
    mode = _mode(item, manner)
    uid, gid = item.uid or 0, item.gid or 0
    extras = dict(item.extras) if manner.as_before else {}
    if keeps and there is not None:
        node = there.node
        mode = manner.mode if manner.mode is not None else node.mode if node.mode is not None else mode
        uid, gid = node.uid or 0, node.gid or 0
        extras = dict(browser.reader.extras(node))
    elif not manner.as_before and above is not None:  # as a kernel with SELinux would, roughly
        extras = {key: value for key, value in browser.reader.extras(above.node).items() if key == LABEL}
    uid = manner.uid if manner.uid is not None else uid
    gid = manner.gid if manner.gid is not None else gid
    inherits = above is not None and DEFAULT_ACL in browser.reader.extras(above.node)
    return Act(path, item, mode, uid, gid, item.modified, extras, there, manner.as_before, inherits)


def _mode(item: Item, manner: PutOptions) -> int:
    if manner.mode is None:
        return item.mode & 0o7777 if manner.as_before else item.mode & 0o777
    return manner.mode | (manner.mode & 0o444) >> 2 if item.type is Type.FOLDER else manner.mode
