"""The public API of WIM files: ``Host.wims``. The commands ``wim …`` are built on it.

    with hvmgr.Host.open() as host:
        host.wims.capture("os.vhd", "os.wim")
        host.wims.apply("os.wim", "new.vhd", WimApplyOptions(size=40 << 30))

A WIM is read and written by wimlib's program. Volumes are NTFS in image files: nothing is mounted, and no root is needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import wimlib
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.wim_options import Applied, WimApplyOptions, WimCaptureOptions, WimCompression
from hvmgr.operations.images import changes, disks, making, recognition, sysprep, volumes
from hvmgr.storage import durable, index

if TYPE_CHECKING:
    from hvmgr.host.wimlib import WimImage, WimInfo
    from hvmgr.operations.host import Host

AnyPath = Path | str

_COMPRESSIONS = {
    WimCompression.NONE: ["--compress=none"],
    WimCompression.FAST: ["--compress=XPRESS"],
    WimCompression.MAXIMUM: ["--compress=LZX"],
    WimCompression.SOLID: ["--solid"],
}


class Wims:
    """What can be done with WIM files."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def info(self, path: AnyPath, *, verify: bool = False) -> WimInfo:
        """What is in a WIM; ``verify`` reads all of it and raises Corrupt where a hash is wrong."""
        wim = _named(path)
        found = wimlib.info(wim)
        if verify:
            with volumes.stoppable(self._host) as report:
                wimlib.verify(wim, report)
        return found

    def capture(self, source: AnyPath, wim: AnyPath, options: WimCaptureOptions | None = None) -> WimInfo:
        """An image of a folder, or of an NTFS volume in a disk image, in a new WIM or as one more in an old one.

        The source is only read. The WIM is complete afterwards, or as it was.
        """
        wish, target = options or WimCaptureOptions(), _named(wim)
        there = Path(os.path.realpath(source))
        if not there.exists():
            raise errors.NotFound(f"there is no {source}", path=str(source))
        wimlib.require()
        _require_target(target, wish)
        if there.is_dir():
            self._capture_folder(there, target, wish)
        else:
            self._capture_volume(there, target, wish)
        return wimlib.info(target)

    def apply(self, source: AnyPath, target: AnyPath, options: WimApplyOptions | None = None) -> Applied:
        """An image of a WIM, or a Linux tree, is on a volume of a disk image; with a size on that of a new one.

        Whatever goes wrong, the image is as it was; only a crash while the finished volume is written in leaves it half
        done, and the next command on the image completes it.
        """
        from hvmgr.operations.images import applying

        wish, path = options or WimApplyOptions(), _named(target)
        if wish.size is None and not path.exists():
            changes.complete_about(self._host, path)
            raise errors.NotFound(
                f"there is no {target}", hint="make a new disk with --size, or prepare one: hvmgr image prepare"
            )
        return applying.apply(self._host, Path(source), path, wish)

    def _capture_folder(self, source: Path, wim: Path, wish: WimCaptureOptions) -> None:
        if wish.partition is not None:
            raise errors.UsageError(f"{source} is a folder, and has no partitions", hint="leave --partition out")
        with self._making(wim, wish):
            self._approve(source, wim, wish)
            warning = sysprep.in_folder(source)
            self._write(source, source, wim, wish, None if warning is None else warning.warning(str(source)))

    def _capture_volume(self, path: Path, wim: Path, wish: WimCaptureOptions) -> None:
        changes.complete(self._host, recognition.known_chain(path))
        found = recognition.look(path)
        if found.format is not ImageFormat.VHD:
            recognition.require_whole(found)
        if wish.unix:
            raise errors.UsageError("--unix is for a folder of Linux", hint="leave it out")
        with making.kept_still(self._host, found), self._making(wim, wish):
            with disks.opened(found) as disk:
                volume = volumes.chosen(path, volumes.volumes_of(disk), "ntfs", wish.partition)
            self._approve(path, wim, wish)
            with volumes.working(wim) as place, volumes.stoppable(self._host) as report:
                volumes.copied_out(found, volume, place / "volume", report)
                windows = sysprep.in_volume(place / "volume")
                self._write(place / "volume", path, wim, wish, None if windows is None else windows.warning(str(path)))

    @contextlib.contextmanager
    def _making(self, wim: Path, wish: WimCaptureOptions) -> Iterator[None]:
        """No other command works on this WIM, nor in the folder beside it; it is still what the caller has looked at."""
        with index.making(wim, wait_s=self._host.wait_s):
            _require_target(wim, wish)
            yield

    def _approve(self, source: Path, wim: Path, wish: WimCaptureOptions) -> None:
        what = f"add an image of {source} to {wim}" if wish.append else f"capture {source} into {wim}"
        steps = [image_plan.PrepareWork(what)]
        changes.require_approval(self._host, changes.plan_of("wim capture", f"wim capture of {source}", steps))

    def _write(self, source: Path, named: Path, wim: Path, wish: WimCaptureOptions, warning: str | None) -> None:
        """Made beside the WIM's place, and named when it is whole."""
        name = wish.name or named.name
        words = [
            "--check",
            *(["--unix-data"] if wish.unix else []),
            *([] if wish.append else _COMPRESSIONS[wish.compression]),
        ]
        if warning is not None:
            self._host.reporter.notice(warning)
        with volumes.stoppable(self._host) as report:
            if wish.append:
                with durable.rewriting(wim) as part:
                    durable.copy_file(wim, part)
                    said = wimlib.append(source, part, words, name=name, description=wish.description, report=report)
            else:
                with making.named(wim) as part:
                    said = wimlib.capture(source, part, words, name=name, description=wish.description, report=report)
        for one in said:
            self._host.reporter.notice(one.replace(str(source), str(named)))


def picked(wim: WimInfo, wanted: str | None) -> WimImage:
    """The image that is meant, by index or name; UsageError and NotFound with those that there are."""
    told = ", ".join(f"{one.index} ({one.name})" if one.name else str(one.index) for one in wim.images)
    if wanted is None:
        if len(wim.images) == 1:
            return wim.images[0]
        raise errors.UsageError(f"{wim.path} holds {len(wim.images)} images", hint=f"say which with --image: {told}")
    found = [one for one in wim.images if wanted in (one.name, str(one.index))]
    if not found:
        raise errors.NotFound(f"{wim.path} has no image '{wanted}'", hint=f"it has {told or 'none'}")
    return found[0]


def _named(path: AnyPath) -> Path:
    """The file's own path: links of its folders followed, and its own where it is there."""
    wanted = Path(path)
    return Path(os.path.realpath(wanted)) if wanted.exists() else Path(os.path.realpath(wanted.parent)) / wanted.name


def _require_target(wim: Path, wish: WimCaptureOptions) -> None:
    if not wish.append:
        if wim.exists():
            raise errors.Conflict(
                f"{wim} exists already",
                hint="choose another name, or add an image to it with --append",
            )
        making.require_new(wim)
        return
    found = wimlib.info(wim)
    if found.part[1] > 1:
        raise errors.Unsupported(f"{wim} is one part of a split WIM", hint="join the parts first: wimlib-imagex join")
    if wish.name is not None and any(one.name == wish.name for one in found.images):
        raise errors.Conflict(f"{wim} has an image '{wish.name}' already", hint="give another --name")
    volumes.require_room(wim.parent, wim.stat().st_size, f"a copy of {wim.name}")
