from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from hvmgr import errors
from hvmgr.keeping import Keep
from hvmgr.model import configuration
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import DiskRecord, Metadata, SavedState, SnapshotRecord, SnapshotType
from hvmgr.model.policy import Origin, Policy, Recovery, SnapshotDefault, parse_schedule

XML = """\
<!-- kept: before the root -->
<domain xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0" type="kvm" id="7">
  <name>web</name>
  <uuid>0C9F1A3E-1111-4222-8333-444455556666</uuid>
  <genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://debian.org/debian/12"/>
    </libosinfo:libosinfo>
  </metadata>
  <memory unit="MiB">512</memory>
  <currentMemory unit="MiB">256</currentMemory>
  <vcpu placement="static" current="1">4</vcpu>
  <sysinfo type="smbios">
    <system>
      <entry name="uuid">0c9f1a3e-1111-4222-8333-444455556666</entry>
    </system>
  </sysinfo>
  <os>
    <type arch="x86_64" machine="pc-q35-7.2">hvm</type>
    <loader readonly="yes" type="pflash">/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram template="/usr/share/OVMF/OVMF_VARS_4M.fd">/vm/web_VARS.fd</nvram>
  </os>
  <unheard-of future="yes"><!-- kept: inside --><deep/>mixed</unheard-of>
  <devices>
    <disk type="file" device="disk" snapshot="external">
      <driver name="qemu" type="qcow2" cache="none" discard="unmap"/>
      <source file="/vm/a.qcow2" index="3">
        <seclabel model="dac" relabel="no"/>
      </source>
      <backingStore type="file" index="2">
        <format type="qcow2"/>
        <source file="/vm/base.qcow2"/>
        <backingStore/>
      </backingStore>
      <mirror type="file" job="copy"><source file="/vm/copy" index="9"/></mirror>
      <target dev="vda" bus="virtio"/>
      <serial>WD-1</serial>
      <alias name="ua-root"/>
    </disk>
    <disk type="block" device="disk">
      <source dev="/dev/vg/data" index="4" startupPolicy="optional"/>
      <backingStore/>
      <target dev="vdb" bus="virtio"/>
      <shareable/>
    </disk>
    <disk type="network" device="disk">
      <driver name="qemu" type="raw"/>
      <source protocol="rbd" name="pool/image"><host name="ceph"/></source>
      <target dev="vdc" bus="virtio"/>
      <transient/>
    </disk>
    <disk type="file" device="disk">
      <source file="/vm/ro.img"/>
      <target dev="vdd"/>
      <readonly/>
    </disk>
    <disk type="block" device="cdrom">
      <source dev="/dev/sr0" index="1"/>
      <backingStore/>
      <target dev="sda" bus="sata"/>
      <readonly/>
    </disk>
    <disk type="file" device="disk">
      <source file="/vm/secret.qcow2"><encryption format="luks"/><slices><slice type="storage"/></slices></source>
      <target dev="vde"/>
    </disk>
    <disk type="file" device="disk" snapshot="no">
      <source file="/vm/scratch.img"/>
      <target dev="vdf"/>
    </disk>
    <interface type="network">
      <mac address="52:54:00:AA:bb:01"/>
      <source network="default" portid="x" bridge="virbr0"/>
      <model type="virtio"/>
    </interface>
    <interface type="bridge">
      <mac address="52:54:00:aa:bb:02"/>
      <source bridge="br0"/>
    </interface>
    <interface type="direct">
      <mac address="52:54:00:aa:bb:03"/>
      <source dev="eth0" mode="bridge"/>
    </interface>
    <interface type="user">
      <mac address="52:54:00:aa:bb:04"/>
    </interface>
    <tpm model="tpm-crb">
      <backend type="emulator" version="2.0" persistent_state="yes"/>
    </tpm>
  </devices>
  <qemu:commandline>
    <qemu:arg value="-no-hpet"/>
  </qemu:commandline>
</domain>
<!-- kept: behind the root -->
"""

MINIMAL = "<domain type='qemu'><name>x</name><uuid>u</uuid><memory>1024</memory><os><type>hvm</type></os></domain>"

WHEN = datetime(2026, 11, 21, 13, 3, 5, 250000, tzinfo=UTC)
FACTS = Metadata(
    home=Path("/var/lib/hvmgr/web"),
    uri="qemu:///system",
    created=WHEN,
    parent="aaaa",
    disks=(DiskRecord("vda", "d1", "i1"), DiskRecord("vdb", "d2")),
    snapshot=SnapshotRecord(
        id="s1",
        name='a/b "quoted" <é>',
        created=WHEN,
        type=SnapshotType.DISK_ONLY,
        state=SavedState.PAUSED,
        parent="aaaa",
        automatic=Origin.SCHEDULE,
        notes="first line\n  second & last ",
    ),
    policy=Policy(
        SnapshotDefault.PRODUCTION, automatic=True, keep=Keep(daily=3), schedule=parse_schedule("daily@02:30"), since=WHEN,
        recovery=Recovery("s1"),
    ),
)  # fmt: skip


def make(xml: str = XML) -> Configuration:
    return configuration.parse(xml, source="web.xml")


def foreign(config: Configuration) -> list[str]:
    """What hvmgr does not know, as text, in the order of the XML."""
    root = config.root
    found = [
        *root.getroottree().xpath("//comment()"),
        *root.xpath(
            "unheard-of | metadata/*[namespace-uri()!='urn:hvmgr:vm:1'] | os/loader | *[local-name()='commandline']"
        ),
        *root.xpath("devices/disk/alias | devices/interface/source | devices/tpm"),
    ]
    return [etree.tostring(item, with_tail=False, encoding="unicode") for item in found]


def test_text_round_trips_byte_for_byte():
    assert make().to_xml() == XML
    assert configuration.parse(make().to_xml(), source="x").to_xml() == XML


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1"])
def test_bytes_are_read_in_their_encoding(encoding):
    declared = encoding.removesuffix("-sig")
    text = f"<?xml version='1.0' encoding='{declared}'?>\n" + MINIMAL.replace("<name>x", "<name>é")
    assert configuration.parse(text.encode(encoding), source="x").name == "é"


def test_str_is_read_whatever_it_declares():
    assert make("<?xml version='1.0' encoding='UTF-16'?>" + MINIMAL).name == "x"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "web.xml, line 1"),
        ("<domain>\n  <name>x</nam></domain>", "web.xml, line 2, column"),
        ("<domain>\udc80</domain>", "web.xml, line 1"),
        ("<pool/>", "web.xml, line 1: <pool> where <domain> was expected"),
        ("<!DOCTYPE domain><domain/>", "DOCTYPE"),
        ("<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/hostname'>]><domain><name>&e;</name></domain>", "DOCTYPE"),
        ("<domain>" + "<a>" * 5000 + "</a>" * 5000 + "</domain>", "line 1"),
    ],
    ids=["empty", "not closed", "not utf-8", "other root", "doctype", "entity", "too deep"],
)
def test_what_is_no_domain_is_refused_with_its_place(text, words):
    with pytest.raises(errors.Corrupt, match=words) as caught:
        make(text)
    assert caught.value.facts["file"] == "web.xml"


def test_entities_never_grow():
    levels = "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 12))
    with pytest.raises(errors.Corrupt):
        make(f"<!DOCTYPE d [<!ENTITY a0 'x'>{levels}]><domain id='&a11;'><name>&a11;</name></domain>")


def test_each_field_is_read():
    config = make()
    assert config.name == "web"
    assert config.uuid == "0c9f1a3e-1111-4222-8333-444455556666"
    assert config.genid == "43dc0cf8-809b-4adb-9bea-a9abb5f3d90e"
    assert (config.memory, config.vcpus) == (512 << 20, 4)
    assert (config.type, config.machine, config.arch) == ("kvm", "pc-q35-7.2", "x86_64")
    assert config.nvram == Path("/vm/web_VARS.fd")
    assert config.has_tpm
    assert config.has_persistent_tpm
    assert config.metadata() is None


def test_what_is_absent_reads_as_absent():
    config = make(MINIMAL)
    assert (config.genid, config.machine, config.arch, config.nvram) == (None, None, None, None)
    assert (config.vcpus, config.has_tpm, config.has_persistent_tpm) == (1, False, False)
    assert (config.disks(), config.nics()) == ((), ())


@pytest.mark.parametrize("tag", ["name", "uuid", "memory"])
def test_what_every_domain_has_is_missed(tag):
    config = make(MINIMAL)
    config.root.remove(config.root.find(tag))
    with pytest.raises(errors.Corrupt, match=f"no <{tag}>"):
        getattr(config, tag)


@pytest.mark.parametrize(
    ("xml", "size"),
    [
        ("<memory>3</memory>", 3072),
        ("<memory unit='b'>3</memory>", 3),
        ("<memory unit='bytes'>3</memory>", 3),
        ("<memory unit='KB'>3</memory>", 3000),
        ("<memory unit='k'> 3 </memory>", 3072),
        ("<memory unit='GiB'>3</memory>", 3 << 30),
        ("<memory unit='G'>3</memory>", 3 << 30),
        ("<memory unit='TB'>3</memory>", 3 * 10**12),
        ("<memory unit='furlong'>3</memory>", None),
        ("<memory>much</memory>", None),
    ],
)
def test_memory_units_are_those_of_libvirt(xml, size):
    config = make(MINIMAL.replace("<memory>1024</memory>", xml))
    if size is not None:
        assert config.memory == size
        return
    with pytest.raises(errors.Corrupt, match="line 1"):
        _ = config.memory


def test_disks_are_read_with_all_fields():
    first = make().disks()[0]
    assert first == configuration.Disk(
        slot="vda",
        device="disk",
        type="file",
        source="/vm/a.qcow2",
        format="qcow2",
        readonly=False,
        shareable=False,
        transient=False,
        bus="virtio",
        serial="WD-1",
        snapshot="external",
        image_parts=(),
    )
    facts = {disk.slot: disk for disk in make().disks()}
    assert facts["vdb"].shareable
    assert facts["vdb"].source == "/dev/vg/data"
    assert facts["vdc"].transient
    assert facts["vdc"].source == "pool/image"
    assert facts["vdd"].readonly
    assert facts["vde"].image_parts == ("encryption", "slices")
    assert facts["sda"].is_removable
    assert make().find_disk("sda") == facts["sda"]
    assert make().find_disk("sdz") is None


def test_writable_local_hard_disks_take_part_in_snapshots():
    assert [disk.slot for disk in make().disks() if disk.takes_part] == ["vda", "vdb", "vde"]


def test_nics_are_read_by_kind():
    assert [(nic.mac[-2:], nic.type, nic.source, nic.model) for nic in make().nics()] == [
        ("01", "network", "default", "virtio"),
        ("02", "bridge", "br0", None),
        ("03", "direct", "eth0", None),
        ("04", "user", None, None),
    ]


def test_pointing_a_disk_elsewhere_forgets_the_old_chain():
    config = make()
    config.set_disk_source("vda", Path("/vm/child.qcow2"), "qcow2")
    disk = config.root.find("devices/disk")
    assert config.find_disk("vda").source == "/vm/child.qcow2"
    assert disk.find("backingStore") is None
    assert disk.find("mirror") is None
    assert disk.find("source").get("index") is None
    assert disk.find("source/seclabel") is not None
    assert disk.find("driver").attrib == {"name": "qemu", "type": "qcow2", "cache": "none", "discard": "unmap"}


def test_pointing_a_device_to_a_file_changes_its_type():
    config = make()
    config.set_disk_source("vdb", Path("/vm/b.qcow2"), "qcow2")
    config.set_disk_source("vdc", Path("/vm/c.qcow2"), "qcow2")
    found = {disk.slot: disk for disk in config.disks()}
    assert (found["vdb"].type, found["vdb"].source, found["vdb"].format) == ("file", "/vm/b.qcow2", "qcow2")
    assert (found["vdc"].type, found["vdc"].source, found["vdc"].format) == ("file", "/vm/c.qcow2", "qcow2")
    sources = config.root.findall("devices/disk/source")
    assert sources[1].attrib == {"file": "/vm/b.qcow2", "startupPolicy": "optional"}
    assert (dict(sources[2].attrib), len(sources[2])) == ({"file": "/vm/c.qcow2"}, 0)


def test_an_encrypted_disk_is_never_pointed_elsewhere():
    with pytest.raises(errors.Unsupported, match="encryption"):
        make().set_disk_source("vde", Path("/vm/e.qcow2"), "qcow2")


def test_unknown_slot_is_answered_with_the_known_ones():
    with pytest.raises(errors.NotFound) as caught:
        make().set_disk_source("hda", Path("/x"), "raw")
    assert "vda, vdb" in caught.value.hint


def test_stripping_leaves_no_trace_of_any_chain():
    config = make()
    config.strip_backing_chains()
    assert config.root.xpath("//backingStore | //mirror | //disk//@index") == []


def test_ejecting_empties_a_drive_of_any_kind():
    config = make()
    config.eject("sda")
    assert (config.find_disk("sda").source, config.find_disk("sda").type) == (None, "file")
    with pytest.raises(errors.UsageError, match="hard disk"):
        config.eject("vda")


def test_an_empty_drive_can_be_filled():
    config = make()
    config.eject("sda")
    config.set_disk_source("sda", Path("/iso/a.iso"), "raw")
    assert (config.find_disk("sda").source, config.find_disk("sda").format) == ("/iso/a.iso", "raw")


def test_identity_is_changed_everywhere():
    config = make()
    config.set_name("copy")
    config.set_uuid("99999999-1111-4222-8333-444455556666")
    config.set_genid("g2")
    config.set_nvram(Path("/vm/copy_VARS.fd"))
    config.set_mac("52:54:00:aa:BB:01", "52:54:00:00:00:09")
    assert (config.name, config.genid, config.nvram) == ("copy", "g2", Path("/vm/copy_VARS.fd"))
    assert "0c9f1a3e" not in config.to_xml().lower()
    assert config.nics()[0].mac == "52:54:00:00:00:09"
    with pytest.raises(errors.NotFound):
        config.set_mac("52:54:00:aa:bb:01", "52:54:00:00:00:0a")


def test_size_of_the_machine_is_changed():
    config = make()
    config.set_memory((1 << 30) + 1)
    config.set_vcpus(2)
    assert (config.memory, config.vcpus) == ((1 << 30) + 1024, 2)
    assert config.root.find("currentMemory").attrib == {"unit": "KiB"}
    assert config.root.find("vcpu").attrib == {"placement": "static"}


def test_generation_id_is_added_only_when_asked():
    config = make(MINIMAL)
    config.set_genid("g")
    assert config.genid is None
    config.set_genid("g", add=True)
    assert config.genid == "g"


def test_nvram_is_set_in_the_spelling_that_is_there():
    config = make(MINIMAL.replace("</os>", "<nvram type='file' template='t'><source file='/a'/></nvram></os>"))
    assert config.nvram == Path("/a")
    config.set_nvram(Path("/b"))
    assert config.nvram == Path("/b")
    assert config.root.find("os/nvram").text is None
    fresh = make(MINIMAL)
    fresh.set_nvram(Path("/c"))
    assert fresh.nvram == Path("/c")


def test_control_characters_are_refused():
    with pytest.raises(errors.UsageError, match="control character"):
        make().set_name("a\x07b")


EDITS = {
    "name": lambda config: config.set_name("n"),
    "uuid": lambda config: config.set_uuid("u"),
    "genid": lambda config: config.set_genid("g", add=True),
    "memory": lambda config: config.set_memory(1 << 20),
    "vcpus": lambda config: config.set_vcpus(9),
    "nvram": lambda config: config.set_nvram(Path("/n")),
    "disk": lambda config: config.set_disk_source("vda", Path("/n"), "raw"),
    "strip": lambda config: config.strip_backing_chains(),
    "eject": lambda config: config.eject("sda"),
    "mac": lambda config: config.set_mac(config.nics()[1].mac, "52:54:00:00:00:01"),
    "metadata": lambda config: config.set_metadata(FACTS),
}


@given(st.lists(st.sampled_from(sorted(EDITS)), max_size=12))
def test_foreign_parts_survive_every_edit(names):
    config = make()
    before = foreign(config)
    for name in names:
        EDITS[name](config)
    assert foreign(config) == before
    text = config.to_xml()
    assert make(text).to_xml() == text


def test_every_setter_is_among_the_edits():
    setters = {name for name in dir(Configuration) if name.startswith(("set_", "strip_")) or name == "eject"}
    assert len(setters) == len(EDITS)


def test_a_copy_is_independent():
    config = make()
    other = config.copy()
    assert other.to_xml() == config.to_xml()
    other.set_name("other")
    assert config.name == "web"


@pytest.mark.parametrize("xml", [XML, MINIMAL], ids=["full", "minimal"])
def test_metadata_round_trips_and_leaves_without_trace(xml):
    config = make(xml)
    config.set_metadata(FACTS)
    again = make(config.to_xml())
    assert again.metadata() == FACTS
    assert configuration.same(again.without_metadata().to_xml(), xml)
    assert again.metadata() == FACTS


def test_metadata_lies_neatly_beside_that_of_others():
    config = make()
    config.set_metadata(FACTS)
    assert '    </libosinfo:libosinfo>\n    <hvmgr:vm xmlns:hvmgr="urn:hvmgr:vm:1" format="1"' in config.to_xml()
    assert '\n      <hvmgr:disk slot="vda" id="d1" image="i1"/>\n' in config.to_xml()
    assert "\n    </hvmgr:vm>\n  </metadata>\n" in config.to_xml()
    assert config.without_metadata().to_xml() == XML


def test_metadata_is_replaced_but_unknown_parts_stay():
    config = make()
    config.set_metadata(FACTS)
    element = config.root.find("metadata/{urn:hvmgr:vm:1}vm")
    element.set("later", "1")
    etree.SubElement(element, "{urn:hvmgr:vm:1}note")
    bare = Metadata(home=Path("/h"), uri="u", created=WHEN)
    config.set_metadata(bare)
    again = make(config.to_xml())
    assert again.metadata() == bare
    assert element.get("later") == "1"
    assert [etree.QName(child).localname for child in element] == ["note"]


@given(st.text(min_size=1, max_size=100), st.text(max_size=50))
def test_any_name_and_note_is_kept_or_refused(name, notes):
    record = SnapshotRecord(id="s", name=name, created=WHEN, notes=notes)
    config = make(MINIMAL)
    try:
        config.set_metadata(Metadata(home=Path("/h"), uri="u", created=WHEN, snapshot=record))
    except errors.UsageError:
        assert not (name + notes).isprintable()
        return
    assert make(config.to_xml()).metadata().snapshot == record


@pytest.mark.parametrize(
    ("attributes", "kind", "words"),
    [
        ("format='2' home='/h' uri='u' created='2026-01-01T00:00:00Z'", errors.Unsupported, "newer hvmgr"),
        (
            "home='/h' uri='u' created='2026-01-01T00:00:00Z'",
            errors.Corrupt,
            "web.xml, line 1: hvmgr's <vm> has no format",
        ),
        ("format='1' uri='u' created='2026-01-01T00:00:00Z'", errors.Corrupt, "has no home"),
        ("format='1' home='/h' uri='u' created='yesterday'", errors.Corrupt, "created='yesterday'"),
    ],
    ids=["newer", "no format", "no home", "wrong time"],
)
def test_metadata_that_is_not_understood_is_refused(attributes, kind, words):
    xml = MINIMAL.replace("<os>", f"<metadata><h:vm xmlns:h='urn:hvmgr:vm:1' {attributes}/></metadata><os>")
    with pytest.raises(kind, match=words):
        make(xml).metadata()


@pytest.mark.parametrize(
    "change",
    [
        lambda xml: xml,
        lambda xml: xml.replace("<os>", "<!-- <hvmgr:vm/> --><os>"),
        lambda xml: xml.replace("<hvmgr:", "<h:").replace("</hvmgr:", "</h:").replace("xmlns:hvmgr", "xmlns:h"),
        lambda xml: xml.replace(">x</name>", ">x</name><title>&lt;hvmgr:vm&gt;</title>"),
        lambda xml: "<?xml version='1.0' encoding='utf-8'?>" + xml,
    ],
    ids=["as written", "comment", "prefix", "escaped", "declaration"],
)
def test_listing_reads_the_same_metadata_as_a_full_parse(change):
    config = make(MINIMAL)
    config.set_metadata(FACTS)
    facts = configuration.metadata_of(change(config.to_xml()).encode(), source="web.xml")
    assert facts == configuration.parse(change(config.to_xml()), source="web.xml").metadata()
    assert facts is not None


def test_listing_finds_no_metadata_in_a_foreign_file():
    assert configuration.metadata_of(MINIMAL.encode(), source="web.xml") is None


@pytest.mark.parametrize("kind", ["none", "production-only"])  # the latter is only ever asked for
def test_listing_names_the_line_in_the_whole_file(kind):
    config = make(MINIMAL)
    config.set_metadata(FACTS)
    broken = config.to_xml().replace('type="disk-only"', f'type="{kind}"').encode()
    line = broken[: broken.index(b"<hvmgr:snapshot")].count(b"\n") + 1
    with pytest.raises(errors.Corrupt, match=f"line {line}: "):
        configuration.metadata_of(broken, source="web.xml")


def test_listing_sees_a_file_that_was_cut_short():
    config = make(MINIMAL)
    config.set_metadata(FACTS)
    with pytest.raises(errors.Corrupt):
        configuration.metadata_of(config.to_xml().encode()[:-12], source="web.xml")


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        (lambda xml: xml, True),
        (lambda xml: xml.replace(' id="7"', ""), True),
        (lambda xml: xml.replace("\n", "\n\n  "), True),
        (lambda xml: xml.replace("<!-- kept: inside -->", ""), True),
        (lambda xml: xml.replace('dev="vdb" bus="virtio"', "bus='virtio' dev='vdb'"), True),
        (lambda xml: xml.replace("xmlns:qemu", "xmlns:q").replace("<qemu:", "<q:").replace("</qemu:", "</q:"), True),
        (lambda xml: xml.replace("<deep/>", "<deep/><deep/>"), False),
        (lambda xml: xml.replace(">4</vcpu>", ">5</vcpu>"), False),
        (lambda xml: xml.replace('future="yes"', 'future="no"'), False),
    ],
    ids=["itself", "live id", "space", "comment", "order", "prefix", "element", "text", "attribute"],
)
def test_same_sees_content_and_nothing_else(change, equal):
    assert configuration.same(XML, change(XML)) is equal


def test_same_sees_controllers_in_any_order_and_what_they_are():
    one, two = (f'<controller type="pci" index="{number}" model="pcie-root-port"/>' for number in (13, 14))
    xml, sorted_xml = (XML.replace("</devices>", f"{both}</devices>") for both in (two + one, one + two))
    assert configuration.same(xml, sorted_xml)
    assert not configuration.same(xml, sorted_xml.replace('index="13"', 'index="15"'))


def test_origin_that_is_not_known_is_nobodys_to_remove():
    one = make(MINIMAL)
    one.set_metadata(FACTS)
    for word in ("yes", "rhyme", ""):
        changed = configuration.parse(one.to_xml().replace('automatic="schedule"', f'automatic="{word}"'), source="x")
        assert changed.metadata().snapshot.automatic is None


def test_policy_that_says_nothing_leaves_no_trace():
    one = make(MINIMAL)
    one.set_metadata(dataclasses.replace(FACTS, policy=Policy()))
    assert "policy" not in one.to_xml()
    one.set_metadata(FACTS)
    one.set_metadata(dataclasses.replace(FACTS, policy=Policy()))
    assert "policy" not in one.to_xml()
