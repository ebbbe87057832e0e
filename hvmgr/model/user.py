"""Who may use the HTTP server: a name, a role, and what is kept of the password.

Of a password only scrypt's result is kept (RFC 7914), with the salt and the costs that it was made with, so that the
costs can rise later while old entries stay valid.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from enum import StrEnum

from hvmgr import errors

LOG_N, BLOCK, PARALLEL = 15, 8, 1  # 32 MiB and about 0.1 s for each guess
SALT_SIZE = 16
SHORTEST, LONGEST = 8, 1024  # characters; bytes in UTF-8
LONGEST_NAME = 64

_KEY_SIZE = 32
_MOST_LOG_N, _MOST_BLOCK, _MOST_PARALLEL = 20, 16, 16  # what a damaged file may not exceed: 2 GiB
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._@-]{{0,{LONGEST_NAME - 1}}}")


class Role(StrEnum):
    """What a user may do: look and export, or everything."""

    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Secret:
    """What is kept of a password."""

    salt: bytes
    key: bytes
    log_n: int = LOG_N
    block: int = BLOCK
    parallel: int = PARALLEL

    def to_text(self) -> str:
        """One word for a file."""
        return f"scrypt:{self.log_n}:{self.block}:{self.parallel}:{self.salt.hex()}:{self.key.hex()}"

    @classmethod
    def from_text(cls, text: str) -> Secret:
        """The inverse; ValueError for anything else."""
        kind, log_n, block, parallel, salt, key = text.split(":")
        found = cls(bytes.fromhex(salt), bytes.fromhex(key), int(log_n), int(block), int(parallel))
        fits = 1 <= found.log_n <= _MOST_LOG_N and 1 <= found.block <= _MOST_BLOCK
        if kind != "scrypt" or not fits or not 1 <= found.parallel <= _MOST_PARALLEL or len(found.key) != _KEY_SIZE:
            raise ValueError(text)
        return found


@dataclass(frozen=True, slots=True)
class User:
    """One who may log in."""

    name: str
    role: Role
    secret: Secret


def make_secret(password: str, salt: bytes, *, log_n: int = LOG_N) -> Secret:
    """What to keep of a new password; ``salt`` is random. UsageError for a password that is too short or too long."""
    if len(password) < SHORTEST:
        raise errors.UsageError(
            f"the password has {len(password)} characters", hint=f"choose one with {SHORTEST} or more"
        )
    if len(password.encode("utf-8", "surrogatepass")) > LONGEST:
        raise errors.UsageError("the password is too long", hint=f"at most {LONGEST} bytes")
    return Secret(salt, _derive(password, Secret(salt, b"", log_n)), log_n)


def has_password(secret: Secret, password: str) -> bool:
    """Whether this is the password; it takes the same time whatever the answer is."""
    return hmac.compare_digest(_derive(password, secret), secret.key)


def require_name(name: str) -> None:
    """UsageError for a name that no user can have."""
    if not _NAME.fullmatch(name):
        raise errors.UsageError(
            f"'{name}' cannot be the name of a user",
            hint=f"use 1 to {LONGEST_NAME} letters, digits and . _ @ - (not first)",
        )


def _derive(password: str, secret: Secret) -> bytes:
    cost = 1 << secret.log_n
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"),
        salt=secret.salt,
        n=cost,
        r=secret.block,
        p=secret.parallel,
        maxmem=256 * secret.block * (cost + secret.parallel),
        dklen=_KEY_SIZE,
    )
