// The story's calls over the client that @hey-api/openapi-ts makes. It alone has streams.

import * as api from "./generated/hey-api/index.js";
import { createClient } from "./generated/hey-api/client/index.js";
import { type Daemon, Refused } from "./daemon.js";

/** The data of an answer, or its problem thrown. */
async function data<T>(call: Promise<{ data?: T; error?: unknown; response?: Response }>): Promise<T> {
  const answer = await call;
  if (answer.error !== undefined) throw new Refused(answer.error as api.Problem);
  return answer.data as T;
}

export function daemon(baseUrl: string, token: string): Daemon {
  const client = createClient({ baseUrl, auth: token });
  const move = (guest: string, host: string): api.MigrationCreate => ({ guest, destination: { kind: "host", host } });
  const of = (guest: string) => ({ client, path: { guest } });
  return {
    define: (name, size) =>
      data(
        api.guestCreate({
          client,
          body: {
            name,
            driver: { kind: "embedded", vcpus: 1 },
            memory: { blocks: [{ name: "ram0", size_bytes: size, gpa: 0 }] },
          },
        }),
      ),
    get: (name) => data(api.guestGet(of(name))),
    list: () => data(api.guestList({ client, query: { limit: 1000 } })),
    changed: async (name, tag) => {
      const answer = await api.guestGet({ ...of(name), query: { wait: "30s" }, headers: { "If-None-Match": tag } });
      return answer.response?.status === 304 ? undefined : data(Promise.resolve(answer));
    },
    start: (name) => data(api.guestStart(of(name))),
    stop: (name) => data(api.guestStop(of(name))),
    remove: (name) => data(api.guestDelete(of(name))),
    relabel: (name, tag) =>
      data(api.guestUpdate({ ...of(name), body: { labels: { by: "typescript" } }, headers: { "If-Match": tag } })),
    plan: (name, strategy) => data(api.addressSpacePlanCreate({ ...of(name), body: { strategy } })),
    mirror: (guest, strategy) => data(api.mirrorCreate({ client, body: { guest, strategy } })),
    removeMirror: (id) => data(api.mirrorDelete({ client, path: { mirror: id } })),
    check: (name, host) => data(api.migrationCheckCreate({ client, body: move(name, host) })),
    migrate: (name, host, key) =>
      data(api.migrationCreate({ client, body: move(name, host), headers: { "Idempotency-Key": key } })),
    events: (after, resource, limit) =>
      data(api.eventList({ client, query: { ...(after === undefined ? {} : { after, wait: "30s" }), resource, limit } })),
    follow: async (after, count) => {
      const ids: string[] = [];
      const enough = new AbortController();
      const { stream } = await api.eventStream({ client, query: { after }, signal: enough.signal });
      for await (const event of stream) {
        ids.push(event.id);
        if (ids.length === count) break;
      }
      // Without this the client would keep the connection.
      enough.abort();
      return ids;
    },
  };
}
