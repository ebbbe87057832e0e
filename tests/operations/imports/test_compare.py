"""Comparisons: each thing that is in the way has its code, nothing is touched, and no hostile source leads anywhere."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.model import compatibility, configuration
from hvmgr.storage import source_home


def edit(folder, change, *, file=None):
    """Another text in the source's configuration."""
    path = file or next((folder / "Virtual Machines").glob("*.xml"))
    path.chmod(0o600)
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.write_text(changed)
    return folder


def add_card(kind, **source):
    attributes = " ".join(f"{key}='{value}'" for key, value in source.items())
    card = f"<interface type='{kind}'><mac address='52:54:00:aa:bb:01'/><source {attributes}/></interface>"
    return lambda text: text.replace("</devices>", f"{card}</devices>")


class TestHost:
    def test_missing_network_is_named_with_the_way_out(self, bench, branched):
        source = edit(bench.take_away(branched), add_card("network", network="lan"))
        before = bench.states()
        (found,) = bench.host.plan_import(source).check()[:1]
        assert (found.code, found.where) == ("missing-network", "lan")
        assert "--network lan=" in found.repair
        with pytest.raises(errors.Conflict):
            bench.bring(source)
        assert bench.states() == before
        assert (
            bench.bring(source, nics={"52:54:00:aa:bb:01": "disconnected"}).home.present().nics()[0].type == "ethernet"
        )

    def test_drive_with_a_differencing_vhd(self, bench, branched):
        bench.host.images.create(bench.place / "base.vhd", 4 << 20)
        options = hvmgr.ImageOptions(parent=bench.place / "base.vhd")
        child = bench.host.images.create(bench.place / "child.vhd", options=options).path
        drive = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{child}'/>"
        drive += "<target dev='vdz'/><readonly/></disk>"
        source = edit(bench.take_away(branched), lambda text: text.replace("</devices>", f"{drive}</devices>"))
        assert bench.codes(source) == ["format-unsupported"]
        before = bench.states()
        with pytest.raises(errors.Unsupported, match=r"differencing VHD of base\.vhd"):
            bench.bring(source)
        assert bench.states() == before

    def test_missing_bridge(self, bench, branched):
        source = edit(bench.take_away(branched), add_card("bridge", bridge="br77"))
        assert bench.codes(source) == ["missing-bridge"]
        assert bench.codes(source, networks={"br77": "bridge=lo"}) == []

    def test_maps_of_what_is_not_there_are_refused(self, bench, branched):
        source = bench.take_away(branched)
        for wish in (
            {"networks": {"nowhere": "lan"}},
            {"nics": {"52:54:00:00:00:99": "lan"}},
            {"paths": {"/nowhere": "/x"}},
            {"disks": {"vdz": "/x"}},
            {"disk_targets": {"vdz": "/x"}},
            {"vlans": {"52:54:00:00:00:99": "7"}},
        ):
            for ask in (bench.bring, bench.codes):  # a plan has no place for what is not there
                with pytest.raises(errors.UsageError) as caught:
                    ask(source, **wish)
                assert "would be ignored" in caught.value.message
                assert next(iter(next(iter(wish.values())))) in caught.value.message

    def test_places_that_cannot_be(self, bench, branched):
        source = bench.take_away(branched)
        file = bench.image("file")
        assert bench.codes(source, vm_path=file) == ["target-exists"]
        assert bench.codes(source, disk_path=file) == ["target-exists"]
        for wish in ({"vm_path": source}, {"disk_targets": {"hda": str(source / "base.qcow2")}}):
            with pytest.raises(errors.UsageError, match="is inside the source"):
                bench.codes(source, **wish)
        with pytest.raises(errors.UsageError, match="it holds no snapshot that the source lacks"):
            bench.codes(source, snapshot_source=bench.place)
        with pytest.raises(errors.NotFound, match="there is no folder"):
            bench.codes(source, snapshot_source=bench.place / "nothing")
        with pytest.raises(errors.NotFound, match="to replace"):
            bench.codes(source, new_id=False, replace=True)

    def test_unknown_machine_and_firmware(self, bench, branched):
        source = bench.take_away(branched)
        edit(source, lambda text: re.sub(r"machine='[^']*'", "machine='pc-i440fx-99.0'", text))
        edit(source, lambda text: text.replace("</os>", "<loader readonly='yes' type='pflash'>/no/fd</loader></os>"))
        assert set(bench.codes(source)) == {"machine-unknown", "firmware-missing"}

    def test_unknown_architecture(self, bench, branched):
        source = edit(bench.take_away(branched), lambda text: text.replace("arch='x86_64'", "arch='vax'"))
        assert bench.codes(source) == ["emulator-missing"]

    def test_emulator_of_another_distribution(self, bench, branched):
        source = bench.take_away(branched)
        edit(source, lambda text: re.sub("<emulator>[^<]*", "<emulator>/usr/libexec/qemu-kvm", text))
        assert bench.codes(source) == []
        assert "/usr/libexec" not in bench.bring(source).home.present().to_xml()

    def test_missing_media_empty_their_drive_and_missing_kernels_do_not_pass(self, bench):
        vm = bench.make(4, cdrom=bench.image("cd.iso", fmt="raw"))
        source = bench.take_away(vm)
        (bench.place / "cd.iso").unlink()
        assert bench.codes(source) == ["drive-emptied"]
        assert "cd.iso" not in bench.bring(source).home.present().to_xml()
        edit(source, lambda text: text.replace("</os>", "<kernel>/no/kernel</kernel></os>"))
        assert set(bench.codes(source, name="b")) == {"drive-emptied", "missing-file"}

    def test_name_and_target(self, bench, branched):
        source = bench.copy(branched)
        assert set(bench.codes(source)) == {"name-in-use", "target-exists"}

    def test_space(self, bench, branched, monkeypatch):
        source = bench.take_away(branched)
        real = source_home.os.statvfs

        class Full:
            f_flag, f_bavail, f_frsize = 0, 1, 512

        monkeypatch.setattr("hvmgr.operations.exchange.compare_place.os.statvfs", lambda _: Full)
        with pytest.raises(errors.NoSpace):
            bench.bring(source)
        monkeypatch.setattr("hvmgr.operations.exchange.compare_place.os.statvfs", real)

    def test_way_of_qemus_user(self, bench, branched):
        source = bench.take_away(branched)
        closed = bench.place / "closed"
        closed.mkdir(mode=0o700)
        (closed / "inner").mkdir()
        assert bench.codes(source, vm_path=closed / "inner") == ["not-readable"]

    def test_newer_host(self, bench, branched):
        source = bench.take_away(branched)
        edit(source, lambda text: text.replace("libvirt: 9.0.0", "libvirt: 99.0.0"), file=source / "export.yaml")
        assert bench.codes(source) == ["newer-host"]


class TestSource:
    def test_missing_snapshot(self, bench, branched):
        gone = branched.snapshot("two").id
        source = bench.take_away(branched, export=False)
        kept = bench.place / "kept"
        kept.mkdir()
        for path in (source / "Snapshots").glob(f"{gone}*"):
            path.rename(kept / path.name)
        assert bench.codes(source) == ["missing-snapshot"]
        vm = bench.bring(source, drop_snapshots=(gone,))
        assert bench.tree(vm)[0]["three"] == (None, "none")
        bench.check(vm)
        whole = bench.bring(source, name="whole", snapshot_source=kept)
        assert bench.tree(whole)[0]["three"] == ("two", "none")

    def test_missing_image_of_a_snapshot_that_stays_away(self, bench, branched):
        source = bench.take_away(branched, export=False)
        three = next(one for one in source_home.open_source(source).snapshots if one.record.name == "three")
        Path(three.disks["hda"]).unlink()
        assert bench.codes(source) == ["missing-disk"]
        vm = bench.bring(source, drop_snapshots=("three",))
        assert set(bench.tree(vm)[0]) == {"one", "two", "left"}

    def test_truncated_image(self, bench, branched):
        source = bench.take_away(branched)
        base = next((source / "Virtual Hard Disks").iterdir())
        base.chmod(0o600)
        with base.open("r+b") as file:
            file.truncate(base.stat().st_size - 65536)
        assert bench.codes(source) == ["wrong-size"]

    def test_other_disk_in_its_place(self, bench, branched):
        source = bench.take_away(branched, export=False)
        base = next((source / "Virtual Hard Disks").iterdir())
        base.write_bytes(b"\0" * 4096)
        assert "damaged" in bench.codes(source)

    def test_newer_format(self, bench, branched):
        source = edit(bench.take_away(branched), lambda text: text.replace('format="1"', 'format="99"'))
        with pytest.raises(errors.Unsupported):
            bench.bring(source)

    def test_newer_export(self, bench, branched):
        source = bench.take_away(branched)
        edit(source, lambda text: text.replace("format: 1\n", "format: 99\n"), file=source / "export.yaml")
        assert bench.codes(source)[0] == "newer-format"
        with pytest.raises(errors.Unsupported):
            bench.bring(source)

    def test_no_source(self, bench, place):
        (place / "empty").mkdir()
        for where in (place / "empty", place / "nothing"):
            with pytest.raises(errors.NotFound):
                bench.bring(where)
        (place / "text").write_text("hello")
        with pytest.raises(errors.Corrupt):
            bench.bring(place / "text")


@pytest.mark.parametrize("what", [".", "Virtual Machines", "Snapshots"])
def test_share_that_cannot_be_read(bench, branched, what):
    """A folder that says nothing is not an empty one."""
    source = bench.take_away(branched)
    (source / what).chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(errors.HostFailed, match="no permission for"):
            source_home.open_source(source)
    finally:
        os.seteuid(0)


class TestHostileSource:
    """Whoever made the source may not wish us well."""

    @pytest.fixture
    def secret(self, place):
        path = place / "secret"
        path.write_bytes(b"secret" * 1000)
        path.chmod(0o600)
        return path

    def refused(self, bench, source, *codes):
        before = bench.states()
        assert set(bench.codes(source)) == set(codes)
        with pytest.raises(errors.HvmgrError) as caught:
            bench.bring(source)
        assert isinstance(caught.value, compatibility.KINDS[bench.codes(source)[0]].error)
        assert bench.states() == before

    @pytest.fixture
    def source(self, bench, branched):
        return bench.take_away(branched)

    def test_disk_that_is_another_file(self, bench, source, secret):
        edit(source, lambda text: re.sub(r"<source file='[^']*hda[^']*'", f"<source file='{secret}'", text))
        self.refused(bench, source, "image-outside")

    def test_disk_that_climbs_out(self, bench, source, secret):
        home = source_home.open_source(source).recorded_home
        edit(source, lambda text: re.sub(r"<source file='[^']*hda[^']*'", f"<source file='{home}/../../secret'", text))
        self.refused(bench, source, "image-outside", "name-escapes")

    def test_disk_that_is_a_link(self, bench, source, secret):
        (path,) = source_home.open_source(source).disks.values()
        Path(path).unlink()
        Path(path).symlink_to(secret)
        self.refused(bench, source, "link")

    @pytest.mark.parametrize("name", ["Virtual Hard Disks", "Virtual Machines", "Snapshots"])
    def test_folder_that_is_a_link(self, bench, source, place, name):
        (source / name).rename(place / "moved")
        (source / name).symlink_to(place / "moved")
        self.refused(bench, source, "link", *(["missing-snapshot"] if name == "Snapshots" else []))

    def test_parent_that_is_another_file(self, bench, source, secret):
        (path,) = source_home.open_source(source).disks.values()
        Path(path).chmod(0o600)
        subprocess.run(["qemu-img", "rebase", "-u", "-F", "raw", "-b", secret, path], check=True, timeout=60)
        assert "image-outside" in bench.codes(source)

    def test_circle_of_images(self, bench, source):
        one = source_home.open_source(source)
        (top,) = one.disks.values()
        chain = one.chain(top)
        child = Path(chain[-2].path)
        child.chmod(0o600)
        name = Path(top).name
        subprocess.run(["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", name, child], check=True, timeout=60)
        assert "cycle" in bench.codes(source)

    def test_circle_of_snapshots(self, bench, source):
        one, three = (
            next(each for each in source_home.open_source(source).snapshots if each.record.name == name)
            for name in ("one", "three")
        )

        def close(text):
            parsed = configuration.parse(text, source="x")
            facts = parsed.metadata()
            record = dataclasses.replace(facts.snapshot, parent=three.record.id)
            parsed.set_metadata(dataclasses.replace(facts, snapshot=record))
            return parsed.to_xml()

        edit(source, close, file=one.file)
        self.refused(bench, source, "cycle")

    def test_two_disks_of_one_name(self, bench, source):
        edit(source, lambda text: re.sub(r"(<disk .*?</disk>)", r"\1\1", text, count=1, flags=re.DOTALL))
        self.refused(bench, source, "double-slot")

    @pytest.mark.parametrize("name", ["../../evil", "..", ".hidden", "x" * 300, "a&#10;b"])
    def test_name_that_no_folder_can_have(self, bench, source, name):
        edit(source, lambda text: text.replace("<name>web", f"<name>{name}"))
        before = bench.states()
        for attempt in (bench.codes, bench.bring):
            with pytest.raises(errors.UsageError) as caught:
                attempt(source)
            assert "--name" in caught.value.hint
        assert bench.states() == before
        assert bench.codes(source, name="other") == []

    def test_bomb(self, bench, source):
        bomb = '<!DOCTYPE domain [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>\n'
        edit(source, lambda text: bomb + text.replace("<name>web", "<name>&b;web"))
        with pytest.raises(errors.Corrupt):
            bench.bring(source)

    def test_huge_configuration(self, bench, source):
        path = next((source / "Virtual Machines").glob("*.xml"))
        path.chmod(0o600)
        with path.open("a") as file:
            file.truncate(1 << 30)
        with pytest.raises(errors.Corrupt):
            bench.bring(source)

    def test_memory_that_is_no_save_file(self, bench, source):
        one = source_home.open_source(source).snapshots[0]

        def claim(text):
            return text.replace('state="none"', 'state="running"')

        edit(source, claim, file=one.file)
        one.file.with_suffix("").mkdir(exist_ok=True)
        (one.file.with_suffix("") / "memory.save").write_bytes(b"x" * 500)
        self.refused(bench, source, "saved-state-damaged")
        assert bench.bring(source, without_state=True).snapshots()

    def test_tpm_state_with_a_link(self, bench, source, secret):
        one = source_home.open_source(source).snapshots[0]
        tpm = one.file.with_suffix("") / "tpm"
        tpm.mkdir(parents=True, exist_ok=True)
        (tpm / "tpm2-00.permall").symlink_to(secret)
        self.refused(bench, source, "link")

    def test_manifest_with_names_that_climb_out(self, bench, source):
        edit(source, lambda text: text.replace("file: ", "file: ../", 1), file=source / "export.yaml")
        assert "damaged" in bench.codes(source)


def test_every_code_is_documented_and_used():
    root = Path(hvmgr.__file__).resolve().parent
    texts = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "compatibility.py")
    assert [code for code in compatibility.KINDS if f'"{code}"' not in texts] == []
    page = (root.parent / "docs" / "commands.md").read_text().partition("\n## compare ")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `([a-z-]+)` \| (error \d|warning|info) \|", page, re.MULTILINE)
    expected = [
        (code, f"error {kind.error.exit_code}" if kind.severity == "error" else str(kind.severity))
        for code, kind in compatibility.KINDS.items()
    ]
    assert table == expected
