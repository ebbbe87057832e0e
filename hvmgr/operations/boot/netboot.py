"""What a catalog hands out to machines that start over the network: the folder ``netboot`` in it.

    boot.ipxe               the menu, which iPXE reads; written last
    kernel, initrd.img      the boot environment
    NAME/order              what becomes of an image, and the checksums of all files for that
    NAME/supplement …       what a native boot needs beside the VHD; NAME/map for an image that is written to the whole disk

Nothing is read from the catalog on the machine but what an order names.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model import boot_map, boot_menu, image_plan, netboot
from hvmgr.model.boot_entry import Volume
from hvmgr.model.boot_map import SECTOR, Run
from hvmgr.model.boot_options import BootOptions
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.netboot import How, NetbootOptions, Offer, Served
from hvmgr.operations.boot import guest_system, making, netboot_system, requirements, supplement
from hvmgr.operations.images import changes, recognition
from hvmgr.storage import durable, layer

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.storage.catalog import Catalog, Entry

_SUM = re.compile(r"[0-9a-f]{64}")
_HINT = "convert it, and add that: hvmgr image convert"
# Each machine makes a volume of its own, and puts its id where this one stands.
_VOLUME_ID = "68766d67-7200-4000-8000-6e6574626f6f"


@dataclass(frozen=True, slots=True)
class Published:
    """What machines get; ``left_out`` are images with the reasons why they get them not."""

    folder: Path
    url: str
    offers: tuple[Offer, ...]
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Prepared:
    offer: Offer
    order: bytes
    files: dict[str, bytes]


class _Elsewhere(requirements.Place):
    """The volume that a machine is going to have, with the VHD where it is going to be."""

    def __init__(self, name: str) -> None:
        super().__init__(Path("/"), _VOLUME_ID, Volume.EXT)
        self._name = name

    def inside(self, path: Path) -> str:  # noqa: ARG002 - wherever the file lies here
        return f"/VHD/{self._name}"


def publish(host: Host, catalog: Catalog, options: NetbootOptions) -> Published:
    """The folder is there and its script offers the images; whatever fails, the script before stays."""
    netboot.require_options(options)
    kernel = netboot_system.kernel(options.kernel, options.modules)
    prepared, left_out = _all(host, catalog, options)
    offers = tuple(one.offer for one in prepared)
    if options.default is not None and options.default not in {one.name for one in offers}:
        raise errors.UsageError(f"'{options.default}' is not among the images that are handed out")
    folder = catalog.path(netboot.FOLDER)
    steps = [
        image_plan.PrepareWork(f"make a boot environment of {kernel.image} in {folder}"),
        *(image_plan.PrepareWork(f"hand out '{one.name}' ({_WORDS[one.how]})") for one in offers),
    ]
    changes.require_approval(host, changes.plan_of("catalog netboot", f"hand out images of {catalog.folder}", steps))
    with catalog.changing(host.wait_s):
        durable.make_folder(folder, mode=0o755)
        durable.sweep(folder)
        durable.copy_file(kernel.image, folder / netboot.KERNEL, mode=0o644)
        durable.write_file(folder / netboot.INITRD, netboot_system.initrd(kernel), mode=0o644)
        for one in prepared:
            _write(folder / one.offer.name, one)
        durable.write_file(folder / netboot.SCRIPT, netboot.script(offers, options).encode(), mode=0o644)
        for left in folder.iterdir():
            if left.is_dir() and left.name not in {one.name for one in offers}:
                durable.remove_folder(left)
    url = netboot.address(options.url, netboot.FOLDER, netboot.SCRIPT)
    return Published(folder, url, offers, tuple(left_out))


_WORDS = {How.NATIVE: "as a VHD with a boot entry", How.EXPAND: "written to the whole disk"}


def _all(
    host: Host, catalog: Catalog, options: NetbootOptions
) -> tuple[list[_Prepared], list[tuple[str, str]]]:  # fmt: skip
    found, left_out = [], []
    entries = [catalog.entry(name) for name in dict.fromkeys(options.names)] or catalog.entries()
    for entry in sorted(entries, key=lambda one: (one.group, one.name)):
        try:
            found.append(_prepare(host, catalog, entry, options))
        except (errors.Unsupported, errors.NotFound, errors.Conflict) as error:
            if options.names:
                raise
            left_out.append((entry.name, error.message))
    if not found:
        why = f": {left_out[0][1]}" if left_out else ""
        raise errors.NotFound(f"{catalog.folder} has no image for machines that start over the network{why}")
    return found, left_out


def _prepare(host: Host, catalog: Catalog, entry: Entry, options: NetbootOptions) -> _Prepared:
    path = catalog.path(entry.file)
    if not path.is_file() or path.stat().st_size != entry.size or not _SUM.fullmatch(entry.sha256):
        raise errors.Corrupt(
            f"'{entry.name}' is not what was put into the catalog", hint="add it again", file=entry.file
        )
    if entry.kind not in {ImageFormat.VHD, ImageFormat.RAW}:
        raise errors.Unsupported(
            f"'{entry.name}' is a {entry.kind.upper()}: machines get VHDs and raw images", hint=f"{_HINT} … NEW.vhd"
        )
    how = How.EXPAND if options.expand or entry.kind == ImageFormat.RAW else How.NATIVE
    image = Served(entry.file, entry.sha256, entry.size)
    facts, files = _native(host, path, entry, image) if how is How.NATIVE else _expanded(path, entry, image)
    order = netboot.order(how, facts)
    offer = Offer(entry.name, entry.group, entry.description, how, hashlib.sha256(order).hexdigest())
    return _Prepared(offer, order, files)


def _native(host: Host, path: Path, entry: Entry, image: Served) -> tuple[dict[str, str], dict[str, bytes]]:
    """For a VHD that is going to lie on the machine's volume."""
    from hvmgr import vhd

    name = f"{entry.name}.vhd"
    found = recognition.look(path, ImageFormat.VHD)
    entry_id = hashlib.sha256(entry.name.encode()).hexdigest()[:12]
    with vhd.open_chain(path) as chain:
        place = _Elsewhere(name)
        system = guest_system.find(chain, f"'{entry.name}'")
        described, wish = making.describe(chain, place), BootOptions(title=entry.name)
        made = making.assemble(
            chain, found, wish, place, system, described, image=f"/VHD/{name}", entry_id=entry_id
        )  # fmt: skip
    for warning in made.warnings:
        host.reporter.notice(warning)
    files = {"supplement": made.supplement}
    if made.kernel is not None:
        files |= {"kernel": made.kernel[0], "initrd": made.kernel[1]}
    beside = [_served(entry, one, data, f"{name}.boot/{one}") for one, data in files.items()]
    facts = {
        "vhd": name,
        "id": entry_id,
        "files": "\n".join(one.line() for one in (Served(image.path, image.sha256, image.size, name), *beside)),
        "mtime": str(described[0].mtime),
        "layer": str(layer.size_for(found.size)) if made.entry.layer else "",
        "words": supplement.words(made.entry),
        "entry": boot_menu.with_default(made.section, entry_id),
        "volume_id": _VOLUME_ID,
    }
    return facts, files


def _expanded(path: Path, entry: Entry, image: Served) -> tuple[dict[str, str], dict[str, bytes]]:
    """For the disk that an image shows."""
    size = entry.disk or entry.size
    if size % SECTOR:
        raise errors.Unsupported(f"'{entry.name}' is no disk: its size is no multiple of {SECTOR} bytes")
    data = netboot.disk_map(_runs(path, entry, size), entry.size).encode()
    served = _served(entry, "map", data, "")
    return {"size": str(size), "file": image.line(), "map": served.line()}, {"map": data}


def _runs(path: Path, entry: Entry, size: int) -> list[Run]:
    if entry.kind == ImageFormat.RAW:
        return [Run(0, size // SECTOR, 0, 0)]
    from hvmgr import vhd

    with vhd.open_chain(path) as chain:
        return list(boot_map.joined(chain.pieces()))


def _served(entry: Entry, name: str, data: bytes, target: str) -> Served:
    return Served(f"{netboot.FOLDER}/{entry.name}/{name}", hashlib.sha256(data).hexdigest(), len(data), target)


def _write(folder: Path, one: _Prepared) -> None:
    durable.make_folder(folder, mode=0o755)
    durable.sweep(folder)
    for name, data in (*one.files.items(), (netboot.ORDER, one.order)):
        durable.write_file(folder / name, data, mode=0o644)
