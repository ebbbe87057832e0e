"""The formats of image files, in hvmgr's words."""

from __future__ import annotations

from enum import StrEnum


class ImageFormat(StrEnum):
    """Formats of a disk that comes as a file, in hvmgr's words."""

    QCOW2 = "qcow2"
    RAW = "raw"
    VHD = "vhd"
    VHDX = "vhdx"
    VMDK = "vmdk"
    VDI = "vdi"
