"""What stands between a source and this host, before anything is touched: the report, and the check of an import.

Nothing is written, not even a lock. Every finding has a code of ``model/compatibility``, says where, and which option
or command puts it right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hvmgr import errors, settings
from hvmgr.host.hypervisor import Connection
from hvmgr.model import compatibility, import_options, maps
from hvmgr.model.compatibility import found
from hvmgr.model.finding import Finding
from hvmgr.model.identity import Identity
from hvmgr.model.import_options import ImportOptions, Mode
from hvmgr.model.layout import Layout
from hvmgr.model.maps import Entry, Maps, Used
from hvmgr.operations.exchange import compare_host, compare_place, import_, intake
from hvmgr.operations.session import Session
from hvmgr.storage import copy, images, source_home
from hvmgr.storage.source_home import SourceHome, SourceSnapshot


@dataclass(frozen=True, slots=True)
class Comparison:
    """A source read in the light of what is asked for, and everything that was found."""

    source: SourceHome
    options: ImportOptions
    maps: Maps
    used: Used
    identity: Identity
    layout: Layout
    snapshots: tuple[SourceSnapshot, ...]
    findings: list[Finding] = field(default_factory=list)

    def error(self) -> errors.HvmgrError | None:
        """What an import ends with; None when nothing is in its way."""
        return compatibility.to_error(self.findings, f"{self.source.present.name} cannot be imported")


def read(source: Path, options: ImportOptions) -> tuple[SourceHome, Maps, Used]:
    """The source with the maps followed; UsageError where the options contradict each other."""
    import_options.check(options)
    wanted, used = options.to_maps(), Used()
    wanted = maps.with_defaults(wanted, networks=settings.import_maps("networks"), paths=settings.import_maps("paths"))
    opened = source_home.open_source(
        source,
        vm=options.vm,
        paths=wanted.paths,
        disks=wanted.disks,
        used=used,
        snapshots_from=options.snapshot_source,
    )
    if opened.archive is not None and options.mode is not Mode.COPY:
        what = "become a home" if options.mode is Mode.REGISTER else "be shared"
        raise errors.UsageError(
            f"{opened.origin} is an archive, and files in it cannot {what}",
            hint="import it with --mode copy, or unpack it first: tar -xf FILE",
        )
    return opened, wanted, used


def examine(
    connection: Connection,
    root: Path,
    source: Path | SourceHome,
    options: ImportOptions,
    *,
    thorough: bool = False,
) -> Comparison:
    """Everything at once; ``thorough`` reads every byte of images whose SHA-256 is known.

    UsageError for options that contradict each other, and for a line of a map that matches nothing.
    """
    if isinstance(source, SourceHome):
        import_options.check(options)
        opened, wanted, used = source, options.to_maps(), Used()
    else:
        opened, wanted, used = read(source, options)
    vm_id = Session.new_id() if options.makes_new_id else opened.vm_id
    who = import_.choose_identity(connection, opened, options, vm_id)
    layout = import_.target_layout(root, opened, options, vm_id)
    comparison = Comparison(
        source=opened,
        options=options,
        maps=wanted,
        used=used,
        identity=who,
        layout=layout,
        snapshots=intake.kept_snapshots(opened, options),
    )
    findings = [
        *_source_findings(comparison, thorough=thorough),
        *compare_host.findings(connection, comparison),
        *compare_place.findings(connection, comparison),
    ]
    findings += [
        found("default-map", f"{one.option} {one.old} is {one.new} here: {one.default}", one.old)
        for one in used.defaults()
    ]
    if opened.archive is not None:
        findings = [opened.archive.named(one) for one in findings]
    comparison.findings.extend(compatibility.worst_first(findings))
    _require_all_used(comparison)
    _require_disk_root_used(comparison)
    _require_snapshot_source_used(comparison)
    _require_source_unwritten(comparison)
    return comparison


def _require_all_used(comparison: Comparison) -> None:
    """A value that would be ignored is an error, and says what there is."""
    slots = set(intake.slots_of(comparison.source, comparison.snapshots).values())
    comparison.used.entries.update(one for one in comparison.maps.disk_targets if one.old in slots)
    left = comparison.used.unused(comparison.maps)
    if not left:
        return
    raise ignored(comparison.source, left[0])


def _require_snapshot_source_used(comparison: Comparison) -> None:
    folder = comparison.options.snapshot_source
    if folder is None:
        return
    if not folder.is_dir():
        raise errors.NotFound(f"there is no folder {folder}", hint="give --snapshot-source the folder with the XMLs")
    if not any(one.file.parent == folder.resolve() for one in comparison.source.snapshots):
        raise errors.UsageError(
            f"--snapshot-source {folder} would be ignored: it holds no snapshot that the source lacks",
            hint="leave it out, or name the folder that holds <snapshot id>.xml",
        )


def _require_source_unwritten(comparison: Comparison) -> None:
    """Nothing of the new VM goes into the folder that it is made from; that folder itself is there already."""
    source, options, layout = comparison.source, comparison.options, comparison.layout
    if options.mode is Mode.REGISTER or options.replace or not source.is_home:
        return
    homes = [one for one in (layout.home, *(place for _, place in layout.links())) if one != source.folder]
    for place in (*homes, *(Path(one.new).resolve() for one in comparison.maps.disk_targets)):
        if place.is_relative_to(source.folder):
            raise errors.UsageError(
                f"{place} is inside the source, which an import does not write", hint="choose another place"
            )


def ignored(source: SourceHome, entry: Entry) -> errors.UsageError:
    """The error for a line of a map that matches nothing."""
    return errors.UsageError(
        f"{entry} would be ignored: nothing of {source.present.name} matches it",
        hint=_what_there_is(source, entry.option),
        option=entry.option,
        value=entry.old,
    )


def _require_disk_root_used(comparison: Comparison) -> None:
    """A place for every single disk leaves nothing to the common one."""
    source, options = comparison.source, comparison.options
    if options.disk_path is None or not options.disk_targets:
        return
    slots = intake.slots_of(source, comparison.snapshots)
    bases = [one for one in intake.needed_images(source, comparison.snapshots) if one.parent is None]
    if bases and all(slots[one.path] in options.disk_targets for one in bases):
        raise errors.UsageError(
            "--disk-path would be ignored: --disk-target wins, and names a place for every disk",
            hint="leave one of them out",
        )


def _what_there_is(source: SourceHome, option: str) -> str | None:
    if option in {"disk", "disk-target"}:
        slots = [*source.disks, *source.left_out]
        return f"it has the disks {', '.join(slots)}" if slots else "it has no disks"
    cards: dict[str, tuple[str, str | None]] = {}
    for one in source.configurations():
        cards |= maps.networks_of(one)
    if option in {"nic", "vlan", "portgroup", "network"} and not cards:
        return "it has no cards"
    if option in {"nic", "vlan", "portgroup"}:
        return "it has the cards " + ", ".join(cards)
    if option == "network":
        return "it is plugged into " + ", ".join(dict.fromkeys(name or kind for kind, name in cards.values()))
    return f"it was written as {source.recorded_home}"


# --- the source -----------------------------------------------------------------------------------------------------


def _source_findings(comparison: Comparison, *, thorough: bool) -> Iterator[Finding]:
    source, options = comparison.source, comparison.options
    needed = {one.path for one in intake.needed_images(source, comparison.snapshots)}
    broken = set(_broken(comparison))
    ignored = set(source.images) - needed
    dropped = {one.record.id for one in source.snapshots} - {one.record.id for one in comparison.snapshots}
    for problem in source.problems:
        if problem.code == "missing-snapshot" and _is_dropped(comparison, problem.where):
            continue
        if problem.code == "saved-state-damaged" and (
            options.without_state or any(one in problem.where for one in dropped)
        ):
            continue
        if problem.where not in ignored:
            yield problem
    for missing in source.missing:
        if missing.looked in broken:
            yield found(
                "missing-disk",
                f"the image {missing.recorded} of disk {missing.slot} is not there (looked for {missing.looked})",
                missing.looked,
                f"say where it is: --path OLD=NEW, or --disk {missing.slot}=FILE",
            )
    yield from _sizes(source, needed, thorough=thorough)
    yield from _small_files(source)
    yield from _vhds(comparison)
    if source.undo is not None and options.mode is not Mode.REGISTER:
        yield found("undo-left-behind", "the undo slot does not come along", source.layout.undo)


def _vhds(comparison: Comparison) -> Iterator[Finding]:
    """QEMU reads zeros from a differencing VHD, and spoils it with the first write: it never gets one."""
    source, mode = comparison.source, comparison.options.mode
    used = {one.path for one in intake.needed_images(source, comparison.snapshots, left_out=mode is Mode.REGISTER)}
    converted = (
        frozenset[str]()
        if mode is Mode.REGISTER
        else intake.to_convert(source, comparison.snapshots, comparison.options, left_out=mode is Mode.LINK)
    )
    for image in intake.needed_images(source, comparison.snapshots):
        if not image.is_foreign:
            if image.format == images.VPC and image.path not in converted:
                sentence = f"{image.path} is a VHD and stays one: snapshots of the running VM cannot have its memory"
                yield found("vhd-kept", sentence, image.path, "afterwards: hvmgr disk convert VM SLOT")
            continue
        kind = "a differencing VHD" if image.parent is not None else "a VHD that QEMU would cut short"
        if mode is Mode.COPY or image.path not in used:
            yield found("vhd-converted", f"{image.path} is {kind}: it becomes a qcow2 image", image.path)
        else:
            yield found(
                "vhd-differencing", f"{image.path} is {kind}", image.path, "use --mode copy, which makes it qcow2"
            )


def _is_dropped(comparison: Comparison, snapshot_id: str) -> bool:
    return comparison.options.without_snapshots or snapshot_id in comparison.options.drop_snapshots


def _broken(comparison: Comparison) -> Iterator[str]:
    """Images that are needed and were not read."""
    source = comparison.source
    for disks in intake.disks_of(source, comparison.snapshots):
        for top in disks.values():
            chain = source.chain(top)
            if not chain:
                yield top
            elif chain[-1].parent is not None:
                yield chain[-1].parent


def _sizes(source: SourceHome, needed: set[str], *, thorough: bool) -> Iterator[Finding]:
    for path in sorted(needed):
        image, listed = source.images[path], source.expected.get(path)
        if listed is None:
            continue
        if image.size != listed.size or image.format != listed.format or image.length != listed.bytes:
            yield found(
                "wrong-size",
                f"{path} is a {image.format} disk of {image.size} bytes in {image.length}; recorded is {listed.format}, "
                f"{listed.size} in {listed.bytes}",
                path,
                "name the right file with --disk or --path",
            )
        elif thorough and listed.sha256 is not None and _hash(source, path) != listed.sha256:
            yield found("wrong-hash", f"{path} holds other bytes than were recorded", path, "get a whole copy of it")


def _hash(source: SourceHome, path: str) -> str:
    packed = None if source.archive is None else source.archive.sha256(path)
    return packed or copy.sha256(Path(path))


def _small_files(source: SourceHome) -> Iterator[Finding]:
    """What an archive holds besides images was read when it was opened."""
    for name, digest in source.sums.items():
        assert source.archive is not None
        member = source.archive.members.get(str((source.folder / name).relative_to(source.archive.folder)))
        if member is None:
            yield found("damaged", f"{source.folder / name} is missing", source.folder / name, "get a whole copy of it")
        elif member.sha256 is not None and member.sha256 != digest:
            yield found("wrong-hash", f"{source.folder / name} holds other bytes than were recorded", source.folder / name,
                        "get a whole copy of it")  # fmt: skip
