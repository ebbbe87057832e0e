"""Saving memory in the background, cut off at moments that no real guest can be held at: it is never left stopped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import memory_plan
from hvmgr.operations.steps import memory_steps
from hvmgr.storage import durable


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


def test_copies_are_brought_up_to_the_instant(tmp_path, monkeypatch):
    file, folder = tmp_path / "nvram", tmp_path / "tpm"
    (folder / "tpm2").mkdir(parents=True)
    file.write_bytes(b"first")
    (folder / "tpm2" / "permall").write_bytes(b"first")
    pairs = tuple((str(one), f"{one}-copy") for one in (file, folder))
    durable.copy_file(file, tmp_path / "nvram-copy")
    durable.copy_folder(folder, tmp_path / "tpm-copy")

    def copies():
        return {one.name: one.read_bytes() for one in (tmp_path / "nvram-copy", *(tmp_path / "tpm-copy").glob("*/*"))}

    session = SimpleNamespace(owner=None)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "copy_file", None)
        patch.setattr(durable, "copy_folder", None)
        memory_steps.bring_up(session, pairs)  # nothing changed: nothing is written while the guest stands still
    file.write_bytes(b"other")  # as long as before
    (folder / "tpm2" / "permall").write_bytes(b"other")
    (folder / "tpm2" / "more").write_bytes(b"new")
    memory_steps.bring_up(session, pairs)
    assert copies() == {"nvram-copy": b"other", "permall": b"other", "more": b"new"}
    (folder / "tpm2" / "more").unlink()
    memory_steps.bring_up(session, pairs)
    assert set(copies()) == {"nvram-copy", "permall"}


def test_folder_in_which_a_file_is_replaced_meanwhile_is_copied_all_the_same(tmp_path, monkeypatch):
    """As swtpm does it: a new file is renamed over the old one."""
    folder = tmp_path / "tpm"
    folder.mkdir()
    (folder / "TMP-permall").write_bytes(b"new")
    real, left = durable._copy_with_owner, [2]

    def replaced(source, target):
        if left[0]:
            left[0] -= 1
            (folder / "permall").write_bytes(b"new")
            (folder / "TMP-permall").unlink(missing_ok=True)
        return real(source, target)

    monkeypatch.setattr(durable, "_copy_with_owner", replaced)
    durable.copy_folder(folder, tmp_path / "copy")
    assert {one.name for one in (tmp_path / "copy").iterdir()} == {"permall"}
    monkeypatch.setattr(durable, "_copy_with_owner", lambda *_: real("/nowhere", "/nowhere-either"))
    with pytest.raises(errors.HostFailed, match="cannot be copied"):
        durable.copy_folder(folder, tmp_path / "none")
    assert {one.name for one in tmp_path.iterdir()} == {"tpm", "copy"}
