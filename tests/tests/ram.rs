//! RAM over REST: adding, plugging, encryption status, readiness, policies and strategies of encrypted
//! guests. Needs no `/dev/kvm`: the guests are the software machine's, and KVM's as well where it is said.
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm_tests::{Daemon, Pair, Request, is_terminal, kvm, migration, until_some};
use serde_json::{Value, json};

const HIGH: u64 = 0x1_4000_0000;

fn guest(name: &str, sev: &Value) -> Value {
    json!({
        "name": name,
        "driver": {"kind": "emulated", "vcpus": 1, "sev": sev, "workload": {
            "fill": "random", "working_set_bytes": 1 << 20, "dirty_bytes_per_second": 1 << 20}},
        "memory": {"blocks": [
            {"name": "ram0", "size_bytes": 16 << 20, "gpa": 0},
            {"name": "ram1", "size_bytes": 4 << 20, "gpa": HIGH},
        ]},
    })
}

#[test]
fn an_encrypted_guest_s_ram_is_plugged_reported_and_moved() {
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    let can = a.read("/v1/host/capabilities");
    assert!(can["drivers"].as_array().unwrap().contains(&json!("emulated")), "{can}");
    assert!(can["missing"].as_array().unwrap().iter().any(|m| m["code"] == "sev-snp"), "{can}");
    for kind in ["shifted", "identity-cbit", "declared", "psp-copied"] {
        assert_eq!(a.read(&format!("/v1/strategies/{kind}"))["available"], true, "{kind}");
    }

    a.run_guest(&guest("g1", &json!({"policy": 0, "es": false})));
    let running = a.read("/v1/guests/g1");
    assert_eq!(running["driver"]["sev"]["policy"], 1, "0 is the default, NODBG");
    assert_eq!(running["protection"]["level"], "modelled");
    assert_eq!(running["migration_readiness"]["reason"], "announced", "{running}");
    assert!(running["migration_readiness"]["declared_pieces"].as_u64() > Some(1));

    // What is shared is what the guest said; extents cover all RAM, in pages of any size.
    let sum_of = |all: &Value, status: &str| -> u64 {
        let extents = all["items"].as_array().unwrap();
        extents.iter().filter(|e| e["status"] == status).map(|e| e["size_bytes"].as_u64().unwrap()).sum()
    };
    // It says so in its own time, which may be after it runs.
    let all = until_some("the guest's shared pages", 30, || {
        let all = a.read("/v1/guests/g1/encryption-status");
        (sum_of(&all, "shared") >= 16 * 4096).then_some(all)
    });
    let extents = all["items"].as_array().unwrap();
    let sum = |status: &str| sum_of(&all, status);
    assert_eq!((sum("shared"), sum("private")), (16 * 4096, (20 << 20) - 16 * 4096), "{all}");
    let (mut from, mut pieces) = (0, Vec::new());
    loop {
        let page = a.read(&format!("/v1/guests/g1/encryption-status?limit=1&from={from}"));
        pieces.extend(page["items"].as_array().unwrap().clone());
        match page["next_from"].as_u64() {
            Some(next) => from = next,
            None => break,
        }
    }
    assert_eq!(&pieces, extents, "read one by one it is the same");
    let report = "/v1/guests/g1/encryption-status";
    let _ = a.post(report, &json!({"gpa": HIGH, "pages": 2, "encrypted": false})).expect(204);
    let _ = a.post(report, &json!({"gpa": HIGH, "pages": 2, "encrypted": true})).expect(204);
    let refused = a.post(report, &json!({"gpa": HIGH, "pages": 1025, "encrypted": false})).expect(422);
    assert_eq!(refused.json()["errors"][0]["pointer"], "/gpa");
    assert_eq!(a.read("/v1/guests/g1/encryption-status"), all, "all or nothing, and back again");

    // Plugging.
    let path = "/v1/guests/g1/ram-blocks/ram1";
    let look = a.act(&format!("{path}/unplug?dry_run=true")).expect(200).json();
    assert_eq!(look["gpa"], Value::Null);
    assert_eq!(a.act("/v1/guests/g1/ram-blocks/ram0/unplug").expect(409).problem(), "plug_refused");
    assert_eq!(a.act("/v1/guests/g1/ram-blocks/none/unplug").expect(404).problem(), "not_found");
    let elsewhere = a.post(&format!("{path}/plug"), &json!({"gpa": HIGH + (64 << 20)})).expect(409);
    assert_eq!(elsewhere.problem(), "plug_refused");
    let unplugged = a.act(&format!("{path}/unplug")).expect(200).json();
    assert_eq!(
        (&unplugged["gpa"], &unplugged["encryption"]["private_bytes"]),
        (&Value::Null, &json!(4 << 20))
    );

    // The planner names what it cannot reach; a migration by RAM address takes it along.
    let plans = "/v1/guests/g1/address-space-plans";
    let refused = a.post(plans, &json!({"strategy": {"kind": "identity-cbit"}})).expect(422).json();
    let errors = refused["errors"].as_array().unwrap();
    assert!(errors.iter().any(|e| e["code"] == "unplugged_private"), "{refused}");
    let plan = a.post(plans, &json!({"strategy": {"kind": "declared"}})).expect(200).json();
    assert!(!plan["exposures"].as_array().unwrap().is_empty());
    let mut body = migration("g1", "b", "precopy");
    body["mirror"] = json!({"kind": "template", "strategy": {"kind": "psp-copied", "via": "send-receive"}});
    body["verify"] = json!(true);
    let id = a.post("/v1/migrations", &body).expect(201).json()["id"].as_str().unwrap().to_owned();
    let end = a.follow(&format!("/v1/migrations/{id}"), 60, |m| is_terminal(&m["state"]));
    assert_eq!(end["state"], "succeeded", "{end}");
    // Both hosts say what of it is encrypted, as the guest said.
    for record in [&end, &b.migration_end(&id)] {
        let (said, memory) = (&record["progress"]["encryption"], &record["progress"]["memory"]);
        let total = memory["total_bytes"].as_u64().unwrap();
        let wanted = json!({"encrypted_bytes": total - 16 * 4096, "shared_bytes": 16 * 4096, "unknown_bytes": 0,
            "status_changes": 0});
        assert_eq!(said, &wanted, "{record}");
    }
    let digests = |d: &Daemon| d.get(&format!("/v1/migrations/{id}/page-digests")).expect(200).body;
    assert!(digests(a) == digests(b) && !digests(a).is_empty(), "every page is equal");
    let there = b.post(&format!("{path}/plug"), &json!({"gpa": HIGH})).expect(200).json();
    assert_eq!(there["gpa"], HIGH);
    let ticks = b.ticks_on("g1");
    assert_eq!(b.ticks_beyond("g1", ticks.number + 50).errors, 0, "the block's content came along");
}

#[test]
fn policies_and_levels_are_obeyed_over_rest() {
    let pair = Pair::start();
    let (a, _) = (&pair.a, &pair.b);
    let create = |sev: Value| a.post("/v1/guests", &guest("bad", &sev)).expect(422).json();
    for (sev, pointer) in [
        (json!({"policy": 64}), "/driver/sev/policy"),
        (json!({"policy": 1, "es": true}), "/driver/sev/es"),
        (json!({"policy": 4}), "/driver/sev/es"),
        (json!({"policy": -1}), "/driver/sev/policy"),
        (json!({"es": 1}), "/driver/sev/es"),
        (json!({"snp": true}), "/driver/sev/snp"),
        (
            json!({"es": true, "mirror": {"strategy": {"kind": "declared"}, "workers": 17}}),
            "/driver/sev/mirror/workers",
        ),
    ] {
        let problem = create(sev.clone());
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{sev}: {problem}");
    }
    // Encrypted on hardware that is not there: said with the reason, nothing half made.
    if std::path::Path::new("/dev/kvm").exists() && !std::path::Path::new("/dev/sev").exists() {
        let mut real = guest("real", &json!({"policy": 1}));
        real["driver"]["kind"] = json!("embedded");
        let _ = a.post("/v1/guests", &real).expect(201);
        assert_eq!(a.act("/v1/guests/real/start").expect(501).problem(), "capability_missing");
        assert_eq!(a.read("/v1/guests/real")["state"], "stopped");
    }
    for (name, policy) in [("nosend", 9), ("debuggable", 16)] {
        a.run_guest(&guest(name, &json!({"policy": policy})));
        let refused = a.post("/v1/migrations", &migration(name, "b", "precopy")).expect(409);
        assert_eq!(refused.problem(), "policy_forbids", "{name}");
    }
    let mirror = json!({"guest": "debuggable", "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}}});
    assert_eq!(a.post("/v1/mirrors", &mirror).expect(409).problem(), "policy_forbids");
    let ssvg = a.post(
        "/v1/mirrors",
        &json!({"guest": "nosend", "strategy": {"kind": "psp-copied", "via": "launch-update"}}),
    );
    let made = ssvg.expect(201).json();
    let id = made["id"].as_str().unwrap();
    let layout = a.read(&format!("/v1/mirrors/{id}/layout"));
    assert!(layout["slots"].as_array().unwrap().iter().any(|s| s["backing"] == "private"), "{layout}");
}

#[test]
fn what_a_launch_decided_stays_decided() {
    let pair = Pair::start();
    let a = &pair.a;
    // An encrypted guest's helper was loaded for the strategies as they are listed, and no host can load it
    // again.
    a.run_guest(&guest("plain", &json!({})));
    let shift = |bytes: u64| json!({"kind": "shifted", "shift": {"kind": "explicit", "bytes": bytes}});
    let mirror = json!({"guest": "plain", "strategy": shift(8 << 30)});
    assert_eq!(a.post("/v1/mirrors", &mirror).expect(409).problem(), "helper_not_launched");
    // The mirror of a guest with encrypted registers came with it.
    a.run_guest(&guest("es", &json!({"es": true, "mirror": {"strategy": {"kind": "declared"}}})));
    let mirrors = a.items("/v1/mirrors");
    assert_eq!(mirrors.len(), 1);
    let id = mirrors[0]["id"].as_str().unwrap();
    assert_eq!(a.delete(&format!("/v1/mirrors/{id}")).expect(409).problem(), "mirror_at_launch");
    // A guest that takes its word back.
    let mut fickle = guest("fickle", &json!({}));
    fickle["driver"]["workload"]["withdraws_readiness_after_ms"] = json!(10);
    a.run_guest(&fickle);
    let lost = a.follow("/v1/guests/fickle", 30, |g| g["migration_readiness"]["ready"] == false);
    assert_eq!(lost["migration_readiness"]["reason"], "withdrawn");
    let refused = a.post("/v1/migrations", &migration("fickle", "b", "precopy")).expect(409);
    assert_eq!(refused.problem(), "guest_not_ready");
    assert!(refused.json()["detail"].as_str().unwrap().contains("CPU goes offline"));
}

/// Whether the slots of a mirror's layout have all of a block in them.
fn covers(layout: &Value, block: &Value) -> bool {
    let (start, size) = (block["ram_addr"].as_u64().unwrap(), block["size_bytes"].as_u64().unwrap());
    let mut parts: Vec<(u64, u64)> = layout["slots"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|s| s["backing"] == "ram")
        .map(|s| (s["ram_addr"].as_u64().unwrap(), s["size_bytes"].as_u64().unwrap()))
        .collect();
    parts.sort_unstable();
    let reached = parts.iter().fold(start, |to, (at, len)| if *at <= to { to.max(at + len) } else { to });
    reached >= start + size
}

#[test]
fn a_stopped_guest_gets_more_ram_and_keeps_it() {
    let mut d = Daemon::start("a");
    let one = json!({
        "name": "g1",
        "driver": {"kind": "emulated", "vcpus": 1, "workload": {
            "fill": "random", "working_set_bytes": 1 << 20, "dirty_bytes_per_second": 1 << 20}},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 16 << 20, "gpa": 0}]},
    });
    let made = d.post("/v1/guests", &one).expect(201);
    let guest = made.json()["id"].as_str().unwrap().to_owned();
    let path = "/v1/guests/g1/ram-blocks";
    let more = json!({"name": "ram1", "size_bytes": 4 << 20, "gpa": HIGH});
    let before = d.read("/v1/guests/g1");

    // A look changes nothing; it says what would be, and refuses what would be refused.
    let look = d.post(&format!("{path}?dry_run=true"), &more).expect(200).json();
    assert_eq!(
        (&look["gpa"], &look["ram_addr"], &look["role"]),
        (&json!(HIGH), &json!(16 << 20), &json!("ram"))
    );
    assert_eq!(d.read("/v1/guests/g1"), before);
    for (body, pointer, code) in [
        (json!({"name": "ram0", "size_bytes": 4096}), "/name", "duplicate_name"),
        (json!({"name": "mirrorvm.helper", "size_bytes": 4096}), "/name", "duplicate_name"),
        (json!({"name": "a b", "size_bytes": 4096}), "/name", "invalid_name"),
        (json!({"name": "", "size_bytes": 4096}), "/name", "invalid_name"),
        (json!({"size_bytes": 4096}), "/name", "missing"),
        (json!({"name": "x"}), "/size_bytes", "missing"),
        (json!({"name": "x", "size_bytes": 0}), "/size_bytes", "out_of_range"),
        (json!({"name": "x", "size_bytes": 4097}), "/size_bytes", "unaligned"),
        (json!({"name": "x", "size_bytes": 65u64 << 40}), "/size_bytes", "out_of_range"),
        (json!({"name": "x", "size_bytes": 4096, "gpa": 1}), "/gpa", "unaligned"),
        (json!({"name": "x", "size_bytes": 4096, "gpa": -1}), "/gpa", "out_of_range"),
        (json!({"name": "x", "size_bytes": 4096, "gpa": 4096}), "/gpa", "overlap"),
        (json!({"name": "x", "size_bytes": 4096, "ram_addr": 0}), "/ram_addr", "unknown_field"),
    ] {
        for target in [path.to_owned(), format!("{path}?dry_run=true")] {
            let refused = d.post(&target, &body).expect(422).json();
            let error = &refused["errors"][0];
            assert_eq!(
                (&error["pointer"], &error["code"]),
                (&json!(pointer), &json!(code)),
                "{body}: {refused}"
            );
        }
    }
    // The same name is no name of a guest's block at its definition either.
    let mut reserved = one.clone();
    reserved["name"] = json!("g2");
    reserved["memory"]["blocks"][0]["name"] = json!("mirrorvm.vmsa");
    let refused = d.post("/v1/guests", &reserved).expect(422).json();
    assert_eq!(refused["errors"][0]["pointer"], "/memory/blocks/0/name");
    assert_eq!(d.post("/v1/guests/none/ram-blocks", &more).expect(404).problem(), "not_found");
    let add = |body: &Value| Request::new("POST", path).json(body);
    let stale = d.send(&add(&more).header("if-match", "\"99\"")).expect(412);
    assert_eq!(stale.problem(), "precondition_failed");
    assert_eq!(d.read("/v1/guests/g1"), before, "nothing so far changed it");

    // Added once, however often it is asked for with one key.
    let request = add(&more).header("if-match", made.header("etag").unwrap()).header("idempotency-key", "k1");
    let added = d.send(&request).expect(201);
    assert_eq!(added.json(), look);
    assert_eq!(added.header("etag"), Some("\"2\""), "the guest's");
    let location = added.header("location").unwrap().to_owned();
    assert_eq!(location, format!("/v1/guests/{guest}/ram-blocks/ram1"));
    assert_eq!(d.read(&location), look);
    assert_eq!(d.get(&format!("{path}/none")).expect(404).problem(), "not_found");
    let again = d.send(&request).expect(201);
    assert_eq!((again.header("idempotency-replayed"), &again.body), (Some("true"), &added.body));
    assert_eq!(d.post(path, &more).expect(422).json()["errors"][0]["code"], "duplicate_name");
    let unplugged =
        d.post(path, &json!({"name": "ram2", "size_bytes": 2 << 20, "gpa": null})).expect(201).json();
    assert_eq!((&unplugged["gpa"], &unplugged["ram_addr"]), (&Value::Null, &json!(20 << 20)));

    // It is known of: an event each, and an entry of the audit log each.
    let log = d.items("/v1/audit-log?operation=ram_block_create&limit=1000");
    let good: Vec<_> = log.iter().filter(|e| e["status"] == 201 && e["replayed"] != true).collect();
    assert_eq!(good.len(), 2, "{log:#?}");
    assert!(good.iter().any(|e| e["location"] == location.as_str()));
    // Events are shown when they are on disk.
    let updated = until_some("an event of each block", 10, || {
        let of = |e: &&Value| e["type"] == "guest.updated" && e["data"]["id"] == guest.as_str();
        let found: Vec<Value> = d.items("/v1/events").iter().filter(of).cloned().collect();
        (found.len() >= 2).then_some(found)
    });
    assert_eq!(updated.len(), 2, "{updated:#?}");

    // On disk when it was answered.
    let (blocks, definition) = (d.items(path), d.read("/v1/guests/g1")["memory"].clone());
    assert_eq!(definition["total_bytes"], 22 << 20);
    assert_eq!(definition["blocks"].as_array().unwrap().len(), 3);
    d.kill();
    d.restart();
    assert_eq!((d.items(path), &d.read("/v1/guests/g1")["memory"]), (blocks, &definition));

    // In no other state; and what it has is of use when it runs.
    let _ = d.act("/v1/guests/g1/start").expect(202);
    d.guest_in("g1", "running");
    let third = json!({"name": "ram3", "size_bytes": 4096});
    for target in [path.to_owned(), format!("{path}?dry_run=true")] {
        let refused = d.post(&target, &third).expect(409);
        assert_eq!(refused.problem(), "state_conflict");
        assert_eq!(refused.json()["allowed_states"], json!(["stopped"]));
    }
    let place = HIGH + (64 << 20);
    let plugged = d.post(&format!("{path}/ram2/plug"), &json!({"gpa": place})).expect(200).json();
    assert_eq!(plugged["gpa"], place);
    let _ = d.act(&format!("{path}/ram1/unplug")).expect(200);
    let _ = d.act("/v1/guests/g1/stop").expect(202);
    d.guest_in("g1", "stopped");
    // What was plugged since counts: no block over it, nor in the place of one that is away.
    for gpa in [place, HIGH] {
        let over = d.post(path, &json!({"name": "ram3", "size_bytes": 4096, "gpa": gpa})).expect(422).json();
        assert_eq!(
            (&over["errors"][0]["pointer"], &over["errors"][0]["code"]),
            (&json!("/gpa"), &json!("overlap"))
        );
    }
    let _ = d.post(path, &third).expect(201);
    let gpas: Vec<Value> =
        d.items(path).iter().filter(|b| b["role"] == "ram").map(|b| b["gpa"].clone()).collect();
    assert_eq!(gpas, [json!(0), Value::Null, json!(place), Value::Null], "the others are as they were");

    // QEMU has its guests' RAM in one piece.
    let file = mirrorvm_tests::repository().join("tests/guest/build-linux-guest");
    let qemu = json!({
        "name": "q1",
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": file},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 64 << 20, "gpa": 0}]},
    });
    let _ = d.post("/v1/guests", &qemu).expect(201);
    assert_eq!(d.post("/v1/guests/q1/ram-blocks", &more).expect(501).problem(), "capability_missing");
}

#[test]
fn ram_that_was_added_is_mirrored_and_moves() {
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    // On real hardware where there is some; the software machine does for the rest.
    let mut drivers = vec!["emulated"];
    if kvm() {
        drivers.push("embedded");
    }
    for kind in drivers {
        let definition = json!({
            "name": kind,
            "driver": {"kind": kind, "vcpus": 1, "workload": {
                "fill": "random", "working_set_bytes": 1 << 20, "dirty_bytes_per_second": 1 << 20}},
            "memory": {"blocks": [{"name": "ram0", "size_bytes": 16 << 20, "gpa": 0}]},
        });
        let _ = a.post("/v1/guests", &definition).expect(201);
        let path = format!("/v1/guests/{kind}/ram-blocks");
        let added =
            a.post(&path, &json!({"name": "ram1", "size_bytes": 4 << 20, "gpa": HIGH})).expect(201).json();
        let aside = a.post(&path, &json!({"name": "ram2", "size_bytes": 2 << 20})).expect(201).json();
        let _ = a.act(&format!("/v1/guests/{kind}/start")).expect(202);
        a.guest_in(kind, "running");
        a.ticks_beyond(kind, 2);
        let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
        let mirror = a.post("/v1/mirrors", &json!({"guest": kind, "strategy": strategy})).expect(201).json();
        let id = mirror["id"].as_str().unwrap();
        let layout = a.read(&format!("/v1/mirrors/{id}/layout"));
        assert!(covers(&layout, &added) && covers(&layout, &aside), "{layout}");
        let nowhere = json!({"ram_addr": 1u64 << 40, "size_bytes": 4096});
        assert!(!covers(&layout, &nowhere), "and it would be seen");
        let mut body = migration(kind, "b", "precopy");
        body["mirror"] = json!({"kind": "existing", "mirror": id});
        body["streams"] = json!(1);
        let migration = a.migrate(&body);
        let end = a.migration_end(&migration);
        assert_eq!(end["state"], "succeeded", "{end}");
        let digests =
            |d: &Daemon| d.get(&format!("/v1/migrations/{migration}/page-digests")).expect(200).body;
        // 16 bytes a page, of all three blocks.
        assert_eq!(digests(a).len(), (22 << 20) / 4096 * 16, "{kind}");
        assert!(digests(a) == digests(b), "{kind}: every page is equal");
        let there = b.items(&path);
        let block = |name: &str| there.iter().find(|b| b["name"] == name).unwrap();
        assert_eq!((&block("ram1")["gpa"], &block("ram2")["gpa"]), (&json!(HIGH), &Value::Null));
        assert_eq!(b.read(&format!("/v1/guests/{kind}"))["memory"]["total_bytes"], 22 << 20);
        let ticks = b.ticks_on(kind);
        assert_eq!(b.ticks_beyond(kind, ticks.number + 20).errors, 0, "{kind}");
        // What is left of it here is a definition that nobody adds to.
        let moved = a.post(&path, &json!({"name": "ram3", "size_bytes": 4096})).expect(409);
        assert_eq!(moved.problem(), "guest_moved");
    }
}
