// Opens the session that the address has the code of, and goes on to the documentation page.
"use strict";
(() => {
  const say = (text) => { document.getElementById("said").textContent = text; };
  const open = async () => {
    const code = location.hash.slice(1);
    // Neither the history nor whoever looks over a shoulder needs it any more.
    history.replaceState(null, "", location.pathname);
    if (code === "") {
      say("There is no code in this address. Run `mirrorvmd open` on the daemon's machine for a link.");
      return;
    }
    try {
      const answer = await fetch("/v1/session", {
        method: "POST",
        headers: { "content-type": "application/json", "x-mirrorvm": "1" },
        body: JSON.stringify({ code }),
        cache: "no-store",
      });
      if (answer.ok) {
        location.replace("/docs/");
        return;
      }
      const problem = await answer.json();
      say(`${problem.title}: ${problem.detail}. Run \`mirrorvmd open\` again for another link.`);
    } catch (error) {
      say(`The daemon does not answer: ${error.message}`);
    }
  };
  // A browser that loads the page before anybody has asked for it uses nothing up.
  if (document.prerendering) {
    document.addEventListener("prerenderingchange", open, { once: true });
  } else {
    open();
  }
  // Another link that is pasted into the same tab changes nothing but what is behind `#`.
  window.addEventListener("hashchange", open);
})();
