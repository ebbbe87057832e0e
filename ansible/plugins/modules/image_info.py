#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: image_info
short_description: Tell what an image file is
version_added: 0.1.0
description:
  - Tells format, sizes, parent and users of an image file, on request with all that it stands on, or with what is wrong.
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - hvmgr.hvmgr.common
  - hvmgr.hvmgr.common.looking
options:
  path:
    description: The image's file on the managed host.
    type: path
    required: true
  chain:
    description: Also everything that it stands on.
    type: bool
    default: false
  check:
    description: Also check it by every rule of its format.
    type: bool
    default: false
  search:
    description: Folders in which parents of a VHD are looked for, too.
    type: list
    elements: path
    default: []
seealso:
  - module: hvmgr.hvmgr.image
"""

EXAMPLES = r"""
- name: Who uses the disk
  hvmgr.hvmgr.image_info:
    path: /srv/disks/data.qcow2
  register: found

- name: Say so
  ansible.builtin.debug:
    msg: "{{ found.image.used_by }}"
"""

RETURN = r"""
image:
  description: What the image is.
  returned: success
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
chain:
  description: The image and its parents down to the base, each as RV(image).
  returned: with O(chain=true)
  type: list
  elements: dict
sound:
  description: Whether readers take the image.
  returned: with O(check=true)
  type: bool
findings:
  description: What is wrong (C(path), C(code), C(severity), C(sentence), C(offset)).
  returned: with O(check=true)
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import Hvmgr, common_arguments, options


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            path={"type": "path", "required": True},
            chain={"type": "bool", "default": False},
            check={"type": "bool", "default": False},
            search={"type": "list", "elements": "path", "default": []},
        ),
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    params = module.params
    words = options(params, "chain") + [f"--search={one}" for one in params["search"]] + ["--", params["path"]]
    document = hvmgr.ask("image", "info", *words)
    result = {key: document[key] for key in ("image", "chain") if document[key] is not None}
    if params["check"]:
        checked = hvmgr.ask("image", "check", *words, ok_codes=(0, 6))  # 6: it says what is wrong
        result.update(sound=checked["sound"], findings=checked["findings"])
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
