"""Secrets that are kept: found again by their names, and in memory that no core file, swap space or child gets."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from hvmgr.host import kept_secrets

NAMES = [bytes([number]) * 32 for number in range(1, 100)]


def page():
    kept_secrets._page.cache_clear()
    found = kept_secrets.page()
    assert found is not None
    return found


def test_what_is_kept_is_found_until_it_is_full():
    one = page()
    assert one.find(NAMES[0]) is None
    for number, secret in enumerate((b"", b"x" * 64, None, b"y" * 95)):
        one.keep(NAMES[number], secret)
        assert one.find(NAMES[number]) == (secret,)
    one.keep(NAMES[5], b"too long" * 12)
    assert one.find(NAMES[5]) is None
    for number in range(10, 99):
        one.keep(NAMES[number], b"z")
    assert one.find(NAMES[0]) is None
    assert one.find(NAMES[98]) == (b"z",)
    assert kept_secrets.page() is one


def test_the_memory_is_locked_and_neither_dumped_nor_inherited():
    address = ctypes.addressof(ctypes.c_char.from_buffer(page()._memory))
    (flags,) = re.findall(
        rf"^{address:08x}-.*?^VmFlags: ([\w ]+)", Path("/proc/self/smaps").read_text(), re.MULTILINE | re.DOTALL
    )
    assert {"lo", "dd", "wf"} <= set(flags.split())


def test_a_child_has_nothing_of_it_and_one_of_its_own():
    one = page()
    one.keep(NAMES[0], b"secret")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            own = kept_secrets.page()
            os.write(writing, repr((one.find(NAMES[0]), own is one, own.find(NAMES[0]))).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert os.read(reading, 100) == b"(None, False, None)"
    os.close(reading)
    assert one.find(NAMES[0]) == (b"secret",)


def test_nothing_is_kept_where_no_memory_can_be_locked(monkeypatch):
    class Poor:
        def mlock(self, *_):
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Poor())
    kept_secrets._page.cache_clear()
    assert kept_secrets.page() is None
    kept_secrets._page.cache_clear()


def test_a_process_with_keys_leaves_no_core():
    words = "import resource\nfrom hvmgr.faces.cli import key_files\nkey_files.read(['/dev/null'])"
    script = f"try:\n    {'; '.join(words.splitlines())}\nexcept Exception: print(resource.getrlimit(resource.RLIMIT_CORE)[0])"

    def allow():
        most = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (most, most))

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=True, preexec_fn=allow)
    assert done.stdout == b"0\n"
