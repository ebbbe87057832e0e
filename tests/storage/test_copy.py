"""Large files copied: every byte, no block more than needed, and nothing half-done under a target's name."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.storage import copy, durable
from hvmgr.storage.copy import Job
from hvmgr.storage.finished import Notes

MIB = 1 << 20


def sparse(path, size, *data):
    """A file with a hole everywhere but at (offset, bytes)."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in data:
            file.seek(offset)
            file.write(content)
    return path


def one(source, target, **how):
    return copy.copy_files([Job(source, target, **how)])[target]


def sha256sum(path):
    return subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True, timeout=60).stdout[:64]


def taken(path):
    os.sync()
    return path.stat().st_blocks * 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("copy")


pieces = st.tuples(st.integers(0, 3 * MIB), st.sampled_from([1, 511, 4096, 65536, 70000]), st.booleans())


@given(st.integers(0, 3 * MIB), st.lists(pieces, max_size=4), st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_copy_has_the_same_bytes_and_the_hash_that_sha256sum_tells(folder, size, data, hashed):
    content = [(at, (b"\0" if zeros else b"\xa5") * length) for at, length, zeros in data]
    source = sparse(folder / "source", size, *content)
    target = folder / "target"
    made = one(source, target, hashed=hashed)
    assert target.read_bytes() == source.read_bytes()
    assert made.size == source.stat().st_size
    assert made.sha256 == (hashlib.sha256(source.read_bytes()).hexdigest() if hashed else None)
    assert copy.sha256(target) == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("hashed", [True, False])
def test_large_file_keeps_its_holes(tmp_path, hashed):
    source = sparse(tmp_path / "s", 1 << 40 if not hashed else 64 * MIB, (20 * MIB, os.urandom(9 * MIB)))
    made = one(source, tmp_path / "t", hashed=hashed)
    assert taken(tmp_path / "t") <= 10 * MIB
    assert made.size == (tmp_path / "t").stat().st_size == source.stat().st_size
    if hashed:
        assert made.sha256 == sha256sum(tmp_path / "t")


def test_blocks_of_zeros_become_holes(tmp_path):
    source = sparse(tmp_path / "s", 8 * MIB, (0, bytes(8 * MIB)), (3 * MIB, b"x"))
    assert taken(source) == 8 * MIB
    made = one(source, tmp_path / "t")
    assert taken(tmp_path / "t") <= 128 << 10
    assert made.sha256 == sha256sum(source)


def test_several_files_at_once_keep_apart(tmp_path):
    jobs = []
    for number in range(12):
        source = sparse(tmp_path / f"s{number}", (number + 1) * MIB, (number << 16, os.urandom(MIB)))
        jobs.append(Job(source, tmp_path / f"t{number}"))
    made = copy.copy_files(jobs, workers=3)
    for job in jobs:
        assert job.target.read_bytes() == job.source.read_bytes()
        assert made[job.target].sha256 == sha256sum(job.source)


def test_mode_is_the_wanted_one(tmp_path):
    one(sparse(tmp_path / "s", 10), tmp_path / "t", mode=0o440)
    assert (tmp_path / "t").stat().st_mode & 0o7777 == 0o440


def test_progress_ends_at_the_whole(tmp_path):
    jobs = [Job(sparse(tmp_path / str(n), 3 * MIB, (0, os.urandom(3 * MIB))), tmp_path / f"t{n}") for n in range(3)]
    seen = []
    copy.copy_files(jobs, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (9 * MIB, 9 * MIB)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


class TestSharing:
    def test_copy_shares_all_blocks_and_is_hashed(self, sharing):
        source = sparse(sharing / "s", 64 * MIB, (MIB, os.urandom(40 * MIB)))
        os.sync()
        before = os.statvfs(sharing).f_bavail
        made = one(source, sharing / "t")
        assert made.shared
        assert made.sha256 == sha256sum(sharing / "t")
        os.sync()
        stat = os.statvfs(sharing)
        assert (before - stat.f_bavail) * stat.f_frsize < 4 * MIB

    def test_time_without_hash_does_not_depend_on_the_size(self, sharing):
        source = sparse(sharing / "big", 1 << 42, (0, os.urandom(MIB)))
        start = time.process_time()
        made = one(source, sharing / "copy", hashed=False)
        assert made.shared
        assert made.sha256 is None
        assert time.process_time() - start < 1

    def test_another_file_system_is_copied_to(self, sharing, tmp_path):
        source = sparse(sharing / "from", 9 * MIB, (MIB, os.urandom(3 * MIB)))
        made = one(source, tmp_path / "to")
        assert not made.shared
        assert (tmp_path / "to").read_bytes() == source.read_bytes()


class TestFailure:
    def test_full_disk_leaves_nothing(self, small, tmp_path):
        (small / "kept").write_bytes(b"mine")
        source = sparse(tmp_path / "s", 30 * MIB, (0, os.urandom(30 * MIB)))
        with pytest.raises(errors.NoSpace, match="no space left"):
            one(source, small / "t")
        assert sorted(path.name for path in small.iterdir()) == ["kept", "lost+found"]

    def test_full_disk_stops_the_others(self, small, tmp_path):
        jobs = [Job(sparse(tmp_path / str(n), 9 * MIB, (0, os.urandom(9 * MIB))), small / f"t{n}") for n in range(4)]
        with pytest.raises(errors.NoSpace):
            copy.copy_files(jobs, workers=4)
        left = {path.name for path in small.iterdir()} - {"lost+found"}
        assert not any(name.startswith(durable.TEMPORARY) for name in left)
        assert all((small / name).read_bytes() == (tmp_path / name[1:]).read_bytes() for name in left)

    def test_stopping_leaves_whole_files_only(self, tmp_path):
        small, large = sparse(tmp_path / "a", 9), sparse(tmp_path / "b", 90 * MIB, (0, os.urandom(90 * MIB)))

        def stop(done, total):
            if (tmp_path / "ta").exists():
                raise errors.Cancelled("stopped")

        with pytest.raises(errors.Cancelled):
            copy.copy_files([Job(small, tmp_path / "ta"), Job(large, tmp_path / "tb")], on_progress=stop, workers=2)
        names = {path.name for path in tmp_path.iterdir()}
        assert names <= {"a", "b", "ta", "tb"}
        assert (tmp_path / "ta").read_bytes() == small.read_bytes()

    def test_missing_source_is_named(self, tmp_path):
        with pytest.raises(errors.NotFound, match="there is no "):
            one(tmp_path / "gone", tmp_path / "t")

    def test_source_that_changes_meanwhile_is_a_conflict(self, tmp_path, monkeypatch):
        source = sparse(tmp_path / "s", 2 * MIB, (0, os.urandom(2 * MIB)))
        monkeypatch.setattr(copy, "_share", lambda *_: os.utime(source, ns=(1, 1)))
        with pytest.raises(errors.Conflict, match="was changed while it was copied"):
            one(source, tmp_path / "t")
        assert not (tmp_path / "t").exists()


class TestNotes:
    @pytest.fixture
    def notes(self, tmp_path):
        (tmp_path / "notes").mkdir()
        return Notes(tmp_path / "notes")

    @pytest.fixture
    def job(self, tmp_path):
        return Job(sparse(tmp_path / "s", 9 * MIB, (0, b"first")), tmp_path / "t")

    def again(self, job, notes):
        before = job.target.stat().st_ino
        made = copy.copy_files([job], notes=notes)[job.target]
        assert made.sha256 == sha256sum(job.source)
        assert job.target.read_bytes() == job.source.read_bytes()
        return job.target.stat().st_ino != before

    def test_finished_copy_is_taken_as_it_is(self, job, notes):
        copy.copy_files([job], notes=notes)
        assert not self.again(job, notes)

    def test_changed_source_is_copied_again(self, job, notes):
        copy.copy_files([job], notes=notes)
        sparse(job.source, 9 * MIB, (0, b"other"))
        assert self.again(job, notes)

    def test_changed_copy_is_made_again(self, job, notes):
        copy.copy_files([job], notes=notes)
        with job.target.open("r+b") as file:
            file.write(b"damage")
        assert self.again(job, notes)

    def test_copy_without_hash_is_made_again_when_one_is_wanted(self, job, notes):
        copy.copy_files([Job(job.source, job.target, hashed=False)], notes=notes)
        assert self.again(job, notes)

    def test_small_file_is_not_worth_a_note(self, tmp_path, notes):
        copy.copy_files([Job(sparse(tmp_path / "s", MIB), tmp_path / "t")], notes=notes)
        assert list(notes.folder.iterdir()) == []

    def test_damaged_note_means_nothing(self, job, notes):
        copy.copy_files([job], notes=notes)
        for note in notes.folder.iterdir():
            note.write_text("{")
        assert self.again(job, notes)


PROGRAM = """
import resource, sys
from pathlib import Path
from hvmgr.storage import copy
from hvmgr.storage.copy import Job
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
copy.copy_files([Job(Path(name), Path(name + ".copy")) for name in sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


def test_memory_does_not_grow_with_the_files(tmp_path):
    files = [sparse(tmp_path / f"{n}", 100 * MIB, (0, os.urandom(MIB) * 70)) for n in range(5)]
    root = Path(copy.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, files)],
        check=True, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert int(done.stdout) < 40 << 10  # KiB
