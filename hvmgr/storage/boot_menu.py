"""GRUB's files of a machine: where its menu is, hvmgr's part of it, and its environment. Replaced as a whole, or not at all.

Some distributions have links in their places (``grubenv`` to one on the EFI system partition): what these lead to is replaced.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.storage import durable

_NAMES = ("grub", "grub2")
_OLD = ".hvmgr-old"  # the copy of custom.cfg before the last change


@dataclass(frozen=True, slots=True)
class Menu:
    """The folder with ``grub.cfg``."""

    folder: Path

    @property
    def file(self) -> Path:
        """What hvmgr's entries stand in."""
        return self.folder / "custom.cfg"

    @property
    def block_file(self) -> Path:
        """What the environment block stands in."""
        return Path(os.path.realpath(self.folder / "grubenv"))

    def text(self) -> str:
        """What is in there; nothing where it is not there yet."""
        with durable.explained(self.file), contextlib.suppress(FileNotFoundError):
            return self.file.read_bytes().decode("utf-8", "surrogateescape")
        return ""

    def write(self, text: str) -> None:
        """The file has another text; the one before stays beside it."""
        if self.file.exists():
            durable.write_file(self.file.with_name(f"{self.file.name}{_OLD}"), self.file.read_bytes(), mode=0o600)
        _replace(Path(os.path.realpath(self.file)), text.encode("utf-8", "surrogateescape"))

    def environment(self) -> bytes | None:
        """The environment block; None without one."""
        with durable.explained(self.folder), contextlib.suppress(FileNotFoundError):
            return self.block_file.read_bytes()
        return None

    def write_environment(self, block: bytes) -> None:
        """The environment block is another one."""
        _replace(self.block_file, block)

    def main(self) -> str:
        """The menu that GRUB reads first."""
        with durable.explained(self.folder):
            return (self.folder / "grub.cfg").read_text("utf-8", "replace")


def _replace(path: Path, data: bytes) -> None:
    durable.write_file(path, data, mode=path.stat().st_mode & 0o777 if path.exists() else 0o644)


def find(boot: Path) -> Menu:
    """The menu below a boot folder; Unsupported where there is none that would show our entries."""
    real = Path(os.path.realpath(boot))
    if not real.is_dir():
        raise errors.NotFound(f"there is no folder {boot}", hint="name the machine's boot folder with --boot-dir")
    for name in _NAMES:
        menu = Menu(real / name)
        if (menu.folder / "grub.cfg").is_file():
            if "custom.cfg" not in menu.main():
                raise errors.Unsupported(
                    f"the menu {menu.folder}/grub.cfg does not read custom.cfg, so it would not show the entry",
                    hint="let the distribution write it anew (update-grub, with /etc/grub.d/41_custom)",
                )
            return menu
    raise errors.Unsupported(
        f"there is no GRUB menu in {boot}: neither grub/grub.cfg nor grub2/grub.cfg",
        hint="native boot of Linux needs GRUB 2; name its boot folder with --boot-dir",
    )
