"""Snapshots inside qcow2 images, read, compared and removed through qemu-img and qemu-nbd.

The storage daemon cannot open one: no option of its block layer names an internal snapshot. Only these two programs load
one, read-only, and only qemu-img (or the VM itself) removes one. The image may be held by our own storage daemon meanwhile,
as long as nobody writes to it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process, qemu_errors

_COPY_S = 24 * 3600.0
_START_S = 20.0
_POLL_S = 0.02


def required_space(path: Path, snapshot_id: str) -> int:
    """At most this many bytes take what the image itself holds of a disk as it was."""
    options = ["-U", "-f", "qcow2", "-O", "qcow2", "-l", f"snapshot.id={snapshot_id}", "--output=json"]
    answer = json.loads(_qemu_img("measure", path, options))
    return int(answer["required"])


def extract(path: Path, snapshot_id: str, target: Path, *, backing: tuple[str, str]) -> None:
    """A new qcow2 image of the disk as it was, on ``backing`` (name, format).

    Only what the image itself holds is copied, so that ``backing`` has to show what the image's own parent shows.
    """
    name, fmt = backing
    options = ["-U", "-f", "qcow2", "-O", "qcow2", "-l", f"snapshot.id={snapshot_id}", "-B", name, "-F", fmt]
    try:
        _qemu_img("convert", path, options, target.absolute())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def is_same(path: Path, snapshot_id: str, other: Path) -> bool:
    """Whether a guest would read the same from the snapshot inside ``path`` and from the qcow2 image ``other``."""
    with _served(path, snapshot_id) as uri:
        argv: list[str | Path] = ["qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2", uri, other.absolute()]
        return process.run(argv, timeout_s=_COPY_S, ok_codes=(0, 1)).code == 0


def delete(path: Path, name: str) -> None:
    """One snapshot of this name inside the image is gone; its disk and its other snapshots stay. Conflict when in use."""
    _qemu_img("snapshot", path, ["-d", name])


def _qemu_img(verb: str, path: Path, options: Sequence[str], *more: Path) -> bytes:
    try:
        return process.run(["qemu-img", verb, *options, path.absolute(), *more], timeout_s=_COPY_S).stdout
    except errors.HostFailed as error:
        words = error.facts.get("words")
        if not words:
            raise
        raise qemu_errors.translated(str(words).removeprefix("qemu-img: "), path) from error


@contextlib.contextmanager
def _served(path: Path, snapshot_id: str) -> Iterator[str]:
    """An NBD address of the disk as it was, read-only."""
    with tempfile.TemporaryDirectory(prefix="hvmgr-") as folder:
        socket = Path(folder) / "nbd"
        name = str(path.absolute()).replace(",", ",,")  # a comma inside these options is written twice
        image = f"driver=qcow2,file.driver=file,file.filename={name}"
        argv = ["qemu-nbd", "-r", "-t", "-k", str(socket), "-l", f"snapshot.id={snapshot_id}", "--image-opts"]
        with process.spawned([*argv, f"{image},force-share=on"]) as program:
            deadline = time.monotonic() + _START_S
            while not socket.exists():
                if program.poll() is not None or time.monotonic() > deadline:
                    raise qemu_errors.translated(program.stderr_text().removeprefix("qemu-nbd: ").strip(), path)
                time.sleep(_POLL_S)
            yield f"nbd+unix:///?socket={socket}"
