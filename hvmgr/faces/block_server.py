"""A program of its own that serves a VHD and its parents by NBD: the part of ``image attach`` that QEMU cannot do.

    main(["--writable", PATH, SOCKET])

It lets go of its output when it is ready, and ends at SIGTERM, when all that was written is on the disk. Whoever
started it finds it by the socket's path on its command line (``host/image_export``).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from hvmgr import errors, vhd
from hvmgr.host import image_locks
from hvmgr.host.nbd_server import Server


def main(words: Sequence[str]) -> int:
    """Serve until the end that somebody asks for."""
    writable = words[:1] == ["--writable"]
    path, address = words[-2:]
    try:
        with vhd.open_chain(Path(path)) as found:
            files = [image.path for image in found.images]
        for number, file in enumerate(files):
            image_locks.take(file, writable=writable and number == 0)  # as long as this process lives
        chain = vhd.open_chain(Path(path), writable=writable)  # anew: only now nobody changes its tables any more
        if [image.path for image in chain.images] != files:
            raise errors.Conflict(f"the chain of {path} was changed meanwhile")
    except errors.HvmgrError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return error.exit_code
    with chain, socket.socket(socket.AF_UNIX) as listener:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: listener.close())
        listener.bind(address)
        listener.listen()
        os.chdir("/")  # no file system is kept busy for nothing
        let_go_of_output()
        server = Server(chain, writable=writable)
        server.accept(listener)
        server.flush()
    return 0


def let_go_of_output() -> None:
    """Whoever waits for the output to end knows that we are ready."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
