"""Saving memory in the background, cut off at moments that no real guest can be held at: it is never left stopped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hvmgr.host.domain import State
from hvmgr.model import memory_plan
from hvmgr.operations.steps import memory_steps


class Stopped:
    """A guest that stands still, of a QEMU that never had a stream."""

    name = "web"

    def __init__(self):
        self.now = State.PAUSED

    def is_active(self):
        return True

    def state(self):
        return self.now

    def resume(self):
        self.now = State.RUNNING

    def monitor(self, *_, **__):
        return {}


def session_of(domain, *, recovering):
    wanted = SimpleNamespace(wanted=False)
    return SimpleNamespace(find_domain=lambda: domain, recovering=recovering, interrupts=wanted)


@pytest.mark.parametrize(
    ("content", "state"),
    [(b"head", State.RUNNING), (None, State.RUNNING), (b"", State.PAUSED)],
    ids=["the head is there", "libvirt was to save it", "not reached: somebody else stopped it"],
)
def test_taken_back_by_the_next_command(tmp_path, content, state):
    memory, domain = tmp_path / "memory.save", Stopped()
    if content is not None:
        memory.write_bytes(content)
    step = memory_plan.ReserveMemory(path=str(memory), size=4096)
    memory_steps.unreserve(session_of(domain, recovering=True), step)
    assert domain.now is state
    assert not memory.exists()


def test_stream_that_never_began(tmp_path):
    domain = Stopped()
    step = memory_plan.AwaitMemory(path=str(tmp_path / "memory.save"))
    memory_steps.await_memory(session_of(domain, recovering=False), step)
    assert domain.now is State.RUNNING
