"""A configuration whose files lie in another folder now: every path in it that led into the old one is rewritten."""

from __future__ import annotations

from pathlib import PurePath

from lxml import etree

from hvmgr.model.configuration import Configuration


def moved(configuration: Configuration, old: PurePath, new: PurePath) -> Configuration:
    """A copy in which every attribute and text that is a path in ``old`` is the same one in ``new``."""
    result = configuration.copy()
    for element in result.root.iter(etree.Element):
        for name, value in element.attrib.items():
            element.set(name, _moved(str(value), old, new))
        if element.text is not None and element.text.strip().startswith(str(old)):
            element.text = _moved(element.text.strip(), old, new)
    return result


def _moved(text: str, old: PurePath, new: PurePath) -> str:
    if not text.startswith("/") or "\n" in text:
        return text
    path = PurePath(text)
    return str(new / path.relative_to(old)) if path.is_relative_to(old) else text
