"""What an import changes about a VM: paths, disks by slot, networks, cards, and the three roots.

Pure. ``parse`` makes the maps out of the texts that people write (``OLD=NEW``); ``rewrite`` follows them in one
configuration, be it the present's, a snapshot's or the one inside a saved state. Each tells which entries it used, so
that an entry that matched nothing can be refused by name: a value that would be ignored is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lxml import etree

from hvmgr import errors
from hvmgr.model import xml_tree
from hvmgr.model.configuration import Configuration

DISCONNECTED = "disconnected"

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_KINDS = ("network", "bridge")

# Where libvirt puts the sockets of a running domain: they carry its name, and the next start makes new ones.
OWN_SOCKET = re.compile(r"/domain-\d+-[^/]*/|/channel/target/")

# Where a domain XML names files and folders of the host, besides the disks that snapshots freeze: (element, attribute
# or None for the text). https://libvirt.org/formatdomain.html
_PLACES = (
    ("os/kernel", None),
    ("os/initrd", None),
    ("os/dtb", None),
    ("os/loader", None),
    ("os/nvram", "template"),
    ("os/acpi/table", None),
    ("devices/disk/source", "file"),
    ("devices/disk/source", "dev"),
    ("devices/disk/source", "dir"),
    ("devices/filesystem/source", "dir"),
    ("devices/filesystem/source", "file"),
    ("devices/*[@type='file']/source", "path"),
    ("devices/*/log", "file"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a map as it was asked for: ``option`` names the map, for messages.

    ``default`` is where a line of the configuration file stands: it counts after all that was asked for, and need not
    match anything.
    """

    option: str
    old: str
    new: str
    default: str | None = None

    def __str__(self) -> str:
        return f"--{self.option} {self.old}={self.new}"


@dataclass(frozen=True, slots=True)
class Maps:
    """All that an import is asked to change besides identity; paths are absolute, addresses in lower case."""

    paths: tuple[Entry, ...] = ()
    disks: tuple[Entry, ...] = ()  # slot -> the image that it is read from
    disk_targets: tuple[Entry, ...] = ()  # slot -> where its base is copied to
    networks: tuple[Entry, ...] = ()
    nics: tuple[Entry, ...] = ()  # address -> network, bridge=…, or disconnected
    vlans: tuple[Entry, ...] = ()  # address -> tag, or none
    portgroups: tuple[Entry, ...] = ()
    vm_path: Path | None = None
    snapshot_path: Path | None = None
    disk_path: Path | None = None

    def entries(self) -> tuple[Entry, ...]:
        """Every line of every map, in the order of the options."""
        return (
            *self.paths,
            *self.disks,
            *self.disk_targets,
            *self.networks,
            *self.nics,
            *self.vlans,
            *self.portgroups,
        )

    def find(self, entries: tuple[Entry, ...], old: str) -> Entry | None:
        """The line for exactly this name."""
        return next((one for one in entries if one.old == old), None)


@dataclass(slots=True)
class Used:
    """The lines of maps that something matched; ``unused`` is what has to be refused."""

    entries: set[Entry] = field(default_factory=set)

    def unused(self, maps: Maps) -> list[Entry]:
        """What was asked for and would be ignored."""
        return [one for one in maps.entries() if one not in self.entries and one.default is None]

    def defaults(self) -> list[Entry]:
        """The lines of the configuration file that were followed."""
        return sorted((one for one in self.entries if one.default is not None), key=str)


def parse(
    option: str, texts: Iterable[str], *, paths: bool = False, targets: bool = False, macs: bool = False
) -> tuple[Entry, ...]:
    """The lines of one map out of texts ``OLD=NEW``; otherwise as ``build``."""
    pairs = []
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals:
            raise errors.UsageError(f"--{option} {text}: OLD=NEW is expected", hint="write both sides of the '='")
        pairs.append((old, new))
    return build(option, pairs, paths=paths, targets=targets, macs=macs)


def build(
    option: str, pairs: Iterable[tuple[str, str]], *, paths: bool = False, targets: bool = False, macs: bool = False
) -> tuple[Entry, ...]:
    """The lines of one map: ``paths`` on both sides or (``targets``) on the right, addresses on the left.

    UsageError for a line without a left or right side, for relative paths, and for two lines about one thing.
    """
    found: dict[str, Entry] = {}
    for left, right in pairs:
        text, old, new = f"{left}={right}", left, right
        if not old or not new:
            raise errors.UsageError(f"--{option} {text}: OLD=NEW is expected", hint="write both sides of the '='")
        if paths:
            old = _absolute(option, text, old)
        if paths or targets:
            new = _absolute(option, text, new)
        if macs:
            old = _mac(option, text, old)
        if old in found:
            raise errors.UsageError(f"--{option} is given twice for {old}", hint="leave one of them out")
        found[old] = Entry(option, old, new)
    return tuple(found.values())


def with_defaults(
    maps: Maps, *, networks: Iterable[tuple[str, str, str]], paths: Iterable[tuple[str, str, str]]
) -> Maps:
    """The same maps, and after them the lines of the configuration file: old, new, and where it stands."""
    return replace(
        maps,
        networks=(*maps.networks, *(Entry("network", *line) for line in networks)),
        paths=(*maps.paths, *(Entry("path", *line) for line in paths)),
    )


def check_nics(maps: Maps) -> None:
    """UsageError for a tag that is no VLAN, and for cards that are to be disconnected and put into a network's part."""
    for entry in maps.vlans:
        if entry.new != "none" and not (entry.new.isdecimal() and 0 < int(entry.new) < 4095):
            raise errors.UsageError(f"{entry}: a VLAN's tag is a number from 1 to 4094, or none")
    for entry in maps.nics:
        if entry.new == DISCONNECTED and (also := [*maps.vlans, *maps.portgroups]):
            clash = next((one for one in also if one.old == entry.old), None)
            if clash is not None:
                raise errors.UsageError(f"{clash} would be ignored: the card is to be disconnected")


def map_path(path: str, entries: Iterable[Entry]) -> tuple[str, Entry | None]:
    """The path after the longest prefix that fits it, and the line that says so; whole names, never parts of one.

    A line that was asked for goes before any of the configuration file.
    """
    best: Entry | None = None
    for entry in entries:
        fits = path == entry.old or path.startswith(entry.old.rstrip("/") + "/")
        if fits and (best is None or _weight(entry) > _weight(best)):
            best = entry
    if best is None:
        return path, None
    rest = path[len(best.old.rstrip("/")) :]
    return (best.new.rstrip("/") + rest) or "/", best


def _weight(entry: Entry) -> tuple[bool, int]:
    return entry.default is None, len(entry.old)


def rewrite(target: Configuration, maps: Maps, used: Used) -> None:
    """Follow the maps in one configuration; the disks that snapshots freeze are set by whoever knows their images."""
    _rewrite_paths(target, maps, used)
    for interface in target.root.findall("devices/interface"):
        _rewrite_nic(interface, maps, used)


def paths_of(target: Configuration) -> Iterator[tuple[str, str]]:
    """Files and folders of the host that a configuration names, besides its hard disks: what for, and the path."""
    frozen = {disk.slot for disk in target.disks() if disk.takes_part}
    for element, attribute in _named_paths(target, frozen):
        text = (element.text or "").strip() if attribute is None else element.get(attribute, "")
        parent = element.getparent()
        slot = None if parent is None else parent.find("target")
        what = f"drive {slot.get('dev')}" if slot is not None and slot.get("dev") else etree.QName(element).localname
        if text.startswith("/"):
            yield what, text


def named_paths(target: Configuration) -> Iterator[tuple[etree._Element, str | None]]:
    """Every element, and the attribute of it (None: its text), in which the maps look for a path; hard disks too."""
    yield from _named_paths(target, set())


def networks_of(target: Configuration) -> dict[str, tuple[str, str | None]]:
    """Each card's address with the kind and name of what it is plugged into."""
    return {nic.mac: (nic.type, nic.source) for nic in target.nics()}


# --- inside ---------------------------------------------------------------------------------------------------------


def _absolute(option: str, text: str, path: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise errors.UsageError(f"--{option} {text}: '{path}' is not an absolute path", hint="write it from '/' on")
    return str(Path(path)) if path.rstrip("/") else "/"


def _mac(option: str, text: str, mac: str) -> str:
    mac = mac.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise errors.UsageError(f"--{option} {text}: '{mac}' is not the address of a card")
    return mac


def _named_paths(target: Configuration, frozen: set[str]) -> Iterator[tuple[etree._Element, str | None]]:
    for place, attribute in _PLACES:
        for element in target.root.iterfind(place):
            parent = element.getparent()
            slot = None if parent is None or parent.tag != "disk" else parent.find("target")
            if slot is not None and slot.get("dev") in frozen:
                continue
            if attribute is None or element.get(attribute):
                yield element, attribute


def _rewrite_paths(target: Configuration, maps: Maps, used: Used) -> None:
    frozen = {disk.slot for disk in target.disks() if disk.takes_part}
    for element, attribute in _named_paths(target, frozen):
        old = (element.text or "").strip() if attribute is None else element.get(attribute, "")
        new, entry = map_path(old, maps.paths)
        if entry is None:
            continue
        used.entries.add(entry)
        if attribute is None:
            xml_tree.set_text(element, new)
        else:
            xml_tree.set_attribute(element, attribute, new)


def _rewrite_nic(interface: etree._Element, maps: Maps, used: Used) -> None:
    address = interface.find("mac")
    mac = "" if address is None else address.get("address", "").lower()
    source = interface.find("source")
    kind = interface.get("type", "")
    name = "" if source is None else source.get(kind) or source.get("dev") or ""
    wanted = maps.find(maps.nics, mac)
    if wanted is None:
        wanted = maps.find(maps.networks, name) or maps.find(maps.networks, f"{kind}={name}")
    if wanted is not None:
        used.entries.add(wanted)
        _plug(interface, wanted.new)
    if (vlan := maps.find(maps.vlans, mac)) is not None:
        used.entries.add(vlan)
        _set_vlan(interface, vlan.new)
    group = maps.find(maps.portgroups, mac)
    source = interface.find("source")
    if group is not None and source is not None and interface.get("type") == "network":
        used.entries.add(group)
        xml_tree.set_attribute(source, "portgroup", group.new)


def _plug(interface: etree._Element, wanted: str) -> None:
    """Put the other end of a card's cable somewhere else."""
    link = interface.find("link")
    if wanted == DISCONNECTED:
        _unplug(interface)
        return
    kind, equals, name = wanted.partition("=")
    if not equals or kind not in _KINDS:
        name = wanted
        kind = interface.get("type", "network") if interface.get("type") in _KINDS else "network"
    if interface.get("type") == "ethernet" and link is not None and link.get("state") == "down":
        xml_tree.remove(link)  # it was disconnected by an import before
    interface.set("type", kind)
    source = interface.find("source")
    if source is None:
        source = xml_tree.insert(interface, "source", after="mac")
    for attribute in list(source.attrib):
        if attribute != "portgroup" or kind != "network":
            del source.attrib[attribute]
    xml_tree.set_attribute(source, kind, name)


def _unplug(interface: etree._Element) -> None:
    """The guest sees a card without a cable.

    libvirt has no card that is plugged in nowhere: this one has a tap device of its own that belongs to no bridge. Its
    kind stays compatible with a saved state; that of a user-mode card does so only as it is.
    """
    if interface.get("type") != "user":
        interface.set("type", "ethernet")
        for tag in ("source", "virtualport", "vlan"):
            for element in interface.findall(tag):
                xml_tree.remove(element)
    link = interface.find("link")
    if link is None:
        link = xml_tree.insert(interface, "link", after="mac")
    link.set("state", "down")


def _set_vlan(interface: etree._Element, tag: str) -> None:
    for element in interface.findall("vlan"):
        xml_tree.remove(element)
    if tag != "none":
        vlan = xml_tree.insert(interface, "vlan", after="source", otherwise="mac")
        etree.SubElement(vlan, "tag", id=tag)


def to_mapping(entries: Iterable[Entry]) -> Mapping[str, str]:
    """The lines of one map as a mapping."""
    return {one.old: one.new for one in entries}
