"""``hvmgr file``: files inside the disks of VMs, snapshots, exports and images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors, units
from hvmgr.faces.cli import arguments, file_render, json_out, render
from hvmgr.faces.cli.groups import READS, Group
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.inside.browsing import Browser, Found
    from hvmgr.operations.inside.looking import Inside
    from hvmgr.operations.inside.views import Frozen
    from hvmgr.storage.filesystems.reader import Type

CODES = (*READS[:4], 4, 5, *READS[4:])
GETS = (*CODES[:-2], 7, *CODES[-2:])
_FORMATS = ("vhd", "vhdx", "qcow2", "raw")
_TYPES = {
    "f": "file",
    "d": "folder",
    "l": "link",
    "b": "block-device",
    "c": "character-device",
    "p": "pipe",
    "s": "socket",
}
_STANDARD = "-"


@click.group("file", cls=Group)
def command() -> None:
    """Look at and take out files inside the disks of VMs, snapshots, exports and images."""


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
        if self.fmt is not None and self.image is None:
            raise errors.UsageError("--format says what the file of --image is", hint="leave it out")
        if self.image is None and self.home is None and not self.words:
            raise errors.UsageError("no VM is named", hint="name a VM, or give --image FILE or --home DIR")

    def disks(self, host: Host) -> list[Frozen]:
        """The disks, frozen."""
        from hvmgr.operations.inside import views

        if self.image is not None:
            return [views.of_image(self.image, self.fmt)]
        if self.home is not None:
            return views.of_folder(self.home, snapshot=self.snapshot, slot=self.slot)
        return views.of_vm(host.vm(self.words[0]), snapshot=self.snapshot, slot=self.slot)


def _where(metavar: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The arguments and options that say which disks; the command gets them as ``where``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(request: Request, **given: Any) -> Any:
            own = {name: given.pop(name) for name in ("words", "snapshot", "slot", "partition", "image", "home", "fmt")}
            where = Where(**own)
            where.check()
            return function(request, where=where, **given)

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
            "--format", "fmt", type=click.Choice(_FORMATS), help="The format of --image, if it is not to be found out."
        ),
    ]  # fmt: skip


class _VmThenPaths(arguments.VmName):
    """The first word names a VM, the others are paths."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """The names of VMs, for the first word."""
        return [] if ctx.params.get("words") else super().shell_complete(ctx, param, incomplete)


@contextlib.contextmanager
def _opened(request: Request, where: Where) -> Iterator[Inside]:
    """The disks, open; which moment they show, and what whoever reads should know, is said."""
    from hvmgr.operations.inside import looking

    with request.host() as host:
        disks = where.disks(host)
        for moment in dict.fromkeys(one.moment for one in disks if one.moment is not None):
            render.notice(moment)
        with looking.opened(disks, partition=where.partition) as inside:
            yield inside


def _found(
    request: Request, inside: Inside, paths: Sequence[bytes], *, follow: bool = True
) -> list[tuple[Browser, Found]]:
    """What the paths mean, in order; what is to be known of the file systems is told once."""
    found: list[tuple[Browser, Found]] = []
    told: list[Browser] = []
    for path in paths:
        browser = inside.choose(path)
        if browser not in told:
            told.append(browser)
            _tell(request, browser)
        found += [(browser, one) for one in browser.expand(path, follow=follow)]
    return found


def _tell(request: Request, browser: Browser) -> None:
    for note in browser.reader.notes:
        render.notice(f"{browser.volume.title}: {note}")
    if request.verbose:
        render.notice(f"{browser.volume.title}: {browser.volume.kind}, read by {browser.reader.title}")


def _require_paths(where: Where) -> None:
    if not where.paths:
        raise errors.UsageError(
            "no path is given", hint="name one, such as /; which file systems there are: hvmgr file list"
        )


def _source(browsers: Sequence[Browser]) -> list[dict[str, Any]]:
    return [file_render.source(one) for one in dict.fromkeys(browsers)]


# --- looking --------------------------------------------------------------------------------------------------------


@command.command(
    "list",
    codes=CODES,
    examples=[
        "hvmgr file list web",
        "hvmgr file list web /etc --snapshot before",
        "hvmgr file list --image disk.vhd '/Users/*/Documents' --long",
    ],
)
@_where("VM [PATH]...")
@click.option("-l", "--long", is_flag=True, help="With modes, owners, sizes and times.")
@click.option("--null", is_flag=True, help="Only the paths, as they are, each with a zero byte behind it.")
def list_(request: Request, where: Where, *, long: bool, null: bool) -> None:
    """List what is in folders; without a path the file systems that there are.

    A path may have *, ?, [...] and **, which means any number of folders. The VM may run: then its latest snapshot is shown.
    """
    with _opened(request, where) as inside:
        if not where.paths:
            _list_volumes(request, inside)
            return
        found = _found(request, inside, where.paths)
        entries = [(browser, one) for browser, top in found for one in _listed(browser, top)]
        if request.json:
            document = {"sources": _source([one for one, _ in found])}
            json_out.show({**document, "entries": [file_render.entry(*one) for one in entries]})
        else:
            file_render.show_list([one for _, one in entries], long=long, null=null, whole=len(found) > 1)


def _listed(browser: Browser, top: Found) -> Iterator[Found]:
    if top.node.is_folder:
        yield from browser.children(top)
    else:
        yield top


def _list_volumes(request: Request, inside: Inside) -> None:
    if request.json:
        json_out.show({"volumes": [file_render.volume(one) for one in inside.volumes]})
        return
    rows = [file_render.volume_row(one) for one in inside.volumes]
    render.table(("Disk", "Partition", "Holds", "Label", "Size", "Files"), rows, right=("Partition", "Size"))


@command.command("tree", codes=CODES, examples=["hvmgr file tree web /etc/ssh", "hvmgr file tree web / --depth 2"])
@_where("VM PATH...")
@click.option("--depth", metavar="N", type=click.IntRange(min=1), help="Not deeper than this.")
def tree(request: Request, where: Where, *, depth: int | None) -> None:
    """Draw folders with all that is below them."""
    _require_paths(where)
    with _opened(request, where) as inside:
        found = _found(request, inside, where.paths)
        if request.json:
            walked = [(browser, one) for browser, top in found for _, one in browser.walk(top, depth=depth)]
            document = {"sources": _source([one for one, _ in found])}
            json_out.show({**document, "entries": [file_render.entry(*one) for one in walked]})
            return
        for browser, top in found:
            file_render.draw_tree(browser.walk(top, depth=depth))


@command.command(
    "stat", codes=CODES, examples=["hvmgr file stat web /etc/shadow", "hvmgr file stat web /etc/shadow --json"]
)
@_where("VM PATH...")
def stat(request: Request, where: Where) -> None:
    """Show all that is known of files: times, modes, owners, links, streams, attributes.

    A link is shown itself, not what it leads to.
    """
    _require_paths(where)
    with _opened(request, where) as inside:
        found = _found(request, inside, where.paths, follow=False)
        if request.json:
            entries = [file_render.entry(browser, one, extras=True) for browser, one in found]
            json_out.show({"sources": _source([one for one, _ in found]), "entries": entries})
            return
        for number, (browser, one) in enumerate(found):
            if number:
                render.put("\n")
            render.facts(file_render.facts(browser, one))


@command.command(
    "find",
    codes=CODES,
    examples=[
        "hvmgr file find web / --name '*.conf'",
        "hvmgr file find web /home --type f --larger 100M --newer '2026-11-01'",
        "hvmgr file find web / --name id_rsa --null | xargs -0 -n 1",
    ],
)
@_where("VM PATH...")
@click.option("--name", "pattern", metavar="PATTERN", help="Whose name fits this pattern.")
@click.option("--ignore-case", is_flag=True, help="The name may differ in case.")
@click.option("--type", "kind", type=click.Choice(tuple(_TYPES)), help="Only files, folders (d), links, ...")
@click.option("--larger", metavar="SIZE", type=arguments.Size(), help="Larger than this.")
@click.option("--smaller", metavar="SIZE", type=arguments.Size(), help="Smaller than this.")
@click.option("--newer", metavar="TIME", help="Changed since this time.")
@click.option("--older", metavar="TIME", help="Not changed since this time.")
@click.option("--depth", metavar="N", type=click.IntRange(min=0), help="Not deeper than this.")
@click.option("-l", "--long", is_flag=True, help="With modes, owners, sizes and times.")
@click.option("--null", is_flag=True, help="Only the paths, as they are, each with a zero byte behind it.")
def find(request: Request, where: Where, *, long: bool, null: bool, depth: int | None, **wish: Any) -> None:
    """Find files below folders by name, type, size and time.

    Without a condition all are listed. Exit code 0 also when nothing fits.
    """
    _require_paths(where)
    fits = _condition(**wish)
    with _opened(request, where) as inside:
        tops = _found(request, inside, where.paths)
        found = [
            (browser, one) for browser, top in tops for _, one in browser.walk(top, depth=depth) if fits(browser, one)
        ]
        if request.json:
            document = {"sources": _source([one for one, _ in tops])}
            json_out.show({**document, "entries": [file_render.entry(*one) for one in found]})
        else:
            file_render.show_list([one for _, one in found], long=long, null=null, whole=True)


def _condition(
    *, pattern: str | None, ignore_case: bool, kind: str | None, larger: int | None, smaller: int | None,
    newer: str | None, older: str | None,
) -> Callable[[Browser, Found], bool]:  # fmt: skip
    from hvmgr.operations.inside import browsing
    from hvmgr.storage.filesystems.reader import Type

    wanted: Type | None = None if kind is None else Type(_TYPES[kind])
    name = None if pattern is None else os.fsencode(pattern)
    since = None if newer is None else _nanoseconds(newer, "--newer")
    until = None if older is None else _nanoseconds(older, "--older")

    def fits(browser: Browser, one: Found) -> bool:
        node = one.node
        folded = ignore_case or browser.reader.ignores_case
        return (
            (wanted is None or node.type is wanted)
            and (name is None or browsing.fits(one.name, name, ignoring_case=folded))
            and (larger is None or node.size > larger)
            and (smaller is None or node.size < smaller)
            and (since is None or (node.modified or 0) >= since)
            and (until is None or (node.modified or 0) < until)
        )

    return fits


def _nanoseconds(text: str, option: str) -> int:
    return int(arguments.moment(text, option).timestamp()) * 1_000_000_000


# --- taking out -----------------------------------------------------------------------------------------------------


@command.command("cat", codes=CODES, examples=["hvmgr file cat web /etc/fstab --snapshot before"])
@_where("VM PATH...")
def cat(request: Request, where: Where) -> None:
    """Write what is in files to stdout, one after the other.

    FILE:STREAM is a named stream of a file on NTFS.
    """
    _require_paths(where)
    if request.json:
        raise errors.UsageError(
            "what is in files is no JSON", hint="leave out --json, or take the file: hvmgr file get"
        )
    with _opened(request, where) as inside:
        found = _found(request, inside, where.paths)
        contents = [browser.content(one) for browser, one in found]
        for content in contents:
            _pour(content)


def _pour(content: Any) -> None:
    at = 0
    for offset, piece in content.pieces():
        _zeros(offset - at)
        _out(piece)
        at = offset + len(piece)
    _zeros(content.size - at)


def _zeros(count: int) -> None:
    empty = memoryview(bytes(min(count, 1 << 20)))
    for at in range(0, count, 1 << 20):
        _out(empty[: min(1 << 20, count - at)])


def _out(piece: bytes | memoryview) -> None:
    """Bytes to stdout; HostFailed when they cannot be written."""
    try:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.HostFailed(f"cannot write the output: {error.strerror}") from error


@command.command(
    "get",
    codes=GETS,
    examples=[
        "hvmgr file get web /etc/passwd --snapshot before --to -",
        "hvmgr file get web '/var/log/*.log' --to /tmp/logs",
        "hvmgr file get web /srv --archive --to srv.tar",
        "hvmgr file get --image disk.vhd /Users --archive --to - | zstd >users.tar.zst",
    ],
)
@_where("VM PATH...")
@click.option(
    "--to", metavar="DIR|FILE|-", default=".", help="The folder to put them in; - for stdout. Else the present one."
)
@click.option("--archive", is_flag=True, help="One tar archive: owners, ACLs, attributes and streams are kept too.")
@click.option("--streams", is_flag=True, help="Named streams become files NAME:STREAM beside theirs.")
@click.option("--overwrite", is_flag=True, help="Files that are there already are replaced.")
def get(request: Request, where: Where, *, to: str, archive: bool, streams: bool, overwrite: bool) -> None:
    """Copy files and folders out of a disk, with their times, modes, links and holes.

    As root they also keep their owners. Nothing is ever written outside the folder, whatever names and links the disk holds; device
    nodes are not made. With --to - a single file goes to stdout, or with --archive the tar archive does.
    """
    _require_paths(where)
    if to == _STANDARD and request.json:
        raise errors.UsageError("--json and the files would both go to stdout", hint="name a folder with --to")
    with _opened(request, where) as inside:
        found = _found(request, inside, where.paths, follow=False)
        if to == _STANDARD and not archive:
            _get_one(found)
            return
        from hvmgr.operations.inside import getting

        gathered = getting.gather(found)
        sources = _source([one for one, _ in found])
        if request.dry_run:
            _show_gathered(request, gathered, sources, to)
            return
        if archive:
            outcome = _get_archive(request, gathered, to, overwrite=overwrite)
        else:
            outcome = getting.into_folder(gathered, Path(to), request.report, streams=streams, overwrite=overwrite)
        for why, count in sorted(outcome.left_out.items()):
            render.notice(f"{count} left out: {why}")
        if to != _STANDARD:
            facts = {"to": to, "files": outcome.files, "size": outcome.size, "left_out": outcome.left_out}
            sentence = f"{outcome.files} files, {units.format_size(outcome.size)}, are in {to}"
            request.done(sentence, {**facts, "sources": sources})


def _show_gathered(request: Request, gathered: Any, sources: list[dict[str, Any]], to: str) -> None:
    if request.json:
        json_out.show({"plan": None, "files": gathered.files, "size": gathered.size, "to": to, "sources": sources})
    else:
        render.say(f"{gathered.files} files, {units.format_size(gathered.size)}, would be written to {to}")


def _get_one(found: list[tuple[Browser, Found]]) -> None:
    if len(found) != 1:
        raise errors.UsageError(
            f"{len(found)} files cannot go to stdout one by one", hint="as a tar archive: --archive"
        )
    browser, one = found[0]
    if one.node.is_folder:
        raise errors.UsageError("a folder cannot go to stdout as it is", hint="as a tar archive: --archive")
    _pour(browser.content(browser.find(one.path) if not one.stream else one))


def _get_archive(request: Request, gathered: Any, to: str, *, overwrite: bool) -> Any:
    from hvmgr.operations.inside import getting
    from hvmgr.os_errors import explained
    from hvmgr.storage import durable

    if to == _STANDARD:
        if sys.stdout.isatty():
            raise errors.UsageError("an archive is nothing for a terminal", hint="pipe it on, or name a file with --to")
        return getting.into_archive(gathered, _out, request.report)
    path = Path(to)
    if path.is_dir():
        raise errors.UsageError(f"{to} is a folder", hint=f"name the archive: --to {path / 'files.tar'}")
    if path.exists() and not overwrite:
        raise errors.Conflict(f"{to} exists already", hint="give it another name, or --overwrite")
    with (
        explained(path),
        durable.replacing(path, 0o600, None) as descriptor,
        open(descriptor, "wb", closefd=False) as file,
    ):
        return getting.into_archive(gathered, lambda piece: _write(file, piece), request.report)


def _write(file: Any, piece: memoryview) -> None:
    file.write(piece)


@command.command("hash", codes=CODES, examples=["hvmgr file hash web /etc", "hvmgr file hash web /srv --algorithm md5"])
@_where("VM PATH...")
@click.option("--algorithm", type=click.Choice(("sha256", "sha512", "sha1", "md5", "blake2b")), default="sha256",
              help="The kind of hash (sha256).")  # fmt: skip
def hash_(request: Request, where: Where, *, algorithm: str) -> None:
    """Print the hashes of files, and of all files in folders, as sha256sum does."""
    _require_paths(where)
    with _opened(request, where) as inside:
        tops = _found(request, inside, where.paths)
        hashes = []
        for browser, top in tops:
            for _, one in [(0, top)] if top.stream else browser.walk(top):
                if _is_file(one):
                    hashes.append((browser, one, _hash_of(browser.content(one), algorithm)))
                    if not request.json:
                        file_render.show_hash(hashes[-1][2], one)
        if request.json:
            files = [{**file_render.name_of(one.path), "size": one.size, "hash": value} for _, one, value in hashes]
            json_out.show({"sources": _source([one for one, _ in tops]), "algorithm": algorithm, "files": files})


def _is_file(one: Found) -> bool:
    from hvmgr.storage.filesystems.reader import Type

    return one.node.type is Type.FILE or bool(one.stream)


def _hash_of(content: Any, algorithm: str) -> str:
    digest, at = hashlib.new(algorithm, usedforsecurity=False), 0
    empty = bytes(1 << 20)
    for offset, piece in _with_end(content):
        for start in range(at, offset, len(empty)):
            digest.update(empty[: min(len(empty), offset - start)])
        digest.update(piece)
        at = offset + len(piece)
    return digest.hexdigest()


def _with_end(content: Any) -> Iterator[tuple[int, bytes | memoryview]]:
    yield from content.pieces()
    yield content.size, b""
