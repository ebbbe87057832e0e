"""The role that installs hvmgr, on this machine, into folders of its own: nothing of the machine is changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hvmgr import __version__
from tests import collection
from tests.ansible.conftest import Play, settings

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = "/usr/bin/python3"


PRETENDED = """
from ansible.module_utils.basic import AnsibleModule
import json
module = AnsibleModule(argument_spec={"facts": {"type": "dict"}, "name": {"type": "raw"}, "state": {}, "enabled": {},
                                      "enablerepo": {"type": "list"}, "use_backend": {}}, supports_check_mode=True)
if module.params["facts"]:
    module.exit_json(ansible_facts=module.params["facts"])
module.exit_json(changed=True, msg=json.dumps({"name": module.params["name"], "repositories": module.params["enablerepo"]}))
"""
SYSTEMS = {
    "rhel9": ("RedHat", "9", "x86_64"),
    "rocky9": ("Rocky", "9", "aarch64"),
    "stream10": ("CentOS", "10", "x86_64"),
    "arch": ("Archlinux", "2026", "x86_64"),
}


@pytest.fixture
def wheel(tmp_path):
    argv = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        ROOT,
    ]
    subprocess.run([str(one) for one in argv], check=True, timeout=120, stdin=subprocess.DEVNULL)
    (made,) = tmp_path.glob("hvmgr-*.whl")
    return made


def test_installs_once(installed, ansible_home, tmp_path, wheel, require):
    seen = subprocess.run([SYSTEM, "-c", "import apt, libvirt, lxml, yaml"], check=False, capture_output=True)
    require(
        seen.returncode == 0,
        "Debian's python3-apt, python3-libvirt, python3-lxml, python3-yaml: make setup installs them",
    )
    places = {name: str(tmp_path / name) for name in ("prefix", "link", "root", "hook_folder")}
    wanted = {f"hvmgr_host_{name}": place for name, place in places.items()} | {"hvmgr_host_package": str(wheel)}
    wanted |= {"hvmgr_host_start_libvirt": False, "hvmgr_host_restart_libvirt": False}
    playbook = tmp_path / "role.yml"
    task = {"hosts": "localhost", "gather_facts": False, "roles": ["hvmgr.hvmgr.host"], "vars": wanted}
    playbook.write_text(yaml.safe_dump([task]))

    def play(*words):
        argv = [
            collection.program("ansible-playbook"),
            "-i",
            "localhost,",
            "-c",
            "local",
            "-e",
            f"ansible_python_interpreter={SYSTEM}",
        ]
        done = collection.run([*argv, *words, playbook], cwd=tmp_path, home=ansible_home, **settings(installed))
        records = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RECORD ")]
        assert done.returncode == 0, done.stdout + done.stderr
        return Play(done.returncode, done.stdout, records)

    made = [task for _, task in play("--diff").changed()]
    assert made == sorted(
        ["Install hvmgr", "Make hvmgr known in PATH", "Make the folder for homes", "Install the hook"]
    ), "the packages are there: .ci/setup brings the same"
    assert play().changed() == []
    told = subprocess.run(
        [places["link"], "--json", "version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert json.loads(told)["version"] == __version__
    assert places["prefix"] in (tmp_path / "hook_folder" / "qemu.d" / "50-hvmgr").read_text()


def test_foresees_what_it_would_install_on_the_rhel_family(installed, ansible_home, tmp_path):
    """No such system is here: the facts are invented, and what would be asked of dnf and systemd is written down."""
    library = tmp_path / "library"
    library.mkdir()
    for name in ("pretend", "dnf", "systemd"):
        (library / f"{name}.py").write_text(PRETENDED)
    facts = {
        host: {
            "ansible_distribution": system,
            "ansible_distribution_major_version": version,
            "ansible_architecture": machine,
            "ansible_os_family": "RedHat" if host != "arch" else "Archlinux",
            "ansible_pkg_mgr": "dnf",
            "ansible_service_mgr": "systemd",
        }
        for host, (system, version, machine) in SYSTEMS.items()
    }
    local = {"ansible_connection": "local", "ansible_python_interpreter": SYSTEM}
    inventory, playbook = tmp_path / "hosts.yml", tmp_path / "role.yml"
    hosts = {host: {"pretended": each} for host, each in facts.items()}
    inventory.write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": local}}))
    task = {
        "hosts": "all",
        "gather_facts": False,
        "pre_tasks": [{"pretend": {"facts": "{{ pretended }}"}}],
        "roles": ["hvmgr.hvmgr.host"],
        "vars": {f"hvmgr_host_{name}": str(tmp_path / name) for name in ("prefix", "link", "root", "hook_folder")},
    }
    playbook.write_text(yaml.safe_dump([task]))
    argv = [collection.program("ansible-playbook"), "-i", inventory, "--check", "--diff", playbook]
    more = settings(installed) | {"ANSIBLE_LIBRARY": str(library)}
    done = collection.run(argv, cwd=tmp_path, home=ansible_home, **more)
    records = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RECORD ")]
    play = Play(done.returncode, done.stdout + done.stderr, records)
    assert play.failed() == [("arch", "Refuse what this role does not know")], play.out

    def asked(host):
        return json.loads(play.of("Install the packages", host)[0]["msg"])

    assert asked("rhel9")["repositories"] == ["codeready-builder-for-rhel-9-x86_64-rpms"]
    assert asked("rocky9")["repositories"] == ["crb"]
    assert asked("stream10")["repositories"] is None
    assert {"edk2-ovmf", "python3.11-devel", "libvirt-devel"} <= set(asked("rhel9")["name"])
    assert {"edk2-aarch64", "python3.11"} <= set(asked("rocky9")["name"])
    assert {"edk2-ovmf", "python3-libvirt"} <= set(asked("stream10")["name"])
    for host in ("rhel9", "rocky9", "stream10"):
        started = [json.loads(one["msg"])["name"] for one in play.of("Start libvirt", host) if one["outcome"] == "item"]
        assert {"virtqemud.socket", "virtnetworkd.socket"} <= set(started)
        assert {"Install the packages", "Install hvmgr", "Start libvirt"} <= {task for _, task in play.changed(host)}
