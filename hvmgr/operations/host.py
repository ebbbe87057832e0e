"""The public API: a host and its VMs. The command line is built on it.

    with hvmgr.Host.open("qemu:///system") as host:
        vm = host.vm("web")
        before = vm.create_snapshot("before the update")
        ...
        before.apply()

Reading comes from the homes and needs neither libvirt nor a lock; what a dead command left open is completed or undone
by the next call that touches the VM. Values are as of the call that gave them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hvmgr import errors, settings
from hvmgr.model import names
from hvmgr.model.layout import Layout
from hvmgr.operations import homes
from hvmgr.operations.reporter import Reporter
from hvmgr.operations.vm import VM
from hvmgr.storage import journal, reserve, vm_home
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from datetime import datetime

    from hvmgr.host.hypervisor import Connection
    from hvmgr.model.boot_windows import Kind as BootKind
    from hvmgr.model.finding import Finding
    from hvmgr.model.import_options import ImportOptions
    from hvmgr.model.specification import Specification
    from hvmgr.operations.adopt.adoption import AdoptOptions
    from hvmgr.operations.attaching import Shown
    from hvmgr.operations.boot.entries import BootMenu
    from hvmgr.operations.doctor.repair import Repaired
    from hvmgr.operations.exchange.import_plan import ImportPlan
    from hvmgr.operations.images import cataloguing as catalogs
    from hvmgr.operations.images.image_files import Images
    from hvmgr.operations.images.wims import Wims
    from hvmgr.operations.mounting import Mounted, Wanted
    from hvmgr.operations.occasions import Occasions
    from hvmgr.operations.session import Session
    from hvmgr.operations.standstill import Outcome
    from hvmgr.operations.transfer.vdis import Disks
    from hvmgr.operations.watching import Happening
    from hvmgr.storage.attachments import Attachment

# What changes a VM is imported by the methods that do it: those who only read homes start in half the time.


class Host:
    """One libvirt connection and one root of homes. Opened lazily: reading homes needs no libvirt."""

    def __init__(
        self, uri: str, root: Path, *, wait_s: float = settings.LOCK_WAIT_S, reporter: Reporter | None = None
    ) -> None:
        self.uri = uri
        self.root = Path(os.path.realpath(root))
        self.wait_s = wait_s
        self.reporter = reporter or Reporter()
        self._occasions: Occasions | None = None
        self._connection: Connection | None = None
        self._has_looked_into_archives = False

    @classmethod
    def open(
        cls,
        uri: str | None = None,
        *,
        root: Path | str | None = None,
        wait_s: float = settings.LOCK_WAIT_S,
        reporter: Reporter | None = None,
    ) -> Host:
        """The host behind a libvirt URI; without one the environment's, the system's or the session's (design order).

        ``root`` holds the homes; ``wait_s`` is how long a call waits for another command on the same VM, in seconds.
        """
        return cls(
            uri or settings.default_uri(), Path(root or settings.default_root()), wait_s=wait_s, reporter=reporter
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of libvirt, and of what archives showed."""
        if self._has_looked_into_archives:
            from hvmgr.storage import archives

            archives.release()
            self._has_looked_into_archives = False
        self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def occasions(self) -> Occasions:
        """Whom what becomes of operations is told: hooks and the log of events."""
        from hvmgr.operations.occasions import Occasions

        if self._occasions is None:
            self._occasions = Occasions(self.root, self.reporter)
        return self._occasions

    @property
    def connection(self) -> Connection:
        """libvirt, connected when it is first needed, and again when its daemon was restarted."""
        from hvmgr.host import hypervisor

        if self._connection is not None and not self._connection.is_alive():
            self._disconnect()
        if self._connection is None:
            self._connection = hypervisor.connect(self.uri, wait_s=self.wait_s)
        return self._connection

    def vms(self) -> list[VM]:
        """Every VM that has its home here, by name; a home that cannot be read is told to the reporter and left out."""
        homes.complete_unfinished(self)
        return [VM(self, home) for _, home in sorted(homes.named(self), key=lambda one: one[0])]

    def vm(self, name: str) -> VM:
        """The VM with this name or id; NotFound offers near names."""
        with contextlib.suppress(errors.NotFound, OSError):
            home = vm_home.open_home(self.root / name)
            if home.name == name and not journal.is_open(home.layout.journal):
                return VM(self, home)
        homes.complete_unfinished(self)
        known = dict(homes.named(self))
        by_id = {home.vm_id: home for home in known.values()}
        home_found = known.get(name) or by_id.get(name)
        if home_found is None:
            raise names.not_found(
                "VM",
                name,
                known,
                where=f"in {self.root}",
                others="hvmgr vm list shows all, hvmgr vm adopt takes one of libvirt's",
                none="no VM is there: hvmgr vm create makes one, hvmgr vm adopt takes one of libvirt's, --root names another place",
            )
        return VM(self, home_found)

    def create_vm(self, spec: Specification) -> VM:
        """A new VM, off, in its own home below the root (or where the specification says)."""
        from hvmgr.operations import creation, occasions
        from hvmgr.operations.session import Session
        from hvmgr.operations.steps import execution

        path = Path(os.path.realpath(spec.home or self.root / spec.name))
        home = VmHome(Layout(home=path, vm_id=spec.uuid or Session.new_id()))
        homes.require_free(self, path)
        with self.occasions.gathered(), homes.sharing(self, _in_place(spec)), homes.new(self, home) as session:
            plan = creation.plan_create(session, spec)
            with occasions.operation(session, plan, name=spec.name):
                execution.run(session, plan)
        return VM(self, home)

    @property
    def disks(self) -> Disks:
        """Every disk that can be sent and received: of VMs, of snapshots, and free ones."""
        from hvmgr.operations.transfer.vdis import Disks

        return Disks(self)

    @property
    def images(self) -> Images:
        """Image files, each named by its path."""
        from hvmgr.operations.images.image_files import Images

        return Images(self)

    @property
    def wims(self) -> Wims:
        """WIM files, and what is applied to volumes in image files."""
        from hvmgr.operations.images.wims import Wims

        return Wims(self)

    def catalog(self, folder: Path | str) -> catalogs.Images:
        """The catalog of images in a folder, which need not be there yet."""
        from hvmgr.operations.images import cataloguing

        return cataloguing.Images(self, Path(folder))

    def boot_menu(self, folder: Path | str = "/boot") -> BootMenu:
        """The boot menu of a machine, by the folder that holds its GRUB: VHDs that it boots from."""
        from hvmgr.operations.boot.entries import BootMenu

        return BootMenu(self, folder)

    def windows_boot_script(
        self, path: Path | str, title: str | None = None, *, kind: BootKind | None = None, drive: str = "C:",
        volume: Path | None = None, write_to: Path | None = None,
    ) -> str:  # fmt: skip
        """The batch file that adds a VHD with Windows to Windows' own boot menu; also as the new file ``write_to``.

        ``volume`` is the folder that is the root of the VHD's volume, where it is not the one that it lies on now.
        """
        from hvmgr.operations.boot import windows

        return windows.script(Path(path), title, kind=kind, drive=drive, volume=volume, write_to=write_to)

    def plan_import(self, source: Path | str, options: ImportOptions | None = None) -> ImportPlan:
        """An import of an export, a home or a domain's XML, to look at and change before it happens."""
        from hvmgr.model.import_options import ImportOptions
        from hvmgr.operations.exchange import import_plan

        self._look_into(Path(source))
        return import_plan.prepare(self, Path(source), options or ImportOptions())

    def import_vm(self, source: Path | str, options: ImportOptions | None = None) -> VM:
        """A VM out of an export, a home or a domain's XML; raises what stands in its way, and has then done nothing."""
        from hvmgr.model.import_options import ImportOptions
        from hvmgr.operations.exchange import importing

        self._look_into(Path(source))
        return importing.run(self, Path(source), options or ImportOptions())

    def doctor(self, vm: str | None = None, *, thorough: bool = False) -> list[Finding]:
        """What is wrong with this host and its homes, or with one VM (name, id, or path of its home); worst first.

        Nothing is changed. ``thorough`` has ``qemu-img check`` read every image, which takes time.
        """
        from hvmgr.operations.doctor import examination

        return examination.examine(self, vm, thorough=thorough)

    def repair(
        self,
        vm: str | None = None,
        *,
        accept_touched: bool = False,
        accept_present: bool = False,
        thorough: bool = False,
        change_host: Callable[[str], bool] | None = None,
    ) -> list[Repaired]:
        """Puts right what doctor finds, as far as that is safe; what was done, in order. Nothing is ever deleted.

        ``accept_touched``: frozen images whose time alone differs are taken as they are, after a check.
        ``accept_present``: so are working images that no longer stand on what their snapshot froze. ``change_host`` is
        asked, with a sentence, before a setting of the host is changed; without it none is. With the reporter's
        ``dry_run`` nothing is done, and what is returned would be done first.
        """
        from hvmgr.operations.doctor import repair

        wish = repair.Wish(accept_touched, accept_present, thorough, change_host or repair.never)
        return repair.repair(self, vm, wish)

    def watch(self, *names: str, since: datetime | None = None) -> Iterator[Happening | None]:
        """What happens from now on to these VMs, or to all; for ever. None comes now and then while nothing happens.

        ``since``: hvmgr's own events since then come first. NotFound for a name that nobody knows.
        """
        from hvmgr.operations import watching

        return watching.watch(self, [watching.find(self, name) for name in names], since)

    def adoptable(self) -> list[str]:
        """The names of libvirt's VMs that hvmgr does not manage, whether or not something is in the way of adopting."""
        from hvmgr.operations.adopt import adoption_checks

        homes.complete_unfinished(self)
        return [one.name for one in adoption_checks.unmanaged(self.connection.domains(), self.root)]

    def internal_snapshots(self, name: str) -> list[str]:
        """The names of the snapshots inside the images of a VM of libvirt's: what adopting it would convert or drop."""
        from hvmgr.operations.adopt import adoption, internal_snapshots

        domain = adoption.find(self.connection, name)
        return internal_snapshots.names(domain, VmHome(Layout(home=self.root / domain.uuid, vm_id=domain.uuid)))

    def adopt(self, name: str, options: AdoptOptions | None = None) -> VM:
        """A VM of libvirt's, by name or id, gets a home; its disks stay, its external snapshots come along."""
        from hvmgr.operations import occasions
        from hvmgr.operations.adopt import adoption
        from hvmgr.operations.steps import execution

        options = options or adoption.AdoptOptions()
        homes.complete_unfinished(self)
        domain = adoption.find(self.connection, name)
        path = Path(os.path.realpath(options.home or self.root / adoption.folder_name(domain)))
        if path.is_dir():
            homes.complete(self, path)  # what a killed adoption left, wherever its home is
        adoption.require_adoptable(domain, self.root)
        home = VmHome(Layout(home=path, vm_id=domain.uuid))
        homes.require_free(self, path, hint=f"give it another folder: hvmgr vm adopt '{domain.name}' --home FOLDER")
        with homes.new(self, home) as session, homes.sharing(self, adoption.image_paths(session, domain, options)):
            plan = adoption.plan_adopt(session, domain, options)
            with occasions.operation(session, plan, name=domain.name):
                execution.run(session, plan)
        return VM(self, home)

    def freeze(
        self, vms: Sequence[VM], argv: Sequence[str], *, limit_s: float | None = None, stdout: int | None = None
    ) -> Outcome:
        """A command of the host's has run while the guests of these VMs stood still; they run again, whatever happened.

        HostFailed with the fact ``exit_code`` when it failed or took longer than ``limit_s`` seconds. It writes to our stdout,
        or to the descriptor ``stdout``.
        """
        from hvmgr.operations import standstill

        limit = standstill.LIMIT_S if limit_s is None else limit_s
        return standstill.run(self, vms, argv, limit_s=limit, stdout=stdout)

    def attach_image(self, path: Path | str, *, read_only: bool = False, format: str | None = None) -> Shown:
        """The disk in an image file is a block device until ``detach_image``; its attachment, with device and partitions.

        What others need unchanged is attached read-only. ``format`` is vhd, vhdx, qcow2 or raw; without one what VMs and
        children state counts, and then the content. Conflict when a running VM works on it, or it is attached already.
        """
        from hvmgr.operations import attaching
        from hvmgr.operations.images import changes, recognition
        from hvmgr.storage import attachments

        real = Path(os.path.realpath(path))
        attaching.require_image(real)
        changes.complete(self, recognition.known_chain(real))
        with attachments.locked(wait_s=self.wait_s), homes.held(self, [real]):
            changes.require_settled(recognition.known_chain(real))
            return attaching.attach(self, real, read_only=read_only, fmt=format)

    def detach_image(self, device: Path | str) -> Attachment:
        """What was attached, named by its device or its image, is not any more, and all that was written is in the image.

        Conflict while it is mounted or open.
        """
        from hvmgr.operations import attaching
        from hvmgr.storage import attachments

        with attachments.locked(wait_s=self.wait_s):
            return attaching.detach(self, str(device))

    def attachments(self) -> list[Shown]:
        """What is attached on this host, and what is left over of that; nothing is cleaned up."""
        from hvmgr.operations import attaching
        from hvmgr.storage import attachments

        return [attaching.shown(one) for one in attachments.all_records() if one.mount is None]

    def mount(self, directory: Path | str, wanted: Wanted) -> Mounted:
        """The file system on a disk of a VM, a snapshot, an export or an image is in an empty directory, until ``unmount``.

        To be read only, unless ``wanted`` says otherwise; its images are not written in any case.
        """
        from hvmgr.operations import mounting
        from hvmgr.operations.images import changes
        from hvmgr.storage import attachments

        mounting.require()
        real = mounting.require_directory(Path(directory))
        chosen, place = mounting.choose(self, wanted, real)
        paths = [link.path for link in chosen.images]
        with attachments.locked(wait_s=self.wait_s), homes.held(self, paths):
            changes.require_settled(paths)
            mounting.require_directory(real)
            if not self.reporter.dry_run:
                mounting.forget_kept()
            return mounting.mount(self, chosen, real, place)

    def unmount(self, directory: Path | str, *, keep: Path | str | None = None) -> Attachment:
        """What ``mount`` put up is gone. What was written goes with it, or is the image ``keep``, a child of what was mounted."""
        from hvmgr.operations import mounting
        from hvmgr.storage import attachments

        with attachments.locked(wait_s=self.wait_s):
            if not self.reporter.dry_run:
                mounting.forget_kept()
            return mounting.unmount(self, Path(directory), None if keep is None else Path(keep))

    def mounts(self) -> list[Mounted]:
        """What ``mount`` has put up on this host, and what is left over of that; nothing is cleaned up."""
        from hvmgr.operations import mounting

        return mounting.listed()

    def verify(self, folder: Path | str) -> list[Finding]:
        """What is wrong with an export or its archive, the worst first; nothing when it is whole. It needs no libvirt."""
        from hvmgr.operations.exchange import verification

        self._has_looked_into_archives = True
        return verification.verify(Path(folder), on_progress=self.reporter.progress)

    def _look_into(self, source: Path) -> None:
        """An archive is read once, from one end to the other, and that takes its time."""
        from hvmgr.model.progress import Progress
        from hvmgr.storage import archives

        self._has_looked_into_archives = True
        archives.find(
            source, report=lambda done, total: self.reporter.progress(Progress(done, total, f"look into {source.name}"))
        )

    @contextlib.contextmanager
    def session(self, home: VmHome, *, stop: Callable[[], bool] | None = None) -> Iterator[Session]:
        """Exclusive work on one home, with libvirt; it stops as if by Ctrl-C when ``stop`` says so."""
        from hvmgr.operations import occasions, roles, user_hooks
        from hvmgr.operations.session import Session

        roles.require_role(self.connection)
        user_hooks.require_not_inside(home.vm_id, home.path.name)
        with self.occasions.gathered(), home.locked(wait_s=self.wait_s):
            session = Session(
                home, self.connection, self.reporter, wait_s=self.wait_s, stop=stop, occasions=self.occasions
            )
            try:
                yield session
            finally:
                with contextlib.closing(session):
                    occasions.tell_waiting(session)
                if not self.reporter.dry_run:
                    reserve.keep(home.layout)


def _in_place(spec: Specification) -> list[Path]:
    """The images that a new VM works on, or stands on, where they are."""
    return [Path(os.path.realpath(disk.path)) for disk in spec.disks if disk.in_place and disk.path is not None]
