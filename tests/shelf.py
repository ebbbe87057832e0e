"""VMs that are made once by hvmgr's own commands and then put back for each test: their files, as they were, and libvirt's domains.

Making a VM with a few snapshots costs a second and a hundred syncs, putting one back a twentieth of that. Its paths hold
because the folder of a kind of test has the same name each time; each test process has a shelf of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_names: dict[str, Path] = {}
_kept: dict[tuple[object, Path], Path] = {}


@contextlib.contextmanager
def place(kind):
    """An empty folder that QEMU's user can pass: the same path each time, and gone afterwards."""
    folder = _names.get(kind)
    if folder is None or folder.exists():  # that of a test which could not clear it away is left alone
        folder = _names[kind] = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    else:
        folder.mkdir()
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def keep(key, folder, connection):
    """Everything in ``folder``, the host-wide index and the domains, all of them off, are kept under ``key``."""
    kept = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    _copy(folder, kept / "folder")
    if _index().exists():
        _copy(_index(), kept / "index")
    (kept / "domains.json").write_text(json.dumps([one.xml(live=False) for one in connection.domains()]))
    _kept[key, folder] = kept


def bring(key, folder, connection):
    """Puts back what was kept under ``key``, where nothing is yet; False when nothing was."""
    kept = _kept.get((key, folder))
    if kept is None:
        return False
    _copy(kept / "folder", folder)
    if (kept / "index").exists():
        _copy(kept / "index", _index())
    for text in json.loads((kept / "domains.json").read_text()):
        connection.define(text)
    return True


def clear():
    """Nothing is kept any more."""
    for kept in _kept.values():
        shutil.rmtree(kept)
    _kept.clear()


def _index():
    return Path(os.environ["HVMGR_INDEX"])


def _copy(source, target):
    """With owners, modes, times and holes."""
    subprocess.run(["cp", "-aT", source, target], check=True, timeout=60)
