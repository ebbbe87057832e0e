"""Where no hook can run, every state between two steps is safe: killed before an act, then started by libvirt alone.

Before any command of hvmgr's has looked at the home, libvirt starts the VM, or its next boot does (autostart). The guest
reads the bytes of the state before or after, what it writes reaches no snapshot, and the next command goes on from there.
"""

from __future__ import annotations

import os

import pytest

from tests.operations.crash.conftest import server

# How many of its acts are killed, unless HVMGR_CRASH is ``all``.
SHAPES = {
    "create-off": 2,
    "create-undo-full": 1,
    "apply-off": 2,
    "apply-other-disks": 1,
    "undo": 1,
    "rename": 1,
    "delete-middle": 3,
    "delete-above-now": 2,
    "delete-two-disks": 1,
    "merge-pending": 1,
    "put-files": 1,
    "vm-delete": 2,
    "running-apply-memory": 2,
    "running-create": 1,
    "saved-create": 1,
    "saved-apply": 1,
}
EMBEDDED = {"apply-off": 1, "delete-middle": 2, "running-create": 1}

pytestmark = pytest.mark.crash


@pytest.fixture(scope="session")
def how_many():
    """``how_many(count)``: 0, which is every act, when HVMGR_CRASH is ``all``."""
    return lambda count: 0 if os.environ.get("HVMGR_CRASH") == "all" else count


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_then_started_by_a_daemon(crash_run, shape, how_many):
    crash_run(shape, "start", how_many(SHAPES[shape]))


@pytest.mark.parametrize("shape", EMBEDDED)
def test_killed_then_started_by_the_embedded_driver(new_embed_root, shape, how_many):
    root = new_embed_root()
    uri = f"qemu:///embed?root={root}"
    with server(root, environment={"HVMGR_CRASH_URI": uri}) as run:
        run(shape, "start", how_many(EMBEDDED[shape]))
