// Opens /docs in a headless Chromium: every operation of the document is shown, and no request goes anywhere but to
// the daemon. Then a person's session: the link opens it, scripts see no cookie, every operation is executed as the page
// offers it, in the page's order, and the last of them ends the session.
// MIRRORVM_A is the daemon's URL, MIRRORVM_A_SOCKET its Unix socket, MIRRORVMD the program, CHROMIUM the browser.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { chromium } from "playwright-core";

const daemon = process.env.MIRRORVM_A;
const api = await (await fetch(`${daemon}/v1/openapi.json`)).json();
const operations = Object.values(api.paths).flatMap((item) => Object.values(item));

// What a daemon refuses that has just begun and knows one other host, when all is clicked in order, and the code that says
// why. Ids of the page's examples are nobody's until something is made by them.
const REFUSED = {
  // The guest, which is paused, has not let go of it.
  ram_block_unplug: "409 plug_refused",
  // The guest was stopped, removed and defined anew by then.
  migration_create: "409 state_conflict",
  migration_put: "409 state_conflict",
  mirror_create: "409 state_conflict",
  mirror_put: "409 state_conflict",
  // So there are no migrations and no mirrors.
  ...Object.fromEntries(
    [
      "migration_get",
      "migration_update",
      "migration_cancel",
      "migration_hand_over_token_get",
      "migration_page_digests_get",
      "migration_resolve",
      "migration_round_list",
      "migration_switchover",
      "migration_delete",
      "migration_deletion_preview_get",
      "mirror_get",
      "mirror_update",
      "mirror_export",
      "mirror_import",
      "mirror_layout_get",
      "mirror_log_list",
      "mirror_stats_get",
      "mirror_delete",
      "mirror_deletion_preview_get",
      "mirror_drawing_get",
      "token_delete",
      "token_deletion_preview_get",
    ].map((operation) => [operation, "404 not_found"]),
  ),
  // `b` is known already.
  peer_host_create: "409 name_taken",
  // The file that was given is no image.
  helper_image_content_put: "422 helper_image_invalid",
  // Links open sessions once, and a session gives out none.
  session_create: "403 link_refused",
  session_link_create: "403 forbidden",
};
// What is asked for is done a little later: what comes next needs it.
const BECOMES = { guest_start: "running", guest_pause: "paused", guest_resume: "running", guest_stop: "stopped" };

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
try {
  const page = await browser.newPage();
  const outside = [];
  const failed = [];
  await page.route("**/*", (route) => {
    const url = route.request().url();
    if (url.startsWith(`${daemon}/`) || url.startsWith("data:")) return route.continue();
    outside.push(url);
    return route.abort();
  });
  page.on("response", (r) => r.status() >= 400 && failed.push(`${r.status()} ${r.url()}`));
  page.on("pageerror", (e) => failed.push(String(e)));
  const shown = (n) =>
    page.waitForFunction((n) => document.querySelectorAll(".opblock").length === n, n, { timeout: 120000 });
  await page.goto(`${daemon}/docs`, { waitUntil: "networkidle" });
  await shown(operations.length);
  assert.deepEqual(outside, [], "requests to elsewhere");
  assert.deepEqual(failed, [], "what failed");
  assert.equal(await page.title(), "mirrorvm API");
  const groups = await page.locator(".opblock-tag").evaluateAll((all) => all.map((tag) => tag.dataset.tag));
  assert.deepEqual(groups.slice(0, 2), ["guests", "migrations"], "what one comes for is first");
  console.log(`/docs shows ${operations.length} operations and asks nobody else`);

  const filter = page.locator("input.operation-filter-input");
  const holding = (text) => operations.filter((o) => o.operationId.includes(text)).length;
  await filter.fill("switchover");
  await shown(holding("switchover"));
  await filter.fill("guests");
  await page.waitForFunction(() => document.querySelector("#operations-guests-guest_create"));
  await filter.fill("");
  await shown(operations.length);
  console.log("the filter leaves what fits");

  const link = execFileSync(process.env.MIRRORVMD, ["open", "--print", "--socket", process.env.MIRRORVM_A_SOCKET]);
  const person = await (await browser.newContext({ viewport: { width: 1280, height: 2000 } })).newPage();
  await person.goto(link.toString().trim());
  await person.waitForURL(`${daemon}/docs/`);
  const who = () => person.evaluate(async () => (await (await fetch("/v1/whoami")).json()).method);
  assert.equal(await who(), "session");
  assert.equal(await person.evaluate(() => document.cookie), "", "scripts see no cookie");
  await person.waitForFunction((n) => document.querySelectorAll(".opblock").length === n, operations.length, {
    timeout: 120000,
  });
  const order = await person.locator(".opblock").evaluateAll((all) => all.map((block) => block.id));
  const wrong = [];
  const counted = { done: 0, refused: 0 };
  for (const id of order) {
    const name = id.replace(/^operations-[^_]*-(?=[a-z0-9_]+$)/, "");
    // One operation is drawn anew with all others that are shown: by the filter, as whoever looks for it would, few are.
    // Until it has taken effect, what is opened is put away again.
    await person.locator("input.operation-filter-input").fill(name);
    await person.waitForFunction(
      ([name, n]) => document.querySelectorAll(".opblock").length === n && document.querySelector(`[id$="-${name}"]`),
      [name, holding(name)],
      { timeout: 120000 },
    );
    const block = person.locator(`[id="${id}"]`);
    await block.locator(".opblock-summary-control").dispatchEvent("click");
    const file = block.locator("input[type=file]");
    const execute = block.locator("button.execute");
    await execute.waitFor({ timeout: 120000 });
    // What its body and its parameters look like comes later, and what is shown by then is drawn anew: a click on a button
    // that is no longer there does nothing.
    await person.waitForFunction(
      (name) =>
        window.ui.getState().getIn(["spec", "resolvedSubtrees", "paths"])?.some((item) =>
          item?.some((operation) => operation?.get?.("operationId") === name),
        ),
      name,
      { timeout: 120000 },
    );
    // A file is the one thing that a page cannot offer.
    if (await file.count()) {
      await file.setInputFiles({ name: "helper", mimeType: "application/octet-stream", buffer: Buffer.from("no image") });
    }
    await execute.dispatchEvent("click");
    const live = block.locator(".live-responses-table tbody .response-col_status").first();
    let status;
    try {
      status = parseInt(await live.innerText({ timeout: 120000 }), 10);
    } catch {
      wrong.push(`${name}: no answer`);
    }
    const text = status >= 400 ? await block.locator(".live-responses-table").innerText() : "";
    const code = /"code": "([a-z_]+)"/.exec(text)?.[1];
    const said = status >= 400 ? `${status} ${code}` : undefined;
    const expected = REFUSED[name];
    if (said !== expected && status !== undefined) {
      wrong.push(`${name}: ${said ?? status} and not ${expected ?? "done"}`);
    }
    if (BECOMES[name] && !said) {
      await person.waitForFunction(
        async (state) => (await (await fetch("/v1/guests/g1")).json()).state === state,
        BECOMES[name],
        { timeout: 120000 },
      );
    }
    counted[said ? "refused" : "done"] += 1;
    if (process.env.VERBOSE) console.log(`${name}: ${said ?? status}`);
    await block.locator(".opblock-summary-control").dispatchEvent("click");
  }
  assert.deepEqual(wrong, [], "what the page offers is answered otherwise");
  console.log(`all ${order.length} operations answer as they are offered: ${counted.done} do, ${counted.refused} say why not`);
  assert.equal(order.at(-1), "operations-access-session_delete");
  assert.equal(await who(), undefined, "the session has ended");
  console.log("a person's session is opened, used and ended");
} finally {
  await browser.close();
}
