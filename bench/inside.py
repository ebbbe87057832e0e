"""Files out of disks, beside a loop mount of the same chain and a plain copy, and guestfish where it is installed.

The mount is what an administrator does by hand as root: a storage daemon exports the qcow2 chain by FUSE, a loop device
lies on that, and the kernel mounts it, in a mount namespace of its own. hvmgr needs none of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import harness
from bench.harness import Result
from hvmgr import units
from hvmgr.operations.inside import getting, looking, views

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
_HVMGR = [sys.executable, "-P", "-m", "hvmgr", "file"]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 5
    warm_up: int = 1
    files: int = 10_000
    large: int = units.GIB
    small_disk: int = units.GIB
    large_disk: int = 100 * units.GIB


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as name:
        folder = Path(name)
        say("inside: making the disks")
        image = _disk(folder, "disk", _tree(folder, scale), scale.large + scale.files * 8192 + 64 * units.MIB)
        say("inside: list and get")
        results = [*_list(folder, image, scale), *_get(folder, image, scale)]
        say("inside: first byte")
        return [*results, *_first_byte(folder, scale)]


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
            **_others(folder, image, 'ls -lR "$2/many"', ["ll /many"]),
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

    others = _others(
        folder, image, f"cp --sparse=never --reflink=never \"$2/large\" '{out}'", [f"copy-out /large {out}"]
    )
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
            **_others(folder, large, 'cat "$2/file"', ["cat /file"]),
        },
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    size = units.format_size(scale.large_disk)
    return [
        *_results(f"first byte of a small file, {size}", times, aim=None, limit=0.3),
        Result(
            f"the same, beside {units.format_size(scale.small_disk)}", times["ours"], times["small"], "hvmgr", aim=1.2
        ),
    ]


def _results(what: str, times: dict[str, float], *, aim: float | None, limit: float | None = None) -> list[Result]:
    names = {"mount": "FUSE export, loop mount", "guestfish": "guestfish"}
    results = [
        Result(what, times["ours"], times[key], name, times.get("in process"), aim if key == "mount" else None)
        for key, name in names.items()
        if key in times
    ]
    if limit is not None or not results:
        results.append(Result(what, times["ours"], in_process=times.get("in process"), limit=limit))
    return results


def _others(folder: Path, image: Path, work: str, commands: list[str]) -> dict[str, Callable[[], object]]:
    """The same by other means, as far as this host and this user have them."""
    found: dict[str, Callable[[], object]] = {}
    if os.geteuid() == 0 and Path("/dev/fuse").exists() and Path("/dev/loop-control").exists():
        found["mount"] = partial(_mounted, folder, image, work)
    if shutil.which("guestfish"):
        line = ["guestfish", "--ro", "--format=qcow2", "-a", str(image), "-m", "/dev/sda", *commands]
        found["guestfish"] = partial(harness.program, line)
    return found


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
