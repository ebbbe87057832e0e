"""Linux kernels that lie on this host, with the modules that a machine of our own needs, in the order in which they load.

A kernel is ``/boot/vmlinuz-VERSION`` or ``/lib/modules/VERSION/vmlinuz``. What each module needs says ``modules.dep``, what is part
of the kernel ``modules.builtin`` (depmod(8)).
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

BOOT, MODULES = Path("/boot"), Path("/lib/modules")
_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and the folder of its modules."""

    image: Path
    modules: Path

    def has(self, names: Sequence[str]) -> bool:
        """Whether all of these are modules of it, or built in."""
        there = {*_files(self), *_built_in(self)}
        return all(one in there for one in names)


def find(needed: Sequence[str]) -> Kernel | None:
    """The newest kernel that this user may read and that has these modules; None without one."""
    found = [one for one in _kernels() if one.has(needed)]
    return max(found, key=lambda one: one.image.stat().st_mtime, default=None)


def load_order(kernel: Kernel, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    """The modules, each with its bytes, behind those that it needs; without what is built in or not there."""
    files, order = _files(kernel), dict[str, None]()
    for name in wanted:
        for one in _with_needed(name, files):
            order.setdefault(one)
    return [(name, _read(kernel.modules / files[name][0])) for name in order]


def _kernels() -> Iterator[Kernel]:
    if not MODULES.is_dir():
        return
    for folder in MODULES.iterdir():
        for image in (BOOT / f"vmlinuz-{folder.name}", folder / "vmlinuz"):
            if (folder / "modules.dep").is_file() and _is_readable(image):
                yield Kernel(image, folder)
                break


def _is_readable(image: Path) -> bool:
    try:
        with image.open("rb"):
            return True
    except OSError:
        return False


def _files(kernel: Kernel) -> dict[str, tuple[str, list[str]]]:
    """Each module's file, and the names of those that it needs."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        file, _, needed = line.partition(":")
        found[_name(file)] = (file, [_name(one) for one in needed.split()])
    return found


def _built_in(kernel: Kernel) -> set[str]:
    file = kernel.modules / "modules.builtin"
    return {_name(line) for line in file.read_text().splitlines()} if file.is_file() else set()


def _with_needed(name: str, files: dict[str, tuple[str, list[str]]]) -> Iterator[str]:
    if name in files:
        for one in reversed(files[name][1]):  # the last one named loads first
            yield from (found for found in (one,) if found in files)
        yield name


def _name(file: str) -> str:
    return Path(file).name.partition(".")[0].replace("-", "_")


def _read(file: Path) -> bytes:
    raw = file.read_bytes()
    if file.suffix == ".xz":
        return lzma.decompress(raw)
    if file.suffix == ".gz":
        return gzip.decompress(raw)
    if file.suffix == ".zst":
        process.require("zstd")
        return process.run(["zstd", "-dcq", file], timeout_s=_LIMIT_S).stdout
    return raw


def require(needed: Sequence[str], what: str) -> Kernel:
    """As ``find``; Unsupported without one."""
    kernel = find(needed)
    if kernel is None:
        raise errors.Unsupported(
            f"this user finds no Linux kernel on this host that knows {what}",
            hint=f"it takes /boot/vmlinuz-VERSION, which has to be readable, with /lib/modules/VERSION and {needed[-1]} in it",
        )
    return kernel
