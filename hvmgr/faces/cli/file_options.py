"""Which files inside which disks a command of ``hvmgr file`` means: arguments and options that all of them share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import arguments, file_render, key_files, render
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.inside.browsing import Browser, Found
    from hvmgr.operations.inside.looking import Inside
    from hvmgr.operations.inside.views import Frozen

_NAMED_MAX = 100  # of what is damaged
READERS = ("hvmgr", "libguestfs")
FORMATS = ("vhd", "vhdx", "qcow2", "raw")


@dataclasses.dataclass(frozen=True, slots=True)
class Where:
    """Which disks, at which moment; ``words`` are the arguments, of which the first may name the VM."""

    words: tuple[str, ...]
    snapshot: str | None
    slot: str | None
    partition: str | None
    image: Path | None
    home: Path | None
    fmt: str | None
    key_files: tuple[str, ...]
    present: bool
    reader: str

    @property
    def paths(self) -> tuple[bytes, ...]:
        """The paths inside."""
        words = self.words if self.image is not None or self.home is not None else self.words[1:]
        return tuple(os.fsencode(one) for one in words)

    def check(self) -> None:
        """UsageError for what does not fit together."""
        if self.image is not None and self.home is not None:
            raise errors.UsageError("--image and --home name two different things", hint="give one of them")
        if self.image is not None and (self.snapshot is not None or self.slot is not None):
            raise errors.UsageError(
                "an image file has neither snapshots nor slots", hint="leave out --snapshot and --disk"
            )
        if self.present and (self.image is not None or self.home is not None or self.snapshot is not None):
            raise errors.UsageError("--present is of a VM, and of no snapshot of it", hint="leave one of them out")
        if self.fmt is not None and self.image is None:
            raise errors.UsageError("--format says what the file of --image is", hint="leave it out")
        if self.image is None and self.home is None and not self.words:
            raise errors.UsageError("no VM is named", hint="name a VM, or give --image FILE or --home DIR")

    @contextlib.contextmanager
    def still(self, host: Host) -> Iterator[list[Frozen]]:
        """The disks, frozen as long as the block lasts."""
        if self.present:
            from hvmgr.operations.inside import standing

            with standing.still(host.vm(self.words[0]), slot=self.slot) as disks:
                yield disks
        else:
            yield self._disks(host)

    def _disks(self, host: Host) -> list[Frozen]:
        from hvmgr.operations.inside import views

        if self.image is not None:
            return [views.of_image(self.image, self.fmt)]
        if self.home is not None:
            return views.of_folder(self.home, snapshot=self.snapshot, slot=self.slot)
        return views.of_vm(host.vm(self.words[0]), snapshot=self.snapshot, slot=self.slot)


def where(metavar: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The arguments and options that say which disks; the command gets them as ``where``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(request: Request, **given: Any) -> Any:
            own = {field.name: given.pop(field.name) for field in dataclasses.fields(Where)}
            which = Where(**own)
            which.check()
            return function(request, where=which, **given)

        called.__doc__, called.__name__ = function.__doc__, function.__name__
        called.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
        for option in reversed(_options(metavar)):
            called = option(called)
        return click.pass_obj(called)

    return decorate


def _options(metavar: str) -> list[Callable[[Any], Any]]:
    return [
        click.argument("words", metavar=metavar, nargs=-1, type=_VmThenPaths()),
        click.option("--snapshot", metavar="SNAP", type=arguments.SnapshotName(), help="As the disks were at this snapshot."),
        click.option(
            "--present", is_flag=True,
            help="As the disks of a running VM are now: it goes on in new images, which are merged afterwards.",
        ),
        click.option("--disk", "slot", metavar="SLOT", help="On this disk only."),
        click.option(
            "--partition", metavar="N|GROUP/VOLUME",
            help="On the partition with this number, or the logical volume of this name, only.",
        ),
        click.option(
            "--image", metavar="FILE", type=click.Path(path_type=Path), help="The disk in an image file; no VM is named."
        ),
        click.option(
            "--home", metavar="DIR", type=click.Path(path_type=Path),
            help="The disks of an export, or of a VM home wherever it lies now; no VM is named.",
        ),
        click.option(
            "--format", "fmt", type=click.Choice(FORMATS), help="The format of --image, if it is not to be found out."
        ),
        key_files.option,
        click.option(
            "--reader", type=click.Choice(READERS), default=READERS[0],
            help="libguestfs, where it is installed, knows more file systems, and arrays; it takes seconds to start.",
        ),
    ]  # fmt: skip


class _VmThenPaths(arguments.VmName):
    """The first word names a VM, the others are paths."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """The names of VMs, for the first word."""
        return [] if ctx.params.get("words") else super().shell_complete(ctx, param, incomplete)


@contextlib.contextmanager
def opened(request: Request, where: Where) -> Iterator[Inside]:
    """The disks, open; which moment they show, and what whoever reads should know, is said."""
    from hvmgr.operations.inside import looking

    keys = key_files.read(where.key_files)
    with request.host() as host, where.still(host) as disks:
        for moment in dict.fromkeys(one.moment for one in disks if one.moment is not None):
            render.notice(moment)
        libguestfs = where.reader == READERS[1]
        with looking.opened(disks, partition=where.partition, keys=keys, libguestfs=libguestfs) as inside:
            yield inside


def found(
    request: Request, inside: Inside, paths: Sequence[bytes], *, follow: bool = True, special: bool = True
) -> list[tuple[Browser, Found]]:
    """What the paths mean, in order; what is to be known of the file systems is told once.

    Unless ``special`` it is a UsageError that one without ``*`` and its like names neither a folder nor what has bytes.
    """
    from hvmgr.model import patterns

    those: list[tuple[Browser, Found]] = []
    told: list[Browser] = []
    for path in paths:
        browser = inside.choose(path)
        if browser not in told:
            told.append(browser)
            _tell(request, browser)
        ones = browser.expand(path, follow=follow)
        if not special and not patterns.is_pattern(path):
            for one in ones:
                if not one.node.is_folder:
                    browser.require_plain(one)
        those += [(browser, one) for one in ones]
    return those


def _tell(request: Request, browser: Browser) -> None:
    for note in browser.reader.notes:
        render.notice(f"{browser.volume.title}: {note}")
    if request.verbose:
        render.notice(f"{browser.volume.title}: {browser.volume.kind}, read by {browser.reader.title}")


def require_paths(where: Where) -> None:
    """UsageError where nothing inside is named."""
    if not where.paths:
        raise errors.UsageError(
            "no path is given", hint="name one, such as /; which file systems there are: hvmgr file list"
        )


def sources(browsers: Sequence[Browser]) -> list[dict[str, Any]]:
    """The file systems that something was found in, each once, for JSON."""
    return [file_render.source(one) for one in dict.fromkeys(browsers)]


def tell_left_out(left_out: Mapping[str, int]) -> None:
    """What a command came by and could not show or take along."""
    for why, count in sorted(left_out.items()):
        render.notice(f"{count} left out: {why}")


def tell_damaged(paths: Sequence[bytes]) -> None:
    """What is damaged, by its name."""
    for path in paths[:_NAMED_MAX]:
        render.notice(f"{os.fsdecode(path)} is damaged and left out")
    if len(paths) > _NAMED_MAX:
        render.notice(f"{len(paths) - _NAMED_MAX} more are damaged and left out")


def about(browsers: Sequence[Browser]) -> dict[str, Any]:
    """Where a list comes from, and what is not in it, for JSON; the latter is told besides, what is damaged by its name."""
    from hvmgr.operations.inside import browsing

    left_out = browsing.left_out(browsers)
    tell_left_out(left_out)
    tell_damaged([path for one in dict.fromkeys(browsers) for path in one.damaged])
    return {"sources": sources(browsers), "left_out": left_out}
