"""Runs the programs of this folder one after the other, each forked from here: what they import is imported once.

    python server.py                        on stdin, a line each: {"program", "arguments", "environment", "output"}
                                            on stdout, a line each: its process, then its exit code

What the program says goes to the file ``output``. The server holds neither libvirt nor a thread; it ends with its stdin.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

import shapes  # noqa: F401 - imported before the forks, with crash and all of hvmgr


def main() -> None:
    """One program after the other."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_run(**request))
        _say(pid)
        _, status = os.waitpid(pid, 0)
        _say(os.waitstatus_to_exitcode(status))


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _run(program: str, arguments: list[str], environment: dict[str, str], output: str) -> int:
    """What the program ends with, in the child."""
    nothing, said = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for source, target in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    try:
        return importlib.import_module(program).main() or 0
    except BaseException:  # noqa: BLE001 - the child never goes on in the server's code
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
