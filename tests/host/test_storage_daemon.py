"""The storage daemon with real images: each MiB of a disk is full of one byte, so a misplaced one is seen."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host import pids, process, qemu_img, storage_daemon

MIB = 1 << 20


def qemu_io(path, fmt, *commands):
    options = [word for command in commands for word in ("-c", command)]
    process.run(["qemu-io", "-f", fmt, *options, path], timeout_s=60)


def fill(path, pattern, fmt="qcow2"):
    """Write digit *d* of the pattern as bytes *d* into its MiB; ``.`` writes nothing, ``0`` zeros."""
    commands = [f"write -P {digit} {i}M 1M" for i, digit in enumerate(pattern) if digit != "."]
    qemu_io(path, fmt, *commands)


def content(path, fmt="qcow2"):
    """The disk as a pattern; ``?`` for a MiB of mixed bytes."""
    raw = path.with_name("content.raw")
    process.run(["qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw], timeout_s=60)
    data = raw.read_bytes()
    raw.unlink()
    pieces = [data[start : start + MIB] for start in range(0, len(data) // MIB * MIB, MIB)]
    return "".join(str(piece[0]) if piece == piece[:1] * MIB else "?" for piece in pieces)


def build(folder, **patterns):
    """A chain of qcow2 images named by the keywords, the base first, each as large as its pattern."""
    parent = None
    with storage_daemon.started() as daemon:
        for name, pattern in patterns.items():
            path = folder / f"{name}.qcow2"
            daemon.create_qcow2(path, size=len(pattern) * MIB, backing=parent and (parent.name, "qcow2"))
            parent = path
    for name, pattern in patterns.items():
        fill(folder / f"{name}.qcow2", pattern)
    return [folder / f"{name}.qcow2" for name in patterns]


def open_chain(daemon, paths, *, writable):
    nodes = []
    for path in paths:
        backing = nodes[-1] if nodes else None
        nodes.append(daemon.open(path, "qcow2", writable=path in writable, backing=backing))
    return nodes


def is_locked(path, fmt):
    """Whether another program is refused to write."""
    completed = process.run(["qemu-io", "-f", fmt, "-c", "read 0 512", path], timeout_s=60, ok_codes=(0, 1))
    return completed.code == 1 and 'Failed to get "write" lock' in completed.stderr


def wait_until_gone(pid):
    deadline = time.monotonic() + 60
    while pids.start_time(pid) is not None:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        assert time.monotonic() < deadline, "the daemon lives on"
        time.sleep(0.01)


@pytest.fixture
def daemon():
    with storage_daemon.started() as daemon:
        yield daemon


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "hvmgr-test", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


class TestLife:
    def test_is_ours_for_the_block_only(self):
        with storage_daemon.started() as daemon:
            assert Path(f"/proc/{daemon.pid}/comm").read_text().startswith("qemu-storage")
            assert daemon.start_time == pids.start_time(daemon.pid)
            folder = daemon._socket.parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert pids.start_time(daemon.pid) is None
        assert not folder.exists()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_is_ended_by_an_error(self, error):
        with pytest.raises(error), storage_daemon.started() as daemon:
            raise error
        assert pids.start_time(daemon.pid) is None

    def test_dies_with_a_killed_parent(self, tmp_path):
        script = textwrap.dedent("""
            import os, signal
            from hvmgr.host import storage_daemon
            with storage_daemon.started() as daemon:
                print(daemon.pid, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """)
        environment = {**os.environ, "TMPDIR": str(tmp_path)}  # nobody is left to remove its folder
        command = [sys.executable, "-c", script]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
        assert (ended.returncode, ended.stderr) == (-signal.SIGKILL, b"")
        wait_until_gone(int(ended.stdout))

    def test_lost_daemon_is_an_unknown_outcome(self, tmp_path, capfd):
        with pytest.raises(errors.OutcomeUnknown), storage_daemon.started() as daemon:
            os.kill(daemon.pid, signal.SIGKILL)
            daemon.create_qcow2(tmp_path / "a.qcow2", size=MIB, backing=None)
        assert not (tmp_path / "a.qcow2").exists()
        assert capfd.readouterr() == ("", "")

    def test_program_that_cannot_start_shows_its_words(self, tmp_path, monkeypatch):
        fake = tmp_path / "qemu-storage-daemon"
        fake.write_text("#!/bin/sh\necho 'no such option' >&2; exit 1\n")
        fake.chmod(0o700)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        with pytest.raises(errors.HostFailed, match="no such option"), storage_daemon.started():
            pass

    def test_import_is_light(self):
        script = (
            "import sys\nimport hvmgr.host.storage_daemon\nassert not any(m.startswith('qemu') for m in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


class TestCreate:
    def test_private_and_as_asked(self, daemon, tmp_path):
        daemon.create_qcow2(tmp_path / "a.qcow2", size=3 * MIB, backing=("gone/parent.vhd", "vpc"))
        info = qemu_img.info(tmp_path / "a.qcow2", "qcow2")
        assert (info.size, info.backing_name, info.backing_fmt) == (3 * MIB, "gone/parent.vhd", "vpc")
        assert stat.S_IMODE((tmp_path / "a.qcow2").stat().st_mode) == 0o600

    def test_never_over_another_file(self, daemon, tmp_path):
        (tmp_path / "a.qcow2").write_text("mine")
        with pytest.raises(errors.Conflict):
            daemon.create_qcow2(tmp_path / "a.qcow2", size=MIB, backing=None)
        assert (tmp_path / "a.qcow2").read_text() == "mine"

    def test_never_through_a_link(self, daemon, tmp_path):
        (tmp_path / "a.qcow2").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(errors.Conflict):
            daemon.create_qcow2(tmp_path / "a.qcow2", size=MIB, backing=None)
        assert not (tmp_path / "elsewhere").exists()

    def test_folder_is_missing(self, daemon, tmp_path):
        with pytest.raises(errors.NotFound):
            daemon.create_qcow2(tmp_path / "no" / "a.qcow2", size=MIB, backing=None)

    def test_impossible_size_leaves_nothing(self, daemon, tmp_path):
        with pytest.raises(errors.Unsupported):
            daemon.create_qcow2(tmp_path / "a.qcow2", size=1 << 62, backing=None)
        assert list(tmp_path.iterdir()) == []

    def test_full_disk_leaves_nothing(self, daemon, small_disk):
        with contextlib.suppress(OSError):
            (small_disk / "filler").write_bytes(bytes(5 * MIB))
        with pytest.raises(errors.NoSpace):
            daemon.create_qcow2(small_disk / "a.qcow2", size=MIB, backing=None)
        assert [path.name for path in small_disk.iterdir()] == ["filler"]


class TestOpen:
    def test_chain_of_the_header(self, daemon, tmp_path):
        _, top = build(tmp_path, a="12", b="3.")
        node = daemon.open(top, "qcow2", writable=False)
        assert (node.path, node.size) == (top, 2 * MIB)
        with daemon.exported(node) as uri:
            assert process.run(["qemu-io", "-r", "-f", "raw", "-c", "read -P 2 1M 1M", uri], timeout_s=60)

    def test_given_parent_wins_over_the_header(self, daemon, tmp_path):
        base, top = build(tmp_path, a="1", b=".")
        other = tmp_path / "other.qcow2"
        daemon.create_qcow2(other, size=MIB, backing=None)
        fill(other, "7")
        base.unlink()
        node = daemon.open(top, "qcow2", writable=False, backing=daemon.open(other, "qcow2", writable=False))
        with daemon.exported(node) as uri:
            process.run(["qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 1M", uri], timeout_s=60)

    def test_detached_reads_the_image_alone(self, daemon, tmp_path):
        base, top = build(tmp_path, a="1", b=".")
        base.unlink()
        node = daemon.open(top, "qcow2", writable=False, detached_backing=True)
        with daemon.exported(node) as uri:
            process.run(["qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", uri], timeout_s=60)

    def test_missing_file(self, daemon, tmp_path):
        with pytest.raises(errors.NotFound):
            daemon.open(tmp_path / "a.qcow2", "qcow2", writable=False)

    def test_missing_parent(self, daemon, tmp_path):
        base, top = build(tmp_path, a="1", b=".")
        base.unlink()
        with pytest.raises(errors.NotFound, match=r"a\.qcow2"):
            daemon.open(top, "qcow2", writable=False)

    @pytest.mark.parametrize("fmt", ["qcow2", "vpc"])
    def test_another_format_is_corrupt(self, daemon, tmp_path, fmt):
        (tmp_path / "a").write_bytes(b"text" * 1000)
        with pytest.raises(errors.Corrupt):
            daemon.open(tmp_path / "a", fmt, writable=False)

    def test_unknown_format_is_unsupported(self, daemon, tmp_path):
        (tmp_path / "a").write_bytes(b"text" * 1000)
        with pytest.raises(errors.Unsupported):
            daemon.open(tmp_path / "a", "vmdk2", writable=False)

    def test_close_of_a_parent_in_use(self, daemon, tmp_path):
        base, top = open_chain(daemon, build(tmp_path, a="1", b="."), writable=[])
        with pytest.raises(errors.Conflict):
            daemon.close(base)
        daemon.close(top)
        daemon.close(base)


class TestLock:
    @pytest.mark.parametrize(
        ("fmt", "options"), [("qcow2", []), ("raw", []), ("vpc", []), ("vpc", ["-osubformat=fixed"])]
    )
    def test_is_held_until_close(self, daemon, tmp_path, fmt, options):
        path = tmp_path / "disk"
        process.run(["qemu-img", "create", "-f", fmt, *options, path, "2M"], timeout_s=60)
        node = daemon.open(path, fmt, writable=True)
        assert is_locked(path, fmt)
        daemon.close(node)
        assert not is_locked(path, fmt)

    @pytest.mark.parametrize("fmt", ["qcow2", "raw", "vpc"])
    def test_second_writer_is_a_conflict_that_names_the_first(self, daemon, tmp_path, fmt):
        path = tmp_path / "disk"
        process.run(["qemu-img", "create", "-f", fmt, path, "2M"], timeout_s=60)
        daemon.open(path, fmt, writable=True)
        with storage_daemon.started() as other, pytest.raises(errors.Conflict) as caught:
            other.open(path, fmt, writable=True)
        assert caught.value.facts == {"path": str(path), "pids": [daemon.pid]}

    def test_parent_is_held_while_its_child_is_open(self, daemon, tmp_path):
        paths = build(tmp_path, a="1", b=".")
        open_chain(daemon, paths, writable=paths)
        assert [is_locked(path, "qcow2") for path in paths] == [True, True]

    def test_both_are_held_after_commit_until_close(self, daemon, tmp_path):
        paths = build(tmp_path, a="12", b="3.")
        base, top = open_chain(daemon, paths, writable=paths)
        daemon.commit(top, base)
        assert [is_locked(path, "qcow2") for path in paths] == [True, True]
        daemon.close(top)
        daemon.close(base)
        assert [is_locked(path, "qcow2") for path in paths] == [False, False]

    def test_is_held_after_stream(self, daemon, tmp_path):
        paths = build(tmp_path, a="12", b="3.")
        _base, top = open_chain(daemon, paths, writable=paths[1:])
        daemon.stream(top, base=None, backing_file=None)
        assert is_locked(paths[1], "qcow2")


class TestStream:
    def test_down_to_a_base(self, tmp_path):
        a, b, c = build(tmp_path, a="1111", b=".22.", c="..3.")
        with storage_daemon.started() as daemon:
            nodes = open_chain(daemon, [a, b, c], writable=[c])
            daemon.stream(nodes[2], base=nodes[0], backing_file="a.qcow2")
        b.unlink()
        info = qemu_img.info(c, "qcow2")
        assert (info.backing_name, info.backing_fmt) == ("a.qcow2", "qcow2")
        assert content(c) == "1231"
        assert info.allocated < 3 * MIB

    def test_everything(self, tmp_path):
        a, b, c = build(tmp_path, a="1111", b=".22.", c="..3.")
        with storage_daemon.started() as daemon:
            daemon.stream(daemon.open(c, "qcow2", writable=True), base=None, backing_file=None)
        a.unlink()
        b.unlink()
        info = qemu_img.info(c, "qcow2")
        assert (info.backing_name, info.backing_fmt) == (None, None)
        assert content(c) == "1231"

    @pytest.mark.parametrize(("fmt", "options"), [("raw", []), ("vpc", []), ("vpc", ["-osubformat=fixed"])])
    def test_over_another_format(self, tmp_path, fmt, options):
        base, top = tmp_path / "base", tmp_path / "top.qcow2"
        process.run(["qemu-img", "create", "-f", fmt, *options, base, "4M"], timeout_s=60)
        fill(base, "12.4", fmt)
        with storage_daemon.started() as daemon:
            parent = daemon.open(base, fmt, writable=False)
            daemon.create_qcow2(top, size=parent.size, backing=("base", fmt))
            daemon.close(parent)
            daemon.stream(daemon.open(top, "qcow2", writable=True), base=None, backing_file=None)
        base.unlink()
        assert content(top)[:4] == "1204"

    def test_format_of_a_raw_base_is_written(self, tmp_path):
        (tmp_path / "base").write_bytes(b"\1" * MIB)
        with storage_daemon.started() as daemon:
            daemon.create_qcow2(tmp_path / "mid.qcow2", size=MIB, backing=("base", "raw"))
            daemon.create_qcow2(tmp_path / "top.qcow2", size=MIB, backing=("mid.qcow2", "qcow2"))
            base = daemon.open(tmp_path / "base", "raw", writable=False)
            mid = daemon.open(tmp_path / "mid.qcow2", "qcow2", writable=False, backing=base)
            top = daemon.open(tmp_path / "top.qcow2", "qcow2", writable=True, backing=mid)
            daemon.stream(top, base=base, backing_file="base")
        info = qemu_img.info(tmp_path / "top.qcow2", "qcow2")
        assert (info.backing_name, info.backing_fmt) == ("base", "raw")

    def test_shorter_middle_needs_zeros_first(self, tmp_path):
        a, b, c = build(tmp_path, a="1111", b="2.", c="..3.")
        before = content(c)
        with storage_daemon.started() as daemon:
            nodes = open_chain(daemon, [a, b, c], writable=[c])
            # What the short image hid must stay hidden. The byte that the child itself wrote must stay, too.
            daemon.write_zeroes(nodes[2], [(3 * MIB, MIB)])
            daemon.stream(nodes[2], base=nodes[0], backing_file="a.qcow2")
        assert content(c) == before == "2130"

    def test_killed_at_any_moment_and_run_again(self, tmp_path):
        """Raise n until the job comes through: the content is the same after each death and after the repetition."""
        expected = "12312"
        for n in itertools.count(1):
            for path in tmp_path.iterdir():
                path.unlink()
            a, b, c = build(tmp_path, a="11111", b=".2..2", c="..3..")
            calls = itertools.count(1)

            def die(progress, n=n, calls=calls):
                if next(calls) == n:
                    os.kill(daemon.pid, signal.SIGKILL)

            try:
                with storage_daemon.started(on_progress=die) as daemon:
                    nodes = open_chain(daemon, [a, b, c], writable=[c])
                    daemon.stream(nodes[2], base=nodes[0], backing_file="a.qcow2")
                    break
            except errors.OutcomeUnknown:
                assert content(c) == expected
                assert qemu_img.check(c, "qcow2").is_sound
            with storage_daemon.started() as daemon:
                nodes = open_chain(daemon, [a, b, c], writable=[c])
                daemon.stream(nodes[2], base=nodes[0], backing_file="a.qcow2")
            assert content(c) == expected
        assert n > 3

    @pytest.mark.parametrize("base", [True, False], ids=["onto a base", "everything"])
    def test_data_is_written_out_before_the_header_changes(self, tmp_path, base):
        """As soon as the header names another parent, the image is whole although the daemon is killed."""
        a, b, c = build(tmp_path, a="11111", b=".2..2", c="..3..")
        with pytest.raises(errors.OutcomeUnknown), storage_daemon.started(on_progress=None) as daemon:
            nodes = open_chain(daemon, [a, b, c], writable=[c])
            advance = daemon._advance

            def die_when_done(command, job_id):
                advance(command, job_id)
                while daemon._job(job_id)["status"] != "concluded":
                    time.sleep(0.001)
                os.kill(daemon.pid, signal.SIGKILL)

            daemon._advance = die_when_done
            daemon.stream(nodes[2], base=nodes[0] if base else None, backing_file="a.qcow2" if base else None)
        assert qemu_img.info(c, "qcow2").backing_name == ("a.qcow2" if base else None)
        assert content(c) == "12312"
        assert qemu_img.check(c, "qcow2").leaks == 0

    def test_full_disk(self, tmp_path, small_disk):
        (a,) = build(tmp_path, a="11111")
        with storage_daemon.started() as daemon:
            daemon.create_qcow2(small_disk / "b.qcow2", size=5 * MIB, backing=(str(a), "qcow2"))
            node = daemon.open(small_disk / "b.qcow2", "qcow2", writable=True)
            with pytest.raises(errors.NoSpace) as caught:
                daemon.stream(node, base=None, backing_file=None)
            assert caught.value.facts["path"] == str(small_disk / "b.qcow2")
            assert daemon._query("query-jobs") == []
        info = qemu_img.info(small_disk / "b.qcow2", "qcow2")
        assert info.backing_name == str(a)


class TestPull:
    """The same promises as those of ``stream``; MiB 1 and 4 of c come from b."""

    RANGES = ((1 * MIB, MIB), (4 * MIB, MIB))

    def pull(self, daemon, paths):
        nodes = open_chain(daemon, paths, writable=paths[1:])
        daemon.pull(nodes[2], nodes[1], base=nodes[0], backing_file="a.qcow2", ranges=self.RANGES)

    def test_down_to_a_base(self, tmp_path):
        _, b, c = paths = build(tmp_path, a="11111", b=".2..0", c="..3..")
        with storage_daemon.started() as daemon:
            self.pull(daemon, paths)
            assert is_locked(c, "qcow2")
        b.unlink()
        info = qemu_img.info(c, "qcow2")
        assert (info.backing_name, info.backing_fmt) == ("a.qcow2", "qcow2")
        assert content(c) == "12310"
        assert info.allocated < 4 * MIB

    def test_nothing_to_pull_changes_the_header_alone(self, tmp_path):
        a, b, c = build(tmp_path, a="11", b="..", c=".3")
        with storage_daemon.started() as daemon:
            nodes = open_chain(daemon, [a, b, c], writable=[b, c])
            daemon.pull(nodes[2], nodes[1], base=nodes[0], backing_file="a.qcow2", ranges=[])
        assert qemu_img.info(c, "qcow2").backing_name == "a.qcow2"
        assert content(c) == "13"

    def test_reports_the_bytes(self, tmp_path):
        seen = []
        paths = build(tmp_path, a="11111", b=".2..2", c="..3..")
        with storage_daemon.started(on_progress=seen.append) as daemon:
            self.pull(daemon, paths)
        assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 2 * MIB, 2 * MIB)

    def test_killed_before_every_command_and_run_again(self, tmp_path):
        """Raise n until it comes through: the content is the same after each death and after the repetition."""
        expected = "12312"
        for n in itertools.count(1):
            for path in tmp_path.iterdir():
                path.unlink()
            paths = build(tmp_path, a="11111", b=".2..2", c="..3..")
            try:
                with storage_daemon.started() as daemon:
                    calls, execute, io = itertools.count(1), daemon._session.execute, daemon._io

                    def die(daemon=daemon, calls=calls, n=n):
                        if next(calls) == n:
                            os.kill(daemon.pid, signal.SIGKILL)

                    def before_execute(*words, die=die, execute=execute, **options):
                        die()
                        return execute(*words, **options)

                    def before_io(*words, die=die, io=io, **options):
                        die()
                        return io(*words, **options)

                    daemon._session.execute, daemon._io = before_execute, before_io
                    self.pull(daemon, paths)
                    break
            except errors.HvmgrError:
                assert content(paths[2]) == expected
                assert qemu_img.check(paths[2], "qcow2").is_sound
            if qemu_img.info(paths[2], "qcow2").backing_name != "a.qcow2":
                with storage_daemon.started() as daemon:
                    self.pull(daemon, paths)
            assert content(paths[2]) == expected
        assert n > 15

    def test_data_is_written_out_before_the_header_changes(self, tmp_path):
        _, _, c = paths = build(tmp_path, a="11111", b=".2..2", c="..3..")
        with pytest.raises(errors.OutcomeUnknown), storage_daemon.started() as daemon:
            execute = daemon._execute

            def die_when_changed(command, *words):
                execute(command, *words)
                if command == "change-backing-file":
                    os.kill(daemon.pid, signal.SIGKILL)

            daemon._execute = die_when_changed
            self.pull(daemon, paths)
        assert qemu_img.info(c, "qcow2").backing_name == "a.qcow2"
        assert content(c) == "12312"
        assert qemu_img.check(c, "qcow2").leaks == 0

    def test_full_disk(self, tmp_path, small_disk):
        a, b = build(tmp_path, a="1" * 5, b="2" * 5)
        with storage_daemon.started() as daemon:
            daemon.create_qcow2(small_disk / "c.qcow2", size=5 * MIB, backing=(str(b), "qcow2"))
            nodes = open_chain(daemon, [a, b, small_disk / "c.qcow2"], writable=[b, small_disk / "c.qcow2"])
            with pytest.raises(errors.NoSpace):
                daemon.pull(nodes[2], nodes[1], base=nodes[0], backing_file=str(a), ranges=[(0, 5 * MIB)])
        assert qemu_img.info(small_disk / "c.qcow2", "qcow2").backing_name == str(b)


class TestCommit:
    def test_base_equals_top(self, tmp_path):
        a, b, c = build(tmp_path, a="1111", b=".22.", c="..3.")
        with storage_daemon.started() as daemon:
            nodes = open_chain(daemon, [a, b, c], writable=[b, c])
            daemon.commit(nodes[2], nodes[1])
        c.unlink()
        assert content(b) == "1231"
        assert content(a) == "1111"

    def test_over_a_middle_image(self, tmp_path):
        a, b, c = build(tmp_path, a="1111", b=".22.", c="..3.")
        with storage_daemon.started() as daemon:
            nodes = open_chain(daemon, [a, b, c], writable=[a, c])
            daemon.commit(nodes[2], nodes[0])
        assert content(a) == "1231"

    @pytest.mark.parametrize(("b", "c"), [("2.", "..3."), ("2...", "3.")], ids=["smaller base", "larger base"])
    def test_other_size_is_refused_before_anything_is_written(self, tmp_path, b, c):
        a, b, c = build(tmp_path, a="1111", b=b, c=c)
        before = b.read_bytes(), c.read_bytes()
        with storage_daemon.started() as daemon:
            nodes = open_chain(daemon, [a, b, c], writable=[b, c])
            with pytest.raises(errors.Unsupported):
                daemon.commit(nodes[2], nodes[1])
        assert (b.read_bytes(), c.read_bytes()) == before

    def test_into_raw(self, tmp_path):
        (tmp_path / "base").write_bytes(b"\1" * 2 * MIB)
        with storage_daemon.started() as daemon:
            daemon.create_qcow2(tmp_path / "top.qcow2", size=2 * MIB, backing=("base", "raw"))
            fill(tmp_path / "top.qcow2", ".2")
            base = daemon.open(tmp_path / "base", "raw", writable=True)
            daemon.commit(daemon.open(tmp_path / "top.qcow2", "qcow2", writable=True, backing=base), base)
        assert content(tmp_path / "base", "raw") == "12"

    def test_vhd_of_another_size_is_refused_before_anything_is_written(self, daemon, tmp_path):
        process.run(["qemu-img", "create", "-f", "vpc", tmp_path / "v.vhd", "2M"], timeout_s=60)
        before = (tmp_path / "v.vhd").read_bytes()
        base = daemon.open(tmp_path / "v.vhd", "vpc", writable=True)
        daemon.create_qcow2(tmp_path / "t.qcow2", size=base.size + MIB, backing=("v.vhd", "vpc"))
        top = daemon.open(tmp_path / "t.qcow2", "qcow2", writable=True, backing=base)
        daemon.write_zeroes(top, [(0, MIB)])
        with pytest.raises(errors.Unsupported):
            daemon.commit(top, base)
        assert (tmp_path / "v.vhd").read_bytes() == before

    def test_killed_at_any_moment_and_run_again(self, tmp_path):
        for n in itertools.count(1):
            for path in tmp_path.iterdir():
                path.unlink()
            a, b, c = build(tmp_path, a="11111", b=".2...", c="..3.4")
            calls = itertools.count(1)

            def die(progress, n=n, calls=calls):
                if next(calls) == n:
                    os.kill(daemon.pid, signal.SIGKILL)

            try:
                with storage_daemon.started(on_progress=die) as daemon:
                    nodes = open_chain(daemon, [a, b, c], writable=[b, c])
                    daemon.commit(nodes[2], nodes[1])
                    break
            except errors.OutcomeUnknown:
                assert content(c) == "12314"  # the child reads the same all the time
            with storage_daemon.started() as daemon:
                nodes = open_chain(daemon, [a, b, c], writable=[b, c])
                daemon.commit(nodes[2], nodes[1])
            assert content(b) == "12314"
        assert n > 1

    def test_is_written_out_when_it_returns(self, tmp_path):
        a, b = build(tmp_path, a="1111", b="23..")
        with pytest.raises(errors.OutcomeUnknown), storage_daemon.started() as daemon:
            nodes = open_chain(daemon, [a, b], writable=[a, b])
            daemon.commit(nodes[1], nodes[0])
            os.kill(daemon.pid, signal.SIGKILL)
        assert content(a) == "2311"

    def test_full_disk(self, tmp_path, small_disk):
        a, b = build(tmp_path, a="......", b="111111")
        small = shutil.move(a, small_disk / "a.qcow2")
        with storage_daemon.started() as daemon:
            base = daemon.open(small, "qcow2", writable=True)
            top = daemon.open(b, "qcow2", writable=True, backing=base)
            with pytest.raises(errors.NoSpace) as caught:
                daemon.commit(top, base)
        assert caught.value.facts["path"] == str(small)


class TestWriteZeroes:
    def test_hides_the_parent_and_keeps_the_rest(self, tmp_path):
        a, b = build(tmp_path, a="11111", b=".22..")
        with storage_daemon.started() as daemon:
            _base, node = open_chain(daemon, [a, b], writable=[b])
            daemon.write_zeroes(node, [(MIB, MIB), (3 * MIB, MIB)])
            assert is_locked(b, "qcow2")
        assert content(b) == "10201"
        assert content(a) == "11111"

    def test_is_written_out_when_it_returns(self, tmp_path):
        a, b = build(tmp_path, a="1111", b="....")
        with pytest.raises(errors.OutcomeUnknown), storage_daemon.started() as daemon:
            _base, node = open_chain(daemon, [a, b], writable=[b])
            daemon.write_zeroes(node, [(0, 2 * MIB)])
            os.kill(daemon.pid, signal.SIGKILL)
        assert content(b) == "0011"

    def test_odd_bytes_and_nothing(self, tmp_path, daemon):
        a, b = build(tmp_path, a="11", b="..")
        _base, node = open_chain(daemon, [a, b], writable=[b])
        daemon.write_zeroes(node, [])
        daemon.write_zeroes(node, [(1000, 513), (MIB + 1, 1)])
        with daemon.exported(node) as uri:
            out = tmp_path / "out"
            process.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out], timeout_s=60)
        expected = bytearray(b"\1" * 2 * MIB)
        expected[1000:1513] = bytes(513)
        expected[MIB + 1] = 0
        assert out.read_bytes() == expected

    def test_more_ranges_than_one_command_line_takes(self, tmp_path, daemon, monkeypatch):
        monkeypatch.setattr(storage_daemon, "_COMMANDS_MAX", 2)
        (a,) = build(tmp_path, a="11111")
        daemon.write_zeroes(daemon.open(a, "qcow2", writable=True), [(i * MIB, MIB) for i in (0, 1, 2, 4)])
        daemon.close_all()
        assert content(a) == "00010"

    def test_range_larger_than_one_request(self, daemon, tmp_path):
        path = tmp_path / "a.qcow2"
        size = 5 << 30
        daemon.create_qcow2(path, size=size, backing=None)
        daemon.write_zeroes(daemon.open(path, "qcow2", writable=True), [(0, size)])
        daemon.close_all()
        assert {(e.zero, e.data, e.depth, e.present) for e in qemu_img.map(path, "qcow2")} == {(True, False, 0, True)}
        assert path.stat().st_size < 2 * MIB


class TestProgress:
    def test_reports_up_to_the_end(self, tmp_path):
        seen = []
        _a, b = build(tmp_path, a="1111", b="....")
        with storage_daemon.started(on_progress=seen.append) as daemon:
            daemon.stream(daemon.open(b, "qcow2", writable=True), base=None, backing_file=None)
        assert (seen[-1].done, seen[-1].total, seen[-1].what) == (4 * MIB, 4 * MIB, "stream b.qcow2")
        assert [p.done for p in seen] == sorted(p.done for p in seen)

    @pytest.mark.parametrize("job", ["stream", "commit"])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_error_in_the_callback_cancels(self, tmp_path, error, job):
        a, b = build(tmp_path, a="1111", b=".2..")
        armed = [True]

        def refuse(progress):
            if armed:
                armed.clear()
                raise error

        with storage_daemon.started(on_progress=refuse) as daemon:
            base, top = open_chain(daemon, [a, b], writable=[a, b])
            with pytest.raises(error):
                daemon.stream(top, base=None, backing_file=None) if job == "stream" else daemon.commit(top, base)
            assert daemon._query("query-jobs") == []
            assert daemon._query("query-block-exports") == []
            assert qemu_img.info(b, "qcow2", force_share=True).backing_name == "a.qcow2"
            # The daemon is as good as before.
            daemon.stream(top, base=None, backing_file=None)
        assert content(b) == "1211"

    def test_real_interrupt_cancels(self, tmp_path):
        _a, b = build(tmp_path, a="1111", b="....")
        with storage_daemon.started(on_progress=lambda _: signal.raise_signal(signal.SIGINT)) as daemon:
            node = daemon.open(b, "qcow2", writable=True)
            with pytest.raises(KeyboardInterrupt):
                daemon.stream(node, base=None, backing_file=None)
            assert daemon._query("query-jobs") == []
        assert content(b) == "1111"
