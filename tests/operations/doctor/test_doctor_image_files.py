"""What doctor says of image files that are in no home, and of drives that snapshots leave out."""

from __future__ import annotations

import hvmgr
from hvmgr.model import configuration, image_plan
from hvmgr.operations.images import changes
from hvmgr.storage import index, journal, start_guard

MIB = 1 << 20


def test_change_of_an_image_that_was_cut_off_is_named(bench):
    made = bench.host.images.create(bench.place / "base.vhd", 4 * MIB).path
    step = image_plan.CompactImage(str(made), "vhd")
    index.note_change(journal.beside(made))
    journal.begin(journal.beside(made), changes.plan_of("image compact", f"compaction of {made}", [step]))
    found = bench.one("image-change-open")
    assert f"compaction of {made}" in found.sentence
    bench.host.images.compact(made)
    assert "image-change-open" not in bench.codes()
    journal.beside(made).write_bytes(b"garbage\n")
    index.note_change(journal.beside(made))
    assert bench.one("journal-damaged").where == str(journal.beside(made))


def test_differencing_vhd_in_a_drive_that_snapshots_leave_out(bench):
    vm = bench.make()
    bench.host.images.create(bench.place / "base.vhd", 4 * MIB)
    options = hvmgr.ImageOptions(parent=bench.place / "base.vhd")
    child = bench.host.images.create(bench.place / "child.vhd", options=options).path
    file = vm.home.layout.configuration
    drive = f"<disk type='file' device='disk'><driver name='qemu' type='vpc'/><source file='{child}'/>"
    text = file.read_text("utf-8").replace("</devices>", f"{drive}<target dev='vdz'/><readonly/></disk></devices>")
    file.write_text(text, "utf-8")
    found = bench.one("image-unsupported", vm)
    assert "differencing VHD of base.vhd" in found.sentence
    assert "image convert" in found.repair
    present = configuration.parse(file.read_bytes(), source="the home")
    refused = start_guard.refusals(start_guard.examine(present))
    assert [one.where for one in refused if one.code == "image-unreadable"] == [str(child)]
