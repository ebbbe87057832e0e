"""Single disks on the command line: ``disk export``, ``disk import`` and Xen's words for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.operations.rules.conftest import run
from tests.operations.rules.conftest import write as write_image

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "transfer.md").read_text("utf-8")


@pytest.fixture
def there(root):
    return root.parent


def image_of(hvmgr, vm, slot="vda"):
    return hvmgr.ok("disk", "info", vm, slot, "--json").json["chain"][0]["path"]


def raw_of(path, folder):
    run("qemu-img", "convert", "-O", "raw", "-f", "qcow2", path, folder / "raw.part")
    data = (folder / "raw.part").read_bytes()
    (folder / "raw.part").unlink()
    return data


@pytest.fixture
def written(hvmgr, vm):
    """A VM with a snapshot and changes since."""
    slot = hvmgr.ok("vm", "show", vm, "--json").json["now"]["disks"]
    (slot,) = slot
    write_image(image_of(hvmgr, vm, slot), 0x11)
    hvmgr.ok("snapshot", "create", vm, "one")
    write_image(image_of(hvmgr, vm, slot), 0x22, 1 << 20)
    return vm, slot
