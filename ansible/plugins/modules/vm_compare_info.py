#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_compare_info
short_description: Tell what an import would find in its way
version_added: 0.1.0
description:
  - The compatibility report of an import; paths, networks, CPU, machine type, names, ids and space. Nothing is changed.
author:
  - The hvmgr developers (@hvmgr)
extends_documentation_fragment:
  - hvmgr.hvmgr.common
  - hvmgr.hvmgr.common.importing
  - hvmgr.hvmgr.common.looking
options:
  thorough:
    description: Reads every byte of images whose SHA-256 is recorded.
    type: bool
    default: false
seealso:
  - module: hvmgr.hvmgr.vm_import
"""

EXAMPLES = r"""
- name: Would the gold export run here
  hvmgr.hvmgr.vm_compare_info:
    source: /srv/gold/web
    mode: link
  register: report

- name: Say what is in the way
  ansible.builtin.assert:
    that: report.ready
    fail_msg: "{{ report.findings | map(attribute='sentence') | join('; ') }}"
"""

RETURN = r"""
ready:
  description: Whether nothing is in the way of an import.
  returned: success
  type: bool
name:
  description: The name that the VM would have.
  returned: success
  type: str
home:
  description: Where its home would be.
  returned: success
  type: str
mode:
  description: How it would be made.
  returned: success
  type: str
source:
  description: What it would be made of.
  returned: success
  type: str
findings:
  description: What was found, worst first.
  returned: success
  type: list
  elements: dict
  contains:
    code: {description: A stable word for it., type: str, returned: always}
    severity: {description: "V(error), V(warning) or V(info).", type: str, returned: always}
    sentence: {description: What it is., type: str, returned: always}
    where: {description: What it is about., type: str, returned: always}
    repair: {description: What puts it right., type: str, returned: always}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.hvmgr.hvmgr.plugins.module_utils.hvmgr import (
    Hvmgr,
    common_arguments,
    import_arguments,
    import_words,
    options,
)


def main():
    module = AnsibleModule(
        argument_spec=dict(common_arguments(), thorough={"type": "bool", "default": False}, **import_arguments()),
        mutually_exclusive=[("source", "plan")],
        required_one_of=[("source", "plan")],
        supports_check_mode=True,
    )
    hvmgr = Hvmgr(module)
    document = hvmgr.ask("compare", *options(module.params, "thorough"), *import_words(module.params))
    report = {key: document[key] for key in ("ready", "name", "home", "mode", "source", "findings")}
    module.exit_json(changed=False, **report)


if __name__ == "__main__":
    main()
