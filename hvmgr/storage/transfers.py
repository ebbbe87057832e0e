"""Which images of this host are being sent: one record for each transfer, in the host-wide index.

Whoever merges or removes images asks ``users``: what is read by a transfer stays as it is until that ends. A record dies
with its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hvmgr import errors, settings
from hvmgr.storage import durable, images, index

# What looks at processes is imported when there is a transfer to look at.

_NAME = "transfers"


def begin(what: str, paths: Iterable[Path]) -> Path:
    """A transfer of these images begins; the record, for ``end``."""
    from hvmgr.host import pids

    record = index.make_folder(_NAME) / f"{uuid.uuid4()}.json"
    pid = os.getpid()
    facts = {"what": what, "pid": pid, "started": pids.start_time(pid), "images": [str(path) for path in paths]}
    durable.write_file(record, json.dumps(facts).encode())
    return record


def end(record: Path) -> None:
    """It is over."""
    durable.remove(record)


def users(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of these images how the transfers are called that read it."""
    records = list(_alive())
    if not records:
        return {}
    by_identity = {images.identity(Path(path)): path for path in paths if Path(path).exists()}
    found: dict[str, tuple[str, ...]] = {}
    for facts in records:
        for name in facts["images"]:
            ours = by_identity.get(images.identity(Path(name))) if Path(name).exists() else None
            if ours is not None:
                found[ours] = (*found.get(ours, ()), f"the transfer of {facts['what']} by process {facts['pid']}")
    return found


def require_none(paths: Iterable[str]) -> None:
    """Busy when one of these images is being sent."""
    for path, names in users(paths).items():
        raise errors.Busy(f"{path} is needed by {names[0]}", hint="let it end, or stop it", path=path)


def _alive() -> Iterator[dict[str, Any]]:
    folder = settings.index_folder() / _NAME
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(file.read_bytes())
            if _is_alive(facts["pid"], facts["started"]):
                yield facts
            else:
                durable.remove(file)


def _is_alive(pid: int, started: int) -> bool:
    from hvmgr.host import pids

    return pids.is_running(pid, started)
