#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_info
short_description: Tell the VMs that hvmgr has on a host
version_added: 0.1.0
description:
  - Tells of each VM its id, state, home, disks, owner, tags, what it was imported from, and the snapshot above its present.
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - hvmgr.hvmgr.common
  - hvmgr.hvmgr.common.looking
options:
  name:
    description: Only this VM, by name or id. The list is empty when there is none.
    type: str
    aliases: [vm]
  owner:
    description: Only VMs that belong to this one.
    type: str
  tags:
    description: Only VMs that have all of these tags.
    type: list
    elements: str
    default: []
seealso:
  - module: hvmgr.hvmgr.vm
"""

EXAMPLES = r"""
- name: Look at all VMs of the shop
  hvmgr.hvmgr.vm_info:
    tags: [shop]
  register: found
"""

RETURN = r"""
vms:
  description: The VMs, by name.
  returned: success
  type: list
  elements: dict
  contains:
    id: {description: Its id., type: str, returned: always}
    name: {description: Its name., type: str, returned: always}
    state: {description: "V(off), V(saved), V(running), V(paused), V(sleeping) or V(crashed); null where libvirt cannot be asked.", type: str, returned: always}
    home: {description: The folder that holds everything of it., type: str, returned: always}
    connection: {description: libvirt's connection that it belongs to., type: str, returned: always}
    created: {description: When it was made (UTC)., type: str, returned: always}
    owner: {description: Whom it belongs to., type: str, returned: always}
    tags: {description: Words to find it by., type: list, elements: str, returned: always}
    origin: {description: "What it was imported from (C(vm), C(mode), C(digest)); null for others.", type: dict, returned: always}
    memory: {description: Bytes of memory., type: int, returned: always}
    vcpus: {description: Virtual CPUs., type: int, returned: always}
    now: {description: "The id of the snapshot above the present (C(parent)) and the working images (C(disks)).", type: dict, returned: always}
    snapshot: {description: "The snapshot above the present (C(id), C(name)); null at the root.", type: dict, returned: always}
    undo: {description: Whether the last apply can be undone., type: bool, returned: always}
    snapshots: {description: How many snapshots it has., type: int, returned: always}
    disks: {description: "Its disks (C(slot), C(device), C(path), C(format), C(size), C(data)).", type: list, elements: dict, returned: always}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import Hvmgr, common_arguments, options


def flat(document):
    """The facts of a VM, with its id, name, state and home beside them."""
    facts = {key: value for key, value in document.items() if key not in ("schema", "vm")}
    return dict(facts, **document["vm"])


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            name={"type": "str", "aliases": ["vm"]},
            owner={"type": "str"},
            tags={"type": "list", "elements": "str", "default": []},
        ),
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    params = module.params
    if params["name"] is not None:
        found = hvmgr.find("vm", "show", "--", params["name"])
        documents = [found] if found else []
        documents = [
            one
            for one in documents
            if params["owner"] in (None, one["owner"]) and set(params["tags"]) <= set(one["tags"])
        ]
    else:
        words = options(params, "owner") + [f"--tag={one}" for one in params["tags"]]
        documents = hvmgr.ask("vm", "list", "--details", *words)["details"]
    module.exit_json(changed=False, vms=[flat(one) for one in documents])


if __name__ == "__main__":
    main()
