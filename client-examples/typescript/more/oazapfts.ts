// The story's calls over the client that oazapfts makes.

import * as api from "./generated/oazapfts.js";
import { type Daemon, Refused } from "./daemon.js";

/** The data of an answer, or its problem thrown. */
async function data<T extends { status: number; data?: unknown }>(call: Promise<T>) {
  const answer = await call;
  if (answer.status >= 400) throw new Refused(answer.data as api.Problem);
  return answer.data as Extract<T, { status: 200 | 201 | 202; data: unknown }>["data"];
}

export function daemon(baseUrl: string, token: string): Daemon {
  const to = { baseUrl, headers: { Authorization: `Bearer ${token}` } };
  const move = (guest: string, host: string): api.MigrationCreate => ({ guest, destination: { kind: "host", host } });
  return {
    define: (name, size) =>
      data(
        api.guestCreate(
          {
            name,
            driver: { kind: "embedded", vcpus: 1 },
            memory: { blocks: [{ name: "ram0", size_bytes: size, gpa: 0 }] },
          },
          {},
          to,
        ),
      ),
    get: (name) => data(api.guestGet(name, {}, to)),
    list: () => data(api.guestList({ limit: 1000 }, to)),
    changed: async (name, tag) => {
      const answer = await api.guestGet(name, { wait: "30s", ifNoneMatch: tag }, to);
      return answer.status === 304 ? undefined : data(Promise.resolve(answer));
    },
    start: (name) => data(api.guestStart(name, {}, to)),
    stop: (name) => data(api.guestStop(name, {}, to)),
    remove: (name) => data(api.guestDelete(name, {}, to)),
    relabel: (name, tag) => data(api.guestUpdate(name, { labels: { by: "typescript" } }, { ifMatch: tag }, to)),
    plan: (name, strategy) => data(api.addressSpacePlanCreate(name, { strategy }, {}, to)),
    mirror: (guest, strategy) => data(api.mirrorCreate({ guest, strategy }, {}, to)),
    removeMirror: (id) => data(api.mirrorDelete(id, {}, to)),
    check: (name, host) => data(api.migrationCheckCreate(move(name, host), {}, to)),
    migrate: (name, host, key) => data(api.migrationCreate(move(name, host), { idempotencyKey: key }, to)),
    events: (after, resource, limit) =>
      data(api.eventList({ ...(after === undefined ? {} : { after, wait: "30s" }), resource, limit }, to)),
  };
}

