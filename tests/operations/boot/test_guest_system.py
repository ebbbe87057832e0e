"""The kernel's modules as a system's disk holds them: damaged ones are refused with a sentence."""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass, field

import pytest

from hvmgr import errors
from hvmgr.operations.boot import guest_system
from hvmgr.operations.boot.guest_system import LinuxSystem, Place

FOLDER = "/lib/modules/6.1"
NAMES = ("loop", "dm_mod", "dm_snapshot", "dm_zero")


@dataclass
class Files:
    """A file system with these files, as far as modules are looked for."""

    found: dict[str, bytes] = field(default_factory=dict)
    what: str = "partition 1 of os.vhd"

    def read(self, path):
        return self.found.get(path)


def system(suffix, data, more=b""):
    files = Files({f"{FOLDER}/modules.dep": b"".join(f"k/{name}.ko{suffix}:\n".encode() for name in NAMES) + more})
    for name in NAMES:
        files.found[f"{FOLDER}/k/{name}.ko{suffix}"] = data
    place = Place(1, "gpt", files)
    return LinuxSystem(place, place, "6.1", "/boot/vmlinuz-6.1", "")


XZ, GZ = lzma.compress(b"module" * 99), gzip.compress(bytes(range(256)) * 9)


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        pytest.param(".xz", b"what", id="no-xz"),
        pytest.param(".xz", XZ[:-9], id="cut-xz"),
        pytest.param(".gz", b"what", id="no-gzip"),
        pytest.param(".gz", GZ[:-9], id="cut-gzip"),
        pytest.param(".gz", GZ[:10] + b"\xff" * 40, id="damaged-gzip"),
        pytest.param(".zst", b"what", id="no-zstd"),
    ],
)
def test_damaged_module_is_refused(suffix, data, require_program):
    if suffix == ".zst":
        require_program("zstd")
    with pytest.raises(errors.Corrupt, match=rf"partition 1 of os\.vhd.*loop\.ko\{suffix}"):
        guest_system.modules(system(suffix, data), ())


@pytest.mark.parametrize(("suffix", "data"), [(".xz", XZ), ("", b"module" * 99)], ids=["xz", "plain"])
def test_names_of_other_modules_may_be_anything(suffix, data):
    found = system(suffix, data, more=b"k/caf\xe9.ko:\n")
    found.root.files.found[f"{FOLDER}/modules.builtin"] = b"k/caf\xe9.ko\n"
    assert guest_system.modules(found, ()) == [(f"{name}.ko", b"module" * 99) for name in NAMES]
