"""The three playbooks as they stand, by ansible-playbook, on three hosts: check first, run, run again, fail and repair."""

from __future__ import annotations

import sys

import pytest
import yaml

from tests import collection
from tests.ansible.conftest import settings


@pytest.fixture
def archive(fleet, tmp_path_factory):
    """A gold export in one file on the controller; its disk holds sevens."""
    gold, file = fleet[0], tmp_path_factory.mktemp("gold") / "gold.tar.zst"
    gold.create("gold")
    gold.write("gold", 7)
    gold.hvmgr("snapshot", "create", "gold", "released")
    gold.hvmgr("export", "gold", "--archive", file)
    gold.hvmgr("vm", "delete", "gold", "--with-disks", "--yes")
    return file


def test_gold_image_to_a_fleet(play, hosts, archive):
    # On the host in the middle somebody has a VM of that name already.
    hosts[1].create("web")
    wanted = {
        "gold_archive": str(archive),
        "gold_export": "{{ place }}/gold/gold",
        "gold_name": "web",
        "gold_group": "libvirt-qemu",
    }
    foreseen = play("hvmgr.hvmgr.gold", "--check", "--diff", **wanted)
    assert foreseen.code == 0, foreseen.out
    make = "Make the VM"
    assert foreseen.changed() == [(host.name, "Make the folder that holds gold") for host in hosts]
    assert len(foreseen.of("Say what a real run would go on with")) == 3
    assert all(not (host.place / "gold").exists() for host in hosts)

    first = play("hvmgr.hvmgr.gold", **wanted)
    assert first.failed() == [("kvm2", make)], first.out
    (refused,) = first.of(make, "kvm2")
    assert refused["error"]["code"] == "Conflict"
    for host in (hosts[0], hosts[2]):
        assert host.holds("web", 7)
        assert host.hvmgr("vm", "show", "web")["origin"]["mode"] == "link"

    hosts[1].hvmgr("vm", "delete", "web", "--with-disks", "--yes")
    foreseen = play("hvmgr.hvmgr.gold", "--check", "--diff", "--limit", "kvm2", **wanted)
    repaired = play("hvmgr.hvmgr.gold", "--limit", "kvm2", **wanted)
    assert foreseen.changed() == repaired.changed() == [("kvm2", make)]
    assert foreseen.of(make)[0]["diff"] == repaired.of(make)[0]["diff"]
    assert hosts[1].holds("web", 7)
    again = play("hvmgr.hvmgr.gold", **wanted)
    assert (again.code, again.changed()) == (0, [])


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
- name: Find the disk
  hvmgr.hvmgr.vm_info:
    name: "{{ hvmgr_id }}"
  register: found
- name: Write the patch where it is not yet
  ansible.builtin.shell: >-
    qemu-io -f qcow2 -c 'read -P 2 1M 64k' '{{ disk }}' || qemu-io -f qcow2 -c 'write -P 2 1M 64k' '{{ disk }}'
  vars:
    disk: "{{ found.vms[0].now.disks.vda }}"
  register: written
  changed_when: "'wrote' in written.stdout | default('')"
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
    }
    foreseen = play("hvmgr.hvmgr.patch", "--check", "--diff", inventories=[guests], **wanted)
    assert (foreseen.code, {task for _, task in foreseen.changed()}) == (0, {"Take a snapshot"}), foreseen.out

    first = play("hvmgr.hvmgr.patch", inventories=[guests], broken="shop2", **wanted)
    assert first.code != 0
    assert "shop2 is broken" in first.of("Say why", "shop2")[0]["msg"]
    assert (hosts[0].holds("shop1", 2), hosts[1].holds("shop2", 1)) == (True, True)
    assert first.of("Take a snapshot", "shop3") == [], "no further after a failure"
    assert hosts[2].hvmgr("snapshot", "list", "shop3")["snapshots"] == []

    repaired = play("hvmgr.hvmgr.patch", inventories=[guests], **wanted)
    assert repaired.code == 0, repaired.out
    assert repaired.changed("shop1") == []
    assert all(host.holds(f"shop{number}", 2) for number, host in enumerate(hosts, 1))
    again = play("hvmgr.hvmgr.patch", inventories=[guests], **wanted)
    assert (again.code, again.changed()) == (0, [])


def test_nightly_exports_with_retention(play, hosts):
    for host in hosts[:2]:
        host.create("web")
    hosts[0].create("db")
    wanted = {"nightly_folder": "{{ place }}/nightly", "nightly_keep": 2}
    folders = [host.place / "nightly" for host in hosts]
    for host, folder in zip(hosts[:2], folders[:2], strict=True):
        host.hvmgr("export", "web", folder / "2026-11-01")
        (folder / "2026-11-02").mkdir()
    hosts[0].hvmgr("import", folders[0] / "2026-11-01" / "web", "--mode", "link", "--name", "linked")
    third = {"nightly_day": "2026-11-03", **wanted}
    two = ("--limit", "kvm1,kvm2")
    foreseen = play("hvmgr.hvmgr.nightly", "--check", "--diff", *two, **third)
    done = play("hvmgr.hvmgr.nightly", *two, **third)
    assert foreseen.changed() == done.changed()
    assert done.code == 0, done.out
    assert sorted(path.name for path in folders[0].iterdir()) == ["2026-11-01", "2026-11-02", "2026-11-03"], (
        "a VM stands on it"
    )
    assert sorted(path.name for path in folders[1].iterdir()) == ["2026-11-02", "2026-11-03"]
    assert sorted(path.name for path in (folders[0] / "2026-11-03").iterdir()) == ["db", "linked", "web"]
    again = play("hvmgr.hvmgr.nightly", *two, **third)
    assert (again.code, again.changed()) == (0, [])


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
