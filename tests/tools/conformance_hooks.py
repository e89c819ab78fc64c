"""Keeps schemathesis from waiting, and from withdrawing the token that it calls with."""

import os
import re
import uuid

import schemathesis

# `mvm_<id>_<secret>`: without it every further answer would be 401, which says nothing of the document.
OWN = uuid.UUID(os.environ["MIRRORVM_A_TOKEN"].split("_")[1])


@schemathesis.hook
def before_call(context, case, kwargs):
    """Long polls wait for no more than a second; what would withdraw the own token withdraws one that there is not."""
    wait = (case.query or {}).get("wait")
    if isinstance(wait, str) and re.fullmatch("[0-9]+s", wait) and wait not in ("0s", "1s"):
        case.query["wait"] = "1s"
    try:
        if uuid.UUID(str((case.path_parameters or {}).get("token"))) == OWN:
            case.path_parameters["token"] = str(uuid.uuid4())
    except ValueError:
        pass
