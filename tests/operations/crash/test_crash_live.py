"""A snapshot whose memory is saved while the guest goes on, killed before its acts: whole, without memory, or absent."""

from __future__ import annotations

import os
import shutil

import pytest

from tests import private_libvirt
from tests.operations.crash.conftest import EVERY_ACT, server

pytestmark = pytest.mark.crash

# The second only when every act is killed: it differs by one step.
SHAPES = ["live-create", *(["live-create-compressed"] if EVERY_ACT else [])]


@pytest.fixture(scope="module")
def live_run(new_embed_root):
    """As ``crash_run``, with a QEMU that gets userfaultfd whatever the host's setting is."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    if not private_libvirt.has_userfaultfd():
        pytest.skip("no userfaultfd that write-protects here")
    with (
        private_libvirt.daemon(new_embed_root(), qemu_conf=private_libvirt.WITH_RIGHTS) as daemon,
        server(daemon.root, before=daemon.enter, environment={"HVMGR_CRASH_LIVE": "1"}) as run,
    ):
        yield run


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_while_memory_is_saved_in_the_background(live_run, shape, every):
    stride = every(7)
    live_run(shape, stride, 1 + SHAPES.index(shape) * stride // 2)
