"""What is said of a VHD is enough to get to a snapshot with memory."""

from __future__ import annotations

import re
import subprocess


def test_refusal_names_the_command_that_ends_it(hvmgr, root):
    vhd = root.parent / "old.vhd"
    command = ["qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", vhd, "4M"]
    subprocess.run(command, check=True, timeout=60)
    made = hvmgr(
        "vm", "create", "an old one", "--memory", "64M", "--disk", vhd, "--network", "none", "--accel", "tcg",
        "--template", "generation1",
    )  # fmt: skip
    assert made.code == 0
    assert "hvmgr disk convert 'an old one' hda" in made.err
    hvmgr.ok("vm", "start", "an old one")
    refused = hvmgr("snapshot", "create", "an old one", "first")
    assert (refused.code, refused.out) == (5, "")
    assert "hda stands on a VHD" in refused.err
    assert re.search(r"hvmgr disk convert 'an old one' hda", refused.err)
    shown = hvmgr("disk", "convert", "an old one", "hda", "--dry-run")
    assert shown.code == 0
    assert "takes in all that is below it" in shown.err
    assert hvmgr("snapshot", "create", "an old one", "first").code == 5  # nothing was changed
    assert "the VHD stays as it is" in hvmgr.ok("disk", "convert", "an old one", "hda").out
    assert hvmgr.ok("disk", "convert", "an old one", "hda", "--json").json["changed"] is False
    created = hvmgr("snapshot", "create", "an old one", "first", "--json")
    assert created.code == 0
    assert created.json["snapshot"]["has_state"] is True
    hvmgr.ok("snapshot", "apply", "an old one", "first")
    assert hvmgr.ok("vm", "show", "an old one", "--json").json["vm"]["state"] == "running"
