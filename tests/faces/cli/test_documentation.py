"""Help and docs/commands.md say what there is: every command, every option, every key of every JSON document."""

from __future__ import annotations

import io
import json
import re
import subprocess
from pathlib import Path

import click
import pytest

import hvmgr as package
from hvmgr.faces.cli import groups
from hvmgr.faces.cli import root as commands_root
from hvmgr.faces.cli.request import Request

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "commands.md").read_text("utf-8")
SHAPES = {
    name: json.loads(text)
    for name, text in re.findall(r"<!-- shape: ([\w -]+) -->\n```json\n(.*?)```", PAGE, re.DOTALL)
}
BY_SLOT = "disks"  # a mapping whose keys are data, when it is no list


def commands(command=commands_root.command, context=None):
    """Every command with its words, groups included."""
    context = context or click.Context(command, info_name="hvmgr", obj=Request())
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        inner = click.Context(found, info_name=name, parent=context)
        yield inner
        if isinstance(found, click.Group):
            yield from commands(found, inner)


COMMANDS = {context.command_path: context for context in commands()}
LEAVES = {path: context for path, context in COMMANDS.items() if not isinstance(context.command, click.Group)}


def section(path):
    """The part of the page that is about one command."""
    words = path.removeprefix("hvmgr ")
    found = re.search(rf"^##+ {words}\b.*?(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/commands.md has no part about {words}"
    return found[0]


@pytest.mark.parametrize("path", COMMANDS)
class TestHelp:
    def test_begins_with_a_sentence(self, path):
        text = COMMANDS[path].command.help
        assert re.match(r"[A-Z][^\n]+[.:]", text or "")

    def test_is_complete(self, path, hvmgr):
        told = hvmgr.ok(*path.split()[1:], "--help").out
        assert "Exit codes:" in told
        assert "Global options:" in told
        assert max(map(len, told.splitlines())) <= 100
        if path in LEAVES:
            assert re.search(rf"Examples:\n +hvmgr .*{path.split()[-1]}", told)


@pytest.mark.parametrize("path", LEAVES)
class TestPage:
    def test_has_the_command(self, path):
        assert section(path)

    def test_names_every_option_and_argument(self, path):
        context = LEAVES[path]
        general = {option.name for option in groups.global_options()}
        for param in context.command.get_params(context):
            if param.name in general or "--help" in param.opts:
                continue
            if isinstance(param, click.Argument):
                assert param.make_metavar(context).strip("[]{}.").split("|")[0] in section(path)
            for option in (*param.opts, *param.secondary_opts):
                if option.startswith("-"):
                    assert re.search(rf"`{option}\b|\[{option}\b", section(path)), option


def test_page_names_every_global_option():
    for option in groups.global_options():
        assert all(f"`{word}" in PAGE for word in option.opts)


def test_page_has_every_exit_code():
    table = re.search(r"^## Exit codes\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[1]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(groups.EXIT_CODES)


def test_lists_of_commands_say_what_each_command_says():
    groups_of = {"hvmgr": commands_root.command} | {
        path: context.command for path, context in COMMANDS.items() if isinstance(context.command, click.Group)
    }
    for path, group in groups_of.items():
        for name, (_, line) in group.lazy.items():
            text = " ".join((COMMANDS[f"{path} {name}"].command.help or "").split("\n\n")[0].split())
            assert text.startswith(line.removesuffix(".")), name


def test_bare_command_lists_the_groups(hvmgr):
    told = hvmgr.ok().out
    assert all(re.search(rf"^  {name} +\S", told, re.MULTILINE) for name in ("vm", "snapshot", "space", "version"))


SHAPED = {
    "vm list": ["vm", "list"],
    "vm list details": ["vm", "list", "--details"],
    "vm show": ["vm", "show", "VM"],
    "vm create": ["vm", "create", "shaped", "--network", "none"],
    "vm set": ["vm", "set", "shaped", "--automatic-snapshots", "on", "--schedule", "hourly"],
    "automatic run": ["automatic", "run"],
    "vm adopt several": ["vm", "adopt", "--all", "--dry-run"],
    "vm adopt": ["vm", "adopt", "plain"],
    "import": ["import", "HOME", "--name", "imported"],
    "compare": ["compare", "HOME"],
    "disk localize": ["disk", "localize", "VM", "vda"],
    "disk convert": ["disk", "convert", "VM", "vda"],
    "disk info": ["disk", "info", "VM", "vda"],
    "disk export": ["disk", "export", "VM", "vda", "FILES/disk.vhd"],
    "disk import": ["disk", "import", "VM", "vda", "FILES/disk.vhd"],
    "vdi-create": ["vdi-create", "virtual-size=1MiB"],
    "vdi-snapshot": ["vdi-snapshot", "uuid=SNAPPED"],
    "vdi-list": ["vdi-list", "kind=snapshot"],
    "vdi-export": ["vdi-export", "uuid=SNAPPED", "filename=FILES/disk.raw"],
    "vdi-import": ["vdi-import", "uuid=FREE", "filename=FILES/disk.raw"],
    "vdi-destroy": ["vdi-destroy", "uuid=FREE"],
    "disk resize": ["disk", "resize", "VM", "vda", "9M"],
    "snapshots": ["snapshot", "list", "VM"],
    "snapshot create": ["snapshot", "create", "VM", "more"],
    "snapshot notes": ["snapshot", "notes", "VM", "one"],
    "snapshot apply": ["snapshot", "apply", "VM", "one"],
    "snapshot undo": ["snapshot", "undo", "VM"],
    "snapshot merge": ["snapshot", "merge", "VM"],
    "export": ["export", "VM", "OUT", "--no-checksums"],
    "verify": ["verify", "OUT"],
    "freeze": ["freeze", "VM", "--", "true"],
    "image create": ["image", "create", "FILES/child.vhd", "--parent", "FILES/base.vhd"],
    "image info": ["image", "info", "FILES/used.qcow2"],
    "image check": ["image", "check", "FILES/torn.vhd", "--repair"],
    "image compact": ["image", "compact", "FILES/user.qcow2"],
    "image reparent": ["image", "reparent", "FILES/child.vhd", "FILES/base.vhd"],
    "image prepare": ["image", "prepare", "FILES/new.raw", "--size", "16M"],
    "wim capture": ["wim", "capture", "FILES", "FILES.wim", "--compress", "none"],
    "wim info": ["wim", "info", "FILES.wim"],
    "wim apply": ["wim", "apply", "--rootfs", "FILES/tree", "FILES/root.raw", "--size", "16M"],
    "image generalize": ["image", "generalize", "FILES/root.raw"],
    "catalog add": ["catalog", "add", "FILES/base.vhd", "--answer", "FILES/answer", "--catalog", "FILES-catalog"],
    "catalog list": ["catalog", "list", "--catalog", "FILES-catalog"],
    "catalog deploy": [
        "catalog",
        "deploy",
        "base",
        "--to",
        "FILES/tree",
        "--without-answer",
        "--catalog",
        "FILES-catalog",
    ],
    "file list": ["file", "list", "/", "--image", "FILES/ext4.raw"],
    "file volumes": ["file", "list", "--image", "FILES/ext4.raw"],
    "file get": ["file", "get", "/a file", "--image", "FILES/ext4.raw", "--to", "FILES"],
    "file hash": ["file", "hash", "/", "--image", "FILES/ext4.raw"],
    "file put": ["file", "put", "with-files", "FILES/answer", "/"],
    "file find index": ["file", "find", "holding", "/", "--name", "a file", "--index"],
    "file index": ["file", "index", "VM"],
    "file diff": ["file", "diff", "--image", "FILES/ext4.raw", "--image", "FILES/later.raw"],
    "space": ["space", "VM"],
    "plan": ["snapshot", "create", "VM", "--dry-run"],
    "snapshot delete": ["snapshot", "delete", "VM", "two"],
    "hook install": ["hook", "install", "--dir", "DIR"],
    "hook uninstall": ["hook", "uninstall", "--dir", "DIR"],
    "hook allow": ["hook", "allow", "VM", "--once"],
    "doctor": ["doctor", "VM", "--repair"],
    "user add": ["user", "add", "backup", "--users", "USERS"],
    "user list": ["user", "list", "--users", "USERS"],
    "user remove": ["user", "remove", "backup", "--users", "USERS"],
    "config show": ["config", "show"],
    "completion": ["completion", "bash"],
    "version": ["version"],
    "error": ["vm", "show", "nobody"],
    "vm delete": ["vm", "delete", "shaped"],
    "vm release": ["vm", "release", "VM"],
}


@pytest.fixture
def due(hvmgr, branched, ahead):
    """A VM whose turn has come, but whose undo slot holds something; that of 'vm set' in the test comes as well."""
    hvmgr.ok("vm", "set", branched, "--automatic-snapshots", "on", "--schedule", "hourly")
    (image,) = hvmgr.ok("vm", "show", branched, "--json").json["now"]["disks"].values()
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", image], check=True, capture_output=True, timeout=60)
    ahead(2)


@pytest.fixture
def ailing(branched, root):
    """A VM with something to repair, and something that stays: for lists that must not be empty."""
    (home,) = [one for one in root.iterdir() if one.name == branched]
    (home / "Virtual Machines").chmod(0o755)
    (home / "stray").write_text("nobody knows it")
    return branched


@pytest.fixture
def files(hvmgr, tmp_path):
    """Image files: bases, one of which has a child, and one that is damaged."""
    folder = tmp_path / "files"
    folder.mkdir()
    hvmgr.ok("image", "create", folder / "base.vhd", "--size", "4M")
    hvmgr.ok("image", "create", folder / "used.qcow2", "--size", "4M")
    hvmgr.ok("image", "create", folder / "user.qcow2", "--parent", folder / "used.qcow2")
    hvmgr.ok("image", "create", folder / "torn.vhd", "--size", "4M")
    with (folder / "torn.vhd").open("r+b") as file:
        file.seek(64)
        file.write(b"junk")
    (folder / "answer").write_text("#cloud-config")
    (folder / "tree" / "etc").mkdir(parents=True)
    (folder / "tree" / "etc" / "machine-id").write_text("0123456789abcdef")
    (folder / "tree" / "a file").write_text("text")
    for name in ("ext4.raw", "later.raw"):
        subprocess.run(["mke2fs", "-q", "-d", folder / "tree", folder / name, "2M"], check=True, timeout=60)
        (folder / "tree" / "a file").write_text("another text")
    hvmgr.ok("vm", "create", "holding", "--memory", "64M", "--disk", folder / "ext4.raw", "--network", "none")
    hvmgr.ok("snapshot", "create", "holding", "a")
    return folder


@pytest.mark.usefixtures("ailing", "due")
def test_documents_have_exactly_the_documented_keys(hvmgr, branched, root, tmp_path, files, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a long password\n"))
    with package.Host.open(root=root) as host:
        host.connection.define(
            "<domain type='qemu'><name>plain</name><memory>65536</memory><os><type>hvm</type></os></domain>"
        )
        free, snapped = host.disks.create(8 << 20), host.vm(branched).home.facts().disks[0].id
    hvmgr.ok("vm", "create", "with-files", "--disk", files / "ext4.raw", "--network", "none", "--accel", "tcg")
    assert set(SHAPED) == set(SHAPES)
    meant = {"VM": branched, "DIR": tmp_path / "hooks", "OUT": tmp_path / "out", "HOME": root / branched}
    meant["USERS"] = tmp_path / "users.json"
    words_in = {"FILES": str(files), "FREE": free, "SNAPPED": snapped}
    for name, words in SHAPED.items():
        said = [meant.get(word, re.sub("|".join(words_in), lambda found: words_in[found[0]], word)) for word in words]
        answer = hvmgr("--json", *said)
        assert keys(answer.json) == keys(SHAPES[name]), name


def keys(value, name=""):
    """The shape of a document: names of keys, for lists that of their first item, for all else nothing."""
    if name in ("prepare", "switch", "finish", "hold", "facts", "orphans", "by_name", "left", "ignored"):
        return None
    if isinstance(value, list):
        return [keys(value[0])] if value and not isinstance(value[0], str) else []
    if not isinstance(value, dict):
        return None
    if name == BY_SLOT:
        return {"slot": None}
    return {key: keys(inner, key) for key, inner in value.items()}
