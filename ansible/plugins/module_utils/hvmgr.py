# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The one way from a module to hvmgr: C(hvmgr --json) on the managed host, and what it says as Ansible has it.

Modules decide what is wanted and compare it with what is there; everything else is hvmgr's. Nothing of hvmgr is imported.
"""

from __future__ import annotations

import json
import re

MINIMUM = (0, 1, 0)
SCHEMA = 1

_PLACES = ["/usr/local/bin", "/opt/hvmgr/bin"]
_INSTALL = "the role hvmgr.hvmgr.host installs it"
_GRACE_S = 60
_STOPPED = (124, 137)  # timeout(1): stopped, killed


def common_arguments():
    """The options of the doc fragment C(common)."""
    return {
        "executable": {"type": "path"},
        "uri": {"type": "str"},
        "root": {"type": "path"},
        "wait": {"type": "int", "default": 10},
        "timeout": {"type": "int"},
    }


def import_arguments():
    """The options of the doc fragment C(common.importing), and C(import_words) makes words of them."""
    spec = {
        "source": {"type": "path"},
        "plan": {"type": "path"},
        "vm": {"type": "str"},
        "name": {"type": "str"},
        "mode": {"type": "str", "choices": ["copy", "link", "register"], "default": "copy"},
        "identity": {"type": "str", "choices": ["keep", "new"]},
        "replace": {"type": "bool", "default": False},
        "keep_mac": {"type": "bool", "default": False},
        "vm_path": {"type": "path"},
        "snapshot_path": {"type": "path"},
        "disk_path": {"type": "path"},
        "snapshot_source": {"type": "path"},
        "drop_snapshots": {"type": "list", "elements": "str", "default": []},
        "without_snapshots": {"type": "bool", "default": False},
        "without_state": {"type": "bool", "default": False},
        "owner": {"type": "str"},
        "tags": {"type": "list", "elements": "str", "default": []},
    }
    spec.update({key: {"type": "dict", "default": {}} for key in _MAPS})
    return spec


def import_words(params):
    """The arguments of C(hvmgr import) and C(hvmgr compare); O(plan) says everything alone."""
    if params["plan"]:
        return ["--plan", params["plan"]]
    words = options(
        params,
        "vm name mode vm_path snapshot_path disk_path snapshot_source owner replace keep_mac without_snapshots without_state",
    )
    if params["identity"]:
        words.append("--keep-id" if params["identity"] == "keep" else "--new-id")
    for key, option in _MAPS.items():
        for old, new in (params[key] or {}).items():
            words.append(f"{option}={old}={new}")
    words += [f"--drop-snapshot={one}" for one in params["drop_snapshots"]]
    words += [f"--tag={one}" for one in params["tags"]]
    return [*words, "--", params["source"]]


_MAPS = {
    "networks": "--network",
    "nics": "--nic",
    "vlans": "--vlan",
    "portgroups": "--portgroup",
    "paths": "--path",
    "disks": "--disk",
    "disk_targets": "--disk-target",
}


def options(params, names):
    """Options of the command line with the values of module options of the same name; what is not set is left out."""
    words = []
    for name in names.split():
        value, option = params[name], "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words.append(f"{option}={value}")
    return words


def to_bytes(size):
    """A size such as 512M in bytes; what is no plain number with a unit is hvmgr's to judge, and None here."""
    found = re.match(r"(\d+)([KMGT]?)(?:I?B)?$", (size or "").strip().upper())
    return int(found.group(1)) << (10 * " KMGT".index(found.group(2) or " ")) if found else None


class Failure(Exception):
    """hvmgr said no: its code, its words, what to do, and what it knows about it."""

    def __init__(self, code, message, hint=None, facts=None):
        super().__init__(message)
        self.code, self.message, self.hint, self.facts = code, message, hint, facts or {}


class Hvmgr:
    """hvmgr on the managed host, for one module run."""

    def __init__(self, module):
        self.module = module
        self.program = self._find()
        self._require_version()

    # -- asking and doing ------------------------------------------------------------------------------------------

    def ask(self, *words, **more):
        """The document of a command that only looks."""
        return self._document(words, **more)

    def find(self, *words):
        """The same about what the last word names, or None where hvmgr says that there is no such thing."""
        try:
            return self._document(words, raising=True)
        except Failure as failure:
            if failure.code == "NotFound" and failure.facts.get("name") == words[-1]:
                return None
            return self.fail(failure)

    def change(self, *words, **more):
        """Do something; whether that changes anything, and the document: in check mode that of the dry run."""
        if self.module.check_mode:
            document = self._document(("--dry-run", *words), **more)
            return document.get("plan") is not None or document.get("first") is not None, document
        document = self._document(("--yes", *words), **more)
        return bool(document.get("changed")), document

    def refusal(self, *words):
        """What hvmgr has against doing this now, as a Failure; None when it would do it."""
        try:
            self._document(("--dry-run", *words), raising=True)
        except Failure as failure:
            return failure
        return None

    def fail(self, failure):
        """The module ends with hvmgr's words."""
        hint = f" ({failure.hint})" if failure.hint else ""
        self.module.fail_json(
            msg=failure.message + hint,
            error={"code": failure.code, "message": failure.message, "hint": failure.hint, "facts": failure.facts},
        )

    # -- the program -----------------------------------------------------------------------------------------------

    def _find(self):
        wanted = self.module.params["executable"]
        if wanted is None:
            found = self.module.get_bin_path("hvmgr", opt_dirs=_PLACES)
            if found is None:
                self.fail(
                    Failure(
                        "NotInstalled", "hvmgr is not installed on this host", _INSTALL + "; or name it with executable"
                    )
                )
            return found
        found = self.module.get_bin_path(wanted) if "/" in wanted else None
        if found is None:
            self.fail(
                Failure(
                    "NotInstalled",
                    f"there is no program {wanted} on this host",
                    "name hvmgr's place with executable; " + _INSTALL,
                )
            )
        return found

    def _require_version(self):
        said = self._document(("version",)).get("version", "")
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", str(said))
        if numbers is None or tuple(int(one) for one in numbers.groups()) < MINIMUM:
            wanted = ".".join(str(one) for one in MINIMUM)
            self.fail(
                Failure(
                    "TooOld",
                    "{} is version {}, and this collection needs {} or later".format(
                        self.program, said or "unknown", wanted
                    ),
                    _INSTALL.replace("installs", "updates"),
                )
            )

    def _document(self, words, data=None, raising=False, ok_codes=(0,)):
        """One run of the program, as the document that it printed."""
        argv = self._limit() + [self.program, "--json"] + self._settings() + [str(one) for one in words]
        code, out, err = self.module.run_command(argv, data=data, binary_data=data is not None, check_rc=False)
        document = _parsed(out)
        failure = self._failure(code, document, out, err)
        if code in ok_codes and document and document.get("schema") == SCHEMA and "error" not in document:
            for line in err.splitlines():
                self.module.warn(line)
            return document
        if raising:
            raise failure
        return self.fail(failure)

    def _settings(self):
        params = self.module.params
        words = ["--wait={}".format(params["wait"])]
        words += ["--connect={}".format(params["uri"])] if params["uri"] else []
        words += ["--root={}".format(params["root"])] if params["root"] else []
        return words

    def _limit(self):
        """timeout(1) asks to stop with SIGTERM, which hvmgr follows where nothing is left half-done."""
        seconds = self.module.params["timeout"]
        if seconds is None:
            return []
        if seconds < 1:
            self.fail(Failure("UsageError", f"timeout is {seconds}, and has to be 1 second or more"))
        program = self.module.get_bin_path("timeout", required=True)
        return [program, "--signal=TERM", f"--kill-after={_GRACE_S}", str(seconds)]

    def _failure(self, code, document, out, err):
        if document is not None and document.get("schema") != SCHEMA:
            return Failure(
                "Unsupported",
                "{} speaks version {} of its documents, and this collection knows {}".format(
                    self.program, document.get("schema"), SCHEMA
                ),
                "update the collection",
            )
        said = (document or {}).get("error") or {}
        if self.module.params["timeout"] and code in _STOPPED:
            words = "; it said: {}".format(said["message"]) if said else ""
            return Failure(
                "TimedOut",
                "hvmgr was stopped after {} seconds{}".format(self.module.params["timeout"], words),
                "run the task again: what was left open is completed or undone first. Give it more time, or use async",
                said.get("facts"),
            )
        if said:
            return Failure(said.get("code", "Defect"), said.get("message", ""), said.get("hint"), said.get("facts"))
        told = " ".join((err.strip() or out.strip() or "nothing").splitlines()[-3:])
        return Failure("Defect", f"{self.program} ended with {code} and said: {told[-500:]}", "is it hvmgr?")


def _parsed(out):
    try:
        document = json.loads(out)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


# -- snapshot trees ------------------------------------------------------------------------------------------------


def find_snapshot(hvmgr, document, reference):
    """The snapshot of a list by exact name, id, or an id's first 8 digits or more; None when there is none."""
    known = document["snapshots"]
    by_name = [one for one in known if one["name"] == reference]
    found = by_name or [one for one in known if one["id"] == reference]
    if not found and len(reference) >= 8:
        found = [one for one in known if one["id"].startswith(reference)]
    if len(found) > 1:
        vm, ids = document["vm"]["name"], ", ".join(one["id"] for one in found)
        hvmgr.fail(
            Failure(
                "UsageError", f"{len(found)} snapshots of {vm} are called '{reference}'", f"name one by its id: {ids}"
            )
        )
    return found[0] if found else None


def draw(vm, snapshots, parent, now="Now"):
    """A snapshot tree as text, one line a node; C(parent) is the id of the snapshot above the present."""
    known = {one["id"] for one in snapshots}
    lines = [vm]

    def below(above, depth):
        for one in snapshots:
            if (one["parent"] if one["parent"] in known else None) == above:
                notes = " ({})".format(" / ".join(one["notes"].splitlines())) if one.get("notes") else ""
                lines.append("{}- {}{}".format("  " * depth, one["name"], notes))
                below(one["id"], depth + 1)
        if (parent if parent in known else None) == above:
            lines.append("{}- {}".format("  " * depth, now))

    below(None, 1)
    return "\n".join(lines) + "\n"


def draw_list(document, now="Now"):
    """The tree of what C(hvmgr snapshot list) says."""
    return draw(document["vm"]["name"], document["snapshots"], document["now"]["parent"], now)


def subtree(snapshots, top):
    """The id of a snapshot and those of all below it."""
    found = [top]
    for one in found:
        found += [each["id"] for each in snapshots if each["parent"] == one]
    return found


def without(snapshots, gone):
    """A list of snapshots without some: those below them move up."""
    parents = {one["id"]: one["parent"] for one in snapshots}

    def heir(snapshot):
        while snapshot in gone:
            snapshot = parents[snapshot]
        return snapshot

    return [dict(one, parent=heir(one["parent"])) for one in snapshots if one["id"] not in gone], heir
