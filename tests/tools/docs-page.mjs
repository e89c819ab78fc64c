// Opens /docs in a headless Chromium: every operation of the document is shown, and no request goes anywhere but to
// the daemon. Then a person's session: the link opens it, scripts see no cookie, and the page can make a change by it.
// MIRRORVM_A is the daemon's URL, MIRRORVM_A_SOCKET its Unix socket, MIRRORVMD the program, CHROMIUM the browser.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { chromium } from "playwright-core";

const daemon = process.env.MIRRORVM_A;
const api = await (await fetch(`${daemon}/v1/openapi.json`)).json();
const operations = Object.values(api.paths).flatMap((item) => Object.keys(item)).length;

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
  await page.goto(`${daemon}/docs`, { waitUntil: "networkidle" });
  await page.waitForFunction((n) => document.querySelectorAll(".opblock").length === n, operations, { timeout: 60000 });
  assert.deepEqual(outside, [], "requests to elsewhere");
  assert.deepEqual(failed, [], "what failed");
  console.log(`/docs shows ${operations} operations and asks nobody else`);

  const link = execFileSync(process.env.MIRRORVMD, ["open", "--print", "--socket", process.env.MIRRORVM_A_SOCKET]);
  const person = await (await browser.newContext()).newPage();
  await person.goto(link.toString().trim());
  await person.waitForURL(`${daemon}/docs/`);
  const who = () => person.evaluate(async () => (await (await fetch("/v1/whoami")).json()).method);
  assert.equal(await who(), "session");
  assert.equal(await person.evaluate(() => document.cookie), "", "scripts see no cookie");
  const ending = person.locator("#operations-access-session_delete");
  await ending.locator(".opblock-summary").click({ timeout: 60000 });
  const answer = person.waitForResponse((r) => r.url() === `${daemon}/v1/session`);
  await ending.locator(".execute").click();
  assert.equal((await answer).status(), 204, "the page sends the header that a change by session needs");
  assert.equal(await who(), undefined, "the session has ended");
  console.log("a person's session is opened, used and ended");
} finally {
  await browser.close();
}
