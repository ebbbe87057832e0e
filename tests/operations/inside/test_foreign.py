"""What libguestfs gets, places of the same disk, which it reads all at once; and what is made of what it says."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from hvmgr.host import libguestfs
from hvmgr.host.image_export import Link
from hvmgr.operations.inside import foreign, looking
from hvmgr.operations.inside.views import Frozen, Volume
from hvmgr.storage.filesystems.signatures import Kind
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


class Machine:
    """One that sees these arrays, and nothing on its disks."""

    version = "1.0"

    def __init__(self, arrays):
        self._arrays = arrays

    def file_systems(self):
        return dict.fromkeys(self._arrays, "ext4")

    def device(self, name):
        return libguestfs.Device(1 << 20, "", "", self._arrays[name])


def test_arrays_of_one_name_are_two():
    disk = Single()
    whole = Volume(Frozen("disk", (Link(Path("disk"), "raw"),)), None, 0, disk.size, None)
    machine = Machine({"/dev/md127": "data", "/dev/md126": "data"})
    found = foreign._found(machine, {whole: disk}, {"/dev/sda": whole})
    assert {one.logical for one in found if one.logical} == {"md/data", "md126"}


def test_logical_volume_that_its_machine_does_not_see_is_not_told_as_readable():
    """As of two disks that are copies of each other: which of them a volume lies on, nobody knows."""
    disk = Single()
    whole = Volume(Frozen("disk", (Link(Path("disk"), "raw"),)), None, 0, disk.size, Kind.LVM)
    logical = Volume(whole.disk, None, 0, disk.size, Kind.EXT4, logical="vg/lv")
    found = foreign._found(Machine({}), {whole: disk, logical: disk}, {"/dev/sda": whole})
    (told,) = [one for one in found if one.logical]
    assert not looking.is_readable(told)
    assert looking.why_not(told) == "libguestfs sees no file system there"


def test_volume_that_lies_on_what_is_encrypted_is_told_so():
    disk = Single()
    whole = Volume(Frozen("disk", (Link(Path("disk"), "raw"),)), None, 0, disk.size, Kind.LVM, encrypted=True)
    logical = Volume(whole.disk, None, 0, disk.size, Kind.EXT4, logical="md/lv", encrypted=True)
    found = foreign._found(Machine({"/dev/md0": "lv"}), {whole: disk, logical: disk}, {"/dev/sda": whole})
    assert [one.encrypted for one in found] == [True, True]
