"""What people type wrong: one clear sentence, the documented exit code, and nothing changed."""

from __future__ import annotations

import json
import os

import pytest

from tests.faces.cli.conftest import files_of

# arguments, exit code, what the two lines have to say
CASES = {
    "no-such-vm": (["snapshot", "list", "webb1"], 3, "there is no VM 'webb1'"),
    "near-vm": (["vm", "show", "VM0"], 3, "did you mean 'VM'?"),
    "vm-with-a-very-long-name": (["vm", "show", "w" * 300], 3, "there is no VM 'www"),
    "vm-outside-the-root": (["vm", "show", "../etc"], 3, "there is no VM '../etc'"),
    "empty-vm": (["vm", "show", ""], 3, "there is no VM ''"),
    "no-such-snapshot": (["snapshot", "show", "VM", "nine"], 3, "there is no snapshot 'nine' in VM"),
    "near-snapshot": (["snapshot", "apply", "VM", "thre"], 3, "did you mean 'three'?"),
    "short-id": (["snapshot", "show", "VM", "0123456"], 3, "there is no snapshot '0123456'"),
    "ambiguous": (["snapshot", "apply", "VM", "twice"], 2, "2 snapshots are called 'twice'"),
    "empty-name": (["snapshot", "create", "VM", ""], 2, "cannot be empty"),
    "blank-name": (["snapshot", "rename", "VM", "one", "  "], 2, "cannot be empty"),
    "long-name": (["snapshot", "create", "VM", "n" * 101], 2, "at most 100 characters, this one has 101"),
    "control-character": (["snapshot", "create", "VM", "a\x07b"], 2, "control characters"),
    "control-character-in-notes": (["snapshot", "notes", "VM", "one", "a\x07b"], 2, "control character"),
    "name-of-a-vm-with-a-slash": (["vm", "create", "a/b"], 2, "cannot be the name of a VM"),
    "wait-abc": (["vm", "list", "--wait", "abc"], 2, "--wait: 'abc' is not a number of seconds"),
    "wait-negative": (["vm", "list", "--wait=-1"], 2, "'-1' is not a number of seconds"),
    "wait-nan": (["vm", "list", "--wait", "nan"], 2, "'nan' is not a number of seconds"),
    "timeout-abc": (["vm", "stop", "VM", "--timeout", "soon"], 2, "--timeout: 'soon' is not a number of seconds"),
    "near-option": (["vm", "list", "--jsn"], 2, "did you mean '--json'?"),
    "unknown-option": (["vm", "list", "--frobnicate"], 2, "hvmgr vm list has no option '--frobnicate'"),
    "near-command": (["snapshot", "creat", "VM"], 2, "did you mean 'create'"),
    "unknown-command": (["frobnicate"], 2, "hvmgr has no command 'frobnicate'"),
    "missing-argument": (["snapshot", "apply", "VM"], 2, "SNAP is missing"),
    "missing-value": (["vm", "list", "--root"], 2, "needs a value\n  see: hvmgr vm list --help"),
    "too-many-arguments": (["snapshot", "tree", "VM", "more"], 2, "unexpected extra argument"),
    "no-command": (["snapshot"], 2, "hvmgr snapshot needs a command"),
    "type-that-is-none": (["snapshot", "create", "VM", "--type", "odd"], 2, "--type: 'odd' is not one of"),
    "memory-that-is-no-size": (["vm", "create", "new", "--memory", "much"], 2, "--memory: 'much' is not a size"),
    "little-memory": (["vm", "create", "new", "--memory", "512"], 2, "write the unit: 512M"),
    "disk-that-is-nothing": (["vm", "create", "new", "--disk", "much"], 3, "--disk much: no size, and no file"),
    "in-place-without-a-path": (["vm", "create", "new", "--disk", "8M", "--in-place"], 2, "--in-place needs"),
    "network-that-is-none": (["vm", "create", "new", "--network", "x=y"], 2, "'x=y' is not a network"),
    "network-that-no-xml-holds": (["vm", "create", "new", "--network", "a\x01b"], 2, "control character"),
    "home-below-a-file": (["vm", "create", "new", "--home", "/etc/passwd/x"], 2, "/etc/passwd is no folder"),
    "disk-without-a-unit": (["vm", "create", "new", "--disk", "20"], 2, "a disk cannot have 20 bytes"),
    "empty-disk": (["vm", "create", "new", "--disk", ""], 3, "no size, and no file"),
    "name-and-file": (["vm", "create", "new", "-f", "x.yaml"], 2, "not both"),
    "neither-name-nor-file": (["vm", "create"], 2, "NAME or -f SPEC is missing"),
    "option-and-file": (["vm", "create", "-f", "x.yaml", "--memory", "1G"], 2, "--memory and -f exclude each other"),
    "no-such-file": (["vm", "create", "-f", "/no/such.yaml"], 3, "there is no file /no/such.yaml"),
    "file-that-is-a-folder": (["vm", "create", "-f", "/etc"], 2, "/etc cannot be read"),
    "export-into-a-file": (["export", "VM", "/etc/passwd"], 2, "/etc/passwd is no folder"),
    "export-to-nowhere": (["export", "VM", ""], 2, "DEST: it is empty"),
    "empty-root": (["vm", "list", "--root", ""], 2, "--root: it is empty"),
    "vm-that-is-there": (["vm", "create", "VM"], 4, "already"),
    "root-that-is-no-folder": (["vm", "list", "--root", "/etc/passwd"], 2, "/etc/passwd is no folder"),
    "remote-connection": (["vm", "start", "VM", "-c", "qemu+ssh://host/system"], 5, "may reach another host"),
    "connection-that-is-none": (["vm", "start", "VM", "-c", "qemu://["], 2, "qemu://[ is no URI"),
    "no-libvirt": (["vm", "start", "VM", "-c", "qemu+unix:///system?socket=/nowhere"], 8, "/nowhere"),
    "nothing-to-undo": (["snapshot", "undo", "VM"], 3, "there is nothing to undo"),
    "slow-merge": (["snapshot", "merge", "VM", "--bandwidth", "10K"], 2, "less than 1 MiB a second"),
    "merge-at-no-rate": (["snapshot", "delete", "VM", "one", "--bandwidth", "fast"], 2, "is not a size"),
    "merge-at-less-than-nothing": (
        ["snapshot", "merge", "VM", "--bandwidth", "-1"],
        2,
        "--bandwidth: '-1' is not a size",
    ),
    "vm-without-a-near-name": (["snapshot", "list", "%%%"], 3, "known: 'VM'; hvmgr vm list shows all, hvmgr vm adopt"),
    "put-where-no-file-system-is": (["file", "put", "VM", "/etc/hostname", "/"], 5, "make a file system there first"),
    "name-that-reads-as-an-option": (["vm", "create", "-dash", "--disk", "8M"], 2, "begins with '-' comes after all"),
    "option-behind-the-names": (["snapshot", "apply", "VM", "--", "one", "--no-undo"], 2, "options come before '--'"),
    "memory-without-a-unit": (["vm", "create", "x", "--memory", "1"], 2, "1 B of memory is too little"),
    "subtree-without-a-yes": (
        ["snapshot", "delete", "VM", "three", "--subtree"],
        2,
        "deleted: three, twice, twice; nobody",
    ),
    "clone-of-its-own-name": (["vm", "clone", "VM", "VM"], 4, "already\n  choose another name"),
    "both-ways-to-delete": (["snapshot", "delete", "VM", "one", "--subtree", "--state-only"], 2, "exclude each other"),
    "hook-for-ever": (["hook", "allow", "VM"], 2, "say so: --once"),
    "hook-of-no-vm": (["hook", "allow", "nobody", "--once"], 3, "there is no VM 'nobody'"),
    "hook-in-no-folder": (["hook", "install", "--dir", "/no/such/hooks"], 3, "there is no /no/such"),
    "before-all-times": (["watch", "--since", "0001-01-01"], 2, "neither a length of time nor a time"),
    "users-in-a-folder": (["user", "list", "--users", "/etc"], 8, "/etc cannot be read: Is a directory"),
    "catalog-in-a-file": (["catalog", "list", "--catalog", "/etc/passwd"], 2, "/etc/passwd/catalog.json is no folder"),
    "deployed-to-nothing": (["catalog", "deploy", "x", "--to", ""], 2, "'' cannot be the name of a VM"),
    "shell-that-is-none": (["completion", "csh"], 2, "'csh' is not one of"),
}


@pytest.fixture
def known(hvmgr, vm):
    """The VM of the cases: its snapshots have the names one, three, and twice two times."""
    for name in ("one", "three", "twice", "twice"):
        hvmgr.ok("snapshot", "create", vm, name)
    return vm


def test_each_is_one_sentence_with_its_exit_code_and_changes_nothing(hvmgr, known, root):
    before = files_of(root)
    for case, (words, code, told) in CASES.items():
        arguments = [word.replace("VM", known) for word in words]
        answer = hvmgr(*arguments)
        assert (answer.code, answer.out) == (code, ""), (case, answer)
        assert told.replace("VM", known) in answer.err or told in answer.err, (case, answer.err)
        first, *rest = answer.err.splitlines()
        assert first.startswith("hvmgr: "), case
        assert all(line.startswith("  ") for line in rest), (case, answer.err)
        assert files_of(root) == before, case


def test_each_is_one_document_with_json(hvmgr, known):
    for case, (words, code, _) in CASES.items():
        answer = hvmgr(*(word.replace("VM", known) for word in words), "--json")
        if case in {"missing-value", "option-behind-the-names"}:
            continue  # it takes --json for the value, or for a name
        assert (answer.code, answer.err) == (code, ""), (case, answer)
        document = json.loads(answer.out)
        assert set(document) == {"schema", "error"}, case
        assert set(document["error"]) == {"code", "message", "hint", "facts"}, case
        assert document["error"]["code"] != "Defect", case


def test_damaged_xml_is_told_with_line_and_column(hvmgr, known, root):
    snapshots = sorted((root / known / "Snapshots").glob("*.xml"))
    snapshots[0].write_text("<domain>\n  <name>web</nam>\n</domain>\n")
    before = files_of(root)
    answer = hvmgr("snapshot", "list", known)
    assert answer.code == 6
    assert str(snapshots[0]) in answer.err
    assert "line 2, column" in answer.err
    assert "hvmgr doctor" in answer.err
    assert files_of(root) == before


def test_refused_creation_and_dry_run_leave_no_root(hvmgr, root):
    hvmgr.ok("vm", "create", "new", "--network", "none", "--dry-run")
    assert hvmgr("vm", "create", "new", "--cdrom", "/etc", "--network", "none").err.startswith("hvmgr: /etc is no file")
    assert not root.exists()


def test_first_vm_is_yet_to_come(hvmgr, root):
    answer = hvmgr("vm", "show", "web")
    assert (answer.code, answer.err.splitlines()[1:]) == (
        3,
        [
            "  no VM is there: hvmgr vm create makes one, hvmgr vm adopt takes one of libvirt's, --root names another place"
        ],
    )


def test_folder_that_is_no_home_is_no_vm(hvmgr, vm, root):
    (root / "empty" / "Virtual Machines").mkdir(parents=True)
    assert hvmgr("vm", "show", "empty").code == 3
    assert [row[0] for row in hvmgr.ok("vm", "list").lines] == [vm]


def test_nothing_is_made_in_the_home_of_a_vm(hvmgr, vm, root, tmp_path):
    hvmgr.ok("vm", "create", "other", "--network", "none")
    hvmgr.ok("export", "other", tmp_path)
    before, inside = files_of(root), root / vm / "inside"
    for words in (
        ["vm", "create", "new", "--home", inside, "--network", "none"],
        ["vm", "move", "other", root / vm],
        ["vm", "clone", "other", "new", "--vm-path", inside],
        ["import", tmp_path / "other", "--name", "new", "--new-id", "--vm-path", inside],
        ["export", "other", inside],
    ):
        answer = hvmgr(*words)
        assert answer.code in {2, 4}, (words, answer)
        assert f"lies in {root / vm}, which is a VM's home" in answer.err, (words, answer)
    assert files_of(root) == before


def test_place_whose_name_is_not_utf8_is_refused(hvmgr, vm, root, tmp_path):
    hvmgr.ok("export", vm, tmp_path)
    place = root / os.fsdecode(b"na\xefve")
    before = files_of(root)
    for words in (
        ["vm", "create", "new", "--home", place, "--network", "none"],
        ["vm", "move", vm, place],
        ["vm", "clone", vm, "new", "--vm-path", place],
        ["import", tmp_path / vm, "--name", "new", "--new-id", "--disk-path", place],
        ["import", tmp_path / vm, "--name", "new", "--new-id", "--snapshot-path", place],
        ["export", vm, place],
    ):
        answer = hvmgr(*words)
        assert (answer.code, "a name that is not UTF-8" in answer.err) == (5, True), (words, answer)
    assert files_of(root) == before


def test_home_deep_below_the_root_is_found(hvmgr, root):
    (root / "group").mkdir(parents=True)
    hvmgr.ok("vm", "create", "deep", "--network", "none", "--home", root / "group" / "deep")
    assert hvmgr.ok("vm", "show", "deep", "--json").json["vm"]["home"] == str(root / "group" / "deep")
    assert len(hvmgr.ok("vm", "list").lines) == 1


def test_source_of_another_kind_says_which_there_are(hvmgr, vm, tmp_path):
    hvmgr.ok("export", vm, tmp_path, "--exclude-disk", "vda")
    told = hvmgr("import", tmp_path / vm / "export.yaml", "--name", "new", "--new-id")
    assert (told.code, "name an export's folder" in told.err) == (6, True)
    told = hvmgr("import", tmp_path / vm, "--name", "new", "--new-id", "--disk-target", f"vda={tmp_path / 'x'}")
    assert (told.code, told.err.splitlines()[-1]) == (2, "  it has no disks")
