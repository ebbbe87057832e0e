"""Options of an export that contradict each other are refused before anybody looks at a VM."""

from __future__ import annotations

import pytest

from hvmgr import errors
from hvmgr.model.export_options import ExportOptions
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.manifest import Extent


@pytest.mark.parametrize(
    "options",
    [
        {"snapshot": "one", "keep": ("two",)},
        {"snapshot": "one", "snapshots": Extent.NONE},
        {"keep": ("one",), "snapshots": Extent.NONE},
        {"snapshots": Extent.KEPT},
        {"with_state": True, "without_state": True},
        {"with_state": True, "quiesce": True},
        {"with_state": True, "snapshot": "one"},
        {"with_state": True, "config_only": True},
        {"quiesce": True, "config_only": True},
        {"config_only": True, "snapshot": "one"},
        {"config_only": True, "snapshots": Extent.NONE, "format": ImageFormat.RAW},
        {"format": ImageFormat.RAW},
        {"format": ImageFormat.RAW, "keep": ("one",)},
    ],
    ids=str,
)
def test_contradiction_is_refused(options):
    with pytest.raises(errors.UsageError) as caught:
        ExportOptions(**options).check()
    assert caught.value.hint or "not" in caught.value.message


@pytest.mark.parametrize(
    ("options", "extent"),
    [
        ({}, Extent.ALL),
        ({"snapshots": Extent.NONE, "format": ImageFormat.VHD}, Extent.NONE),
        ({"keep": ("a", "b"), "exclude": ("vdb",), "without_state": True}, Extent.KEPT),
        ({"snapshot": "a", "format": ImageFormat.RAW, "without_state": True}, Extent.ONE),
        ({"config_only": True, "keep": ("a",)}, Extent.KEPT),
        ({"with_state": True}, Extent.ALL),
    ],
    ids=str,
)
def test_what_fits_together_passes(options, extent):
    one = ExportOptions(**options)
    one.check()
    assert one.extent is extent
