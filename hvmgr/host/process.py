"""The one door to other programs: clean environment, no stdin, a time limit, always waited for.

``run`` is for programs that end by themselves, ``spawned`` for those that serve us meanwhile. What goes wrong
is raised with a command line that can be pasted into a shell and with the program's last words.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import pids

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

# How long a spawned program may take to end after SIGTERM before it is killed.
TERMINATE_S = 5.0

_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")

# Debian's names; Fedora and RHEL carry most of them in a package of the program's own name.
_PACKAGES = {
    "blkdiscard": "util-linux",
    "cryptsetup": "cryptsetup-bin",
    "debugfs": "e2fsprogs",
    "dmsetup": "dmsetup",
    "e2fsck": "e2fsprogs",
    "fsck.fat": "dosfstools",
    "fuse2fs": "fuse2fs",
    "fusermount3": "fuse3",
    "grub-mkimage": "grub-common",
    "iconv": "libc-bin",
    "ldd": "libc-bin",
    "mcopy": "mtools",
    "mke2fs": "e2fsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.fat": "dosfstools",
    "mkfs.xfs": "xfsprogs",
    "mkntfs": "ntfs-3g",
    "mmd": "mtools",
    "mount": "mount",
    "nbdinfo": "libnbd-bin",
    "nsenter": "util-linux",
    "ntfs-3g": "ntfs-3g",
    "ntfscat": "ntfs-3g",
    "ntfscp": "ntfs-3g",
    "ntfsfix": "ntfs-3g",
    "ntfsls": "ntfs-3g",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
    "setfattr": "attr",
    "setpriv": "util-linux",
    "setsid": "util-linux",
    "sfdisk": "fdisk",
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
    "umount": "mount",
    "unshare": "util-linux",
    "virt-xml-validate": "libvirt-clients",
    "wimlib-imagex": "wimtools",
    "zstd": "zstd",
}

_LOOK_MS = 100  # how soon a command that runs is ended when somebody wants that
_PIPE = 1 << 20  # what an ordinary user may have
_PIECE = 64 << 10

# The kernel ends the program when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG). Should that have
# happened before the prctl, no signal comes any more: the shell sees it by its parent and never starts the program.
_GUARD = ("setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", '[ "$PPID" = "$1" ] || exit 125; shift; exec "$@"', "sh")


@dataclass(frozen=True, slots=True)
class Completed:
    """What a program left behind: its output as bytes, its messages as text, its exit code."""

    stdout: bytes
    stderr: str
    code: int


@dataclass(frozen=True, slots=True)
class Confined:
    """A program that ends with us, killed or not, leaves no core and has at most so many bytes of ``memory``."""

    memory: int
    pass_fds: tuple[int, ...] = ()


class Spawned:
    """A program that runs beside us until the ``spawned`` block ends."""

    def __init__(self, process: subprocess.Popen[bytes], command: str, stderr: IO[bytes]) -> None:
        self._process = process
        self._stderr = stderr
        self.command = command
        self.pid = process.pid
        self.start_time = pids.start_time(process.pid)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """The exit code as soon as it is known; None when it still runs after ``timeout_s``."""
        if self._process.poll() is None:
            # Still ours: nobody else collects it. Popen's own wait only looks at times.
            descriptor = os.pidfd_open(self.pid)
            try:
                pids.has_ended(descriptor, timeout_s)
            finally:
                os.close(descriptor)
        return self._process.poll()

    def stderr_text(self) -> str:
        """All that the program has written to its stderr so far."""
        size = os.fstat(self._stderr.fileno()).st_size
        return _text(os.pread(self._stderr.fileno(), size, 0))

    def end(self) -> None:
        """Terminate, wait, kill; returns when the program is gone."""
        if self.poll() is None:
            self._process.terminate()
            if self.wait(TERMINATE_S) is None:
                self._process.kill()
        self._process.wait()


def run(
    argv: Sequence[str | Path],
    *,
    input: bytes = b"",
    timeout_s: float,
    ok_codes: Collection[int] = (0,),
    environment: Mapping[str, str] | None = None,
    confined: Confined | None = None,
) -> Completed:
    """The output of a program that ended with one of ``ok_codes``; ``environment`` is added to its clean one.

    ``confined`` is for one that holds secrets and works by what strangers wrote. Raises Unsupported when the program is
    not installed; HostFailed for another exit code, a signal, or when it ran longer than ``timeout_s`` (it and its children
    are then killed).
    """
    command = shlex.join(os.fspath(word) for word in argv)
    stdin = subprocess.PIPE if input else subprocess.DEVNULL
    started, pass_fds = argv, () if confined is None else confined.pass_fds
    if confined is not None:
        require(os.fspath(argv[0]))
        limits = ("prlimit", "--core=0", f"--as={confined.memory}", "--")
        started = [*_GUARD, str(os.getpid()), *limits, *argv]
    with _started(
        started, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, environment=environment, pass_fds=pass_fds
    ) as process:
        try:
            stdout, stderr = process.communicate(input or None, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise errors.HostFailed(
                f"'{command}' did not end within {timeout_s:g} s and was stopped", command=command
            ) from error
        finally:
            if process.returncode is None:  # not reaped: the number of its group is still its own
                _kill_group(process)
    completed = Completed(stdout, _text(stderr), process.returncode)
    if completed.code not in ok_codes:
        raise _failed(command, completed)
    return completed


# Whoever is killed closes the pipe without a word. What a terminal or systemd sends before concerns the one who works.
_SECOND = ("sh", "-c", "trap '' INT TERM HUP; read -r _ || exec \"$@\"", "sh")


@contextlib.contextmanager
def seconded(argv: Sequence[str | Path]) -> Iterator[None]:
    """Should we be killed before the block ends, this program runs by itself, with our environment; else it never does."""
    quiet = subprocess.DEVNULL
    try:
        second = subprocess.Popen(
            [*_SECOND, *argv], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
        )
    except OSError as error:
        raise errors.HostFailed(f"cannot start '{_SECOND[0]}': {error.strerror}") from error
    with second:
        try:
            yield
        finally:
            assert second.stdin is not None
            with contextlib.suppress(OSError):  # somebody has ended it
                second.stdin.write(b"\n")
                second.stdin.flush()


@contextlib.contextmanager
def spawned(
    argv: Sequence[str | Path],
    *,
    stderr_to: IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Spawned]:
    """A program that runs for the length of the block and never longer.

    It is ended on every way out of the block, and by the kernel when we are killed. The kernel watches the
    *thread* that entered the block, which therefore has to stay until the block ends. Ctrl-C of the
    terminal does not reach it. ``stderr_to`` is an open file; without one its messages are kept aside. ``environment``
    is added to its clean one.
    """
    require(os.fspath(argv[0]))
    command = shlex.join(os.fspath(word) for word in argv)
    with contextlib.ExitStack() as stack:
        stderr = stderr_to or stack.enter_context(tempfile.TemporaryFile(prefix="hvmgr-"))
        guarded = [*_GUARD, str(os.getpid()), *argv]
        quiet = subprocess.DEVNULL
        process = stack.enter_context(
            _started(guarded, stdin=quiet, stdout=quiet, stderr=stderr, pass_fds=pass_fds, environment=environment)
        )
        program = Spawned(process, command, stderr)
        stack.callback(program.end)
        yield program


class Attended:
    """A command of the user's while it runs: its own streams, his environment, a process group of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def wait(self, *, until: Callable[[], bool]) -> int | None:
        """Its exit code, negative for a signal; None when it still runs and ``until`` says that nobody waits any longer."""
        descriptor = os.pidfd_open(self._process.pid)  # still ours: nobody else collects it
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            while not poller.poll(_LOOK_MS):
                if until():
                    return None
        finally:
            os.close(descriptor)
        return self._process.wait()

    def ask_to_end(self) -> None:
        """It and its children have heard that they should end; what they still have to put right they may."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def end(self, grace_s: float) -> None:
        """It has ended: asked first, killed with its children after ``grace_s``."""
        self.ask_to_end()
        deadline = time.monotonic() + grace_s
        if self._process.poll() is None and self.wait(until=lambda: time.monotonic() >= deadline) is None:
            _kill_group(self._process)
        self._process.wait()


@contextlib.contextmanager
def attended(
    argv: Sequence[str], *, environment: Mapping[str, str], stdout: int | None = None, grace_s: float = TERMINATE_S
) -> Iterator[Attended]:
    """A command of the user's, ended at the end of the block, and asked to end when we are killed.

    It has our stdout (or the descriptor ``stdout``) and stderr, and nothing to read: nobody answers a question meanwhile.
    """
    require(argv[0])
    require("setpriv")
    surroundings = {**os.environ, "PATH": _environment()["PATH"], **environment}
    try:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *argv], stdin=subprocess.DEVNULL, stdout=stdout, process_group=0,
            env=surroundings,
        )  # fmt: skip
    except OSError as error:
        raise errors.HostFailed(f"cannot start '{argv[0]}': {error.strerror}") from error
    with process:
        command = Attended(process)
        try:
            yield command
        finally:
            command.end(grace_s)


class _EndedEarly(Exception):
    """A program has ended that was to read more."""


@contextlib.contextmanager
def filtered(argv: Sequence[str | Path], *, to: int) -> Iterator[Callable[[memoryview], None]]:
    """A function that writes into a program whose output goes to the descriptor ``to``.

    The program has ended well when the block is left well; HostFailed with its words otherwise. Should we be killed, its
    input ends, and so does it.
    """
    command = shlex.join(os.fspath(word) for word in argv)
    with (
        tempfile.TemporaryFile(prefix="hvmgr-") as stderr,
        _started(argv, stdin=subprocess.PIPE, stdout=to, stderr=stderr) as program,
    ):
        assert program.stdin is not None
        source = program.stdin

        def write(view: memoryview) -> None:
            try:
                source.write(view)
            except BrokenPipeError:
                raise _EndedEarly from None

        try:
            yield write
            source.flush()
        except (BrokenPipeError, _EndedEarly):
            pass  # its words say why
        with contextlib.suppress(BrokenPipeError):
            source.close()
        program.wait()
        stderr.seek(0)
        if program.returncode != 0:
            raise _failed(command, Completed(b"", _text(stderr.read()), program.returncode))


@contextlib.contextmanager
def output_of(argv: Sequence[str | Path], *, source: int) -> Iterator[IO[bytes]]:
    """What a program makes of the descriptor ``source``, unbuffered; HostFailed with its words when it fails.

    The block has to read to the end; on an error it need not, and the program is then ended.
    """
    command = shlex.join(os.fspath(word) for word in argv)
    with (
        tempfile.TemporaryFile(prefix="hvmgr-") as stderr,
        _started(argv, stdin=source, stdout=subprocess.PIPE, stderr=stderr, buffered=False) as program,
    ):
        assert program.stdout is not None
        early: errors.HvmgrError | None = None
        try:
            yield program.stdout
        except errors.Corrupt as error:
            early = error  # its own words say better why what it gave is cut off
        program.stdout.close()
        program.wait()
        stderr.seek(0)
        words = _text(stderr.read())
        if program.returncode > 0 or (early is None and program.returncode != 0):
            raise _failed(command, Completed(b"", words, program.returncode)) from early
        if early is not None:
            raise early


def followed(argv: Sequence[str | Path], hear: Callable[[bytes], None]) -> str:
    """A program that takes long and says on stdout how far it is: ``hear`` gets that as it comes. What it wrote to stderr.

    HostFailed with its words when it fails. When ``hear`` raises, the program is ended.
    """
    command = shlex.join(os.fspath(word) for word in argv)
    with (
        tempfile.TemporaryFile(prefix="hvmgr-") as stderr,
        _started(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, buffered=False) as program,
    ):
        assert program.stdout is not None
        while piece := program.stdout.read(_PIECE):
            hear(piece)
        program.wait()
        stderr.seek(0)
        completed = Completed(b"", _text(stderr.read()), program.returncode)
    if completed.code != 0:
        raise _failed(command, completed)
    return completed.stderr


@contextlib.contextmanager
def _started(
    argv: Sequence[str | Path],
    *,
    stdin: int,
    stdout: int,
    stderr: int | IO[bytes],
    pass_fds: Sequence[int] = (),
    buffered: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    require(os.fspath(argv[0]))
    try:
        # A group of its own: Ctrl-C of the terminal reaches us alone, and we decide.
        process = subprocess.Popen(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds, process_group=0,
            env=_environment() | dict(environment or {}), bufsize=-1 if buffered else 0, pipesize=-1 if buffered else _PIPE,
        )  # fmt: skip
    except OSError as error:
        raise errors.HostFailed(f"cannot start '{argv[0]}': {error.strerror}") from error
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def require(program: str) -> None:
    """Unsupported when a program is not installed, or cannot be run; the hint names its package."""
    if shutil.which(program, path=_environment()["PATH"]) is None:
        if os.sep in program and Path(program).exists():
            what = "a directory" if Path(program).is_dir() else "not executable"
            raise errors.Unsupported(f"'{program}' is {what}", hint="name a program that can be run", program=program)
        package = _PACKAGES.get(Path(program).name)
        hint = f"install it, on Debian with: apt install {package}" if package else f"install '{program}'"
        raise errors.Unsupported(f"the program '{program}' is not installed", hint=hint, program=program)


def path_of(program: str) -> Path:
    """Where an installed program is; Unsupported as ``require``."""
    require(program)
    return Path(str(shutil.which(program, path=_environment()["PATH"])))


def _environment() -> dict[str, str]:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    folders += [folder for folder in _SYSTEM_FOLDERS if folder not in folders]
    return {
        "PATH": os.pathsep.join(folder for folder in folders if folder),
        "LANG": "C.UTF-8",
        "HOME": os.environ.get("HOME", "/"),
    }


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _failed(command: str, completed: Completed) -> errors.HostFailed:
    how = (
        f"was ended by {_signal_name(-completed.code)}" if completed.code < 0 else f"failed with code {completed.code}"
    )
    # Some programs, qemu-io for one, say what went wrong on stdout.
    text = completed.stderr if completed.stderr.strip() else _text(completed.stdout)
    words = "; ".join(line.strip() for line in text.splitlines()[-5:] if line.strip())
    message = f"'{command}' {how}" + (f": {words}" if words else "")
    return errors.HostFailed(message, command=command, code=completed.code, words=words)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
