"""What each task did on each host, a line of JSON each, for the tests to read."""

from __future__ import annotations

import json

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: recorder
type: stdout
short_description: A line of JSON for each result
description: [A line of JSON for each result.]
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "recorder"

    def _tell(self, outcome, result):
        facts = result._result
        keys = (
            "changed",
            "msg",
            "error",
            "diff",
            "item",
            "vm",
            "vms",
            "snapshot",
            "tree",
            "export",
            "stdout",
            "stderr",
            "warnings",
            "plan",
        )
        told = {key: facts[key] for key in keys if key in facts}
        line = {
            "host": result._host.get_name(),
            "task": result._task.get_name().rpartition(" : ")[2],
            "outcome": outcome,
            **told,
        }
        self._display.display("RECORD " + json.dumps(line, default=str))

    def v2_runner_on_ok(self, result):
        self._tell("ok", result)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._tell("failed", result)

    def v2_runner_on_skipped(self, result):
        self._tell("skipped", result)

    def v2_runner_on_unreachable(self, result):
        self._tell("unreachable", result)

    def v2_runner_item_on_ok(self, result):
        self._tell("item", result)
