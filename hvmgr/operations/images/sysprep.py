r"""Whether a Windows was generalised (sysprep) before it became an image: what Setup notes of it in the registry.

``ImageState`` below ``HKLM\SOFTWARE\Microsoft\Windows\CurrentVersion\Setup\State`` is documented (Windows Setup States).
A system that was not generalised carries its name, its security id and its hardware to every machine that it comes to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hvmgr import errors
from hvmgr.host import ntfs, wimlib
from hvmgr.storage.registry import Hive

_HIVE = "Windows/System32/config/SOFTWARE"
_STATE_KEY, _STATE = "Microsoft\\Windows\\CurrentVersion\\Setup\\State", "ImageState"
_VERSION_KEY, _NAME = "Microsoft\\Windows NT\\CurrentVersion", "ProductName"
_GENERALISED = "IMAGE_STATE_GENERALIZE_"


class Generalised(StrEnum):
    """What is known of a Windows."""

    YES = "generalised"
    NO = "not generalised"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Windows:
    """A Windows in an image; ``state`` is what Setup wrote, or why it could not be read."""

    generalised: Generalised
    state: str
    product: str | None

    def warning(self, where: str) -> str | None:
        """What to tell whoever makes an image of it, or uses one."""
        if self.generalised is Generalised.YES:
            return None
        name = self.product or "Windows"
        if self.generalised is Generalised.NO:
            return (
                f"{where} holds a {name} that was not generalised ({self.state}): run "
                "'sysprep /generalize /oobe /shutdown' in it before it becomes more than one machine"
            )
        return f"whether the {name} in {where} was generalised cannot be said: {self.state}"


def in_volume(volume: Path) -> Windows | None:
    """The Windows on an NTFS volume that lies in a file; None when there is none."""
    return _read(lambda: ntfs.read(volume, _HIVE))


def in_wim(wim: Path, image: int) -> Windows | None:
    """The Windows in an image of a WIM; None when there is none."""

    def read() -> bytes | None:
        with tempfile.TemporaryDirectory(prefix="hvmgr-") as folder:
            file = wimlib.extract(wim, image, f"/{_HIVE}", Path(folder))
            return None if file is None else file.read_bytes()

    return _read(read)


def in_folder(folder: Path) -> Windows | None:
    """The Windows in a folder, such as one that is mounted; None when there is none."""
    file: Path | None = folder
    for word in _HIVE.split("/"):
        inside = file.iterdir() if file is not None and file.is_dir() else ()
        file = next((one for one in inside if one.name.lower() == word.lower()), None)
    if file is None or not file.is_file():
        return None
    return _read(file.read_bytes)


def _read(read: Callable[[], bytes | None]) -> Windows | None:
    try:
        raw = read()
        if raw is None:
            return None
        hive = Hive.of(raw)
        state, product = hive.value(_STATE_KEY, _STATE), hive.value(_VERSION_KEY, _NAME)
    except (errors.Corrupt, errors.Unsupported) as error:
        return Windows(Generalised.UNKNOWN, error.message, None)
    name = product if isinstance(product, str) else None
    if not isinstance(state, str):
        return Windows(Generalised.UNKNOWN, "its registry says nothing of it", name)
    return Windows(Generalised.YES if state.startswith(_GENERALISED) else Generalised.NO, state, name)
