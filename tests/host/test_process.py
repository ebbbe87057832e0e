"""The door to other programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host import pids, process


def is_gone(pid):
    """Ended, or a zombie that only waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, *, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class TestRun:
    def test_output_messages_and_code(self):
        completed = process.run(["sh", "-c", "printf out; printf said >&2; exit 3"], timeout_s=60, ok_codes=(0, 3))
        assert completed == process.Completed(b"out", "said", 3)

    def test_input_arrives_and_without_it_stdin_is_empty(self):
        assert process.run(["cat"], input=b"\0bytes", timeout_s=60).stdout == b"\0bytes"
        assert process.run(["cat"], timeout_s=60).stdout == b""

    def test_much_input_and_output_do_not_block_each_other(self):
        data = os.urandom(1 << 20)
        assert process.run(["cat"], input=data, timeout_s=60).stdout == data

    def test_environment_is_short(self, monkeypatch):
        monkeypatch.setenv("SECRET", "x")
        monkeypatch.setenv("LC_ALL", "de_DE")
        monkeypatch.setenv("PATH", "/usr/bin")
        names = process.run(["env"], timeout_s=60).stdout.decode().splitlines()
        assert sorted(name.partition("=")[0] for name in names) == ["HOME", "LANG", "PATH"]
        assert "LANG=C.UTF-8" in names
        assert "/usr/sbin" in next(name for name in names if name.startswith("PATH=")).split(":")

    def test_failure_shows_a_command_to_paste_and_the_last_words(self):
        with pytest.raises(errors.HostFailed) as caught:
            process.run(["sh", "-c", "echo 'it broke' >&2; exit 4", "a b"], timeout_s=60)
        assert "sh -c 'echo '\"'\"'it broke'\"'\"' >&2; exit 4' 'a b'" in caught.value.message
        assert caught.value.message.endswith("failed with code 4: it broke")
        assert caught.value.facts["code"] == 4

    def test_last_words_on_stdout_count_when_stderr_is_silent(self):
        with pytest.raises(errors.HostFailed, match="spoke here"):
            process.run(["sh", "-c", "echo spoke here; exit 1"], timeout_s=60)

    def test_signal_is_named(self):
        with pytest.raises(errors.HostFailed, match="was ended by SIGSEGV"):
            process.run(["sh", "-c", "kill -SEGV $$"], timeout_s=60)

    def test_missing_program_names_its_package(self, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(process, "_SYSTEM_FOLDERS", ())
        with pytest.raises(errors.Unsupported) as caught:
            process.run(["qemu-img", "info"], timeout_s=60)
        assert "qemu-utils" in caught.value.hint

    def test_program_that_may_not_run_is_missing(self, tmp_path):
        program = tmp_path / "tool"
        program.write_text("no program")
        with pytest.raises(errors.Unsupported):
            process.run([program], timeout_s=60)

    def test_program_that_is_none(self, tmp_path):
        program = tmp_path / "tool"
        program.write_bytes(b"\x7fELF")
        program.chmod(0o700)
        with pytest.raises(errors.HostFailed, match="cannot start"):
            process.run([program], timeout_s=60)

    def test_time_limit_kills_children_too(self, tmp_path):
        pid = tmp_path / "pid"
        for limit in (0.3, 3, 30):  # on a busy machine it takes a while until the shell has said its child
            with pytest.raises(errors.HostFailed, match=rf"within {limit} s"):
                process.run(["sh", "-c", f"sleep 600 & echo $! > {pid}; wait"], timeout_s=limit)
            if pid.exists() and pid.read_text():
                break
        wait_until(lambda: is_gone(int(pid.read_text())))

    def test_interrupt_kills_and_passes_through(self, tmp_path):
        script = textwrap.dedent(f"""
            import os, signal, threading, time
            from pathlib import Path
            from hvmgr.host import process
            def interrupt():
                while not (Path("{tmp_path}/pid").exists() and Path("{tmp_path}/pid").read_text()):
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=interrupt, daemon=True).start()
            process.run(["sh", "-c", "echo $$ > {tmp_path}/pid; exec sleep 60"], timeout_s=50)
        """)
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
        assert ended.returncode == -signal.SIGINT
        assert is_gone(int((tmp_path / "pid").read_text()))

    def test_confined_to_its_limits_and_its_files(self):
        file = os.memfd_create("file")
        try:
            os.write(file, b"in memory")
            words = ["sh", "-c", f"cat /proc/self/fd/{file}; ulimit -c; ulimit -v"]
            done = process.run(words, timeout_s=60, confined=process.Confined(1 << 30, (file,)))
        finally:
            os.close(file)
        assert done.stdout.split() == [b"in", b"memory0", b"1048576"]

    def test_confined_dies_with_a_killed_parent(self, tmp_path):
        script = textwrap.dedent(f"""
            from hvmgr.host import process
            words = ["sh", "-c", "echo $$ > {tmp_path}/pid; exec sleep 60"]
            process.run(words, timeout_s=50, confined=process.Confined(1 << 30))
        """)
        with subprocess.Popen([sys.executable, "-c", script]) as program:
            wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
            program.kill()
        wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))


class TestSpawned:
    def test_runs_for_the_block_only(self):
        with process.spawned(["sleep", "60"]) as program:
            assert program.poll() is None
            assert program.start_time == pids.start_time(program.pid)
            # The guard has become the program itself: the pid is the right one to signal.
            wait_until(lambda: Path(f"/proc/{program.pid}/comm").read_text() == "sleep\n")
        assert program.poll() == -signal.SIGTERM
        assert pids.start_time(program.pid) is None

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
    def test_error_ends_it(self, error):
        with pytest.raises(error), process.spawned(["sleep", "60"]) as program:
            raise error
        assert is_gone(program.pid)

    def test_deaf_program_is_killed(self, monkeypatch):
        monkeypatch.setattr(process, "TERMINATE_S", 0.2)
        with process.spawned(["sh", "-c", "trap '' TERM; echo up >&2; while :; do sleep 0.05; done"]) as program:
            wait_until(lambda: "up" in program.stderr_text())
        assert program.poll() == -signal.SIGKILL

    def test_messages_are_kept(self, tmp_path):
        with process.spawned(["sh", "-c", "echo first >&2; exec sleep 60"]) as program:
            wait_until(lambda: program.stderr_text() == "first\n")
        with (tmp_path / "log").open("w+b") as log:
            with process.spawned(["sh", "-c", "echo second >&2"], stderr_to=log) as program:
                assert program.wait(60) == 0
            assert (tmp_path / "log").read_text() == "second\n"

    def test_missing_program_is_told_before_anything_starts(self):
        with pytest.raises(errors.Unsupported), process.spawned(["no-such-program"]):
            pass

    def test_dies_with_a_killed_parent(self):
        script = textwrap.dedent("""
            import os, signal
            from hvmgr.host import process
            with process.spawned(["sleep", "60"]) as program:
                print(program.pid, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """)
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
        assert ended.returncode == -signal.SIGKILL
        wait_until(lambda: is_gone(int(ended.stdout)))

    def test_never_starts_when_the_parent_is_gone_already(self, tmp_path):
        # As if we had been killed between fork and prctl: the parent is not the one that the guard was told.
        guarded = [*process._GUARD, "1", "touch", tmp_path / "ran"]
        assert subprocess.run(guarded, check=False, timeout=60).returncode == 125
        assert not (tmp_path / "ran").exists()


# --- a second -----------------------------------------------------------------------------------------------------------


def test_second_goes_on_only_after_a_kill(tmp_path):
    """However the one who works ends otherwise, nothing happens; a signal that is sent to both does not end the second."""
    mark = tmp_path / "mark"
    program = textwrap.dedent("""
        import os, signal, sys, time
        from pathlib import Path
        from hvmgr.host import process

        def ignores_term(pid):
            words = Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()
            return int(words[0], 16) >> (signal.SIGTERM - 1) & 1

        with process.seconded(["touch", sys.argv[1]]):
            if sys.argv[2] == "fail":
                raise SystemExit(3)
            if sys.argv[2] == "kill":
                (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                while not ignores_term(child):
                    time.sleep(0.01)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    os.kill(int(child), number)
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    for how, code in (("end", 0), ("fail", 3)):
        done = subprocess.run([sys.executable, "-c", program, mark, how], check=False, timeout=60)
        assert done.returncode == code
        assert not mark.exists()  # the second has ended before its first did
    done = subprocess.run([sys.executable, "-c", program, mark, "kill"], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
