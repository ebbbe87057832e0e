"""``hvmgr file cat``, ``get`` and ``hash``: what is in files inside disks, taken out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvmgr import errors
from hvmgr.faces.cli import CUT_OFF, file_render, forget_stdout, json_out, render
from hvmgr.faces.cli import file_options as options
from hvmgr.faces.cli.groups import READS, Command
from hvmgr.faces.cli.request import Request

if TYPE_CHECKING:
    from hvmgr.operations.inside.browsing import Browser, Found

_CATS = (*READS, CUT_OFF)
_GETS = (*READS[:-2], 7, *READS[-2:], CUT_OFF)
_STANDARD = "-"
_STDOUT = {_STANDARD, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"}
_NO_TERMINAL = "an archive is nothing for a terminal"


@click.command("cat", cls=Command, codes=_CATS, examples=["hvmgr file cat web /etc/fstab --snapshot before"])
@options.where("VM PATH...")
def cat(request: Request, where: options.Where) -> None:
    """Write what is in files to stdout, one after the other.

    FILE:STREAM is a named stream of a file on NTFS.
    """
    options.require_paths(where)
    if request.json:
        raise errors.UsageError(
            "what is in files is no JSON", hint="leave out --json, or take the file: hvmgr file get"
        )
    with options.opened(request, where) as inside:
        found = options.found(request, inside, where.paths)
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
    """Bytes to stdout; HostFailed when they cannot be written. The command ends when nobody reads them any more."""
    try:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        forget_stdout()
        raise click.exceptions.Exit(CUT_OFF) from error
    except OSError as error:
        raise errors.HostFailed(f"cannot write the output: {error.strerror}") from error


@click.command(
    "get",
    cls=Command,
    codes=_GETS,
    examples=[
        "hvmgr file get web /etc/passwd --snapshot before --to -",
        "hvmgr file get web '/var/log/*.log' --to /tmp/logs",
        "hvmgr file get web /srv --archive --to srv.tar",
        "hvmgr file get --image disk.vhd /Users --archive --to - | zstd >users.tar.zst",
    ],
)
@options.where("VM PATH...")
@click.option(
    "--to", metavar="DIR|FILE|-", default=".", help="The folder to put them in; - for stdout. Else the present one."
)
@click.option("--archive", is_flag=True, help="One tar archive: owners, ACLs, attributes and streams are kept too.")
@click.option("--streams", is_flag=True, help="Named streams become files NAME:STREAM beside theirs.")
@click.option("--overwrite", is_flag=True, help="Files that are there already are replaced.")
def get(request: Request, where: options.Where, *, to: str, archive: bool, streams: bool, overwrite: bool) -> None:
    """Copy files and folders out of a disk, with their times, modes, links and holes.

    As root they also keep their owners. Nothing is ever written outside the folder, whatever names and links the disk holds; device
    nodes are not made. With --to - a single file goes to stdout, or with --archive the tar archive does. What is damaged in a folder is
    named and left out, and the exit code is 6 at the end.
    """
    options.require_paths(where)
    to = _STANDARD if to in _STDOUT else to
    if to == _STANDARD and request.json:
        raise errors.UsageError("--json and the files would both go to stdout", hint="name a folder with --to")
    with options.opened(request, where) as inside:
        found = options.found(request, inside, where.paths, follow=False)
        if to == _STANDARD and not archive:
            _get_one(found)
            return
        from hvmgr.operations.inside import getting

        gathered = getting.gather(found)
        sources = options.sources([one for one, _ in found])
        if request.dry_run:
            _show_gathered(request, gathered, sources, to)
            return
        if archive:
            outcome = _get_archive(request, gathered, to, overwrite=overwrite)
        else:
            outcome = getting.into_folder(gathered, Path(to), request.report, streams=streams, overwrite=overwrite)
        options.tell_left_out(outcome.left_out)
        options.tell_damaged(outcome.damaged)
        if to != _STANDARD:
            facts = {"to": to, "files": outcome.files, "size": outcome.size, "left_out": outcome.left_out}
            facts["damaged"] = [file_render.name_of(one) for one in outcome.damaged]
            sentence = f"{file_render.counted(outcome.files, outcome.size)} written to {to}"
            request.done(sentence, {**facts, "sources": sources})
        if outcome.damaged:
            raise click.exceptions.Exit(errors.Corrupt.exit_code)


def _show_gathered(request: Request, gathered: Any, sources: list[dict[str, Any]], to: str) -> None:
    options.tell_left_out(gathered.left_out)
    if request.json:
        document = {"plan": None, "files": gathered.files, "size": gathered.size, "left_out": gathered.left_out}
        json_out.show({**document, "to": to, "sources": sources})
    else:
        render.say(f"{file_render.counted(gathered.files, gathered.size)} would be written to {to}")


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
            raise errors.UsageError(_NO_TERMINAL, hint="pipe it on, or name a file with --to")
        return getting.into_archive(gathered, _out, request.report)
    path = Path(to)
    if path.is_dir():
        raise errors.UsageError(f"{to} is a folder", hint=f"name the archive: --to {path / 'files.tar'}")
    if _is_stream(path):
        with (
            _cut_off(),
            explained(path),
            os.fdopen(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY), "wb") as stream,
        ):
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise errors.Conflict(f"{to} was replaced meanwhile", hint="run the command again")
            if stream.isatty():
                raise errors.UsageError(_NO_TERMINAL, hint="name a file with --to")
            return getting.into_archive(gathered, lambda piece: _write(stream, piece), request.report)
    if os.path.lexists(path) and not overwrite:
        raise errors.Conflict(f"{to} exists already", hint="give it another name, or --overwrite")
    with (
        explained(path),
        durable.replacing(path, 0o600, None) as descriptor,
        open(descriptor, "wb", closefd=False) as file,
    ):
        return getting.into_archive(gathered, lambda piece: _write(file, piece), request.report)


@contextlib.contextmanager
def _cut_off() -> Iterator[None]:
    """The command ends when nobody reads the named pipe any more."""
    try:
        yield
    except errors.HostFailed as error:
        if isinstance(error.__cause__, BrokenPipeError):
            raise click.exceptions.Exit(CUT_OFF) from error
        raise


def _is_stream(path: Path) -> bool:
    """Whether it is a character device or a named pipe, which is written into as it is.

    Conflict for what is there and is no file either: nothing replaces it.
    """
    from hvmgr.os_errors import explained
    from hvmgr.storage import extraction

    with explained(path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            return False
        if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
            return True
        extraction.require_replaceable(path, mode)
        if path.is_symlink() and str(path.readlink()).startswith("/proc/"):
            what = f"{path} is a link to an open file, which nothing replaces"
            raise errors.Conflict(what, hint="name the file itself")
    return False


def _write(file: Any, piece: memoryview) -> None:
    file.write(piece)


@click.command(
    "hash", cls=Command, codes=READS, examples=["hvmgr file hash web /etc", "hvmgr file hash web /srv --algorithm md5"]
)
@options.where("VM PATH...")
@click.option("--algorithm", type=click.Choice(("sha256", "sha512", "sha1", "md5", "blake2b")), default="sha256",
              help="The kind of hash (sha256).")  # fmt: skip
def hash_(request: Request, where: options.Where, *, algorithm: str) -> None:
    """Print the hashes of files, and of all files in folders, as sha256sum does.

    A file that cannot be read is named, the others are hashed all the same, and the exit code is 6 at the end; 5 where none is damaged,
    and some are only of a kind that nothing here reads.
    """
    options.require_paths(where)
    with options.opened(request, where) as inside:
        tops = options.found(request, inside, where.paths, special=False)
        hashes: list[tuple[Found, str]] = []
        failed: list[tuple[Found, errors.HvmgrError]] = []
        for browser, one in _files(tops):
            try:
                hashes.append((one, _hash_of(browser.content(one), algorithm)))
            except (errors.Corrupt, errors.Unsupported) as error:
                if len(tops) == 1 and tops[0][1] is one:
                    raise  # it is all that was asked for
                failed.append((one, error))
                _name(one, error)
                continue
            if not request.json:
                file_render.show_hash(hashes[-1][1], one)
        about = options.about([one for one, _ in tops])
        unread = list(dict.fromkeys(path for browser, _ in tops for path in browser.damaged))
        if request.json:
            files = [{**file_render.name_of(one.path), "size": one.size, "hash": value} for one, value in hashes]
            bad = [*(one.path for one, _ in failed), *unread]
            unhashed = [file_render.name_of(path) for path in bad]
            json_out.show({**about, "algorithm": algorithm, "files": files, "failed": unhashed})
        if failed or unread:
            is_damaged = bool(unread) or any(isinstance(error, errors.Corrupt) for _, error in failed)
            raise click.exceptions.Exit((errors.Corrupt if is_damaged else errors.Unsupported).exit_code)


def _files(tops: list[tuple[Browser, Found]]) -> Iterator[tuple[Browser, Found]]:
    for browser, top in tops:
        walked = [(0, top)] if top.stream else browser.walk(top)
        yield from ((browser, one) for _, one in walked if _is_file(one))


def _name(one: Found, error: errors.HvmgrError) -> None:
    path = os.fsdecode(one.path)
    words = error.message
    render.notice(words if words.startswith(path) else f"{path}: {words}")


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
