"""What a configuration of foreign origin would have of this host besides disks and the files that maps move.

Whoever made it may not wish us well: QEMU's own arguments, scripts that libvirt runs as root, devices and sockets of the
host are all a part of a domain's XML. Nothing is left out for being rare: every text that is an absolute path counts,
wherever it stands. https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

from collections.abc import Iterator

from lxml import etree

from hvmgr.model import maps
from hvmgr.model.configuration import Configuration

# Run by libvirt or QEMU, also where the name has no '/' in front.
_PROGRAMS = (
    ("devices/interface/script", "path"),
    ("devices/interface/downscript", "path"),
    ("devices/filesystem/binary", "path"),
)
_LOGS = "devices/*/log"  # root's virtlogd writes there what the guest says
_DEVICES = ("devices/hostdev", "devices/interface[@type='hostdev']", "devices/redirdev[@type='tcp']")
_DISK_TYPES = {"file", "block", "dir", "volume"}  # the others are no file that could come along
_CONFINEMENTS = {"none", "static"}  # instead of libvirt's own choice of user and profile

# Paths that lead nowhere, are said elsewhere, or are those of the guest.
_SILENT = (
    "metadata", "name", "title", "description", "resource/partition", "os/cmdline", "os/nvram", "devices/emulator",
    "devices/disk/backingStore", "devices/disk/mirror", "devices/filesystem/target", "devices/*[@type='pty']",
)  # fmt: skip
_HARMLESS = {"/dev/urandom", "/dev/random", "/dev/hwrng"}


def of(one: Configuration) -> Iterator[tuple[str, str]]:
    """Each thing as words and the text in question; the same one may come twice."""
    yield from _extensions(one.root)
    for place, attribute in _PROGRAMS:
        for element in one.root.iterfind(place):
            yield f"a program that is run, <{element.tag}>", element.get(attribute, "")
    for element in one.root.iterfind(_LOGS):
        yield "a file that its guest writes, <log>", element.get("file", "")
    for place in _DEVICES:
        for element in one.root.iterfind(place):
            yield "a device of the host", f"<{element.tag} type='{element.get('type', '')}'>"
    for disk in one.root.iterfind("devices/disk"):
        if (kind := disk.get("type", "file")) not in _DISK_TYPES:
            yield (
                f"a disk of the type {kind}",
                "" if (source := disk.find("source")) is None else source.get("name", ""),
            )
    for label in one.root.iter("seclabel"):
        if (kind := label.get("type", "")) in _CONFINEMENTS:
            yield f"<seclabel type='{kind}'>, a confinement of its own", (label.findtext("label") or "").strip()
    yield from _paths(one)


def _extensions(root: etree._Element) -> Iterator[tuple[str, str]]:
    """What goes to QEMU past libvirt, such as its command line."""
    for element in root.iterchildren(etree.Element):
        name = etree.QName(element)
        if name.namespace is not None:
            words = " ".join(str(value) for child in element.iter() for value in child.attrib.values())
            yield f"<{name.localname}> of {name.namespace}", words


def _paths(one: Configuration) -> Iterator[tuple[str, str]]:
    said = {(element, attribute) for element, attribute in maps.named_paths(one)}
    silent = {each for place in _SILENT for top in one.root.iterfind(place) for each in top.iter(etree.Element)}
    silent -= set(one.root.iterfind("os/nvram/source"))
    nvram = one.root.find("os/nvram/source")
    for element in one.root.iter(etree.Element):
        if element in silent:
            continue
        texts: dict[str | None, str] = {str(name): str(value) for name, value in element.attrib.items()}
        texts[None] = (element.text or "").strip()
        for name, text in texts.items():
            is_said = (element, name) in said or (element is nvram and name == "file")
            if text.startswith("/") and text not in _HARMLESS and not is_said and not maps.OWN_SOCKET.search(text):
                yield f"<{etree.QName(element).localname}>", text
