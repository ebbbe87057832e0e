"""The entry of the command line. ``--version`` is answered before anything heavy is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and end with its exit code."""
    if sys.argv[1:] in (["--version"], ["version"]):
        from hvmgr.version import __version__

        sys.stdout.write(f"hvmgr {__version__}\n")
        return
    from hvmgr.faces.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
