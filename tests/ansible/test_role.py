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
