"""One story, told by generated clients: define a guest, start it, preview two strategies, make a mirror, check and
run a migration, follow it by events with a resume in the middle, and act on three errors by their codes.

The clients are generated from openapi/v1.json by ./run; this file knows none of them, only the adapters beside it.

Usage: story.py ADAPTER   (oag_client, opc_client or dcg_client; MIRRORVM_A and MIRRORVM_B are the daemons' URLs,
MIRRORVM_A_TOKEN and MIRRORVM_B_TOKEN bearer tokens for them)
"""

import importlib
import os
import sys
import uuid

from refused import Refused


def expect(code, call):
    """Makes a call that must be refused with this code."""
    try:
        call()
    except Refused as refused:
        assert refused.code == code, refused
        return refused
    raise AssertionError(f"nothing refused, expected {code}")


def main():
    adapter = importlib.import_module(sys.argv[1])
    of = lambda name: adapter.Client(os.environ[name], os.environ[f"{name}_TOKEN"])
    a, b = of("MIRRORVM_A"), of("MIRRORVM_B")
    name = f"py-{uuid.uuid4().hex[:8]}"

    guest = a.define(name, 32 << 20)
    assert guest["state"] == "stopped"
    a.start(name)
    guest = a.wait(name, "running")
    print("runs:", guest["name"], guest["id"])

    plan = a.plan(name, {"kind": "shifted", "shift": {"kind": "4gib"}})
    assert plan["shift_bytes"] == 4 << 30 and plan["slots"]
    try:
        print("identity-cbit has slots:", len(a.plan(name, {"kind": "identity-cbit"})["slots"]))
    except Refused as refused:
        # A host may not execute a strategy; the plan says why.
        assert refused.code == "plan_refused", refused
        print("identity-cbit:", refused)

    # Whatever other guests the daemon has, and whatever drivers run them.
    kinds = {one["driver"]["kind"] for one in a.list()["items"]}
    assert "embedded" in kinds, kinds
    try:
        a.get("nobody")
    except Refused as refused:
        print("drivers:", *sorted(kinds), "and nobody is", refused.code)

    mirror = a.mirror(name)
    assert mirror["state"] == "ready"
    a.delete_mirror(mirror["id"])

    check = a.check(name, "b")
    assert check["migratable"] is True, check
    cursor = a.latest_cursor()
    key = f"{name}-move"
    migration = a.migrate(name, "b", key)
    again = a.migrate(name, "b", key)
    assert again["id"] == migration["id"], "a repeated request has no second effect"

    # Events, a few at a time; every call resumes where the last one ended, as a client that was restarted would.
    states = []
    while not states or states[-1] not in ("succeeded", "failed", "canceled"):
        page = a.events(cursor, migration["id"], limit=2)
        for event in page["items"]:
            if event["type"] == "migration.state_changed":
                states.append(event["data"]["state"])
        cursor = page["next_cursor"]
    print("states:", " ".join(states))
    assert states[-1] == "succeeded", states
    # It is the destination's from then on, and runs there a moment later.
    b.wait(name, "running")

    # Three errors, each acted on by its code.
    expect("guest_moved", lambda: a.start(name))
    moved = b.get(name)
    assert moved["id"] == guest["id"] and moved["state"] == "running", "so it is the other host's now"

    expect("name_taken", lambda: b.define(name, 32 << 20))
    assert b.get(name)["id"] == guest["id"], "so the one that is there will do"

    stale = '"1"'
    expect("precondition_failed", lambda: b.relabel(name, {"by": "python"}, stale))
    # So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
    relabelled = None
    while relabelled is None:
        fresh = f'"{b.get(name)["generation"]}"'
        try:
            relabelled = b.relabel(name, {"by": "python"}, fresh)
        except Refused as refused:
            assert refused.code == "precondition_failed", refused
    assert relabelled["labels"]["by"] == "python", relabelled

    b.stop(name)
    b.wait(name, "stopped")
    b.delete(name)
    a.delete(name)
    print("the story went well with", sys.argv[1])


if __name__ == "__main__":
    main()
