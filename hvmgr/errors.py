"""What can go wrong, by what the caller does next.

    HvmgrError
    ├── UsageError        2    correct the request
    ├── NotFound          3    no such VM, snapshot, disk, file
    ├── Conflict          4    exists already, wrong state, other users of an image
    │   ├── Busy          4    another command holds the lock: wait and run again
    │   └── Vetoed        4    a hook of the administrator's refused it; nothing was changed
    ├── Unsupported       5    this format, host or version cannot do it
    ├── Corrupt           6    an image, a home or an export is damaged; nothing was written
    ├── NoSpace           7    free space and run again
    ├── HostFailed        8    libvirt, QEMU or a program said no; its words are in the message
    ├── OutcomeUnknown    9    contact was lost; the journal holds what is open
    └── Cancelled       130    stopped by the user; nothing half-done is left
        └── Declined    130    the caller looked at the plan and did not want it

The number is the exit code of the command line. A defect in hvmgr is none of these: it passes
through as the Python exception that it is and ends with code 1.
"""

from __future__ import annotations


class HvmgrError(Exception):
    """A failure that hvmgr foresaw: one sentence, an optional next step, and facts for machines."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts

    def __str__(self) -> str:
        return self.message

    @property
    def code(self) -> str:
        """The class name: the stable word for machines."""
        return type(self).__name__


class UsageError(HvmgrError):
    """The request itself is wrong; the same request can never succeed."""

    exit_code = 2


class NotFound(HvmgrError):
    """The named VM, snapshot, disk or file is not there."""

    exit_code = 3


class Conflict(HvmgrError):
    """The request is fine but the present state forbids it: exists already, wrong state, in use."""

    exit_code = 4


class Busy(Conflict):
    """Another command works on the same VM; waiting helps."""


class Vetoed(Conflict):
    """A hook of the administrator's refused the operation, or could not be asked; nothing was changed."""


class Unsupported(HvmgrError):
    """This format, host or version cannot do it."""

    exit_code = 5


class Corrupt(HvmgrError):
    """An image, a home or an export is damaged; nothing was written."""

    exit_code = 6


class NoSpace(HvmgrError):
    """There is not enough space on a file system."""

    exit_code = 7


class HostFailed(HvmgrError):
    """libvirt, QEMU or another program refused; the message carries its words."""

    exit_code = 8


class OutcomeUnknown(HvmgrError):
    """Contact was lost in the middle; the journal holds what is open and the next command asks."""

    exit_code = 9


class Cancelled(HvmgrError):
    """The user stopped it; nothing half-done is left."""

    exit_code = 130


class Declined(Cancelled):
    """The caller looked at the plan and did not want it; nothing was changed."""
