"""Raw images whose length is no whole number of sectors, and homes in the place of others."""

from __future__ import annotations

import os
import shutil

import pytest

MIB = 1 << 20


@pytest.mark.parametrize("more", [1, 511, 700])
def test_raw_image_of_an_odd_length_in_place(bench, more):
    path = bench.place / "odd.raw"
    path.write_bytes(os.urandom(MIB + more))
    before = bench.file_of(path)
    vm = bench.make(bench.in_place(path))
    vm.create_snapshot("one")
    bench.write(vm, 0x11)
    vm.create_snapshot("two")
    bench.start(vm)
    vm.stop(force=True)
    vm.snapshot("one").apply()
    vm.undo()
    vm.snapshot("two").delete()
    assert bench.file_of(path)[:3] == before[:3]
    bench.check(vm)
    vm.delete()
    assert path.stat().st_size == MIB + more


def test_home_in_the_place_of_one_that_was_removed_by_hand(bench):
    dead = bench.make(4)
    dead.create_snapshot("one")
    shutil.rmtree(dead.path)
    bench.domain(dead).undefine()
    vm = bench.make(4)
    assert vm.path == dead.path
    vm.create_snapshot("one")
    bench.write(vm, 0x11)
    vm.snapshot("one").apply()
    vm.snapshot("one").delete()
    vm.merge()
    bench.check(vm)
