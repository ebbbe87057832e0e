# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The VMs of hosts as an inventory."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vms
short_description: The VMs that hvmgr has on one or more hosts
version_added: 0.1.0
description:
  - Asks C(hvmgr) on each host for its VMs, each of which becomes a host of the inventory.
  - Each has the variables C(hvmgr_id), C(hvmgr_name), C(hvmgr_state), C(hvmgr_home), C(hvmgr_owner), C(hvmgr_tags),
    C(hvmgr_snapshot) (the name of the snapshot above its present, null at the root), C(hvmgr_snapshots) (how many there
    are), C(hvmgr_memory), C(hvmgr_vcpus), C(hvmgr_created), and C(hvmgr_host) (the O(hosts[].name) of its host).
  - The name of the file has to end with C(hvmgr.yml) or C(hvmgr.yaml).
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - ansible.builtin.constructed
  - ansible.builtin.inventory_cache
options:
  plugin:
    description: Says that the file is for this plugin.
    type: str
    required: true
    choices: [hvmgr.hvmgr.vms]
  hosts:
    description: The hosts that are asked.
    type: list
    elements: dict
    default: [{"name": "localhost"}]
    suboptions:
      name:
        description: What the variable C(hvmgr_host) says; the name of the host in the other parts of the inventory, if it is there.
        type: str
        required: true
      ssh:
        description: Where C(ssh) goes, as V(root@kvm1). Without it C(hvmgr) runs on the controller itself.
        type: str
      ssh_args:
        description: More arguments for C(ssh).
        type: list
        elements: str
        default: []
      executable:
        description: The C(hvmgr) program there.
        type: str
        default: hvmgr
      uri:
        description: libvirt's connection there.
        type: str
      root:
        description: The folder that holds the homes there.
        type: str
  hostnames:
    description:
      - How a VM is called in the inventory. V(name) is its name, which has to be unique among all hosts; V(host_name) is
        V(VM.HOST); V(id) is its id.
    type: str
    choices: [host_name, id, name]
    default: name
  timeout:
    description: Seconds that a host may take to answer.
    type: int
    default: 60
  unreachable:
    description: Whether a host that does not answer fails the inventory, or is left out with a warning.
    type: str
    choices: [fail, warn]
    default: fail
notes:
  - C(ssh) runs in batch mode. It asks for nothing, so keys have to be there.
  - Group names are made by O(groups) and O(keyed_groups).
requirements:
  - hvmgr 0.1.0 or later on the hosts that are asked
"""

EXAMPLES = r"""
# File shop.hvmgr.yml: the VMs of two hosts, in groups by state, by tag and by host
plugin: hvmgr.hvmgr.vms
hosts:
  - name: kvm1
    ssh: root@kvm1
  - name: kvm2
    ssh: root@kvm2
keyed_groups:
  - key: hvmgr_state
    prefix: state
  - key: hvmgr_tags
    prefix: tag
  - key: hvmgr_host
    prefix: on
groups:
  patched: hvmgr_snapshot == 'before the update'
compose:
  ansible_host: hvmgr_name ~ '.example.com'
cache: true
cache_plugin: ansible.builtin.jsonfile
cache_timeout: 600
"""

import json
import shlex
import subprocess

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable
from ansible.utils.unsafe_proxy import wrap_var

SCHEMA = 1
SUFFIXES = ("hvmgr.yml", "hvmgr.yaml")
KNOWN = {"name", "ssh", "ssh_args", "executable", "uri", "root"}


class Unreachable(Exception):
    """A host does not answer, or not as hvmgr does."""


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):
    """VMs as hosts."""

    NAME = "hvmgr.hvmgr.vms"

    def verify_file(self, path):
        """Whether the file is for this plugin, by its name."""
        return super().verify_file(path) and path.endswith(SUFFIXES)

    def parse(self, inventory, loader, path, cache=True):
        """Fill the inventory, from the cache where that is wanted and knows."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        hosts = self.get_option("hosts")
        self._require_hosts(hosts, path)
        self._fill(self._remembered(hosts, path, cache))

    def _require_hosts(self, hosts, path):
        names = [host.get("name") for host in hosts]
        if not all(names):
            raise AnsibleParserError(f"{path}: each of the hosts needs a name")
        if len(set(names)) < len(names):
            raise AnsibleParserError(f"{path}: two of the hosts have the same name")
        for host in hosts:
            if set(host) - KNOWN:
                raise AnsibleParserError(
                    f"{path}: host {host['name']} has {', '.join(sorted(set(host) - KNOWN))}, which is unknown; "
                    f"there is {', '.join(sorted(KNOWN))}"
                )

    def _remembered(self, hosts, path, cache):
        """What each host said, by its name."""
        key = self.get_cache_key(path)
        uses_cache = cache and self.get_option("cache")
        if uses_cache:
            try:
                return self._cache[key]
            except KeyError:
                pass  # there is nothing yet, or it is too old
        found = {}
        for host in hosts:
            try:
                found[host["name"]] = self._ask(host)
            except Unreachable as error:
                if self.get_option("unreachable") == "fail":
                    raise AnsibleParserError(f"{path}: {error}") from error
                self.display.warning(f"{path}: {error}; its VMs are left out")
                uses_cache = None  # what is not complete is not remembered
        if self.get_option("cache") and uses_cache is not None:
            self._cache[key] = found
        return found

    def _ask(self, host):
        """The documents about a host's VMs."""
        words = [host.get("executable") or "hvmgr", "--json", "vm", "list", "--details"]
        words += [f"--connect={host['uri']}"] if host.get("uri") else []
        words += [f"--root={host['root']}"] if host.get("root") else []
        if host.get("ssh"):
            remote = " ".join(shlex.quote(word) for word in words)
            words = ["ssh", "-oBatchMode=yes", *host.get("ssh_args", []), "--", host["ssh"], remote]
        name = host["name"]
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=self.get_option("timeout"), check=False
            )
        except FileNotFoundError as error:
            raise Unreachable(f"there is no program {words[0]} to ask {name} with") from error
        except subprocess.TimeoutExpired as error:
            raise Unreachable(f"{name} did not answer within {error.timeout} seconds") from error
        except OSError as error:
            raise Unreachable(f"{words[0]} cannot be run to ask {name}: {error.strerror}") from error
        return self._understood(name, done)

    def _understood(self, name, done):
        try:
            document = json.loads(done.stdout)
        except ValueError:
            document = {}
        failure = document.get("error") if isinstance(document, dict) else None
        if failure:
            raise Unreachable(f"hvmgr on {name} says: {failure['message']}")
        if done.returncode != 0 or not isinstance(document, dict) or document.get("schema") != SCHEMA:
            told = " ".join(done.stderr.decode(errors="replace").splitlines()[-2:]) or "nothing"
            raise Unreachable(
                f"{name} gives no answer that is hvmgr's (exit code {done.returncode}, it says: {told}); "
                "is hvmgr 0.1.0 or later installed there?"
            )
        for line in done.stderr.decode(errors="replace").splitlines():
            self.display.warning(f"{name}: {line}")
        return document["details"]

    def _fill(self, found):
        kind, strict = self.get_option("hostnames"), self.get_option("strict")
        homes = {}
        for host in self.get_option("hosts"):
            for document in found.get(host["name"], []):
                vm = document["vm"]
                name = {"name": vm["name"], "id": vm["id"], "host_name": f"{vm['name']}.{host['name']}"}[kind]
                if name in homes:
                    raise AnsibleParserError(
                        f"the VM {name} is on {homes[name]} and on {host['name']}; "
                        "tell them apart with hostnames: host_name, or id"
                    )
                homes[name] = host["name"]
                self._add(name, facts(document, host["name"]), strict)

    def _add(self, name, variables, strict):
        self.inventory.add_host(name)
        for key, value in variables.items():
            self.inventory.set_variable(name, key, value)
        self._set_composite_vars(self.get_option("compose"), variables, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict=strict)


def facts(document, host):
    """The variables of a VM."""
    vm, above = document["vm"], document["snapshot"]
    own = {key: vm[key] for key in ("id", "name", "state", "home")}
    own.update({key: document[key] for key in ("owner", "tags", "snapshots", "memory", "vcpus", "created")})
    own.update(snapshot=None if above is None else above["name"], host=host)
    return {f"hvmgr_{key}": wrap_var(value) for key, value in own.items()}  # names are data, never templates
