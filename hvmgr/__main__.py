"""The entry of the command line. ``--version`` is answered before anything heavy is imported."""

from __future__ import annotations

import contextlib
import os
import sys


def main() -> None:
    """Run the command line and end with its exit code."""
    if sys.argv[1:] in (["--version"], ["version"]):
        from hvmgr.version import __version__

        sys.stdout.write(f"hvmgr {__version__}\n")
        return
    import gc

    gc.set_threshold(50_000)  # imports make no garbage worth looking for: a tenth of the time to start
    from hvmgr.faces.cli import run

    code = run(sys.argv[1:])
    if "libvirt" in sys.modules:
        sys.exit(code)
    # Nothing waits for Python's own end: it would take another tenth of the time of a command that only reads homes.
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
