#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_apply
short_description: Return a VM to a snapshot, or take that back
version_added: 0.1.0
description:
  - Makes a VM what it was at a snapshot; it then runs, is paused, or is off, as it was then. The present goes into the undo
    slot, from which O(action=undo) brings it back until the next snapshot operation.
  - Nothing is done where the VM is off, as the snapshot would leave it, and provably still what the snapshot holds. A
    VM that runs has gone on, and is taken back.
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
  action:
    description:
      - V(apply) goes to the snapshot O(name), V(revert) to the one above the present.
      - V(undo) lets present and undo slot change places; a second one undoes the first, so that it always is a change.
    type: str
    choices: [apply, revert, undo]
    default: apply
  name:
    description: The snapshot, by its exact name, its id, or the first 8 digits of it or more. For O(action=apply).
    type: str
    aliases: [snapshot]
  snapshot_first:
    description: Take a snapshot of the present before, with its memory. Not for O(action=undo).
    type: bool
    default: false
  without_state:
    description: Leave the saved memory; the VM is off afterwards. Not for O(action=undo).
    type: bool
    default: false
  keep_undo:
    description: With V(false) the undo slot is emptied, and the present is lost.
    type: bool
    default: true
  discard_state:
    description: Stop a running VM at once. What it has in memory is lost even when the apply fails.
    type: bool
    default: false
  force:
    description: Apply the snapshot also where the VM provably is still what it holds.
    type: bool
    default: false
seealso:
  - module: hvmgr.hvmgr.snapshot
"""

EXAMPLES = r"""
- name: Go back to the state before the update
  hvmgr.hvmgr.snapshot_apply:
    vm: web
    name: before the update

- name: Go back to whatever snapshot is above the present, and keep what is there now
  hvmgr.hvmgr.snapshot_apply:
    vm: web
    action: revert
    snapshot_first: true
"""

RETURN = r"""
snapshot:
  description: The snapshot that was applied, as M(hvmgr.hvmgr.snapshot) returns it.
  returned: with O(action=apply) and O(action=revert)
  type: dict
first:
  description: The snapshot of the former present.
  returned: with O(snapshot_first=true), when something was done
  type: dict
tree:
  description: The tree afterwards, one line a snapshot.
  returned: with O(action=apply) and O(action=revert)
  type: str
plan:
  description: The steps that hvmgr would take, for people.
  returned: in check mode, when something would be done
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import (
    Failure,
    Hvmgr,
    common_arguments,
    draw,
    draw_list,
    find_snapshot,
    options,
)

FIRST = {"id": "first", "name": "(the former present)", "notes": ""}


def undo(module, hvmgr):
    words = options(module.params, "discard_state")
    changed, document = hvmgr.change("snapshot", "undo", *words, "--", module.params["vm"])
    diff = {
        "before": "present: as the VM is\nundo slot: what the last apply put away\n",
        "after": "present: what the last apply put away\nundo slot: as the VM was\n",
    }
    return {"changed": changed, "diff": diff, "plan": document.get("plan")}


def target(module, hvmgr, before):
    """The snapshot that is meant."""
    vm = before["vm"]["name"]
    if module.params["action"] == "revert":
        found = [one for one in before["snapshots"] if one["id"] == before["now"]["parent"]]
        if not found:
            hvmgr.fail(
                Failure("NotFound", f"the present of {vm} has no snapshot above it", "name one with action: apply")
            )
        return found[0]
    found = find_snapshot(hvmgr, before, module.params["name"])
    if found is None:
        names = ", ".join(one["name"] for one in before["snapshots"]) or "none"
        hvmgr.fail(
            Failure(
                "NotFound", "there is no snapshot '{}' in {}".format(module.params["name"], vm), f"there are: {names}"
            )
        )
    return found


def apply(module, hvmgr):
    params = module.params
    before = hvmgr.ask("snapshot", "list", "--", params["vm"])
    snapshot = target(module, hvmgr, before)
    words = options(params, "snapshot_first without_state discard_state")
    words += ([] if params["keep_undo"] else ["--no-undo"]) + ([] if params["force"] else ["--if-needed"])
    changed, document = hvmgr.change("snapshot", "apply", *words, "--", params["vm"], snapshot["id"])
    shown, now = before["snapshots"], before["now"]["parent"]
    if changed:
        now = snapshot["id"]
        if params["snapshot_first"]:  # its name is the time at which it is taken
            shown = [*shown, dict(FIRST, parent=before["now"]["parent"])]
    after = draw(before["vm"]["name"], shown, now)
    result = {"changed": changed, "snapshot": snapshot, "tree": after, "plan": document.get("plan")}
    if document.get("first") and not module.check_mode:
        result["first"] = document["first"]
    put_away = "Now (goes into the undo slot)" if params["keep_undo"] else "Now (is lost)"
    result["diff"] = {"before": draw_list(before, put_away if changed else "Now"), "after": after}
    return result


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            vm={"type": "str", "required": True},
            action={"type": "str", "choices": ["apply", "revert", "undo"], "default": "apply"},
            name={"type": "str", "aliases": ["snapshot"]},
            snapshot_first={"type": "bool", "default": False},
            without_state={"type": "bool", "default": False},
            keep_undo={"type": "bool", "default": True},
            discard_state={"type": "bool", "default": False},
            force={"type": "bool", "default": False},
        ),
        required_if=[("action", "apply", ("name",))],
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    params = module.params
    if params["action"] != "apply" and params["name"]:
        hvmgr.fail(
            Failure(
                "UsageError",
                "action {} takes no name".format(params["action"]),
                "use action: apply to go to a snapshot by name",
            )
        )
    if params["action"] == "undo" and (params["snapshot_first"] or params["without_state"] or not params["keep_undo"]):
        hvmgr.fail(
            Failure(
                "UsageError",
                "action undo takes neither snapshot_first nor without_state nor keep_undo",
                "leave them out",
            )
        )
    result = undo(module, hvmgr) if params["action"] == "undo" else apply(module, hvmgr)
    if not result["plan"]:
        del result["plan"]
    module.exit_json(**result)


if __name__ == "__main__":
    main()
