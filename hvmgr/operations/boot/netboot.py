"""What a catalog hands out to machines that start over the network: the folder ``netboot`` in it.

    boot.ipxe               the menu, which iPXE reads; written last
    system/SHA256           the boot environment: a kernel, and an initramfs; a program that starts a disk under UEFI
    images/NAME/SHA256      an order, which says what becomes of an image, and the checksums of all files for that; and these:
                            what a native boot needs beside the VHD, or the map of an image that is written to the whole disk

Each file but the script has its checksum for its name: what a script names is never changed, and goes after it.
Nothing is read from the catalog on the machine but what an order names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
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
    files: tuple[bytes, ...]


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
    for warning in _warnings(catalog, prepared):
        host.reporter.notice(warning)
    system, images = folder / netboot.SYSTEM, folder / netboot.IMAGES
    with catalog.changing(host.wait_s):
        for place in (folder, system, images):
            durable.make_folder(place, mode=0o755)
            durable.sweep(place)
        initrd = netboot_system.initrd(kernel, host.reporter.notice)
        loaded = [kernel.image.read_bytes(), initrd, netboot_system.starter()]
        kept = _write(system, loaded)
        for one in prepared:
            kept |= _write(images / one.offer.name, [*one.files, one.order])
        script = netboot.script(offers, options, netboot.System(*map(_sum, loaded)))
        durable.write_file(folder / netboot.SCRIPT, script.encode(), mode=0o644)
        _tidy(system, images, kept)
    url = netboot.address(options.url, netboot.FOLDER, netboot.SCRIPT)
    return Published(folder, url, offers, tuple(left_out))


def _warnings(catalog: Catalog, prepared: list[_Prepared]) -> Iterator[str]:
    for one in prepared:
        if catalog.entry(one.offer.name).answer is not None:
            yield f"the answer file of '{one.offer.name}' is not handed out: machines get the image as it is"


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
    offer = Offer(entry.name, entry.group, entry.description, how, _sum(order))
    return _Prepared(offer, order, files)


def _native(host: Host, path: Path, entry: Entry, image: Served) -> tuple[dict[str, str], tuple[bytes, ...]]:
    """For a VHD that is going to lie on the machine's volume."""
    from hvmgr import vhd

    name = f"{entry.name}.vhd"
    found = recognition.look(path, ImageFormat.VHD)
    entry_id = hashlib.sha256(entry.name.encode()).hexdigest()[:12]
    with vhd.open_chain(path) as chain:
        place = _Elsewhere(name)
        system = guest_system.find(chain, f"'{entry.name}'")
        described, wish = making.describe(chain, place), BootOptions(title=entry.name)
        # The same image is the same order, whenever it is made.
        naming = making.Naming(entry_id, f"/VHD/{name}", datetime.fromtimestamp(path.stat().st_mtime, UTC))
        made = making.assemble(chain, found, wish, place, system, described, naming)
    for warning in made.warnings:
        host.reporter.notice(warning)
    files = {"supplement": made.supplement}
    if made.kernel is not None:
        files |= {"kernel": made.kernel[0], "initrd": made.kernel[1]}
    beside = [_served(entry, data, f"{name}.boot/{one}") for one, data in files.items()]
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
    return facts, tuple(files.values())


def _expanded(path: Path, entry: Entry, image: Served) -> tuple[dict[str, str], tuple[bytes, ...]]:
    """For the disk that an image shows."""
    size = entry.disk or entry.size
    if size % SECTOR:
        raise errors.Unsupported(f"'{entry.name}' is no disk: its size is no multiple of {SECTOR} bytes")
    data = netboot.disk_map(_runs(path, entry, size), entry.size).encode()
    served = _served(entry, data)
    return {"size": str(size), "file": image.line(), "map": served.line()}, (data,)


def _runs(path: Path, entry: Entry, size: int) -> list[Run]:
    if entry.kind == ImageFormat.RAW:
        return [Run(0, size // SECTOR, 0, 0)]
    from hvmgr import vhd

    with vhd.open_chain(path) as chain:
        return list(boot_map.joined(chain.pieces()))


def _served(entry: Entry, data: bytes, target: str = "") -> Served:
    digest = _sum(data)
    return Served(f"{netboot.FOLDER}/{netboot.IMAGES}/{entry.name}/{digest}", digest, len(data), target)


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(folder: Path, files: Iterable[bytes]) -> set[Path]:
    durable.make_folder(folder, mode=0o755)
    durable.sweep(folder)
    written = {folder / _sum(data): data for data in files}
    for path, data in written.items():
        durable.write_file(path, data, mode=0o644)
    return set(written)


def _tidy(system: Path, images: Path, kept: set[Path]) -> None:
    """What no script names any more is gone, as far as it was written here."""
    folders = [one for one in images.iterdir() if one.is_dir()]
    for path in [path for folder in (system, *folders) for path in folder.iterdir()]:
        if path not in kept and _SUM.fullmatch(path.name):
            durable.remove(path)
    for folder in folders:
        durable.remove_empty_folder(folder)
