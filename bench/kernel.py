"""A whole Linux kernel for libguestfs, on hosts that have none: Debian's for cloud guests, unpacked once and kept in the cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hvmgr import settings
from hvmgr.faces import guest
from hvmgr.host import process
from hvmgr.storage import durable, locks

_BUILD_S = 600.0
_PROGRAM_S = 120.0


def environment(folder: Path | None = None) -> Mapping[str, str]:
    """What libguestfs has to be told; nothing on a host that has a kernel of its own. 30 MB are downloaded for the first one.

    Its own system is built in ``folder``, by default in the cache.
    """
    boot, modules = Path("/boot"), Path("/lib/modules")
    folder = settings.cache_folder() / "bench" if folder is None else folder
    if any((boot / f"vmlinuz-{one.name}").exists() for one in (modules.iterdir() if modules.is_dir() else ())):
        return {}
    package, version = guest.kernel_package()
    place = folder / f"kernel-{version}"
    durable.make_folder(folder, mode=0o755)
    with locks.held(folder / ".lock", wait_s=_BUILD_S, what="the kernel"):
        if not place.exists():
            durable.sweep(folder)
            part = folder / f"{durable.TEMPORARY}kernel"
            durable.make_folder(part, mode=0o755)
            files = guest.unpacked(package, part / "package")
            name = next((files / "lib/modules").iterdir()).name
            process.run(["depmod", "-b", files, name], timeout_s=_PROGRAM_S)
            durable.rename(part, place)
    if not modules.is_dir():
        modules.mkdir()  # libguestfs wants it to be there, whatever it is told
    files = place / "package/files"
    name = next((files / "lib/modules").iterdir()).name
    return {
        "SUPERMIN_KERNEL": os.fspath(files / f"boot/vmlinuz-{name}"),
        "SUPERMIN_MODULES": os.fspath(files / f"lib/modules/{name}"),
        "LIBGUESTFS_CACHEDIR": os.fspath(folder),
    }
