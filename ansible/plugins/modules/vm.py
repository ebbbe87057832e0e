#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm
short_description: Make, start, stop, rename and delete VMs
version_added: 0.1.0
description:
  - Makes VMs in homes of their own, or lets hvmgr manage VMs that libvirt has already.
  - A VM that is there is started, stopped, renamed or deleted as is wanted, and gets the owner and tags. Its hardware is not changed; a warning says
    where memory or virtual CPUs differ from what the task says.
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - hvmgr.hvmgr.common
  - hvmgr.hvmgr.common.changing
options:
  name:
    description: The VM's name; of one that is there also its id.
    type: str
    required: true
    aliases: [vm]
  state:
    description:
      - V(present) makes the VM when it is not there; what it does at the moment does not matter.
      - V(started) and V(stopped) do the same, and let it run, or shut it down.
      - V(absent) deletes a VM that is off, with its snapshots. Of each disk one complete image stays in the home, unless
        O(with_disks=true).
      - Check mode does not ask the guest or libvirt whether a VM would start or stop.
    type: str
    choices: [absent, present, started, stopped]
    default: present
  new_name:
    description: Another name for a VM that is off. When only a VM of this name is there, it has been renamed already.
    type: str
  adopt:
    description:
      - Where libvirt has a VM of this name that hvmgr does not manage, it is adopted, and its disks stay where they are.
        Nothing is made anew; it is an error when libvirt has no such VM.
    type: bool
    default: false
  with_disks:
    description: With O(state=absent) the disks in the home are deleted too. Images elsewhere never are.
    type: bool
    default: false
  force:
    description:
      - With O(state=stopped) or O(state=absent) a running VM is stopped at once, like pulling the plug.
      - With O(state=absent) only when nothing but that it runs is in the way of its deletion.
    type: bool
    default: false
  stop_timeout:
    description: Seconds that the guest may take to shut down.
    type: int
    default: 60
  specification:
    description:
      - All of a new VM as in hvmgr's specification files, but for its name. No other option about hardware goes with it.
    type: dict
  template:
    description: V(generation1) (BIOS, IDE) or V(generation2) (UEFI, virtio), which is hvmgr's default.
    type: str
  memory:
    description: Memory with a unit, such as V(4G).
    type: str
  vcpus:
    description: Virtual CPUs.
    type: int
  disks:
    description: Sizes of new disks (V(40G)), or paths of images on the managed host, which are copied.
    type: list
    elements: str
  in_place:
    description: The images in O(disks) are used where they are.
    type: bool
  cdrom:
    description: An ISO image in a CD drive.
    type: path
  networks:
    description: Networks of libvirt, V(bridge=BRIDGE), V(user) or V(none); V(,mac=ADDRESS) may follow.
    type: list
    elements: str
  kernel:
    description: A kernel of the managed host that is started directly.
    type: path
  initrd:
    description: The initial RAM disk of that kernel.
    type: path
  cmdline:
    description: The command line of that kernel.
    type: str
  accel:
    description: What executes the guest.
    type: str
    choices: [auto, kvm, tcg]
  tpm:
    description: Whether there is an emulated TPM 2.0.
    type: bool
  firmware:
    description: What starts the guest.
    type: str
    choices: [bios, efi]
  uuid:
    description: The VM's id, if not a new one.
    type: str
  home:
    description: The VM's folder, if not one named after it in O(root).
    type: path
  text:
    description: A text that libvirt keeps with the VM.
    type: str
    aliases: [description]
  owner:
    description: Whom the VM belongs to; nobody when it is empty. Without it that stays as it is.
    type: str
  tags:
    description: Words to find the VM by; these and no others. Without it they stay as they are.
    type: list
    elements: str
seealso:
  - module: hvmgr.hvmgr.vm_info
  - module: hvmgr.hvmgr.vm_import
"""

EXAMPLES = r"""
- name: Make a VM and start it
  hvmgr.hvmgr.vm:
    name: web
    memory: 4G
    disks: [40G]
    state: started

- name: Let hvmgr manage a VM that libvirt has
  hvmgr.hvmgr.vm:
    name: old
    adopt: true

- name: Delete a VM with everything
  hvmgr.hvmgr.vm:
    name: web
    state: absent
    force: true
    with_disks: true
"""

RETURN = r"""
vm:
  description: The VM.
  returned: success
  type: dict
  contains:
    id: {description: Its id; null in check mode of a new one., type: str, returned: always}
    name: {description: Its name., type: str, returned: always}
    state: {description: "V(off), V(saved), V(running), V(paused), V(sleeping) or V(crashed); null where libvirt cannot be asked.", type: str, returned: always}
    home: {description: The folder that holds everything of it., type: str, returned: always}
kept:
  description: Files that stay in the folder of a VM that was deleted.
  returned: with O(state=absent), when it was deleted
  type: list
  elements: str
plan:
  description: The steps that hvmgr would take, for people.
  returned: in check mode, when something would be done
  type: dict
"""

import json

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import (
    Failure,
    Hvmgr,
    common_arguments,
    options,
    to_bytes,
)

HARDWARE = "template memory vcpus cdrom kernel initrd cmdline accel firmware uuid home"
ALL_HARDWARE = [*HARDWARE.split(), "disks", "in_place", "networks", "tpm", "text"]
ACTIVE = ("running", "paused", "sleeping", "crashed")


def make(module, hvmgr):
    """A VM that is not there yet."""
    params = module.params
    name = params["new_name"] or params["name"]
    if params["adopt"]:
        changed, document = hvmgr.change("vm", "adopt", *options(params, "home"), "--", name)
        vm = (document.get("adopted") or [None])[0]
    elif params["specification"] is not None:
        text = json.dumps(dict(params["specification"], name=name))
        changed, document = hvmgr.change("vm", "create", "--file=-", data=text)
        vm = document.get("vm")
    else:
        words = options(params, HARDWARE + " in_place") + [f"--disk={one}" for one in params["disks"] or []]
        words += [f"--network={one}" for one in params["networks"] or []]
        words += [] if params["tpm"] is None else ["--tpm" if params["tpm"] else "--no-tpm"]
        words += [] if params["text"] is None else ["--description={}".format(params["text"])]
        changed, document = hvmgr.change("vm", "create", *words, "--", name)
        vm = document.get("vm")
    return changed, vm or {"id": None, "name": name, "state": "off", "home": None}, document.get("plan")


def rename(module, hvmgr, vm):
    changed, document = hvmgr.change("vm", "rename", "--", vm["id"], module.params["new_name"])
    return changed, document.get("vm") or dict(vm, name=module.params["new_name"]), document.get("plan")


def label(module, hvmgr, vm, there):
    """Owner and tags are those that are wanted; there is nothing to compare with where the VM is only foreseen."""
    params, words = module.params, []
    told = there or {"owner": None, "tags": []}
    if params["owner"] is not None and params["owner"] != (told["owner"] or ""):
        words.append("--owner={}".format(params["owner"]) if params["owner"] else "--no-owner")
    if params["tags"] is not None:
        words += [f"--tag={one}" for one in params["tags"] if one not in told["tags"]]
        words += [f"--untag={one}" for one in told["tags"] if one not in params["tags"]]
    if not words or vm["id"] is None:
        return False
    return hvmgr.change("vm", "set", *words, "--", vm["id"])[0]


def labels(params, told):
    """What a diff says of owner and tags, where the task does: of a set of words, whatever their order was."""
    found = {} if params["owner"] is None else {"owner": told["owner"] or None}
    return found if params["tags"] is None else dict(found, tags=sorted(set(told["tags"])))


def run_or_stop(module, hvmgr, vm):
    """It runs, or is off; a saved one is off as far as QEMU goes."""
    params, state = module.params, vm["state"]
    if params["state"] == "started":
        if state == "running":
            return False, vm
        if module.check_mode:  # hvmgr shows no plan of a start, and a new VM is not there yet
            return True, dict(vm, state="running")
        changed, document = hvmgr.change("vm", "start", "--", vm["id"])
        return changed, document["vm"]
    if params["state"] == "stopped" and state in ACTIVE:
        return stop(module, hvmgr, vm)
    return False, vm


def stop(module, hvmgr, vm):
    if module.check_mode:
        return True, dict(vm, state="off")
    words = [*options(module.params, "force"), "--timeout={}".format(module.params["stop_timeout"])]
    changed, document = hvmgr.change("vm", "stop", *words, "--", vm["id"])
    return changed, document["vm"]


def delete(module, hvmgr, vm):
    params, was_active = module.params, vm["state"] in ACTIVE
    if was_active and not params["force"]:
        hvmgr.fail(
            Failure(
                "Conflict",
                "{} is {}, and only a VM that is off is deleted".format(vm["name"], vm["state"]),
                "stop it first, or give force",
            )
        )
    words = ["vm", "delete", *options(params, "with_disks"), "--", vm["id"]]
    if was_active:
        obstacle = hvmgr.refusal(*words)
        if obstacle is not None and obstacle.facts.get("state") not in ACTIVE:
            hvmgr.fail(obstacle)
        stop(module, hvmgr, vm)
        if module.check_mode:
            return True, [], None  # the plan of the rest needs a VM that is off
    changed, document = hvmgr.change(*words)
    return changed, document.get("kept", []), document.get("plan")


def warn_of_differences(module, there):
    params = module.params
    if to_bytes(params["memory"]) not in (None, there["memory"]):
        module.warn(
            "{} has {} bytes of memory, not {}; hardware is not changed".format(
                there["vm"]["name"], there["memory"], params["memory"]
            )
        )
    if params["vcpus"] not in (None, there["vcpus"]):
        module.warn(
            "{} has {} virtual CPUs, not {}; hardware is not changed".format(
                there["vm"]["name"], there["vcpus"], params["vcpus"]
            )
        )


def shown(vm, more=None):
    """What a diff says of a VM: what is known before it is made, too."""
    return {"state": "absent"} if vm is None else dict({"name": vm["name"], "state": vm["state"]}, **(more or {}))


def work(module, hvmgr):
    params = module.params
    there = hvmgr.find("vm", "show", "--", params["name"])
    if there is None and params["new_name"]:
        there = hvmgr.find("vm", "show", "--", params["new_name"])
    before = None if there is None else there["vm"]
    result = {"changed": False, "vm": before, "plan": None}
    if params["state"] == "absent":
        if before is not None:
            result["changed"], result["kept"], result["plan"] = delete(module, hvmgr, before)
        return shown(before), shown(None), result
    if before is None:
        result["changed"], result["vm"], result["plan"] = make(module, hvmgr)
    else:
        warn_of_differences(module, there)
        if params["new_name"] not in (None, before["name"]):
            result["changed"], result["vm"], result["plan"] = rename(module, hvmgr, before)
    labelled = label(module, hvmgr, result["vm"], there)
    changed, result["vm"] = run_or_stop(module, hvmgr, result["vm"])
    result["changed"] = result["changed"] or labelled or changed
    old = {} if there is None else labels(params, there)
    return shown(before, old), shown(result["vm"], labels(params, params)), result


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            name={"type": "str", "required": True, "aliases": ["vm"]},
            state={"type": "str", "choices": ["absent", "present", "started", "stopped"], "default": "present"},
            new_name={"type": "str"},
            adopt={"type": "bool", "default": False},
            with_disks={"type": "bool", "default": False},
            force={"type": "bool", "default": False},
            stop_timeout={"type": "int", "default": 60},
            specification={"type": "dict"},
            template={"type": "str"},
            memory={"type": "str"},
            vcpus={"type": "int"},
            disks={"type": "list", "elements": "str"},
            in_place={"type": "bool"},
            cdrom={"type": "path"},
            networks={"type": "list", "elements": "str"},
            kernel={"type": "path"},
            initrd={"type": "path"},
            cmdline={"type": "str"},
            accel={"type": "str", "choices": ["auto", "kvm", "tcg"]},
            tpm={"type": "bool"},
            firmware={"type": "str", "choices": ["bios", "efi"]},
            uuid={"type": "str"},
            home={"type": "path"},
            text={"type": "str", "aliases": ["description"]},
            owner={"type": "str"},
            tags={"type": "list", "elements": "str"},
        ),
        mutually_exclusive=[("specification", one) for one in ALL_HARDWARE] + [("specification", "adopt")],
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    before, after, result = work(module, hvmgr)
    if not result["plan"]:
        del result["plan"]
    module.exit_json(diff={"before": before, "after": after}, **result)


if __name__ == "__main__":
    main()
