"""The Hyper-V way of working with virtual machines, on KVM."""

from hvmgr.version import __version__

__all__ = ["__version__"]
