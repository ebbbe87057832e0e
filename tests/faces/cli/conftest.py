"""The command line in this process, on the embedded driver, with homes that QEMU's user can reach."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import pytest

from hvmgr.faces import cli
from hvmgr.host import hypervisor
from tests import shelf, told


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
    uri = f"qemu:///embed?root={embed_root}"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", uri)
    with shelf.place("cli") as folder:
        homes = folder / "homes"
        monkeypatch.setenv("HVMGR_ROOT", str(homes))
        monkeypatch.setenv("HVMGR_INDEX", str(folder / "index"))
        yield homes
        with hypervisor.opened(uri, wait_s=60) as connection:
            for domain in connection.domains():
                domain.destroy()
                domain.undefine(keep_nvram=False, keep_tpm=False)


@pytest.fixture
def kept(hvmgr, root):
    """``kept(make)``: the VM whose name ``make(hvmgr)`` gives, made by the first test that asks and put back for the others."""

    def find(make):
        with hypervisor.opened(os.environ["LIBVIRT_DEFAULT_URI"], wait_s=60) as connection:
            if not shelf.bring(make, root.parent, connection):
                make(hvmgr)
                shelf.keep(make, root.parent, connection)
        return NAME

    return find


NAME = "web1"


@pytest.fixture
def vm(kept):
    """A VM that is off, with one disk: its name."""
    return kept(make)


@pytest.fixture
def branched(kept):
    """The VM with the snapshots one, two below it and three below one; Now is below three, two in the undo slot."""
    return kept(make_branched)


def make(hvmgr):
    hvmgr.ok("vm", "create", NAME, "--memory", "64M", "--disk", "8M", "--network", "none", "--accel", "tcg")


def make_branched(hvmgr):
    vm = NAME
    make(hvmgr)
    hvmgr.ok("snapshot", "create", vm, "one", "--notes", "the first")
    hvmgr.ok("snapshot", "create", vm, "two")
    hvmgr.ok("snapshot", "apply", vm, "one")
    hvmgr.ok("snapshot", "create", vm, "three")
    hvmgr.ok("snapshot", "apply", vm, "two")
    hvmgr.ok("snapshot", "apply", vm, "three")


def files_of(root):
    """Every file below a folder with its bytes: to see that nothing was changed."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "lock"}
