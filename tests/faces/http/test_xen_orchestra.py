"""Xen Orchestra's own client, unmodified. It comes from npm, and so only whoever has it runs this:

    npm install --prefix DIR @xen-orchestra/xapi xen-api
    HVMGR_NODE_MODULES=DIR/node_modules pytest tests/faces/http/test_xen_orchestra.py

What it does is in ``xen_orchestra.mjs``; the calls that it makes are tested without it, too (``test_calls.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.faces.http.conftest import MIB, PASSWORD

SCRIPT = Path(__file__).with_name("xen_orchestra.mjs")


@pytest.mark.parametrize("transport", ["json-rpc", "xml-rpc"])
def test_client_of_xen_orchestra_backs_up_and_restores(request, transport):
    modules = os.environ.get("HVMGR_NODE_MODULES")
    if modules is None:
        pytest.skip("HVMGR_NODE_MODULES names no folder with @xen-orchestra/xapi from npm")
    server = request.getfixturevalue("server")
    done = subprocess.run(
        ["node", str(SCRIPT), server.url, "anna", PASSWORD, modules, transport],
        capture_output=True, text=True, check=False, timeout=250, env={**os.environ, "NODE_NO_WARNINGS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["blocks"] == [0, 2, 3, 2] * 2  # a whole disk, a delta
    assert 2 * MIB < seen["delta"] < 2 * MIB + 8192
    assert seen["pending"] == 0
    server.await_rest()
    assert server.service.disks.uuids() == []
    assert server.told("defect") == []
