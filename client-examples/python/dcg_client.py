"""The story's calls with the types that datamodel-code-generator makes, over plain HTTP: every body is checked before it
is sent, and every answer as it comes."""

import httpx
import mirrorvm_dcg as api
from refused import Refused


def plain(model):
    return model.model_dump(mode="json", by_alias=True)


class Client:
    def __init__(self, url, token):
        self.http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=60)

    def call(self, method, path, body=None, headers=None, **query):
        headers = dict(headers or {})
        content = None
        if body is not None:
            headers.setdefault("content-type", "application/json")
            content = body.model_dump_json(by_alias=True, exclude_unset=True)
        answer = self.http.request(method, path, content=content, headers=headers, params=query)
        if answer.status_code >= 400:
            problem = api.Problem.model_validate_json(answer.content)
            raise Refused(problem.status, problem.code, problem.detail)
        return answer

    def read(self, model, *arguments, **options):
        return plain(model.model_validate_json(self.call(*arguments, **options).content))

    def define(self, name, size):
        return self.read(api.Guest, "POST", "/v1/guests", api.GuestCreate.model_validate({
            "name": name,
            "driver": {"kind": "embedded", "vcpus": 1},
            "memory": {"blocks": [{"name": "ram0", "size_bytes": size, "gpa": 0}]},
        }))

    def get(self, name):
        return self.read(api.Guest, "GET", f"/v1/guests/{name}")

    def list(self):
        return self.read(api.GuestList, "GET", "/v1/guests", limit=1000)

    def start(self, name):
        self.read(api.Guest, "POST", f"/v1/guests/{name}/start")

    def stop(self, name):
        self.read(api.Guest, "POST", f"/v1/guests/{name}/stop")

    def delete(self, name):
        self.call("DELETE", f"/v1/guests/{name}")

    def wait(self, name, state):
        guest = self.get(name)
        while guest["state"] != state:
            tag = {"if-none-match": f'"{guest["generation"]}"'}
            answer = self.call("GET", f"/v1/guests/{name}", headers=tag, wait="30s")
            if answer.status_code != 304:
                guest = plain(api.Guest.model_validate_json(answer.content))
        return guest

    def relabel(self, name, labels, tag):
        headers = {"if-match": tag, "content-type": "application/merge-patch+json"}
        return self.read(api.Guest, "PATCH", f"/v1/guests/{name}", api.GuestUpdate(labels=labels), headers)

    def plan(self, name, strategy):
        body = api.AddressSpacePlanCreate.model_validate({"strategy": strategy})
        return self.read(api.AddressSpacePlan, "POST", f"/v1/guests/{name}/address-space-plans", body)

    def mirror(self, name):
        strategy = {"kind": "shifted", "shift": {"kind": "4gib"}}
        return self.read(api.Mirror, "POST", "/v1/mirrors", api.MirrorCreate.model_validate(
            {"guest": name, "strategy": strategy}))

    def delete_mirror(self, key):
        self.call("DELETE", f"/v1/mirrors/{key}")

    @staticmethod
    def move(name, host):
        return api.MigrationCreate.model_validate({"guest": name, "destination": {"kind": "host", "host": host}})

    def check(self, name, host):
        return self.read(api.MigrationCheck, "POST", "/v1/migration-checks", self.move(name, host))

    def migrate(self, name, host, key):
        return self.read(api.Migration, "POST", "/v1/migrations", self.move(name, host), {"idempotency-key": key})

    def latest_cursor(self):
        page = self.read(api.EventList, "GET", "/v1/events", limit=1000)
        while page["more"]:
            page = self.read(api.EventList, "GET", "/v1/events", after=page["next_cursor"], limit=1000)
        return page["next_cursor"]

    def events(self, after, resource, limit):
        return self.read(api.EventList, "GET", "/v1/events", after=after, resource=str(resource), limit=limit, wait="30s")
