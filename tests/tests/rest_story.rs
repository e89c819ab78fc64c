//! The whole story over REST, as a client outside this repository would tell it: two daemons, one guest.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm::migration::wire;
use mirrorvm_tests::{Daemon, Pair, Request, embedded, is_terminal, kvm, migration, repository, until};
use serde_json::{Value, json};

fn plan_facts(plan: &Value) -> (u64, u64) {
    let slots = plan["slots"].as_array().unwrap();
    assert!(!slots.is_empty() && !plan["mappings"].as_array().unwrap().is_empty(), "{plan}");
    for slot in slots {
        assert_eq!(slot["mirror_gpa"].as_u64().unwrap() % 4096, 0, "{slot}");
        assert_eq!(slot["size_bytes"].as_u64().unwrap() % 4096, 0, "{slot}");
    }
    (plan["shift_bytes"].as_u64().unwrap(), slots.len() as u64)
}

#[test]
fn a_guest_is_defined_mirrored_migrated_and_deleted() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);

    // Definition.
    let created = a.post("/v1/guests", &embedded("g1", 32, 8 << 20)).expect(201);
    let guest = created.json();
    let id = guest["id"].as_str().unwrap().to_owned();
    assert_eq!(created.header("location"), Some(format!("/v1/guests/{id}").as_str()));
    assert_eq!(created.header("etag"), Some(format!("\"{}\"", guest["generation"]).as_str()));
    assert_eq!((&guest["state"], &guest["memory"]["total_bytes"]), (&json!("stopped"), &json!(32 << 20)));
    assert_eq!(guest["protection"]["level"], "none");
    assert_eq!(a.read("/v1/guests/g1"), a.read(&format!("/v1/guests/{id}")), "by name and by id");

    // Life cycle.
    let started = a.act("/v1/guests/g1/start").expect(202).json();
    assert!(["starting", "running"].iter().any(|s| started["state"] == *s), "{started}");
    let running = a.guest_in("g1", "running");
    assert!(
        running["started_at"].is_string() && running["generation"].as_u64() > guest["generation"].as_u64()
    );
    a.ticks_beyond("g1", 5);
    let again = a.act("/v1/guests/g1/start").expect(202).json();
    assert_eq!(again["generation"], running["generation"], "starting a running guest changes nothing");
    let paused = a.act("/v1/guests/g1/pause").expect(202).json();
    assert_eq!(paused["state"], "paused");
    let held = a.ticks("g1").unwrap();
    let _ = a.act("/v1/guests/g1/resume").expect(202);
    assert_eq!(a.ticks("g1").unwrap().number.saturating_sub(held.number) / 1000, 0, "it was held");
    a.ticks_beyond("g1", held.number + 5);

    // RAM blocks: the guest's and the helper's, all of it accounted for.
    let blocks = a.items("/v1/guests/g1/ram-blocks");
    let of = |name: &str| blocks.iter().find(|b| b["name"] == name || b["role"] == name).cloned();
    let ram = of("ram0").unwrap_or_else(|| panic!("{blocks:?}"));
    assert_eq!((&ram["size_bytes"], &ram["gpa"], &ram["ram_addr"]), (&json!(32 << 20), &json!(0), &json!(0)));
    assert_eq!(blocks.len(), 2, "{blocks:?}");
    for block in &blocks {
        let e = &block["encryption"];
        let sum: u64 =
            ["private_bytes", "shared_bytes", "unknown_bytes"].iter().map(|k| e[k].as_u64().unwrap()).sum();
        assert_eq!(sum, block["size_bytes"].as_u64().unwrap(), "{block}");
    }
    assert!(ram["encryption"]["shared_bytes"].as_u64().unwrap() > 0, "its console buffer is shared: {ram}");

    // Console: JSON by offsets, and the raw bytes.
    let first = a.read("/v1/guests/g1/console?offset=0&max_bytes=64");
    assert_eq!((&first["offset"], &first["next_offset"]), (&json!(0), &json!(64)));
    let raw = a.send(
        &Request::new("GET", "/v1/guests/g1/console?offset=0&max_bytes=64").header("accept", "text/plain"),
    );
    assert_eq!(raw.header("x-console-next-offset"), Some("64"));
    assert_eq!(raw.text(), first["data"].as_str().unwrap());

    // A plan changes nothing and is what the mirror then has.
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let plan = a.post("/v1/guests/g1/address-space-plans", &json!({"strategy": strategy, "workers": 2}));
    let plan = plan.expect(200).json();
    assert_eq!(plan_facts(&plan).0, 4 << 30);
    assert!(a.items("/v1/mirrors").is_empty());
    let made =
        a.post("/v1/mirrors", &json!({"guest": "g1", "strategy": strategy, "workers": 2})).expect(201).json();
    let mirror = format!("/v1/mirrors/{}", made["id"].as_str().unwrap());
    assert_eq!((&made["state"], &made["guest"]), (&json!("ready"), &json!(id)));
    assert_eq!(made["workers"].as_array().unwrap().len(), 2);
    let measurement = a.read("/v1/host/capabilities")["helper_measurement"].clone();
    assert_eq!(made["helper_measurement"], measurement);
    let layout = a.get(&format!("{mirror}/layout")).expect(200);
    assert_eq!(layout.header("content-type"), Some("application/json"));
    assert_eq!(layout.json(), plan, "the executed plan is the previewed one");
    let svg = a
        .send(&Request::new("GET", &format!("{mirror}/layout")).header("accept", "image/svg+xml"))
        .expect(200);
    assert_eq!(svg.header("content-type"), Some("image/svg+xml"));
    assert!(svg.text().starts_with("<svg") && svg.text().trim_end().ends_with("</svg>"));
    let second = a.post("/v1/mirrors", &json!({"guest": "g1", "strategy": strategy}));
    assert_eq!((second.status, second.problem().as_str()), (409, "in_use"));
    assert_eq!(a.delete(&mirror).expect(204).status, 204);
    assert_eq!(a.get(&mirror).expect(404).problem(), "not_found");

    // Migration with progress.
    let before = a.ticks_on("g1");
    let mut wanted = migration("g1", "b", "precopy");
    wanted["streams"] = json!(2);
    wanted["limits"] = json!({"bandwidth_bytes_per_second": 64 << 20});
    let created = a.post("/v1/migrations", &wanted).expect(201);
    let m = created.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(created.header("location"), Some(format!("/v1/migrations/{m}").as_str()));
    assert_eq!(created.json()["request"]["streams"], 2);
    let (mut states, mut processed, mut generation) = (Vec::new(), 0, 0);
    let end = a.follow(&format!("/v1/migrations/{m}"), 120, |now| {
        let moved = now["progress"]["memory"]["processed_bytes"].as_u64().unwrap();
        assert!(moved >= processed, "progress went back: {now}");
        assert!(now["generation"].as_u64().unwrap() >= generation, "the generation went back: {now}");
        (processed, generation) = (moved, now["generation"].as_u64().unwrap());
        states.push(now["state"].as_str().unwrap().to_owned());
        is_terminal(&now["state"])
    });
    println!("states seen: {states:?}\n{}", end["progress"]);
    assert_eq!(end["state"], "succeeded", "{end}");
    assert!(states.iter().any(|s| s == "precopy"), "{states:?}");
    let memory = &end["progress"]["memory"];
    assert_eq!(memory["total_bytes"], 32 << 20);
    assert!(memory["precopy_bytes"].as_u64().unwrap() >= 30 << 20, "{memory}");
    assert!(end["progress"]["downtime_ms"].as_f64().unwrap() > 0.0);
    assert!(end["progress"]["helper"]["pages_encrypted"].as_u64().unwrap() >= (32 << 20) / 4096 - 64);
    let rounds = a.items(&format!("/v1/migrations/{m}/rounds"));
    assert_eq!(rounds.len() as u64, memory["iteration"].as_u64().unwrap());
    let paused: Vec<bool> = rounds.iter().map(|r| r["paused"].as_bool().unwrap()).collect();
    assert_eq!(paused.iter().filter(|p| **p).count(), 1, "{rounds:?}");
    assert_eq!(paused.last(), Some(&true));
    let there = b.migration_end(&m);
    assert_eq!((&there["state"], &there["direction"]), (&json!("succeeded"), &json!("incoming")));

    // Every page as it was, by digests that did not go through the helper.
    let digests = |d: &Daemon| d.get(&format!("/v1/migrations/{m}/page-digests")).expect(200).body;
    assert_eq!(digests(a).len(), (32 << 20) / 4096 * 16);
    assert!(digests(a) == digests(b), "every page is equal");

    // The guest goes on there, and only there.
    let gone = a.read("/v1/guests/g1");
    assert_eq!((&gone["state"], &gone["moved_to"]), (&json!("stopped"), &json!("b")));
    assert_eq!(a.act("/v1/guests/g1/start").expect(409).problem(), "guest_moved");
    let here = b.read("/v1/guests/g1");
    assert_eq!(
        (&here["state"], &here["id"], &here["migration"]),
        (&json!("running"), &json!(id), &Value::Null)
    );
    let arrived = b.ticks_beyond("g1", before.number + 10);
    assert!(arrived.number < before.number + 1_000_000, "the counter went on, it did not start anew");
    let census = a.census();
    assert_eq!((census.memfds, census.children), (0, 0), "the source's memory is gone: {census:?}");

    // What may be deleted when.
    assert_eq!(b.delete("/v1/guests/g1").expect(409).problem(), "state_conflict");
    assert_eq!(a.delete("/v1/guests/g1").expect(204).status, 204);
    assert_eq!(a.delete(&format!("/v1/migrations/{m}")).expect(204).status, 204);
    assert_eq!(a.delete(&format!("/v1/migrations/{m}")).expect(404).problem(), "not_found");
    let _ = b.act("/v1/guests/g1/stop").expect(202);
    b.guest_in("g1", "stopped");
    let _ = b.delete("/v1/guests/g1").expect(204);
    assert!(b.items("/v1/guests").is_empty() && a.items("/v1/guests").is_empty());
    assert_eq!(a.delete("/v1/hosts/b").expect(204).status, 204);
}

#[test]
fn canceling_precopy_leaves_the_guest_here_and_nothing_there() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    a.run_guest(&embedded("g1", 32, 1 << 20));
    let clean = (a.census(), b.census());
    let mut slow = migration("g1", "b", "precopy");
    slow["limits"] = json!({"bandwidth_bytes_per_second": 4 << 20});
    let m = a.migrate(&slow);
    let path = format!("/v1/migrations/{m}");
    a.follow(&path, 60, |now| now["progress"]["memory"]["iteration"].as_u64() > Some(0));
    until("the guest arrives there", 20, || b.guest_state("g1") == "incoming");
    let busy = a.read("/v1/guests/g1");
    assert_eq!((&busy["state"], &busy["migration"]), (&json!("running"), &json!(m)));

    // While it goes on, it alone has the guest.
    for action in ["stop", "pause", "resume", "start"] {
        assert_eq!(
            a.act(&format!("/v1/guests/g1/{action}")).expect(409).problem(),
            "guest_migrating",
            "{action}"
        );
    }
    assert_eq!(a.delete("/v1/guests/g1").expect(409).problem(), "guest_migrating");
    assert_eq!(a.post("/v1/migrations", &slow).expect(409).problem(), "guest_migrating");
    assert_eq!(a.delete(&path).expect(409).problem(), "state_conflict");
    assert_eq!(a.delete("/v1/hosts/b").expect(409).problem(), "in_use");
    let mirror = a.items("/v1/mirrors")[0].clone();
    assert_eq!(mirror["state"], "busy");
    assert_eq!(
        a.delete(&format!("/v1/mirrors/{}", mirror["id"].as_str().unwrap())).expect(409).problem(),
        "in_use"
    );
    a.ticks_on("g1");

    let asked = std::time::Instant::now();
    let canceled = a.act(&format!("{path}/cancel")).expect(202).json();
    assert!(canceled["cancel_requested_at"].is_string(), "{canceled}");
    let end = a.migration_end(&m);
    println!("canceled after {:?}", asked.elapsed());
    assert_eq!((&end["state"], &end["error"]), (&json!("canceled"), &Value::Null));
    assert_eq!(end["guest_state_after"], "running");
    let again = a.act(&format!("{path}/cancel")).expect(200).json();
    assert_eq!(again["generation"], end["generation"], "canceling twice changes nothing");

    a.ticks_on("g1");
    let here = a.read("/v1/guests/g1");
    assert_eq!(
        (&here["state"], &here["migration"], &here["moved_to"]),
        (&json!("running"), &Value::Null, &Value::Null)
    );
    assert!(a.items("/v1/mirrors").is_empty());
    b.nothing_of("g1");
    assert!(b.items("/v1/guests").is_empty());
    let there = b.migration_end(&m);
    assert!(there["state"] == "canceled" || there["state"] == "failed", "{there}");
    assert_eq!(there["guest_state_after"], Value::Null);
    until("both hold what they held before", 20, || {
        let now = (a.census(), b.census());
        now.0.memfds == clean.0.memfds
            && now.0.kvm == clean.0.kvm
            && now.1.memfds == clean.1.memfds
            && now.1.kvm == clean.1.kvm
    });
    assert_eq!(a.act("/v1/guests/g1/stop").expect(202).status, 202);
    a.guest_in("g1", "stopped");
}

#[test]
fn a_migration_may_remove_the_source_and_use_a_mirror_that_exists() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    a.run_guest(&embedded("g1", 16, 0));
    let strategy = json!({"kind": "shifted", "shift": {"kind": "max-phys"}});
    let mirror = a.post("/v1/mirrors", &json!({"guest": "g1", "strategy": strategy})).expect(201).json();
    let mut wanted = migration("g1", "b", "precopy");
    wanted["mirror"] = json!({"kind": "existing", "mirror": mirror["id"]});
    wanted["on_success"] = json!({"source": "delete"});
    // It has one worker.
    wanted["streams"] = json!(2);
    let refused = a.post("/v1/migrations", &wanted).expect(422).json();
    assert_eq!(refused["errors"][0]["pointer"], "/streams", "{refused}");
    assert!(a.items("/v1/migrations").is_empty());
    a.ticks_on("g1");
    // As many as every mirror has.
    wanted.as_object_mut().unwrap().remove("streams");
    let m = a.migrate(&wanted);
    let end = a.migration_end(&m);
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(end["strategy"], strategy);
    assert_eq!(a.guest_state("g1"), "absent");
    assert!(a.items("/v1/mirrors").is_empty());
    b.ticks_on("g1");
    assert_eq!(a.migration_end(&m)["state"], "succeeded", "the record survives the guest");
    // A daemon that ends in order takes its guests with it and says so afterwards.
    let mut pair = pair;
    assert!(pair.b.terminate().success());
    assert!(!pair.b.socket().exists(), "the socket goes with the daemon");
    pair.b.restart();
    let lost = pair.b.read("/v1/guests/g1");
    assert_eq!(lost["state"], "stopped", "{lost}");
    assert_eq!(pair.b.migration_end(&m)["state"], "succeeded");
}

#[test]
fn version_capabilities_problems_and_document_are_served() {
    let a = Daemon::start("a");
    assert_eq!(
        (a.get("/livez").expect(200).text(), a.get("/readyz").expect(200).text()),
        ("ok\n".into(), "ok\n".into())
    );
    let version = a.read("/v1/version");
    assert!(
        version["api_version"].as_str().unwrap().starts_with('1') && version["features"].is_array(),
        "{version}"
    );
    let committed = std::fs::read_to_string(repository().join("openapi/v1.json")).unwrap();
    let served = a.get("/v1/openapi.json").expect(200);
    assert!(served.text() == committed, "the served document is the committed file");
    let capabilities = a.read("/v1/host/capabilities");
    assert_eq!(capabilities["kvm"]["available"], std::path::Path::new("/dev/kvm").exists());
    assert_eq!(capabilities["protocol_versions"], json!(wire::PROTOCOL_VERSIONS));
    let none = capabilities["protection_levels"].as_array().unwrap().iter().find(|l| l["level"] == "none");
    let (kept, withdrawn) = (&none.unwrap()["kept"], &none.unwrap()["withdrawn"]);
    assert!(kept.as_array().unwrap().contains(&json!("pages_authenticated")), "{kept}");
    assert!(withdrawn.as_array().unwrap().contains(&json!("memory_hidden_from_passive_host")), "{withdrawn}");
    let shifted =
        capabilities["strategies"].as_array().unwrap().iter().find(|s| s["kind"] == "shifted").cloned();
    assert_eq!(shifted.unwrap()["available"], true);
    for missing in capabilities["missing"].as_array().unwrap() {
        assert!(missing["fix"].as_str().is_some_and(|f| !f.is_empty()), "{missing}");
    }
    let host = a.read("/v1/host");
    assert_eq!((&host["name"], &host["identity"]), (&json!("a"), &json!(a.identity)));
    let problems = a.items("/v1/problems");
    assert!(problems.len() > 20);
    for problem in problems {
        let one = a.read(&format!("/v1/problems/{}", problem["code"].as_str().unwrap()));
        assert_eq!(one, problem);
    }
    let kinds: Vec<Value> = a.items("/v1/strategies").iter().map(|s| s["kind"].clone()).collect();
    assert_eq!(kinds, ["shifted", "identity-cbit", "declared", "psp-copied"]);
    let docs = a.get("/docs/").expect(200).text();
    assert!(docs.contains("swagger") && !docs.contains("https://"), "no outside requests");
}

#[test]
fn long_polls_answer_on_change_and_not_before() {
    if !kvm() {
        return;
    }
    let a = Daemon::start("a");
    a.run_guest(&embedded("g1", 16, 0));
    let now = a.get("/v1/guests/g1").expect(200);
    let tag = now.header("etag").unwrap().to_owned();
    let poll = |wait: &str| {
        a.send(&Request::new("GET", &format!("/v1/guests/g1?wait={wait}")).header("if-none-match", &tag))
    };
    let begun = std::time::Instant::now();
    assert_eq!(poll("1s").status, 304);
    assert!(begun.elapsed().as_millis() >= 950, "it waited");
    let stale = Request::new("POST", "/v1/guests/g1/pause").header("if-match", "\"1\"");
    assert_eq!(a.send(&stale).expect(412).problem(), "precondition_failed");
    std::thread::scope(|s| {
        let waiting = s.spawn(|| poll("60s"));
        let fresh = Request::new("POST", "/v1/guests/g1/pause").header("if-match", &tag);
        let _ = a.send(&fresh).expect(202);
        until("the poll's answer, long before its time", 20, || waiting.is_finished());
        assert_eq!(waiting.join().unwrap().expect(200).json()["state"], "paused");
    });
}
