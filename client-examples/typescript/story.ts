// One story over the API, with types that openapi-typescript makes from openapi/v1.json: define a guest, start it,
// preview two strategies, make a mirror, check and run a migration, follow it by events with a resume in the middle,
// and act on three errors by their codes. MIRRORVM_A and MIRRORVM_B are the daemons' URLs,
// MIRRORVM_A_TOKEN and MIRRORVM_B_TOKEN bearer tokens for them.

import assert from "node:assert/strict";
import createClient, { type Client } from "openapi-fetch";
import type { components, paths } from "./generated/api.js";

type Guest = components["schemas"]["Guest"];
type Strategy = components["schemas"]["Strategy"];
type Problem = components["schemas"]["Problem"];
type Api = Client<paths>;

/** A problem (RFC 9457): programs go by its code, which the compiler knows. */
class Refused extends Error {
  constructor(readonly problem: Problem) {
    super(`${problem.status} ${problem.code}: ${problem.detail}`);
  }
}

/** The data of an answer, or its problem thrown. */
function data<T>(answer: { data?: T; error?: Problem; response: Response }): T {
  if (answer.error !== undefined) throw new Refused(answer.error);
  return answer.data as T;
}

async function refusal(code: Problem["code"], call: Promise<unknown>): Promise<void> {
  const problem = await call.then(
    () => assert.fail(`nothing refused, expected ${code}`),
    (e: unknown) => (e instanceof Refused ? e.problem : assert.fail(String(e))),
  );
  assert.equal(problem.code, code);
}

function daemon(variable: string): Api {
  const baseUrl = process.env[variable];
  const token = process.env[`${variable}_TOKEN`];
  assert.ok(baseUrl && token, `${variable} or ${variable}_TOKEN is not set`);
  return createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });
}

async function get(api: Api, guest: string): Promise<Guest> {
  return data(await api.GET("/v1/guests/{guest}", { params: { path: { guest } } }));
}

async function waitFor(api: Api, guest: string, state: string): Promise<Guest> {
  let now = await get(api, guest);
  while (now.state !== state) {
    const answer = await api.GET("/v1/guests/{guest}", {
      params: {
        path: { guest },
        query: { wait: "30s" },
        header: { "If-None-Match": `"${now.generation}"` },
      },
    });
    if (answer.response.status !== 304) now = data(answer) as Guest;
  }
  return now;
}

async function define(api: Api, name: string): Promise<Guest> {
  return data(
    await api.POST("/v1/guests", {
      body: {
        name,
        driver: { kind: "embedded", vcpus: 1 },
        memory: { blocks: [{ name: "ram0", size_bytes: 32 << 20, gpa: 0 }] },
      } as components["schemas"]["GuestCreate"],
    }),
  );
}

async function relabel(api: Api, guest: string, tag: string): Promise<Guest> {
  return data(
    await api.PATCH("/v1/guests/{guest}", {
      params: { path: { guest }, header: { "If-Match": tag } },
      body: { labels: { by: "typescript" } },
      headers: { "Content-Type": "application/merge-patch+json" },
    }),
  );
}

const a = daemon("MIRRORVM_A");
const b = daemon("MIRRORVM_B");
const name = `ts-${Date.now().toString(36)}`;
const path = { path: { guest: name } };

const guest = await define(a, name);
assert.equal(guest.state, "stopped");
data(await a.POST("/v1/guests/{guest}/start", { params: path }));
await waitFor(a, name, "running");
console.log("runs:", guest.name, guest.id);

const shifted: Strategy = { kind: "shifted", shift: { kind: "4gib" } };
const strategies: Strategy[] = [shifted, { kind: "identity-cbit" }];
for (const strategy of strategies) {
  const answer = await a.POST("/v1/guests/{guest}/address-space-plans", {
    params: path,
    body: { strategy } as components["schemas"]["AddressSpacePlanCreate"],
  });
  if (answer.error) {
    // A host may not execute a strategy; the plan says why.
    assert.equal(answer.error.code, "plan_refused");
    console.log(`${strategy.kind}:`, answer.error.errors[0]?.detail);
  } else {
    console.log(`${strategy.kind}: ${answer.data.slots.length} slots`);
  }
}

// Whatever other guests the daemon has, and whatever drivers run them.
const all = data(await a.GET("/v1/guests", { params: { query: { limit: 1000 } } }));
const kinds = new Set(all.items.map((one) => one.driver.kind));
assert.ok(kinds.has("embedded"));
const nobody = await a.GET("/v1/guests/{guest}", { params: { path: { guest: "nobody" } } });
console.log("drivers:", [...kinds].join(" "), "and nobody is", nobody.error?.code);

const mirror = data(
  await a.POST("/v1/mirrors", {
    body: { guest: name, strategy: shifted } as components["schemas"]["MirrorCreate"],
  }),
);
assert.equal(mirror.state, "ready");
data(await a.DELETE("/v1/mirrors/{mirror}", { params: { path: { mirror: mirror.id } } }));

const move = {
  guest: name,
  destination: { kind: "host", host: "b" },
} as components["schemas"]["MigrationCreate"];
const check = data(await a.POST("/v1/migration-checks", { body: move }));
assert.ok(check.migratable, JSON.stringify(check.blockers));

let page = data(await a.GET("/v1/events", { params: { query: { limit: 1000 } } }));
while (page.more) {
  page = data(await a.GET("/v1/events", { params: { query: { after: page.next_cursor, limit: 1000 } } }));
}
let cursor = page.next_cursor;
const key = { header: { "Idempotency-Key": `${name}-move` } };
const migration = data(await a.POST("/v1/migrations", { params: key, body: move }));
const again = data(await a.POST("/v1/migrations", { params: key, body: move }));
assert.equal(again.id, migration.id, "a repeated request has no second effect");

// Events, a few at a time; every call resumes where the last one ended, as a client that was restarted would.
const states: string[] = [];
while (!["succeeded", "failed", "canceled"].includes(states.at(-1) ?? "")) {
  const query = { after: cursor, resource: [migration.id], limit: 2, wait: "30s" };
  const some = data(await a.GET("/v1/events", { params: { query } }));
  for (const event of some.items) {
    if (event.type === "migration.state_changed") states.push(event.data.state ?? "");
  }
  cursor = some.next_cursor;
}
console.log("states:", states.join(" "));
assert.equal(states.at(-1), "succeeded");
// It is the destination's from then on, and runs there a moment later.
await waitFor(b, name, "running");

// Three errors, each acted on by its code.
await refusal("guest_moved", a.POST("/v1/guests/{guest}/start", { params: path }).then(data));
const moved = await get(b, name);
assert.equal(moved.id, guest.id, "so it is the other host's now");
await refusal("name_taken", define(b, name));
assert.equal((await get(b, name)).id, guest.id, "so the one that is there will do");
await refusal("precondition_failed", relabel(b, name, '"1"'));
// So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
let relabelled;
while (!relabelled) {
  const fresh = `"${(await get(b, name)).generation}"`;
  relabelled = await relabel(b, name, fresh).catch((e: unknown) => {
    if (!(e instanceof Refused && e.problem.code === "precondition_failed")) throw e;
  });
}
assert.equal(relabelled.labels["by"], "typescript");

data(await b.POST("/v1/guests/{guest}/stop", { params: path }));
await waitFor(b, name, "stopped");
data(await b.DELETE("/v1/guests/{guest}", { params: path }));
data(await a.DELETE("/v1/guests/{guest}", { params: path }));
console.log("the story went well with openapi-fetch");
