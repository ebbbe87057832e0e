"""The public API of boot entries: ``Host.boot_menu(folder)``. The commands ``boot …`` are built on it.

    menu = host.boot_menu("/boot")
    entry = menu.add("/VHD/os.vhd", hvmgr.BootOptions(title="Blue"))
    menu.choose(entry.title, once=True)
    menu.revert(entry.title)

What an entry needs lies in a folder beside its VHD (``os.vhd.boot``), and is written before the menu, which is replaced as a whole:
a failure leaves it as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.model import boot_entry, boot_menu, boot_plan
from hvmgr.model.boot_entry import BootEntry
from hvmgr.model.boot_options import BootOptions
from hvmgr.operations.boot import layers, making, requirements
from hvmgr.operations.images import changes
from hvmgr.storage import boot_menu as files
from hvmgr.storage import durable, index

if TYPE_CHECKING:
    from hvmgr.operations.boot.machine import Told
    from hvmgr.operations.host import Host

AnyPath = Path | str
_NO_ONCE = {"btrfs", "zfs", "ntfs", "ntfs3", "fuseblk", "f2fs"}  # GRUB cannot write its environment there


@dataclass(frozen=True, slots=True)
class Shown:
    """An entry and how it stands: ``problem`` says why it would not boot, ``written`` what its layer holds in bytes."""

    entry: BootEntry
    default: bool
    written: int | None
    problem: str | None


class BootMenu:
    """The entries of one machine's menu, by the folder with its GRUB."""

    def __init__(self, host: Host, boot: AnyPath) -> None:
        self._host = host
        self.files = files.find(Path(boot))

    def entries(self) -> tuple[BootEntry, ...]:
        """Those of hvmgr's, in the order of the menu."""
        return boot_menu.entries(self.files.text())

    def entry(self, name: str) -> BootEntry:
        """One by its title, id, or VHD."""
        return boot_entry.named(self.entries(), self._as_known(name))

    def shown(self) -> list[Shown]:
        """All of them, and whether they would boot."""
        chosen = boot_menu.chosen(self.files.text())
        return [Shown(one, one.id == chosen, *layers.standing(one)) for one in self.entries()]

    def add(self, path: AnyPath, wish: BootOptions | None = None) -> BootEntry:
        """A new entry for the VHD, or its old one made anew (``wish.replace``).

        Refused with a sentence for each thing that native boot needs and that is not so; then nothing was written.
        """
        real, asked = Path(os.path.realpath(path)), wish or BootOptions()
        if not real.exists():
            raise errors.NotFound(f"there is no {path}", path=str(path))
        with layers.alone(self._host, real):
            return self._add(real, asked)

    def _add(self, real: Path, asked: BootOptions) -> BootEntry:
        old = next((one for one in self.entries() if one.image == str(real)), None)
        if old is None:
            layers.require_none_aside(real)
        else:
            layers.require_settled(old)
        if old is not None and not asked.replace:
            raise errors.Conflict(
                f"the boot menu has an entry for {real}: '{old.title}'", hint="make it anew with --replace"
            )
        title = asked.title or (old.title if old is not None else real.name)
        if not title.strip() or any(ord(one) < 32 for one in title):
            raise errors.UsageError(f"'{title!r}' can be no title: it has to be one line of text")
        if any(one.title == title and one.image != str(real) for one in self.entries()):
            raise errors.Conflict(f"the boot menu has an entry '{title}'", hint="give another one with --name")
        return self._make(real, dataclasses.replace(asked, title=title), old)

    def remove(self, name: str) -> BootEntry:
        """The entry is gone from the menu, then what lies beside its VHD, layer and all. The VHD stays as it is."""
        with self._alone(name) as entry:
            layers.require_settled(entry)
            plan = changes.plan_of(
                "remove-boot-entry",
                f"remove the boot entry '{entry.title}'",
                [
                    boot_plan.WriteMenu(str(self.files.file), f"remove the entry '{entry.title}'"),
                    boot_plan.RemoveBootFiles(entry.folder),
                ],
            )
            changes.require_approval(self._host, plan)
            self._rewrite(lambda text: boot_menu.without_section(text, entry.id))
            if Path(entry.folder).is_dir():
                durable.remove_folder(Path(entry.folder))
            return entry

    def choose(self, name: str | None, *, once: bool = False) -> BootEntry | None:
        """The entry is started when nobody chooses, always or at the next start only; None: the menu's own default."""
        entry = None if name is None else self.entry(name)
        if once:
            self._require_once()
        what = f"start '{entry.title}' {'once' if once else 'by default'}" if entry else "keep the menu's own default"
        where = self.files.block_file if once else self.files.file
        plan = changes.plan_of("choose-boot-entry", what, [boot_plan.WriteMenu(str(where), what)])
        changes.require_approval(self._host, plan)
        if once and entry is not None:
            block = boot_menu.environment(self.files.environment(), "next_entry", f"hvmgr-{entry.id}")
            self.files.write_environment(block)
        else:
            self._rewrite(lambda text: boot_menu.with_default(text, None if entry is None else entry.id))
        return entry

    def revert(self, name: str) -> int:
        """What the system wrote into the layer is thrown away; how many bytes that were."""
        with self._alone(name) as entry:
            layers.require_layer(entry)
            layers.require_settled(entry)
            written = layers.held(entry)
            step = boot_plan.MakeLayer(entry.layer_file, entry.size)
            what = f"throw away what '{entry.title}' wrote"
            changes.require_approval(self._host, changes.plan_of("revert-boot-entry", what, [step]))
            layers.renew(entry)
            return written

    def merge(self, name: str, *, to: AnyPath | None = None) -> int:
        """What the system wrote goes into its VHD, or into a new differencing VHD ``to`` on it; how many bytes that were.

        Into the VHD: the layer is empty afterwards, and the entry made anew. A merge that was cut off is completed.
        """
        with self._alone(name) as entry:
            layers.require_layer(entry)
            if to is not None:
                return layers.keep(self._host, entry, Path(to))
            written = layers.merge(self._host, entry, self.files.file)
            self._make(Path(entry.image), self._same(entry), entry, approved=True)
            layers.settle(entry)
            return written

    def test(
        self, name: str, *, uefi: bool = False, until: str = "login:", time_s: float = 300, memory: int = 1 << 30,
        on_line: Callable[[str], None] | None = None,
    ) -> Told:  # fmt: skip
        """Starts the entry in a VM that plays the machine, on copies; what its serial console says."""
        from hvmgr.operations.boot import machine

        entry = self.entry(name)
        return machine.try_out(entry, uefi=uefi, until=until, time_s=time_s, memory=memory, on_line=on_line)

    # --- inside ---

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[BootEntry]:
        """The entry as it is now; no other command works on it until the block ends."""
        found = self.entry(name)
        with layers.alone(self._host, found.image):
            yield self.entry(found.id)

    def _make(self, path: Path, wish: BootOptions, old: BootEntry | None, *, approved: bool = False) -> BootEntry:
        host = self._host
        found = requirements.look(path, wish.folders)
        has_layer = making.wants_layer(found, wish)
        for note in requirements.require_free(host, path, wish.folders, writes=not has_layer):
            host.reporter.notice(note)
        with changes.locked(host, [path], seen=[found]):
            others = requirements.unfilled(self.entries(), path)
            entry_id = old.id if old else uuid.uuid4().hex[:12]
            made = making.prepare(path, found, wish, old, entry_id=entry_id, others=others)
            for note in made.warnings:
                host.reporter.notice(note)
            entry = made.entry
            steps = making.steps(made, old, str(self.files.file))
            if not approved:
                subject = f"add the boot entry '{entry.title}' for {path}"
                changes.require_approval(host, changes.plan_of("add-boot-entry", subject, steps))
            making.write(made)
            self._rewrite(lambda text: boot_menu.with_section(text, entry.id, made.section))
        return entry

    def _same(self, entry: BootEntry) -> BootOptions:
        """The wish that leads to this entry again."""
        place = requirements.place_again(entry)
        return BootOptions(
            title=entry.title,
            layer=entry.layer,
            kernel=entry.kernel_version if entry.pinned else None,
            arguments=entry.extra,
            copy_kernel=entry.copied,
            volume=place,
            volume_id=entry.volume,
            volume_type=entry.volume_type.value,
            replace=True,
        )

    def _rewrite(self, change: Callable[[str], str]) -> None:
        """The menu's file is read and written under a lock: two commands at once both have their way."""
        with index.locked([self.files.file], wait_s=self._host.wait_s):
            before = self.files.text()
            after = change(before)
            if after != before:
                self.files.write(after)

    def _as_known(self, name: str) -> str:
        return os.path.realpath(name) if Path(name).exists() else name

    def _require_once(self) -> None:
        from hvmgr.host import volumes

        if "next_entry" not in self.files.main():
            raise errors.Unsupported(
                f"the menu {self.files.folder}/grub.cfg knows no entry for one start only",
                hint="let the distribution write it anew (update-grub), or choose the entry for good",
            )
        volume = volumes.of(self.files.block_file.parent)
        is_stacked = volumes.is_stacked(volume.device)
        if volume.type in _NO_ONCE or is_stacked:
            where = f"{volume.device} (LVM, RAID, encryption, or a disk in a file)" if is_stacked else volume.type
            raise errors.Unsupported(
                f"GRUB cannot write to {where}, so the entry would be started again and again",
                hint="choose it for good, and choose anew afterwards",
            )


def now() -> str:
    """The present time as entries keep it."""
    return units.to_rfc3339(datetime.now(UTC))
