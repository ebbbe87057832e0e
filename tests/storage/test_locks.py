"""The locks of homes and other things."""

from __future__ import annotations

import os
from pathlib import Path

from hvmgr.storage import locks


def test_full_disk_keeps_nobody_out():
    with locks.held(Path("/dev/full"), wait_s=1, what="it"):
        assert locks.holder(Path("/dev/full")) == 0


def test_lock_says_who_has_it(tmp_path):
    (tmp_path / "lock").write_text("123456789012345\n")
    with locks.held(tmp_path / "lock", wait_s=1, what="it"):
        assert locks.holder(tmp_path / "lock") == os.getpid()
    assert locks.holder(tmp_path / "lock") is None
