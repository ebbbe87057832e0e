"""What the console makes of a guest's lines: from a pty that nobody else holds, and from a log file."""

from __future__ import annotations

import os
import threading
import tty
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.faces.console import Console, Tick


@pytest.fixture
def pty():
    """Both ends of a raw pty as QEMU makes one: (our writing end, the path of the other)."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    yield ours, Path(os.ttyname(theirs))
    os.close(theirs)
    os.close(ours)


def test_tick_is_read_from_a_pty(pty):
    end, path = pty
    with Console(path) as screen:
        os.write(end, b"tick memory=000123 disk=000122 ok\r\n")
        assert screen.next_tick(60) == Tick(123, (122,), ok=True)


def test_old_output_and_half_lines_are_dropped_at_open(pty):
    end, path = pty
    os.write(end, b"tick memory=000001 disk=000000 ok\r\ntick memory=0000")
    with Console(path) as screen:
        os.write(end, b"02 disk=000001 ok\r\ntick memory=000003 disk=000002 ok\r\n")
        assert screen.next_tick(60).memory == 3


def test_drain_drops_what_was_said_meanwhile(pty):
    end, path = pty
    with Console(path) as screen:
        os.write(end, b"tick memory=000001 disk=000000 ok\r\ntick memory=000002 disk=000001 ok\r\n")
        assert screen.next_tick(60).memory == 1
        screen.drain()
        os.write(end, b"tick memory=000003 disk=000002 ok\r\n")
        assert screen.next_tick(60).memory == 3


def test_line_that_comes_in_pieces_is_one_line(pty):
    end, path = pty
    with Console(path) as screen:
        os.write(end, b"tick memory=000001 di")
        late = threading.Timer(0.1, os.write, (end, b"sk=000000,000007 MISMATCH\r\n"))
        late.start()
        assert screen.next_tick(60) == Tick(1, (0, 7), ok=False)
        late.join()


def test_missing_tick_names_the_last_line(pty):
    end, path = pty
    with Console(path) as screen:
        os.write(end, b"Kernel panic\r\n")
        with pytest.raises(errors.HostFailed, match=r"no tick on the console .* last line: 'Kernel panic'"):
            screen.next_tick(0.1)


def test_console_that_goes_away_is_an_error_at_once():
    ours, theirs = os.openpty()
    screen = Console(Path(os.ttyname(theirs)))
    os.close(theirs)
    os.close(ours)
    with screen, pytest.raises(errors.HostFailed, match="closed"):
        screen.next_tick(30)


def test_absent_console_is_not_found(tmp_path):
    with pytest.raises(errors.NotFound):
        Console(tmp_path / "absent")


def test_pty_does_not_become_the_controlling_terminal(pty):
    _, path = pty
    child = os.fork()
    if not child:
        try:
            os.setsid()
            Console(path)
            os.open("/dev/tty", os.O_RDWR)
        except OSError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_log_file_is_followed_from_its_end(tmp_path):
    log = tmp_path / "serial.log"
    log.write_bytes(b"tick memory=000001 disk=000000 ok\r\n")
    with Console(log) as screen, log.open("ab", buffering=0) as writer:
        writer.write(b"tick memory=000002 disk=000001 ok\r\n")
        assert screen.next_tick(60).memory == 2
        with pytest.raises(errors.HostFailed):
            screen.next_tick(0.1)


def test_log_file_is_read_from_its_start_on_request(tmp_path):
    log = tmp_path / "serial.log"
    log.write_bytes(
        b"\x1bc\r\nboot disk=000005,000004\r\ntick memory=000006 disk=000005,000005 ok\r\npoweroff disk=000006\r\n"
    )
    with Console(log, from_start=True) as screen:
        assert screen.next_boot(60) == (5, 4)
        assert screen.wait_for("poweroff", 60) == "poweroff disk=000006"


def test_tick_behind_a_line_that_was_cut_off_is_read(tmp_path):
    log = tmp_path / "serial.log"
    log.write_bytes(b"tick memory=0000tick memory=000031 disk=000030 ok\r\ntick mboot disk=000007\r\n")
    with Console(log, from_start=True) as screen:
        assert screen.next_tick(60) == Tick(31, (30,), ok=True)
        assert screen.next_boot(60) == (7,)


def test_guest_without_disks_has_no_disk_count(tmp_path):
    log = tmp_path / "serial.log"
    log.write_bytes(b"boot disk=-\r\ntick memory=000001 disk=- ok\r\n")
    with Console(log, from_start=True) as screen:
        assert screen.next_boot(60) == ()
        assert screen.next_tick(60).disk == -1


@pytest.mark.parametrize(
    ("tick", "follows"),
    [
        (Tick(11, (10,), ok=True), True),
        (Tick(12, (11,), ok=True), True),
        (Tick(10, (9,), ok=True), False),
        (Tick(13, (12,), ok=True), False),
        (Tick(11, (10,), ok=False), False),
    ],
    ids=["successor", "said-but-not-written", "older", "newer", "mismatch"],
)
def test_first_tick_after_a_restore_follows_its_disk(tick, follows):
    assert tick.follows(10) is follows
