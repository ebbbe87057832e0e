"""The command line in this process, on the embedded driver, with homes that QEMU's user can reach."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvmgr.faces import cli
from hvmgr.host import hypervisor
from tests import told

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Answer:
    """What one command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def lines(self):
        """The lines of stdout, each as its values."""
        return [line.split("\t") for line in self.out.splitlines()]


@pytest.fixture
def hvmgr(capsys):
    """``hvmgr(*arguments)``: the answer of the command line; ``hvmgr.ok`` expects that it goes well."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.run([str(one) for one in arguments])
        heard = capsys.readouterr()
        return Answer(code, heard.out, told.text(heard.err))

    def ok(*arguments):
        answer = call(*arguments)
        assert (answer.code, answer.err) == (0, ""), answer
        return answer

    call.ok = ok
    return call


@pytest.fixture
def root(embed_root, monkeypatch):
    """A root for homes, with the embedded driver as the connection; VMs and files go at the end."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    homes = folder / "homes"
    uri = f"qemu:///embed?root={embed_root}"
    monkeypatch.setenv("HVMGR_ROOT", str(homes))
    monkeypatch.setenv("HVMGR_INDEX", str(folder / "index"))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", uri)
    yield homes
    with hypervisor.opened(uri, wait_s=60) as connection:
        for domain in connection.domains():
            domain.destroy()
            domain.undefine(keep_nvram=False, keep_tpm=False)
    shutil.rmtree(folder)


@pytest.fixture
def vm(hvmgr, root):
    """A VM that is off, with one disk: its name."""
    name = f"web{next(_numbers)}"
    hvmgr.ok("vm", "create", name, "--memory", "64M", "--disk", "8M", "--network", "none", "--accel", "tcg")
    return name


@pytest.fixture
def branched(hvmgr, vm):
    """The VM with the snapshots one, two below it and three below one; Now is below three, two in the undo slot."""
    hvmgr.ok("snapshot", "create", vm, "one", "--notes", "the first")
    hvmgr.ok("snapshot", "create", vm, "two")
    hvmgr.ok("snapshot", "apply", vm, "one")
    hvmgr.ok("snapshot", "create", vm, "three")
    hvmgr.ok("snapshot", "apply", vm, "two")
    hvmgr.ok("snapshot", "apply", vm, "three")
    return vm


def files_of(root):
    """Every file below a folder with its bytes: to see that nothing was changed."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "lock"}
