"""The configuration file ``hvmgr.yaml``: what it may say, and on which line it says it.

It is looked at for every question and parsed once for each of its versions.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvmgr import errors, keeping, units

if TYPE_CHECKING:
    from hvmgr.yaml_text import Value

COMPRESSIONS = ("none", "zstd")

_SIZE_MAX = 1 << 20  # of the file: nobody writes more by hand


@dataclass(frozen=True, slots=True)
class Preference:
    """One value, and where it stands: ``/etc/hvmgr/hvmgr.yaml, line 3``."""

    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class HostMap:
    """Maps for imports on hosts whose names fit one of ``hosts`` (none: on all); each line is (old, new, where)."""

    hosts: tuple[str, ...]
    networks: tuple[tuple[str, str, str], ...]
    paths: tuple[tuple[str, str, str], ...]


def read(file: Path) -> Mapping[str, Preference]:
    """What the file says; UsageError names the line of what is wrong."""
    try:
        facts = file.stat()
    except OSError as error:
        raise errors.UsageError(f"{file} cannot be read: {error.strerror}", file=str(file)) from error
    if not stat.S_ISREG(facts.st_mode):
        raise errors.UsageError(f"{file} is no file", file=str(file))
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & stat.S_IWOTH:
        raise errors.UsageError(
            f"{file} could have been written by others", hint=f"chown root '{file}'; chmod o-w '{file}'", file=str(file)
        )
    if facts.st_size > _SIZE_MAX:
        raise errors.UsageError(f"{file} is larger than {units.format_size(_SIZE_MAX)}", file=str(file))
    return _parsed(file, facts.st_mtime_ns, facts.st_size, facts.st_ino)


@functools.lru_cache(maxsize=8)
def _parsed(file: Path, _time: int, _size: int, _inode: int) -> Mapping[str, Preference]:
    from hvmgr import yaml_text

    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise errors.UsageError(f"{file} cannot be read: {error.strerror}", file=str(file)) from error
    except UnicodeDecodeError as error:
        raise errors.UsageError(f"{file} is not UTF-8 text", file=str(file)) from error
    if not any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        return {}  # comments alone
    found = yaml_text.parse(text, source=str(file)).fields(optional=tuple(KEYS))
    return {name: Preference(KEYS[name](value), _place(value)) for name, value in found.items()}


def _place(value: Value) -> str:
    return f"{value.source}, line {value.line}"


# --- what may be said -----------------------------------------------------------------------------------------------


def _connection(value: Value) -> str:
    text = value.text()
    if not text.startswith("qemu:") and not text.startswith("qemu+"):
        raise value.error(f"'{text}' is no connection to QEMU", "write qemu:///system or qemu:///session")
    return text


def _folder(value: Value) -> Path:
    path = Path(os.path.expanduser(value.text()))  # noqa: PTH111 - Path's own raises for a user who is not there
    if not path.is_absolute():
        raise value.error(f"'{path}' is not an absolute path", "write it from '/' on")
    return path


def _compression(value: Value) -> str:
    text = value.text()
    if text not in COMPRESSIONS:
        raise value.error(f"'{text}' is unknown", f"known: {', '.join(COMPRESSIONS)}")
    return text


def _seconds(value: Value) -> float:
    try:
        seconds = units.parse_duration(value.text())
    except errors.UsageError as error:
        raise value.error(error.message, error.hint) from error
    if not 0 < seconds <= 86400:
        raise value.error("a time between 0 and a day is expected")
    return seconds


def _retention(value: Value) -> str:
    try:
        return str(keeping.parse(value.text()))
    except errors.UsageError as error:
        raise value.error(error.message, error.hint) from error


def _space(value: Value) -> str:
    """A size, or a part of the file system such as ``5%``."""
    text = value.text()
    if text.endswith("%"):
        number = text.removesuffix("%").strip()
        if not number.replace(".", "", 1).isdecimal() or float(number) > 100:
            raise value.error(f"'{text}' is no part of a file system", "write 5%, or a size such as 20G")
        return f"{number}%"
    return str(value.size())


def _maps(value: Value) -> tuple[HostMap, ...]:
    return tuple(map(_host_map, value.items()))


def _host_map(value: Value) -> HostMap:
    found = value.fields(optional=("hosts", "networks", "paths"))
    hosts = tuple(one.text() for one in found["hosts"].items()) if "hosts" in found else ()
    if "hosts" in found and not hosts:
        raise found["hosts"].error("no host is named", "leave the key out, so that it is for all hosts")
    return HostMap(hosts, _lines(found.get("networks")), _lines(found.get("paths"), absolute=True))


def _lines(value: Value | None, *, absolute: bool = False) -> tuple[tuple[str, str, str], ...]:
    found: dict[str, tuple[str, str, str]] = {}
    for one in [] if value is None else value.items():
        fields = one.fields(required=("old", "new"))
        old, new = fields["old"].text(), fields["new"].text()
        for name, text in (("old", old), ("new", new)):
            if not text or (absolute and not text.startswith("/")):
                raise fields[name].error(f"'{text}' is not an absolute path" if absolute else "a name is expected")
        if absolute:
            old, new = (os.path.normpath(text) for text in (old, new))
        if old in found:
            raise fields["old"].error(f"'{old}' is there twice", "leave one of them out")
        found[old] = (old, new, _place(fields["old"]))
    return tuple(found.values())


KEYS: Mapping[str, Callable[[Value], Any]] = {
    "connection": _connection,
    "root": _folder,
    "compress": _compression,
    "hook-time-limit": _seconds,
    "space-low": _space,
    "retention": _retention,
    "maps": _maps,
}
