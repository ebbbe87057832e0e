"""Encrypted volumes (LUKS) as disks in clear, with the keys that a user gives. A key is in no message and in no fact of an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hvmgr import errors
from hvmgr.operations.inside import views
from hvmgr.operations.inside.views import Volume
from hvmgr.storage.filesystems import signatures
from hvmgr.storage.filesystems.signatures import Kind
from hvmgr.storage.partitions import Disk

NO_KEY = "it is encrypted (LUKS), and its key can be given: --key-file FILE"
WRONG_KEY = "it is encrypted (LUKS), and none of the keys that were given opens it"


@dataclass(frozen=True, slots=True)
class Key:
    """What opens LUKS volumes: one of the ``secrets``. Of a ``target`` only: SLOT, SLOT:N, :N or GROUP/VOLUME."""

    secrets: tuple[bytes, ...] = field(repr=False)
    target: str = ""

    def is_for(self, volume: Volume) -> bool:
        """Whether the key is to be tried there."""
        return self.target in {"", *names_of(volume)}


def given(keys: Mapping[str, bytes] | Sequence[Key] | None) -> Sequence[Key]:
    """Keys as the library takes them: by what each is for, an empty word for all of it."""
    return [Key((secret,), target) for target, secret in keys.items()] if isinstance(keys, Mapping) else keys or ()


def names_of(volume: Volume) -> list[str]:
    """What a key's target may call a volume."""
    if volume.logical:
        return [volume.logical]
    slot = volume.disk.slot or ""
    return [slot] if volume.number is None else [slot, f"{slot}:{volume.number}", f":{volume.number}"]


def unlocked(
    places: Mapping[Volume, Disk | None], keys: Sequence[Key], number: str | None = None
) -> dict[Volume, Disk | None]:
    """The volumes in their order; those of LUKS that a key opens are what is in them, others say why they are not.

    With a ``number`` all other partitions, and logical volumes, stay as they are: a key takes a second to be tried.
    """
    found: dict[Volume, Disk | None] = {}
    for volume, disk in places.items():
        mine = [key for key in keys if key.is_for(volume)]
        is_whole = volume.number is None and not volume.logical  # it may have partitions inside
        is_meant = number is None or is_whole or str(volume.number) == number
        if volume.kind is Kind.LUKS and disk is not None and mine and is_meant:
            found |= _unlocked(volume, disk, mine)
        else:
            found[volume] = disk
    return found


def _unlocked(volume: Volume, disk: Disk, keys: Sequence[Key]) -> dict[Volume, Disk]:
    try:
        clear = _opened(disk, keys)
    except (errors.Corrupt, errors.Unsupported) as error:  # what lies on the others can be read all the same
        return {dataclasses.replace(volume, why_not=error.message): disk}
    if clear is None:
        return {dataclasses.replace(volume, why_not=WRONG_KEY): disk}
    if volume.number is None and not volume.logical:  # a whole disk, which may well have partitions
        found = [dataclasses.replace(one, encrypted=True) for one in views.volumes(volume.disk, clear)]
        return {one: views.window(one, clear) for one in found}
    known = signatures.recognise(clear)
    kind, label, uuid = (None, "", "") if known is None else (known.kind, known.label, known.uuid)
    inside = dataclasses.replace(volume, size=clear.size, kind=kind, label=label, uuid=uuid, encrypted=True)
    return {inside: clear}


def check(volumes: Sequence[Volume], keys: Sequence[Key]) -> None:
    """NotFound for a key of something that is not there, UsageError for one that opens nothing that it was meant for."""
    for key in keys:
        if key.target and not any(key.is_for(one) for one in volumes):
            there = ", ".join(one.title for one in volumes)
            raise errors.NotFound(f"there is no '{key.target}' that the key could be for", hint=f"there are: {there}")
    wrong = [one for one in volumes if one.why_not == WRONG_KEY]
    meant = [one for one in wrong if any(key.target and key.is_for(one) for key in keys)]
    if any(one.encrypted for one in volumes):
        wrong = []
    if meant or wrong:
        what = ", ".join(f"{one.title} of {one.disk.name}" for one in meant or wrong)
        raise errors.UsageError(
            f"{what} is encrypted (LUKS), and the key that was given does not open it",
            hint="every byte of the file counts, but for a newline at its end; the slots of keys: cryptsetup luksDump",
        )


def _opened(disk: Disk, keys: Sequence[Key]) -> Disk | None:
    from hvmgr.storage.filesystems import luks

    header = luks.read_header(disk)
    for secret in dict.fromkeys(secret for key in keys for secret in key.secrets):
        found = luks.volume_key(disk, header, secret)
        if found is not None:
            return luks.Decrypted(disk, header, found)
    return None
