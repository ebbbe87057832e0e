"""``file restore --to running``: into a real guest, by Debian's own qemu-guest-agent, which may also hang, die, or be forbidden."""

from __future__ import annotations

import hashlib
import os
import signal

import pytest

from hvmgr import errors
from hvmgr.host import guest_files
from hvmgr.model.put_options import FilesWanted
from hvmgr.operations.inside import guest_scripts, views
from tests.storage import encrypted, file_trees

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

_TREE = """
mkdir -p /files/tree/deep && cd /files/tree && dd if=/dev/urandom of=data bs=1k count=600 2> /dev/null
echo small > 'deep/odd "name"' && ln -s ../no deep/link && : > empty
chown 7:8 data && chmod 4750 data && touch -d @1600000000 data && sync
"""


@pytest.fixture
def machine(agents, connection):
    """A guest with a tree of files on its disk, a snapshot of which is called 'before'."""
    made = agents.make(connection.uri)
    made.files = guest_files.opened(made.domain)
    made.shell = lambda script, *words: in_guest(made, script, *words)
    made.shell(_TREE)
    made.vm.create_snapshot("before", type="disk-only")
    made.said.clear()
    return made


def in_guest(machine, script, *words):
    answer = machine.files.run(script, *words)
    assert answer.code == 0, answer
    return answer.said.strip()


def restore(machine, *paths, overwrite=True, into=b"/files/tree", **wishes):
    return machine.vm.restore_into_guest(FilesWanted("before", paths, into=into, **wishes), overwrite=overwrite)


def digest_before(machine, path):
    with machine.vm.look_inside(snapshot="before") as inside:
        browser = inside.choose(path)
        digest = hashlib.sha256()
        for _, piece in browser.content(browser.find(path)).pieces():
            digest.update(piece)
        return digest.hexdigest()


def parts(machine):
    """What is left of files that were begun."""
    return machine.shell("find /files /etc -name '.hvmgr-*' 2> /dev/null || :")


def out_of_an_encrypted_disk(machine, monkeypatch, folder):
    """The snapshot's disk is one of LUKS then; the guest knows nothing of that."""
    tree, image = folder / "tree", folder / "luks"
    tree.mkdir()
    (tree / "secret").write_bytes(os.urandom(100_000))
    file_trees.ext(image, tree, "-t", "ext4", "-b", "4096", size="4M")
    encrypted.luks2(image, encrypted.key_file(folder))
    with monkeypatch.context() as patch:
        patch.setattr(views, "of_vm", lambda *_, **__: [views.of_image(image)])
        with pytest.raises(errors.Unsupported, match="its key can be given"):
            restore(machine, b"/secret")
        wanted = FilesWanted("before", [b"/secret"], into=b"/files/tree")
        assert machine.vm.restore_into_guest(wanted, keys={"": encrypted.KEY}).files == 1
    digest = hashlib.sha256((tree / "secret").read_bytes()).hexdigest()
    assert machine.files.digest("/files/tree/secret", 100_000) == digest
    machine.shell("rm /files/tree/secret")


def test_files_come_back_into_the_guest_that_runs(machine, monkeypatch, tmp_path, require_program):
    require_program("cryptsetup")
    out_of_an_encrypted_disk(machine, monkeypatch, tmp_path)
    data = digest_before(machine, b"/tree/data")
    machine.shell("cd /files/tree && echo broken > data && rm -r deep empty && mkdir taken && ln -s taken deep")
    with pytest.raises(errors.Conflict, match="/files/tree/data exists in the guest"):
        restore(machine, b"/tree/data", overwrite=False)
    machine.shell("mkdir /files/x && ln -s /files/tree /files/x/data")
    with pytest.raises(errors.Conflict, match="/files/x/data is a folder in the guest"):  # a link that leads to one
        restore(machine, b"/tree/data", into=b"/files/x")
    with pytest.raises(errors.HostFailed, match=r"cannot be made in the guest: .*Not a directory"):
        restore(machine, b"/tree", into=b"/files/tree/data", overwrite=False)
    assert machine.shell("cat /files/tree/data") == "broken"

    done = restore(machine, b"/tree/data", b"/tree/empty")
    assert (done.files, done.replaced, done.size, done.engine) == (2, 1, 600 << 10, "the guest agent")
    assert machine.files.digest("/files/tree/data", 600 << 10) == data
    assert machine.shell("cd /files/tree; stat -c '%u:%g %a %Y' data; stat -c %s empty") == "7:8 4750 1600000000\n0"
    machine.shell("rm /files/tree/deep")
    done = restore(machine, b"/tree/deep", into=b"files/tree")
    assert done.files == 3
    machine.shell("cd /files/tree; rm -r deep; chown 7 .")  # what others may write in is filled from outside
    assert restore(machine, b"/tree/deep", b"/tree/empty", overwrite=True).replaced == 1
    assert machine.shell("cd /files/tree; stat -c %u deep/link . ; chown 0 .") == "0\n7"
    assert machine.shell("cd /files/tree/deep; readlink link; cat 'odd \"name\"'") == "../no\nsmall"

    with pytest.raises(errors.UsageError, match="not the root of a system"):
        restore(machine, b"/tree/data", into=None)
    with pytest.raises(errors.HostFailed, match=r"/no/such/data cannot be made in the guest"):
        restore(machine, b"/tree/data", into=b"/no/such")
    with pytest.raises(errors.NotFound):
        restore(machine, b"/tree/no")

    # Whatever goes wrong leaves the file as it is, and nothing beside it.
    machine.shell(
        "cd /files/tree && echo mine > data; dd if=/dev/zero of=/files/full bs=1k 2> /dev/null; sync; df /files"
    )
    with pytest.raises(errors.HvmgrError, match=r"/files/tree/data is what it was$"):
        restore(machine, b"/tree/data")
    machine.shell("rm /files/full; sync")
    with monkeypatch.context() as patch:
        patch.setattr(guest_scripts, "HASH", "echo wrong")
        with pytest.raises(errors.HostFailed, match=r"reads back in the guest otherwise .* is what it was$"):
            restore(machine, b"/tree/data")
    write, calls = guest_files.GuestFiles._write, []

    def interrupted(files, handle, piece, path, wrote):
        calls.append(path)
        os.kill(os.getpid(), signal.SIGINT)
        write(files, handle, piece, path, wrote)

    with monkeypatch.context() as patch:
        patch.setattr(guest_files.GuestFiles, "_write", interrupted)
        with pytest.raises(errors.Cancelled, match=r"stopped; 0 of 1 files are in the guest; \S+/data is what it was$"):
            restore(machine, b"/tree/data")
    assert len(calls) == 1
    assert machine.shell("cat /files/tree/data") == "mine"
    assert parts(machine) == ""
    machine.check()


@pytest.mark.parametrize("stop", ["hang", "die"])
def test_an_agent_that_stops_in_the_middle_leaves_the_old_file(machine, monkeypatch, stop):
    machine.shell("echo mine > /files/tree/data")
    {"hang": machine.agent.hang_at_nudge, "die": machine.agent.die_at_nudge}[stop]()
    monkeypatch.setattr(guest_files, "_CALL_S", 3)
    write, calls = guest_files.GuestFiles._write, []

    def stopped(files, handle, piece, path, wrote):
        if len(calls) == 1:
            machine.agent.nudge()
            machine.agent.await_silence()
        calls.append(path)
        write(files, handle, piece, path, wrote)

    with monkeypatch.context() as patch:
        patch.setattr(guest_files.GuestFiles, "_write", stopped)
        with pytest.raises(errors.HvmgrError, match=r"/files/tree/data is what it was; .* lies in (\S+)$") as failure:
            restore(machine, b"/tree/data")
    machine.agent.nudge()
    machine.agent.await_answer()
    assert machine.shell("cat /files/tree/data") == "mine"
    assert parts(machine) == failure.value.message.rpartition(" ")[2]
    machine.check()


def test_an_agent_that_may_run_nothing_writes_in_place(machine):
    data = digest_before(machine, b"/tree/data")
    machine.shell("echo mine > /files/tree/data")
    machine.agent.forbid("guest-exec")
    with pytest.raises(errors.Conflict, match="/files/tree/data exists in the guest"):
        restore(machine, b"/tree/data", overwrite=False)
    done = restore(machine, b"/tree", into=b"/files")
    assert (done.engine, done.files, done.replaced) == ("the guest agent, in place", 3, 3)
    assert done.left_out == {"links and folders (the agent may not run programs)": 3}
    assert any("files are written in place, without owner and mode" in one for one in machine.said)
    assert machine.files.digest("/files/tree/data", 600 << 10) == data


def test_without_an_agent_that_may_nothing_is_tried(machine, make_machine):
    machine.agent.forbid("guest-file-write")
    with pytest.raises(errors.Unsupported, match="guest-file-write switched off"):
        restore(machine, b"/tree/data")
    machine.agent.stop()
    with pytest.raises(errors.Conflict, match="gave no answer within 5 s"):
        restore(machine, b"/tree/data")
    machine.domain.suspend()
    with pytest.raises(errors.Conflict, match="is paused: its guest takes no files"):
        restore(machine, b"/tree/data")
    machine.vm.stop(force=True)
    with pytest.raises(errors.Conflict, match="is off"):
        restore(machine, b"/tree/data")
    machine.vm.restore_files(FilesWanted("before", [b"/tree/data"], into=b"/tree/deep"))
    with machine.vm.look_inside() as inside:
        browser = inside.choose(b"/tree/deep/data")
        assert browser.find(b"/tree/deep/data").node.mode == 0o4750
