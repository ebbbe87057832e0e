"""What an entry is made of, worked out from the VHD as it is: its facts, its part of the menu, the files beside the VHD."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.model import boot_map, boot_menu, boot_plan
from hvmgr.model.boot_entry import BootEntry, ImageFile
from hvmgr.model.boot_options import BootOptions
from hvmgr.model.image_info import ImageType
from hvmgr.operations.boot import guest_system, layers, requirements, supplement
from hvmgr.operations.boot.guest_system import LinuxSystem
from hvmgr.operations.boot.requirements import Place
from hvmgr.storage import durable, layer

if TYPE_CHECKING:
    from hvmgr.model.plan import Step
    from hvmgr.operations.images.recognition import Recognised
    from hvmgr.vhd.chain import Chain
    from hvmgr.vhd.image import Image

MAX_LIST = 4096  # stretches of a block list; beyond that kernel and initramfs are copied beside the VHD
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Made:
    """All that ``write`` puts in its place."""

    entry: BootEntry
    section: str
    supplement: bytes
    kernel: tuple[bytes, bytes] | None
    needs_layer: bool
    warnings: tuple[str, ...]


def wants_layer(found: Recognised, wish: BootOptions) -> bool:
    """Whether what the system writes goes into a layer; only a fixed VHD can be written itself."""
    if wish.layer is False and found.type is not ImageType.FIXED:
        raise errors.Unsupported(
            f"{found.path} is {found.type.value}: a system that boots from it needs a layer for what it writes",
            hint="a fixed VHD is written itself: hvmgr image convert --fixed",
        )
    return found.type is not ImageType.FIXED if wish.layer is None else wish.layer


def prepare(
    path: Path, found: Recognised, wish: BootOptions, old: BootEntry | None, *, entry_id: str, others: int = 0
) -> Made:
    """The entry for a VHD; every requirement is checked here, and nothing written.

    ``others``: bytes of the volume's free space that are spoken for.
    """
    from hvmgr import vhd

    place = _place(path, wish)
    has_layer = wants_layer(found, wish)
    with vhd.open_chain(path, folders=found.folders) as chain:
        requirements.require_space(path, chain, has_layer=has_layer, others=others)
        system = guest_system.find(chain, str(path), wish.kernel)
        files = describe(chain, place)
        layers.require_fitting(path, chain.size, old, files, has_layer=has_layer)
        made = assemble(chain, found, wish, place, system, files, Naming(entry_id, str(path), datetime.now(UTC)))
        damage = layers.damage(made.entry)
        if damage is None:
            return made
        return replace(made, warnings=(*made.warnings, f"{damage}; hvmgr boot revert throws it away"))


def describe(chain: Chain, place: Place) -> tuple[ImageFile, ...]:
    """The files of a disk as they are now, the VHD first."""
    return tuple(requirements.describe(image.path, place, _head(image)) for image in chain.images)


@dataclass(frozen=True, slots=True)
class Naming:
    """What an entry is called, where its VHD lies, or is going to lie, on its machine, and since when there is the entry."""

    id: str
    image: str
    added: datetime


def assemble(
    chain: Chain, found: Recognised, wish: BootOptions, place: Place, system: LinuxSystem, files: tuple[ImageFile, ...],
    naming: Naming,
) -> Made:  # fmt: skip
    """All parts of an entry."""
    has_layer = wants_layer(found, wish)
    blocks, copied = _kernel_from(chain, wish)
    number = "" if system.root.number is None else str(system.root.number)
    entry = BootEntry(
        id=naming.id,
        title=wish.title or Path(naming.image).name,
        image=naming.image,
        kind=found.type.value,
        size=found.size,
        volume=place.id,
        volume_type=place.type,
        files=files,
        layer=has_layer,
        kernel=system.kernel,
        pinned=wish.kernel is not None,
        root=f"/dev/mapper/hvmgr-disk{number}",
        arguments=_words(f"{system.arguments} {wish.arguments}"),
        extra=wish.arguments,
        copied=copied,
        added=units.to_rfc3339(naming.added),
    )
    table = boot_map.mapper_table(boot_map.joined(chain.pieces()))
    return Made(
        entry,
        boot_menu.section(entry, partition=system.boot.grub_name, table=blocks),
        supplement.build(entry, system, table),
        system.kernel_files() if copied else None,
        has_layer and not Path(entry.layer_file).exists(),
        system.warnings,
    )


def _words(text: str) -> str:
    try:
        return shlex.join(shlex.split(text))
    except ValueError as error:
        raise errors.UsageError(f"the kernel's arguments cannot be read: {text}", hint="close the quotes") from error


def _place(path: Path, wish: BootOptions) -> Place:
    stated = (wish.volume, wish.volume_id, wish.volume_type)
    if all(one is None for one in stated):
        return requirements.place_of(path)
    if wish.volume is None or wish.volume_id is None or wish.volume_type is None:
        raise errors.UsageError("--volume, --volume-id and --volume-type belong together")
    return requirements.stated_place(wish.volume, wish.volume_id, wish.volume_type)


def _head(image: Image) -> int:
    """The bytes in front that say what a VHD holds: headers and table."""
    if image.header is None:
        return 0
    return image.header.table_offset + 4 * len(image.table)


def _kernel_from(chain: Chain, wish: BootOptions) -> tuple[list[str] | None, bool]:
    """How GRUB reads the kernel in the VHD: its block list (None: a fixed VHD needs none), or from a copy beside it."""
    if wish.copy_kernel or len(chain.images) > 1:
        return None, True
    found = block_list(chain)
    return found, found is None and chain.top.header is not None


def block_list(chain: Chain) -> list[str] | None:
    """The block list of a dynamic VHD; None for a fixed one, whose bytes are the disk's own, and for too long a list."""
    image = chain.top
    if image.header is None or image.table.count() > MAX_LIST:
        return None
    from hvmgr.vhd.format import bitmap_size

    runs = boot_map.block_runs(
        ((number, image.table[number]) for number in image.table.allocated()),
        block=image.block_size // _SECTOR,
        bitmap=bitmap_size(image.block_size) // _SECTOR,
        size=image.size // _SECTOR,
    )
    found = boot_map.block_list(runs, image.file.length() // _SECTOR)
    return found if len(found) <= MAX_LIST else None


def steps(made: Made, old: BootEntry | None, menu: str) -> list[Step]:
    """What ``write`` and the menu are going to change."""
    entry = made.entry
    found: list[Step] = [boot_plan.PutBootFiles(entry.folder, entry.kernel_version, entry.copied)]
    if made.needs_layer:
        found.append(boot_plan.MakeLayer(entry.layer_file, entry.size))
    verb = "renew" if old is not None else "add"
    return [*found, boot_plan.WriteMenu(menu, f"{verb} the entry '{entry.title}'")]


def write(made: Made) -> None:
    """The files beside the VHD; the menu comes after them."""
    entry, folder = made.entry, Path(made.entry.folder)
    durable.make_folder(folder, mode=0o700)
    durable.sweep(folder)
    if made.kernel is not None:
        durable.write_file(folder / "kernel", made.kernel[0])
        durable.write_file(folder / "initrd", made.kernel[1])
    durable.write_file(folder / "supplement", made.supplement)
    if made.needs_layer:
        layer.make(Path(entry.layer_file), entry.size)
