"""Images that others made: merged and removed only when the user names them, and never when somebody needs them."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import libvirt
import pytest

from hvmgr import errors
from hvmgr.faces.cli import render
from hvmgr.operations import merge, working

MIB = 1 << 20


@pytest.fixture
def elsewhere():
    """A folder on another file system than the homes."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/dev/shm"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def vm(bench):
    """Bytes of its own in a, and in the present."""
    return bench.kept(with_a)


def with_a(bench):
    vm = bench.make(4)
    bench.write(vm, 1)
    vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    return vm


def lay_over(bench, vm, path, pattern, offset, *, size=None):
    """What a backup tool does: an overlay of its own on the working image, and the VM goes on in it."""
    below = vm.now().disks["hda"]
    options = () if size is None else (size,)
    bench.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path, *options)
    path.chmod(0o640)
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", path, "qcow2"))
    bench.write_image(path, pattern, offset)
    with working.on(vm):  # takes it over
        pass
    return str(path)


@pytest.fixture
def between(bench, vm, elsewhere):
    """An overlay of others between two images of ours, which no snapshot names any more: its path."""
    path = lay_over(bench, vm, elsewhere / "backup.qcow2", 3, 2 * MIB)
    vm.create_snapshot("b")
    bench.write(vm, 4, 3 * MIB)
    vm.snapshot("b").delete()
    bench.said.clear()
    return path


def refused(vm, error, words, *images):
    """Nothing was changed, and nothing is open."""
    before = files_of(vm, images)
    with pytest.raises(error, match=words) as caught:
        vm.merge(images)
    assert files_of(vm, images) == before
    assert not vm.home.layout.journal.exists()
    return caught.value


def files_of(vm, images):
    paths = {*vm.tree().images, *(str(one) for one in images if Path(one).exists())}
    return {path: (Path(path).stat().st_mtime_ns, Path(path).stat().st_mode) for path in paths}


def test_image_of_others_stays_until_it_is_named_and_then_goes(bench, vm, between):
    before = bench.photo(vm)
    assert not vm.merge()
    assert Path(between).exists()
    assert vm.merge([between])
    assert not Path(between).exists()
    assert bench.photo(vm) == before
    assert vm.usage().by_name == ()
    assert len(vm.tree().images) == 3 - 1  # the base, which a names, and the present: what was below went with it
    bench.check(vm)
    bench.start(vm)
    vm.stop(force=True)
    assert bench.photo(vm) == before


def test_tree_and_space_say_how_it_goes(bench, vm, between):
    size = vm.tree().images[between].data
    assert vm.usage().by_name == ((between, size),)
    remarks = [line for line in render.draw_tree(vm).splitlines() if "by name" in line]
    assert remarks[0].endswith(f"merged only by name: hvmgr snapshot merge web --image {between}")
    assert len(remarks) == 2  # what stands below it waits for it
    repairs = [one.repair for one in bench.host.doctor("web") if one.code == "image-unnamed"]
    assert set(repairs) == {f"hvmgr snapshot merge 'web' --image '{between}'"}


def test_symbolic_link_and_relative_name_are_the_same_image(bench, vm, between, monkeypatch):
    link = Path(between).with_name("link")
    link.symlink_to(Path(between).name)
    monkeypatch.chdir(link.parent)
    assert vm.merge(["link"])
    assert not Path(between).exists()
    bench.check(vm)


def test_present_of_others_is_written_beside_a_named_parent(bench, vm, between, elsewhere):
    top = lay_over(bench, vm, elsewhere / "second.qcow2", 5, 0)
    third = lay_over(bench, vm, elsewhere / "third.qcow2", 6, 3 * MIB)
    before, mode = bench.photo(vm), bench.mode_of(third)
    problem = refused(vm, errors.NotFound, "no image of this VM", elsewhere / "none")
    assert between in problem.hint
    assert top in problem.hint
    vm.merge([between, top])
    working = vm.now().disks["hda"]
    assert working == third
    assert bench.photo(vm) == before
    assert (Path(between).exists(), Path(top).exists(), bench.mode_of(third)) == (False, False, mode)
    parent = vm.tree().images[third].parent
    assert parent == vm.snapshot("a").disks["hda"]
    assert parent in bench.run("qemu-img", "info", "-U", third)  # absolute: the overlay is no part of the home
    bench.check(vm)


def test_frozen_child_of_others_has_to_be_named_as_well(bench, vm, between, elsewhere):
    """Written, but kept: a snapshot names it."""
    vm.create_snapshot("b")
    child = lay_over(bench, vm, elsewhere / "second.qcow2", 5, 0)
    vm.create_snapshot("c")
    vm.snapshot("b").delete()
    before = bench.photo(vm)
    (own,) = (path for path, names in merge.outside_images.names_needed(vm.tree()).items() if names == (child,))
    refused(vm, errors.UsageError, "hvmgr's own", own)
    vm.merge([child])
    assert bench.photo(vm) == before
    assert not Path(own).exists()
    assert vm.snapshot("c").disks["hda"] == child
    assert bench.mode_of(child) == 0o400
    assert Path(between).exists()
    bench.check(vm)
    vm.delete()
    assert bench.mode_of(child) == 0o640


def test_shorter_overlay_hides_what_it_hid(bench, vm, elsewhere):
    bench.write(vm, 9, 3 * MIB)
    path = lay_over(bench, vm, elsewhere / "short.qcow2", 3, MIB, size=2 * MIB)
    vm.create_snapshot("b")
    bench.run("qemu-img", "resize", "-q", vm.now().disks["hda"], 4 * MIB)
    before = bench.photo(vm)
    assert 3 * MIB not in before["now hda"][1]
    vm.snapshot("b").delete()
    vm.merge([path])
    assert bench.photo(vm)["now hda"] == before["now hda"]
    bench.check(vm)


@pytest.mark.parametrize("running", [False, True], ids=["off", "running"])
def test_overlay_of_virsh_is_merged_once_libvirt_has_forgotten_it(bench, vm, running):
    if running:
        bench.start(vm)
    handle = bench.domain(vm)._handle()
    made = handle.snapshotCreateXML(
        "<domainsnapshot><name>virsh</name></domainsnapshot>", libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    )
    if running:
        vm.stop(force=True)
    overlay = re.search(r"source file='([^']*\.virsh)'", bench.domain(vm).xml(live=False))[1]
    bench.write_image(overlay, 3, 2 * MIB)
    vm.create_snapshot("b")
    before = bench.photo(vm)
    vm.snapshot("b").delete()
    problem = refused(vm, errors.Conflict, "needed by libvirt's snapshot 'virsh'", overlay)
    assert "virsh snapshot-delete VM SNAPSHOT --metadata" in problem.hint
    made.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    vm.merge([overlay])
    assert not Path(overlay).exists()
    assert bench.photo(vm)["now hda"] == before["now hda"]
    bench.check(vm)
    bench.start(vm)


def test_present_that_names_its_chain_to_libvirt_starts_after_the_merge(bench, vm, between, elsewhere):
    """virsh leaves the chain in the configuration: it would name an image that is gone."""
    top = lay_over(bench, vm, elsewhere / "second.qcow2", 5, 0)

    def state_chain(edited):
        driver = edited.root.find("devices/disk[@device='disk']/driver")
        chain = edited.root.makeelement("backingStore", type="file")
        chain.append(edited.root.makeelement("format", type="qcow2"))
        chain.append(edited.root.makeelement("source", file=vm.tree().images[top].parent))
        chain.append(edited.root.makeelement("backingStore"))
        driver.getnext().addnext(chain)

    bench.edit(vm, state_chain)
    with working.on(vm):
        pass
    assert vm.home.present().has_backing_chains
    before = bench.photo(vm)
    vm.merge([between, top])
    assert bench.photo(vm) == before
    bench.check(vm)
    bench.start(vm)


def test_what_a_running_vm_has_open_waits(bench, vm, between):
    bench.start(vm)
    assert not vm.merge([between])
    assert any("it waits" in line and between in line for line in bench.said)
    assert Path(between).exists()
    vm.stop(force=True)
    before = bench.photo(vm)
    assert vm.merge([between])
    assert bench.photo(vm) == before


def test_on_another_branch_it_is_merged_while_the_vm_runs(bench, vm, between):
    before = bench.photo(vm)
    vm.create_snapshot("tip")
    vm.snapshot("a").apply()
    bench.start(vm)
    assert vm.merge([between])
    assert not Path(between).exists()
    vm.stop(force=True)
    assert bench.photo(vm)["tip hda"] == before["now hda"]
    bench.check(vm)


def test_bases_are_never_merged_away(bench, vm, between):
    gold = bench.image("gold.qcow2", fill=(7,))
    other = bench.make(bench.in_place(gold), name="other")
    other.create_snapshot("one")
    other.snapshot("one").delete()
    assert "is a base" in str(refused(other, errors.Conflict, "never merged away", gold))
    assert gold.exists()


def test_with_two_children_it_stays(bench, vm, elsewhere):
    path = lay_over(bench, vm, elsewhere / "backup.qcow2", 3, 2 * MIB)
    vm.create_snapshot("b")
    vm.create_snapshot("c")
    vm.snapshot("b").apply()
    vm.create_snapshot("d")
    vm.merge([path])  # takes what is below
    refused(vm, errors.Conflict, "needed by snapshot", path)
    vm.snapshot("b").delete()
    refused(vm, errors.Conflict, "2 images stand on", path)


def test_what_another_vm_needs_stays_and_the_user_is_named(bench, vm, between):
    other = bench.make(name="other")
    overlay = bench.image("theirs.qcow2", fill=(8,), backing=(between, "qcow2"))
    bench.edit(other, lambda edited: edited.set_disk_source("hda", overlay, "qcow2"))
    with working.on(other):
        pass
    theirs = bench.bytes_of(overlay)
    problem = refused(vm, errors.Conflict, "is needed by other", between)
    assert problem.facts["users"] == ["other"]
    assert bench.bytes_of(overlay) == theirs


def test_user_that_comes_while_it_is_planned_is_respected(bench, vm, between, monkeypatch):
    """The last count is made under the host-wide lock."""
    overlay = bench.image("theirs.qcow2", fill=(8,), backing=(between, "qcow2"))
    other = bench.make(name="other")
    require_space = merge._require_space

    def come(*arguments):
        require_space(*arguments)
        bench.edit(other, lambda edited: edited.set_disk_source("hda", overlay, "qcow2"))

    before, theirs = bench.photo(vm), bench.bytes_of(overlay)
    monkeypatch.setattr(merge, "_require_space", come)
    with pytest.raises(errors.Conflict, match=r"images wait to be merged .*is needed by other"):
        vm.merge([between])
    assert bench.photo(vm) == before
    assert bench.bytes_of(overlay) == theirs
    bench.check(vm)
