//! Defaults that fit: what is defined with defaults moves with defaults, and where a choice does not fit a
//! guest, the look says so before and the migration is refused for the same reason.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm_tests::{Daemon, embedded, kvm};
use serde_json::{Value, json};

fn emulated(name: &str, sev: &Value) -> Value {
    let mut driver = json!({"kind": "emulated"});
    if !sev.is_null() {
        driver["sev"] = sev.clone();
    }
    json!({"name": name, "driver": driver, "memory": {"blocks": [{"name": "ram0", "size_bytes": 8 << 20, "gpa": 0}]}})
}

fn strategies(d: &Daemon) -> Vec<Value> {
    let kinds = d.items("/v1/strategies");
    assert!(kinds.len() >= 4, "{kinds:?}");
    vec![
        json!({"kind": "shifted", "shift": {"kind": "4gib"}}),
        json!({"kind": "shifted", "shift": {"kind": "max-phys"}}),
        json!({"kind": "identity-cbit"}),
        json!({"kind": "declared"}),
        json!({"kind": "psp-copied", "via": "launch-update"}),
        json!({"kind": "psp-copied", "via": "send-receive"}),
    ]
}

fn codes(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|f| f["code"].as_str().unwrap().to_owned()).collect()
}

/// Moves the guest to the other host, or finds out before and in the attempt that it cannot be; whether it
/// moved.
fn agrees(from: &Daemon, to: &Daemon, mut wanted: Value) -> bool {
    wanted["destination"] = json!({"kind": "host", "host": to.name});
    let check = from.post("/v1/migration-checks", &wanted).expect(200).json();
    let dry = from.post("/v1/migrations?dry_run=true", &wanted);
    if check["migratable"] == true {
        let _ = dry.expect(200);
        let end = from.migration_end(&from.migrate(&wanted));
        assert_eq!(end["state"], "succeeded", "{wanted}: the look said yes: {end}");
        return true;
    }
    let why = codes(&check["blockers"]);
    assert!(
        !why.is_empty() && check["blockers"].as_array().unwrap().iter().all(|b| b["fix"].is_string()),
        "{check}"
    );
    assert!((400..600).contains(&dry.status), "{wanted}: {}", dry.text());
    let real = from.post("/v1/migrations", &wanted);
    if real.status == 201 {
        let end = from.migration_end(real.json()["id"].as_str().unwrap());
        assert!(why.contains(&end["error"]["code"].as_str().unwrap().to_owned()), "{why:?}: {end}");
    } else {
        assert!((400..600).contains(&real.status), "{}", real.text());
    }
    false
}

#[test]
fn what_is_defined_with_defaults_moves_with_defaults_and_every_other_choice_is_answered_before() {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    let levels = [("none", Value::Null), ("sev", json!({})), ("es", json!({"es": true}))];
    for (name, sev) in &levels {
        a.run_guest(&emulated(name, sev));
        a.follow(&format!("/v1/guests/{name}"), 60, |g| g["migration_readiness"]["ready"] == true);
        let mut at_a = true;
        let mut moves = 0;
        let mut choices = vec![Value::Null];
        choices.extend(strategies(&a));
        for strategy in choices {
            // The mode plays no part in which mirror there is; once is enough.
            let modes: &[&str] =
                if strategy.is_null() { &["precopy", "stop_and_copy"] } else { &["precopy"] };
            for mode in modes {
                let mut wanted = json!({"guest": name, "mode": mode});
                if !strategy.is_null() {
                    wanted["mirror"] = json!({"kind": "template", "strategy": strategy});
                }
                let (from, to) = if at_a { (&a, &b) } else { (&b, &a) };
                let moved = agrees(from, to, wanted);
                assert!(moved || !strategy.is_null(), "{name}, {mode}: the defaults fit");
                at_a ^= moved;
                moves += u32::from(moved);
                let here = if at_a { &a } else { &b };
                here.guest_in(name, "running");
            }
        }
        println!("{name}: {moves} of 8 moved");
        // The defaults in both modes, and the strategy that is the default's by name.
        let least = if *name == "es" { 3 } else { 4 };
        assert!(moves >= least, "{name}: {moves}");
    }
}

#[test]
fn an_embedded_guest_with_defaults_moves_with_defaults() {
    if !kvm() {
        return;
    }
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    let mut body = embedded("g1", 8, 0);
    body["driver"] = json!({"kind": "embedded"});
    a.run_guest(&body);
    assert!(agrees(&a, &b, json!({"guest": "g1"})));
    assert!(agrees(&b, &a, json!({"guest": "g1", "mode": "stop_and_copy"})));
}
