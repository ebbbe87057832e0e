"""What else may befall an operation: a full disk, dying helpers, other commands, signals; each leaves a whole state."""

from __future__ import annotations

import pytest

CASES = [
    "no_space_create",
    "no_space_memory",
    "no_space_put_away",
    "no_space_convert",
    "no_space_merge_up",
    "no_space_merge_down",
    "read_only_home",
    "daemon_dies",
    "qemu_dies",
    "second_command",
    "waiting_command",
    "stopped_while_preparing",
    "stopped_while_finishing",
    "stopped_while_merging",
    "synced_in_order",
]

STARTED = [
    "create-off",
    "apply-off",
    "undo",
    "delete-middle",
    "delete-above-now",
    "rename",
    "vm-delete",
    "vm-delete-with-disks",
]

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("case", CASES)
def test_fault_leaves_a_whole_state(crash_run, case):
    crash_run(case, program="faults")


@pytest.mark.parametrize("shape", STARTED)
def test_vm_started_by_others_between_two_steps(crash_run, shape):
    crash_run("started_between_steps", shape, program="faults")
