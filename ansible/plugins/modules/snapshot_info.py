#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_info
short_description: Tell the snapshots of a VM
version_added: 0.1.0
description:
  - Tells the snapshot tree of a VM, where its present stands, and on request what each snapshot takes on disk.
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - hvmgr.hvmgr.common
  - hvmgr.hvmgr.common.looking
options:
  vm:
    description: The VM, by name or id.
    type: str
    required: true
  name:
    description: Only this snapshot, by name or id. The list is empty when there is none.
    type: str
    aliases: [snapshot]
  sizes:
    description: Also what each snapshot takes on disk, in bytes; every image is looked at for that.
    type: bool
    default: false
seealso:
  - module: hvmgr.hvmgr.snapshot
"""

EXAMPLES = r"""
- name: Look at the tree of a VM
  hvmgr.hvmgr.snapshot_info:
    vm: web
  register: found

- name: Show it
  ansible.builtin.debug:
    msg: "{{ found.tree }}"
"""

RETURN = r"""
vm:
  description: The VM.
  returned: success
  type: dict
  contains:
    id: {description: Its id., type: str, returned: always}
    name: {description: Its name., type: str, returned: always}
    state: {description: "V(off), V(saved), V(running), V(paused), V(sleeping) or V(crashed); null where libvirt cannot be asked.", type: str, returned: always}
    home: {description: The folder that holds everything of it., type: str, returned: always}
now:
  description: The present.
  returned: success
  type: dict
  contains:
    parent: {description: The id of the snapshot above it., type: str, returned: always}
    disks: {description: The working image of each slot., type: dict, returned: always}
snapshots:
  description: The snapshots, oldest first, as M(hvmgr.hvmgr.snapshot) returns one.
  returned: success
  type: list
  elements: dict
  contains:
    images: {description: Bytes on disk of images., type: int, returned: with O(sizes=true)}
    memory: {description: Bytes on disk of saved memory., type: int, returned: with O(sizes=true)}
tree:
  description: The whole tree, one line a snapshot.
  returned: success
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import Hvmgr, common_arguments, draw_list, find_snapshot


def with_sizes(hvmgr, vm, snapshots):
    (usage,) = hvmgr.ask("space", "--", vm)["vms"]
    sizes = {one["id"]: {"images": one["images"], "memory": one["memory"]} for one in usage["snapshots"]}
    return [dict(one, **sizes.get(one["id"], {"images": 0, "memory": 0})) for one in snapshots]


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            vm={"type": "str", "required": True},
            name={"type": "str", "aliases": ["snapshot"]},
            sizes={"type": "bool", "default": False},
        ),
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    document = hvmgr.ask("snapshot", "list", "--", module.params["vm"])
    snapshots = document["snapshots"]
    if module.params["name"] is not None:
        found = find_snapshot(hvmgr, document, module.params["name"])
        snapshots = [] if found is None else [found]
    if module.params["sizes"]:
        snapshots = with_sizes(hvmgr, module.params["vm"], snapshots)
    module.exit_json(
        changed=False, vm=document["vm"], now=document["now"], snapshots=snapshots, tree=draw_list(document)
    )


if __name__ == "__main__":
    main()
