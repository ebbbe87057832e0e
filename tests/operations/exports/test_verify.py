"""Whatever is wrong with an export is found, under its code, and nothing outside it is believed or touched."""

from __future__ import annotations

import os
import shutil

import pytest

from hvmgr import errors
from hvmgr.model import manifest
from hvmgr.operations.exchange import verification


@pytest.fixture
def exported(bench):
    """A writable copy of an export with two snapshots."""
    vm = bench.make(4)
    vm.create_snapshot("one")
    bench.write(vm, 0x42)
    vm.create_snapshot("two")
    folder = bench.place / "copy" / "web"
    shutil.copytree(bench.export(vm), folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture
def codes(bench):
    def find(folder):
        found = bench.host.verify(folder)
        assert all(one.code in verification.CODES for one in found)
        assert all(one.severity is verification.CODES[one.code][0] for one in found)
        return {one.code for one in found}

    return find


def image(folder, number=0):
    return sorted((folder / "Snapshots").rglob("*.qcow2"))[number]


def snapshot(folder):
    return min((folder / "Snapshots").glob("*.xml"))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_whole_export_has_nothing(exported, codes):
    assert codes(exported) == set()


def test_folder_above_is_fine(exported, codes):
    assert codes(exported.parent) == set()


def test_folder_above_two_says_which(exported, bench):
    shutil.copytree(exported, exported.parent / "other")
    with pytest.raises(errors.UsageError, match="holds 2 exports: other, web"):
        bench.host.verify(exported.parent)


def test_changed_byte(exported, codes):
    with image(exported).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert codes(exported) == {"wrong-hash"}


def test_truncated_image(exported, codes):
    os.truncate(image(exported), 65536)
    assert codes(exported) == {"wrong-hash", "wrong-size"}


def test_missing_image(exported, codes):
    image(exported).unlink()
    assert "missing-file" in codes(exported)
    assert "missing-disk" in codes(exported)


def test_missing_snapshot(exported, codes):
    snapshot(exported).unlink()
    assert {"missing-file", "missing-snapshot"} <= codes(exported)


def test_missing_base(exported, codes):
    (exported / "Virtual Hard Disks/hda.qcow2").unlink()
    assert "missing-disk" in codes(exported)


def test_file_that_nobody_listed(exported, codes):
    (exported / "more").write_text("x")
    assert codes(exported) == {"unknown-file"}


def test_renamed_vm_in_the_manifest(exported, codes):
    told = manifest.parse((exported / manifest.FILE).read_text(), source="")
    edit(exported / manifest.FILE, f"id: {told.vm_id}", "id: 11111111-1111-4111-8111-111111111111")
    assert codes(exported) == {"wrong-hash", "manifest-disagrees"}


def test_manifest_that_is_no_yaml(exported, codes):
    (exported / manifest.FILE).write_text("a: b: c")
    assert "manifest-damaged" in codes(exported)


def test_manifest_of_a_newer_hvmgr(exported, bench):
    edit(exported / manifest.FILE, "format: 1", "format: 9")
    with pytest.raises(errors.Unsupported, match="newer"):
        bench.host.verify(exported)


@pytest.mark.parametrize(
    "line", ["nothing", "0" * 64 + "  ../../etc/passwd", "0" * 64 + "  /etc/passwd", "z" * 64 + "  a"]
)
def test_sums_that_lead_out_or_make_no_sense(exported, codes, line):
    with (exported / manifest.SUMS).open("a") as file:
        file.write(line + "\n")
    assert codes(exported) == {"sums-damaged"}


def test_symbolic_link(exported, codes):
    target = exported.parent / "elsewhere"
    shutil.move(image(exported), target)
    name = next(one for one in manifest.parse((exported / manifest.FILE).read_text(), source="").images if one.parent)
    (exported / name.file).unlink(missing_ok=True)
    (exported / name.file).symlink_to(target)
    assert "link" in codes(exported)


def test_image_on_another_parent(exported, codes, bench):
    top = image(exported)
    bench.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", top)
    assert {"wrong-hash", "wrong-parent"} <= codes(exported)


def test_configuration_with_entities(exported, codes):
    path = snapshot(exported)
    path.write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + path.read_text())
    assert {"wrong-hash", "damaged"} <= codes(exported)


def test_configuration_that_libvirt_would_not_take(exported, codes):
    edit(snapshot(exported), "<devices>", "<devices><nonsense/>")
    assert codes(exported) == {"wrong-hash", "invalid-configuration"}


def test_huge_configuration(exported, codes):
    path = snapshot(exported)
    path.write_text(path.read_text() + " " * (9 << 20))
    assert {"wrong-hash", "damaged"} <= codes(exported)


def test_tree_in_a_circle(exported, codes):
    ids = sorted(path.stem for path in (exported / "Snapshots").glob("*.xml"))
    for one, other in (ids, reversed(ids)):
        path = exported / "Snapshots" / f"{one}.xml"
        text = path.read_text()
        cut = text.index("<hvmgr:snapshot")
        head = text[cut : text.index(">", cut)]
        words = [word for word in head.rstrip("/").split(" ") if not word.startswith("parent=")]
        path.write_text(
            text.replace(head, " ".join([*words, f'parent="{other}"']) + ("/" if head.endswith("/") else ""))
        )
    assert "cycle" in codes(exported)


def test_folder_without_an_export(bench):
    with pytest.raises(errors.NotFound, match="no export"):
        bench.host.verify(bench.place)


def test_nothing_is_written(exported, codes):
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_mode) for path in exported.rglob("*")}
    codes(exported)
    assert {path: (path.lstat().st_mtime_ns, path.lstat().st_mode) for path in exported.rglob("*")} == before
