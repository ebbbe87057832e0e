"""Machines that start over the network and get a small system out of a catalog: how long that takes, and that it starts afterwards.

As a VHD with a boot entry, started by a BIOS and by UEFI, and written to the whole disk. A download that breaks off or differs has to
leave a disk that starts nothing, and a sentence on the console; whatever is not so ends the bench.
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
_MEMORY = 256 << 20
_VOLUME = 37 << 20  # where it begins on the machine's disk
_DEPLOY_S = 1800.0


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """The bench has a table of its own."""


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
            for expand in (True, False):
                how = "to the whole disk" if expand else "as a VHD with its entry"
                say(f"netboot: {how}")
                catalog.netboot(_options(folder, url, expand=expand))
                seconds, last = _deploy(folder, url)
                _require(last.endswith("small is on /dev/vda"), last)
                results.append(Result(f"from power-on to deployed, {how}", seconds))
                if not expand:
                    _start(folder, uefi=False, count=1)
                    _start(folder, uefi=True, count=2)
            _one_more(say, catalog, folder, url)
            for expand in (False, True):
                say(f"netboot: a damaged image{', to the whole disk' if expand else ''}")
                catalog.netboot(_options(folder, url, expand=expand))
                with _damaged(file):
                    _, last = _deploy(folder, url)
                _require("is not what the catalog says (its checksum)" in last, last)
                with (folder / "disk").open("rb") as disk:
                    _require(not any(disk.read(440)), "the disk starts something")
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


def _one_more(say: Callable[[str], None], catalog: Images, folder: Path, url: str) -> None:
    """What a machine has already stays: a VHD of the same name, and the entry beside which another one comes."""
    say("netboot: a machine that has one already")
    _, last = _deploy(folder, url, is_blank=False)
    _require(last.endswith("has small.vhd already; --overwrite gives it up: nothing was written"), last)
    catalog.add(folder / "os.vhd", name="other")
    catalog.netboot(replace(_options(folder, url), default="other"))
    _, last = _deploy(folder, url, is_blank=False)
    _require(last.endswith("other is on /dev/vda"), last)
    with partitions.File(folder / "disk") as disk:
        text = ext.FileSystem(disk, _VOLUME, "the machine's volume").read("/boot/grub/custom.cfg") or b""
    found = [one.title for one in boot_menu.entries(text.decode())]
    _require(found == ["small", "other"], f"the menu has {found}")


def _deploy(folder: Path, url: str, *, is_blank: bool = True) -> tuple[float, str]:
    """A machine starts over the network; its last sentence, and when it said that."""
    disk = folder / "disk"
    if is_blank:
        disk.unlink(missing_ok=True)
        with disk.open("wb") as file:
            file.truncate(_DISK)
    own = bare_machine.Machine([(disk, "raw", True)], _MEMORY, boot_url=f"{url}/netboot/boot.ipxe")
    begin = time.monotonic()
    told = machine.listen(bare_machine.lines(own, folder, time_s=_DEPLOY_S), "Enter starts")
    said = [line for line in told.lines if line.startswith("hvmgr: ") and "Enter starts" not in line]
    return time.monotonic() - begin, said[-1] if said else "the machine said nothing"


def _start(folder: Path, *, uefi: bool, count: int) -> None:
    own = bare_machine.Machine([(folder / "disk", "raw", True)], _MEMORY, uefi=uefi)
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
