"""libvirt's own schema of a domain XML, which its packages install: what ``virt-xml-validate`` checks with."""

from __future__ import annotations

import functools
from pathlib import Path

from lxml import etree

_PLACES = (Path("/usr/share/libvirt/schemas/domain.rng"), Path("/usr/local/share/libvirt/schemas/domain.rng"))


def complaint(root: etree._Element) -> str | None:
    """Why the XML is not valid, with its line; None when it is, or when this host has no schema to tell."""
    schema = _schema()
    if schema is None or schema.validate(root):
        return None
    return "; ".join(f"line {entry.line}: {entry.message}" for entry in list(schema.error_log)[:3])


@functools.cache
def _schema() -> etree.RelaxNG | None:
    for place in _PLACES:
        if place.is_file():
            return etree.RelaxNG(etree.parse(str(place)))
    return None
