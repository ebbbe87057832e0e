#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: disk_export
short_description: Write one disk of a VM to a file, as a whole or what changed since a snapshot
version_added: 0.1.0
description:
  - Writes one disk of a VM into a new file that other programs read too; the whole disk, or only what differs from a
    snapshot, as a differencing VHD. The VM is only read, and may run.
  - The file is complete or not there, readable for its owner alone, and never replaced.
  - Exports take long. Use C(async) with C(poll) where the connection may break meanwhile.
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - hvmgr.hvmgr.common
  - hvmgr.hvmgr.common.changing
options:
  vm:
    description: The VM, by name or id.
    type: str
    required: true
  slot:
    description: The disk's slot, such as V(vda).
    type: str
    required: true
  dest:
    description: The file on the managed host. Its folder has to be there.
    type: path
    required: true
  snapshot:
    description: The disk as this snapshot has it. Without it as it is at present.
    type: str
  base:
    description:
      - Only what differs from this snapshot, as a differencing VHD on it. Any other snapshot of the disk will do, in
        whichever branch of the tree.
    type: str
  format:
    description: What the file is. Without it the name of O(dest) says it, else it is V(vhd). With O(base) only V(vhd).
    type: str
    choices: [qcow2, raw, vhd]
  on_exists:
    description:
      - What to do where O(dest) is there.
      - V(same) leaves it when it is, byte for byte, what would be written; else the task fails. That reads all of both, and
        a running VM's disk can be compared only with O(snapshot).
      - V(keep) leaves it in any case, whatever it holds; for names that say of when they are.
      - V(fail) fails.
    type: str
    choices: [fail, keep, same]
    default: same
seealso:
  - module: hvmgr.hvmgr.vm_export
  - module: hvmgr.hvmgr.image_info
"""

EXAMPLES = r"""
- name: Export a disk as a snapshot has it
  hvmgr.hvmgr.disk_export:
    vm: web
    slot: vda
    snapshot: monday
    dest: /srv/backup/web-monday.vhd

- name: Export what changed since
  hvmgr.hvmgr.disk_export:
    vm: web
    slot: vda
    base: monday
    snapshot: tuesday
    dest: /srv/backup/web-tuesday.vhd
"""

RETURN = r"""
disk:
  description: What the file holds. Not in check mode of a new one.
  returned: success
  type: dict
  contains:
    file: {description: The file., type: str, returned: always}
    format: {description: "V(vhd), V(raw) or V(qcow2).", type: str, returned: always}
    slot: {description: The disk's slot., type: str, returned: always}
    uuid: {description: The id of the disk at that point; a VHD has the same., type: str, returned: always}
    base: {description: That of the point that a delta starts from; null for a whole disk., type: str, returned: always}
    size: {description: Bytes that a guest sees., type: int, returned: always}
    length: {description: The length of the file., type: int, returned: always}
vm:
  description: The VM (C(id), C(name)). Not in check mode of a new file.
  returned: success
  type: dict
plan:
  description: The steps that hvmgr would take, for people.
  returned: in check mode, when something would be done
  type: dict
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import Hvmgr, common_arguments, options


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            vm={"type": "str", "required": True},
            slot={"type": "str", "required": True},
            dest={"type": "path", "required": True},
            snapshot={"type": "str"},
            base={"type": "str"},
            format={"type": "str", "choices": ["qcow2", "raw", "vhd"]},
            on_exists={"type": "str", "choices": ["fail", "keep", "same"], "default": "same"},
        ),
        supports_check_mode=True,
    )
    hvmgr, params = Hvmgr(module), module.params
    file = os.path.abspath(params["dest"])
    words = [*options(params, "snapshot base format"), "--if-exists={}".format(params["on_exists"])]
    changed, document = hvmgr.change("disk", "export", *words, "--", params["vm"], params["slot"], file)
    result = {key: document[key] for key in ("vm", "plan") if document.get(key)}
    if "uuid" in document:
        result["disk"] = {key: document[key] for key in ["file", "format", "slot", "uuid", "base", "size", "length"]}
    before, after = ("" if changed else file + "\n"), file + "\n"
    module.exit_json(changed=changed, diff={"before": before, "after": after}, **result)


if __name__ == "__main__":
    main()
