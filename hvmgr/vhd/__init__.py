"""The codec for VHD and AVHD files: read, written, checked and streamed without any other program.

    from hvmgr import vhd

    with vhd.open_chain("disk.avhd") as disk:
        for stretch in disk.stretches():
            ...

Every name in ``__all__`` is imported when it is first used. The package knows nothing of VMs.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own costs 8 ms to import; type checkers know the name
if TYPE_CHECKING:
    from hvmgr.vhd.chain import Chain, open_chain
    from hvmgr.vhd.checking import check, qemu_reads_alike
    from hvmgr.vhd.creation import create, write_image, write_raw
    from hvmgr.vhd.format import Kind
    from hvmgr.vhd.image import Image, open_image
    from hvmgr.vhd.layout import Parentage
    from hvmgr.vhd.parents import find_parent
    from hvmgr.vhd.receiving import receive
    from hvmgr.vhd.repairing import Keep, repair
    from hvmgr.vhd.reshaping import compact, merge, reparent, resize
    from hvmgr.vhd.rules import Fault, Severity
    from hvmgr.vhd.source import RawSource, Source, Stretch
    from hvmgr.vhd.stream_reader import StreamReader
    from hvmgr.vhd.stream_writer import StreamWriter
    from hvmgr.vhd.structure import Structure, identify

__all__ = [
    "Chain",
    "Fault",
    "Image",
    "Keep",
    "Kind",
    "Parentage",
    "RawSource",
    "Severity",
    "Source",
    "StreamReader",
    "StreamWriter",
    "Stretch",
    "Structure",
    "check",
    "compact",
    "create",
    "find_parent",
    "identify",
    "merge",
    "open_chain",
    "open_image",
    "qemu_reads_alike",
    "receive",
    "repair",
    "reparent",
    "resize",
    "write_image",
    "write_raw",
]

_HOMES = {
    "Chain": "chain",
    "Fault": "rules",
    "Image": "image",
    "Keep": "repairing",
    "Kind": "format",
    "Parentage": "layout",
    "RawSource": "source",
    "Severity": "rules",
    "Source": "source",
    "StreamReader": "stream_reader",
    "StreamWriter": "stream_writer",
    "Stretch": "source",
    "Structure": "structure",
    "check": "checking",
    "compact": "reshaping",
    "create": "creation",
    "find_parent": "parents",
    "identify": "structure",
    "merge": "reshaping",
    "open_chain": "chain",
    "open_image": "image",
    "qemu_reads_alike": "checking",
    "receive": "receiving",
    "repair": "repairing",
    "reparent": "reshaping",
    "resize": "reshaping",
    "write_image": "creation",
    "write_raw": "creation",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'hvmgr.vhd' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hvmgr.vhd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
