#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot
short_description: Take, describe and delete snapshots of a VM
version_added: 0.1.0
description:
  - A snapshot is a copy of the VM's configuration, of its memory when it was running, and of its disks as they were.
  - Snapshots form a tree; M(hvmgr.hvmgr.snapshot_apply) goes to any one of them.
  - What is there already by its name is left alone. Notes and name of it are brought to what is wanted.
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
  name:
    description:
      - The snapshot, by its exact name; one that is there also by its id or the first 8 digits of it or more.
      - A name that two snapshots of the VM share is refused, and their ids are said.
    type: str
    required: true
    aliases: [snapshot]
  state:
    description:
      - V(present) takes a snapshot when there is none of this name.
      - V(absent) deletes it; those below it stay and move up. The undo slot is emptied.
    type: str
    choices: [absent, present]
    default: present
  new_name:
    description: Another name for it. When only a snapshot of this name is there, it has been renamed already.
    type: str
  notes:
    description: A text that stays with the snapshot. Without it notes that are there stay what they are.
    type: str
    aliases: [description]
  type:
    description:
      - What a new snapshot holds; nothing is done about one that is there.
      - V(standard) saves the memory of a running VM too, V(disk-only) does not. With V(production) the guest puts its file
        systems to rest first, with V(production-only) it is an error when it cannot.
    type: str
    choices: [disk-only, production, production-only, standard]
    default: standard
  fallback:
    description:
      - Where a running guest cannot go on while its memory is saved, let it stand still; with V(false) that is an error.
    type: bool
    default: true
  compress:
    description: Compress the saved memory of a new snapshot.
    type: str
    choices: [zstd]
  subtree:
    description: With O(state=absent) all snapshots below it go too.
    type: bool
    default: false
  state_only:
    description: With O(state=absent) only the saved memory goes; the snapshot stays, with its disks.
    type: bool
    default: false
seealso:
  - module: hvmgr.hvmgr.snapshot_apply
  - module: hvmgr.hvmgr.snapshot_info
"""

EXAMPLES = r"""
- name: Take a snapshot before the update
  hvmgr.hvmgr.snapshot:
    vm: web
    name: before the update
    notes: ticket 4711

- name: Take one of the disks alone
  hvmgr.hvmgr.snapshot:
    vm: web
    name: nightly
    type: disk-only

- name: Delete a snapshot and all below it
  hvmgr.hvmgr.snapshot:
    vm: web
    name: before the update
    state: absent
    subtree: true
"""

RETURN = r"""
snapshot:
  description: The snapshot. In check mode of a new one only what is known before.
  returned: with O(state=present)
  type: dict
  contains:
    id: {description: Its id; null in check mode of a new one., type: str, returned: always}
    name: {description: Its name., type: str, returned: always}
    notes: {description: Its notes., type: str, returned: always}
    created: {description: When it was taken (UTC)., type: str, returned: always}
    parent: {description: The id of the snapshot above it., type: str, returned: always}
    type: {description: "V(standard), V(production) or V(disk-only).", type: str, returned: always}
    has_state: {description: Whether it holds saved memory., type: bool, returned: always}
    damaged: {description: The slots of disks that others wrote; then it cannot be applied., type: list, elements: str, returned: always}
    disks: {description: The image of each slot., type: dict, returned: always}
deleted:
  description: The ids of the snapshots that were deleted, or would be.
  returned: with O(state=absent)
  type: list
  elements: str
tree:
  description: The tree afterwards, one line a snapshot.
  returned: success
  type: str
plan:
  description: The steps that hvmgr would take, for people.
  returned: in check mode, when something would be done
  type: dict
"""

import re

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import (
    Failure,
    Hvmgr,
    common_arguments,
    draw,
    draw_list,
    find_snapshot,
    options,
    subtree,
    without,
)


def make(module, hvmgr, before):
    """There is no such snapshot yet."""
    params = module.params
    name = params["new_name"] or params["name"]
    words = options(params, "type notes compress") + ([] if params["fallback"] else ["--no-fallback"])
    changed, document = hvmgr.change("snapshot", "create", *words, "--", params["vm"], name)
    snapshot = document.get("snapshot") or {
        "id": None,
        "name": name,
        "notes": params["notes"] or "",
        "created": None,
        "parent": before["now"]["parent"],
        "type": params["type"].replace("-only", "") if params["type"] == "production-only" else params["type"],
        "has_state": None,
        "damaged": [],
        "disks": {},
    }
    new = dict(snapshot, id="new", parent=before["now"]["parent"])
    after = draw(before["vm"]["name"], [*before["snapshots"], new], "new")
    return {"changed": changed, "snapshot": snapshot, "plan": document.get("plan")}, after


def describe(module, hvmgr, before, snapshot):
    """It is there: name and notes become what is wanted."""
    params = module.params
    result = {"changed": False, "snapshot": snapshot}
    if params["notes"] is not None and params["notes"] != snapshot["notes"]:
        if not module.check_mode:
            hvmgr.change("snapshot", "notes", "--", params["vm"], snapshot["id"], "-", data=params["notes"])
        result = {"changed": True, "snapshot": dict(result["snapshot"], notes=params["notes"])}
    if params["new_name"] and params["new_name"] != snapshot["name"]:
        if not module.check_mode:
            hvmgr.change("snapshot", "rename", "--", params["vm"], snapshot["id"], params["new_name"])
        result = {"changed": True, "snapshot": dict(result["snapshot"], name=params["new_name"])}
    others = [result["snapshot"] if one["id"] == snapshot["id"] else one for one in before["snapshots"]]
    return result, draw(before["vm"]["name"], others, before["now"]["parent"])


def delete(module, hvmgr, before, snapshot):
    """It goes, or its memory does."""
    params = module.params
    gone = subtree(before["snapshots"], snapshot["id"]) if params["subtree"] else [snapshot["id"]]
    words = options(params, "subtree state_only")
    if params["state_only"]:
        if not snapshot["has_state"]:
            return {"changed": False, "deleted": []}, draw_list(before)
        gone = []
    changed, document = hvmgr.change("snapshot", "delete", *words, "--", params["vm"], snapshot["id"])
    left, heir = without(before["snapshots"], gone)
    after = draw(before["vm"]["name"], left, heir(before["now"]["parent"]))
    return {"changed": changed, "deleted": document.get("deleted", gone), "plan": document.get("plan")}, after


def work(module, hvmgr):
    params = module.params
    before = hvmgr.ask("snapshot", "list", "--", params["vm"])
    snapshot = find_snapshot(hvmgr, before, params["name"])
    if params["state"] == "absent":
        if snapshot is None:
            return before, {"changed": False, "deleted": []}, draw_list(before)
        return (before, *delete(module, hvmgr, before, snapshot))
    if snapshot is None and re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", params["name"]):
        vm = before["vm"]["name"]
        hvmgr.fail(
            Failure(
                "NotFound", f"there is no snapshot with the id {params['name']} in {vm}", "name a new one by a name"
            )
        )
    if snapshot is None and params["new_name"]:
        snapshot = find_snapshot(hvmgr, before, params["new_name"])
    return (before,) + (make(module, hvmgr, before) if snapshot is None else describe(module, hvmgr, before, snapshot))


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            vm={"type": "str", "required": True},
            name={"type": "str", "required": True, "aliases": ["snapshot"]},
            state={"type": "str", "choices": ["absent", "present"], "default": "present"},
            new_name={"type": "str"},
            notes={"type": "str", "aliases": ["description"]},
            type={
                "type": "str",
                "choices": ["disk-only", "production", "production-only", "standard"],
                "default": "standard",
            },
            fallback={"type": "bool", "default": True},
            compress={"type": "str", "choices": ["zstd"]},
            subtree={"type": "bool", "default": False},
            state_only={"type": "bool", "default": False},
        ),
        mutually_exclusive=[("subtree", "state_only")],
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    before, result, after = work(module, hvmgr)
    if not result.get("plan"):
        result.pop("plan", None)
    module.exit_json(tree=after, diff={"before": draw_list(before), "after": after}, **result)


if __name__ == "__main__":
    main()
