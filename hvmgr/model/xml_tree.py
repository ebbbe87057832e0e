"""Small moves on lxml trees: read foreign XML safely, change it without disturbing its layout, compare it.

Neat indentation is not libvirt's concern but that of whoever opens the file in an editor.
"""

from __future__ import annotations

from lxml import etree

from hvmgr import errors


def parse(data: bytes | str, *, source: str) -> etree._Element:
    """The root element; a str is taken as decoded already, whatever encoding it declares.

    Corrupt, naming ``source``, line and column, when it is not well-formed; a DOCTYPE is refused: no libvirt XML has
    one, and it is the way to entities that name files or grow without end.
    """
    # Entities and network off; libxml2's own limits on depth and size stay on.
    parser = etree.XMLParser(
        encoding="utf-8" if isinstance(data, str) else None,
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
    )
    try:
        root = etree.fromstring(data.encode(errors="surrogatepass") if isinstance(data, str) else data, parser)
    except etree.XMLSyntaxError as error:
        line, column = error.position
        raise errors.Corrupt(
            f"{source}, line {line}, column {column}: not XML: {error.msg}", file=source, line=line, column=column
        ) from error
    if root.getroottree().docinfo.internalDTD is not None:
        raise errors.Corrupt(f"{source}: has a DOCTYPE, which no libvirt XML has", file=source)
    return root


def insert(parent: etree._Element, tag: str, *, after: str | None, otherwise: str | None = None) -> etree._Element:
    """A new child behind the first one that is there of ``after`` and ``otherwise``, else in front of all."""
    element = etree.Element(tag)
    before = next((found for name in (after, otherwise) if name and (found := parent.find(name)) is not None), None)
    if before is None:
        element.tail = parent.text
        parent.insert(0, element)
        return element
    element.tail = before.tail
    parent.insert(parent.index(before) + 1, element)
    if element.getnext() is None:
        before.tail = parent.text
    return element


def remove(element: etree._Element) -> None:
    """Take a child out together with the white space that was its own."""
    parent, before = element.getparent(), element.getprevious()
    assert parent is not None
    if element.getnext() is None:
        if before is not None:
            before.tail = element.tail
        else:
            parent.text = None
    parent.remove(element)


def indent(element: etree._Element) -> None:
    """Lay out one grandchild of the root as libvirt would."""
    etree.indent(element, space="  ", level=2)
    parent, before = element.getparent(), element.getprevious()
    assert parent is not None
    if before is None:
        parent.text = "\n    "
    else:
        before.tail = "\n    "
    element.tail = "\n  " if element.getnext() is None else "\n    "


def set_text(element: etree._Element, text: str) -> None:
    """Set an element's text; UsageError for characters that no XML can hold."""
    try:
        element.text = text
    except ValueError as error:
        raise unfit(text) from error


def set_attribute(element: etree._Element, name: str, value: str) -> None:
    """The same for an attribute."""
    try:
        element.set(name, value)
    except ValueError as error:
        raise unfit(value) from error


def unfit(text: str) -> errors.UsageError:
    """The refusal of a text that no XML can hold."""
    hint = "choose another name"
    return errors.UsageError(f"{text!r} is not UTF-8 or holds a control character, which XML cannot keep", hint=hint)


def drop_attribute(element: etree._Element, name: str) -> None:
    """Remove an attribute where it is there."""
    if name in element.attrib:
        del element.attrib[name]


def canonical(element: etree._Element) -> tuple[object, ...]:
    """A value that is equal for equal content: no comments, no white space around text, attributes in any order."""
    children = tuple(canonical(child) for child in element.iterchildren(etree.Element))
    return element.tag, sorted(element.attrib.items()), (element.text or "").strip(), children
