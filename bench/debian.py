"""A whole Debian for benches: its root file system as a tar archive, made once by mmdebstrap and kept in the cache.

It is the ordinary system, with systemd. When it is up it checks what it wrote at earlier starts,
writes more, says ``MINI boot=N root=DEVICE`` on the console, and turns itself off, as the small system of the tests does.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from hvmgr import settings
from hvmgr.host import process
from hvmgr.storage import durable, locks

SIZE = 1200 << 20  # of the disk
ARGUMENTS = "console=ttyS0 quiet mitigations=off"
_PACKAGES = "systemd-sysv,udev,kmod,linux-image-cloud-amd64,e2fsprogs"
_BUILD_S = 1800.0

_COUNT = """#!/bin/sh
set -e
cd /var/lib/count
read -r count < count
[ "$count" = 0 ] || sha256sum --check --status sums || echo "MINI lost what was written" > /dev/console
count=$((count + 1))
head -c 20000000 /dev/urandom > "written$count"
sha256sum written* > sums
echo "$count" > count
sync
echo "MINI boot=$count root=$(findmnt --noheadings --output SOURCE /)" > /dev/console
systemctl --no-block poweroff
"""
_UNIT = """[Unit]
Description=count the starts
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/count
[Install]
WantedBy=multi-user.target
"""
_FILES = {
    "usr/local/sbin/count": _COUNT,
    "etc/systemd/system/count.service": _UNIT,
    "etc/default/grub": f'GRUB_CMDLINE_LINUX="{ARGUMENTS}"\n',
    "etc/fstab": "LABEL=root / ext4 defaults 0 1\n",
    "etc/hostname": "bench\n",
    "etc/dracut.conf.d/any.conf": 'hostonly="no"\n',
    "var/lib/count/count": "0\n",
}


def root(initramfs: str) -> Path:
    """The archive; made if need be, which takes minutes and downloads some 150 MB. ``initramfs``: the package that makes that."""
    packages = f"{_PACKAGES},{initramfs}"
    recipe = hashlib.sha256(repr((packages, sorted(_FILES.items()))).encode()).hexdigest()[:12]
    folder = settings.cache_folder() / "bench"
    archive = folder / f"debian-{recipe}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(folder / ".lock", wait_s=_BUILD_S, what="the Debian of the benches"):
        if not archive.exists():
            durable.sweep(folder)
            _build(folder, archive, packages)
    return archive


def _build(folder: Path, archive: Path, packages: str) -> None:
    process.require("mmdebstrap")
    tree = folder / "files"
    for name, text in _FILES.items():
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tree / "usr/local/sbin/count").chmod(0o755)
    hooks = [
        f"--customize-hook=sync-in {tree} /",
        '--customize-hook=chroot "$1" systemctl enable count.service',
        '--customize-hook=chroot "$1" chown -R root:root /usr/local/sbin /var/lib/count',
        '--customize-hook=: > "$1/etc/machine-id"',
    ]
    with durable.appearing(archive) as part:
        command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={packages}", "--format=tar"]
        sources = [
            one
            for one in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
            if one.exists()
        ]
        process.run([*command, *hooks, "bookworm", part, *sources[:1]], timeout_s=_BUILD_S)
    durable.remove_folder(tree)
