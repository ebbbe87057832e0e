"""A tree of files with everything that is difficult, and file systems that hold it, made without root."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess

from hvmgr.storage.filesystems.reader import Type

STRANGE = [
    b"plain", b"with space", b"new\nline", b"tab\there", b"back\\slash", b"quote'single", b'quote"double', b"-dash",
    b"$dollar `tick` *star* [brackets]", b"\xff\xfe not utf-8", "ünïcødé 文件".encode(), b"x" * 255, b"%41 percent",
    b" leading", b"trailing ", b"\x1b[31mred", b"colon:name", b"~", b"#hash", b"semi;colon",
]  # fmt: skip
MODEST = [
    b"plain",
    b"with space",
    b"quote'single",
    "ünïcødé 文件".encode(),
    b"%41 percent",
    b"UPPER.TXT",
    b"y" * 200,
    b"$x `y`",
]
TIME = 1_600_000_000_123_456_700


def make(folder, names=STRANGE, *, special=True):
    """The tree: names, folders, sizes from nothing to many blocks; with ``special`` links, holes, pipes and modes."""
    root = os.fsencode(folder)
    os.makedirs(root + b"/deep/er/est")
    os.makedirs(root + b"/names")
    os.mkdir(root + b"/empty folder")
    for number, name in enumerate(names):
        write(root + b"/names/" + name, b"content %d of " % number + name)
    for size in (0, 1, 60, 61, 159, 160, 161, 4095, 4096, 4097, 1 << 20):
        write(root + b"/deep/size%d" % size, pattern(size))
    write(root + b"/deep/er/est/bottom", b"bottom\n")
    many = root + b"/many"
    os.mkdir(many)
    for number in range(600 if special else 100):
        write(many + b"/file number %04d" % number, b"%d\n" % number)
    if special:
        os.link(root + b"/deep/size4097", root + b"/hard")
        os.symlink(b"deep/size1", root + b"/short link")
        os.symlink(b"/long" * 40, root + b"/long link")
        os.symlink(b"t" * 59, root + b"/59")
        os.symlink(b"t" * 60, root + b"/60")
        os.mkfifo(root + b"/pipe")
        with open(root + b"/sparse", "wb") as file:
            for at in (0, 1 << 20, 5 << 20):
                file.seek(at)
                file.write(pattern(5000))
            file.truncate(8 << 20)
        for mode in (0o4755, 0o1777, 0o000, 0o640):
            write(root + b"/mode%o" % mode, b"m")
            os.chmod(root + b"/mode%o" % mode, mode)
    for base, folders, files in os.walk(root, topdown=False):
        for name in (*files, *folders):
            os.utime(base + b"/" + name, ns=(TIME, TIME), follow_symlinks=False)
    return folder


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def pattern(size):
    return hashlib.shake_128(b"%d" % size).digest(size)


def of_host(folder):
    """What is in a folder of the host: path to (type, content or target)."""
    found = {}
    root = os.fsencode(folder)
    for base, folders, files in os.walk(root):
        for name in (*files, *folders):
            path = base + b"/" + name
            facts = os.lstat(path)
            key = path[len(root) + 1 :]
            if stat.S_ISLNK(facts.st_mode):
                found[key] = (Type.LINK, os.readlink(path))
            elif stat.S_ISDIR(facts.st_mode):
                found[key] = (Type.FOLDER, None)
            elif stat.S_ISREG(facts.st_mode):
                with open(path, "rb") as file:
                    found[key] = (Type.FILE, hashlib.sha256(file.read()).hexdigest())
            else:
                found[key] = (Type.PIPE, None)
    return found


def of_reader(reader):
    """The same of a file system."""
    return {key: (node.type, _content(reader, node)) for key, node in walked(reader)}


def walked(reader, folder=None, prefix=b""):
    for name, ref in reader.names(folder or reader.root()):
        node = reader.stat(ref)
        yield prefix + name, node
        if node.is_folder:
            yield from walked(reader, node, prefix + name + b"/")


def _content(reader, node):
    if node.type is Type.LINK:
        return node.target
    return hash_of(reader, node) if node.type is Type.FILE else None


def hash_of(reader, node, stream=""):
    content = reader.content(node, stream)
    digest, at = hashlib.sha256(), 0
    for offset, piece in content.pieces():
        digest.update(bytes(offset - at))
        digest.update(piece)
        at = offset + len(piece)
    digest.update(bytes(content.size - at))
    return digest.hexdigest()


def ext(image, tree, *options, size="24M"):
    run("mke2fs", "-q", "-F", "-d", tree, *options, image, size)
    return image


def in_partition(image, part, *, table="gpt"):
    """A disk with a table and one partition, at 1 MiB, which holds what ``part`` does."""
    data = part.read_bytes()
    with open(image, "wb") as file:
        file.truncate((2 << 20) + len(data))
    run("sfdisk", "-q", image, input=f"label: {table}\nstart=2048,size={len(data) // 512}\n".encode())
    with open(image, "r+b") as file:
        file.seek(1 << 20)
        file.write(data)
    return image


def ntfs(image, tree, *, size=24 << 20):
    """By wimlib, which writes folders without root."""
    wim = image.with_suffix(".wim")
    run("wimcapture", tree, wim, "--compress=none", "--unix-data")
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkntfs", "-q", "-F", "-Q", image)
    run("wimapply", wim, image)
    return image


def xfs(image, tree, *options, size="320M"):
    """By a protofile, which knows neither blanks in names nor times."""
    lines = ["boot", "0 0", "d--755 0 0", *_proto(tree), "$"]
    proto = image.with_suffix(".proto")
    proto.write_bytes(os.fsencode("\n".join(lines)) + b"\n")
    run("mkfs.xfs", "-q", "-f", *options, "-p", proto, "-d", f"name={image},size={size},file")
    return image


def _proto(folder):
    for entry in sorted(os.scandir(folder), key=lambda one: one.name):
        facts = entry.stat(follow_symlinks=False)
        kind = "d" if entry.is_dir(follow_symlinks=False) else "l" if entry.is_symlink() else "-"
        bits = ("u" if facts.st_mode & stat.S_ISUID else "-") + ("g" if facts.st_mode & stat.S_ISGID else "-")
        line = f"{entry.name} {kind}{bits}{facts.st_mode & 0o777:03o} 12 70000"
        if kind == "d":
            yield line
            yield from _proto(entry.path)
            yield "$"
        else:
            yield f"{line} {os.readlink(entry.path) if kind == 'l' else entry.path}"


def run(*words, **more):
    done = subprocess.run([*map(os.fspath, words)], capture_output=True, timeout=120, check=False, **more)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout
