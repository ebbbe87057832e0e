"""Looks at everything that hvmgr depends on, and says what is wrong with it. Changes nothing, decides nothing.

It works where much is broken: a home that cannot be opened is a finding, libvirt out of reach is a finding, and the
rest is examined all the same. ``repair`` puts right what can be put right safely.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import hypervisor
from hvmgr.model import diagnosis
from hvmgr.model.diagnosis import Code, finding
from hvmgr.model.finding import Finding
from hvmgr.model.layout import Layout
from hvmgr.operations.doctor import domain_checks, home_checks, host_checks, image_checks, surroundings
from hvmgr.operations.doctor.surroundings import Surroundings
from hvmgr.storage import vm_home
from hvmgr.storage.survey import Survey

if TYPE_CHECKING:
    from hvmgr.operations.host import Host


def examine(host: Host, vm: str | None = None, *, thorough: bool = False) -> list[Finding]:
    """Everything that is found, the worst first; of one VM only what concerns it, and of the host only its failure.

    ``vm`` is a name, an id, or the path of a home. ``thorough`` reads all tables of all images, which takes time.
    """
    around = surroundings.look(host)
    if vm is not None:
        folder = surroundings.find_folder(around, vm)
        failed = [one for one in host_checks.examine(around) if one.code == Code.LIBVIRT_UNREACHABLE]
        return diagnosis.ordered([*failed, *home(folder, around, thorough=thorough)])
    found = [*host_checks.examine(around), *domain_checks.homeless(around)]
    for folder in around.folders:
        found += home(folder, around, thorough=thorough)
    return diagnosis.ordered(found)


def home(folder: Path, around: Surroundings, *, thorough: bool = False) -> list[Finding]:
    """Everything that is found in, and about, one home."""
    found = list(home_checks.whole(folder))
    try:
        seen = surroundings.take(folder)
    except errors.NotFound:
        found += home_checks.operation(Layout(folder, ""))
        return diagnosis.about(folder.name, found)
    except errors.HvmgrError as error:
        if not found:
            found.append(finding(Code.HOME_UNREADABLE, str(error), folder, repair=error.hint))
        return diagnosis.about(folder.name, found)
    found += _inside(seen, around, thorough=thorough)
    return diagnosis.about(seen.name, diagnosis.ordered(found))


def _inside(seen: Survey, around: Surroundings, *, thorough: bool) -> Iterator[Finding]:
    state = list(home_checks.operation(seen.home.layout))
    yield from state
    codes = {one.code for one in state}
    if Code.OPERATION_RUNNING in codes:
        return
    place = list(domain_checks.place(seen, around))
    yield from place
    if Code.HOME_MOVED in {one.code for one in place} or _is_copy(seen, place):
        yield from home_checks.damaged(seen)
        return  # all its paths lead elsewhere, so that nothing else means anything
    half_way = home_checks.named_by(seen.home.layout)
    for one in _parts(seen, around):
        if one.where not in half_way:
            yield one
    if Code.OPERATION_OPEN in codes:
        return  # libvirt and the home may differ until it is completed
    yield from _with_libvirt(seen, around)
    if thorough:
        yield from image_checks.thorough(seen, busy=domain_checks.busy_images(seen, around.domain(seen.home)))


def _is_copy(seen: Survey, place: list[Finding]) -> bool:
    """Whether a home lies elsewhere than it says, and another one lies there."""
    home = None if seen.present is None else vm_home.canonical(str(seen.present.facts.home))
    return Code.ID_TWICE in {one.code for one in place} and home != str(seen.home.path)


def _parts(seen: Survey, around: Surroundings) -> Iterator[Finding]:
    yield from home_checks.files(seen)
    yield from image_checks.examine(seen, owner=around.owner, dynamic=_gives_away(around))
    yield from home_checks.modes(seen, around.owner)
    if around.connection is None or around.connection.driver is hypervisor.Driver.SYSTEM:
        models = None if around.capabilities is None else around.capabilities.security_models
        yield from image_checks.confined(seen, models)


def _with_libvirt(seen: Survey, around: Surroundings) -> Iterator[Finding]:
    yield from domain_checks.guard(seen, around.domain(seen.home))
    yield from domain_checks.memory(seen)
    if seen.present is None:
        return
    yield from domain_checks.index(seen, seen.present, around)
    if around.connection is not None:
        yield from domain_checks.domain(seen, seen.present, around)
        yield from domain_checks.others(seen, around)


def _gives_away(around: Surroundings) -> bool:
    """Whether libvirt gives images to QEMU's user at a start (its default)."""
    return around.connection is None or around.connection.has_dynamic_ownership()
