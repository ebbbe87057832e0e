"""The playbooks and the inventory by Ansible's own programs: ``patch`` whole on three hosts, the others in check mode on one.

Whole they are in test_fleet.py.
"""

from __future__ import annotations

import sys

import pytest
import yaml

from tests import collection
from tests.ansible.conftest import settings


def test_gold_and_nightly_foresee_what_they_would_do(player, kvm1):
    kvm1.create("gold")
    kvm1.hvmgr("export", "gold", kvm1.place / "out")
    wanted = {"gold_export": "{{ place }}/out/gold", "gold_name": "web", "nightly_folder": "{{ place }}/nightly"}
    foreseen = player([kvm1])("hvmgr.hvmgr.gold", "--check", "--diff", "hvmgr.hvmgr.nightly", **wanted)
    assert foreseen.code == 0, foreseen.out
    assert foreseen.changed() == [("kvm1", "Export them"), ("kvm1", "Make the VM")]
    assert [one["name"] for one in kvm1.hvmgr("vm", "list")["vms"]] == ["gold"]
    assert not (kvm1.place / "nightly").exists()


@pytest.fixture
def guests(hosts, tmp_path):
    """A VM on each host, and the inventory that finds them; tasks that patch and check a disk."""
    for number, host in enumerate(hosts, 1):
        host.create(f"shop{number}")
        host.write(f"shop{number}", 1)
    asked = [
        {"name": one.name, "executable": str(one.executable), "uri": one.uri, "root": str(one.root)} for one in hosts
    ]
    local = {"ansible_connection": "'local'", "ansible_python_interpreter": f"'{sys.executable}'"}
    keyed = [{"key": "hvmgr_host", "prefix": "on"}]
    document = {
        "plugin": "hvmgr.hvmgr.vms",
        "hosts": asked,
        "compose": local,
        "groups": {"shops": "true"},
        "keyed_groups": keyed,
    }
    inventory = tmp_path / "shop.hvmgr.yml"
    inventory.write_text(yaml.safe_dump(document))
    (tmp_path / "patch.yml").write_text(PATCH)
    (tmp_path / "check.yml").write_text(CHECK)
    return inventory


PATCH = """
- name: Write the patch where it is not yet
  ansible.builtin.shell: >-
    disk=$(virsh -q -c '{{ hostvars[hvmgr_host].hvmgr_uri }}' domblklist '{{ hvmgr_name }}' | awk '{print $2}') &&
    { qemu-io -f qcow2 -c 'read -P 2 1M 64k' "$disk" || qemu-io -f qcow2 -c 'write -P 2 1M 64k' "$disk"; }
  register: written
  changed_when: "'wrote' in written.stdout | default('')"
- name: Lose the guest
  ansible.builtin.set_fact: {ansible_remote_tmp: /proc/none, ansible_pipelining: false}
  when: hvmgr_name == lost | default('')
- name: Go on with the patch
  ansible.builtin.command: /bin/true
  changed_when: false
  when: hvmgr_name == lost | default('')
"""
CHECK = """
- name: Be content
  ansible.builtin.assert:
    that: hvmgr_name != broken | default('')
    fail_msg: "{{ hvmgr_name }} is broken"
"""


def test_snapshot_patch_check_and_back(play, hosts, guests, tmp_path):
    wanted = {
        "guests": "shops",
        "patch_name": "before",
        "patch_tasks": str(tmp_path / "patch.yml"),
        "check_tasks": str(tmp_path / "check.yml"),
        "check_timeout": 2,
    }
    at_once = {"patch_serial": 3, "patch_max_fail_percentage": 100}

    def run(*words, **more):
        return play("hvmgr.hvmgr.patch", *words, inventories=[guests], **wanted | more)

    def patched():
        return [host.holds(f"shop{number}", 2) for number, host in enumerate(hosts, 1)]

    lost = run(lost="shop2")
    assert lost.code != 0
    assert [one["outcome"] for one in lost.of("Go on with the patch", "shop2")] == ["unreachable"], lost.out
    assert "shop2 is what it was at 'before'" in lost.of("Say why", "shop2")[0]["msg"]
    assert patched() == [True, False, False]
    assert lost.of("Take a snapshot", "shop3") == [], "no further after a failure"
    assert hosts[2].hvmgr("snapshot", "list", "shop3")["snapshots"] == []

    foreseen = run("--check", "--diff", "--limit", "shop1,shop3", **at_once)
    refuse = "Refuse to go back further than to this run"
    assert (foreseen.failed(), foreseen.changed()) == ([("shop1", refuse)], [("shop3", "Take a snapshot")])
    assert "patch_again=true" in foreseen.of(refuse, "shop1")[0]["msg"]
    assert hosts[2].hvmgr("snapshot", "list", "shop3")["snapshots"] == []

    broken = run(patch_again=True, broken="shop1", **at_once)
    assert broken.failed() == [("shop1", "Be content"), ("shop1", "Say why")], broken.out
    assert "shop1 is broken" in broken.of("Say why")[0]["msg"]
    assert patched() == [False, True, True]

    repaired = run(patch_again=True, **at_once)
    assert repaired.code == 0, repaired.out
    assert repaired.changed() == [("shop1", "Write the patch where it is not yet")]
    assert patched() == [True, True, True]


def unwrapped(value):
    """Text that Ansible is never to take for a template, as the inventory's list shows it."""
    return value["__ansible_unsafe"] if isinstance(value, dict) and "__ansible_unsafe" in value else value


class TestInventory:
    @pytest.fixture
    def listed(self, installed, ansible_home, tmp_path):
        def run(document, code=0, **variables):
            file = tmp_path / "my.hvmgr.yml"
            file.write_text(yaml.safe_dump({"plugin": "hvmgr.hvmgr.vms", **document}))
            argv = [collection.program("ansible-inventory"), "-i", file, "--list"]
            more = {**settings(installed), "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "1", **variables}
            done = collection.run(argv, cwd=tmp_path, home=ansible_home, **more)
            assert done.returncode == code, done
            return yaml.safe_load(done.stdout) if code == 0 else done.stderr

        return run

    def test_has_vms_with_their_facts_and_remembers_them(self, listed, kvm1, tmp_path):
        kvm1.create("{{ web }}")
        kvm1.hvmgr("snapshot", "create", "{{ web }}", "one")
        asked = {"name": "kvm1", "executable": str(kvm1.executable), "uri": kvm1.uri, "root": str(kvm1.root)}
        cache = {"cache": True, "cache_plugin": "ansible.builtin.jsonfile", "cache_connection": str(tmp_path / "cache")}
        wanted = {
            "hosts": [asked],
            "hostnames": "host_name",
            "keyed_groups": [{"key": "hvmgr_state", "prefix": "state"}],
            **cache,
        }
        told = listed(wanted)
        (name,) = told["state_off"]["hosts"]
        facts = {key: unwrapped(value) for key, value in told["_meta"]["hostvars"][name].items()}
        assert name == "{{ web }}.kvm1"
        assert (facts["hvmgr_snapshot"], facts["hvmgr_host"], facts["hvmgr_home"]) == (
            "one",
            "kvm1",
            str(kvm1.root / "{{ web }}"),
        )
        kvm1.executable.rename(kvm1.place / "away")
        try:
            assert listed(wanted) == told
            assert "there is no program" in listed({"hosts": [asked]}, code=1)
            assert "_meta" in listed({"hosts": [asked], "unreachable": "warn"})
        finally:
            (kvm1.place / "away").rename(kvm1.executable)
