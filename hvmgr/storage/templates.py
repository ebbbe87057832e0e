"""The templates that are installed, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from hvmgr import errors, settings
from hvmgr.model import template
from hvmgr.model.template import Template


def names(folder: Path | None = None) -> list[str]:
    """The names of all templates, sorted."""
    return sorted(path.stem for path in (folder or settings.templates_folder()).glob("*.yaml"))


def load(name: str, folder: Path | None = None) -> Template:
    """The template of this name; NotFound with the names that are there."""
    place, known = folder or settings.templates_folder(), names(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known) or 'none'}"
        raise errors.NotFound(f"no template '{name}' in {place}", hint=hint, template=name)
    try:
        values, skeleton = ((place / f"{name}{suffix}").read_text("utf-8") for suffix in (".yaml", ".xml"))
    except (OSError, UnicodeDecodeError) as error:
        raise errors.Corrupt(f"template '{name}' in {place} cannot be read: {error}") from error
    return template.parse(name, values, skeleton, source=str(place / name))
