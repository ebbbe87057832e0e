"""A volume that no list of images shows as it is, for another process: a logical one (LVM), one that is encrypted.

What that process has to know is one text, which goes to it by a pipe and nowhere else, for there are keys in it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.host.image_export import Link
from hvmgr.operations.inside import looking
from hvmgr.operations.inside.unlocking import Key
from hvmgr.operations.inside.views import Frozen, Volume
from hvmgr.storage.partitions import Disk


def to_text(disks: Sequence[Frozen], volume: Volume, keys: Sequence[Key]) -> bytes:
    """The volume of these disks, and what opens it."""
    chains = [
        {"name": one.name, "slot": one.slot, "links": [(os.path.abspath(link.path), link.format) for link in one.links]}  # noqa: PTH100
        for one in disks
    ]
    opens = [{"target": key.target, "secrets": [base64.b64encode(one).decode() for one in key.secrets]} for key in keys]
    return json.dumps({"disks": chains, "volume": _name(volume), "keys": opens}).encode()


@contextlib.contextmanager
def opened(text: bytes) -> Iterator[Disk]:
    """The volume's bytes, as long as the block lasts; its images are held as ``views.opened`` holds them."""
    about = json.loads(text)
    disks = [
        Frozen(one["name"], tuple(Link(Path(path), form) for path, form in one["links"]), one["slot"])
        for one in about["disks"]
    ]
    keys = [Key(tuple(base64.b64decode(one) for one in key["secrets"]), key["target"]) for key in about["keys"]]
    with looking.opened(disks, keys=keys) as inside:
        for volume in inside.volumes:
            if _name(volume) == about["volume"]:
                yield inside.bytes_of(volume)
                return
        raise errors.Conflict("what lies on the disks was changed meanwhile", hint="run the command again")


def _name(volume: Volume) -> list[object]:
    return [volume.disk.slot, volume.number, volume.start, volume.size, volume.logical, volume.encrypted]
