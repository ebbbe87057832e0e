"""GRUB's words: an entry for a VHD, the file ``custom.cfg`` that holds it, and GRUB's environment block.

``custom.cfg`` is read by every menu that Debian's, Fedora's and SUSE's tools write, and never written by them. What hvmgr
puts there stands between two lines that name it; everything else in the file belongs to others and stays.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from hvmgr import errors
from hvmgr.model import boot_entry
from hvmgr.model.boot_entry import BootEntry, Volume

ENVIRONMENT_SIZE = 1024
_DEFAULT = "default"
_SECTION = re.compile(r"^### BEGIN hvmgr (\S+) ###\n(.*?)^### END hvmgr \1 ###\n", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"^### (?:BEGIN|END) hvmgr ", re.MULTILINE)
_FACTS = re.compile(r"^# facts: (.*)$", re.MULTILINE)
_CHOSEN = re.compile(r'set default="hvmgr-(\S+)"')
_SAFE = re.compile(r"[A-Za-z0-9@%+=:,./_-]+")
_HEAD = "# GRUB Environment Block\n"
_MODULES = {Volume.EXT: "ext2", Volume.NTFS: "ntfs"}


def section(entry: BootEntry, *, partition: str, table: Sequence[str] | None) -> str:
    """The entry as GRUB reads it; ``partition`` of the VHD holds its kernel (``msdos1``, or empty for the whole disk).

    ``table`` is the block list of a dynamic VHD; None where its bytes are the disk's own, or nothing is read in it.
    """
    vhd = f'"($hvmgr_host){_inside(entry.files[0].path)}"'
    place = f"(hvmgr_disk,{partition})" if partition else "(hvmgr_disk)"
    ours = f"($hvmgr_host){_inside(entry.inside)}"
    kernel, initrd = f"{place}{_inside(entry.kernel)}", f"{place}{_inside(_initrd(entry.kernel))}"
    lines = [f"insmod {name}" for name in ("part_msdos", "part_gpt", "ext2", "loopback", "search_fs_uuid")]
    if entry.volume_type is not Volume.EXT:
        lines.append(f"insmod {_MODULES[entry.volume_type]}")
    lines.append(f"search --no-floppy --fs-uuid --set=hvmgr_host {entry.volume}")
    if entry.copied:
        kernel, initrd = f"{ours}/kernel", f"{ours}/initrd"
    elif table is None:
        lines.append(f"loopback hvmgr_disk {vhd}")
    else:
        lines += [f"loopback hvmgr_file {vhd}", f"loopback hvmgr_disk (hvmgr_file){','.join(table)}"]
    arguments = " ".join(_quoted(word) for word in (f"root={entry.root}", "ro", *shlex.split(entry.arguments)))
    lines += [f'linux "{kernel}" {arguments}', f'initrd "{initrd}" "{ours}/supplement"']
    facts = json.dumps(entry.to_json(), ensure_ascii=True, sort_keys=True)
    body = "".join(f"\t{line}\n" for line in lines)
    head = f"menuentry {_quoted(entry.title, always=True)} --class hvmgr --id hvmgr-{entry.id} {{\n"
    return _framed(entry.id, f"# facts: {facts}\n{head}{body}}}\n")


def entries(text: str) -> tuple[BootEntry, ...]:
    """The entries in a ``custom.cfg``; Corrupt where somebody tore them apart."""
    found = []
    for match in _sections(text):
        if match[1] != _DEFAULT:
            facts = _FACTS.search(match[2])
            if facts is None:
                raise errors.Corrupt(f"the boot entry {match[1]} has lost its facts")
            try:
                found.append(boot_entry.from_json(json.loads(facts[1])))
            except json.JSONDecodeError as error:
                raise errors.Corrupt(f"the facts of the boot entry {match[1]} cannot be read") from error
    return tuple(found)


def with_section(text: str, entry_id: str, added: str) -> str:
    """The file with an entry, in its old place or at the end."""
    for match in _sections(text):
        if match[1] == entry_id:
            return text[: match.start()] + added + text[match.end() :]
    return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{added}"


def without_section(text: str, entry_id: str) -> str:
    """The file without an entry, and without the wish to start it by default."""
    kept = text
    for match in _sections(text):
        if match[1] == entry_id:
            kept = kept.replace(match[0], "", 1)
    return with_default(kept, None) if chosen(kept) == entry_id else kept


def chosen(text: str) -> str | None:
    """The id of the entry that is started when nobody chooses."""
    for match in _sections(text):
        if match[1] == _DEFAULT and (found := _CHOSEN.search(match[2])):
            return found[1]
    return None


def with_default(text: str, entry_id: str | None) -> str:
    """The file in which an entry is started when nobody chooses; None: the menu's own default is back.

    An entry that was asked for once comes first: GRUB says so in ``boot_once``.
    """
    for match in _sections(text):
        if match[1] == _DEFAULT:
            text = text.replace(match[0], "", 1)
            break
    if entry_id is None:
        return text
    body = f'if [ -z "$boot_once" ]; then\n\tset default="hvmgr-{entry_id}"\nfi\n'
    return with_section(text, _DEFAULT, _framed(_DEFAULT, body))


def environment(block: bytes | None, name: str, value: str | None) -> bytes:
    """GRUB's environment block with a variable set, or without it; Corrupt for what is no such block."""
    if block is None:
        block = _HEAD.encode().ljust(ENVIRONMENT_SIZE, b"#")
    if len(block) != ENVIRONMENT_SIZE or not block.startswith(_HEAD.encode()):
        raise errors.Corrupt("GRUB's environment block is damaged", hint="make a new one: grub-editenv - create")
    lines = [line for line in block.decode("utf-8", "surrogateescape").rstrip("#").splitlines() if line]
    kept = [line for line in lines if not line.startswith(f"{name}=")]
    if value is not None:
        kept.append(f"{name}={value}")
    made = "".join(f"{line}\n" for line in kept).encode("utf-8", "surrogateescape")
    if len(made) > ENVIRONMENT_SIZE:
        raise errors.NoSpace("GRUB's environment block is full", hint="remove what is not needed with grub-editenv")
    return made.ljust(ENVIRONMENT_SIZE, b"#")


def _sections(text: str) -> list[re.Match[str]]:
    found = list(_SECTION.finditer(text))
    if len(_MARK.findall(text)) != 2 * len(found):
        raise errors.Corrupt(
            "the lines that frame hvmgr's entries in the boot menu do not fit together",
            hint="each '### BEGIN hvmgr ID ###' needs its '### END hvmgr ID ###': restore the copy custom.cfg.hvmgr-old",
        )
    return found


def _framed(name: str, body: str) -> str:
    return f"### BEGIN hvmgr {name} ###\n{body}### END hvmgr {name} ###\n"


def _initrd(kernel: str) -> str:
    return kernel.replace("/vmlinuz-", "/initrd.img-")


def _inside(path: str) -> str:
    """A path within double quotes."""
    return re.sub(r'([\\"$])', r"\\\1", path)


def _quoted(word: str, *, always: bool = False) -> str:
    if not always and _SAFE.fullmatch(word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"
