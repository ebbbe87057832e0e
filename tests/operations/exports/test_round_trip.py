"""What was exported comes in again: the same bytes, the same tree, whatever part was exported."""

from __future__ import annotations

import pytest

import hvmgr
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.manifest import Extent


def bring(bench, folder, **options):
    return bench.host.import_vm(folder, hvmgr.ImportOptions(name="again", **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": ("three",)}, {"snapshots": Extent.NONE}, {"snapshot": "two", "format": ImageFormat.RAW}],
    ids=str,
)
def test_export_comes_in_as_a_copy(bench, branched, options):
    seen = bench.photo(branched)
    folder = bench.export(branched, **options)
    made = bring(bench, folder)
    wanted = {"now hda": seen["two hda"]} if "snapshot" in options else seen
    if "keep" in options:
        wanted = {name: one for name, one in seen.items() if name.split()[0] in ("three", "now")}
    if "snapshots" in options:
        wanted = {"now hda": seen["now hda"]}
    assert bench.photo(made) == wanted
    bench.check_export(folder)
    bench.check(made)


def test_pruned_tree_can_be_worked_with(bench, branched):
    made = bring(bench, bench.export(branched, keep=("one", "three")))
    before = bench.photo_of(made, "three")
    made.snapshot("three").apply()
    assert bench.photo(made)["now hda"] == before
    made.snapshot("one").delete()
    assert bench.photo_of(made, "three") == before
    bench.check(made)
