"""A program of its own that serves a volume in clear by NBD, read-only: what ``mount`` shows of LUKS and LVM.

    main([SOCKET])

Which volume it is, it reads from stdin. It lets go of its output when it is ready, and ends at SIGTERM. Whoever started it
finds it by the socket's path on its command line (``host/image_export``).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence

from hvmgr import errors
from hvmgr.faces import block_server
from hvmgr.host import pids
from hvmgr.host.nbd_server import Server, Unmapped
from hvmgr.operations.inside import serving


def main(words: Sequence[str]) -> int:
    """Serve until the end that somebody asks for."""
    pids.keep_memory_secret()  # there will be keys in it
    text = sys.stdin.buffer.read()
    try:
        with serving.opened(text) as disk, socket.socket(socket.AF_UNIX) as listener:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: listener.close())
            listener.bind(words[-1])
            listener.listen()
            os.chdir("/")  # no file system is kept busy for nothing
            block_server.let_go_of_output()
            Server(Unmapped(disk), writable=False).accept(listener)
    except errors.HvmgrError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return error.exit_code
    return 0
