"""Chains of qcow2 images whose links hold what really changed between two moments of a raw disk, and nothing else."""

from __future__ import annotations

import contextlib
import os

from tests.storage import file_trees

CLUSTER = 64 << 10


def child(path, parent, fmt):
    """An image that stands on another one and says nothing yet."""
    file_trees.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", fmt, "-b", parent, path)
    return path


def write_difference(image, before, after, words=()):
    """The image gets the clusters of ``after`` that are not those of ``before``; how many that are.

    ``words`` tell QEMU where in it they go, if not to where they are.
    """
    commands = []
    with open(before, "rb") as old, open(after, "rb") as new:
        for at in range(0, os.path.getsize(after), CLUSTER):
            one = new.read(CLUSTER)
            if one != old.read(CLUSTER):
                piece = f"{image}.{at}"
                file_trees.write(piece, one)
                commands += ["-c", f"write -q -s {piece} {at} {len(one)}"]
    for start in range(0, len(commands), 200):
        file_trees.run("qemu-io", *commands[start : start + 200], *(words or ("-f", "qcow2", image)))
    for command in commands[1::2]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(command.split()[3])
    return len(commands) // 2


def next_moment(image, parent, fmt, before, after):
    """A child of the parent that shows ``after`` where the parent shows ``before``."""
    child(image, parent, fmt)
    write_difference(image, before, after)
    return image
