// Opens /docs in a headless Chromium: every operation of the document is shown, and no request goes anywhere but to
// the daemon. MIRRORVM_A is the daemon's URL, CHROMIUM the browser.
import assert from "node:assert/strict";
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
} finally {
  await browser.close();
}
