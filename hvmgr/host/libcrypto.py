"""OpenSSL's libcrypto, for what a disk is encrypted with: one sector after the other, each with a beginning of its own.

It is called as the library that it is, because Python's own modules have no such ciphers, and a Python package that has
them takes longer to begin a sector than to decrypt it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import weakref
from collections.abc import Callable
from typing import Any

from hvmgr import errors

_LIBRARIES = ("libcrypto.so.3", "libcrypto.so.1.1")
_IV = 16
_XTS = {32: "aes-128-xts", 64: "aes-256-xts"}
_CBC = {16: "aes-128-cbc", 24: "aes-192-cbc", 32: "aes-256-cbc"}
_MODES = {"xts": _XTS, "cbc": _CBC}
_BEGINNINGS = ("plain64", "plain", "essiv:sha256")
_NUMBER = 512  # what the numbers of sectors count, however large the sectors are


class SectorCipher:
    """Decrypts what dm-crypt has encrypted, and encrypts as it does, with ``spec`` in its words: ``aes-xts-plain64``.

    Unsupported for a cipher that is not known, or a host without the library.
    """

    def __init__(self, spec: str, key: bytes, sector: int) -> None:
        require_known(spec)
        _, mode, beginning = spec.split("-", 2)
        names = _MODES[mode]
        if len(key) not in names:
            raise errors.Unsupported(f"no reader here knows the cipher {spec} with keys of {8 * len(key)} bits")
        self.sector = sector
        self._begins = _beginning(beginning, key)
        self._library = _library()
        self._decrypting = _context(self, names[len(key)], key)
        self._encrypting = _context(self, names[len(key)], key, encrypts=True)

    def decrypt(self, number: int, data: memoryview) -> None:
        """Whole sectors, in place; ``number`` is that of the first one, in units of 512 bytes."""
        self._run(self._library.EVP_DecryptInit_ex, self._library.EVP_DecryptUpdate, self._decrypting, number, data)

    def encrypt(self, number: int, data: memoryview) -> None:
        """The same the other way round."""
        self._run(self._library.EVP_EncryptInit_ex, self._library.EVP_EncryptUpdate, self._encrypting, number, data)

    def _run(self, begin: Any, update: Any, context: int, number: int, data: memoryview) -> None:
        written = ctypes.c_int(0)
        at, count = ctypes.addressof(ctypes.c_char.from_buffer(data)), ctypes.addressof(written)
        sector, step, begins = self.sector, self.sector // _NUMBER, self._begins
        for place in range(at, at + len(data), sector):
            if not begin(context, None, None, None, begins(number)) or not update(context, place, count, place, sector):
                raise errors.HostFailed(f"libcrypto does not work on sector {number}")
            number += step


def require_known(spec: str) -> None:
    """Unsupported for a cipher that nobody here decrypts."""
    cipher, _, rest = spec.partition("-")
    mode, _, beginning = rest.partition("-")
    if cipher != "aes" or mode not in _MODES or beginning not in _BEGINNINGS:
        raise errors.Unsupported(f"no reader here knows the cipher {spec}")


def _beginning(name: str, key: bytes) -> Callable[[int], bytes]:
    """From a sector's number what its decryption begins with."""
    if name == "plain64":
        return lambda number: number.to_bytes(_IV, "little")
    if name == "plain":
        return lambda number: (number & 0xFFFFFFFF).to_bytes(_IV, "little")
    return functools.partial(_essiv, _Ecb(hashlib.sha256(key).digest()))


def _essiv(cipher: _Ecb, number: int) -> bytes:
    return cipher.encrypt(number.to_bytes(_IV, "little"))


class _Ecb:
    """AES of single blocks."""

    def __init__(self, key: bytes) -> None:
        self._library = _library()
        self._context = _context(self, "aes-256-ecb", key, encrypts=True)

    def encrypt(self, block: bytes) -> bytes:
        out, written = ctypes.create_string_buffer(2 * _IV), ctypes.c_int(0)
        if not self._library.EVP_EncryptUpdate(self._context, out, ctypes.byref(written), block, _IV):
            raise errors.HostFailed("libcrypto does not encrypt")
        return out.raw[:_IV]


def _context(owner: object, name: str, key: bytes, *, encrypts: bool = False) -> int:
    """A context with its key, which goes with its owner."""
    library = _library()
    kind = library.EVP_get_cipherbyname(name.encode())
    context: int | None = library.EVP_CIPHER_CTX_new()
    if not kind or not context:
        raise errors.Unsupported(f"this host's libcrypto has no {name}")
    weakref.finalize(owner, library.EVP_CIPHER_CTX_free, context)
    begin = library.EVP_EncryptInit_ex if encrypts else library.EVP_DecryptInit_ex
    if not begin(context, kind, None, key, bytes(_IV)):
        raise errors.HostFailed(f"libcrypto does not take the key for {name}")
    library.EVP_CIPHER_CTX_set_padding(context, 0)
    return context


@functools.cache
def _library() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        any_, text = ctypes.c_void_p, ctypes.c_char_p
        found.EVP_get_cipherbyname.argtypes, found.EVP_get_cipherbyname.restype = [text], any_
        found.EVP_CIPHER_CTX_new.argtypes, found.EVP_CIPHER_CTX_new.restype = [], any_
        found.EVP_CIPHER_CTX_free.argtypes, found.EVP_CIPHER_CTX_free.restype = [any_], None
        found.EVP_CIPHER_CTX_set_padding.argtypes = [any_, ctypes.c_int]
        for one in (found.EVP_DecryptInit_ex, found.EVP_EncryptInit_ex):
            one.argtypes = [any_, any_, any_, text, text]
        for one in (found.EVP_DecryptUpdate, found.EVP_EncryptUpdate):
            one.argtypes = [any_, any_, any_, any_, ctypes.c_int]
        return found
    raise errors.Unsupported(
        f"this host has no OpenSSL ({_LIBRARIES[0]}), which decrypts",
        hint="install it, on Debian with: apt install libssl3",
    )
