"""An ordinary user with a session libvirt of his own: who runs hvmgr there, in a home that is gone afterwards.

As root: the user nobody, so that nothing of a real one's is touched. Else: whoever runs the tests, in a home of its own
all the same. The user is in the group of /dev/kvm, as on a desktop: what libvirt learnt about this host's QEMU, which
takes it 8 s, holds for the user as well then.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hvmgr import settings
from tests import private_libvirt

_HERE = Path(__file__).resolve().parents[1]
_PROGRAMS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class OrdinaryUser:
    """The user, and the folder with its home and its runtime folder."""

    folder: Path
    name: str
    uid: int
    gid: int
    python: str

    @property
    def home(self):
        return self.folder / "home"

    @property
    def root(self):
        """Where hvmgr keeps the user's VMs."""
        return self.home / ".local" / "share" / "hvmgr"

    def command(self, *words, groups=()):
        """A command line that the user runs, with nothing of our environment."""
        environment = {
            "PATH": _PROGRAMS,
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "PYTHONPATH": os.pathsep.join([str(_HERE), *(one for one in sys.path if one.endswith("-packages"))]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LANG": "C.UTF-8",
        }
        line = ["env", "-i", f"--chdir={self.home}", *(f"{name}={value}" for name, value in environment.items())]
        if os.geteuid() == 0:
            member = ",".join(map(str, [*groups, *kvm_group()]))
            clear = f"--groups={member}" if member else "--clear-groups"
            line = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", clear, *line]
        return [*line, *map(str, words)]

    def run(self, *words, groups=(), timeout=60, **wishes):
        """What a command of the user's said, and its exit code."""
        line = self.command(*words, groups=groups)
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, **wishes)

    def owns(self, path):
        """Makes a file or a folder, with all in it, the user's."""
        for one in [path, *path.rglob("*")]:
            os.chown(one, self.uid, self.gid)


def kvm_group():
    with contextlib.suppress(OSError):
        return [Path("/dev/kvm").stat().st_gid]
    return []


def find_python():
    """A Python of our version that any user may run, with the packages that we have; None without one."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        found = Path(candidate).resolve()
        if found.exists() and all(one.stat().st_mode & 0o001 for one in [found, *found.parents]):
            return candidate
    return None


@contextlib.contextmanager
def made(python, capability_cache):
    """The user, with what libvirt and the guest's builder would have to learn or download; all gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    one = OrdinaryUser(folder, user.pw_name, user.pw_uid, user.pw_gid, python)
    for name in ("home", "run"):
        (folder / name).mkdir(mode=0o700)
    learnt = one.home / ".cache" / "libvirt" / "qemu" / "cache" / "capabilities"
    shutil.copytree(capability_cache, learnt)
    guests = settings.cache_folder() / "guest"
    if guests.is_dir():
        shutil.copytree(guests, one.home / ".cache" / "hvmgr" / "guest")
    one.owns(folder)
    try:
        yield one
    finally:
        end(one)
        shutil.rmtree(folder)


def end(user):
    """Ends the user's guests and daemons, by the pid files in the runtime folder."""
    files = [*(user.folder / "run" / "libvirt").rglob("*.pid")]
    for file in sorted(files, key=lambda file: file.parent.name != "run"):  # guests before daemons
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text())
            if Path(f"/proc/{pid}").stat().st_uid == user.uid and str(user.folder).encode() in _environment(pid):
                os.kill(pid, signal.SIGKILL)
                private_libvirt.wait_for_end(pid)


def _environment(pid):
    """The number in an old pid file may belong to anybody by now: what was started in the user's home says so."""
    return Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
