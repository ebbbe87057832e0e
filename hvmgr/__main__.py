"""The entry of the command line."""

from __future__ import annotations

import _thread
import contextlib
import os
import sys
import time

TYPE_CHECKING = False  # typing's own costs 8 ms to import; type checkers know the name
if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def main() -> None:
    """Run the command line and end with its exit code."""
    sys.unraisablehook = _stop_all_the_same
    try:
        _take_the_places_of_what_is_closed()
        import gc

        gc.set_threshold(50_000)  # imports make no garbage worth looking for: a tenth of the time to start
        from hvmgr.faces.cli import run

        code = run(sys.argv[1:])
        if "libvirt" in sys.modules:
            import signal

            # Python's own end takes a moment, in which Ctrl-C would end the process without its exit code.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # before anything was begun
        sys.stderr.write("hvmgr: stopped\n")
        code = 130
    if "libvirt" in sys.modules:
        sys.exit(code)
    # Nothing waits for Python's own end: it would take another tenth of the time of a command that only reads homes.
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def _stop_all_the_same(what: UnraisableHookArgs) -> None:
    """Ctrl-C that comes while an object is thrown away (libvirt's are), where Python hears nothing, comes once more."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        _thread.start_new_thread(_interrupt_soon, ())
    else:
        sys.__unraisablehook__(what)


def _interrupt_soon() -> None:
    time.sleep(0.02)  # in here it would be lost again
    _thread.interrupt_main()


def _take_the_places_of_what_is_closed() -> None:
    """No file that is opened later gets the number of stdin, stdout or stderr (``hvmgr … >&-``).

    What stands in for stdin cannot be read, nor for stdout written: whoever needs one of them says so, as of a full disk.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            found = os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_WRONLY)
            if found != number:
                os.dup2(found, number)
                os.close(found)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
