"""Files out of disks, which of them differ, and which snapshots have them, beside what a user would take instead.

That is a loop mount of the same chain, a plain copy, ``diff -rq`` over two mounts, and guestfish, where it is installed. The mount
is what an administrator does by hand as root: a storage daemon exports the qcow2 chain by FUSE, a loop device lies on that,
and the kernel mounts it, in a mount namespace of its own. hvmgr needs none of it.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hvmgr
from bench import harness, kernel, snapshots
from bench.harness import Result
from hvmgr import units
from hvmgr.operations.inside import differing, getting, indexing, looking, views

# FUSE export, loop mount, the work at "$2", and everything taken down again.
_MOUNTED = """
set -e
touch "$1/disk"
qemu-storage-daemon --daemonize --pidfile "$1/pid" --blockdev driver=file,node-name=f,filename="$3",read-only=on \
  --blockdev driver=qcow2,node-name=q,file=f,read-only=on --export type=fuse,id=e,node-name=q,mountpoint="$1/disk"
end() {
    umount "$2" || true
    kill "$(cat "$1/pid")"
    for _ in $(seq 2000); do mountpoint -q "$1/disk" || break; sleep 0.005; done
}
trap 'end "$@"' EXIT
mount -o loop,ro "$1/disk" "$2"
{work}
"""
# The same for all images behind "$1", at "$1/0", "$1/1" and so on.
_ALL_MOUNTED = """
set -e
folder=$1; shift
end() {
    for one in "$folder"/*.disk; do umount "${one%.disk}" || true; kill "$(cat "$one.pid")"; done
    for one in "$folder"/*.disk; do for _ in $(seq 2000); do mountpoint -q "$one" || break; sleep 0.005; done; done
}
trap end EXIT
number=0
for image; do
    disk=$folder/$number.disk
    touch "$disk"; mkdir "$folder/$number"
    qemu-storage-daemon --daemonize --pidfile "$disk.pid" --blockdev driver=file,node-name=f,filename="$image",read-only=on \
      --blockdev driver=qcow2,node-name=q,file=f,read-only=on --export type=fuse,id=e,node-name=q,mountpoint="$disk"
    mount -o loop,ro,norecovery "$disk" "$folder/$number"
    number=$((number + 1))
done
cd "$folder"
{work}
cd /
"""
_HVMGR = [sys.executable, "-P", "-m", "hvmgr", "file"]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 5
    warm_up: int = 1
    files: int = 10_000
    large: int = units.GIB
    changed: int = 20
    small_disk: int = units.GIB
    large_disk: int = 100 * units.GIB
    with_guestfish: bool = True  # which takes seconds to start


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as name:
        folder = Path(name)
        say("inside: making the disks")
        image = _disk(folder, "disk", _tree(folder, scale), scale.large + scale.files * 8192 + 64 * units.MIB)
        say("inside: list and get")
        results = [*_list(folder, image, scale), *_get(folder, image, scale)]
        say("inside: what differs")
        results += _diff(folder, image, scale)
        say("inside: first byte")
        results += _first_byte(folder, scale)
        say("inside: which snapshots have a file")
        return [*results, *_index(folder, image, scale)]


def _tree(folder: Path, scale: Scale) -> Path:
    tree = folder / "tree"
    (tree / "many").mkdir(parents=True)
    for number in range(scale.files):
        (tree / "many" / f"file {number:05}").write_text(f"{number}\n")
    piece = os.urandom(units.MIB)
    with (tree / "large").open("wb") as file:
        for _ in range(scale.large // units.MIB):
            file.write(piece)
    return tree


def _disk(folder: Path, name: str, tree: Path, size: int) -> Path:
    """A chain of three qcow2 links with ext4 on the whole disk."""
    raw = folder / f"{name}.raw"
    harness.program(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(raw), f"{size // 1024}k"])
    parent = folder / f"{name}0.qcow2"
    harness.program(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(parent)])
    raw.unlink()
    for number in (1, 2):
        child = folder / f"{name}{number}.qcow2"
        harness.program(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(parent), str(child)])
        parent = child
    return parent


def _list(folder: Path, image: Path, scale: Scale) -> list[Result]:
    def in_process() -> None:
        with looking.opened([views.of_image(image)]) as inside:
            browser = inside.choose(b"/many")
            assert sum(1 for _ in browser.children(browser.find(b"/many"))) == scale.files

    times = harness.in_turns(
        {
            "ours": partial(harness.program, [*_HVMGR, "list", "--long", "--image", str(image), "/many"]),
            "in process": in_process,
            **_others(folder, image, scale, 'ls -lR "$2/many"', ["ll", "/many"]),
        },
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    what = f"file list --long of {scale.files} files"
    return _results(what, times, aim=None)


def _get(folder: Path, image: Path, scale: Scale) -> list[Result]:
    out = folder / "out"

    def in_process() -> None:
        with looking.opened([views.of_image(image)]) as inside:
            browser = inside.choose(b"/large")
            gathered = getting.gather([(browser, browser.find(b"/large"))])
            getting.into_folder(gathered, _fresh(out), lambda _: None, streams=False, overwrite=False)

    def ours() -> None:
        harness.program([*_HVMGR, "get", "--image", str(image), "/large", "--to", str(_fresh(out))])

    def plain() -> None:
        harness.program(["cp", "--sparse=never", "--reflink=never", str(folder / "tree" / "large"), str(_fresh(out))])

    copy = f"cp --sparse=never --reflink=never \"$2/large\" '{out}'"
    others = _others(folder, image, scale, copy, ["copy-out", "/large", str(out)])
    fresh = {name: (lambda run=run: (_fresh(out), run())) for name, run in others.items()}
    times = harness.in_turns(
        {"ours": ours, "in process": in_process, **fresh, "plain": plain}, rounds=scale.rounds, warm_up=scale.warm_up
    )
    what = f"file get of {units.format_size(scale.large)}"
    results = _results(what, times, aim=1 / 0.7)
    return [*results, Result(what, times["ours"], times["plain"], "cp of the file itself")]


def _first_byte(folder: Path, scale: Scale) -> list[Result]:
    tree = folder / "one"
    tree.mkdir()
    (tree / "file").write_text("x\n")
    large = _disk(folder, "large", tree, scale.large_disk)
    small = _disk(folder, "small", tree, scale.small_disk)
    words = [*_HVMGR, "cat", "/file", "--image"]
    times = harness.in_turns(
        {
            "ours": partial(harness.program, [*words, str(large)]),
            "small": partial(harness.program, [*words, str(small)]),
            **_others(folder, large, scale, 'cat "$2/file"', ["cat", "/file"]),
        },
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    differ = _grown(small, large, scale)
    size = units.format_size(scale.large_disk)
    return [
        *differ,
        *_results(f"first byte of a small file, {size}", times, aim=None, limit=0.3),
        Result(
            f"the same, beside {units.format_size(scale.small_disk)}", times["ours"], times["small"], "hvmgr", aim=1.2
        ),
    ]


def _child(image: Path, name: str, paths: list[bytes]) -> Path:
    """A link more, in which some files have other bytes."""
    with looking.opened([views.of_image(image)]) as inside:
        reader = (browser := inside.choose(b"/")).reader
        places = [reader.content(browser.find(path).node).segments()[0].lies()[0][0] for path in paths]
    child = image.with_name(f"{name}.qcow2")
    harness.program(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), str(child)])
    writes = [word for place in places for word in ("-c", f"write -q -P 1 {place} 512")]
    harness.program(["qemu-io", "-f", "qcow2", *writes, str(child)])
    return child


def _some(scale: Scale) -> list[bytes]:
    step = max(1, scale.files // scale.changed)
    return [b"/many/file %05d" % number for number in range(0, scale.files, step)]


def _diff(folder: Path, image: Path, scale: Scale) -> list[Result]:
    new = _child(image, "changed", _some(scale))

    def in_process() -> None:
        found = differing.between([views.of_image(image)], [views.of_image(new)])
        assert len(found.differences) == len(_some(scale))

    words = [*_HVMGR, "diff", "--image", str(image), "--image", str(new)]
    contenders: dict[str, Callable[[], object]] = {"ours": partial(harness.program, words), "in process": in_process}
    if _can_mount():
        contenders["mount"] = partial(_all_mounted, folder, [image, new], "diff -rq 0 1 >/dev/null || [ $? -eq 1 ]")
    times = harness.in_turns(contenders, rounds=scale.rounds, warm_up=scale.warm_up)
    what = f"file diff, {len(_some(scale))} of {scale.files} files, {units.format_size(scale.large)}"
    return _results(what, times, aim=0.5, names={"mount": "both mounted, diff -rq"})


def _grown(small: Path, large: Path, scale: Scale) -> list[Result]:
    """The same change on disks of two sizes."""
    runs = {}
    for name, image in (("ours", large), ("small", small)):
        child = _child(image, f"{image.stem}-changed", [b"/file"])
        runs[name] = partial(harness.program, [*_HVMGR, "diff", "--image", str(image), "--image", str(child)])
    times = harness.in_turns(runs, rounds=scale.rounds, warm_up=scale.warm_up)
    what = f"file diff of one file, {units.format_size(scale.large_disk)}, beside {units.format_size(scale.small_disk)}"
    return [Result(what, times["ours"], times["small"], "hvmgr", aim=1.5)]


def _index(folder: Path, image: Path, scale: Scale) -> list[Result]:
    """A VM with four snapshots of the disk, in each of which some files changed."""
    with snapshots.prepared() as bench:
        raw = folder / "vm.raw"
        harness.program(["qemu-img", "convert", "-O", "raw", str(image), str(raw)])
        disk = hvmgr.DiskSpecification(path=raw)
        wish = hvmgr.Specification("files", template="generation1", memory=snapshots.MEMORY, disks=(disk,), networks=())
        vm = bench.host.create_vm(wish)
        for number in range(4):
            vm.create_snapshot(f"s{number}")
            (top,) = vm.now().disks.values()
            with vm.look_inside() as inside:
                reader = (browser := inside.choose(b"/")).reader
                places = [reader.content(browser.find(path).node).segments()[0].lies()[0][0] for path in _some(scale)]
            writes = [word for place in places for word in ("-c", f"write -q -P {number} {place} 512")]
            harness.program(["qemu-io", "-f", "qcow2", *writes, top])
        images = [Path(path) for one in vm.snapshots() for path in one.disks.values()]

        def renewed() -> None:
            with indexing.opened(vm, wait_s=10) as index:
                with index.writing():
                    index.remove_point(index.points()[-1])
                assert len(indexing.update(vm, index, lambda _: None).added) == 1

        def rebuilt() -> None:
            with indexing.opened(vm, wait_s=10, anew=True) as index:
                indexing.update(vm, index, lambda _: None)

        wanted = "file 00001"
        runs: dict[str, Callable[[], object]] = {
            "rebuilt": rebuilt,
            "renewed": renewed,
            "ours": partial(bench.hvmgr, "file", "find", "files", "/", "--name", wanted, "--index"),
        }
        if _can_mount():
            qcow2 = [one for one in images if one.suffix == ".qcow2"]
            runs["mount"] = partial(
                _all_mounted, folder, qcow2, f"for one in [0-9]; do find $one -name '{wanted}'; done"
            )
        times = harness.in_turns(runs, rounds=scale.rounds, warm_up=scale.warm_up)
        what = f"which of {len(images)} snapshots have a file, {scale.files} files"
        return [
            *_results(what, times, aim=1.0, names={"mount": "each mounted, find"}),
            Result(
                f"file index of one snapshot more, {scale.files} files",
                times["renewed"],
                times["rebuilt"],
                "all anew",
                aim=0.5,
            ),
        ]


def _results(
    what: str,
    times: dict[str, float],
    *,
    aim: float | None,
    limit: float | None = None,
    names: dict[str, str] | None = None,
) -> list[Result]:
    names = names or {"mount": "FUSE export, loop mount", "guestfish": "guestfish"}
    results = [
        Result(what, times["ours"], times[key], name, times.get("in process"), aim if key == "mount" else None)
        for key, name in names.items()
        if key in times
    ]
    if limit is not None or not results:
        results.append(Result(what, times["ours"], in_process=times.get("in process"), limit=limit))
    return results


def _others(
    folder: Path, image: Path, scale: Scale, work: str, words: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """The same by other means, as far as this host and this user have them."""
    found: dict[str, Callable[[], object]] = {}
    if _can_mount():
        found["mount"] = partial(_mounted, folder, image, work)
    if scale.with_guestfish and shutil.which("guestfish"):
        line = ["guestfish", "--ro", "--format=qcow2", "-a", str(image), "-m", "/dev/sda", "--", *words]
        found["guestfish"] = partial(harness.program, line, environment=_guestfish())
    return found


@functools.cache
def _guestfish() -> Mapping[str, str]:
    """What guestfish has to be told to start here; what it builds at its first start is there."""
    told = {**os.environ, **kernel.environment(), "LIBGUESTFS_BACKEND": "direct"}
    start = ["guestfish", "add-ro", "/dev/null", ":", "run"]
    done = subprocess.run(start, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=told)
    return told if done.returncode == 0 else {**told, "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}


def _can_mount() -> bool:
    return os.geteuid() == 0 and Path("/dev/fuse").exists() and Path("/dev/loop-control").exists()


def _all_mounted(folder: Path, images: list[Path], work: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        script = _ALL_MOUNTED.replace("{work}", work)
        words = ["unshare", "-m", "sh", "-c", script, "sh", name, *map(str, images)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"bench: the mounts failed: {done.stderr.decode(errors='replace')}")


def _mounted(folder: Path, image: Path, work: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name) / "mounted"
        place.mkdir()
        script = _MOUNTED.replace("{work}", work)
        words = ["unshare", "-m", "sh", "-c", script, "sh", name, str(place), str(image)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"bench: the mount failed: {done.stderr.decode(errors='replace')}")


def _fresh(out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out
