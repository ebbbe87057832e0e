#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_export
short_description: Write a VM or one of its snapshots to a folder or an archive
version_added: 0.1.0
description:
  - Writes a VM to a folder below O(dest), called after the VM, that is complete in itself and can be imported as often as
    wanted. The VM is only read, and may run.
  - An export that was interrupted goes on when the task is run again. Nothing that is there is ever replaced.
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
  dest:
    description: The folder on the managed host in which the export's folder is made. It is made when it is not there.
    type: path
  archive:
    description: The file that becomes the export, as a tar archive compressed with zstd.
    type: path
  on_exists:
    description:
      - What to do where a complete export of this VM, made with the same options, is there.
      - V(same) leaves it when the VM provably is still what was exported (it is off, has the same snapshots, and nothing was
        written since); else the task fails. One of a O(snapshot) never changes.
      - V(keep) leaves it in any case; for folders whose name says of when they are.
      - V(fail) fails.
      - Without it V(same) holds for O(dest) and V(keep) for O(archive), of which V(keep) looks at the name alone.
    type: str
    choices: [fail, keep, same]
  snapshots:
    description: All snapshots, or V(none), that is the present alone with one image for each disk.
    type: str
    choices: [all, none]
    default: all
  keep_snapshots:
    description: Only these snapshots of the tree, with the present.
    type: list
    elements: str
    default: []
  snapshot:
    description: This snapshot as an independent VM, with one image for each disk.
    type: str
  config_only:
    description: No disks; their sizes and hashes are recorded.
    type: bool
    default: false
  without_state:
    description: Leaves all saved memory out.
    type: bool
    default: false
  with_state:
    description: Keeps the memory of a running VM too; it pauses while that is saved.
    type: bool
    default: false
  quiesce:
    description: Lets the guest's agent put its file systems to rest first.
    type: bool
    default: false
  exclude_disks:
    description: Slots of disks that are left out.
    type: list
    elements: str
    default: []
  format:
    description: The format of flattened disks; V(vhd) also of a whole tree.
    type: str
    choices: [qcow2, raw, vhd]
  checksums:
    description: With V(false) nothing is hashed, and C(hvmgr verify) cannot compare bytes.
    type: bool
    default: true
seealso:
  - module: hvmgr.hvmgr.vm_import
"""

EXAMPLES = r"""
- name: Export a gold image
  hvmgr.hvmgr.vm_export:
    vm: gold
    dest: /srv/exports
    snapshot: released

- name: Export a running VM every night
  hvmgr.hvmgr.vm_export:
    vm: web
    dest: "/srv/nightly/{{ ansible_date_time.date }}"
    on_exists: keep
"""

RETURN = r"""
export:
  description: The folder or file.
  returned: success
  type: str
vm:
  description: The VM (C(id), C(name)). Not in check mode of a new export.
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


def words_of(params):
    words = options(params, "snapshots snapshot config_only without_state with_state quiesce format")
    words += [f"--keep-snapshot={one}" for one in params["keep_snapshots"]]
    words += [f"--exclude-disk={one}" for one in params["exclude_disks"]]
    words += [] if params["checksums"] else ["--no-checksums"]
    words.append("--if-exists=%s" % (params["on_exists"] or ("keep" if params["archive"] else "same")))
    if params["archive"]:
        return [*words, "--archive={}".format(params["archive"]), "--", params["vm"]]
    return [*words, "--", params["vm"], params["dest"]]


def place(params, hvmgr):
    """Where the export is or will be: its folder is called after the VM."""
    if params["archive"]:
        return os.path.abspath(params["archive"])
    name = hvmgr.ask("vm", "show", "--", params["vm"])["vm"]["name"]
    return os.path.join(os.path.realpath(params["dest"]), name)


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            vm={"type": "str", "required": True},
            dest={"type": "path"},
            archive={"type": "path"},
            on_exists={"type": "str", "choices": ["fail", "keep", "same"]},
            snapshots={"type": "str", "choices": ["all", "none"], "default": "all"},
            keep_snapshots={"type": "list", "elements": "str", "default": []},
            snapshot={"type": "str"},
            config_only={"type": "bool", "default": False},
            without_state={"type": "bool", "default": False},
            with_state={"type": "bool", "default": False},
            quiesce={"type": "bool", "default": False},
            exclude_disks={"type": "list", "elements": "str", "default": []},
            format={"type": "str", "choices": ["qcow2", "raw", "vhd"]},
            checksums={"type": "bool", "default": True},
        ),
        mutually_exclusive=[("dest", "archive")],
        required_one_of=[("dest", "archive")],
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    there = place(module.params, hvmgr)
    changed, document = hvmgr.change("export", *words_of(module.params))
    result = {key: document[key] for key in ("vm", "plan") if document.get(key)}
    before, after = ("" if changed else there + "\n"), there + "\n"
    module.exit_json(
        changed=changed, export=document.get("export", there), diff={"before": before, "after": after}, **result
    )


if __name__ == "__main__":
    main()
