"""What answers in place of libguestfs's program: whatever it says, the parent has one sentence for it."""

from __future__ import annotations

import json
import socket
import struct
import threading

import pytest

from hvmgr import errors
from hvmgr.host import libguestfs

_NUMBERS = [1, 2, 0o100644, 1, 0, 0, 0, 10, 8, 0, 0, 0]


class Ended:
    """A program that has said nothing on its stderr."""

    def stderr_text(self):
        return ""


@pytest.fixture
def answering():
    """A machine whose program gives this answer, as bytes, to the first question; then it is gone."""
    with socket.socket() as nobody:
        connections, threads = [nobody], []

        def make(raw):
            ours, theirs = socket.socketpair()
            ours.settimeout(20)
            connections.extend((ours, theirs))

            def answer():
                theirs.recv(1 << 16)
                theirs.sendall(raw)
                theirs.shutdown(socket.SHUT_RDWR)

            threads.append(threading.Thread(target=answer))
            threads[-1].start()
            return libguestfs.Machine(ours, Ended())

        yield make
        for one in threads:
            one.join()
        for one in connections:
            one.close()


def message(text, data=b""):
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack(">II", len(raw), len(data)) + raw + data


_QUESTIONS = {
    "file_systems": lambda machine: machine.file_systems(),
    "device": lambda machine: machine.device("/dev/sda"),
    "mount": lambda machine: machine.mount("/dev/sda", "ext4"),
    "names": lambda machine: machine.names(b"/0"),
    "stats": lambda machine: machine.stats(b"/0", [b"name"]),
    "attributes": lambda machine: machine.attributes(b"/0/name"),
}


@pytest.mark.parametrize("question", _QUESTIONS)
@pytest.mark.parametrize(
    "answer",
    [
        {"yes": 5}, {"yes": None}, {"yes": [5]}, {"yes": [None, None]}, {"yes": {"a": 5}}, {"yes": "\u20ac"},
        {"yes": [[None, *["1"] * 12]]}, {"yes": [[None, -1, *_NUMBERS[1:]]]}, {"yes": [[None, *_NUMBERS[:-1], 1 << 200]]},
        {"yes": [[None, *_NUMBERS], [None, *_NUMBERS]]}, {"other": 5}, [], 5, {"no": 5}, {"no": "x", "number": []},
        b"[" * 100_000, b"\xff", b"",
    ],
    ids=range(18),
)  # fmt: skip
def test_nonsense_is_one_sentence(answering, question, answer):
    machine = answering(message(answer))
    try:
        found = _QUESTIONS[question](machine)
    except errors.HvmgrError as error:
        found = error.message.partition(" ")[0]
    # Some of them are answers, if to other questions.
    assert found in ("libguestfs", {"a": "5"}, [b"a"])


def test_right_answer_is_taken(answering):
    (stat,) = answering(message({"yes": [[None, *_NUMBERS]]})).stats(b"/0", [b"name"])
    assert (stat.number, stat.size, stat.target) == (2, 10, None)


@pytest.mark.parametrize("lengths", [(0xFFFFFFFF, 0), (2, 0xFFFFFFFF)])
def test_message_without_end_is_not_waited_for(answering, lengths):
    with pytest.raises(errors.HostFailed, match="libguestfs ended"):
        answering(struct.pack(">II", *lengths) + b"{}").names(b"/0")
