"""Machines that start over the network and get a small system out of a catalog: how long that takes, and that it starts afterwards.

As a VHD with a boot entry and written to the whole disk, by machines with a BIOS and with UEFI; a machine that goes on to start over the
network has to start what it got. A download that breaks off or differs has to leave a disk that starts nothing, and a sentence on the
console; whatever is not so ends the bench.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hvmgr
from bench import boot
from bench.harness import Result
from hvmgr import vhd
from hvmgr.faces import guest
from hvmgr.host import bare_machine
from hvmgr.model import boot_menu
from hvmgr.model.netboot import NetbootOptions
from hvmgr.operations.boot import machine
from hvmgr.operations.images.cataloguing import Images
from hvmgr.storage import ext, partitions
from tests.operations.boot import mini

_DISK = 384 << 20
_MEMORY = 512 << 20  # a GRUB takes a quarter of it, and under UEFI one starts another
_VOLUME = 37 << 20  # where it begins on the machine's disk
_DEPLOY_S = 1800.0
_NEXT_DEVICE = b"\xcd\x18"  # int 18h


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """The bench has a table of its own."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with contextlib.suppress(ConnectionError):  # a machine asks whether the image is there, and breaks off
            super().copyfile(source, outputfile)


def measure(say: Callable[[str], None]) -> list[Result]:
    """All results of this suite."""
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as name, boot.own_index(Path(name)):
        folder = Path(name)
        mini.make_raw(folder / "raw", guest.build(), folder)
        mini.make_vhd(folder / "os.vhd", folder / "raw", vhd.Kind.DYNAMIC)
        with hvmgr.Host.open("test:///default", root=folder / "homes") as host, _served(folder / "catalog") as url:
            catalog = host.catalog(folder / "catalog")
            file = catalog.folder / catalog.add(folder / "os.vhd", name="small").file
            results = []
            for expand, uefi in ((True, False), (False, True), (False, False)):
                how = f"{'to the whole disk' if expand else 'as a VHD with its entry'}, {'UEFI' if uefi else 'BIOS'}"
                say(f"netboot: {how}")
                catalog.netboot(_options(folder, url, expand=expand))
                seconds, last = _deploy(folder, url, uefi=uefi)
                _require(last.endswith("small is on /dev/vda"), last)
                results.append(Result(f"from power-on to deployed, {how}", seconds))
                if not expand:
                    _start(folder, uefi=uefi, count=1, url=url)
                    _start(folder, uefi=not uefi, count=2)
            _cut_off(say, folder, url)
            _one_more(say, catalog, folder, url)
            for expand in (False, True):
                say(f"netboot: a damaged image{', to the whole disk' if expand else ''}")
                catalog.netboot(_options(folder, url, expand=expand))
                with _damaged(file):
                    _, last = _deploy(folder, url)
                _require("is not what the catalog says (its checksum)" in last, last)
                with (folder / "disk").open("rb") as disk:
                    _require(not any(disk.read(440).removeprefix(_NEXT_DEVICE)), "the disk starts something")
    return results


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://10.0.2.2:{server.server_port}"
        server.shutdown()


def _options(folder: Path, url: str, *, expand: bool = False) -> NetbootOptions:
    found = guest.build()
    return NetbootOptions(
        url, expand=expand, default="small", timeout_s=0, arguments=mini.ARGUMENTS, kernel=found.kernel,
        modules=mini.netboot_modules(found, folder),
    )  # fmt: skip


def _cut_off(say: Callable[[str], None], folder: Path, url: str) -> None:
    """A machine whose power went off before the boot loaders were written gets these, and keeps what it has."""
    say("netboot: an attempt that was cut off")
    with (folder / "disk").open("r+b") as disk:
        disk.write(_NEXT_DEVICE.ljust(440, b"\0"))
    _, last = _deploy(folder, url, is_blank=False)
    _require(last.endswith("small is on /dev/vda"), last)
    _start(folder, uefi=False, count=3, url=url)


def _one_more(say: Callable[[str], None], catalog: Images, folder: Path, url: str) -> None:
    """What a machine has already stays: a VHD of the same name, and the entry beside which another one comes.

    Until somebody gives it up.
    """
    say("netboot: a machine that has one already")
    catalog.add(folder / "os.vhd", name="other")
    catalog.netboot(replace(_options(folder, url), timeout_s=1, overwrite=True))
    for label, said in (
        ("image-small", "has small.vhd already; an entry made with --overwrite gives it up: nothing was written"),
        ("again-small", "small is on /dev/vda"),
        ("image-other", "other is on /dev/vda"),
    ):
        _choose(folder, label)
        _, last = _deploy(folder, url, is_blank=False)
        _require(last.endswith(said), last)
    with partitions.File(folder / "disk") as disk:
        text = ext.FileSystem(disk, _VOLUME, "the machine's volume").read("/boot/grub/custom.cfg") or b""
    found = [one.title for one in boot_menu.entries(text.decode())]
    _require(found == ["small", "other"], f"the menu has {found}")


def _choose(folder: Path, label: str) -> None:
    """As if somebody had chosen that in the menu."""
    script = folder / "catalog" / "netboot" / "boot.ipxe"
    head, rest = script.read_text().split("\n", 1)
    script.write_text(f"{head}\ngoto {label}\n{rest}")


def _deploy(folder: Path, url: str, *, uefi: bool = False, is_blank: bool = True) -> tuple[float, str]:
    """A machine starts over the network; its last sentence, and when it said that."""
    disk = folder / "disk"
    if is_blank:
        disk.unlink(missing_ok=True)
        with disk.open("wb") as file:
            file.truncate(_DISK)
    own = bare_machine.Machine([(disk, "raw", True)], _MEMORY, uefi=uefi, boot_url=f"{url}/netboot/boot.ipxe")
    begin = time.monotonic()
    told = machine.listen(bare_machine.lines(own, folder, time_s=_DEPLOY_S), "Enter starts")
    said = [line for line in told.lines if line.startswith("hvmgr: ") and "Enter starts" not in line]
    return time.monotonic() - begin, said[-1] if said else "the machine said nothing"


def _start(folder: Path, *, uefi: bool, count: int, url: str | None = None) -> None:
    """The machine starts what it got: over the network, where there is a ``url``, or from its disk."""
    script = None if url is None else f"{url}/netboot/boot.ipxe"
    own = bare_machine.Machine([(folder / "disk", "raw", True)], _MEMORY, uefi=uefi, boot_url=script)
    said = "\n".join(bare_machine.lines(own, folder, time_s=_DEPLOY_S))
    is_so = f"MINI boot={count} root=/dev/mapper/hvmgr-disk1" in said and "MINI lost" not in said
    _require(is_so, f"the machine said {said[-500:]}")


@contextlib.contextmanager
def _damaged(file: Path) -> Iterator[None]:
    file.chmod(0o644)
    with file.open("r+b") as image:
        image.seek(1_000_000)
        byte = image.read(1)
        image.seek(1_000_000)
        image.write(bytes([byte[0] ^ 1]))
        image.flush()
        yield
        image.seek(1_000_000)
        image.write(byte)


def _require(is_so: object, sentence: str) -> None:
    if not is_so:
        raise SystemExit(f"bench: {sentence}")
