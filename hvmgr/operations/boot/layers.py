"""The layer of an entry: what stands in it, whether it still fits its VHD, throwing it away, keeping it.

A merge goes by way of a differencing VHD, so that what is written into the VHD is journaled as every merge is:

| cut off                           | what is there                       | the next ``boot merge``                    |
|-----------------------------------|-------------------------------------|--------------------------------------------|
| before the layer is put aside     | the layer, perhaps the child        | makes the child anew                       |
| while the child is merged         | ``layer.merging``, the child or not | merges the child again, or completes that  |
| after that                        | ``layer.merged``                    | an empty layer, and makes the entry anew   |

A child that is lost is written again from ``layer.merging``: the same bytes once more do no harm. What was put aside is given up
only when ``layer.merged`` says lastingly that the VHD has it, and then becomes the empty layer.

While a layer is put aside the system does not start natively: its scripts want the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.model import boot_plan
from hvmgr.model.boot_entry import BootEntry, ImageFile
from hvmgr.model.image_info import Use
from hvmgr.operations import image_users
from hvmgr.operations.boot import requirements
from hvmgr.operations.images import changes, merging
from hvmgr.storage import durable, index, layer

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

_ASIDE = "layer.merging"
_MERGED = "layer.merged"  # a file with the number of bytes


@contextlib.contextmanager
def alone(host: Host, image: Path | str) -> Iterator[None]:
    """No other command works on the boot entry of this VHD, or on its layer."""
    with index.making(Path(f"{image}.merging"), wait_s=host.wait_s, what=f"the boot entry of {image}"):
        yield


def written(entry: BootEntry) -> int | None:
    """The bytes in the layer; None where there is no layer."""
    path = Path(entry.layer_file)
    if not path.exists():
        return None
    with layer.opened(path, entry.size) as found:
        return found.written


def held(entry: BootEntry) -> int:
    """The bytes that go when the layer goes; of one that is damaged or full, what it has of the disk."""
    try:
        return written(entry) or 0
    except errors.Corrupt:
        return layer.data_in(Path(entry.layer_file))


def damage(entry: BootEntry) -> str | None:
    """What is wrong with the layer; None where there is none, or nothing."""
    try:
        written(entry)
    except errors.Corrupt as error:
        return error.message
    return None


def standing(entry: BootEntry) -> tuple[int | None, str | None]:
    """What the layer holds, and why the entry would not boot."""
    size = None
    try:
        if _is_begun(entry):
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
    if _is_begun(entry):
        raise errors.Conflict(
            f"a merge of the layer of '{entry.title}' was cut off",
            hint=f"complete it: hvmgr boot merge '{entry.title}'",
        )


def require_none_aside(image: Path) -> None:
    """Conflict when a merge of an entry that is gone has left what its system wrote."""
    left = Path(f"{image}.boot") / _ASIDE
    if left.exists():
        raise errors.Conflict(
            f"{left} holds what a system wrote natively, and its boot entry is gone",
            hint="remove the file when nobody needs it",
            path=str(left),
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
    try:
        with layer.opened(store, size if old is None else old.size) as found:
            held = found.written
    except errors.Corrupt:
        held = layer.data_in(store)
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
        layer.empty(store, entry.size)
    else:
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
    """What lies in the layer is in the VHD; ``settle`` has to follow when the entry was made anew.

    The caller is ``alone`` with the entry from here to there.
    """
    store, child = Path(entry.layer_file), Path(f"{entry.image}.merging")
    if _is_over(entry) and not host.reporter.dry_run:
        settle(entry)
    is_begun = _is_begun(entry)
    if is_begun:
        _require_no_other(entry)
    else:
        require_unchanged(entry)
        _drop_unfinished(host, entry, child)
        changes.complete(host, [Path(entry.image)])
        changes.require_unused(host, Path(entry.image), but=(Use.NATIVE,))
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
    held = _put_into_image(host, entry, child)
    _renew_from_aside(entry)
    return held


def _put_into_image(host: Host, entry: BootEntry, child: Path) -> int:
    """The VHD has what was put aside, and ``layer.merged`` says so."""
    if _merged(entry).exists():
        return int(_merged(entry).read_bytes() or b"0")
    with layer.opened(_aside(entry), entry.size) as found:
        held = found.written
    completed = changes.complete_about(host, child)
    if not child.exists() and not completed:
        _write_child(entry, _aside(entry), child)
    if child.exists():
        merging.merge(host, child, None, keep=False, but=(Use.NATIVE,))
    durable.write_file(_merged(entry), f"{held}\n".encode())
    return held


def _renew_from_aside(entry: BootEntry) -> None:
    """What was put aside is the empty layer: its space is not needed twice."""
    store, aside = Path(entry.layer_file), _aside(entry)
    if aside.exists():
        layer.empty(aside, entry.size)
        durable.rename(aside, store)
    elif not store.exists():
        layer.make(store, entry.size)


def _require_no_other(entry: BootEntry) -> None:
    """Conflict when there is a second layer that holds something: neither may be thrown away unasked."""
    store, aside = Path(entry.layer_file), _aside(entry)
    if aside.exists() and layer.is_used(store):
        raise errors.Conflict(
            f"a merge of {aside} was cut off, and {store} holds something that a system wrote since",
            hint="move the one that nobody needs elsewhere, and run the command again",
            path=str(store),
        )


def _is_over(entry: BootEntry) -> bool:
    """Whether a merge lacks nothing but ``settle``: the entry was made anew, and its system has written since."""
    return _merged(entry).exists() and not _aside(entry).exists() and layer.is_used(Path(entry.layer_file))


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
    durable.remove(_merged(entry))


def _is_begun(entry: BootEntry) -> bool:
    return _aside(entry).exists() or _merged(entry).exists()


def _merged(entry: BootEntry) -> Path:
    return Path(entry.folder) / _MERGED


def _aside(entry: BootEntry) -> Path:
    return Path(entry.folder) / _ASIDE


def _write_child(entry: BootEntry, store: Path, path: Path) -> int:
    from hvmgr.vhd import creation
    from hvmgr.vhd.format import Kind

    parent = Path(entry.image)
    with layer.opened(store, entry.size) as found:
        creation.write_image(path, found, kind=Kind.DIFFERENCING, parent=creation.describe_parent(path, parent))
        return found.written
