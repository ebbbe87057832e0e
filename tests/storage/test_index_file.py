"""The file of the index of files, as SQLite sees it."""

from __future__ import annotations

import sqlite3
import threading
import time

from hvmgr.storage.index_file import IndexFile


def test_who_comes_second_waits_for_who_makes_it(tmp_path):
    """A file without a write-ahead log yet is one that SQLite does not wait for by itself."""
    file = tmp_path / "files.sqlite"
    maker = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    maker.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    threading.Timer(0.4, maker.rollback).start()
    second = IndexFile(file, wait_s=20.0)
    second.make_fit("a-vm", anew=False)
    assert time.monotonic() - started >= 0.4, "it waited"
    second.require_fit("a-vm")
    second.close()
