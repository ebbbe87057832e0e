"""``hvmgr mount`` while the VM runs: a snapshot of a guest that writes to an ext4 all the time, and so has a journal to replay."""

from __future__ import annotations

import pytest

import hvmgr
from hvmgr.storage.filesystems import reader
from tests.operations.images import attaching as help_
from tests.operations.images import mounting

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


def test_snapshot_of_a_guest_that_writes(agents, connection, tmp_path):
    help_.skip_where_impossible()
    machine = agents.make(connection.uri)
    at = tmp_path / "at"
    at.mkdir()
    with help_.taken_down(), mounting.space() as space:
        options = ["-c", connection.uri, "--root", machine.host.root]
        assert "has no snapshot" in space.fails(*options, "mount", machine.vm.name, at, code=4)
        snapshot = machine.vm.create_snapshot("one", type=hvmgr.SnapshotType.DISK_ONLY)
        (image,) = snapshot.disks.values()
        before = mounting.hashes(machine.layout.home)[mounting.Path(image)]
        one = space.hvmgr(*options, "mount", machine.vm.name, at)["mount"]
        assert "runs: this is its latest snapshot 'one'" in space.said
        assert "journal is replayed in a throw-away image" in space.said
        assert one["file_system"] == "ext4"
        number = int(space.sh(f"cat {at}/number"))
        assert number > 0
        with machine.vm.look_inside(snapshot="one") as inside:
            browser = inside.choose(b"/number")
            read = reader.whole(browser.content(browser.find(b"/number")), 100)
        assert int(read) == number, "our replay of the journal is not the kernel's"
        machine.run_for(1)
        machine.check()
        assert int(space.sh(f"cat {at}/number")) == number, "it is the snapshot's, whatever the guest writes"
        space.hvmgr(*options, "unmount", at)
        assert mounting.hashes(machine.layout.home)[mounting.Path(image)] == before
        snapshot.delete()  # the running VM merges it: nothing holds it any more
        machine.run_for(1)
        machine.check()
        assert help_.is_clean()
