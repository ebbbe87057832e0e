"""Configurations of VMs as files of foreign origin: which one a folder means, and what is in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hvmgr import errors
from hvmgr.model import configuration
from hvmgr.model.configuration import Configuration
from hvmgr.model.layout import CONFIGURATIONS
from hvmgr.storage import archives, durable, vm_home

LARGEST = 8 << 20  # no domain XML comes near; a bomb does
_SOURCES = "name an export's folder, a VM home, or a domain's XML"


def find(source: Path, vm: str | None) -> tuple[Path, Path]:
    """The folder of the one VM that ``source`` means, and the file of its configuration.

    ``source`` is the folder, its parent, or the file itself. NotFound, or UsageError with the names when there are
    several to choose from.
    """
    with durable.explained(source):
        return _find(Path(os.path.realpath(source)), vm)


def _find(source: Path, vm: str | None) -> tuple[Path, Path]:
    if (archive := archives.find(source)) is not None:
        with archive.naming():
            return _find(archive.folder, vm)
    if source.is_file():
        folder = source.parent.parent if source.parent.name == CONFIGURATIONS else source.parent
        return folder, source
    if not source.is_dir():
        raise errors.NotFound(f"there is no {source}", hint=_SOURCES)
    own = in_folder(source / CONFIGURATIONS)
    if own:
        return source, _only(own, source, vm)
    below = {folder: files for folder in _folders(source) if (files := in_folder(folder / CONFIGURATIONS))}
    if not below:
        raise errors.NotFound(
            f"{source} is neither an export nor a VM home: there is no '{CONFIGURATIONS}' in it or one folder below",
            hint="name the folder that holds 'Virtual Machines'",
        )
    if vm is not None:
        below = {folder: files for folder, files in below.items() if vm in (folder.name, *map(_name_in, files))}
        if not below:
            raise errors.NotFound(f"there is no VM '{vm}' in {source}")
    if len(below) > 1:
        names = ", ".join(sorted(folder.name for folder in below))
        raise errors.UsageError(
            f"{source} holds {len(below)} VMs: {names}",
            hint="name the folder of one of them; import and compare: or --vm NAME",
        )
    folder, files = next(iter(below.items()))
    return folder, _only(files, folder, None)


def in_folder(folder: Path) -> list[Path]:
    """Those in a folder, by their names; unlike a glob, this does not take one that cannot be read for an empty one."""
    if not folder.is_dir():
        return []
    return sorted(one for one in folder.iterdir() if one.suffix == ".xml" and vm_home.is_id(one.stem))


def read(file: Path) -> Configuration:
    """A domain XML of foreign origin: a plain file of a sensible size."""
    try:
        return _parsed(file)
    except errors.Corrupt as error:
        error.hint = error.hint or _SOURCES  # perhaps it was never meant to be one
        raise


def _parsed(file: Path) -> Configuration:
    facts = file.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise errors.Corrupt(f"{file} is no plain file", path=str(file))
    if facts.st_size > LARGEST:
        raise errors.Corrupt(f"{file} has {facts.st_size} bytes; no configuration is that long", path=str(file))
    try:
        data = file.read_bytes()
    except OSError as error:
        raise errors.HostFailed(f"{file} cannot be read: {error.strerror}", path=str(file)) from error
    return configuration.parse(data, source=str(file))


def _folders(source: Path) -> list[Path]:
    return sorted(one for one in source.iterdir() if one.is_dir() and not one.name.startswith("."))


def _only(files: list[Path], folder: Path, vm: str | None) -> Path:
    if len(files) > 1:
        raise errors.Corrupt(f"{folder} holds {len(files)} configurations; a home has one", path=str(folder))
    if vm is not None and vm not in (folder.name, _name_in(files[0]), files[0].stem):
        raise errors.NotFound(f"there is no VM '{vm}' in {folder}")
    return files[0]


def _name_in(file: Path) -> str:
    try:
        return read(file).name
    except errors.HvmgrError:
        return file.stem
