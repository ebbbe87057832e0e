"""Over ssh as an ordinary user who becomes root, with HVMGR_ANSIBLE=all: an sshd on the loopback, and ``async``.

Users, their rights and keys are those of a mount namespace: nothing of the machine is changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from tests import collection
from tests.ansible.conftest import Play, settings

USER = "hvmgr-admin"
UID = "61234"
PLAY = """
- hosts: kvm
  gather_facts: false
  become: true
  module_defaults:
    group/hvmgr.hvmgr.all:
      executable: "{{ hvmgr_executable }}"
      uri: "{{ hvmgr_uri }}"
      root: "{{ hvmgr_root }}"
  tasks:
    - name: Be nobody without become
      ansible.builtin.command: id -u
      become: false
      changed_when: false
    - name: Make a VM
      hvmgr.hvmgr.vm: {name: web, memory: 64M, disks: [8M], networks: [none], accel: tcg}
    - name: Export it while nobody waits
      hvmgr.hvmgr.vm_export: {vm: web, dest: "{{ place }}/out"}
      async: 300
      poll: 0
      register: going
      when: not ansible_check_mode
    - name: Come back for it
      ansible.builtin.async_status: {jid: "{{ going.ansible_job_id }}"}
      register: export
      until: export is finished
      retries: 300
      delay: 1
      when: not ansible_check_mode
    - name: Export a disk while somebody waits
      hvmgr.hvmgr.disk_export: {vm: web, slot: vda, dest: "{{ place }}/web.qcow2"}
      async: 300
      poll: 1
      when: not ansible_check_mode
    - name: Refuse what is wrong
      hvmgr.hvmgr.snapshot_apply: {vm: web, name: none}
      async: 300
      poll: 1
      ignore_errors: true
      when: not ansible_check_mode
"""


@pytest.fixture
def guest_of_root(require):
    """``(port, key)`` of an sshd that knows one ordinary user more than the machine; he may become root."""
    require(os.geteuid() == 0, "an sshd in a namespace of its own needs root")
    sshd, sudo = (shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("sshd", "sudo"))
    require(
        sshd is not None and sudo is not None,
        "Debian's openssh-server and sudo are needed, and nothing else needs them",
    )
    place = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    place.chmod(0o711)  # sshd reads keys with the user's rights
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True, timeout=60)
    home = place / "home"
    home.mkdir()
    for name, line in (
        ("passwd", f"{USER}:x:{UID}:{UID}::{home}:/bin/sh"),
        ("group", f"{USER}:x:{UID}:"),
        ("shadow", f"{USER}:*:19000:0:99999:7:::"),
        ("sudoers", f"{USER} ALL=(ALL) NOPASSWD: ALL"),
    ):
        shutil.copy2(f"/etc/{name}", place / name)
        with (place / name).open("a") as file:
            file.write(f"\n{line}\n" if name == "sudoers" else f"{line}\n")
    os.chown(home, int(UID), int(UID))
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    (place / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {place}/key.pub\nStrictModes no\n"
        f"PidFile none\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin no\n"
    )
    binds = "".join(f"mount --bind {place}/{name} /etc/{name} && " for name in ("passwd", "group", "shadow", "sudoers"))
    script = f"{binds}mkdir -p /run/sshd && exec {sshd} -D -e -f {place}/config"
    with (place / "log").open("w") as log:
        server = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script],
            stdin=subprocess.DEVNULL,
            stderr=log,
            stdout=log,
        )
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            time.sleep(0.1)
        assert server.poll() is None, (place / "log").read_text()
        yield port, place / "key"
    finally:
        server.terminate()
        server.wait(timeout=60)
        shutil.rmtree(place, ignore_errors=True)


def test_ordinary_user_by_ssh_becomes_root_and_need_not_wait(installed, ansible_home, guest_of_root, kvm1, tmp_path):
    port, key = guest_of_root
    kvm1.place.parent.chmod(0o711)
    variables = {
        "ansible_host": "127.0.0.1",
        "ansible_port": port,
        "ansible_user": USER,
        "ansible_ssh_private_key_file": str(key),
        "ansible_ssh_args": "-o ControlMaster=no",  # nothing lives on when the test is over
        "ansible_ssh_common_args": "-F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
        "ansible_python_interpreter": "/usr/bin/python3",
        "hvmgr_executable": str(kvm1.executable),
        "hvmgr_uri": kvm1.uri,
        "hvmgr_root": str(kvm1.root),
        "place": str(kvm1.place),
    }
    inventory, playbook = tmp_path / "hosts.yml", tmp_path / "play.yml"
    inventory.write_text(yaml.safe_dump({"kvm": {"hosts": {"kvm1": variables}}}))
    playbook.write_text(PLAY)

    def play(*words):
        argv = [collection.program("ansible-playbook"), "-i", inventory, *words, playbook]
        done = collection.run(argv, cwd=tmp_path, home=ansible_home, **settings(installed))
        records = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RECORD ")]
        assert done.returncode == 0, done.stdout + done.stderr
        return Play(done.returncode, done.stdout, records)

    assert play("--check").changed() == [("kvm1", "Make a VM")]
    first = play()
    assert first.of("Be nobody without become")[0]["stdout"] == UID
    assert ("kvm1", "Come back for it") in first.changed()
    assert ("kvm1", "Export a disk while somebody waits") in first.changed()
    assert first.failed() == [("kvm1", "Refuse what is wrong")]
    assert first.of("Refuse what is wrong")[0]["error"]["code"] == "NotFound"
    assert (kvm1.place / "out" / "web" / "SHA256SUMS").is_file()
    # What nobody waits for is told as changed by Ansible itself; what came of it is not.
    assert play().changed() == [("kvm1", "Export it while nobody waits")]
