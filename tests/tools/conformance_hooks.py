"""Keeps schemathesis from waiting: long polls are asked for with waits of no more than a second."""

import schemathesis


@schemathesis.hook
def map_query(context, query):
    if query and isinstance(query.get("wait"), str) and query["wait"].endswith("s"):
        query["wait"] = "1s" if query["wait"] not in ("0s", "1s") and query["wait"][:-1].isdigit() else query["wait"]
    return query
