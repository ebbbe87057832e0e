"""Linux kernels that lie on this host: ``/boot/vmlinuz-VERSION`` or ``/lib/modules/VERSION/vmlinuz``, with their modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.storage import kernel_modules

BOOT, MODULES = Path("/boot"), Path("/lib/modules")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and the folder of its modules."""

    image: Path
    modules: Path

    def has(self, names: Sequence[str]) -> bool:
        """Whether all of these are modules of it, or built in."""
        modules = kernel_modules.of_folder(self.modules)
        return all(modules.has(one) or one in modules.built_in for one in names)


def find(needed: Sequence[str]) -> Kernel | None:
    """The newest kernel that this user may read and that has these modules; None without one."""
    found = [one for one in _kernels() if one.has(needed)]
    return max(found, key=lambda one: one.image.stat().st_mtime, default=None)


def require(needed: Sequence[str], what: str) -> Kernel:
    """As ``find``; Unsupported without one."""
    kernel = find(needed)
    if kernel is None:
        raise errors.Unsupported(
            f"this user finds no Linux kernel on this host that knows {what}",
            hint=f"it takes /boot/vmlinuz-VERSION, which has to be readable, with /lib/modules/VERSION and {needed[-1]} in it",
        )
    return kernel


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
