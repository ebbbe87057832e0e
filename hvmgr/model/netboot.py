"""What a machine that starts over the network is told: iPXE's script, and the order for one image. Pure text.

The script is the root of trust: it names the checksum of each order, an order those of all files. Nothing that stands in it
or in an order can be taken for anything else: names are checked, texts for people reduced to harmless characters, and what the
shell reads is quoted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote

from hvmgr import errors
from hvmgr.model.boot_map import SECTOR, Run

FOLDER = "netboot"  # in the catalog
SCRIPT, SYSTEM, IMAGES = "boot.ipxe", "system", "images"  # in that
HEAD = 1 << 20  # of a disk: written last

_URL = re.compile(r"http://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~%+@:-]+)*/?")
_INITRD = "initrd.img"  # what iPXE calls it
_DISK = re.compile(r"[A-Za-z0-9!._:-]{1,128}")
# Without ";", "&&" and "||", which end a command of iPXE's and begin another.
_ARGUMENTS = re.compile(r"[A-Za-z0-9 ,._:/=+@%-]*")
_NO_TEXT = re.compile(r"[^A-Za-z0-9 .,:+_()/@=-]")


class How(StrEnum):
    """What becomes of an image on the machine; also the name of the script that does it."""

    NATIVE = "native"  # a VHD on a volume, with a boot entry
    EXPAND = "expand"  # what it shows, written to the whole disk


@dataclass(frozen=True, slots=True)
class NetbootOptions:
    """``url`` is the catalog's own on the web server. ``names`` empty: every image that can be handed out.

    ``default`` is what a blank disk gets when nobody chooses within ``timeout_s``; 0 asks nobody. ``overwrite`` is offered, and
    never the default. ``kernel`` and ``modules`` are those of the boot environment (``vmlinuz-V``, ``/lib/modules/V``); without
    them the newest of this host.
    """

    url: str
    names: tuple[str, ...] = ()
    expand: bool = False
    disk: str | None = None
    overwrite: bool = False
    default: str | None = None
    timeout_s: int = 15
    arguments: str = ""
    kernel: Path | None = None
    modules: Path | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """An image in the menu; ``order`` is the checksum of its order."""

    name: str
    group: str
    description: str
    how: How
    order: str


def require_options(options: NetbootOptions) -> None:
    """UsageError for what no script can hold, or no machine would understand."""
    if not _URL.fullmatch(options.url):
        raise errors.UsageError(
            f"'{options.url}' is no address that a machine can load the catalog from",
            hint="give that of the catalog's folder on the web server, as http://server/catalog",
        )
    if options.disk is not None and not _DISK.fullmatch(options.disk):
        raise errors.UsageError(
            f"'{options.disk}' is no name of a disk", hint="as Linux names it: sda, nvme0n1; or its serial number"
        )
    if not _ARGUMENTS.fullmatch(options.arguments):
        raise errors.UsageError(f"'{options.arguments}' holds characters that a boot script cannot hold")
    if options.default is None and options.timeout_s == 0:
        raise errors.UsageError("somebody has to choose: --timeout 0 belongs to --default")
    if options.overwrite and options.timeout_s == 0:
        raise errors.UsageError("somebody has to choose what a disk loses: --overwrite does not go with --timeout 0")
    if (options.kernel is None) is not (options.modules is None):
        raise errors.UsageError("--kernel and --modules belong together")


def address(url: str, *parts: str) -> str:
    """The URL of a file of the catalog."""
    return "/".join((url.rstrip("/"), *(quote(part, safe="/") for part in parts)))


@dataclass(frozen=True, slots=True)
class System:
    """Checksums of what machines load: the boot environment, and the program that starts a disk under UEFI."""

    kernel: str
    initrd: str
    starter: str


def script(offers: Sequence[Offer], options: NetbootOptions, system: System) -> str:
    """iPXE's: a menu by groups, the machine's own disk first; or no menu.

    The default image is for a machine whose disk starts nothing: the disk is tried before it, so that no image comes twice.
    """
    lines = ["#!ipxe", "# Written by 'hvmgr catalog netboot', which writes it anew."]
    if options.timeout_s == 0:
        lines.append("goto first")
    lines += [":menu", "menu Images of hvmgr", "item local Start from the disk of this machine"]
    if options.default is not None:
        lines.append(f"item first Start from the disk of this machine; if it is blank, it gets {options.default}")
    group = None
    for one in offers:
        if one.group != group:
            group = one.group
            lines.append(f"item --gap -- {_text(group)}")
        what = "written over the disk" if one.how is How.EXPAND else "as a VHD on the disk"
        lines.append(f"item image-{one.name} {_text(f'{one.name}, {what}. {one.description}'.strip())}")
    if options.overwrite:
        lines.append("item --gap -- Give up what the disk holds:")
        lines += [f"item again-{one.name} {one.name}" for one in offers]
    chosen = "local" if options.default is None else "first"
    lines.append(f"choose --default {chosen} --timeout {options.timeout_s * 1000} picked || goto local")
    lines += ["goto ${picked}", ":local", _LEAVE]
    if options.default is not None:
        lines += _first(options, system)
    for one in offers:
        lines += [f":image-{one.name}", *_start(one, options, system)]
        if options.overwrite:
            lines += [f":again-{one.name}", *_start(one, options, system, "hvmgr.overwrite")]
    return "".join(f"{line}\n" for line in [*lines, *_FAILED])


# On to the firmware's next device: UEFI need not go on after a program that says that all is well.
_LEAVE = "exit 1"
_FAILED = (":failed", "prompt --timeout 30000 The boot environment cannot be loaded. ||", _LEAVE)


def _first(options: NetbootOptions, system: System) -> list[str]:
    """The machine's disk is started; where that comes back, it has started nothing."""
    return [
        ":first",
        "iseq ${platform} efi && goto efi ||",
        f"sanboot --no-describe --drive 0x80 || goto image-{options.default}",
        ":efi",
        f"chain --autofree {address(options.url, FOLDER, SYSTEM, system.starter)} ||",
        f"goto image-{options.default}",
    ]


def _start(offer: Offer, options: NetbootOptions, system: System, *more: str) -> list[str]:
    words = [f"initrd={_INITRD}", "quiet", "panic=30", f"hvmgr.url={options.url.rstrip('/')}"]
    words += [f"hvmgr.image={offer.name}", f"hvmgr.order={offer.order}"]
    words += [f"hvmgr.disk={options.disk}"] if options.disk is not None else []
    words += [*more, "BOOTIF=01-${netX/mac:hexhyp}", *options.arguments.split()]
    return [
        f"kernel {address(options.url, FOLDER, SYSTEM, system.kernel)} {' '.join(words)} || goto failed",
        f"initrd --name {_INITRD} {address(options.url, FOLDER, SYSTEM, system.initrd)} || goto failed",
        "boot || goto failed",
    ]


def _text(text: str) -> str:
    """What a person may read, and iPXE cannot take for a setting or an operator."""
    return _NO_TEXT.sub("?", text)[:100]


@dataclass(frozen=True, slots=True)
class Served:
    """A file of the catalog, by its path there, and the name that it gets on the machine."""

    path: str
    sha256: str
    size: int
    target: str = ""

    def line(self) -> str:
        """As an order names it; no part of it has a space."""
        words = (self.sha256, str(self.size), quote(self.path, safe="/"), self.target)
        return " ".join(word for word in words if word)


def order(how: How, facts: Mapping[str, str]) -> bytes:
    """An order in the words of the shell, which reads it."""
    words = {"how": how.value, **facts}
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in words.items()).encode("utf-8", "surrogateescape")


def disk_map(runs: Iterable[Run], length: int) -> str:
    """How a disk is written from the bytes of its one file, in their order: see ``share/netboot/expand``.

    The runs are those of the whole disk, ``length`` is the file's. Nothing crosses the end of the disk's head.
    """
    pieces = [piece for run in runs for piece in _cut(run)]
    lines = [f"zero {run.start * SECTOR} {run.length * SECTOR}\n" for run in pieces if run.level is None]
    at = 0
    for run in sorted((one for one in pieces if one.level is not None), key=lambda one: one.place):
        if run.place > at:
            lines.append(f"skip {(run.place - at) * SECTOR}\n")
        lines.append(f"copy {run.start * SECTOR} {run.length * SECTOR}\n")
        at = run.place + run.length
    if length < at * SECTOR:
        raise errors.Corrupt("the disk names more of its file than there is")
    return "".join(lines)


def _cut(run: Run) -> list[Run]:
    head = HEAD // SECTOR - run.start
    if not 0 < head < run.length:
        return [run]
    return [
        run._replace(length=head),
        Run(run.start + head, run.length - head, run.level, 0 if run.level is None else run.place + head),
    ]
