"""Keeps schemathesis from waiting, and from withdrawing the token that it calls with."""

import os
import uuid

import schemathesis

# `mvm_<id>_<secret>`: without it every further answer would be 401, which says nothing of the document.
OWN = uuid.UUID(os.environ["MIRRORVM_A_TOKEN"].split("_")[1])


@schemathesis.hook
def map_query(context, query):
    """Long polls are asked for with waits of no more than a second."""
    if query and isinstance(query.get("wait"), str) and query["wait"].endswith("s"):
        query["wait"] = "1s" if query["wait"] not in ("0s", "1s") and query["wait"][:-1].isdigit() else query["wait"]
    return query


@schemathesis.hook
def before_call(context, case, kwargs):
    """What would withdraw the own token withdraws one that there is not."""
    try:
        if uuid.UUID(str((case.path_parameters or {}).get("token"))) == OWN:
            case.path_parameters["token"] = str(uuid.uuid4())
    except ValueError:
        pass
