"""Gold images and nightly exports as they stand, on three hosts, with HVMGR_ANSIBLE=all: check, run, run again, repair."""

from __future__ import annotations

import pytest


@pytest.fixture
def archive(fleet, tmp_path_factory):
    """A gold export in one file on the controller; its disk holds sevens."""
    gold, file = fleet[0], tmp_path_factory.mktemp("gold") / "gold.tar.zst"
    gold.create("gold")
    gold.write("gold", 7)
    gold.hvmgr("snapshot", "create", "gold", "released")
    gold.hvmgr("export", "gold", "--archive", file)
    gold.hvmgr("vm", "delete", "gold", "--with-disks", "--yes")
    return file


@pytest.mark.timeout(900)  # several playbooks on three hosts
def test_gold_image_to_a_fleet(play, hosts, archive):
    # On the host in the middle somebody has a VM of that name already.
    hosts[1].create("web")
    wanted = {
        "gold_archive": str(archive),
        "gold_export": "{{ place }}/gold/gold",
        "gold_name": "web",
        "gold_group": "libvirt-qemu",
    }
    foreseen = play("hvmgr.hvmgr.gold", "--check", "--diff", **wanted)
    assert foreseen.code == 0, foreseen.out
    make = "Make the VM"
    assert foreseen.changed() == [(host.name, "Make the folder that holds gold") for host in hosts]
    assert len(foreseen.of("Say what a real run would go on with")) == 3
    assert all(not (host.place / "gold").exists() for host in hosts)

    first = play("hvmgr.hvmgr.gold", **wanted)
    assert first.failed() == [("kvm2", make)], first.out
    (refused,) = first.of(make, "kvm2")
    assert refused["error"]["code"] == "Conflict"
    for host in (hosts[0], hosts[2]):
        assert host.holds("web", 7)
        assert host.hvmgr("vm", "show", "web")["origin"]["mode"] == "link"

    hosts[1].hvmgr("vm", "delete", "web", "--with-disks", "--yes")
    foreseen = play("hvmgr.hvmgr.gold", "--check", "--diff", "--limit", "kvm2", **wanted)
    repaired = play("hvmgr.hvmgr.gold", "--limit", "kvm2", **wanted)
    assert foreseen.changed() == repaired.changed() == [("kvm2", make)]
    assert foreseen.of(make)[0]["diff"] == repaired.of(make)[0]["diff"]
    assert hosts[1].holds("web", 7)
    again = play("hvmgr.hvmgr.gold", **wanted)
    assert (again.code, again.changed()) == (0, [])


@pytest.mark.timeout(900)
def test_nightly_exports_with_retention(play, hosts):
    for host in hosts[:2]:
        host.create("web")
    hosts[0].create("db")
    wanted = {"nightly_folder": "{{ place }}/nightly", "nightly_keep": 2}
    folders = [host.place / "nightly" for host in hosts]
    for host, folder in zip(hosts[:2], folders[:2], strict=True):
        host.hvmgr("export", "web", folder / "2026-11-01")
        (folder / "2026-11-02").mkdir()
    hosts[0].hvmgr("import", folders[0] / "2026-11-01" / "web", "--mode", "link", "--name", "linked")
    third = {"nightly_day": "2026-11-03", **wanted}
    two = ("--limit", "kvm1,kvm2")
    foreseen = play("hvmgr.hvmgr.nightly", "--check", "--diff", *two, **third)
    done = play("hvmgr.hvmgr.nightly", *two, **third)
    assert foreseen.changed() == done.changed()
    assert done.code == 0, done.out
    assert sorted(path.name for path in folders[0].iterdir()) == ["2026-11-01", "2026-11-02", "2026-11-03"], (
        "a VM stands on it"
    )
    assert sorted(path.name for path in folders[1].iterdir()) == ["2026-11-02", "2026-11-03"]
    assert sorted(path.name for path in (folders[0] / "2026-11-03").iterdir()) == ["db", "linked", "web"]
    again = play("hvmgr.hvmgr.nightly", *two, **third)
    assert (again.code, again.changed()) == (0, [])
