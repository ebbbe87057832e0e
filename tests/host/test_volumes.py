"""Which volume a file lies on, as findmnt says it too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hvmgr.host import volumes


@pytest.mark.parametrize("path", ["tmp_path", "/proc/self/status", "/dev/null"])
def test_says_what_findmnt_says(path, tmp_path, require_program):
    where = tmp_path if path == "tmp_path" else Path(path).resolve()
    command = [require_program("findmnt"), "--noheadings", "--raw", "--output", "TARGET,FSTYPE", "--target", where]
    target, kind = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1].split()
    found = volumes.of(where)
    assert (str(found.folder), found.type) == (target, kind)


@pytest.mark.parametrize(
    ("device", "stacked"),
    [("/dev/sda1", False), ("/dev/nvme0n1p2", False), ("/dev/vda", False), ("/dev/dm-3", True), ("/dev/md127", True),
     ("/dev/loop0p1", True), ("/dev/nbd0", True)],
)  # fmt: skip
def test_devices_that_are_made_of_others_are_known(device, stacked):
    assert volumes.is_stacked(device) is stacked
