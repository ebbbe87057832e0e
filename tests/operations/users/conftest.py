"""hvmgr as other people run it: commands in processes of their own, and disks that are told apart by their bytes."""

from __future__ import annotations

import json

CREATE = ("--disk", "8M", "--template", "generation1", "--memory", "64M", "--accel", "tcg", "--network", "user")


class Person:
    """Somebody at a shell: ``run(*words)`` carries out a command line in the right place, as the right user.

    With ``commands``, a Forking there, hvmgr's are forked from that.
    """

    def __init__(self, run, python, uri, commands=None):
        self.run = run
        self.python = python
        self.uri = uri
        self.commands = commands

    def _hvmgr(self, *words):
        line = ("-c", self.uri, *words, "--json")
        if self.commands is not None:
            return self.commands.run("hvmgr.__main__", *line)
        return self.run(self.python, "-m", "hvmgr", *line)

    def hvmgr(self, *words, code=0):
        """The document that a command gives."""
        done = self._hvmgr(*words)
        assert done.returncode == code, f"{words}: {done.stderr}{done.stdout}"
        return json.loads(done.stdout)

    def refused(self, *words):
        """The error of a command that is refused, with its exit code."""
        done = self._hvmgr(*words)
        assert done.returncode not in {0, 1}, f"{words}: {done.stderr}{done.stdout}"
        return done.returncode, json.loads(done.stdout)["error"]

    def virsh(self, *words):
        """What virsh says."""
        done = self.run("virsh", "-q", "-c", self.uri, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def make(self, name, *options):
        """A new VM, off."""
        self.hvmgr("vm", "create", name, *CREATE, *options)
        self.without_screen(name)

    def without_screen(self, name):
        """Nobody looks, and libvirts that know nothing of each other would quarrel about a port for it."""
        edit = "EDITOR=sed -i '/<graphics/,/<.graphics>/d'"
        done = self.run("env", edit, "virsh", "-q", "-c", self.uri, "edit", name)
        assert done.returncode == 0, done.stderr
        assert "<graphics" not in self.virsh("dumpxml", name)

    def disk(self, name):
        """The image that the VM's first disk writes to now."""
        disks = self.hvmgr("vm", "show", name)["disks"]
        return next(one["path"] for one in disks if one["device"] == "disk")

    def write(self, name, byte):
        """Fills the start of the first disk of a VM that is off."""
        done = self.run("qemu-io", "-f", "qcow2", "-c", f"write -P {byte} 0 64k", self.disk(name))
        assert done.returncode == 0, done.stderr

    def holds(self, name, byte):
        """Whether the first disk holds that."""
        done = self.run("qemu-io", "-r", "-U", "-f", "qcow2", "-c", f"read -P {byte} 0 64k", self.disk(name))
        return done.returncode == 0 and "failed" not in done.stdout
