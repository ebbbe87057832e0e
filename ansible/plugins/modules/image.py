#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: image
short_description: Make, convert, resize, compact and merge image files
version_added: 0.1.0
description:
  - Works on image files by their path; VHD, VHDX, qcow2 and raw. An image is what its content says.
  - What is in use is never changed. hvmgr refuses it, and says who uses the image.
  - Images are not removed by this module. C(ansible.builtin.file) does that, and does not ask who uses them; look at
    M(hvmgr.hvmgr.image_info) first.
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - hvmgr.hvmgr.common
  - hvmgr.hvmgr.common.changing
options:
  path:
    description: The image's file on the managed host.
    type: path
    required: true
  state:
    description:
      - V(present) makes the image when it is not there, and gives one that is there the wanted size and parent.
      - V(merged) merges a differencing image into its parent, or into O(into), and removes it. When the file is not there
        that has been done.
    type: str
    choices: [merged, present]
    default: present
  source:
    description: A new image shows the disk that this image shows, with all its parents. Of an image that is there it is not compared.
    type: path
  source_format:
    description: What O(source) is, where its content says something else.
    type: str
    choices: [qcow2, raw, vdi, vhd, vhdx, vmdk]
  size:
    description: The size of the disk, such as V(40G). Not together with O(source); with O(parent) that of the parent.
    type: str
  shrink:
    description: Lets O(size) make a disk smaller. What lies behind it is lost; partitions never are.
    type: bool
    default: false
  parent:
    description:
      - A new image is a differencing one on this image. One that is there and stands on another file is given this one as
        its parent when the data is proved to be the same.
    type: path
  ignore_id:
    description: Take O(parent) although nothing proves that it is the right one.
    type: bool
    default: false
  format:
    description: The format of a new image; without it the suffix decides.
    type: str
    choices: [qcow2, raw, vhd, vhdx]
  fixed:
    description: A new image takes all its space at once.
    type: bool
    default: false
  block_size:
    description: The block or cluster size of a new image.
    type: str
  keep_id:
    description: A VHD that is made of a VHD has the same id.
    type: bool
    default: false
  compact:
    description:
      - Give back the space of blocks that hold nothing but zeros. In check mode it is a change wherever hvmgr would look at
        the blocks; a real run says so only when space was given back.
    type: bool
    default: false
  into:
    description: With O(state=merged) the ancestor that it is merged into, with all between.
    type: path
  keep:
    description: With O(state=merged) the merged images stay where they are.
    type: bool
    default: false
  search:
    description: Folders in which parents of a VHD are looked for, too.
    type: list
    elements: path
    default: []
seealso:
  - module: hvmgr.hvmgr.image_info
"""

EXAMPLES = r"""
- name: Make a VHD for Hyper-V of a disk
  hvmgr.hvmgr.image:
    path: /srv/out/web.vhd
    source: /srv/in/web.qcow2

- name: Make a disk at least as large as that
  hvmgr.hvmgr.image:
    path: /srv/disks/data.qcow2
    size: 40G
"""

RETURN = r"""
image:
  description: What the image is.
  returned: success, but in check mode only of an image that is there
  type: dict
  contains:
    path: {description: Its file., type: str, returned: always}
    format: {description: What its content says., type: str, returned: always}
    type: {description: "V(fixed), V(dynamic) or V(differencing).", type: str, returned: always}
    size: {description: Bytes that a guest sees., type: int, returned: always}
    file_size: {description: The length of the file., type: int, returned: always}
    taken: {description: Bytes on disk., type: int, returned: always}
    block_size: {description: The block or cluster size., type: int, returned: always}
    creator: {description: Who made it (VHD)., type: str, returned: always}
    created: {description: When it was made (VHD)., type: str, returned: always}
    id: {description: The id of the format., type: str, returned: always}
    parent: {description: "Of differencing images all that is known of the parent (C(names), C(id), C(path), C(problem)).", type: dict, returned: always}
    allocation: {description: The percentage of the disk that is in this file., type: float, returned: always}
    fragmentation: {description: The percentage of its blocks that do not follow the one before., type: float, returned: always}
    used_by: {description: "Who needs it (C(use), C(name), C(vm)).", type: list, elements: dict, returned: always}
    libvirt_asked: {description: Whether libvirt could be asked who uses it., type: bool, returned: always}
    faults: {description: What is wrong with it and was read over., type: list, elements: str, returned: always}
    open_change: {description: A command on it that was cut off., type: str, returned: always}
plan:
  description: The steps that hvmgr would take, for people.
  returned: in check mode, when something would be done
  type: dict
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import (
    Failure,
    Hvmgr,
    common_arguments,
    options,
    to_bytes,
)


def searching(params):
    return [f"--search={one}" for one in params["search"]]


def make(module, hvmgr):
    params = module.params
    words = options(params, "format fixed parent block_size")
    if params["source"]:
        words += options(params, "keep_id source_format") + searching(params)
        return hvmgr.change("image", "convert", *words, "--", params["source"], params["path"])
    return hvmgr.change("image", "create", *options(params, "size"), *words, "--", params["path"])


def adjust(module, hvmgr, image):
    """An image that is there gets the size and the parent that are wanted; each step is a change or none."""
    params, path = module.params, module.params["path"]
    steps = []
    if params["size"] and not params["parent"]:
        steps.append(("image", "resize", *tuple(options(params, "shrink")), "--", path, params["size"]))
    if params["parent"]:
        parent = (image["parent"] or {}).get("path")
        if image["parent"] is None:
            hvmgr.fail(
                Failure("Conflict", f"{path} is there already, and is no differencing image", "name another file")
            )
        if parent is None or not os.path.exists(params["parent"]) or not os.path.samefile(parent, params["parent"]):
            words = options(params, "ignore_id") + searching(params)
            steps.append(("image", "reparent", *tuple(words), "--", path, params["parent"]))
    if params["compact"]:
        steps.append(("image", "compact", "--", path))
    changed, document = False, {}
    for step in steps:
        did, document = hvmgr.change(*step)
        if step[1] == "compact" and not module.check_mode:
            did = document["freed"] > 0
        changed = changed or did
    return changed, document


def shown(image):
    """What a diff says of an image."""
    if image is None:
        return {"state": "absent"}
    parent = image["parent"] and image["parent"]["path"]
    return {"path": image["path"], "size": image["size"], "parent": parent}


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            path={"type": "path", "required": True},
            state={"type": "str", "choices": ["merged", "present"], "default": "present"},
            source={"type": "path"},
            source_format={"type": "str", "choices": ["qcow2", "raw", "vdi", "vhd", "vhdx", "vmdk"]},
            size={"type": "str"},
            shrink={"type": "bool", "default": False},
            parent={"type": "path"},
            ignore_id={"type": "bool", "default": False},
            format={"type": "str", "choices": ["qcow2", "raw", "vhd", "vhdx"]},
            fixed={"type": "bool", "default": False},
            block_size={"type": "str"},
            keep_id={"type": "bool", "default": False},
            compact={"type": "bool", "default": False},
            into={"type": "path"},
            keep={"type": "bool", "default": False},
            search={"type": "list", "elements": "path", "default": []},
        ),
        mutually_exclusive=[("source", "size")],
        required_by={"source_format": "source"},
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    params = module.params
    is_there = os.path.lexists(params["path"])
    before = hvmgr.ask("image", "info", *searching(params), "--", params["path"])["image"] if is_there else None
    changed, document = False, {}
    if params["state"] == "merged":
        if is_there:
            words = options(params, "into keep") + searching(params)
            changed, document = hvmgr.change("image", "merge", *words, "--", params["path"])
    elif is_there:
        changed, document = adjust(module, hvmgr, before)
    else:
        changed, document = make(module, hvmgr)
    module.exit_json(**outcome(module, before, changed, document))


def outcome(module, before, changed, document):
    params = module.params
    image = document.get("image") or before
    after = shown(before)
    if params["state"] == "merged" and changed and not params["keep"]:
        after = shown(None)
    elif changed and params["state"] == "present":
        after = dict(after, path=params["path"]) if before else {"path": params["path"]}
        after.pop("state", None)
        if params["size"]:
            after["size"] = to_bytes(params["size"]) or params["size"]
        if params["parent"]:
            after["parent"] = params["parent"]
    result = {"changed": changed, "diff": {"before": shown(before), "after": after}}
    result.update({"image": image} if image else {})
    result.update({"plan": document["plan"]} if document.get("plan") else {})
    return result


if __name__ == "__main__":
    main()
