"""The calls of the Xen API, as the PyPI client and Xen Orchestra's make them."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import xmlrpc.client

import pytest
import XenAPI

from hvmgr.faces.http import api, xml_rpc
from hvmgr.faces.http.failure import XenFailure
from hvmgr.faces.http.sessions import Sessions
from hvmgr.model.user import Role, User, make_secret
from tests.faces.http.conftest import MIB, PASSWORD, PATIENCE_S, parse_answer, pattern, post, settled
from tests.faces.http.test_transfers import vdi_of


def failure(call, *parameters):
    """The code and its parameters."""
    with pytest.raises(XenAPI.Failure) as caught:
        call(*parameters)
    return caught.value.details


def test_unmodified_client_works_with_a_disk_from_its_creation_to_its_end(server, place):
    session = server.login()
    api = session.xenapi
    (pool,) = api.pool.get_all()
    sr = api.pool.get_default_SR(pool)
    assert session.API_version == "2.21"
    record = {
        "name_label": "new & <old>",
        "name_description": "",
        "SR": sr,
        "virtual_size": str(4 * MIB),
        "type": "user",
    }
    vdi = api.VDI.create({**record, "sharable": False, "read_only": False, "other_config": {}})
    uuid = api.VDI.get_uuid(vdi)
    assert api.VDI.get_by_uuid(uuid) == vdi
    assert api.VDI.get_by_name_label("new & <old>") == [vdi]
    assert api.VDI.get_virtual_size(vdi) == str(4 * MIB)
    assert vdi in api.SR.get_record(sr)["VDIs"]
    first, second = pattern(4 * MIB), bytearray(pattern(4 * MIB, 2))
    second[: 2 * MIB] = first[: 2 * MIB]

    def fill(data):
        (place / "data").write_bytes(data)
        task = api.task.create("import", "a whole disk")
        assert server.put(place / "data", session_id=session.handle, task_id=task, vdi=uuid).code == 0
        assert settled(session, task)["status"] == "success"
        api.task.destroy(task)

    fill(first)
    monday = api.VDI.snapshot(vdi)
    fill(bytes(second))
    tuesday = api.VDI.snapshot(vdi, {})
    assert (api.VDI.get_snapshot_of(tuesday), api.VDI.get_record(tuesday)["is_a_snapshot"]) == (vdi, True)
    assert set(api.VDI.get_record(vdi)["snapshots"]) == {monday, tuesday}
    streams = [
        server.curl(server.export_link(session_id=session.handle, vdi=monday, format="vhd")).body,
        server.curl(server.export_link(session_id=session.handle, vdi=tuesday, base=monday, format="vhd")).body,
    ]
    copy = api.VDI.create({**record, "name_label": "copy"})
    for stream in streams:
        assert server.put(stream, session_id=session.handle, vdi=copy, format="vhd").code == 0
    assert server.curl(server.export_link(session_id=session.handle, vdi=copy)).body == bytes(second)
    for ref in (monday, tuesday, copy, vdi):
        api.VDI.destroy(ref)
    assert api.VDI.get_all_records() == {}
    assert failure(api.VDI.get_record, vdi)[:2] == ["HANDLE_INVALID", "VDI"]
    handle = session.handle
    api.session.logout()
    assert server.json("VDI.get_all_records", handle)["error"]["message"] == "SESSION_INVALID"
    assert [line["what"] for line in server.told() if line["what"] != "import" and line["what"] != "export"] == [
        "login", "VDI.create", "VDI.snapshot", "VDI.snapshot", "VDI.create", *["VDI.destroy"] * 4, "logout",
    ]  # fmt: skip


class TestXenOrchestra:
    def test_connects(self, server, bench):
        vm = bench.make(4)
        handle = server.json("session.login_with_password", "anna", "correct horse")["result"]
        (pool,) = server.json("pool.get_all_records", handle)["result"].values()
        (host,) = server.json("host.get_all_records", handle)["result"].items()
        assert pool["master"] == host[0]
        assert host[1]["address"] == "127.0.0.1"
        methods = server.json("system.listMethods")["result"]
        classes = [name.removesuffix(".get_all_records") for name in methods if name.endswith(".get_all_records")]
        assert {"pool", "host", "SR", "VDI", "VM", "VBD", "task"} <= set(classes)
        for name in classes:
            records = server.json(f"{name}.get_all_records", handle)["result"]
            assert len({tuple(sorted(record)) for record in records.values()}) <= 1  # all have the same fields
        token = server.json(
            "event.inject", handle, "pool", next(iter(server.json("pool.get_all_records", handle)["result"]))
        )
        everything = server.json("event.from", handle, ["*"], "", 60.1)["result"]
        assert {(one["class"], one["operation"]) for one in everything["events"]} == {
            (kind, "add") for kind in ("pool", "host", "sr", "vdi")
        }
        assert everything["valid_ref_counts"] == {"pool": 1, "host": 1, "sr": 1, "vdi": 1, "vm": 0, "vbd": 0, "task": 0}
        assert token["result"] == everything["token"]
        assert isinstance(
            next(iter(server.json("VDI.get_all_records", handle)["result"].values()))["virtual_size"], int
        )
        assert vm.name in str(everything["events"])

    def test_sees_its_task_settle_by_events(self, server, bench):
        session = server.login()
        ref = vdi_of(session, bench.make(4), "hda")
        task = session.xenapi.task.create("export", "")
        token = server.json("event.from", session.handle, [f"task/{task}"], "", 1)["result"]["token"]
        seen = []

        def watch():
            nonlocal token
            until = time.monotonic() + PATIENCE_S
            while time.monotonic() < until and "success" not in seen:
                batch = server.json("event.from", session.handle, [f"task/{task}"], token, 30)["result"]
                seen.extend(one["snapshot"]["status"] for one in batch["events"])
                token = batch["token"]

        thread = threading.Thread(target=watch)
        thread.start()
        assert server.curl(server.export_link(session_id=session.handle, vdi=ref, task_id=task)).status == 200
        thread.join(PATIENCE_S)
        assert seen[-1] == "success"
        session.xenapi.task.destroy(task)
        batch = server.json("event.from", session.handle, ["task"], token, 30)["result"]
        assert [(one["operation"], one["ref"], "snapshot" in one) for one in batch["events"]] == [("del", task, False)]
        assert batch["valid_ref_counts"]["task"] == 0

    def test_notes_on_a_disk(self, server, bench):
        session = server.login()
        api, ref = session.xenapi, vdi_of(session, bench.make(4), "hda")
        api.VDI.add_to_other_config(ref, "xo:note", "1")
        assert api.VDI.get_other_config(ref) == {"xo:note": "1"}
        assert failure(api.VDI.add_to_other_config, ref, "xo:note", "2")[0] == "MAP_DUPLICATE_KEY"
        api.VDI.remove_from_other_config(ref, "xo:note")
        assert (api.VDI.get_other_config(ref), api.VDI.get_VBDs(ref)) == ({}, [])
        assert api.VDI.get_sm_config(ref)["image-format"] == "vhd"
        assert api.VDI.get_nbd_info(ref) == []  # so that the disk is taken by HTTP

    def test_note_on_the_pool_tells_that_all_before_it_was_seen(self, server, bench):
        session = server.login()
        (pool,) = session.xenapi.pool.get_all()
        token = server.json("event.from", session.handle, ["pool", "vdi"], "", 1)["result"]["token"]
        made = bench.host.disks.create(MIB, name="by hand")
        session.xenapi.pool.add_to_other_config(pool, "barrier", "7")
        events = server.json("event.from", session.handle, ["pool", "vdi"], token, 60)["result"]["events"]
        assert [one["class"] for one in events] == ["vdi", "pool"]
        assert (events[0]["snapshot"]["uuid"], events[1]["snapshot"]["other_config"]) == (made, {"barrier": "7"})
        session.xenapi.pool.remove_from_other_config(pool, "barrier")
        assert session.xenapi.pool.get_other_config(pool) == {}
        refused = failure(server.login("rita").xenapi.pool.add_to_other_config, pool, "barrier", "7")
        assert refused[0] == "RBAC_PERMISSION_DENIED"

    def test_disks_that_others_make_are_events(self, server, bench, monkeypatch):
        from hvmgr.faces.http import calls_task

        monkeypatch.setattr(calls_task, "_LOOK_S", 0.05)
        session = server.login()
        token = server.json("event.from", session.handle, ["vdi"], "", 1)["result"]["token"]
        made = bench.host.disks.create(MIB, name="by hand")
        batch = server.json("event.from", session.handle, ["vdi"], token, 60)["result"]
        assert [(one["operation"], one["snapshot"]["uuid"]) for one in batch["events"]] == [("add", made)]

    def test_who_asks_too_late_is_told_everything_again(self, server):
        session = server.login()
        task = session.xenapi.task.create("watched", "")
        token = server.json("event.from", session.handle, ["task"], "", 0)["result"]["token"]
        server.service.events._most = 3
        session.xenapi.task.set_status(task, "success")
        for _ in range(3):  # somebody else's, which push that change out
            session.xenapi.task.destroy(session.xenapi.task.create("other", ""))
        batch = server.json("event.from", session.handle, ["task"], token, 1)["result"]
        assert [(one["ref"], one["snapshot"]["status"]) for one in batch["events"]] == [(task, "success")]
        assert server.json("event.from", session.handle, ["task"], batch["token"], 0)["result"]["events"] == []


class TestTasks:
    def test_client_works_by_itself(self, server):
        api = server.login().xenapi
        task = api.task.create("mine", "of my own")
        api.task.set_progress(task, 0.5)
        assert (api.task.get_progress(task), api.task.get_status(task)) == (0.5, "pending")
        api.task.set_status(task, "success")
        record = api.task.get_record(task)
        assert (record["status"], record["progress"], record["name_label"]) == ("success", 1.0, "mine")
        assert record["finished"].value > "2026"
        api.task.set_status(task, "failure")
        assert api.task.get_status(task) == "success"
        api.task.cancel(task)
        assert api.task.get_status(task) == "success"
        api.task.destroy(task)
        assert failure(api.task.get_status, task)[:2] == ["HANDLE_INVALID", "task"]

    def test_async_call_has_a_result(self, server):
        session = server.login()
        api = session.xenapi
        record = {"name_label": "x", "SR": "OpaqueRef:NULL", "virtual_size": MIB}
        done = settled(session, api.Async.VDI.create(record))
        ref = done["result"].removeprefix("<value>").removesuffix("</value>")
        assert api.VDI.get_name_label(ref) == "x"
        assert settled(session, api.Async.VDI.destroy(ref))["status"] == "success"
        failed = settled(session, api.Async.VDI.destroy(ref))
        assert (failed["status"], failed["error_info"][0]) == ("failure", "HANDLE_INVALID")

    def test_async_call_without_a_thread_to_be_had(self, server, monkeypatch):
        service, handle = server.service, server.login().handle
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no threads")))
            with pytest.raises(XenFailure, match="HOST_IN_USE"):
                api.carry_out(service, "", "", "Async.VDI.destroy", [handle, "x"])
        (record,) = service.tasks.records().values()
        assert (record["status"], record["error_info"][0]) == ("failure", "HOST_IN_USE")
        service.close()  # waits for nothing

    def test_one_of_our_own_stays_to_be_looked_at(self, server, bench):
        session = server.login()
        got = server.curl(server.export_link(session_id=session.handle, vdi=vdi_of(session, bench.make(4), "hda")))
        assert settled(session, got.headers["task-id"])["status"] == "success"


class TestRights:
    def test_reader_changes_nothing(self, server):
        api = server.login("rita").xenapi
        assert failure(api.VDI.create, {"virtual_size": "512"})[0] == "RBAC_PERMISSION_DENIED"
        assert failure(api.VDI.destroy, "x")[0] == "RBAC_PERMISSION_DENIED"
        assert failure(api.Async.VDI.snapshot, "x")[0] == "RBAC_PERMISSION_DENIED"
        assert api.VDI.get_all_records() == {}

    def test_wrong_password(self, server):
        with pytest.raises(XenAPI.Failure) as caught:
            server.login(password="wrong")
        assert caught.value.details[:2] == ["SESSION_AUTHENTICATION_FAILED", "anna"]
        assert server.told("login")[-1]["outcome"] == "wrong user or password"
        assert "wrong horse" not in server.log.getvalue().decode()

    def test_task_of_another_is_left_alone(self, server):
        mine, other = server.login().xenapi, server.login("rita").xenapi
        task = mine.task.create("mine", "")
        for call in (other.task.destroy, other.task.cancel, lambda ref: other.task.set_status(ref, "failure")):
            assert failure(call, task)[0] == "RBAC_PERMISSION_DENIED"
        assert mine.task.get_status(task) == "pending"

    def test_administrator_ends_what_another_does_not(self, server):
        mine, other = server.login().xenapi, server.login("rita").xenapi
        task = other.task.create("for ever", "")
        mine.task.cancel(task)
        assert other.task.get_status(task) == "cancelled"
        assert failure(mine.task.destroy, task)[0] == "RBAC_PERMISSION_DENIED"

    def test_session_ends_with_its_user_and_with_another_role(self, server):
        from hvmgr.storage import users

        handle = server.login("rita").handle
        assert "result" in server.json("pool.get_all", handle)
        server.add_user("rita", Role.ADMIN)
        assert server.json("pool.get_all", handle)["error"]["message"] == "SESSION_INVALID"
        handle = server.login("rita").handle
        users.remove(server.users, "rita")
        assert server.json("pool.get_all", handle)["error"]["message"] == "SESSION_INVALID"

    def test_session_that_nobody_uses_ends(self):
        user, now = User("anna", Role.READ, make_secret(PASSWORD, b"salt", log_n=4)), [0.0]
        sessions = Sessions(lambda _: user, idle_s=10, clock=lambda: now[0])
        used, idle = sessions.open(user).ref, sessions.open(user).ref
        for now[0] in (8.0, 16.0):
            assert sessions.find(used) is not None
        assert sessions.find(idle) is None
        assert len(sessions) == 1


# What the clients cannot do without.
MINIMUM = {
    "session": "login_with_password logout",
    "system": "listMethods",
    "pool": "get_all get_all_records get_default_SR get_master",
    "host": "get_all_records get_API_version_major get_API_version_minor",
    "SR": "get_record get_all_records",
    "VDI": "create snapshot destroy get_by_uuid get_by_name_label get_uuid get_record get_all_records get_name_label "
    "get_sm_config get_snapshot_of get_virtual_size get_VBDs add_to_other_config remove_from_other_config",
    "Async.VDI": "create snapshot destroy",
    "task": "create destroy cancel get_record get_uuid get_status get_progress get_error_info get_result set_progress "
    "set_status get_all_records",
    "event": "inject from",
    "VM": "get_all_records",
    "VBD": "get_all_records",
}


def test_every_call_that_the_clients_need_is_there():
    needed = {f"{kind}.{name}" for kind, names in MINIMUM.items() for name in names.split()}
    assert needed - api.CALLS.keys() == set()


class TestForm:
    @pytest.mark.parametrize("path", ["/", "/RPC2", "/xmlrpc"])
    def test_xml_is_as_the_strict_reader_wants_it(self, server, path):
        body = xmlrpc.client.dumps(("anna", "correct horse"), "session.login_with_password").encode()
        got = parse_answer(server.talk(post(path, body, "Connection: close")))
        assert got.headers["content-type"] == "text/xml"
        handle = re.search(r"<name>Value</name><value>(OpaqueRef:[-0-9a-f]+)</value>", got.text)[1]
        body = xmlrpc.client.dumps((handle, "a", ""), "task.create").encode()
        task = re.search(
            r"<value>(OpaqueRef:[-0-9a-f]+)</value>", server.talk(post(path, body, "Connection: close")).decode()
        )[1]
        body = xmlrpc.client.dumps((handle, task), "task.get_record").encode()
        text = parse_answer(server.talk(post(path, body, "Connection: close"))).text
        assert "<name>result</name><value/>" in text
        assert "<string>" not in text
        assert "<int>" not in text
        assert not re.search(r">\s+<", text)

    def test_connection_serves_many_calls(self, server):
        connection = http.client.HTTPConnection(*server.address, timeout=PATIENCE_S)
        for number in range(3):
            body = json.dumps({"method": "system.listMethods", "params": [], "id": number})
            connection.request("POST", "/jsonrpc", body)
            assert json.loads(connection.getresponse().read())["id"] == number
        connection.close()

    @pytest.mark.parametrize(
        ("method", "parameters", "code"),
        [
            ("no.such", [], "MESSAGE_METHOD_UNKNOWN"),
            ("session.login_with_password", ["anna"], "MESSAGE_PARAMETER_COUNT_MISMATCH"),
            ("session.login_with_password", [1, {}], "INVALID_VALUE"),
            ("VDI.get_record", ["SESSION"], "MESSAGE_PARAMETER_COUNT_MISMATCH"),
            ("VDI.get_record", ["SESSION", 7], "INVALID_VALUE"),
            ("VDI.get_record", ["SESSION", "../../x"], "UUID_INVALID"),
            ("VDI.get_record", [None, "x"], "SESSION_INVALID"),
            ("VDI.get_record", [], "SESSION_INVALID"),
            ("VDI.create", ["SESSION", "x"], "INVALID_VALUE"),
            ("VDI.create", ["SESSION", {"virtual_size": -1}], "INVALID_VALUE"),
            ("VDI.create", ["SESSION", {"virtual_size": 1e400}], "INVALID_VALUE"),
            ("VDI.create", ["SESSION", {"virtual_size": 512, "SR": "x"}], "HANDLE_INVALID"),
            ("VDI.create", ["SESSION", {"virtual_size": 1 << 62}], "INVALID_VALUE"),
            ("pool.get_master", ["SESSION", "x"], "HANDLE_INVALID"),
            ("event.from", ["SESSION", "task", "", 1], "INVALID_VALUE"),
            ("event.from", ["SESSION", ["task"], "", "soon"], "INVALID_VALUE"),
            ("event.from", ["SESSION", ["task"], "", "nan"], "INVALID_VALUE"),
            ("event.from", ["SESSION", ["task"], "", "-inf"], "INVALID_VALUE"),
            ("task.set_progress", ["SESSION", "x", "Infinity"], "INVALID_VALUE"),
            ("event.inject", ["SESSION", "cow", "x"], "EVENT_SUBSCRIPTION_PARSE_FAILURE"),
            ("task.set_status", ["SESSION", "x", "success"], "HANDLE_INVALID"),
        ],
    )  # fmt: skip
    def test_wrong_call(self, server, method, parameters, code):
        handle = server.login().handle if "SESSION" in parameters else ""
        found = [handle if one == "SESSION" else one for one in parameters]
        if 1e400 in [one.get("virtual_size") for one in found if isinstance(one, dict)]:
            body = json.dumps({"method": method, "params": found, "id": 1}).encode()
            assert b"Infinity" in body
            assert (
                json.loads(parse_answer(server.talk(post("/jsonrpc", body, "Connection: close"))).body)["error"]["code"]
                == -32700
            )
            return
        assert server.json(method, *found)["error"]["message"] == code
        assert server.told("defect") == []


def test_result_of_a_task_is_one_element():
    assert xml_rpc.to_text("OpaqueRef:1") == "<value>OpaqueRef:1</value>"
