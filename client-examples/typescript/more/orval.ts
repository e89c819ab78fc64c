// The story's calls over the client that orval makes, with every answer checked by the zod schemas that it makes, too.

import type { ZodType } from "zod";
import * as api from "./generated/orval/api.js";
import * as schemas from "./generated/orval/zod.js";
import { type Daemon, Refused } from "./daemon.js";

/** The data of an answer as the document describes it, or its problem thrown. */
async function data<T>(call: Promise<{ status: number; data: unknown }>, schema: ZodType<T>): Promise<T> {
  const answer = await call;
  if (answer.status >= 400) throw new Refused(answer.data as api.Problem);
  return schema.parse(answer.data);
}
async function gone(call: Promise<{ status: number; data: unknown }>): Promise<void> {
  const answer = await call;
  if (answer.status >= 400) throw new Refused(answer.data as api.Problem);
}

export function daemon(baseUrl: string, token: string): Daemon {
  const to = (headers: { [name: string]: string } = {}) => ({ baseUrl, headers: { ...headers, Authorization: `Bearer ${token}` } });
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
          undefined,
          to(),
        ),
        schemas.guestGetResponse,
      ),
    get: (name) => data(api.guestGet(name, undefined, to()), schemas.guestGetResponse),
    list: () => data(api.guestList({ limit: 1000 }, to()), schemas.guestListResponse),
    changed: async (name, tag) => {
      const answer = await api.guestGet(name, { wait: "30s" }, to({ "If-None-Match": tag }));
      return answer.status === 304 ? undefined : data(Promise.resolve(answer), schemas.guestGetResponse);
    },
    start: (name) => data(api.guestStart(name, undefined, to()), schemas.guestGetResponse),
    stop: (name) => data(api.guestStop(name, undefined, to()), schemas.guestGetResponse),
    remove: (name) => gone(api.guestDelete(name, to())),
    relabel: (name, tag) =>
      data(api.guestUpdate(name, { labels: { by: "typescript" } }, undefined, to({ "If-Match": tag })), schemas.guestGetResponse),
    plan: (name, strategy) =>
      data(api.addressSpacePlanCreate(name, { strategy }, to()), schemas.addressSpacePlanCreateResponse),
    mirror: (guest, strategy) => data(api.mirrorCreate({ guest, strategy }, undefined, to()), schemas.mirrorGetResponse),
    removeMirror: (id) => gone(api.mirrorDelete(id, to())),
    check: (name, host) => data(api.migrationCheckCreate(move(name, host), to()), schemas.migrationCheckCreateResponse),
    migrate: (name, host, key) =>
      data(api.migrationCreate(move(name, host), undefined, to({ "Idempotency-Key": key })), schemas.migrationGetResponse),
    events: (after, resource, limit) =>
      data(
        api.eventList({ ...(after === undefined ? {} : { after, wait: "30s" }), resource, limit }, to()),
        schemas.eventListResponse,
      ),
  };
}
