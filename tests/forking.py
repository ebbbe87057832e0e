"""Programs of Python's that are forked from a process which has imported what they need: that takes most of a short one's time.

As a program, in whatever namespaces and as whatever user it is started:

    python forking.py MODULE…       imports the modules, then on stdin, a line each: {"module", "arguments", "environment"};
                                    on stdout two lines each: the process, then {"code", "stdout", "stderr"}

It holds neither libvirt nor a thread, and ends with its stdin. Each process starts at the module's ``main``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import traceback


def own():
    """What each test has for itself, of its environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("HVMGR_")}


class Forking:
    """The programs, for the tests: ``run(module, …)`` is as ``subprocess.run([python, "-m", module, …])``."""

    def __init__(self, process):
        self.process = process

    def run(self, module, *arguments, environment=None, timeout_s=120):
        """What it said and ended with; AssertionError when it does not end in time."""
        request = {"module": module, "arguments": [str(one) for one in arguments], "environment": environment or {}}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self._answer(60)
        try:
            done = self._answer(timeout_s)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            said = self._answer(60)
            raise AssertionError(f"{request['arguments']} did not end within {timeout_s} s: {said}") from None
        return subprocess.CompletedProcess(request["arguments"], done["code"], done["stdout"], done["stderr"])

    def _answer(self, timeout_s):
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        if not ready:
            raise TimeoutError
        line = self.process.stdout.readline()
        assert line, "the process to fork from ended"
        return json.loads(line)


@contextlib.contextmanager
def opened(modules, *, command=(sys.executable,), environment=None):
    """A Forking; ``command`` starts a Python, in the right place and as the right user."""
    line = [*map(str, command), __file__, *modules]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, bufsize=0, env=environment) as process:
        try:
            yield Forking(process)
        finally:
            process.stdin.close()


# --- the process to fork from -----------------------------------------------------------------------------------------


def _serve():
    for line in sys.stdin:
        request = json.loads(line)
        said = [os.memfd_create(name) for name in ("stdout", "stderr")]
        pid = os.fork()
        if pid == 0:
            os._exit(_carry_out(*said, **request))
        _say(pid)
        _, status = os.waitpid(pid, 0)
        texts = [_text(descriptor) for descriptor in said]
        _say({"code": os.waitstatus_to_exitcode(status), "stdout": texts[0], "stderr": texts[1]})


def _say(answer):
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _text(descriptor):
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")


def _carry_out(stdout, stderr, module, arguments, environment):
    """The exit code, in the child."""
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    try:
        code = importlib.import_module(module).main() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the child never goes on in the parent's code
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _import_all(name):
    """A module, and of a package whatever is below it."""
    module = importlib.import_module(name)
    for one in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        importlib.import_module(one.name)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    for _name in sys.argv[1:]:
        _import_all(_name)
    gc.freeze()  # a child that looks for garbage would copy all of it
    gc.set_threshold(50_000)  # as the command itself has it
    _serve()
