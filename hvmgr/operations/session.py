"""One command's work on one VM: its home, its domain, the storage daemon, and whom to tell.

Whoever has a session holds the lock of the home. Everything that the session starts ends with it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from hvmgr import errors
from hvmgr.host import storage_daemon
from hvmgr.host.domain import Domain, State
from hvmgr.host.hypervisor import Connection
from hvmgr.host.storage_daemon import Daemon, Node
from hvmgr.model.layout import Layout
from hvmgr.model.plan import Plan
from hvmgr.model.progress import Progress
from hvmgr.model.tree import Tree
from hvmgr.operations.occasions import Occasions
from hvmgr.operations.reporter import Reporter
from hvmgr.storage import attachments, durable, vm_home
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.host.nbd_client import Client
    from hvmgr.model.event import Occurrence
    from hvmgr.model.plan import PutFiles


class Arriving(Protocol):
    """A disk that arrives as a stream."""

    def write(
        self, client: Client, size: int, below: Sequence[tuple[int, int]], report: Callable[[Progress], None]
    ) -> None:
        """All of it into an empty child of the disk that it replaces; ``below`` is where that holds data."""
        ...


class Putting(Protocol):
    """Files that are put into a disk."""

    def write(self, session: Session, step: PutFiles, spool: Path) -> None:
        """All of them are in the step's child, and read back as what they are; Conflict, NoSpace, Corrupt otherwise.

        ``spool`` is a folder for what is needed meanwhile.
        """


@dataclass(slots=True)
class Uses:
    """Who needs which image, kept true while steps run; the last check before a file goes."""

    children: dict[str, set[str]]
    named: set[str]
    frozen: set[str]

    @classmethod
    def of(cls, tree: Tree) -> Uses:
        """The uses that a home's files tell."""
        lent = {path for path, users in tree.strangers.items() if users}
        named = set(tree.named()) | lent
        held = {path for node in tree.nodes.values() for path in node.disks.values()} | lent
        return cls({path: set(below) for path, below in tree.children().items()}, named, held)

    def is_used(self, path: str) -> bool:
        """Whether anything still needs the image."""
        return path in self.named or bool(self.children.get(path))

    def is_frozen(self, path: str) -> bool:
        """Whether a snapshot or a child needs it unchanged."""
        return path in self.frozen or bool(self.children.get(path))

    def moved(self, child: str, *, parent: str, below: str | None) -> None:
        """``child`` no longer stands on ``parent`` but on ``below``."""
        self.children.get(parent, set()).discard(child)
        if below is not None:
            self.children.setdefault(below, set()).add(child)

    def removed(self, path: str) -> None:
        """The image is gone."""
        for below in self.children.values():
            below.discard(path)


class Session:
    """What the steps of a plan work with."""

    def __init__(
        self,
        home: VmHome,
        connection: Connection,
        reporter: Reporter,
        *,
        wait_s: float,
        stop: Callable[[], bool] | None = None,
        occasions: Occasions | None = None,
    ) -> None:
        self.home = home
        self.connection = connection
        self.wait_s = wait_s
        self.recovering = False
        self.finishing = False
        self.known_xml: str | None = None  # libvirt's configuration as the plans of this session know it
        self.doubt: errors.HvmgrError | None = None  # what others did to the present that nobody can explain
        self.waiting: set[str] = set()  # images whose merge has to wait: nothing may remove them
        self.arriving: Arriving | None = None  # the stream of a disk that is imported
        self.putting: Putting | None = None  # the files that are put into a disk
        self.put_off: errors.HvmgrError | None = None  # why a merge was put off, said when all else is done
        self.denied: errors.HvmgrError | None = None  # QEMU may not write below the image that its guest writes
        self.unwoken: errors.HvmgrError | None = None  # the guest's file systems may still be at rest
        self.bandwidth = 0  # what merges of a running VM may take, in bytes a second; 0 is no limit
        self.patient = True  # whether it waits for what a dead command left QEMU to do
        self.occasions = occasions or Occasions(home.path.parent, reporter)  # whom what becomes of operations is told
        self.left_images: Occurrence | None = None  # the last operation that may have left some to merge
        self._reporter = reporter
        self._stack = contextlib.ExitStack()
        self._daemon: Daemon | None = None
        self._held: list[Node] = []
        self._uses: Uses | None = None
        self._interrupts = Interrupts(stop)
        self._owner: tuple[int, int] | None = None
        self._knows_owner = False

    @property
    def layout(self) -> Layout:
        """The home's folders and files."""
        return self.home.layout

    @property
    def owner(self) -> tuple[int, int] | None:
        """Whom images have to belong to, so that this host's QEMU may use them."""
        if not self._knows_owner:
            self._owner, self._knows_owner = self.connection.capabilities().qemu_owner, True
        return self._owner

    def is_read_by_mode(self, path: Path) -> bool:
        """Whether QEMU's user gets at an image by its mode alone: it is another's, and libvirt gives nothing away."""
        if self.owner is None or self.owner[0] == 0 or not path.is_file():
            return False
        return path.stat().st_uid != self.owner[0] and not self.connection.has_dynamic_ownership()

    @property
    def dry_run(self) -> bool:
        """Whether nothing at all is to be changed."""
        return self._reporter.dry_run

    @property
    def interrupts(self) -> Interrupts:
        """Ctrl-C, held back while it would leave something half-done."""
        return self._interrupts

    @staticmethod
    def new_id() -> str:
        """An id that nothing else has."""
        return str(uuid.uuid4())

    @staticmethod
    def now() -> datetime:
        """This moment, UTC."""
        return datetime.now(UTC)

    def say(self, sentence: str) -> None:
        """Tell people something that they would want to know."""
        self._reporter.notice(sentence)

    def progress(self, progress: Progress) -> None:
        """Tell how far long work is; the place where Ctrl-C stops it."""
        self._reporter.progress(progress)
        self._interrupts.check()

    def require_approval(self, plan: Plan) -> None:
        """Raises Declined when the caller does not want this plan; nothing was changed then."""
        if not self._reporter.approve(plan):
            raise errors.Declined(f"{plan.subject}: not done")

    def require_consent(self, operation: str, subject: str) -> None:
        """The same for an act of one step, which needs no journal."""
        self.require_approval(Plan(self.new_id(), self.home.vm_id, operation, subject))

    # -- the domain ----------------------------------------------------------------------------------------------

    def find_domain(self) -> Domain | None:
        """libvirt's domain of this VM."""
        return self.connection.find_domain(self.home.vm_id)

    def domain(self) -> Domain:
        """libvirt's domain of this VM; NotFound when libvirt does not know it."""
        domain = self.find_domain()
        if domain is None:
            raise errors.NotFound(
                f"libvirt ({self.connection.uri}) does not know the VM in {self.home.path}",
                hint="name the VM's own connection with -c",
            )
        return domain

    def is_active(self) -> bool:
        """Whether a QEMU runs this VM."""
        domain = self.find_domain()
        return domain is not None and domain.is_active()

    def state(self) -> State:
        """What the VM does at present."""
        return self.domain().state()

    # -- images --------------------------------------------------------------------------------------------------

    @property
    def daemon(self) -> Daemon:
        """The storage daemon, started when it is first needed."""
        if self._daemon is None:
            self._daemon = self._stack.enter_context(storage_daemon.started(on_progress=self.progress))
            self._stack.callback(durable.remove, self._daemon_note)
            with durable.explained(self._daemon_note):
                self._daemon_note.write_text(self._daemon.note)
        return self._daemon

    def end_left_over_daemon(self) -> None:
        """A storage daemon of a command that was killed is gone."""
        if self._daemon_note.exists():
            storage_daemon.end_left_over(self._daemon_note.read_text())
            durable.remove(self._daemon_note)

    def hold(self, path: str, fmt: str) -> None:
        """Keep QEMU's own lock on an image, so that nobody starts a VM that writes to it.

        Its parents stay closed: they are frozen, and opening a chain of 64 takes 30 ms.
        """
        try:
            self._held.append(self.daemon.open(Path(path), fmt, writable=True, detached_backing=True))
        except errors.Conflict:
            attachments.require_free([path])  # which says what to do, where it is one of ours
            raise

    def is_held(self, path: str) -> bool:
        """Whether the lock on an image is ours."""
        return any(str(node.path) == path for node in self._held)

    def hold_whole(self, path: str) -> Node:
        """A held image, now with the parents that its header names, for one who reads it."""
        old = next(node for node in self._held if str(node.path) == path)
        self._held.remove(old)
        self.daemon.close(old)
        node = self.daemon.open(Path(path), old.fmt, writable=True)  # who was quicker has the lock, and this fails
        self._held.append(node)
        return node

    @contextlib.contextmanager
    def lent(self, path: str) -> Iterator[None]:
        """A held image is let go for a program that locks it by itself, and is held again when that has ended well.

        Whoever starts the VM in between has the lock then: one of the two fails, and nothing is written twice.
        """
        old = next((node for node in self._held if str(node.path) == path), None)
        if old is not None:
            self._held.remove(old)
            self.daemon.close(old)
        yield
        if old is not None:
            self.hold(path, old.fmt)

    def release(self) -> None:
        """Let go of all held images."""
        for node in reversed(self._held):
            self.daemon.close(node)
        self._held.clear()

    @property
    def uses(self) -> Uses:
        """Who needs which image, as the files say now."""
        if self._uses is None:
            is_home = self.layout.configuration.exists()  # not at the end of a deletion that is completed
            self._uses = Uses.of(self.home.tree()) if is_home else Uses({}, set(), set())
        return self._uses

    def forget_uses(self) -> None:
        """The files have changed."""
        self._uses = None

    def busy_images(self) -> set[str]:
        """The images that the running VM has open: its working images and everything below them."""
        domain = self.find_domain()
        if domain is None or not domain.is_active():
            return set()
        return open_images(self.home, domain)

    def close(self) -> None:
        """End everything that the session started."""
        self._held.clear()
        self._stack.close()
        self._interrupts.close()

    @property
    def _daemon_note(self) -> Path:
        return self.layout.private / "daemon"


def open_images(home: VmHome, domain: Domain) -> set[str]:
    """The images that a running domain has open, by libvirt's view and by QEMU's own."""
    from hvmgr.model import configuration

    live = configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}")
    formats = {
        vm_home.canonical(disk.source): disk.format or "raw"
        for disk in live.disks()
        if disk.source is not None and disk.type in {"file", "block"}
    }
    working = {str(path): "qcow2" for path in domain.writable_files() if path.parent == home.layout.images}
    return set(home.load_images({**working, **formats}))


class Interrupts:
    """SIGINT and SIGTERM as a wish: ``check`` raises it where stopping leaves nothing half-done.

    So does, once, whatever ``asked`` says; ``gave_way`` then.
    """

    def __init__(self, asked: Callable[[], bool] | None = None) -> None:
        self._wanted = False
        self._asked = asked
        self.gave_way = False
        self._old: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        self._held_back = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._wanted = True

    def check(self) -> None:
        """Raises Cancelled when the user wants to stop and may."""
        if self.wanted and not self._held_back:
            raise errors.Cancelled("stopped; nothing was changed")

    @property
    def wanted(self) -> bool:
        """Whether the user wants to stop, or somebody else asks for that."""
        if not self.gave_way and self._asked is not None and self._asked():
            self._wanted = self.gave_way = True
        return self._wanted

    def clear(self) -> None:
        """The wish was followed."""
        self._wanted = False

    @contextlib.contextmanager
    def held_back(self, *, back: bool = True) -> Iterator[None]:
        """Nothing stops what happens here."""
        before, self._held_back = self._held_back, back
        try:
            yield
        finally:
            self._held_back = before

    def let_through(self) -> contextlib.AbstractContextManager[None]:
        """What happens here can be stopped, although what is around it cannot."""
        return self.held_back(back=False)

    def close(self) -> None:
        """The signals mean again what they meant before."""
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]
        self._old.clear()
