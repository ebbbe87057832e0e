"""Maps: the longest prefix of whole names wins, cards are plugged elsewhere, and nothing is ignored in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.model import configuration, maps
from hvmgr.model.maps import Maps, Used

XML = """<domain type='kvm'>
  <name>web</name>
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <os><type>hvm</type><kernel>/boot/vmlinuz</kernel><loader>/usr/share/OVMF/code.fd</loader></os>
  <devices>
    <disk type='file' device='disk'><driver type='qcow2'/><source file='/data/web.qcow2'/><target dev='vda'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/a.iso'/><target dev='sda'/><readonly/></disk>
    <interface type='network'>
      <mac address='52:54:00:00:00:01'/>
      <source network='lan' portgroup='blue' portid='x' bridge='virbr0'/>
      <virtualport type='openvswitch'/>
    </interface>
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br0'/></interface>
    <interface type='user'><mac address='52:54:00:00:00:03'/></interface>
  </devices>
</domain>
"""


def web():
    return configuration.parse(XML, source="web.xml")


def after(**lines):
    used, changed = Used(), web()
    wanted = Maps(**{name: maps.parse(name.rstrip("s"), texts, macs=name in {"nics", "vlans", "portgroups"})
                     for name, texts in lines.items()})  # fmt: skip
    maps.check_nics(wanted)
    maps.rewrite(changed, wanted, used)
    return changed, [str(one) for one in used.unused(wanted)]


class TestPaths:
    def test_longest_prefix_wins(self):
        entries = maps.parse("path", ["/a=/x", "/a/b=/y"], paths=True)
        assert maps.map_path("/a/b/c", entries)[0] == "/y/c"
        assert maps.map_path("/a/c", entries)[0] == "/x/c"

    def test_prefix_is_whole_names(self):
        entries = maps.parse("path", ["/a/b=/y"], paths=True)
        assert maps.map_path("/a/bc", entries) == ("/a/bc", None)

    def test_root_is_a_prefix_of_everything(self):
        entries = maps.parse("path", ["/=/mnt"], paths=True)
        assert maps.map_path("/a", entries)[0] == "/mnt/a"

    @given(st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=4), st.data())
    def test_reference_model(self, names, data):
        """The same as trying every number of leading names, longest first."""
        path = "/" + "/".join(names)
        olds = data.draw(st.sets(st.sampled_from(["/a", "/a/b", "/b", "/ab", "/a/b/a", "/"]), max_size=4))
        entries = maps.parse("path", [f"{old}=/n{number}" for number, old in enumerate(sorted(olds))], paths=True)
        expected = path
        for count in range(len(names), -1, -1):
            prefix = "/" + "/".join(names[:count])
            found = next((one for one in entries if one.old == prefix), None)
            if found is not None:
                rest = "/".join(names[count:])
                expected = found.new + ("/" + rest if rest else "")
                break
        assert maps.map_path(path, entries)[0] == expected

    def test_drives_kernel_and_firmware_follow_and_hard_disks_do_not(self):
        changed = web()
        used = Used()
        entries = maps.parse("path", ["/iso=/cd", "/boot=/b", "/usr/share/OVMF=/fw", "/data=/elsewhere"], paths=True)
        maps.rewrite(changed, Maps(paths=entries), used)
        text = changed.to_xml()
        for path in ("/cd/a.iso", "/b/vmlinuz", "/fw/code.fd", "/data/web.qcow2"):
            assert path in text
        assert [one.old for one in used.unused(Maps(paths=entries))] == ["/data"]

    def test_paths_of_names_what_for(self):
        assert dict(maps.paths_of(web())) == {
            "kernel": "/boot/vmlinuz", "loader": "/usr/share/OVMF/code.fd", "drive sda": "/iso/a.iso",
        }  # fmt: skip


class TestCards:
    def test_network_by_name_keeps_the_kind(self):
        changed, unused = after(networks=["lan=dmz", "br0=br1"])
        assert [(nic.type, nic.source) for nic in changed.nics()][:2] == [("network", "dmz"), ("bridge", "br1")]
        assert unused == []

    def test_network_may_become_a_bridge(self):
        changed, _ = after(networks=["lan=bridge=br7"])
        assert (changed.nics()[0].type, changed.nics()[0].source) == ("bridge", "br7")
        assert "portid" not in changed.to_xml()

    def test_card_by_address_wins_over_its_network(self):
        changed, unused = after(networks=["lan=dmz"], nics=["52:54:00:00:00:01=wan"])
        assert changed.nics()[0].source == "wan"
        assert unused == ["--network lan=dmz"]

    def test_disconnected_card_has_no_cable(self):
        changed, _ = after(nics=["52:54:00:00:00:01=disconnected", "52:54:00:00:00:03=disconnected"])
        first, _, third = changed.root.findall("devices/interface")
        assert (first.get("type"), first.find("source"), first.find("virtualport")) == ("ethernet", None, None)
        assert first.find("link").get("state") == third.find("link").get("state") == "down"
        assert third.get("type") == "user"

    def test_disconnected_card_can_be_plugged_in_again(self):
        changed, _ = after(nics=["52:54:00:00:00:01=disconnected"])
        again = Maps(nics=maps.parse("nic", ["52:54:00:00:00:01=lan"], macs=True))
        maps.rewrite(changed, again, Used())
        first = changed.root.find("devices/interface")
        assert (first.get("type"), first.find("source").get("network"), first.find("link")) == ("network", "lan", None)

    def test_vlan_and_portgroup(self):
        changed, unused = after(vlans=["52:54:00:00:00:02=42"], portgroups=["52:54:00:00:00:01=red"])
        first, second, _ = changed.root.findall("devices/interface")
        assert second.find("vlan/tag").get("id") == "42"
        assert first.find("source").get("portgroup") == "red"
        assert unused == []

    def test_portgroup_of_a_bridge_would_be_ignored(self):
        assert after(portgroups=["52:54:00:00:00:02=red"])[1] == ["--portgroup 52:54:00:00:00:02=red"]

    @pytest.mark.parametrize("lines", [{"vlans": ["52:54:00:00:00:01=4095"]}, {"vlans": ["52:54:00:00:00:01=x"]},
                                       {"nics": ["52:54:00:00:00:01=disconnected"],
                                        "portgroups": ["52:54:00:00:00:01=red"]}])  # fmt: skip
    def test_nonsense_is_refused(self, lines):
        with pytest.raises(errors.UsageError):
            after(**lines)


@pytest.mark.parametrize("text", ["a", "=b", "a=", "relative=/b", "/a=relative"])
def test_line_without_two_absolute_sides_is_refused(text):
    with pytest.raises(errors.UsageError) as caught:
        maps.parse("path", [text], paths=True)
    assert text in caught.value.message


def test_two_lines_for_one_thing_are_refused():
    with pytest.raises(errors.UsageError):
        maps.parse("nic", ["52:54:00:00:00:01=a", "52-54-00-00-00-01=b"], macs=True)
