"""What keeps QEMU's user from a home or an image, as doctor sees it."""

from __future__ import annotations

import os

import pytest

from hvmgr import errors, settings
from hvmgr.host.hypervisor import Driver

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


def test_ordinary_user_on_the_systems_connection_is_told_what_is_missing(bench, vm, monkeypatch):
    before = vm.snapshots()
    monkeypatch.setattr(bench.host.connection, "driver", Driver.SYSTEM)
    monkeypatch.setattr(settings, "is_root", lambda: False)
    one = bench.one("user-limited")
    assert "only root can keep the images" in one.sentence
    assert "qemu:///session" in one.repair
    with pytest.raises(errors.Unsupported, match="only root"):
        vm.create_snapshot("one")
    assert vm.snapshots() == before
