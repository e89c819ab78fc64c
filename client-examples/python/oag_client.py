"""The story's calls over the client that openapi-generator makes."""

import mirrorvm_oag as api
from mirrorvm_oag.exceptions import ApiException
from refused import Refused


def plain(model):
    return model.to_dict()


class Client:
    def __init__(self, url, token):
        client = api.ApiClient(api.Configuration(host=url, access_token=token))
        self.guests, self.mirrors = api.GuestsApi(client), api.MirrorsApi(client)
        self.migrations, self.events_api = api.MigrationsApi(client), api.EventsApi(client)

    @staticmethod
    def call(function, *arguments, **options):
        try:
            return function(*arguments, **options)
        except ApiException as e:
            problem = api.Problem.from_json(e.body)
            raise Refused(problem.status, problem.code, problem.detail) from None

    def define(self, name, size):
        body = api.GuestCreate.from_dict({
            "name": name,
            "driver": {"kind": "embedded", "vcpus": 1},
            "memory": {"blocks": [{"name": "ram0", "size_bytes": size, "gpa": 0}]},
        })
        return plain(self.call(self.guests.guest_create, body))

    def get(self, name):
        return plain(self.call(self.guests.guest_get, name))

    def list(self):
        return plain(self.call(self.guests.guest_list, limit=1000))

    def start(self, name):
        self.call(self.guests.guest_start, name)

    def stop(self, name):
        self.call(self.guests.guest_stop, name)

    def delete(self, name):
        self.call(self.guests.guest_delete, name)

    def wait(self, name, state):
        guest = self.get(name)
        while guest["state"] != state:
            tag = f'"{guest["generation"]}"'
            try:
                guest = plain(self.guests.guest_get(name, wait="30s", if_none_match=tag))
            except ApiException as e:
                if e.status != 304:
                    raise
        return guest

    def relabel(self, name, labels, tag):
        body = api.GuestUpdate.from_dict({"labels": labels})
        return plain(self.call(self.guests.guest_update, name, body, if_match=tag))

    def plan(self, name, strategy):
        body = api.AddressSpacePlanCreate.from_dict({"strategy": strategy})
        return plain(self.call(self.guests.address_space_plan_create, name, body))

    def mirror(self, name):
        strategy = {"kind": "shifted", "shift": {"kind": "4gib"}}
        body = api.MirrorCreate.from_dict({"guest": name, "strategy": strategy})
        return plain(self.call(self.mirrors.mirror_create, body))

    def delete_mirror(self, key):
        self.call(self.mirrors.mirror_delete, str(key))

    @staticmethod
    def move(name, host):
        return api.MigrationCreate.from_dict({"guest": name, "destination": {"kind": "host", "host": host}})

    def check(self, name, host):
        return plain(self.call(self.migrations.migration_check_create, self.move(name, host)))

    def migrate(self, name, host, key):
        return plain(self.call(self.migrations.migration_create, self.move(name, host), idempotency_key=key))

    def latest_cursor(self):
        page = self.call(self.events_api.event_list, limit=1000)
        while page.more:
            page = self.call(self.events_api.event_list, after=page.next_cursor, limit=1000)
        return page.next_cursor

    def events(self, after, resource, limit):
        page = self.call(self.events_api.event_list, after=after, resource=[str(resource)], limit=limit, wait="30s")
        return plain(page)
