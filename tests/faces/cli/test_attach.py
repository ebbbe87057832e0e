"""The commands for attached images, and for sizes of disks, as a user types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hvmgr import settings
from tests.faces.cli.test_documentation import PAGE, keys
from tests.operations.images import attaching as help_
from tests.storage.test_partitions import Memory, put_mbr

MIB = 1 << 20
DEVICE_SHAPES = {
    name: json.loads(text)
    for name, text in re.findall(r"<!-- device shape: ([\w ]+) -->\n```json\n(.*?)```", PAGE, re.DOTALL)
}


@pytest.fixture
def image(tmp_path):
    """A raw image with a partition."""
    disk = Memory(4 * MIB)
    put_mbr(disk, [(7, 2048, 4096)])
    path = tmp_path / "disk.raw"
    path.write_bytes(disk.data)
    return path


@pytest.mark.usefixtures("root")
def test_attached_listed_and_detached(hvmgr, image):
    help_.skip_where_impossible()
    with help_.taken_down():
        answer = hvmgr.ok("image", "attach", image, "--json").json
        assert keys(answer) == keys(DEVICE_SHAPES["image attach"])
        device = answer["attachment"]["device"]
        assert answer["attachment"]["partitions"][0]["device"] == f"{device}p1"
        listed = hvmgr.ok("image", "attachments", "--json").json
        assert keys(listed) == keys(DEVICE_SHAPES["image attachments"])
        assert listed["attachments"] == [answer["attachment"]]
        line = hvmgr.ok("image", "attachments").out.split("\t")
        assert line == [device, str(image), "4.0 MiB", "writable", "attached", f"{device}p1\n"]
        assert hvmgr("image", "attach", image).code == 4
        refused = hvmgr("image", "resize", image, "8M")
        assert (refused.code, f"hvmgr image detach {image}" in refused.err) == (4, True)
        gone = hvmgr.ok("image", "detach", f"{device}p1", "--json").json
        assert keys(gone) == keys(DEVICE_SHAPES["image detach"])
        assert hvmgr.ok("image", "attachments").out == ""
        assert hvmgr("image", "detach", device).code == 3
        told = hvmgr.ok("image", "attach", image, "--read-only").out.splitlines()
        assert re.fullmatch(rf"attached {image} as /dev/loop\d+, read-only", told[0])
        assert told[1].split("  ")[1:] == ["2.0 MiB", "07"]
        assert hvmgr.ok("image", "detach", image).out.startswith(f"detached {image} from /dev/loop")
        assert help_.is_clean()


@pytest.mark.usefixtures("root")
def test_dry_run_and_bad_requests(hvmgr, image, tmp_path):
    help_.skip_where_impossible()
    assert hvmgr.ok("image", "attach", image, "--dry-run").out == f"attach {image}\n"
    assert hvmgr("image", "attach", tmp_path / "nothing").code == 3
    assert hvmgr("image", "attach", tmp_path).code == 2
    assert hvmgr("image", "attach", image, "--format", "vdi").code == 2
    assert help_.is_clean()


def test_ordinary_user_gets_a_sentence(monkeypatch):
    import hvmgr
    from hvmgr.host import image_export, loop

    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(hvmgr.errors.Unsupported, match="only root"):
        image_export.require()
    monkeypatch.undo()
    monkeypatch.setattr(loop, "_CONTROL", Path("/nonexistent"))
    with pytest.raises(hvmgr.errors.Unsupported, match="no loop devices"):
        loop.require()
    monkeypatch.setattr(image_export, "_FUSE", Path("/nonexistent"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(hvmgr.errors.Unsupported, match="no FUSE"):
        image_export.require()


def test_places_of_sockets_are_short():
    assert len(str(settings.runtime_folder() / "123456789012" / "nbd")) < 108


def test_disk_is_resized_and_shown(hvmgr, vm):
    assert hvmgr.ok("disk", "resize", vm, "vda", "16M").out == f"disk vda of {vm} has 16 MiB\n"
    assert hvmgr.ok("disk", "resize", vm, "vda", "16M", "--json").json["changed"] is False
    shown = hvmgr.ok("disk", "info", vm, "vda", "--json").json
    assert (shown["size"], shown["chain"][0]["size"]) == (16 * MIB, 16 * MIB)
    assert "16 MiB" in hvmgr.ok("disk", "info", vm, "vda").out
    assert hvmgr("disk", "resize", vm, "vda", "8M").code == 2  # nobody is there to ask
    assert hvmgr.ok("disk", "resize", vm, "vda", "8M", "--dry-run", "--yes").out.count("8388608 bytes") == 2
    assert hvmgr.ok("disk", "resize", vm, "vda", "8M", "--yes").out == f"disk vda of {vm} has 8.0 MiB\n"
    assert "cannot have 100 bytes" in hvmgr("disk", "resize", vm, "vda", "100").err  # before anybody is asked
    assert hvmgr("disk", "info", vm, "vdz").code == 3
    assert hvmgr("disk", "resize", vm, "vdz", "8M").code == 3
