#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_import
short_description: Make a VM out of an export, a VM home or a domain's XML
version_added: 0.1.0
description:
  - All snapshots come along, each applicable, with their saved memory. Every path, network and identity is open to change,
    and the maps reach the present, every snapshot and the configurations inside saved memory.
  - What is in the way is told before anything is touched, as by M(hvmgr.hvmgr.vm_compare_info).
  - Imports take long. Use C(async) with C(poll) where the connection may break meanwhile.
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - hvmgr.hvmgr.common
  - hvmgr.hvmgr.common.importing
  - hvmgr.hvmgr.common.changing
options:
  on_exists:
    description:
      - What to do where a VM of the name is there (with O(mode=register) where the folder is a VM already).
      - V(same) leaves it when it was made of this very source in this mode; else the task fails. What the VM has become
        since, and what the maps say, is not compared.
      - V(keep) leaves it in any case, V(fail) fails.
      - With O(replace=true) the VM is replaced every time; that is always a change.
    type: str
    choices: [fail, keep, same]
    default: same
seealso:
  - module: hvmgr.hvmgr.vm_export
  - module: hvmgr.hvmgr.vm_compare_info
"""

EXAMPLES = r"""
- name: Make a VM of a gold export that lies on every host
  hvmgr.hvmgr.vm_import:
    source: /srv/gold/web
    name: web
    mode: link
    networks:
      lan: "bridge=br0"

- name: Take over a home that was copied from another host
  hvmgr.hvmgr.vm_import:
    source: /var/lib/hvmgr/web
    mode: register
"""

RETURN = r"""
vm:
  description: The VM.
  returned: success, but in check mode only of a VM that is there
  type: dict
  contains:
    id: {description: Its id; null in check mode of a new one., type: str, returned: always}
    name: {description: Its name., type: str, returned: always}
    state: {description: "V(off), V(saved), V(running), V(paused), V(sleeping) or V(crashed); null where libvirt cannot be asked.", type: str, returned: always}
    home: {description: The folder that holds everything of it., type: str, returned: always}
source:
  description: What it was made of.
  returned: success
  type: str
mode:
  description: How it was made.
  returned: success
  type: str
plan:
  description: The steps that hvmgr would take, for people.
  returned: in check mode, when something would be done
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import (
    Hvmgr,
    common_arguments,
    import_arguments,
    import_words,
)


def main():
    module = AnsibleModule(
        argument_spec=dict(
            common_arguments(),
            on_exists={"type": "str", "choices": ["fail", "keep", "same"], "default": "same"},
            **import_arguments(),
        ),
        mutually_exclusive=[("source", "plan")],
        required_one_of=[("source", "plan")],
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    params = module.params
    words = import_words(params)
    compared = hvmgr.ask("compare", *words)
    on_exists = [] if params["replace"] else ["--if-exists={}".format(params["on_exists"])]
    changed, document = hvmgr.change("import", *on_exists, *words)
    result = {"changed": changed, "source": compared["source"], "mode": compared["mode"]}
    result.update({key: document[key] for key in ("vm", "plan") if document.get(key)})
    after = "{} in {} ({} of {})\n".format(compared["name"], compared["home"], compared["mode"], compared["source"])
    module.exit_json(diff={"before": "" if changed else after, "after": after}, **result)


if __name__ == "__main__":
    main()
