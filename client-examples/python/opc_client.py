"""The story's calls over the client that openapi-python-client makes."""

from mirrorvm_opc import AuthenticatedClient as Generated
from mirrorvm_opc import models
from mirrorvm_opc.api.events import event_list
from mirrorvm_opc.api.guests import (
    address_space_plan_create, guest_create, guest_delete, guest_get, guest_list, guest_start, guest_stop, guest_update,
)
from mirrorvm_opc.api.migrations import migration_check_create, migration_create
from mirrorvm_opc.api.mirrors import mirror_create, mirror_delete
from refused import Refused


class Client:
    def __init__(self, url, token):
        self.client = Generated(base_url=url, token=token, timeout=60)

    def call(self, operation, *arguments, **options):
        answer = operation.sync_detailed(*arguments, client=self.client, **options)
        if isinstance(answer.parsed, models.Problem):
            problem = answer.parsed
            raise Refused(problem.status, problem.code, problem.detail)
        return answer

    def read(self, operation, *arguments, **options):
        return self.call(operation, *arguments, **options).parsed.to_dict()

    def define(self, name, size):
        body = models.GuestCreate.from_dict({
            "name": name,
            "driver": {"kind": "embedded", "vcpus": 1},
            "memory": {"blocks": [{"name": "ram0", "size_bytes": size, "gpa": 0}]},
        })
        return self.read(guest_create, body=body)

    def get(self, name):
        return self.read(guest_get, name)

    def list(self):
        return self.read(guest_list, limit=1000)

    def start(self, name):
        self.call(guest_start, name)

    def stop(self, name):
        self.call(guest_stop, name)

    def delete(self, name):
        self.call(guest_delete, name)

    def wait(self, name, state):
        guest = self.get(name)
        while guest["state"] != state:
            answer = self.call(guest_get, name, wait="30s", if_none_match=f'"{guest["generation"]}"')
            if answer.status_code != 304:
                guest = answer.parsed.to_dict()
        return guest

    def relabel(self, name, labels, tag):
        body = models.GuestUpdate.from_dict({"labels": labels})
        return self.read(guest_update, name, body=body, if_match=tag)

    def plan(self, name, strategy):
        body = models.AddressSpacePlanCreate.from_dict({"strategy": strategy})
        return self.read(address_space_plan_create, name, body=body)

    def mirror(self, name):
        strategy = {"kind": "shifted", "shift": {"kind": "4gib"}}
        return self.read(mirror_create, body=models.MirrorCreate.from_dict({"guest": name, "strategy": strategy}))

    def delete_mirror(self, key):
        self.call(mirror_delete, str(key))

    @staticmethod
    def move(name, host):
        return models.MigrationCreate.from_dict({"guest": name, "destination": {"kind": "host", "host": host}})

    def check(self, name, host):
        return self.read(migration_check_create, body=self.move(name, host))

    def migrate(self, name, host, key):
        return self.read(migration_create, body=self.move(name, host), idempotency_key=key)

    def latest_cursor(self):
        page = self.read(event_list, limit=1000)
        while page["more"]:
            page = self.read(event_list, after=page["next_cursor"], limit=1000)
        return page["next_cursor"]

    def events(self, after, resource, limit):
        return self.read(event_list, after=after, resource=[str(resource)], limit=limit, wait="30s")
