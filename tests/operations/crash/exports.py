"""Kills an export before each of its durable acts; then the source is whole, and the same export goes on to its end.

Run as ``crash.py`` is: ``python exports.py SHAPE [STRIDE [FIRST]]``. After every kill:

- nothing runs on, and ``DEST/web`` is either not there or a complete export;
- the VM is what it was, or (running) goes on in new images with the same bytes;
- the same command, run again, ends with an export that verifies and holds the same bytes; nothing is left beside it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import crash
import shapes
from crash import NAME, Place, Run, Shape, forked, left_over, opened

import hvmgr
from hvmgr import errors, vhd
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.manifest import Extent
from hvmgr.operations import working
from hvmgr.operations.exchange import export_, freezing, verification  # noqa: F401 - imported before the forks
from hvmgr.storage import copy, source_home

copy._SMALL = 0  # the disks here are tiny, and notes of finished copies are wanted


def to(**options):
    return lambda host: host.vm(NAME).export(out(host), hvmgr.ExportOptions(**options))


def out(host):
    return host.root.parent / "out"


SHAPES = {
    "export-tree": Shape(shapes.forked_tree, to()),
    "export-vhd": Shape(shapes.forked_tree, to(format=ImageFormat.VHD)),
    "export-pruned": Shape(shapes.line, to(keep=("three",))),
    "export-flat": Shape(shapes.line, to(snapshots=Extent.NONE)),
    "export-snapshot-memory": Shape(shapes.with_memory, to(snapshot="memory")),
    "export-in-place": Shape(shapes.in_place, to()),
    "export-saved": Shape(shapes.line, to(), live=shapes.saved),
    "export-running": Shape(shapes.line, to(), live=shapes.running),
    "export-running-memory": Shape(shapes.off, to(with_state=True), live=shapes.running),
}


class Export(Run):
    """One shape; its operation leaves the home as it was, or, killed, with unnamed images below the present."""

    def prepare(self):
        forked(self._setup)
        forked(self._reset)
        self.before = self._described()
        names, _, _ = forked(lambda: self._victim(None))
        self.wanted, _, _ = forked(self._photo)
        self.states = {"before": self.before, "after": self._described()}
        if self.shape.live is shapes.running:
            forked(self._reset)
            forked(self._freeze)
            self.states["frozen"] = self._described()
        return names

    def kill_at(self, number, name):
        what = f"killed before act {number}, {name}"
        forked(self._reset)
        _, status, session = forked(lambda: self._victim(number))
        assert os.WIFSIGNALED(status), f"act {number} ({name}) was not reached"
        try:
            assert not left_over(session), "something runs on"
            forked(self._look_at_target)
            found, notices = self._look()
            outcome = next((title for title, state in self.states.items() if state == found), None)
            assert outcome, f"{self._difference(found)}; said {notices}"
            again, _, _ = forked(self._again)
            photo, _, _ = forked(self._photo)
            assert photo == self.wanted, f"holds {photo}, not {self.wanted}"
            self._look()
        except AssertionError as error:
            self.failures.append(f"{what}: {error}")
            return
        self.outcomes[f"{outcome}, {again}"] = self.outcomes.get(f"{outcome}, {again}", 0) + 1

    # in children

    def _freeze(self):
        """What the VM is while it is exported, and when that was killed: the next attempt needs what was frozen."""
        with opened(self.place) as host, working.on(host.vm(NAME)) as session:
            freezing.freeze(session, with_memory=False, quiesce=False)

    def _reset(self):
        shutil.rmtree(self.place.folder / "out", ignore_errors=True)
        super()._reset()

    def _look_at_target(self):
        target = self.place.folder / "out" / NAME
        if target.exists():
            assert verification.verify(target) == []

    def _again(self):
        with opened(self.place) as host:
            try:
                self.shape.act(host)
            except errors.Conflict as error:
                if "exists already" not in str(error):
                    raise
                return "was complete"
        return "went on"

    def _photo(self):
        """What a guest sees of every disk in the export, which is whole."""
        folder = self.place.folder / "out"
        target = folder / NAME
        assert [entry.name for entry in folder.iterdir()] == [NAME], list(folder.iterdir())
        assert verification.verify(target) == []
        assert all(path.stat().st_mode & 0o777 == (0o550 if path.is_dir() else 0o440) for path in target.rglob("*"))
        assert target.stat().st_mode & 0o777 == 0o550
        source = source_home.open_source(target)
        seen = {f"{one.record.name} {slot}": path for one in source.snapshots for slot, path in one.disks.items()}
        seen |= {f"now {slot}": path for slot, path in source.disks.items()}
        return {what: _bytes_of(path, source.images[path].format) for what, path in seen.items()}


def _bytes_of(path, fmt):
    if fmt == "vpc":
        with vhd.open_chain(path, folders=[Path(path).parents[2]]) as chain:
            data = bytearray(chain.size)
            chain.read_into(0, memoryview(data))
            return hashlib.sha256(data).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as folder:
        raw = Path(folder) / "raw"
        subprocess.run(["qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw], check=True, timeout=30)
        return hashlib.sha256(raw.read_bytes()).hexdigest()[:16]


def main():
    crash.without_userfaultfd()
    name, *how = sys.argv[1:]
    run = Export(SHAPES[name], Place(Path(os.environ["HVMGR_CRASH_FOLDER"]) / name))
    started = time.monotonic()
    names = run.prepare()
    stride, first = (int(how[0]) if how else 1), (int(how[1]) if len(how) > 1 else 1)
    numbers = range(first, len(names) + 1, stride)
    for number in numbers:
        run.kill_at(number, names[number - 1])
    forked(lambda: crash._clear(run.place))
    print(f"{name}: {len(names)} acts, {len(numbers)} kills, {run.outcomes}, {time.monotonic() - started:.1f} s")
    for failure in run.failures:
        print(failure)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
