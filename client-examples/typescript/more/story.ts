// One story, told by three generated clients: define a guest, start it, preview two strategies, make a mirror, check and
// run a migration, follow it by events with a resume in the middle, and act on three errors by their codes.
//
// The clients are generated from openapi/v1.json by ./run; this file knows none of them, only the adapters beside it.
// Usage: story.js ADAPTER   (oazapfts, hey-api or orval; MIRRORVM_A and MIRRORVM_B are the daemons' URLs,
// MIRRORVM_A_TOKEN and MIRRORVM_B_TOKEN bearer tokens for them)

import assert from "node:assert/strict";
import { type Daemon, type Guest, Refused, type Strategy } from "./daemon.js";

async function refusal(code: string, call: Promise<unknown>): Promise<void> {
  const problem = await call.then(
    () => assert.fail(`nothing refused, expected ${code}`),
    (e: unknown) => (e instanceof Refused ? e.problem : assert.fail(String(e))),
  );
  assert.equal(problem.code, code);
}

async function waitFor(daemon: Daemon, name: string, state: string): Promise<Guest> {
  let now = await daemon.get(name);
  while (now.state !== state) now = (await daemon.changed(name, `"${now.generation}"`)) ?? now;
  return now;
}

const adapter = process.argv[2];
assert.ok(adapter);
const { daemon } = (await import(`./${adapter}.js`)) as { daemon: (url: string, token: string) => Daemon };
const [a, b] = (["MIRRORVM_A", "MIRRORVM_B"] as const).map((variable) => {
  const [url, token] = [process.env[variable], process.env[`${variable}_TOKEN`]];
  assert.ok(url && token, `${variable} or ${variable}_TOKEN is not set`);
  return daemon(url, token);
}) as [Daemon, Daemon];
const name = `ts-${Math.random().toString(16).slice(2, 10)}`;

const guest = await a.define(name, 32 << 20);
assert.deepEqual([guest.state, guest.driver.kind], ["stopped", "embedded"]);
await a.start(name);
await waitFor(a, name, "running");
console.log("runs:", guest.name, guest.id);

const shifted: Strategy = { kind: "shifted", shift: { kind: "4gib" } };
for (const strategy of [shifted, { kind: "identity-cbit" } as const]) {
  try {
    const plan = await a.plan(name, strategy);
    console.log(plan.strategy.kind, "has", plan.slots.length, "slots");
  } catch (e) {
    // A host may not execute a strategy; the plan says why.
    assert.ok(e instanceof Refused && e.problem.code === "plan_refused", String(e));
    console.log(e.message);
  }
}

// Whatever other guests the daemon has, and whatever drivers run them.
const kinds = new Set((await a.list()).items.map((one) => one.driver.kind));
assert.ok(kinds.has("embedded"));
const nobody = await a.get("nobody").catch((e: unknown) => (e instanceof Refused ? e.problem.code : String(e)));
console.log("drivers:", [...kinds].join(" "), "and nobody is", nobody);

const mirror = await a.mirror(name, shifted);
assert.equal(mirror.state, "ready");
await a.removeMirror(mirror.id);

const look = await a.check(name, "b");
assert.ok(look.migratable, JSON.stringify(look.blockers));
let page = await a.events(undefined, [], 1000);
while (page.more) page = await a.events(page.next_cursor, [], 1000);
const begun = page.next_cursor;
let cursor = begun;
const migration = await a.migrate(name, "b", `${name}-move`);
assert.equal((await a.migrate(name, "b", `${name}-move`)).id, migration.id, "a repeated request has no second effect");

// Events, a few at a time; every call resumes where the last one ended, as a client that was restarted would.
const states: string[] = [];
while (!["succeeded", "failed", "canceled"].includes(states.at(-1) ?? "")) {
  const some = await a.events(cursor, [migration.id], 2);
  for (const event of some.items) {
    if (event.type === "migration.state_changed") states.push(event.data.state ?? "");
  }
  cursor = some.next_cursor;
}
console.log("states:", states.join(" "));
assert.equal(states.at(-1), "succeeded");
if (a.follow !== undefined) {
  const streamed = await a.follow(begun, 3);
  assert.equal(streamed.length, 3);
  assert.deepEqual(await a.follow(streamed[0]!, 2), streamed.slice(1), "a stream resumes where it ended");
}
// It is the destination's from then on, and runs there a moment later.
await waitFor(b, name, "running");

// Three errors, each acted on by its code.
await refusal("guest_moved", a.start(name));
assert.equal((await b.get(name)).id, guest.id, "so it is the other host's now");
await refusal("name_taken", b.define(name, 32 << 20));
assert.equal((await b.get(name)).id, guest.id, "so the one that is there will do");
await refusal("precondition_failed", b.relabel(name, '"1"'));
// So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
let relabelled;
while (!relabelled) {
  const fresh = `"${(await b.get(name)).generation}"`;
  relabelled = await b.relabel(name, fresh).catch((e: unknown) => {
    if (!(e instanceof Refused && e.problem.code === "precondition_failed")) throw e;
  });
}
assert.equal(relabelled.labels["by"], "typescript");

await b.stop(name);
await waitFor(b, name, "stopped");
for (const daemon of [b, a]) await daemon.remove(name);
console.log("the story went well with", adapter);
