"""``image merge``: as Hyper-V merges. The child's data goes into an ancestor, which keeps its name and its id.

What stood on the child stands on the ancestor afterwards, and shows what it did; images in between and the child itself
are superseded and go, unless they are to be kept. Nobody else may need any of the images: a VM or a domain that names
one of them, or another differencing image on the ancestor or between, is a Conflict that names it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import Use
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import image_users
from hvmgr.operations.images import changes, recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import images, index

if TYPE_CHECKING:
    from hvmgr.operations.host import Host


def merge(
    host: Host, child: Path, into: Path | None, folders: Sequence[Path] = (), *, keep: bool, but: Collection[Use] = ()
) -> Path:
    """The ancestor shows what the child did; it is returned. Users of the kinds ``but`` are no obstacle."""
    completed = changes.complete(host, recognition.known_chain(child, folders))
    if not child.exists():
        return _merged_by(completed, child, into)
    whole = recognition.chain_of(child, folders)
    chain = _part(whole, into)
    looked = [recognition.look(path) for path in chain]
    steps = _steps(looked, whole, keep=keep)
    with changes.locked(host, [*chain, *_pointed(steps)], seen=looked):
        if recognition.chain_of(child, folders) != whole or _steps(looked, whole, keep=keep) != steps:
            raise changes.changed_meanwhile(child)
        _require_unused(host, chain, but)
        plan = changes.plan_of("image merge", f"merge of {chain[0]} into {chain[-1]}", steps)
        changes.require_approval(host, plan)
        changes.run(host, plan, chain[-1])
    return chain[-1]


def _merged_by(completed: Sequence[Plan], child: Path, into: Path | None) -> Path:
    """The image that the child was merged into by a command that had been cut off: what is asked for is done then."""
    for step in (step for plan in completed for step in plan.steps()):
        if (
            isinstance(step, image_plan.MergeChain)
            and step.merged[0] == str(child)
            and str(into or step.into) == step.into
        ):
            return Path(step.into)
    raise errors.NotFound(f"{child} is gone: a command that had been cut off has merged it")


def _part(whole: Sequence[Path], into: Path | None) -> list[Path]:
    """The chain from the child down to the ancestor."""
    if len(whole) == 1:
        raise errors.UsageError(f"{whole[0]} is no differencing image: there is nothing to merge it into")
    if into is None:
        return list(whole[:2])
    wanted = Path(os.path.realpath(into))
    if wanted not in whole[1:]:
        raise errors.UsageError(
            f"{into} is no ancestor of {whole[0]}", hint="its ancestors are: " + ", ".join(map(str, whole[1:]))
        )
    return list(whole[: whole.index(wanted) + 1])


def _steps(looked: Sequence[Recognised], whole: Sequence[Path], *, keep: bool) -> list[Step]:
    child, ancestor = looked[0], looked[-1]
    below = whole[len(looked) :]
    _require_mergeable(looked, keep=keep)
    steps: list[Step] = []
    if child.size != ancestor.size and child.format is not ImageFormat.VHD:
        if child.size < ancestor.size or below:
            raise errors.Unsupported(
                f"{child.path} and {ancestor.path} have different sizes: {child.size} and {ancestor.size} bytes",
                hint=f"convert it instead: hvmgr image convert {shlex.quote(str(child.path))} NEW",
            )
        steps.append(image_plan.GrowImage(str(ancestor.path), _word(ancestor), child.size))
    paths, formats = tuple(str(one.path) for one in looked), tuple(_word(one) for one in looked)
    steps.append(image_plan.MergeChain(paths[:-1], paths[-1], formats))
    for upper in sorted(Path(one.name) for one in image_users.beside(child.path)):
        fmt = _word(recognition.look(upper))
        steps.append(image_plan.PointChild(str(upper), fmt, str(ancestor.path), ancestor.driver))
    if not keep:
        steps += [image_plan.RemoveMerged(str(one.path)) for one in looked[:-1]]
    return steps


def _require_mergeable(looked: Sequence[Recognised], *, keep: bool) -> None:
    child, *below = looked
    for one in () if keep else looked[:-1]:
        if one.format is ImageFormat.QCOW2 and images.read(one.path, images.QCOW2).has_internal_snapshots:
            raise errors.Unsupported(
                f"{one.path} holds internal snapshots, which would go with it",
                hint="leave it where it is with --keep, or remove them first: qemu-img snapshot -d",
            )
    for one in below:
        is_fit = one.format is child.format or (child.format is ImageFormat.QCOW2 and one.format is ImageFormat.RAW)
        if not is_fit:
            raise errors.Unsupported(
                f"{child.path} ({child.format.value}) cannot be merged into {one.path} ({one.format.value})",
                hint=f"convert it instead: hvmgr image convert {shlex.quote(str(child.path))} NEW",
            )
    if child.format is ImageFormat.QCOW2:
        recognition.require_no_differencing_below(child.path)


def _word(found: Recognised) -> str:
    return found.format.value


def _pointed(steps: Sequence[Step]) -> list[Path]:
    return [Path(one.child) for one in steps if isinstance(one, image_plan.PointChild)]


def _require_unused(host: Host, chain: Sequence[Path], but: Collection[Use]) -> None:
    """Nobody but the chain itself needs its images; what stands on the child is pointed to the ancestor."""
    managed = {entry.name for entry in index.entries()}
    for number, path in enumerate(chain):
        for user in image_users.of(host, path):
            is_child = user.use is Use.PARENT and user.vm is None
            if user.use in but:
                continue
            if is_child and (number == 0 or chain[number - 1].samefile(user.name)):
                continue
            raise changes.needed(path, user, managed)
    changes.say_if_libvirt_is_silent(host)
