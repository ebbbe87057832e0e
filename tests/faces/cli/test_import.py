"""``hvmgr import`` and ``compare``: a report, a plan in a file, and JSON for machines."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def source(hvmgr, branched, root):
    """The home of a VM that is no more, as somebody copied it."""
    folder = root.parent / "exports" / "web"
    shutil.copytree(root / branched, folder)
    shutil.rmtree(folder / ".hvmgr")
    hvmgr.ok("vm", "delete", branched, "--with-disks", "--yes")
    folder.parent.chmod(0o711)
    folder.chmod(0o711)
    return folder


def test_import_says_what_it_made(hvmgr, source, root):
    told = hvmgr.ok("import", source, "--name", "new").out
    assert told == f"imported new into {root}/new\n"
    shown = hvmgr.ok("import", source, "--name", "again", "--json").json
    assert (shown["changed"], shown["mode"], shown["vm"]["name"]) == (True, "copy", "again")
    assert len(hvmgr.ok("snapshot", "list", "new", "--json").json["snapshots"]) == 3


def test_compare_reports_and_changes_nothing(hvmgr, source, root):
    before = sorted(root.parent.rglob("*"))
    hvmgr.ok("import", source, "--name", "there")
    answer = hvmgr.ok("compare", source, "--name", "there", "--json").json
    assert not answer["ready"]
    assert {one["code"] for one in answer["findings"] if one["severity"] == "error"} == {"name-in-use", "target-exists"}
    assert all(set(one) == {"code", "severity", "sentence", "where", "repair"} for one in answer["findings"])
    lines = hvmgr.ok("compare", source, "--name", "there").lines
    assert lines[0][:2] == ["error", "name-in-use"]
    assert [path for path in sorted(root.parent.rglob("*")) if root / "there" not in (path, *path.parents)][
        :1
    ] == before[:1]


def test_import_with_open_errors_does_nothing(hvmgr, source):
    hvmgr.ok("import", source, "--name", "there")
    answer = hvmgr("import", source, "--name", "there", "--json")
    assert answer.code == 4
    assert answer.json["error"]["facts"]["findings"][0]["code"] == "name-in-use"


def test_plan_file(hvmgr, source, tmp_path):
    file = tmp_path / "web.yaml"
    answer = hvmgr.ok("compare", source, "--plan-out", file, "--json").json
    assert answer["plan"] == str(file)
    assert hvmgr("compare", source, "--plan-out", file).code == 4
    file.write_text(file.read_text().replace('name: "web', 'name: "planned', 1))
    assert hvmgr.ok("compare", "--plan", file, "--json").json["name"].startswith("planned")
    assert hvmgr.ok("import", "--plan", file, "--json").json["vm"]["name"].startswith("planned")
    file.write_text(file.read_text().replace("mode: copy", "mode: lnk"))
    answer = hvmgr("import", "--plan", file)
    assert answer.code == 2
    assert f"{file}, line " in answer.err
    assert hvmgr("import", "--plan", file, "--name", "x").code == 2


def test_dry_run_shows_the_plan(hvmgr, source, root):
    told = hvmgr.ok("import", source, "--name", "new", "--dry-run").out
    assert "define the configuration in libvirt" in told
    assert not (root / "new").exists()
    told = hvmgr.ok("import", source, "--mode", "register", "--dry-run").out
    assert "make " in told
    assert not (source / ".hvmgr").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--network", "lan"), "OLD=NEW"),
        (("--nic", "lan=x"), "not the address of a card"),
        (("--network", "nowhere=x"), "would be ignored"),
        (("--network", "nowhere=x"), "it has no cards"),
        (("--disk", "vdz=/x"), "would be ignored"),
        (("--mode", "register", "--vm-path", "/x"), "would be ignored"),
        (("--new-id", "--keep-id"), "exclude each other"),
        (("--replace",), "--keep-id"),
        (("--drop-snapshot", "nobody"), "there is no snapshot 'nobody'"),
    ],
)
def test_wrong_requests(hvmgr, source, words, told):
    answer = hvmgr("import", source, *words)
    assert answer.code in (2, 3)
    assert told in answer.err


def test_owner_is_shown_and_found(hvmgr, source):
    hvmgr.ok("import", source, "--name", "a", "--owner", "anna", "--tag", "shop")
    hvmgr.ok("import", source, "--name", "b", "--owner", "bert")
    assert [line[0] for line in hvmgr.ok("vm", "list", "--owner", "anna").lines] == ["a"]
    assert [line[0] for line in hvmgr.ok("vm", "list", "--tag", "shop").lines] == ["a"]
    shown = hvmgr.ok("vm", "show", "a", "--json").json
    assert (shown["owner"], shown["tags"]) == ("anna", ["shop"])
