"""What keeps QEMU's user from a home or an image, as doctor sees it."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's QEMU is the user")


def test_way_to_an_image_outside_that_was_closed_is_named(bench):
    folder = bench.place / "gold"
    folder.mkdir(mode=0o711)
    base = bench.image("base.qcow2", fill=(7,)).rename(folder / "base.qcow2")
    vm = bench.make(bench.in_place(base))
    bench.healthy(vm)
    folder.chmod(0o700)
    one = bench.one("way-closed", vm)
    assert f"may not pass through {folder} to {base}" in one.sentence
    assert one.repair == f"chmod o+x '{folder}'"


def test_nvram_of_another_user_is_given_to_qemus(bench):
    vm = bench.make(4)
    present = vm.home.present()
    if present.nvram is None:
        pytest.skip("this VM has no NVRAM")
    present.nvram.write_bytes(b"")
    os.chown(present.nvram, 65534, 65534)
    assert bench.codes(vm) == {"owner-wrong"}
    assert bench.repair(vm) == ["owner-wrong"]
    bench.healthy(vm)
