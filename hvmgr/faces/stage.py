"""A place of its own for the demo: libvirt's embedded driver, a root of homes and an index in one temporary folder.

Whatever runs inside finds them through the environment, as it would find the user's. At the end the guests are ended
and the folder is removed, also after Ctrl-C, SIGTERM and errors; what libvirt learnt about this host's QEMU (eight
seconds' work) is kept in hvmgr's cache for the next time.

With a connection of the user's in place of the embedded driver, homes and index are in that folder all the same. Of the
connection's VMs only those whose homes are there are touched; at the end they are gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, settings
from hvmgr.host import hypervisor, pids
from hvmgr.host.domain import Domain
from hvmgr.model import configuration
from hvmgr.storage import durable

_WAIT_S = 30.0
_HOMES = "homes"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# No virtlogd, not even the host's, writes what a guest says; the guests need no /dev of their own, which takes time, and
# nobody needs each of the 500 properties of their CPUs, for which libvirt asks one by one without this filter (under TCG).
_CONF = 'stdio_handler = "file"\nnamespaces = []\ncapability_filters = ["cpu-unavailable-features"]\n'


@dataclass(frozen=True, slots=True)
class Stage:
    """The folder, and what lies in it."""

    folder: Path
    connection: str | None = None  # the user's, in place of an embedded driver

    @property
    def libvirt(self) -> Path:
        """The root of the embedded driver."""
        return self.folder / "libvirt"

    @property
    def uri(self) -> str:
        """The connection."""
        return self.connection or f"qemu:///embed?root={self.libvirt}"

    def environment(self) -> dict[str, str]:
        """What makes every hvmgr command work here."""
        return {
            "LIBVIRT_DEFAULT_URI": self.uri,
            "HVMGR_ROOT": str(self.folder / _HOMES),
            "HVMGR_INDEX": str(self.folder / "index"),
        }


@contextlib.contextmanager
def opened(*, keep: bool = False, uri: str | None = None) -> Iterator[Stage]:
    """A stage that is gone at the end; with ``keep`` the folder stays, without any guest running.

    With ``uri`` it is on that connection of the user's; HostFailed when a VM of the demo's cannot be removed there at
    the end: then the folder stays, too.
    """
    # Short, whatever TMPDIR says: sockets below it have to fit into 108 bytes.
    stage = Stage(Path(tempfile.mkdtemp(prefix="hvdemo-", dir="/tmp")), uri)
    own = {} if settings.is_root() or uri is not None else {"XDG_RUNTIME_DIR": str(stage.folder)}
    try:
        stage.folder.chmod(0o711)  # QEMU's user passes through
        if uri is None:
            _furnish(stage)
        # Of an ordinary user libvirt would keep a thing or two in the session's runtime folder.
        with _in_environment({**own, **stage.environment()}):
            yield stage
    finally:
        with _undisturbed():
            if uri is None:
                _end_guests(stage)
                _keep_learnt(stage)
            else:
                _leave(stage, uri, keep=keep)
            if not keep:
                durable.remove_folder(stage.folder)


def _leave(stage: Stage, uri: str, *, keep: bool) -> None:
    """No VM of the stage's runs on the user's connection, and without ``keep`` none is known there any more."""
    if not (stage.folder / _HOMES).is_dir():
        return
    try:
        with hypervisor.opened(uri, wait_s=_WAIT_S) as connection:
            for domain in connection.domains():
                if is_ours(stage, domain):
                    domain.destroy()
                    if not keep and connection.find_domain(domain.uuid) is not None:
                        domain.undefine(keep_nvram=False, keep_tpm=False)
    except errors.HvmgrError as error:
        raise errors.HostFailed(
            f"the demo's VMs on {uri} could not be removed: {error}",
            hint=f"remove them with virsh, then the folder {stage.folder}",
        ) from error


def is_ours(stage: Stage, domain: Domain) -> bool:
    """Whether a domain of the connection has its home in the stage's folder."""
    try:
        facts = configuration.parse(domain.xml(live=False), source=f"libvirt's XML of {domain.name}").metadata()
    except (errors.Corrupt, errors.Unsupported, errors.NotFound):
        return False  # another's, damaged, or gone in the meantime
    return facts is not None and facts.home.is_relative_to(stage.folder)


def has_learnt() -> bool:
    """Whether libvirt's first look at this host's QEMU is behind us."""
    return any(_cache().glob("*.xml"))


class Wishes:
    """What the signals asked for, also while an operation held them back: it finishes, and what follows is not begun."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def check(self) -> None:
        """Raises Cancelled when the user wants to stop."""
        try:
            numbers = os.read(self._reader, 256)
        except BlockingIOError:
            return
        if set(numbers) & set(_SIGNALS):
            raise errors.Cancelled("the demo was stopped")

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """From here on; SIGTERM and SIGHUP interrupt as Ctrl-C does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in old.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Nobody listens any more."""
        os.close(self._reader)
        os.close(self._writer)


def _cache() -> Path:
    return settings.cache_folder() / "libvirt-capabilities"


def _learnt(stage: Stage) -> Path:
    return stage.libvirt / "cache" / "qemu" / "capabilities"


def _furnish(stage: Stage) -> None:
    conf = stage.libvirt / "etc" / "qemu.conf"
    conf.parent.mkdir(parents=True)
    stage.libvirt.chmod(0o711)
    conf.write_text(_CONF)
    if _cache().is_dir():
        shutil.copytree(_cache(), _learnt(stage))


def _keep_learnt(stage: Stage) -> None:
    """Never a reason to fail: the next demo only takes longer."""
    with contextlib.suppress(errors.HvmgrError, OSError):
        for level in reversed([_cache(), *_cache().parents]):
            durable.make_folder(level, mode=0o755)
        for file in _learnt(stage).glob("*.xml"):
            known = _cache() / file.name
            if not known.exists() or known.read_bytes() != file.read_bytes():
                durable.copy_file(file, known)


@contextlib.contextmanager
def _in_environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _end_guests(stage: Stage) -> None:
    """By libvirt, which then cleans up behind them; those that it does not know, by their pid files."""
    if not (stage.libvirt / "run").is_dir():
        return  # no guest without a driver that was opened
    with contextlib.suppress(errors.HvmgrError):
        for domain in hypervisor.connect(stage.uri, wait_s=_WAIT_S).domains():
            domain.destroy()
    for file in (stage.libvirt / "run" / "qemu").glob("*.pid"):
        if file.name == "driver.pid":  # our own; closing it after a look would drop libvirt's lock on it
            continue
        with contextlib.suppress(errors.HvmgrError, OSError, ValueError):
            pid = int(file.read_text())
            started = pids.start_time(pid)
            if started is not None and str(stage.libvirt) in Path(f"/proc/{pid}/cmdline").read_text():
                pids.end_left_over(pid, started)
