"""Each module on a real host: check mode tells the truth, a second run changes nothing, refusals say what to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def web(kvm1):
    return kvm1.create("web")


class TestVm:
    def test_comes_runs_and_goes(self, thrice, module, kvm1):
        wanted = {
            "name": "web",
            "memory": "64M",
            "disks": ["8M"],
            "networks": ["none"],
            "accel": "tcg",
            "firmware": "bios",
            "owner": "anna",
            "tags": ["shop", "test"],
        }
        made = thrice("vm", **wanted)
        assert made["vm"]["state"] == "off"
        after = {"name": "web", "state": "off", "owner": "anna", "tags": ["shop", "test"]}
        assert made["diff"] == {"before": {"state": "absent"}, "after": after}
        assert thrice("vm", name="web", owner="", tags=["db", "shop"])["diff"]["before"]["owner"] == "anna"
        told = kvm1.hvmgr("vm", "show", "web")
        assert (told["owner"], sorted(told["tags"])) == (None, ["db", "shop"])
        assert module("vm", name="web", state="started").changed
        assert kvm1.hvmgr("vm", "show", "web")["vm"]["state"] == "running"
        refused = module("vm", name="web", state="absent")
        assert refused.facts["error"]["code"] == "Conflict"
        thrice("vm", name="web", state="stopped", force=True)
        assert module("vm", name="web", new_name="www").changed
        differs = module("vm", name="www", memory="1G", vcpus=7)
        assert not differs.changed
        assert len([one for one in differs.facts["warnings"] if "hardware is not changed" in str(one)]) == 2
        assert module("vm", name="www", state="absent").facts["kept"] != []

    def test_is_made_of_a_specification_started_at_once_and_stopped_only_to_go(self, module, kvm1, tmp_path):
        specification = {
            "memory": "64M",
            "disks": [{"size": "8M", "slot": "vdb"}],
            "networks": "none",
            "accel": "tcg",
            "firmware": "bios",
        }
        assert (
            module("vm", name="web", specification=specification, state="started", check_mode=True).facts["vm"]["state"]
            == "running"
        )
        assert kvm1.hvmgr("vm", "list")["vms"] == []
        assert module("vm", name="web", specification=specification, state="started").facts["vm"]["state"] == "running"
        assert [one["slot"] for one in kvm1.hvmgr("vm", "show", "web")["disks"]] == ["vdb"]
        xml = tmp_path / "other.xml"
        xml.write_text(
            "<domain type='qemu'><name>other</name><memory>65536</memory><os><type>hvm</type></os><devices>"
            f"<disk type='file'><source file='{kvm1.disk('web', 'vdb')}'/><target dev='vda'/></disk></devices></domain>"
        )
        subprocess.run(["virsh", "-q", "-c", kvm1.uri, "define", xml], check=True, timeout=60)
        for check in (True, False):
            refused = module("vm", name="web", state="absent", force=True, with_disks=True, check_mode=check)
            assert refused.facts["error"]["facts"]["users"] == ["other"]
        assert kvm1.hvmgr("vm", "show", "web")["vm"]["state"] == "running", "what may not go is not stopped"
        subprocess.run(["virsh", "-q", "-c", kvm1.uri, "undefine", "other"], check=True, timeout=60)
        assert module("vm", name="web", state="absent", force=True, with_disks=True, check_mode=True).changed
        assert module("vm", name="web", state="absent", force=True, with_disks=True).facts["kept"] == []

    def test_of_libvirt_is_adopted(self, thrice, module, kvm1, tmp_path):
        xml = tmp_path / "plain.xml"
        xml.write_text("<domain type='qemu'><name>plain</name><memory>65536</memory><os><type>hvm</type></os></domain>")
        subprocess.run(["virsh", "-q", "-c", kvm1.uri, "define", xml], check=True, timeout=60)
        assert thrice("vm", name="plain", adopt=True)["vm"]["name"] == "plain"
        assert module("vm", name="nobody", adopt=True).facts["error"]["code"] == "NotFound"


class TestSnapshot:
    def test_comes_is_described_and_goes(self, thrice, module, web):
        made = thrice("snapshot", vm="web", name="one", notes="the first")
        assert made["diff"]["after"] == "web\n  - one (the first)\n    - Now\n"
        assert thrice("snapshot", vm="web", name="one", notes="-")["snapshot"]["notes"] == "-"
        thrice("snapshot", vm="web", name="one", new_name="first")
        module("snapshot", vm="web", name="two", type="disk-only")
        thrice("snapshot", vm="web", name="first", state="absent")
        told = module("snapshot_info", vm="web", sizes=True).facts
        assert told["tree"] == "web\n  - two\n    - Now\n"
        assert told["snapshots"][0]["images"] > 0
        assert module("snapshot_info", vm="web", name="first").facts["snapshots"] == []
        module("snapshot", vm="web", name="three")
        gone = thrice("snapshot", vm="web", name="two", state="absent", subtree=True)
        assert gone["diff"]["after"] == "web\n  - Now\n"
        assert len(gone["deleted"]) == 2

    def test_name_that_two_share_is_refused_with_their_ids(self, module, kvm1, web):
        ids = [kvm1.hvmgr("snapshot", "create", "web", "same")["snapshot"]["id"] for _ in range(2)]
        refused = module("snapshot", vm="web", name="same", state="absent")
        assert all(one in refused.facts["msg"] for one in ids)
        assert module("snapshot", vm="web", name=ids[1], state="absent").changed
        assert module("snapshot", vm="web", name=ids[1]).facts["error"]["code"] == "NotFound"


class TestSnapshotApply:
    def test_goes_back_once_and_keeps_the_present(self, thrice, module, kvm1, web):
        module("snapshot", vm="web", name="one")
        assert not module("snapshot_apply", vm="web", action="revert").changed
        kvm1.write("web", 7)
        done = thrice("snapshot_apply", vm="web", name="one")
        assert not kvm1.holds("web", 7)
        assert done["diff"]["before"] == "web\n  - one\n    - Now (goes into the undo slot)\n"
        foreseen, undone = (
            module("snapshot_apply", vm="web", action="undo", check_mode=check) for check in (True, False)
        )
        assert foreseen.facts["diff"] == undone.facts["diff"]
        assert kvm1.holds("web", 7)
        done = thrice("snapshot_apply", vm="web", name="one", snapshot_first=True, keep_undo=False)
        assert done["diff"]["after"] == "web\n  - one\n    - (the former present)\n    - Now\n"
        module("snapshot_apply", vm="web", name=done["first"]["id"])
        assert kvm1.holds("web", 7)

    def test_memory_of_a_running_vm_comes_back(self, thrice, module, kvm1, web):
        module("vm", name="web", state="started")
        disk = {"vm": "web", "slot": "vda", "dest": str(kvm1.place / "now.qcow2")}
        assert module("disk_export", **disk).changed
        assert "cannot be told" in module("disk_export", **disk).facts["msg"]
        assert not module("disk_export", on_exists="keep", **disk).changed
        module("snapshot", vm="web", name="running")
        module("vm", name="web", state="stopped", force=True)
        assert module("snapshot_apply", vm="web", name="running").changed
        assert kvm1.hvmgr("vm", "show", "web")["vm"]["state"] == "running"
        assert module("snapshot_apply", vm="web", name="running", without_state=True).changed
        thrice("snapshot", vm="web", name="running", state="absent", state_only=True)

    def test_bad_request_says_what_is_wrong(self, module, web):
        assert "there are: none" in module("snapshot_apply", vm="web", name="no").facts["msg"]
        module("snapshot", vm="web", name="one")
        for wrong, words in [
            ({}, "missing"),
            ({"name": "no"}, "there are: one"),
            ({"action": "revert", "name": "one"}, "takes no name"),
            ({"action": "undo", "snapshot_first": True}, "neither"),
            ({"action": "undo"}, "undo"),
        ]:
            refused = module("snapshot_apply", vm="web", **wrong)
            assert refused.code == 1, wrong
            assert words in refused.facts["msg"]


class TestExchange:
    def test_export_and_linked_import(self, thrice, module, kvm1, web):
        module("snapshot", vm="web", name="one")
        out = kvm1.place / "out"
        made = thrice("vm_export", vm="web", dest=str(out))
        assert made["export"] == str(out / "web")
        report = module("vm_compare_info", source=made["export"], mode="link").facts
        assert "name-in-use" in [one["code"] for one in report["findings"]]
        assert not report["ready"]
        wanted = {"source": made["export"], "mode": "link", "name": "new", "tags": ["shop"], "owner": "anna"}
        assert thrice("vm_import", **wanted)["vm"]["name"] == "new"
        (told,) = module("vm_info", tags=["shop"]).facts["vms"]
        assert (told["owner"], told["origin"]["mode"], told["snapshot"]["name"]) == ("anna", "link", "one")
        assert module("vm_info", name="new", owner="others").facts["vms"] == []
        assert module("vm_info", name="nobody").facts["vms"] == []
        other = module("vm_import", source=made["export"], name="new")
        assert other.facts["error"]["code"] == "Conflict"
        assert not module("vm_import", source=made["export"], name="new", on_exists="keep").changed

    def test_maps_and_identities_reach_hvmgr(self, module, kvm1):
        kvm1.hvmgr(
            "vm", "create", "web", "--memory=64M", "--disk=8M", "--network=user,mac=52:54:00:00:00:01", "--accel=tcg"
        )
        out = module(
            "vm_export", vm="web", dest=str(kvm1.place / "out"), snapshots="none", format="raw", checksums=False
        )
        source = out.facts["export"]
        refused = module("vm_import", source=source, name="new", nics={"52:54:00:00:00:02": "disconnected"})
        assert "52:54:00:00:00:02" in refused.facts["msg"]
        wanted = {
            "nics": {"52:54:00:00:00:01": "disconnected"},
            "identity": "new",
            "keep_mac": True,
            "vm_path": str(kvm1.place / "vms"),
        }
        wanted |= {"disk_targets": {"vda": str(kvm1.place / "vda.raw")}, "without_snapshots": True}
        made = module("vm_import", source=source, name="new", **wanted).facts["vm"]
        assert made["home"] == str(kvm1.place / "vms" / "new")
        assert kvm1.disk("new") == str(kvm1.place / "vda.raw")
        kvm1.hvmgr("vm", "delete", "new", "--with-disks", "--yes")

    def test_archive_is_kept_by_its_name(self, thrice, module, kvm1, web):
        thrice("vm_export", vm="web", archive=str(kvm1.place / "web.tar.zst"))
        assert module("vm_import", source=str(kvm1.place / "web.tar.zst"), name="new").changed

    def test_disk_goes_out_whole_and_as_what_changed(self, thrice, module, kvm1, web):
        kvm1.write("web", 1)
        module("snapshot", vm="web", name="one")
        kvm1.write("web", 2)
        whole, delta = (str(kvm1.place / name) for name in ("whole.raw", "delta.vhd"))
        wanted = {"vm": "web", "slot": "vda"}
        made = thrice("disk_export", dest=whole, **wanted)
        assert (made["disk"]["format"], made["disk"]["base"]) == ("raw", None)
        assert Path(whole).read_bytes()[1 << 20 : (1 << 20) + 65536] == b"\2" * 65536
        made = thrice("disk_export", dest=delta, base="one", **wanted)
        assert made["disk"]["length"] == Path(delta).stat().st_size
        assert made["disk"]["base"] is not None
        kvm1.write("web", 3)
        for check in (True, False):
            refused = module("disk_export", dest=whole, check_mode=check, **wanted)
            assert "is not what would be written" in refused.facts["msg"]
        assert not module("disk_export", dest=whole, on_exists="keep", **wanted).changed
        assert module("disk_export", dest=whole, snapshot="one", base="one", **wanted).code == 1

    def test_unreachable_export_is_said(self, module, web):
        refused = module("vm_import", source="/nowhere/web")
        assert refused.facts["error"]["code"] == "NotFound"
        assert "/nowhere/web" in refused.facts["msg"]


class TestImage:
    def test_is_made_resized_converted_and_merged(self, thrice, module, tmp_path):
        base, child, copy = (str(tmp_path / name) for name in ("base.vhd", "child.vhd", "copy.qcow2"))
        assert thrice("image", path=base, size="4M")["image"]["format"] == "vhd"
        thrice("image", path=base, size="8M")
        module("image", path=child, parent=base)
        told = module("image_info", path=child, chain=True, check=True).facts
        assert [one["path"] for one in told["chain"]] == [child, base]
        assert told["sound"]
        moved = tmp_path / "moved.vhd"
        (tmp_path / "base.vhd").rename(moved)
        thrice("image", path=child, parent=str(moved))
        assert module("image", path=copy, source=child).changed
        thrice("image", path=child, state="merged")

    def test_that_is_damaged_is_told_and_not_failed(self, module, tmp_path):
        path = tmp_path / "torn.vhd"
        module("image", path=str(path), size="4M")
        with path.open("r+b") as file:
            file.seek(64)
            file.write(b"junk")
        assert module("image_info", path=str(path), check=True).facts["findings"] != []
