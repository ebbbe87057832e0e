"""Three hosts on one machine: local connections, each with homes, an index, networks and a libvirtd of its own."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from hvmgr.host import hypervisor
from tests import collection, private_libvirt

# What takes long: whole playbooks but for ``patch``, the role, and ssh.
_LONG = ["test_connections.py", "test_fleet.py", "test_role.py"]
collect_ignore = [] if os.environ.get("HVMGR_ANSIBLE") == "all" else _LONG

HVMGR = Path(sys.executable).parent / "hvmgr"
_CALLBACK = Path(__file__).parent / "callback"


@dataclass
class KvmHost:
    """One host: ``executable`` is its hvmgr, which knows only of what is its own."""

    name: str
    place: Path
    uri: str

    @property
    def executable(self):
        return self.place / "hvmgr"

    @property
    def root(self):
        return self.place / "homes"

    def make(self):
        """What every module asks first is asked once; all else is hvmgr's own."""
        self.place.mkdir(mode=0o711)
        version = subprocess.run([HVMGR, "--json", "version"], capture_output=True, text=True, timeout=60, check=True)
        self.executable.write_text(
            f"#!/bin/sh\ncase \"$*\" in *' version') echo '{json.dumps(json.loads(version.stdout))}'; exit 0;; esac\n"
            f"export HVMGR_INDEX={self.place}/index HVMGR_RUN={self.place}/run HVMGR_CRASH_AT=\n"
            f'exec {HVMGR} "$@"\n'
        )
        self.executable.chmod(0o755)

    def hvmgr(self, *words, code=0):
        """The document that the host's own hvmgr prints."""
        argv = [self.executable, "--json", "--wait=60", "-c", self.uri, "--root", self.root, *words]
        done = subprocess.run([str(one) for one in argv], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done
        return json.loads(done.stdout)

    def create(self, name):
        return self.hvmgr("vm", "create", name, "--memory=64M", "--disk=8M", "--network=none", "--accel=tcg")["vm"]

    def disk(self, name, slot="vda"):
        return self.hvmgr("vm", "show", name)["now"]["disks"][slot]

    def write(self, name, pattern):
        """A guest's bytes on the disk of a VM that is off."""
        qemu_io(self.disk(name), f"write -P {pattern} 1M 64k")

    def holds(self, name, pattern):
        return "Pattern verification failed" not in qemu_io(self.disk(name), f"read -P {pattern} 1M 64k")


def qemu_io(path, command):
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", command, path], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


@dataclass
class Play:
    """What a run of ansible-playbook did."""

    code: int
    out: str
    records: list = field(default_factory=list)

    def changed(self, host=None):
        """The tasks that changed something, with their hosts."""
        return sorted(
            (one["host"], one["task"])
            for one in self.records
            if one["outcome"] == "ok" and one.get("changed") and host in (None, one["host"])
        )

    def failed(self):
        return [(one["host"], one["task"]) for one in self.records if one["outcome"] == "failed"]

    def of(self, task, host=None):
        """The records of a task."""
        return [one for one in self.records if one["task"] == task and host in (None, one["host"])]


@pytest.fixture(scope="session")
def ansible_home(request):
    """ansible's HOME, kept from one run to the next for the environments of ansible-test."""
    home = Path(request.config.cache.mkdir("ansible"))
    return home.resolve()


@pytest.fixture(scope="session")
def installed(tmp_path_factory, ansible_home):
    """The collection as built and installed: the folder for ANSIBLE_COLLECTIONS_PATH."""
    place = tmp_path_factory.mktemp("collection")
    return collection.install(collection.build(place, ansible_home), place, ansible_home)


@pytest.fixture(scope="session")
def new_host(new_embed_root, require, require_program):
    """``new_host(number)``: another host, with a libvirtd and networks of its own."""
    require(os.geteuid() == 0, "daemons in namespaces of their own need root")
    require_program("libvirtd")
    place = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    place.chmod(0o711)
    with contextlib.ExitStack() as stack:

        def make(number):
            daemon = stack.enter_context(private_libvirt.daemon(new_embed_root(), own_network=True))
            host = KvmHost(f"kvm{number}", place / f"kvm{number}", daemon.uri)
            host.make()
            return host

        yield make
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def first(new_host):
    """The host that most tests need alone."""
    return new_host(1)


@pytest.fixture(scope="session")
def fleet(first, new_host):
    """The three hosts, kvm1 to kvm3."""
    return [first, new_host(2), new_host(3)]


def clean(host):
    """No VM and no file is left of what a test did with the host."""
    with hypervisor.opened(host.uri, wait_s=60) as connection:
        for domain in connection.domains():
            domain.destroy()
            if connection.find_domain(domain.uuid) is not None:
                domain.undefine(keep_nvram=False, keep_tpm=False)
    for path in host.place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


@pytest.fixture
def hosts(fleet):
    """The three hosts without any VM."""
    yield fleet
    for host in fleet:
        clean(host)


@pytest.fixture
def kvm1(first):
    """The first of them alone, without any VM."""
    yield first
    clean(first)


@pytest.fixture
def play(player, hosts):
    """``play(playbook, …)`` on the three hosts."""
    return player(hosts)


@pytest.fixture
def player(installed, ansible_home, tmp_path):
    """``player(hosts)(playbook, …)``: a run of ansible-playbook; names with dots are the collection's own playbooks."""
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}

    def inventory_of(hosts):
        variables = {
            host.name: {
                "hvmgr_executable": str(host.executable),
                "hvmgr_uri": host.uri,
                "hvmgr_root": str(host.root),
                "place": str(host.place),
            }
            for host in hosts
        }
        inventory = tmp_path / "hosts.yml"
        inventory.write_text(yaml.safe_dump({"kvm": {"hosts": variables, "vars": local}}))
        return inventory

    def on(hosts):
        inventory = inventory_of(hosts)

        def run(playbook, *words, inventories=(), **extra):
            argv = [collection.program("ansible-playbook"), "-i", inventory]
            argv += [word for one in inventories for word in ("-i", one)]
            argv += ["-e", json.dumps(extra), *words, playbook]
            done = collection.run(argv, cwd=tmp_path, home=ansible_home, **settings(installed))
            records = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RECORD ")]
            return Play(done.returncode, done.stdout + done.stderr, records)

        return run

    return on


def settings(installed):
    """Where Ansible finds the collection, and how it tells what it did."""
    return {
        "ANSIBLE_COLLECTIONS_PATH": str(installed),
        "ANSIBLE_CALLBACK_PLUGINS": str(_CALLBACK),
        "ANSIBLE_STDOUT_CALLBACK": "recorder",
        "ANSIBLE_DEPRECATION_WARNINGS": "0",
        "ANSIBLE_FORKS": "3",
        "ANSIBLE_PIPELINING": "1",
    }


@dataclass
class Result:
    """What one module run gave."""

    code: int
    facts: dict

    @property
    def changed(self):
        assert self.code == 0, self.facts
        return self.facts["changed"]


@pytest.fixture
def module(installed, kvm1, tmp_path, monkeypatch, capsys):
    """``module(name, **arguments)``: one module on kvm1; in this process, because a start of Python's costs more than it."""
    from ansible.module_utils import basic
    from ansible.module_utils.common import warnings

    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.chdir(tmp_path)

    def run(name, /, *, check_mode=False, **arguments):
        given = {"executable": str(kvm1.executable), "uri": kvm1.uri, "root": str(kvm1.root), "wait": 60, **arguments}
        given = {key: value for key, value in given.items() if value is not None}
        document = {"ANSIBLE_MODULE_ARGS": {**given, "_ansible_check_mode": check_mode, "_ansible_diff": True}}
        monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps(document).encode())
        monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
        warnings._global_warnings.clear()
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"ansible_collections.hvmgr.hvmgr.plugins.modules.{name}").main()
        return Result(ended.value.code or 0, json.loads(capsys.readouterr().out))

    return run


@pytest.fixture
def thrice(module):
    """Check, run, run again: what the check said is what the run did, and the second run does nothing."""

    def run(name, /, **arguments):
        foreseen = module(name, check_mode=True, **arguments)
        done = module(name, **arguments)
        again = module(name, **arguments)
        assert foreseen.changed
        assert done.changed
        assert foreseen.facts["diff"] == done.facts["diff"]
        assert not again.changed
        assert again.facts["diff"]["before"] == again.facts["diff"]["after"]
        return done.facts

    return run
