"""The layer of an entry: what stands in it, whether it still fits its VHD, throwing it away, keeping it.

A merge goes by way of a differencing VHD, so that what is written into the VHD is journaled as every merge is:

| cut off                           | what is there                       | the next ``boot merge``                    |
|-----------------------------------|-------------------------------------|--------------------------------------------|
| before the layer is put aside     | the layer, perhaps the child        | makes the child anew                       |
| while the child is merged         | ``layer.merging`` and the child     | merges the child again, or completes that  |
| after that                        | ``layer.merging`` alone             | makes the entry anew, and an empty layer   |

While a layer is put aside the system does not start natively: its scripts want the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.model import boot_plan
from hvmgr.model.boot_entry import BootEntry, ImageFile
from hvmgr.operations import image_users
from hvmgr.operations.boot import requirements
from hvmgr.operations.images import changes
from hvmgr.storage import durable, layer

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

_ASIDE = "layer.merging"


def written(entry: BootEntry) -> int | None:
    """The bytes in the layer; None where there is no layer."""
    path = Path(entry.layer_file)
    if not path.exists():
        return None
    with layer.opened(path, entry.size) as found:
        return found.written


def standing(entry: BootEntry) -> tuple[int | None, str | None]:
    """What the layer holds, and why the entry would not boot."""
    size = None
    try:
        if _aside(entry).exists():
            return None, "a merge of its layer was cut off: run 'hvmgr boot merge' again"
        size = written(entry) if entry.layer else None
        if entry.layer and size is None:
            return None, f"its layer {entry.layer_file} is gone"
        require_unchanged(entry)
    except errors.HvmgrError as error:
        return size, error.message
    if not (Path(entry.folder) / "supplement").exists():
        return size, f"{entry.folder} is not complete"
    return size, None


def require_layer(entry: BootEntry) -> None:
    """Conflict for an entry that writes its VHD itself."""
    if not entry.layer:
        raise errors.Conflict(
            f"'{entry.title}' has no layer: its system writes {entry.image} itself",
            hint="give it one: hvmgr boot add --replace --layer",
        )


def require_settled(entry: BootEntry) -> None:
    """Conflict while a merge that was cut off waits."""
    if _aside(entry).exists():
        raise errors.Conflict(
            f"a merge of the layer of '{entry.title}' was cut off",
            hint=f"complete it: hvmgr boot merge '{entry.title}'",
        )


def require_unchanged(entry: BootEntry) -> None:
    """Conflict when a file of the disk is not as it was when the entry was made, so that the layer does not fit it."""
    place = requirements.place_again(entry)
    for file in entry.files:
        path = place / file.path.lstrip("/")
        if not path.exists():
            raise errors.NotFound(f"there is no {path}", path=str(path))
        if not _is_as(path, file, whole=entry.layer):
            raise errors.Conflict(
                f"{path} was changed since the boot entry '{entry.title}' was made"
                + (", so what was written natively does not fit it any more" if entry.layer else ""),
                hint="restore that file, or give the layer up: hvmgr boot revert, then hvmgr boot add --replace",
                path=str(path),
            )


def _is_as(path: Path, file: ImageFile, *, whole: bool) -> bool:
    import hashlib

    facts = path.stat()
    if facts.st_size != file.length:
        return False
    if not whole:
        return True
    with path.open("rb") as opened:
        digest = hashlib.sha256(opened.read(file.head)).hexdigest()
    return int(facts.st_mtime) == file.mtime and digest == file.sha256


def require_fitting(
    path: Path, size: int, old: BootEntry | None, files: Sequence[ImageFile], *, has_layer: bool
) -> None:
    """A layer that holds something is only kept for the disk that it was written on."""
    store = Path(f"{path}.boot") / "layer"
    if not store.exists():
        return
    with layer.opened(store, size if old is None else old.size) as found:
        held = found.written
    if held == 0:
        return
    if old is None or not has_layer:
        raise errors.Conflict(
            f"{store} holds {units.format_size(held)} that a system wrote natively",
            hint="keep it with 'hvmgr boot merge', or throw it away with 'hvmgr boot revert', first"
            if old is not None
            else "its boot entry is gone: remove the file when nobody needs it",
            path=str(store),
        )
    if tuple(files) != old.files:
        raise errors.Conflict(
            f"{path} was changed since the boot entry '{old.title}' was made, and its layer holds"
            f" {units.format_size(held)} that do not fit it any more",
            hint="throw them away first: hvmgr boot revert",
            path=str(store),
        )


def renew(entry: BootEntry) -> None:
    """The layer is empty."""
    store = Path(entry.layer_file)
    if store.exists():
        changes.require_closed([store])
    durable.make_folder(store.parent, mode=0o700)
    layer.make(store, entry.size)


def keep(host: Host, entry: BootEntry, path: Path) -> int:
    """What lies in the layer becomes a new differencing VHD on the entry's; the layer stays."""
    require_settled(entry)
    require_unchanged(entry)
    step = boot_plan.KeepLayer(str(path), entry.image)
    what = f"keep what '{entry.title}' wrote as {path}"
    changes.require_approval(host, changes.plan_of("keep-layer", what, [step]))
    return _write_child(entry, Path(entry.layer_file), path)


def merge(host: Host, entry: BootEntry, menu: Path) -> int:
    """What lies in the layer is in the VHD; ``settle`` has to follow when the entry was made anew."""
    store, child = Path(entry.layer_file), Path(f"{entry.image}.merging")
    is_begun = _aside(entry).exists()
    if not is_begun:
        require_unchanged(entry)
        _drop_unfinished(host, entry, child)
        changes.complete(host, [Path(entry.image)])
        changes.require_unused(host, Path(entry.image))
        changes.require_closed([Path(entry.image), store])
    steps = [
        boot_plan.KeepLayer(str(child), entry.image),
        boot_plan.MergeLayer(str(child), entry.image),
        boot_plan.MakeLayer(entry.layer_file, entry.size),
        boot_plan.WriteMenu(str(menu), f"renew the entry '{entry.title}'"),
    ]
    what = f"merge what '{entry.title}' wrote into {entry.image}"
    changes.require_approval(host, changes.plan_of("merge-boot-entry", what, steps))
    if not is_begun:
        _write_child(entry, store, child)
        durable.rename(store, _aside(entry))
    with layer.opened(_aside(entry), entry.size) as found:
        held = found.written
    changes.complete_about(host, child)
    if child.exists():
        host.images.merge(child)
    layer.make(store, entry.size)
    return held


def _drop_unfinished(host: Host, entry: BootEntry, child: Path) -> None:
    """What a merge left that never came to its second step goes; Conflict for a file of that name that is none."""
    if not child.exists():
        return
    from hvmgr import vhd

    own = vhd.identify(child) is vhd.Kind.DIFFERENCING and image_users.beside(Path(entry.image))
    if not own or str(child) not in {user.name for user in own}:
        raise errors.Conflict(f"{child} is in the way of a merge, and not hvmgr's", hint="rename it", path=str(child))
    if host.reporter.dry_run:
        raise errors.Conflict(
            f"a merge of the layer of '{entry.title}' was cut off", hint="run the command without --dry-run"
        )
    durable.remove(child)


def settle(entry: BootEntry) -> None:
    """The merge is at its end."""
    durable.remove(_aside(entry))


def _aside(entry: BootEntry) -> Path:
    return Path(entry.folder) / _ASIDE


def _write_child(entry: BootEntry, store: Path, path: Path) -> int:
    from hvmgr.vhd import creation
    from hvmgr.vhd.format import Kind

    parent = Path(entry.image)
    with layer.opened(store, entry.size) as found:
        creation.write_image(path, found, kind=Kind.DIFFERENCING, parent=creation.describe_parent(path, parent))
        return found.written
