"""libvirt's metadata of its own snapshots, in a real libvirt."""

from __future__ import annotations

import pytest

from hvmgr import errors
from hvmgr.host import libvirt_snapshots
from hvmgr.model import libvirt_snapshot

DISKS_ONLY = 16


@pytest.fixture
def domain(connection, make_xml, make_image):
    return connection.define(make_xml("guest", [("vda", "qcow2", make_image("base.qcow2"))]))


def take(domain, name, flags=DISKS_ONLY):
    domain._handle().snapshotCreateXML(f"<domainsnapshot><name>{name}</name></domainsnapshot>", flags)


def test_parents_come_first(domain):
    for name in ("zero", "apple", "middle"):
        take(domain, name)
    assert [one.name for one in libvirt_snapshots.list_all(domain)] == ["zero", "apple", "middle"]
    assert [one.is_current for one in libvirt_snapshots.list_all(domain)] == [False, False, True]
    assert libvirt_snapshots.names(domain) == ["zero", "apple", "middle"]


def test_forgotten_snapshot_leaves_its_images_and_its_children(domain, folder):
    for name in ("one", "two"):
        take(domain, name)
    files = sorted(folder.iterdir())
    libvirt_snapshots.forget(domain, "one")
    libvirt_snapshots.forget(domain, "one")
    (left,) = libvirt_snapshots.list_all(domain)
    assert libvirt_snapshot.parse(left.xml, source="test").parent is None
    assert sorted(folder.iterdir()) == files


def test_snapshots_go_and_come_back_equal(domain):
    take(domain, "off")
    domain.start()
    take(domain, "running")
    before = libvirt_snapshots.list_all(domain)
    parsed = [libvirt_snapshot.parse(one.xml, source="test") for one in before]
    for one in reversed(parsed):
        libvirt_snapshots.forget(domain, one.name)
    assert libvirt_snapshots.list_all(domain) == []
    for one in parsed:
        libvirt_snapshots.redefine(domain, libvirt_snapshot.build(one), current=one is parsed[-1])
    assert libvirt_snapshots.list_all(domain) == before


def test_snapshot_of_a_domain_that_is_gone(domain):
    domain.undefine()
    with pytest.raises(errors.NotFound):
        libvirt_snapshots.list_all(domain)


def test_bitmaps(domain):
    assert libvirt_snapshots.bitmap_names(domain) == []
    domain.start()
    domain._handle().checkpointCreateXML("<domaincheckpoint><name>backup-1</name></domaincheckpoint>", 0)
    assert libvirt_snapshots.bitmap_names(domain) == ["backup-1"]
