"""Which files libvirt's AppArmor helper may read, by the rules of its own profile on this host.

libvirt confines each VM by a profile of its own, which virt-aa-helper writes at each start: it reads the VM's images for
the parents that they name, and is confined itself. An image that it may not read is one that the VM may not use.

A profile is a list of lines ``[audit] [deny] PATH RIGHTS,``; a deny wins whatever else is allowed. Source:
apparmor.d(5). Owners, conditions and variables of other kinds are left out: they never allow an image.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

HELPER = "usr.lib.libvirt.virt-aa-helper"
FOLDER = "etc/apparmor.d"

# What the profile said in every release from 2010 to 2026, for a host where it has another name.
_USUAL = """
  audit deny @{HOME}/.*/** mrwkl,
  audit deny @{HOME}/bin/** mrwkl,
  @{HOME}/** r,
  /var/lib/libvirt/images/** r,
  /{media,mnt,opt,srv}/** r,
  /**.img r,
  /**.raw r,
  /**.qcow{,2} r,
  /**.qed r,
  /**.vmdk r,
  /**.vhd r,
  /**.[iI][sS][oO] r,
  /**/disk{,.*} r,
"""

_RULE = re.compile(r'(?:audit\s+)?(deny\s+)?(?:file\s+)?"?((?:/|@\{HOME\})[^"]*?)"?\s+([a-zA-Z]+)\s*,')
_HOMES = ("/home/", "/root/")


@dataclass(frozen=True, slots=True)
class Rule:
    """A line that concerns reading, and what it says."""

    line: str
    denies: bool
    paths: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a file may not be read: no line allows it (``missing``: the one that would), or ``denied`` forbids it."""

    missing: str | None = None
    denied: str | None = None


def judge(root: Path, file: Path) -> Verdict | None:
    """What keeps libvirt's helper from reading a file, by the files below ``root``; None when it may."""
    path = os.path.realpath(file)
    profile = _read(root / FOLDER / HELPER) or _USUAL
    found = [*rules(profile), *rules(_read(root / FOLDER / "local" / HELPER) or "")]
    hit = [rule for rule in found if rule.paths.fullmatch(path)]
    for rule in hit:
        if rule.denies:
            return Verdict(denied=rule.line)
    return None if hit else Verdict(missing=f'"{path}" r,' if re.search(r'[\s"{}\[\]*?]', path) else f"{path} r,")


def rules(text: str) -> list[Rule]:
    """The lines of a profile that allow or deny reading."""
    found = []
    for line in text.splitlines():
        match = _RULE.fullmatch(line.strip())
        if match is not None and "r" in match[3]:
            homes = _HOMES if match[2].startswith("@{HOME}") else ("",)
            globs = [match[2].replace("@{HOME}", home, 1).replace("//", "/") for home in homes]
            if homes[0] == "/home/":
                globs[0] = "/home/*/" + globs[0].removeprefix("/home/")
            if not any("@{" in glob for glob in globs):
                paths = re.compile("|".join(map(_expression, globs)))
                found.append(Rule(line.strip(), match[1] is not None, paths))
    return found


def _expression(glob: str) -> str:
    """A glob of a profile as a regular expression."""
    parts, depth, at = [], 0, 0
    while at < len(glob):
        char = glob[at]
        if glob.startswith("**", at):
            parts.append(".*")
            at += 1
        elif char == "[" and (end := glob.find("]", at)) > at:
            parts.append(glob[at : end + 1])
            at = end
        elif char == "{":
            parts.append("(?:")
            depth += 1
        elif char == "}" and depth:
            parts.append(")")
            depth -= 1
        elif char == "," and depth:
            parts.append("|")
        else:
            parts.append({"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)))
        at += 1
    return "".join(parts)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
