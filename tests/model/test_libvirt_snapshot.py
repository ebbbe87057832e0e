"""libvirt's snapshots, read from its XML and written for it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from lxml import etree

from hvmgr import errors
from hvmgr.model import libvirt_snapshot
from hvmgr.model.libvirt_snapshot import Kind, Moment, SnapshotDisk

DOMAIN = """<{tag} type='qemu'><name>web</name><uuid>b48605ed-4370-4cd1-828c-16ac4cf831a2</uuid>
<memory unit='KiB'>65536</memory><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/srv/a.qcow2'/>{more}
<target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/srv/b.raw'/>
<target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='cdrom'><target dev='hda' bus='ide'/><readonly/></disk>
</devices></{tag}>"""
SNAPSHOT = f"""<domainsnapshot>
  <name>before &lt;the&gt; update</name>
  <description>first
line</description>
  <state>running</state>
  <parent><name>root</name></parent>
  <creationTime>1795259365</creationTime>
  <memory snapshot='external' file='/srv/memory'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'><driver type='qcow2'/><source file='/srv/a.s1'/></disk>
    <disk name='vdb' snapshot='no'/>
    <disk name='hda' snapshot='no'/>
  </disks>
  {DOMAIN.format(tag="domain", more="<backingStore/>")}
  {DOMAIN.format(tag="inactiveDomain", more="")}
  <cookie><cpu mode='custom'/></cookie>
</domainsnapshot>"""


@pytest.fixture
def snapshot():
    return libvirt_snapshot.parse(SNAPSHOT, source="test")


def test_everything_is_read(snapshot):
    assert snapshot.name == "before <the> update"
    assert snapshot.description == "first\nline"
    assert snapshot.created == datetime.fromtimestamp(1795259365, UTC)
    assert (snapshot.state, snapshot.parent) == (Moment.RUNNING, "root")
    assert (snapshot.memory, snapshot.memory_file) == (Kind.EXTERNAL, "/srv/memory")
    assert snapshot.disks[0] == SnapshotDisk("vda", Kind.EXTERNAL, "/srv/a.s1", "qcow2")
    assert [disk.kind for disk in snapshot.disks] == [Kind.EXTERNAL, Kind.NO, Kind.NO]
    assert not snapshot.is_internal


def test_frozen_image_is_what_the_domain_had(snapshot):
    assert snapshot.frozen() == {"vda": "/srv/a.qcow2"}
    assert snapshot.went_on() == {"vda": "/srv/a.s1"}


def test_both_configurations_are_domains(snapshot):
    assert snapshot.configuration.root.tag == snapshot.inactive.root.tag == "domain"
    assert snapshot.inactive.to_xml().startswith("<domain ")
    assert "<backingStore/>" in snapshot.configuration.to_xml()
    assert "<backingStore/>" not in snapshot.inactive.to_xml()


def test_written_and_read_again_is_equal(snapshot):
    text = libvirt_snapshot.build(snapshot)
    again = libvirt_snapshot.parse(text, source="test")
    assert again.configuration.to_xml() == snapshot.configuration.to_xml()
    assert again.inactive.to_xml() == snapshot.inactive.to_xml()
    assert libvirt_snapshot.build(again) == text
    for name in ("name", "created", "state", "description", "parent", "memory", "memory_file", "disks", "cookie"):
        assert getattr(again, name) == getattr(snapshot, name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<memory snapshot='external' file='/srv/memory'/>", "<memory snapshot='internal'/>"),
        ("<disk name='vdb' snapshot='no'/>", "<disk name='vdb' snapshot='internal'/>"),
    ],
)
def test_internal_parts_are_seen(old, new):
    assert libvirt_snapshot.parse(SNAPSHOT.replace(old, new), source="test").is_internal


def test_unknown_state_is_no_error():
    text = SNAPSHOT.replace("<state>running<", "<state>pmsuspended<")
    assert libvirt_snapshot.parse(text, source="test").state is Moment.OTHER


def test_old_snapshot_without_a_configuration():
    root = etree.fromstring(SNAPSHOT)
    for tag in ("domain", "inactiveDomain"):
        root.remove(root.find(tag))
    etree.SubElement(etree.SubElement(root, "domain"), "uuid").text = "b48605ed-4370-4cd1-828c-16ac4cf831a2"
    one = libvirt_snapshot.parse(etree.tostring(root), source="test")
    assert one.configuration is None
    assert one.frozen() == {}


@pytest.mark.parametrize(
    "text",
    [
        "<domain/>",
        "<domainsnapshot/>",
        SNAPSHOT.replace("1795259365", "soon"),
        SNAPSHOT.replace("snapshot='external' type", "snapshot='cloud' type"),
        SNAPSHOT[:-20],
    ],
)
def test_anything_else_is_corrupt(text):
    with pytest.raises(errors.Corrupt, match="test"):
        libvirt_snapshot.parse(text, source="test")
