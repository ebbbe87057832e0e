"""libvirt's qemu hook: may this VM start? And it leaves word of starts and ends, for a worker that may ask libvirt.

``hvmgr hook install`` puts a script into qemu.d that runs this file.

    hook.py GUEST OPERATION SUB-OPERATION EXTRA < domain.xml

| what                                    | answer                                                             |
|-----------------------------------------|--------------------------------------------------------------------|
| an XML without hvmgr's element          | 0, nothing is imported                                             |
| ``started``, ``release`` of a VM of ours| 0; a marker in the spool folder (storage/spool.py), whatever fails |
| any other operation but ``prepare``     | 0, nothing is read                                                 |
| a VM of hvmgr's, nothing in its way     | 0; what only warns goes to stderr and to the system's log          |
| a VM of hvmgr's that must not start     | 1 and one line on stderr, which libvirt shows to whoever starts it |
| a VM of hvmgr's that was allowed once   | 0, and the permission is used up                                   |
| hvmgr or a library of its is gone       | 0                                                                  |

libvirt waits for the answer, and deadlocks when it is asked for anything: nothing here may import it. This file runs by
itself, isolated and without Python's ``site``, so that VMs which are not hvmgr's cost no more than Python's own start.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own costs 8 ms to import; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from hvmgr.model.finding import Finding

_MARK = "urn:hvmgr:vm:1"  # model/metadata.NAMESPACE; a test compares them
_MARKS = tuple(_MARK.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be"))
_TOLD = ("started", "release")  # storage/spool.Event; a test compares them
_LIMIT = 16 << 20  # libvirt itself takes no XML above 4 MiB from its clients

PASS, REFUSE = 0, 1


def main(arguments: Sequence[str], xml: BinaryIO) -> int:
    """The answer to libvirt: 0 lets the VM start."""
    if len(arguments) >= 2 and arguments[1] in _TOLD:
        return _note(arguments, xml)
    if len(arguments) < 2 or arguments[1] != "prepare":
        return PASS
    data = xml.read(_LIMIT + 1)
    if not any(mark in data for mark in _MARKS):
        return PASS
    try:
        return _judge(arguments[0], data)
    except ImportError as error:
        _tell(f"hvmgr is not complete ({error}): {arguments[0]} was not examined")
        return PASS
    except Exception as error:  # noqa: BLE001 - the outermost edge: libvirt's user gets a sentence and a way out
        why = f"a defect in hvmgr's hook: {type(error).__name__}: {error}"
        return _refuse(arguments[0], why, None, f"hvmgr hook allow --once {arguments[0]}")


def _note(arguments: Sequence[str], xml: BinaryIO) -> int:
    """A marker for the worker. The guest lives, whatever becomes of it: a start that fails here would be torn down."""
    try:
        data = xml.read(_LIMIT + 1)
        if any(mark in data for mark in _MARKS):
            _leave_marker(_id_in(data), arguments[1], arguments[3] if len(arguments) > 3 else "")
    except Exception as error:  # noqa: BLE001 - the outermost edge
        if isinstance(error, PermissionError) and _is_users():
            return PASS
        _warn(f"no word of '{arguments[1]}' of {arguments[0]} could be left: {type(error).__name__}: {error}")
    return PASS


def _id_in(data: bytes) -> str:
    """The VM's id where libvirt writes it: the first element of that name. A parser would cost more than all the rest."""
    start = data.index(b"<uuid>") + len(b"<uuid>")
    return data[start : start + 36].decode("ascii")


def _leave_marker(vm_id: str, operation: str, reason: str) -> None:
    """An empty file: it is there at once and as a whole."""
    import os
    import time

    if not set(vm_id) <= set("0123456789abcdef-"):
        raise ValueError(f"'{vm_id}' is no id")
    folder = os.environ.get("HVMGR_RUN", "/run/hvmgr") + "/events/new"  # pathlib would cost more than all the rest
    os.makedirs(folder, mode=0o700, exist_ok=True)  # noqa: PTH103
    word = reason if reason.isascii() and reason.isalpha() and reason.islower() else ""
    path = f"{folder}/{time.time_ns()}_{vm_id}_{operation}_{word[:32]}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def _is_users() -> bool:
    """Whether this is the hook of an ordinary user's session, for whose VMs the host has no worker."""
    import os

    return os.geteuid() != 0


def _judge(name: str, data: bytes) -> int:
    if "hvmgr" not in sys.modules:
        _find_packages()
    from hvmgr import errors
    from hvmgr.model import configuration
    from hvmgr.storage import start_guard

    try:
        if len(data) > _LIMIT:
            raise errors.Corrupt(f"its XML is larger than {_LIMIT >> 20} MiB")
        present = configuration.parse(data, source="libvirt's XML")
        facts = present.metadata()
        if facts is None:
            return PASS
        allow = start_guard.command_line(name, facts, "hook", "allow", "--once")
        if start_guard.use_up(present):
            _warn(f"{name} starts without being examined, as 'hvmgr hook allow' said")
            return PASS
        findings = start_guard.examine(present)
    except errors.HvmgrError as error:
        return _refuse(name, error.message, error.hint)
    refusals = start_guard.refusals(findings)
    if refusals:
        is_for_now = refusals[0].code == "operation-running"  # nothing but time helps
        return _refuse(name, *_summary(refusals), None if is_for_now else allow)
    for finding in findings:
        _warn(f"{name}: {finding.sentence}")
    return PASS


def _summary(refusals: list[Finding]) -> tuple[str, str | None]:
    """The first thing that is in the way, how many more there are, and what to do."""
    first, more = refusals[0], len(refusals) - 1
    return first.sentence + (f" (and {more} more)" if more else ""), first.repair


def _find_packages() -> None:
    """This file runs isolated: what ``site`` would have done, and the folder that hvmgr itself lies in."""
    import gc
    import site
    from pathlib import Path

    gc.set_threshold(50_000)
    site.main()
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)


def _refuse(name: str, why: str, do: str | None, allow: str | None = None) -> int:
    """One line; libvirt shows it behind its own words."""
    ways = [do or "", f"to start it all the same: {allow}" if allow else ""]
    _tell(f"hvmgr: {name} must not start: " + "; ".join([why, *(way for way in ways if way)]))
    return REFUSE


def _warn(sentence: str) -> None:
    """libvirt drops what a hook that lets a start pass says: the system's log keeps it."""
    import syslog

    _tell(f"hvmgr: {sentence}")
    syslog.openlog("hvmgr")
    syslog.syslog(syslog.LOG_WARNING, _clean(sentence))


def _tell(sentence: str) -> None:
    try:
        sys.stderr.write(_clean(sentence) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # the answer counts, not who hears its reason


def _clean(text: str) -> str:
    """One line, whatever names and paths hold."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
