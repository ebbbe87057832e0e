"""The only importer of libvirt: loads it once, quietly, with its event loop, and turns its errors into hvmgr's.

libvirt is loaded at the first call, so that importing this module costs nothing. Nothing of it is printed: errors
come back as exceptions, and the library's own log goes nowhere unless ``LIBVIRT_LOG_OUTPUTS`` names a place.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import TYPE_CHECKING, Any

from hvmgr.errors import (
    Busy,
    Conflict,
    HostFailed,
    HvmgrError,
    NoSpace,
    NotFound,
    OutcomeUnknown,
    Unsupported,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@functools.cache
def library() -> Any:
    """The libvirt module, with silent errors and a running event loop (the embedded driver needs one)."""
    # libvirt reads its log settings while it is imported. Its default is stderr, and the processes that it forks use
    # stderr whatever the outputs are, so that only the priority (4: errors) keeps their warnings away.
    with _environment_defaults(LIBVIRT_LOG_OUTPUTS="4:file:/dev/null", LIBVIRT_DEBUG="4"):
        import libvirt
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, args=(libvirt,), name="libvirt-events", daemon=True).start()
    return libvirt


def version() -> tuple[int, int]:
    """The version of this host's libvirt library."""
    number = int(library().getVersion())
    return number // 1_000_000, number // 1000 % 1000


def can_pass_files() -> bool:
    """Whether descriptors can be passed to a monitor (libvirt-python 8.2)."""
    library()
    import libvirt_qemu

    return hasattr(libvirt_qemu, "qemuMonitorCommandWithFiles")


def monitor_command(handle: Any, command: str, files: list[int] | None = None) -> str:
    """The answer of a running domain's QMP monitor to a JSON command, optionally with descriptors passed along."""
    library()
    import libvirt_qemu

    if files is None:
        return str(libvirt_qemu.qemuMonitorCommand(handle, command, 0))
    if not hasattr(libvirt_qemu, "qemuMonitorCommandWithFiles"):
        raise Unsupported("libvirt's Python binding cannot pass files to a monitor (needs 8.2)")
    answer = libvirt_qemu.qemuMonitorCommandWithFiles(handle, command, files, 0)
    return str(answer[0] if isinstance(answer, tuple | list) else answer)


def agent_command(handle: Any, command: str, timeout_s: int) -> str:
    """The answer of the agent inside a running domain's guest to a JSON command, within this limit."""
    library()
    import libvirt_qemu

    return str(libvirt_qemu.qemuAgentCommand(handle, command, timeout_s, 0))


@contextlib.contextmanager
def translated(doing: str, *, changing: bool = False) -> Iterator[None]:
    """Turns a libvirtError inside into hvmgr's error: "cannot ``doing``: " and libvirt's words.

    ``changing`` says that the call alters the host, so that losing contact means not knowing: OutcomeUnknown.
    """
    libvirt = library()
    try:
        yield
    except libvirt.libvirtError as error:
        # The traceback's frames hold libvirt objects, and each of them keeps the connection open.
        error.__traceback__ = None
        raise _to_hvmgr(error, doing, changing=changing) from error


def is_absent(error: Any) -> bool:
    """Whether a libvirtError says that there is no such domain."""
    return bool(error.get_error_code() == library().VIR_ERR_NO_DOMAIN)


def is_lost(error: Any) -> bool:
    """Whether a libvirtError says that the daemon is out of reach (as against: it answered no)."""
    libvirt = library()
    if error.get_error_code() == libvirt.VIR_ERR_INVALID_CONN:
        return True
    ends = {libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_INTERNAL_ERROR}
    return error.get_error_domain() == libvirt.VIR_FROM_RPC and error.get_error_code() in ends


def words(error: Any) -> str:
    """The sentence that libvirt itself says."""
    return str(error.get_error_message() or error)


def _to_hvmgr(error: Any, doing: str, *, changing: bool) -> HvmgrError:
    code, text = error.get_error_code(), words(error)
    message = f"cannot {doing}: {text}"
    if is_lost(error):
        if changing:
            return OutcomeUnknown(f"lost contact with libvirt during: {doing}: {text}", libvirt_code=code)
        return HostFailed(message, libvirt_code=code, lost=True)
    if "No space left on device" in text:
        return NoSpace(message, libvirt_code=code)
    if "already exists with uuid" in text or "is already defined with uuid" in text:
        return Conflict(message, libvirt_code=code)
    return _classes().get(code, HostFailed)(message, libvirt_code=code)


@functools.cache
def _classes() -> dict[int, type[HvmgrError]]:
    libvirt = library()
    classes: dict[type[HvmgrError], tuple[str, ...]] = {
        NotFound: ("NO_DOMAIN", "NO_DOMAIN_SNAPSHOT", "NO_DOMAIN_CHECKPOINT"),
        Busy: ("OPERATION_TIMEOUT", "RESOURCE_BUSY"),
        Conflict: ("OPERATION_INVALID", "DOM_EXIST", "BLOCK_COPY_ACTIVE", "SNAPSHOT_REVERT_RISKY"),
        Unsupported: ("CONFIG_UNSUPPORTED", "OPERATION_UNSUPPORTED", "ARGUMENT_UNSUPPORTED", "NO_SUPPORT"),
        UsageError: ("XML_ERROR", "XML_DETAIL", "XML_INVALID_SCHEMA", "INVALID_ARG", "NO_NAME", "OS_TYPE"),
    }
    return {getattr(libvirt, f"VIR_ERR_{name}"): cls for cls, names in classes.items() for name in names}


def _run_events(libvirt: Any) -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


@contextlib.contextmanager
def _environment_defaults(**values: str) -> Iterator[None]:
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
