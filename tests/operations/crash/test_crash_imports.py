"""Imports of every mode, clones, moves, localized and converted disks: killed before every few acts."""

from __future__ import annotations

import pytest

SHAPES = {
    "import-copy": 11,
    "import-archive": 13,
    "import-vhd": 13,
    "import-register": 7,
    "import-register-new-id": 9,
    "import-link": 7,
    "import-replace": 11,
    "import-replace-memory": 29,
    "clone-snapshot": 9,
    "clone-linked": 7,
    "move": 13,
    "localize": 13,
    "localize-working": 41,
    "convert": 11,
    "convert-working": 17,
    "import-memory": 13,
    "import-memory-register": 11,
}

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_import_is_undone_or_completed(crash_run, shape, every):
    crash_run(shape, every(SHAPES[shape]))
