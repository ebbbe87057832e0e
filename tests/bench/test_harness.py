"""The measurements measure: whether an aim is met is theirs to say, not the tests'."""

from __future__ import annotations

import os
import shutil

import pytest

from bench import (
    ansible,
    beside_libvirt,
    exchange,
    exchange_import,
    harness,
    hook,
    http,
    inside,
    running_backup,
    snapshots,
    transfer,
    vhd,
    wim,
)
from bench.harness import Result
from hvmgr import units


def test_contenders_take_turns():
    calls = []
    medians = harness.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert medians.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("result", "met"),
    [
        (Result("ratio", 2.0, 1.0, "it", aim=2), True),
        (Result("ratio", 2.1, 1.0, "it", aim=2), False),
        (Result("seconds", 0.2, limit=0.25), True),
        (Result("seconds", 0.3, 1.0, "it", limit=0.25), False),
        (Result("no aim", 3.0, 1.0, "it"), None),
    ],
)
def test_aim_is_the_largest_ratio_or_the_most_seconds(result, met):
    assert result.is_met is met


def test_table_says_what_was_missed():
    lines = harness.table([Result("one", 0.2, 0.05, "other", aim=8), Result("two", 2.0, limit=0.5)]).splitlines()
    assert lines[2].split() == ["one", "200", "ms", "50.0", "ms", "other", "4.00", "<=", "8", "yes"]
    assert lines[3].split() == ["two", "2.00", "s", "<=", "500", "ms", "NO"]


def test_program_that_fails_stops_the_measurement():
    with pytest.raises(SystemExit, match="no such thing"):
        harness.program(["sh", "-c", "echo no such thing >&2; exit 3"])


@pytest.mark.libvirtd
def test_every_part_of_the_suite_measures():
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    scale = snapshots.Scale(
        rounds=1,
        slow_rounds=1,
        warm_up=0,
        branches=2,
        branch_length=3,
        data=4 * units.MIB,
        disk=64 * units.MIB,
    )
    results = snapshots.measure(lambda _: None, scale)
    assert [result.what for result in results if not result.ours > 0] == []
    assert len(harness.table(results).splitlines()) == 2 + len(results)


@pytest.mark.libvirtd
def test_every_part_of_the_hook_measures():
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    results = hook.measure(lambda _: None, snapshots.Scale(rounds=1, warm_up=0), length=2)
    assert [result.what for result in results if result.ours > 0] == [result.what for result in results]
    assert len(results) == 7


@pytest.mark.libvirtd
def test_adopting_is_measured():
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    results = beside_libvirt.measure(lambda _: None, beside_libvirt.Scale(rounds=1, snapshots=2))
    assert [result.what for result in results if not result.ours > 0] == []


@pytest.mark.libvirtd
def test_imports_are_measured():
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    scale = exchange_import.Scale(
        rounds=1, warm_up=0, small=units.MIB, large=units.GIB, disk=8 * units.MIB, data=2 * units.MIB
    )
    results = exchange_import.measure(lambda _: None, scale)
    assert len(results) >= 2


@pytest.mark.libvirtd
def test_exports_are_measured():
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    scale = exchange.Scale(
        rounds=1, warm_up=0, disk=32 * units.MIB, data=16 * units.MIB, tree=2, chain=2, image_data=units.MIB
    )
    results = exchange.measure(lambda _: None, scale)
    assert [result.what for result in results if not result.ours > 0] == []


def test_every_part_of_vhd_measures():
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    scale = vhd.Scale(
        rounds=1,
        warm_up=0,
        disk=64 * units.MIB,
        data=16 * units.MIB,
        chain=2,
        image_data=2 * units.MIB,
        checked=64 * units.MIB,
        allocated=16 * units.MIB,
        opened=units.GIB,
    )
    results = vhd.measure(lambda _: None, scale)
    assert [result.what for result in results if not result.ours > 0] == []
    assert len(harness.table(results).splitlines()) == 2 + len(results)


def test_every_part_of_wim_measures():
    if shutil.which("wimlib-imagex") is None or shutil.which("mkntfs", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("needs wimlib and ntfs-3g")
    results = wim.measure(lambda _: None, wim.Scale(1, 0, files=20, data=units.MIB, disk=16 * units.MIB))
    assert [result.what for result in results if not result.ours > 0] == []
    assert len(results) == 3


def test_every_part_of_transfer_measures():
    if shutil.which("qemu-img") is None or shutil.which("nbdcopy") is None:
        pytest.skip("needs qemu-img and nbdcopy")
    scale = transfer.Scale(rounds=1, warm_up=0, disk=256 * units.MIB, allocated=64 * units.MIB, data=32 * units.MIB,
                           changed=16 * units.MIB)  # fmt: skip
    results = transfer.measure(lambda _: None, scale)
    assert [result.what for result in results if not result.ours > 0] == []


def test_every_part_of_http_measures(require_program):
    for name in ("qemu-img", "curl", "apt-get"):
        require_program(name)
    scale = http.Scale(rounds=1, warm_up=0, data=4 * units.MIB, at_once=(1, 2))
    results = http.measure(lambda _: None, scale)
    assert [result.what for result in results if not result.ours > 0] == []
    assert len(results) == 5


def test_backup_of_a_running_vm_is_measured():
    if os.geteuid() != 0 or shutil.which("libvirtd") is None or shutil.which("virtnbdbackup") is None:
        pytest.skip("needs root, libvirtd and virtnbdbackup, which `make bench` installs")
    scale = running_backup.Scale(rounds=1, disk=64 * units.MIB, changed=16 * units.MIB)
    results = running_backup.measure(lambda _: None, scale)
    assert [result.ours > 0 for result in results] == [True, True]


def test_ansible_is_measured():
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    results = ansible.measure(lambda _: None, ansible.Scale(rounds=1, warm_up=0, hosts=(1, 2)))
    assert [one.ratio is not None for one in results] == [True, True]


@pytest.mark.libvirtd
def test_files_inside_disks_are_measured(require_program):
    require_program("mke2fs")
    scale = inside.Scale(
        rounds=1,
        warm_up=0,
        files=20,
        large=units.MIB,
        small_disk=16 * units.MIB,
        large_disk=32 * units.MIB,
        with_guestfish=False,
    )
    results = inside.measure(lambda _: None, scale)
    assert all(result.ours > 0 for result in results)
    assert {result.aim for result in results} >= {1.2}
    assert any(result.limit == 0.3 for result in results)
