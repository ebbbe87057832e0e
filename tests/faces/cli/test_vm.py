"""VMs, space and settings from the command line, on the embedded driver."""

from __future__ import annotations

import pytest

import hvmgr as package
from tests.faces.cli.conftest import files_of


def test_create_says_what_it_made(hvmgr, root):
    told = hvmgr.ok("vm", "create", "web", "--disk", "8M", "--disk", "16M", "--network", "none", "--json").json
    assert (told["schema"], told["changed"]) == (1, True)
    assert told["vm"] == {"id": told["vm"]["id"], "name": "web", "state": "off", "home": str(root / "web")}
    shown = hvmgr.ok("vm", "show", "web", "--json").json
    assert [(disk["slot"], disk["size"]) for disk in shown["disks"]] == [("vda", 8 << 20), ("vdb", 16 << 20)]


def test_create_from_a_file_with_paths_beside_it(hvmgr, root, tmp_path, monkeypatch):
    (tmp_path / "data.img").write_bytes(bytes(1 << 20))
    spec = tmp_path / "web.yaml"
    spec.write_text("name: web\nmemory: 64M\nnetworks: none\ndisks:\n  - path: data.img\n")
    monkeypatch.chdir(tmp_path)
    hvmgr.ok("vm", "create", "-f", spec.name)
    told = hvmgr.ok("vm", "show", "web", "--json").json
    assert (told["memory"], told["disks"][0]["size"]) == (64 << 20, 1 << 20)


def test_disk_that_reads_as_no_size_is_a_path_from_here(hvmgr, root, tmp_path, monkeypatch):
    (tmp_path / "40M").write_bytes(bytes(1 << 20))
    monkeypatch.chdir(tmp_path)
    hvmgr.ok("vm", "create", "size", "--disk", "40M", "--network", "none")
    hvmgr.ok("vm", "create", "path", "--disk", "./40M", "--network", "none")
    sizes = [hvmgr.ok("vm", "show", name, "--json").json["disks"][0]["size"] for name in ("size", "path")]
    assert sizes == [40 << 20, 1 << 20]


def test_list_in_a_pipe_is_plain_lines(hvmgr, vm, root):
    ((name, state, vm_id, home),) = hvmgr.ok("vm", "list").lines
    assert (name, state, home) == (vm, "off", str(root / vm))
    assert hvmgr.ok("vm", "show", vm_id, "--json").json["vm"]["name"] == vm


def test_state_is_null_where_libvirt_cannot_be_asked(hvmgr, vm, monkeypatch):
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/nowhere")
    assert hvmgr.ok("vm", "list", "--json").json["vms"][0]["state"] is None
    assert hvmgr.ok("vm", "list").lines[0][1] == "-"
    assert hvmgr.ok("snapshot", "list", vm, "--json").json["vm"]["state"] is None


def test_start_and_stop_say_whether_they_changed_something(hvmgr, vm):
    assert hvmgr.ok("vm", "start", vm, "--json").json["vm"]["state"] == "running"
    assert hvmgr.ok("vm", "start", vm, "--json").json["changed"] is False
    running = hvmgr.ok("snapshot", "create", vm, "running", "--json").json["snapshot"]
    assert running["has_state"] is True
    assert hvmgr.ok("snapshot", "list", vm).lines[0][3] == "running"
    assert hvmgr("vm", "delete", vm).code == 4
    assert hvmgr("vm", "rename", vm, "other").code == 4
    assert hvmgr.ok("vm", "stop", vm, "--force", "--json").json["changed"] is True
    assert hvmgr.ok("vm", "stop", vm, "--json").json["changed"] is False


def test_rename(hvmgr, vm, root):
    assert hvmgr.ok("vm", "rename", vm, "other", "--json").json["vm"]["home"] == str(root / vm)
    assert hvmgr.ok("vm", "rename", "other", "other", "--json").json["changed"] is False
    assert hvmgr("vm", "show", vm).code == 3


def test_delete_keeps_one_complete_image_per_disk(hvmgr, branched, root):
    told = hvmgr.ok("vm", "delete", branched, "--json").json
    assert told["deleted"]["name"] == branched
    assert told["kept"] == sorted(str(path) for path in (root / branched).rglob("*") if path.is_file())
    assert hvmgr.ok("vm", "list").out == ""


def test_delete_with_disks_needs_yes_without_a_terminal(hvmgr, branched, root):
    before = files_of(root)
    answer = hvmgr("vm", "delete", branched, "--with-disks")
    assert (answer.code, files_of(root)) == (2, before)
    assert "--yes" in answer.err
    assert hvmgr.ok("vm", "delete", branched, "--with-disks", "--yes", "--json").json["kept"] == []
    assert files_of(root) == {}


def test_space_adds_up(hvmgr, branched):
    (told,) = hvmgr.ok("space", branched, "--json").json["vms"]
    assert [one["name"] for one in told["snapshots"]] == ["one", "two", "three"]
    parts = sum(one["images"] + one["memory"] for one in told["snapshots"])
    orphans = sum(one["size"] for one in told["orphans"])
    assert told["total"] == parts + told["now"] + told["undo"] + told["unnamed"] + orphans
    assert told["reclaimable"] == told["pending"] + told["undo"] + orphans > 0
    assert hvmgr.ok("space", "--json").json["vms"] == [told]


def test_space_says_every_kind(hvmgr, branched):
    kinds = [row[1] for row in hvmgr.ok("space").lines]
    assert set(kinds) >= {"snapshot", "now", "undo", "unnamed", "pending", "outside", "total", "reclaimable"}


def test_config_says_where_each_setting_comes_from(hvmgr, root, tmp_path):
    told = hvmgr.ok("config", "show", "--root", tmp_path, "--json").json["config"]
    assert told["root"] == {"value": str(tmp_path), "source": "--root"}
    assert told["uri"]["source"] == "LIBVIRT_DEFAULT_URI"
    assert hvmgr.ok("config", "show").lines[1] == ["root", str(root), "HVMGR_ROOT"]


@pytest.mark.parametrize("arguments", [["version"], ["--wait", "1", "version"]])
def test_version(hvmgr, arguments):
    assert hvmgr.ok(*arguments).out == f"hvmgr {package.__version__}\n"
    assert hvmgr.ok(*arguments, "--json").json == {"schema": 1, "version": package.__version__}


def test_global_options_are_taken_before_and_after(hvmgr, vm, root):
    places = [
        ["--root", root, "vm", "list", "--json"],
        ["--json", "vm", "--root", root, "list"],
        ["vm", "--json", "list", "--root", root],
    ]
    answers = {hvmgr.ok(*one).out for one in places}
    assert len(answers) == 1


def test_a_home_that_cannot_be_read_hides_no_other(hvmgr, vm, root):
    hvmgr.ok("vm", "create", "broken", "--network", "none")
    (configuration,) = (root / "broken" / "Virtual Machines").glob("*.xml")
    configuration.write_text("<domain>\n  <name>broken</nam>\n")
    answer = hvmgr("vm", "list")
    assert (answer.code, [row[0] for row in answer.lines]) == (0, [vm])
    assert str(configuration) in answer.err
    assert hvmgr("vm", "show", vm).code == 0
