"""What operations told, without the one line that depends on the host: why a guest stood still while it was saved."""

from __future__ import annotations

from hvmgr.operations.steps.memory_steps import STANDS_STILL


def into(said):
    """A reporter's notice that keeps every sentence but that one."""
    return lambda sentence: None if sentence.startswith(STANDS_STILL) else said.append(sentence)


def text(stderr):
    """What a command wrote to stderr, without it."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith(STANDS_STILL))
