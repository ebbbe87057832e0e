"""Which files differ between two moments of the disks of a VM, an export or image files: over all file systems on them.

    found = differing.between(views.of_vm(vm, snapshot="a"), views.of_vm(vm, snapshot="b"))
    for one in found.differences:
        print(one.change, one.path)

Where the disks may differ at all is told by their images (``changed``); a file system below which nothing was written is
not even opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import image_locks
from hvmgr.model.ranges import Ranges
from hvmgr.operations.inside import browsing, changed, looking
from hvmgr.operations.inside.browsing import Browser, Found
from hvmgr.operations.inside.comparison import Comparison, Difference
from hvmgr.storage.filesystems.signatures import Kind

if TYPE_CHECKING:
    from hvmgr.operations.inside.looking import Inside
    from hvmgr.operations.inside.unlocking import Key
    from hvmgr.operations.inside.views import Frozen, Volume


_TOLD = (None, Kind.LVM)  # nothing is known to be there; its logical volumes are told themselves
_UNSEEN = (None, Kind.LUKS)  # what may well be there, and nobody sees
_LOST = "what lies there is not known, damaged, or encrypted with another key, at one of the moments"
_HEAD = 1 << 20  # bytes that are zeros where nothing was ever made


@dataclass(frozen=True, slots=True)
class Uncompared:
    """A volume that changed, or was lost, and that nobody can read at one of the moments."""

    volume: Volume
    why: str


@dataclass(slots=True)
class Outcome:
    """What was found. ``browsers`` are the file systems that were looked into; ``size`` is how much of the disks may differ.

    ``sealed_anew`` are volumes that are not encrypted alike at both moments: all of their contents had to be compared.
    """

    differences: list[Difference] = field(default_factory=list)
    uncompared: list[Uncompared] = field(default_factory=list)
    sealed_anew: list[Volume] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    browsers: list[tuple[Browser | None, Browser | None]] = field(default_factory=list)
    size: int = 0


def between(
    old: Sequence[Frozen],
    new: Sequence[Frozen],
    *,
    paths: Sequence[bytes] = (),
    partition: str | None = None,
    keys: Sequence[Key] = (),
) -> Outcome:
    """All that differs, or what is and is below the ``paths``, which may be patterns. NotFound for one that was never there.

    What is encrypted is opened with the ``keys`` at both moments.
    """
    with contextlib.ExitStack() as stack:
        for path in dict.fromkeys(one.links[0].path for one in (*old, *new)):
            stack.enter_context(
                image_locks.held(path, writable=False)
            )  # what is said of a disk holds until it was read
        return _between(old, new, paths, partition, keys)


def _between(
    old: Sequence[Frozen], new: Sequence[Frozen], paths: Sequence[bytes], partition: str | None, keys: Sequence[Key]
) -> Outcome:
    ranges = changed_ranges(old, new)
    outcome = Outcome(size=sum(one.size for one in ranges.values() if one != Ranges.everything()))
    if not any(ranges.values()) and not paths and partition is None:
        return outcome
    with looking.opened(old, keys=keys) as before, looking.opened(new, keys=keys) as after:
        if partition is not None:
            looking.named(list({one.title: one for one in (*before.volumes, *after.volumes)}.values()), partition)
        pairs = list(_pairs(before, after, partition))
        wanted = set(paths)
        for one, other in pairs:
            touched = _touched(before, after, (one, other), ranges)
            if not touched and not paths:
                continue
            if other is not None and _is_sealed_anew(before, after, (one, other)):
                outcome.sealed_anew.append(other)
            wanted -= _compare(before, after, (one, other), touched, paths, outcome)
        for path in paths:
            if path in wanted:
                after.choose(path).expand(path)  # says what is there instead
                raise errors.NotFound(f"there is no {path.decode(errors='replace')} at either moment")
    return outcome


def changed_ranges(old: Sequence[Frozen], new: Sequence[Frozen]) -> dict[str, Ranges]:
    """Where each disk may differ, by its slot; all of it where one of them does not have it."""
    before, after = ({one.slot or "": one for one in disks} for disks in (old, new))
    found = {slot: Ranges.everything() for slot in before.keys() ^ after.keys()}
    return found | {slot: changed.between(before[slot], after[slot]) for slot in before.keys() & after.keys()}


def _pairs(before: Inside, after: Inside, partition: str | None) -> Iterator[tuple[Volume | None, Volume | None]]:
    """The same place at both moments: a partition by its number on a disk, a logical volume by its name."""
    mine, theirs = (
        {
            (one.disk.slot or "", one.number, one.logical) if not one.logical else ("", None, one.logical): one
            for one in volumes
        }
        for volumes in (before.volumes, after.volumes)
    )
    for key, one in {**mine, **theirs}.items():
        if partition is None or one.is_meant(partition):
            yield mine.get(key), theirs.get(key)


def _touched(
    before: Inside, after: Inside, pair: tuple[Volume | None, Volume | None], ranges: dict[str, Ranges]
) -> Ranges:
    """Where a volume may differ: all of it, if anything does, where nobody knows at one of the moments where it lies, or it is encrypted anew."""
    moments = list(zip((before, after), pair, strict=True))
    seals = {inside.seals(volume) for inside, volume in moments if volume is not None}
    if len(seals) == 1 and all(volume is None or inside.is_placed(volume) for inside, volume in moments):
        old, new = ([] if volume is None else inside.parts(volume) for inside, volume in moments)
        return changed.of_volume(old, new, ranges, encrypted=any(seals))
    return Ranges.everything() if any(ranges.values()) else Ranges()


def _is_sealed_anew(before: Inside, after: Inside, pair: tuple[Volume | None, Volume]) -> bool:
    """Whether it can be read at both moments, and is not encrypted alike."""
    one, other = pair
    if one is None or not (looking.is_readable(one) and looking.is_readable(other)):
        return False
    return before.seals(one) != after.seals(other)


def _compare(
    before: Inside, after: Inside, pair: tuple[Volume | None, Volume | None], touched: Ranges,
    paths: Sequence[bytes], outcome: Outcome,
) -> set[bytes]:  # fmt: skip
    """Takes one file system into the outcome; which of the paths it has, or had."""
    one, other = pair
    packed = [each for each in (other, one) if each is not None and _is_packed(each)]
    if packed and touched:
        outcome.uncompared.append(Uncompared(packed[0], looking.why_not(packed[0])))
    volume = other or one
    assert volume is not None
    try:
        old, new = _browser(before, one), _browser(after, other)
        if old is None and new is None:
            return set()
        opened = _Opened(old, new, paths)
        if (old is None and _is_lost(before, after, (one, volume))) or (
            new is None and _is_lost(after, before, (other, volume))
        ):
            if not packed and touched:
                outcome.uncompared.append(Uncompared(volume, _LOST))
            return opened.found
        work = Comparison(old, new, touched)
        differences = work.differences(_topmost(opened.tops))
    except (errors.Corrupt, errors.Unsupported) as error:  # the others may be sound
        if touched or paths:
            outcome.uncompared.append(Uncompared(volume, error.message))
        return set(paths)
    outcome.browsers.append((old, new))
    outcome.differences += differences
    for counts in (work.left_out, browsing.left_out([each for each in (old, new) if each is not None])):
        for why, count in counts.items():
            outcome.left_out[why] = outcome.left_out.get(why, 0) + count
    return opened.found


class _Opened:
    """What the paths mean in a file system at both moments: ``found`` are those that are in it, ``tops`` what they lead to."""

    def __init__(self, old: Browser | None, new: Browser | None, paths: Sequence[bytes]) -> None:
        self.found: set[bytes] = set()
        self.tops: dict[bytes, tuple[Found | None, Found | None]] = {}
        for path in paths or (b"/",):
            those, these = ({} if each is None else _expanded(each, path) for each in (old, new))
            if those or these:
                self.found.add(path)
            self.tops |= {key: (those.get(key), these.get(key)) for key in {**those, **these}}


def _is_packed(volume: Volume) -> bool:
    """Whether something lies there that nobody can read."""
    return not looking.is_readable(volume) and (bool(volume.why_not) or volume.kind not in _TOLD)


def _is_lost(inside: Inside, others: Inside, pair: tuple[Volume | None, Volume]) -> bool:
    """Whether a file system that is there at the other moment may be there at this one too, and is not seen.

    It is gone for sure where its place was given to another file system, was never written, or is not there.
    """
    volume, seen = pair
    if volume is not None:
        return not inside.is_blank(volume, _HEAD)
    if not seen.logical:
        whole = [one for one in inside.volumes if one.disk.slot == seen.disk.slot and not one.logical]
        return (
            len(whole) == 1
            and whole[0].number is None
            and whole[0].kind in _UNSEEN
            and not inside.is_blank(whole[0], _HEAD)
        )
    physical = {(one.disk.slot, one.number) for one in others.volumes if one.kind is Kind.LVM}
    here = [one for one in inside.volumes if (one.disk.slot, one.number) in physical and not one.logical]
    return any(one.why_not or (one.kind in _UNSEEN and not inside.is_blank(one, _HEAD)) for one in here)


def _browser(inside: Inside, volume: Volume | None) -> Browser | None:
    """The file system at one moment; None where there is none that can be read."""
    return None if volume is None or not looking.is_readable(volume) else inside.browser(volume)


def _expanded(browser: Browser, path: bytes) -> dict[bytes, Found]:
    try:
        return {one.path: one for one in browser.expand(path, follow=False)}
    except errors.NotFound:
        return {}


def _topmost(
    tops: dict[bytes, tuple[Found | None, Found | None]],
) -> Iterator[tuple[Found | None, Found | None]]:
    """Those that do not lie below another one, which has them in it."""
    for path, pair in tops.items():
        above = path.rstrip(b"/")
        while above:
            above = above.rpartition(b"/")[0]
            if (above or b"/") in tops and path != b"/":
                break
        else:
            yield pair
