"""The configuration that a saved VM goes on with, made true again for this host; told from files alone.

A save file holds the configuration of the moment at which it was written. Since then images may have been merged, the
home may have been moved, and it may have been another host. Whoever restores it would name what is not there any more.

Nothing is replaced that is still there: a map of the configuration file says where to look for what is missing, and a VM
that is all right is not moved to another network by it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from hvmgr import settings
from hvmgr.model import configuration, maps
from hvmgr.model.configuration import Configuration
from hvmgr.model.maps import Entry, Maps, Used
from hvmgr.storage import index

# Where libvirt's network driver keeps what it has defined, and what is up (transient networks too).
_NETWORKS = (Path("/etc/libvirt/qemu/networks"), Path("/run/libvirt/network"))
_DEVICES = Path("/sys/class/net")


def rewrite(data: bytes, *, source: str) -> str | None:
    """The XML that the VM can go on with; None when it is not hvmgr's, or all in it is right as it is."""
    saved = configuration.parse(data, source=source)
    facts = saved.metadata()
    if facts is None:
        return None
    before = saved.to_xml()
    saved.strip_backing_chains()  # the headers of the images say it, and they are true
    moved = _moved(saved.uuid, facts.home)
    if moved:
        saved.set_metadata(dataclasses.replace(facts, home=Path(moved[0].new)))
    _rewrite_disks(saved, [*moved, *_default_paths()])
    _rewrite_nvram(saved, moved)
    missing = _missing_networks(saved)
    wanted = Maps(
        paths=tuple(_for_missing([*moved, *_default_paths()], (path for _, path in maps.paths_of(saved)))),
        networks=tuple(Entry("network", *line) for line in settings.import_maps("networks") if line[0] in missing),
    )
    maps.rewrite(saved, wanted, Used())
    after = saved.to_xml()
    return None if after == before else after


def _moved(vm_id: str, home: Path) -> list[Entry]:
    """Where the home is now, when that is not where it was."""
    now = next((one.home for one in index.entries() if one.vm_id == vm_id), home)
    return [] if now == home else [Entry("path", str(home), str(now))]


def _default_paths() -> list[Entry]:
    return [Entry("path", *line) for line in settings.import_maps("paths")]


def _rewrite_disks(saved: Configuration, entries: list[Entry]) -> None:
    for disk in saved.disks():
        if disk.source is None or disk.type != "file" or disk.format is None or os.path.lexists(disk.source):
            continue
        new, entry = maps.map_path(disk.source, entries)
        if entry is not None and Path(new).exists():
            saved.set_disk_source(disk.slot, Path(new), disk.format)


def _rewrite_nvram(saved: Configuration, moved: list[Entry]) -> None:
    """NVRAM lies in the home, and goes with it."""
    if saved.nvram is None or os.path.lexists(saved.nvram):
        return
    new, entry = maps.map_path(str(saved.nvram), moved)
    if entry is not None and Path(new).exists():
        saved.set_nvram(Path(new))


def _for_missing(entries: list[Entry], paths: Iterable[str]) -> list[Entry]:
    """One line for each file that is not where it was, and is where a map says."""
    found = []
    for path in dict.fromkeys(paths):
        new, entry = maps.map_path(path, entries)
        if entry is not None and not os.path.lexists(path) and Path(new).exists():
            found.append(Entry("path", path, new))
    return found


def _missing_networks(saved: Configuration) -> set[str]:
    """What cards are plugged into and this host has not, by name and as ``kind=name``."""
    found: set[str] = set()
    for nic in saved.nics():
        if nic.source is None or nic.type not in ("network", "bridge"):
            continue
        there = (
            (_DEVICES / nic.source).exists()
            if nic.type == "bridge"
            else any((folder / f"{nic.source}.xml").exists() for folder in _NETWORKS)
        )
        if not there:
            found |= {nic.source, f"{nic.type}={nic.source}"}
    return found
