"""libvirt's qemu hook: may this VM start, and with which configuration does a saved one go on?

It also leaves word of starts and ends, for a worker that may ask libvirt.

``hvmgr hook install`` puts a script into qemu.d that runs this file.

    hook.py GUEST OPERATION SUB-OPERATION EXTRA < domain.xml

| what                                       | answer                                                             |
|--------------------------------------------|--------------------------------------------------------------------|
| any operation that is not named below      | 0, nothing is read                                                 |
| an XML without hvmgr's element, or none    | 0, nothing is imported                                             |
| ``prepare``: nothing in the VM's way       | 0; what only warns goes to stderr and to the system's log          |
| ``prepare``: it must not start             | 1 and one line on stderr, which libvirt shows to whoever starts it |
| ``prepare``: it was allowed once           | 0, and the permission is used up                                   |
| ``prepare``: its home does not answer      | 1 after 30 seconds, as above                                       |
| ``started``, ``release``                   | 0; a marker in the spool folder (storage/spool.py), whatever fails |
| ``restore``, ``migrate``                   | 0, and on stdout the XML that fits this host; empty: as it is      |
| ``restore``, ``migrate``: anything goes wrong | 0, nothing on stdout; the system's log says what                |
| hvmgr or a library of its is gone          | 0                                                                  |

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
_PATIENCE_S = 30.0  # with a home that lies on a file server which does not answer

_PREPARE = "prepare"
_REWRITTEN = ("restore", "migrate")  # libvirt reads a new XML from our stdout

PASS, REFUSE = 0, 1

# The exit code, the XML for stdout, and the lines for stderr. A tuple, for it comes from another process.
_Answer = tuple[int, str, list[str]]


def main(arguments: Sequence[str], xml: BinaryIO | None, *, patience_s: float | None = None) -> int:
    """The answer to libvirt: 0 lets the VM go on. With ``patience_s`` another process looks, and has that long."""
    if len(arguments) >= 2 and arguments[1] in _TOLD:
        return _note(arguments, xml)
    if len(arguments) < 2 or arguments[1] not in (_PREPARE, *_REWRITTEN):
        return PASS
    data = _read(xml)
    if not any(mark in data for mark in _MARKS):
        return PASS
    name, operation = arguments[0], arguments[1]
    if patience_s is None:
        code, out, said = _answer(name, operation, data)
    else:
        code, out, said = _answer_within(patience_s, name, operation, data)
    for sentence in said:
        _tell(sentence)
    if out:
        sys.stdout.buffer.write(out.encode())
        sys.stdout.flush()
    return code


def _read(xml: BinaryIO | None) -> bytes:
    """What libvirt says of the VM; nothing where stdin is closed."""
    try:
        return b"" if xml is None else xml.read(_LIMIT + 1)
    except (OSError, ValueError):
        return b""


def _answer(name: str, operation: str, data: bytes) -> _Answer:
    """Whatever happens, there is an answer."""
    try:
        if "hvmgr.errors" not in sys.modules:
            _find_packages()
        return _judge(name, data) if operation == _PREPARE else (PASS, _rewritten(data), [])
    except ImportError as error:
        return PASS, "", [f"hvmgr is not complete ({error}): {name} was not examined"]
    except Exception as error:  # noqa: BLE001 - the outermost edge: libvirt's user gets a sentence and a way out
        why = f"a defect in hvmgr's hook: {type(error).__name__}: {error}"
        return _failed(name, operation, why)


def _note(arguments: Sequence[str], xml: BinaryIO | None) -> int:
    """A marker for the worker. The guest lives, whatever becomes of it: a start that fails here would be torn down."""
    try:
        data = _read(xml)
        if any(mark in data for mark in _MARKS):
            _leave_marker(_id_in(data), arguments[1], arguments[3] if len(arguments) > 3 else "")
    except Exception as error:  # noqa: BLE001 - the outermost edge
        if isinstance(error, PermissionError) and _is_users():
            return PASS
        _tell(_warning(f"no word of '{arguments[1]}' of {arguments[0]} could be left: {type(error).__name__}: {error}"))
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


def _answer_within(patience_s: float, name: str, operation: str, data: bytes) -> _Answer:
    """The same by a process that can be left behind."""
    try:
        _find_hvmgr()
        from hvmgr.host import patience
    except ImportError as error:
        return PASS, "", [f"hvmgr is not complete ({error}): {name} was not examined"]
    try:
        code, out, said = patience.within(patience_s, lambda: _answer(name, operation, data))
    except patience.Overdue:
        why = f"its home did not answer within {patience_s:g} seconds"
        return _failed(name, operation, why, "look whether the file server of its home is there")
    except (RuntimeError, ValueError, OSError) as error:
        return _failed(name, operation, f"a defect in hvmgr's hook: {error}")
    return code, out, said


def _failed(name: str, operation: str, why: str, do: str | None = None) -> _Answer:
    """A start is refused for it. What goes on already, goes on."""
    if operation == _PREPARE:
        return _refusal(name, why, do, f"hvmgr hook allow --once {name}")
    return PASS, "", [_warning(f"{operation} of {name}: its configuration is left as it is: {why}")]


def _judge(name: str, data: bytes) -> _Answer:
    from hvmgr import errors
    from hvmgr.model import configuration
    from hvmgr.storage import start_guard

    try:
        if len(data) > _LIMIT:
            raise errors.Corrupt(f"its XML is larger than {_LIMIT >> 20} MiB")
        present = configuration.parse(data, source="libvirt's XML")
        facts = present.metadata()
        if facts is None:
            return PASS, "", []
        allow = start_guard.command_line(name, facts, "hook", "allow", "--once")
        if start_guard.use_up(present):
            return PASS, "", [_warning(f"{name} starts without being examined, as 'hvmgr hook allow' said")]
        findings = start_guard.examine(present)
    except errors.HvmgrError as error:
        return _refusal(name, error.message, error.hint)
    refusals = start_guard.refusals(findings)
    if refusals:
        is_for_now = refusals[0].code == "operation-running"  # nothing but time helps
        return _refusal(name, *_summary(refusals), None if is_for_now else allow)
    return PASS, "", [_warning(f"{name}: {finding.sentence}") for finding in findings]


def _rewritten(data: bytes) -> str:
    """The XML that fits this host, '' when it does as it is; what is wrong with it is libvirt's to say."""
    from hvmgr.storage import restored

    if len(data) > _LIMIT:
        raise ValueError(f"its XML is larger than {_LIMIT >> 20} MiB")
    return restored.rewrite(data, source="libvirt's XML") or ""


def _summary(refusals: list[Finding]) -> tuple[str, str | None]:
    """The first thing that is in the way, how many more there are, and what to do."""
    first, more = refusals[0], len(refusals) - 1
    return first.sentence + (f" (and {more} more)" if more else ""), first.repair


def _find_hvmgr() -> None:
    """This file runs isolated: the folder that hvmgr itself lies in is not looked into."""
    import os

    here = __file__
    for _ in range(3):
        here = os.path.dirname(here)  # noqa: PTH120 - pathlib would cost more than all the rest
    if here not in sys.path:
        sys.path.insert(0, here)


def _find_packages() -> None:
    """The same for what ``site`` would have done."""
    import gc
    import site

    gc.set_threshold(50_000)
    site.main()
    _find_hvmgr()


def _refusal(name: str, why: str, do: str | None, allow: str | None = None) -> _Answer:
    """One line; libvirt shows it behind its own words."""
    ways = [do or "", f"to start it all the same: {allow}" if allow else ""]
    return REFUSE, "", [f"hvmgr: {name} must not start: " + "; ".join([why, *(way for way in ways if way)])]


def _warning(sentence: str) -> str:
    """libvirt drops what a hook that lets a start pass says: the system's log keeps it."""
    import syslog

    syslog.openlog("hvmgr")
    syslog.syslog(syslog.LOG_WARNING, _clean(sentence))
    return f"hvmgr: {sentence}"


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
    sys.exit(main(sys.argv[1:], None if sys.stdin is None else sys.stdin.buffer, patience_s=_PATIENCE_S))
