"""A connection to libvirt's QEMU driver on this host: its domains, its capabilities, its folders.

Accepted: ``qemu:///system``, ``qemu:///session``, ``qemu:///embed?root=/abs``, each also as ``qemu+unix`` with a
``socket``. Anything that may reach another host is Unsupported: hvmgr works on local files.

The embedded driver belongs to one process at a time and, once opened, to that process until it ends (libvirt 9.0):
closing the connection does not give the root back, a second root in the same process is refused, and so is the 20th
opening, because each registers a driver anew. So this module opens it once and keeps it. Its guests outlive the
process and are attached again by the next one; ``opened`` waits for that.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import struct
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from hvmgr.errors import Busy, Conflict, HostFailed, Unsupported, UsageError
from hvmgr.host import capabilities, libvirt_door
from hvmgr.host.capabilities import Capabilities, MachineFacts
from hvmgr.host.domain import Domain, State
from hvmgr.host.events import Follower

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Capabilities", "Connection", "Domain", "Driver", "MachineFacts", "State", "connect", "opened", "parse_uri"]

_POLL_S = 0.1

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid

# The embedded driver that this process holds: root -> open connection
_embedded: dict[Path, Any] = {}
_embedded_lock = threading.Lock()

# The longest socket below an embedded root is the monitor's, "lib/qemu/domain-ID-NAME/monitor.sock" with NAME cut
# to 20 characters; sun_path holds 107.
_LONGEST_ROOT = 50

_EMBED_CONF = 'stdio_handler = "file"\n'  # no virtlogd is needed to write a guest's log
_VIRTLOGD_SOCKET = Path("/run/libvirt/virtlogd-sock")


class Driver(StrEnum):
    """Which instance of libvirt's QEMU driver a connection speaks to."""

    SYSTEM = "system"
    SESSION = "session"
    EMBED = "embed"


@dataclass(frozen=True, slots=True)
class Address:
    """A connection URI taken apart; ``root`` is the embedded driver's folder."""

    uri: str
    driver: Driver
    root: Path | None = None


@dataclass(frozen=True, slots=True)
class Volume:
    """What a volume of a storage pool is on this host."""

    path: Path
    is_device: bool


def parse_uri(uri: str) -> Address:
    """The address behind a URI; Unsupported when it is not QEMU on this host, UsageError when it is malformed."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UsageError(f"{uri} is no URI: {error}", hint="use qemu:///system or qemu:///session") from error
    hypervisor, _, transport = parts.scheme.partition("+")
    if hypervisor != "qemu":
        raise Unsupported(f"only QEMU connections are supported, not {uri}", hint="use qemu:///system")
    if parts.netloc or transport not in {"", "unix"}:
        raise Unsupported(f"{uri} may reach another host", hint="run hvmgr on that host itself")
    name = parts.path.removeprefix("/")
    if name not in set(Driver):
        raise UsageError(f"{uri} names no driver of QEMU", hint="use qemu:///system or qemu:///session")
    if name != Driver.EMBED:
        return Address(uri, Driver(name))
    root = Path(parse_qs(parts.query).get("root", [""])[0])
    if not root.is_absolute() or transport:
        raise UsageError(f"{uri} needs an absolute root", hint="use qemu:///embed?root=/some/folder")
    if len(os.fspath(root)) > _LONGEST_ROOT:
        raise UsageError(f"the root {root} is too long for QEMU's sockets: at most {_LONGEST_ROOT} characters")
    return Address(uri, Driver.EMBED, root)


@contextlib.contextmanager
def opened(uri: str, *, wait_s: float) -> Iterator[Connection]:
    """A connection that is closed at the end; see ``connect``."""
    connection = connect(uri, wait_s=wait_s)
    try:
        yield connection
    finally:
        connection.close()


def connect(uri: str, *, wait_s: float) -> Connection:
    """An open connection. Waits up to ``wait_s`` for another process to let go of an embedded root, then Busy.

    HostFailed when no daemon answers, with the service to start as hint.
    """
    address = parse_uri(uri)
    deadline = time.monotonic() + wait_s
    if address.root is None:
        return Connection(address, _open_daemon(address))
    _prepare_root(address.root)
    connection = Connection(address, _open_embedded(address, deadline))
    try:
        connection.await_attached(deadline)
    except BaseException:
        connection.close()
        raise
    return connection


class Connection:
    """An open connection; usable from several threads, closed once."""

    def __init__(self, address: Address, handle: Any) -> None:
        self.uri = address.uri
        self.driver = address.driver
        self._root = address.root
        self._opened: Any = handle

    def close(self) -> None:
        """Lets go of it; fine when closed already or when the daemon is gone."""
        handle, self._opened = self._opened, None
        if handle is not None and self.driver is not Driver.EMBED:
            with contextlib.suppress(libvirt_door.library().libvirtError):
                handle.close()

    def is_alive(self) -> bool:
        """Whether it still has its daemon, which may have been restarted; the embedded driver needs none."""
        if self.driver is Driver.EMBED:
            return self._opened is not None
        with contextlib.suppress(libvirt_door.library().libvirtError):
            return self._opened is not None and bool(self._opened.isAlive())
        return False

    def follow(self) -> Follower:
        """Hears of everything that happens to domains from now on."""
        return Follower(self._handle)

    # What the host is

    def capabilities(self) -> Capabilities:
        """The host's facts; the first call on a fresh host probes every QEMU for some seconds."""
        with libvirt_door.translated("read the host's capabilities"):
            xml = self._handle.getCapabilities()
            libvirt_version, qemu_version = self._handle.getLibVersion(), self._handle.getVersion()
        return capabilities.parse_host(xml, libvirt_version=libvirt_version, qemu_version=qemu_version)

    def machine_facts(
        self, *, arch: str | None = None, accel: str | None = None, machine: str | None = None
    ) -> MachineFacts:
        """What a new VM of this kind can have; what is left out is libvirt's default for the host.

        Unsupported when the host has no such emulator, accelerator or machine type.
        """
        libvirt = libvirt_door.library()
        with libvirt_door.translated("read the capabilities of the machine type"):
            try:
                xml = self._handle.getDomainCapabilities(None, arch, machine, accel, 0)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_INVALID_ARG:
                    raise
                wanted = " ".join(word for word in (arch, accel, machine) if word)
                raise Unsupported(f"this host cannot run {wanted}: {libvirt_door.words(error)}") from None
        return capabilities.parse_machine(xml)

    def can_run_cpu(self, cpu: str, *, arch: str | None, accel: str) -> bool:
        """Whether this host offers a guest the CPU in a ``<cpu>`` element; True where libvirt cannot tell."""
        libvirt = libvirt_door.library()
        with libvirt_door.translated("compare the CPU"):
            try:
                answer = self._handle.compareHypervisorCPU(None, arch, None, accel, cpu, 0)
            except libvirt.libvirtError as error:
                if libvirt_door.is_lost(error):
                    raise
                return True
        return bool(answer != libvirt.VIR_CPU_COMPARE_INCOMPATIBLE)

    def managed_save_path(self, name: str) -> Path:
        """Where libvirt keeps the managed save of a domain of this name."""
        return self._managed_saves / f"{name}.save"

    def nvram_folder(self) -> Path:
        """Where libvirt keeps NVRAM files whose XML names no other place."""
        return self._folder("nvram", session="qemu/nvram")

    def tpm_folder(self, uuid: str) -> Path:
        """Where libvirt keeps the state of a domain's emulated TPM, unless its XML names another place."""
        if self._root is not None:
            return self._root / "lib" / "swtpm" / uuid
        if self.driver is Driver.SYSTEM:
            return Path("/var/lib/libvirt/swtpm") / uuid
        return _user_config() / "qemu" / "swtpm" / uuid

    def has_dynamic_ownership(self) -> bool:
        """Whether libvirt gives images to QEMU's user at a start: its default, unless qemu.conf says otherwise."""
        etc = Path("/etc/libvirt") if self._root is None else self._root / "etc"
        try:
            text = (etc / "qemu.conf").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return True
        return re.search(r"^\s*dynamic_ownership\s*=\s*0", text, re.MULTILINE) is None

    def active_networks(self) -> frozenset[str]:
        """The names of libvirt's networks that are up; none where the connection has no network driver."""
        libvirt = libvirt_door.library()
        with libvirt_door.translated("list the networks"):
            try:
                found = self._handle.listAllNetworks(libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                    raise
                return frozenset()
        return frozenset(network.name() for network in found)

    def lacks_network(self, name: str) -> bool:
        """Whether libvirt says that a network of this name is not there or not up; False where it cannot tell."""
        libvirt = libvirt_door.library()
        if self.driver is Driver.EMBED:  # its guests use the networks of another libvirt
            return False
        with libvirt_door.translated(f"look for the network {name}"):
            try:
                return not self._handle.networkLookupByName(name).isActive()
            except libvirt.libvirtError as error:
                if libvirt_door.is_lost(error):
                    raise
                return bool(error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK)

    def find_volume(self, pool: str, name: str) -> Volume | None:
        """A volume of a storage pool that is a file or a block device; None for others and where there is none.

        The embedded driver knows no pools.
        """
        libvirt = libvirt_door.library()
        with libvirt_door.translated(f"look for the volume {name} of the pool {pool}"):
            try:
                found = self._handle.storagePoolLookupByName(pool).storageVolLookupByName(name)
                kind, path = found.info()[0], found.path()
            except libvirt.libvirtError as error:
                absent = (libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_STORAGE_VOL, libvirt.VIR_ERR_NO_SUPPORT)
                if error.get_error_code() in absent:
                    return None
                raise
        if kind not in (libvirt.VIR_STORAGE_VOL_FILE, libvirt.VIR_STORAGE_VOL_BLOCK):
            return None
        return Volume(Path(path), is_device=kind == libvirt.VIR_STORAGE_VOL_BLOCK)

    # Its domains

    def domains(self) -> list[Domain]:
        """Every domain, running or not, persistent or not, by name."""
        with libvirt_door.translated("list the domains"):
            found = [self._domain(handle) for handle in self._handle.listAllDomains(0)]
        return sorted(found, key=lambda domain: domain.name)

    def find_domain(self, uuid: str) -> Domain | None:
        """The domain with this uuid, or None."""
        return self._find("lookupByUUIDString", uuid)

    def find_domain_by_name(self, name: str) -> Domain | None:
        """The domain of this name, or None."""
        return self._find("lookupByName", name)

    def define(self, xml: str) -> Domain:
        """Makes this XML the persistent configuration of its domain, new or known by uuid.

        UsageError with libvirt's words when the XML is wrong, Conflict when the name belongs to another domain.
        """
        with libvirt_door.translated("define the VM", changing=True):
            return self._domain(self._handle.defineXMLFlags(xml, 0))

    def restore(self, path: Path, xml: str, *, running: bool) -> None:
        """Brings a save file to life with this XML, which may differ from the saved one in paths only.

        A domain that libvirt knows keeps its own inactive configuration; an unknown one becomes transient.
        """
        libvirt = libvirt_door.library()
        flags = libvirt.VIR_DOMAIN_SAVE_RUNNING if running else libvirt.VIR_DOMAIN_SAVE_PAUSED
        with libvirt_door.translated(f"restore {path}", changing=True):
            self._handle.restoreFlags(os.fspath(path), xml, flags)

    def await_attached(self, deadline: float) -> None:
        """Waits until the embedded driver has taken up, or given up, every guest that outlived its process.

        libvirt lists the guests of its status files at once and attaches each under that guest's job lock. A query
        that needs the lock (memoryStats) therefore returns when this is over.
        """
        libvirt = libvirt_door.library()
        with libvirt_door.translated("attach the running guests again"):
            for handle in self._handle.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                _await_job_lock(handle, deadline)
        while lost := self._lost_guests():
            if time.monotonic() > deadline:
                raise HostFailed(
                    f"libvirt does not attach these running guests again: {', '.join(lost)}",
                    hint="end their QEMU processes, or look into their logs",
                )
            time.sleep(_POLL_S)

    @property
    def _handle(self) -> Any:
        if self._opened is None:
            raise HostFailed(f"the connection to {self.uri} is closed")
        return self._opened

    def _lost_guests(self) -> list[str]:
        assert self._root is not None
        folder = self._root / "run" / "qemu"
        known = {domain.name for domain in self.domains() if domain.is_active()}
        names = [path.stem for path in folder.glob("*.xml") if path.stem not in known]
        return [name for name in names if _is_guest(folder / f"{name}.pid", self._root)]

    def _find(self, method: str, key: str) -> Domain | None:
        libvirt = libvirt_door.library()
        with libvirt_door.translated(f"look for the VM {key}"):
            try:
                return self._domain(getattr(self._handle, method)(key))
            except libvirt.libvirtError as error:
                if libvirt_door.is_absent(error):
                    return None
                raise

    def _domain(self, handle: Any) -> Domain:
        return Domain(self._handle, handle.UUIDString(), handle.name(), saves=self._managed_saves)

    @property
    def _managed_saves(self) -> Path:
        return self._folder("save", session="qemu/save")

    def _folder(self, name: str, *, session: str) -> Path:
        if self._root is not None:
            return self._root / "lib" / "qemu" / name
        if self.driver is Driver.SYSTEM:
            return Path("/var/lib/libvirt/qemu") / name
        return _user_config() / session


def has_definition(uri: str, uuid: str) -> bool:
    """Whether another libvirt of this host keeps a configuration of this domain, by its files: it is not asked."""
    address = parse_uri(uri)
    if address.root is not None:
        folder = address.root / "etc" / "qemu"
    else:
        folder = Path("/etc/libvirt/qemu") if address.driver is Driver.SYSTEM else _user_config() / "qemu"
    try:
        return any(f"<uuid>{uuid}</uuid>" in file.read_text("utf-8", "replace") for file in folder.glob("*.xml"))
    except OSError:
        return True  # nobody may look: it cannot be ruled out


def _open_daemon(address: Address) -> Any:
    libvirt = libvirt_door.library()
    try:
        return libvirt.open(address.uri)
    except libvirt.libvirtError as error:
        raise HostFailed(
            f"cannot connect to {address.uri}: {libvirt_door.words(error)}",
            hint=_daemon_hint(address, error),
            libvirt_code=error.get_error_code(),
        ) from error


def _daemon_hint(address: Address, error: Any) -> str:
    if "Permission denied" in str(error) or "authentication" in str(error).lower():
        return "run it as root (sudo), or have VMs of your own with -c qemu:///session"
    if address.driver is Driver.SESSION:
        return "install libvirt's daemon, or use another connection with -c"
    modular = any((Path(folder) / "virtqemud").exists() for folder in ("/usr/sbin", "/usr/bin"))
    service = "virtqemud.socket" if modular else "libvirtd.socket"
    return f"start it with: systemctl start {service}, or use another connection with -c"


def _open_embedded(address: Address, deadline: float) -> Any:
    assert address.root is not None
    with _embedded_lock:
        if address.root in _embedded:
            return _embedded[address.root]
        if _embedded:
            raise Conflict(f"this process holds another embedded root already: {', '.join(map(str, _embedded))}")
        while True:
            _await_root(address.root, deadline)
            handle = _try_embedded(address)
            if handle is not None:
                atexit.register(_embedded.clear)  # while libvirt's module is still whole
                _embedded[address.root] = handle
                return handle


def _try_embedded(address: Address) -> Any | None:
    """An open embedded driver; None when another process was quicker to take the root."""
    libvirt = libvirt_door.library()
    try:
        return libvirt.open(address.uri)
    except libvirt.libvirtError as error:
        text = libvirt_door.words(error)
        if "acquire pid file" in text:
            return None
        raise HostFailed(f"cannot open the embedded driver: {text}") from error


def _await_root(root: Path, deadline: float) -> None:
    """Returns once no other process has the root, seen by libvirt's lock on its pid file (not by trying to open)."""
    path = root / "run" / "qemu" / "driver.pid"
    while True:
        try:
            with path.open("rb") as file:
                request = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
                answer = fcntl.fcntl(file, fcntl.F_GETLK, request)
        except FileNotFoundError:
            return
        kind, _, _, _, pid = struct.unpack(_FLOCK, answer)
        if kind == fcntl.F_UNLCK:
            return
        if time.monotonic() > deadline:
            raise Busy(f"process {pid} uses {root}", hint="wait for it to end, or wait longer with --wait", pid=pid)
        time.sleep(_POLL_S)


def _prepare_root(root: Path) -> None:
    """Makes an embedded root that works without virtlogd and that QEMU's own user can traverse."""
    try:
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        (root / "etc").mkdir(exist_ok=True)
        conf = root / "etc" / "qemu.conf"
        if not conf.exists() and not _VIRTLOGD_SOCKET.exists():
            conf.write_text(_EMBED_CONF, encoding="ascii")
    except OSError as error:
        raise UsageError(f"cannot use {root} as root of the embedded driver: {error.strerror}") from error
    if os.geteuid() == 0 and not root.stat().st_mode & 0o001:
        raise UsageError(f"QEMU's user cannot enter {root}", hint=f"chmod o+x {root}")


def _await_job_lock(handle: Any, deadline: float) -> None:
    libvirt = libvirt_door.library()
    while True:
        try:
            handle.memoryStats()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_TIMEOUT:
                return  # it ended meanwhile
            if time.monotonic() > deadline:
                raise
        else:
            return


def _is_guest(pid_file: Path, root: Path) -> bool:
    # The number in an old pid file may belong to anybody by now; a guest's command line names its root's sockets.
    try:
        pid = int(pid_file.read_text(encoding="ascii"))
        return os.fsencode(root) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False


def _user_config() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "libvirt"
