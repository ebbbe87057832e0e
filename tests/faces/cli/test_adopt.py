"""``vm adopt`` from the command line, on the embedded driver."""

from __future__ import annotations

import subprocess
import uuid

import pytest

import hvmgr as package
from hvmgr.faces.cli import run
from tests.faces.cli.conftest import files_of

DISKS_ONLY = 16


@pytest.fixture
def foreign(root):
    """``foreign(name, snapshots…)``: a VM of libvirt's own, off, with external snapshots."""

    def make(name, *snapshots, shareable=False):
        image = root.parent / f"{name}.raw"
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", image, "1M"], check=True, timeout=60)
        with package.Host.open(root=root) as host:
            domain = host.connection.define(
                f"<domain type='qemu'><name>{name}</name><uuid>{uuid.uuid4()}</uuid><memory unit='MiB'>16</memory>"
                "<os><type>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' type='raw'/>"
                f"<source file='{image}'/>{'<shareable/>' if shareable else ''}<target dev='vda' bus='virtio'/></disk>"
                "</devices></domain>"
            )
            for one in snapshots:
                domain._handle().snapshotCreateXML(f"<domainsnapshot><name>{one}</name></domainsnapshot>", DISKS_ONLY)
        return name

    return make


def test_one_vm(hvmgr, foreign, root):
    foreign("web", "one", "two")
    assert hvmgr.ok("vm", "adopt", "web").out == f"adopted web; its home is {root}/web, with 2 snapshots\n"
    shown = hvmgr.ok("snapshot", "list", "web", "--json").json["snapshots"]
    assert [one["name"] for one in shown] == ["one", "two"]
    again = hvmgr("vm", "adopt", "web")
    assert (again.code, again.out) == (4, "")
    assert "managed by hvmgr already" in again.err


def test_dry_run_shows_all_and_changes_nothing(hvmgr, foreign, root):
    foreign("web", "one")
    before = files_of(root.parent)
    told = hvmgr.ok("vm", "adopt", "web", "--dry-run").out
    for sentence in (
        "adoption of web:",
        "make the home",
        "define the configuration",
        "libvirt's note of its snapshot 'one'",
    ):
        assert sentence in told
    plan = hvmgr.ok("vm", "adopt", "web", "--dry-run", "--json").json["plan"]
    assert (plan["operation"], plan["switch"]["step"]) == ("vm adopt", "Define")
    assert files_of(root.parent) == before
    assert not (root / "web").exists()


def test_all_adopts_what_can_be_and_names_the_rest(hvmgr, foreign, root):
    for name in ("db", "web"):
        foreign(name)
    foreign("cluster", shareable=True)
    before = files_of(root.parent)
    dry = hvmgr("vm", "adopt", "--all", "--dry-run", "--json")
    assert [one["subject"] for one in dry.json["plans"]] == ["adoption of db", "adoption of web"]
    assert (dry.code, files_of(root.parent)) == (5, before)
    answer = hvmgr("vm", "adopt", "--all", "--json")
    assert answer.code == 5
    assert [one["name"] for one in answer.json["adopted"]] == ["db", "web"]
    (refused,) = answer.json["refused"]
    assert (refused["name"], refused["error"]["code"]) == ("cluster", "Unsupported")
    assert "--exclude-disk vda" in refused["error"]["hint"]
    left_out = hvmgr("vm", "adopt", "cluster", "--exclude-disk", "vda")
    assert left_out.out.startswith("adopted cluster;")
    assert "disk vda takes no part in snapshots" in left_out.err
    assert hvmgr.ok("vm", "adopt", "--all").out == "nothing to do\n"
    assert hvmgr.ok("vm", "adopt", "--all", "--json").json["changed"] is False


def test_several_names_say_each(hvmgr, foreign, root):
    foreign("web")
    answer = hvmgr("vm", "adopt", "web", "nobody")
    assert answer.code == 3
    assert answer.out == f"adopted web; its home is {root}/web\n"
    assert "no VM 'nobody'" in answer.err


def test_home_counts_from_where_the_user_is(hvmgr, foreign, root, monkeypatch):
    foreign("web")
    monkeypatch.chdir(root.parent)
    told = hvmgr.ok("vm", "adopt", "web", "--home", "own", "--json").json
    assert told["adopted"][0]["home"] == str(root.parent / "own")
    assert hvmgr.ok("vm", "list").lines[0][0] == "web"


@pytest.mark.parametrize(
    "words",
    [[], ["web", "--all"], ["web", "db", "--home", "x"], ["--all", "--home", "x"], ["web", "--exclude-disk"]],
)
def test_wrong_requests(hvmgr, root, words):
    assert hvmgr("vm", "adopt", *words).code == 2


def test_shell_completes_names_that_libvirt_has(foreign, root, monkeypatch, capsys):
    foreign("web")
    foreign("mail")
    monkeypatch.setenv("_HVMGR_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "hvmgr vm adopt w")
    monkeypatch.setenv("COMP_CWORD", "3")
    with pytest.raises(SystemExit):
        run([])
    assert capsys.readouterr().out == "plain,web\n"
