"""Disks that are encrypted with LUKS, made by cryptsetup and QEMU without root and without a device mapper."""

from __future__ import annotations

import hashlib
import json
import subprocess

from tests.storage import file_trees

KEY = b"a key of bytes \xff\x00 and more"
_TAIL = 32 << 20  # what cryptsetup wants to have free: the volume moves by half of it
_CHEAP = ("--pbkdf-memory", "4096", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1")


def key_file(folder, key=KEY):
    path = folder / f"key{len(list(folder.glob('key*')))}"
    path.write_bytes(key)
    return path


def luks2(image, key, *options):
    """A raw file becomes a LUKS 2 volume that holds what it held, and 16 MiB."""
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size + _TAIL)
    words = ["cryptsetup", "reencrypt", "--encrypt", "-q", "--type", "luks2", "--reduce-device-size", f"{_TAIL >> 20}M"]
    file_trees.run(*words, *_CHEAP, "--key-file", key, *options, image)
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - _TAIL // 2)  # the free space at its end, which is encrypted as well
    return image


def decrypted(image, key):
    """The same file, in clear: by cryptsetup, which moves all of it to its beginning."""
    words = ["cryptsetup", "reencrypt", "--decrypt", "-q", "--force-offline-reencrypt", "--header", f"{image}.header"]
    file_trees.run(*words, "--key-file", key, image)
    return image


def by_qemu(image, key, start):
    """The words by which QEMU's own tools have a LUKS 1 volume on a qcow2 image in clear."""
    below = f"file.driver=raw,file.offset={start},file.file.driver=qcow2,file.file.file.filename={image}"
    return ["--object", f"secret,id=key,file={key}", "--image-opts", f"driver=luks,key-secret=key,{below}"]


def rewrite(image, change, copies=(0, 0x4000)):
    """The text of a LUKS 2 header, in both of its copies, is what ``change`` makes of it, with the checksums to it."""
    with image.open("r+b") as file:
        for at in copies:
            file.seek(at)
            raw = bytearray(file.read(0x4000))
            about = json.loads(bytes(raw[4096:]).partition(b"\0")[0])
            change(about)
            raw[4096:] = json.dumps(about).encode().ljust(len(raw) - 4096, b"\0")
            raw[448:512] = bytes(64)
            raw[448:480] = hashlib.sha256(raw).digest()
            file.seek(at)
            file.write(raw)


def luks1(image, plain, key, *options):
    """A LUKS 1 volume, by QEMU, with the bytes of a raw file; the key has to be text."""
    secret = ["--object", f"secret,id=key,file={key}"]
    made = ",".join(("key-secret=key", "iter-time=10", *options))
    create = ["qemu-img", "create", "-q", "-f", "luks", *secret, "-o", made, image, str(plain.stat().st_size)]
    for _ in range(20):  # QEMU gives up where the kernel has counted no time for its first round of the key derivation
        if subprocess.run(create, capture_output=True, timeout=120, check=False).returncode == 0:
            break
    else:
        file_trees.run(*create)
    target = f"driver=luks,key-secret=key,file.filename={image}"
    file_trees.run("qemu-img", "convert", *secret, "-n", "-f", "raw", "--target-image-opts", plain, target)
    return image
