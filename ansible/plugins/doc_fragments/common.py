# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all modules have in common."""

from __future__ import annotations


class ModuleDocFragment:
    """Shared options and attributes; C(module_utils/hvmgr.py) has the same as an argument spec."""

    DOCUMENTATION = r"""
options:
  executable:
    description:
      - The C(hvmgr) program on the managed host.
      - Without it C(hvmgr) is looked for in E(PATH), in C(/usr/local/bin), and in C(/opt/hvmgr/bin).
    type: path
  uri:
    description:
      - libvirt's connection on the managed host, C(qemu:///system) or C(qemu:///session).
      - Without it E(LIBVIRT_DEFAULT_URI) decides, then what the user is.
    type: str
  root:
    description:
      - The folder that holds the homes of the VMs.
      - Without it E(HVMGR_ROOT) decides, then C(/var/lib/hvmgr), for an ordinary user C(~/.local/share/hvmgr).
    type: path
  wait:
    description:
      - Seconds to wait for another command of hvmgr's that works on the same VM.
    type: int
    default: 10
  timeout:
    description:
      - Seconds after which C(hvmgr) is asked to stop. It does so at the next point where nothing is left half-done, and
        is killed when it has not done so a minute later.
      - Whatever it left open is completed or undone by the next command on that VM.
      - Without it there is no limit. Use C(async) and C(poll) for long operations over connections that may break.
    type: int
requirements:
  - hvmgr 0.1.0 or later on the managed host; the role P(hvmgr.hvmgr.host#role) installs it
notes:
  - The modules run C(hvmgr --json) on the managed host. They need neither Python libraries there, nor that hvmgr is
    installed for the Python that Ansible uses.
  - Most of what hvmgr does needs root. Use C(become) where the connection is not root's.
"""

    CHANGING = r"""
options: {}
attributes:
  check_mode:
    description: Reports what a real run would do, and changes nothing.
    support: full
  diff_mode:
    description: Shows what is there before and after; the same in check mode.
    support: full
  platform:
    description: Where the managed host has to run.
    support: full
    platforms: linux
"""

    LOOKING = r"""
options: {}
attributes:
  check_mode:
    description: Nothing is ever changed.
    support: full
  diff_mode:
    description: Nothing is ever changed.
    support: N/A
  platform:
    description: Where the managed host has to run.
    support: full
    platforms: linux
"""

    IMPORTING = r"""
options:
  source:
    description:
      - An export's folder or archive, a VM home that was moved or copied, or the file with a domain's XML; on the managed
        host.
    type: path
  plan:
    description:
      - A file on the managed host that C(hvmgr compare --plan-out) wrote. It says everything; no other option about the
        VM goes with it.
    type: path
  vm:
    description: Which VM, by name or folder, when O(source) holds several.
    type: str
  name:
    description: The name that the VM gets, if not the one that it had.
    type: str
  mode:
    description:
      - V(copy) copies all files.
      - V(link) leaves the images where they are; the VM writes to differencing images on them. The source has to stay,
        unchanged and read-only, as exports are.
      - V(register) makes the folder itself the home of the VM.
    type: str
    choices: [copy, link, register]
    default: copy
  identity:
    description:
      - V(new) gives the VM, its snapshots and its disks new ids and its network cards new addresses, V(keep) keeps them.
      - Without it ids are V(new) with O(mode=copy) and O(mode=link), and kept with O(mode=register).
    type: str
    choices: [keep, new]
  replace:
    description:
      - With O(identity=keep) the VM with that id becomes what was exported; its present goes into the undo slot.
    type: bool
    default: false
  keep_mac:
    description: With new ids the addresses of the network cards stay.
    type: bool
    default: false
  networks:
    description: Another network for all cards of one. Keys are old networks or bridges, values V(NAME) or V(bridge=BRIDGE).
    type: dict
    default: {}
  nics:
    description: Another network for one card. Keys are addresses, values V(NAME), V(bridge=BRIDGE) or V(disconnected).
    type: dict
    default: {}
  vlans:
    description: Another VLAN for one card. Keys are addresses, values tags or V(none).
    type: dict
    default: {}
  portgroups:
    description: Another port group for one card. Keys are addresses.
    type: dict
    default: {}
  paths:
    description: Files below a folder are below another one now. Keys are old folders, values new ones.
    type: dict
    default: {}
  disks:
    description: Where the image of a disk is. Keys are slots such as V(vda).
    type: dict
    default: {}
  disk_targets:
    description: The file or folder that the base of a disk is copied to. Keys are slots.
    type: dict
    default: {}
  vm_path:
    description: The folder that the VM's home is made in, if not O(root).
    type: path
  snapshot_path:
    description: The folder for snapshots, if not the home.
    type: path
  disk_path:
    description: The folder for base images, if not the home.
    type: path
  snapshot_source:
    description: A folder with snapshots that O(source) lacks.
    type: path
  drop_snapshots:
    description: Snapshots that stay away, by name or id. Those below them move up.
    type: list
    elements: str
    default: []
  without_snapshots:
    description: Leaves all snapshots out.
    type: bool
    default: false
  without_state:
    description: Leaves all saved memory out.
    type: bool
    default: false
  owner:
    description: Whom the VM belongs to.
    type: str
  tags:
    description: Words to find the VM by.
    type: list
    elements: str
    default: []
"""
