"""Processes by pid and start time: the one that was meant is ended, never another."""

import signal

from hvmgr.host import pids, process


class TestEndLeftOver:
    def test_ends_the_very_process(self):
        with process.spawned(["sleep", "60"]) as program:
            assert pids.end_left_over(program.pid, program.start_time)
            assert program.wait(60) == -signal.SIGKILL

    def test_spares_another_with_the_same_pid(self):
        with process.spawned(["sleep", "60"]) as program:
            assert not pids.end_left_over(program.pid, program.start_time - 1)
            assert program.poll() is None

    def test_nobody_there(self):
        with process.spawned(["true"]) as program:
            program.wait(60)
        assert not pids.end_left_over(program.pid, 1)
