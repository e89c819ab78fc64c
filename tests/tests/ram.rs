//! RAM over REST: plugging, encryption status, readiness, policies and strategies of encrypted guests. Needs no
//! `/dev/kvm`: the guests are the software machine's.
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm_tests::{Pair, is_terminal, migration};
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
    let all = a.read("/v1/guests/g1/encryption-status");
    let extents = all["items"].as_array().unwrap();
    let sum = |status: &str| -> u64 {
        extents.iter().filter(|e| e["status"] == status).map(|e| e["size_bytes"].as_u64().unwrap()).sum()
    };
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
    let digests =
        |d: &mirrorvm_tests::Daemon| d.get(&format!("/v1/migrations/{id}/page-digests")).expect(200).body;
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
    // An encrypted guest's helper was loaded for the strategies as they are listed, and no host can load it again.
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
