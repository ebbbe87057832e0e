"""What libguestfs gets: places of the same disk, which it reads all at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from hvmgr.host.image_export import Link
from hvmgr.operations.inside import foreign
from hvmgr.operations.inside.views import Frozen, Volume
from hvmgr.storage.filesystems.window import Window

_SIZE = 64


class Single:
    """A disk that one reader at a time may read: what comes between two halves of an answer belongs to another one."""

    size = 4 * _SIZE

    def __init__(self):
        self.readers = self.most = 0

    def read_into(self, offset, buffer):
        self.readers += 1
        self.most = max(self.most, self.readers)
        time.sleep(0.002)
        buffer[:] = bytes([offset // _SIZE]) * len(buffer)
        self.readers -= 1


def test_places_of_one_disk_are_never_read_at_once():
    disk = Single()
    frozen = Frozen("disk", (Link(Path("disk"), "raw"),))
    places = {
        Volume(frozen, number, number * _SIZE, _SIZE, None): Window(disk, number * _SIZE, _SIZE) for number in range(4)
    }
    guarded = foreign.one_at_a_time(places)
    wrong = []

    def read(place, number):
        buffer = bytearray(_SIZE)
        for _ in range(10):
            place.read_into(0, memoryview(buffer))
            wrong.extend(one for one in buffer if one != number)

    threads = [threading.Thread(target=read, args=(place, one.number)) for one, place in guarded.items()]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert (disk.most, wrong) == (1, [])
    assert [one.size for one in guarded.values()] == [_SIZE] * 4
