//! A driver of a third party over REST: between daemons that have it, and with one that does not.

use std::path::Path;

use mirrorvm_tests::{Daemon, migration, until_some};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A daemon of the program that has the driver.
fn outside(name: &str) -> Daemon {
    Daemon::start_of(Path::new(env!("CARGO_BIN_EXE_mirrorvmd-outside")), name)
}

fn definition(name: &str, driver: &Value) -> Value {
    json!({
        "name": name,
        "driver": driver,
        "memory": {"blocks": [
            {"name": "low", "size_bytes": 8 * MIB, "gpa": 0},
            {"name": "high", "size_bytes": 4 * MIB, "gpa": 1u64 << 32},
        ]},
    })
}

fn guest(name: &str) -> Value {
    definition(name, &json!({"kind": "outside", "greeting": "hello", "pages_per_second": 400}))
}

/// Pages that a guest says it has written.
fn written(daemon: &Daemon, guest: &str) -> Option<u64> {
    let text = daemon.console_tail(guest, 2000);
    text[..text.rfind('\n')?].lines().rev().find_map(|l| l.strip_prefix("written ")?.parse().ok())
}

fn writes_beyond(daemon: &Daemon, guest: &str, pages: u64) -> u64 {
    let what = format!("{guest} at {} writes on", daemon.name);
    until_some(&what, 60, || written(daemon, guest).filter(|n| *n > pages))
}

/// Every page is the same at both ends.
fn assert_same_pages(a: &Daemon, b: &Daemon, migration: &str) {
    let digests = |d: &Daemon| d.get(&format!("/v1/migrations/{migration}/page-digests")).expect(200).body;
    let (there, here) = (digests(a), digests(b));
    assert_eq!(here.len() as u64, 12 * MIB / 4096 * 16);
    assert!(there == here, "a page differs");
}

#[test]
fn a_guest_of_a_third_party_s_driver_is_defined_mirrored_and_moved_there_and_back() {
    let (a, b) = (outside("a"), outside("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);

    let id = a.run_guest(&guest("g"));
    let shown = a.read("/v1/guests/g");
    assert_eq!(
        shown["driver"],
        json!({"kind": "outside", "greeting": "hello", "pages_per_second": 400}),
        "{shown}"
    );
    assert!(a.console_tail("g", 4000).starts_with("hello\n"));
    let mut pages = writes_beyond(&a, "g", 0);

    // A mirror by hand: the helper waits for work in it.
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let mirror = a.post("/v1/mirrors", &json!({"guest": "g", "strategy": strategy, "workers": 1}));
    let mirror = mirror.expect(201).json();
    assert_eq!((&mirror["state"], &mirror["guest"]), (&json!("ready"), &json!(id)), "{mirror}");
    let _ = a.delete(&format!("/v1/mirrors/{}", mirror["id"].as_str().unwrap())).expect(204);

    for (from, to, mode) in [(&a, &b, "precopy"), (&b, &a, "stop_and_copy")] {
        let m = from.migrate(&migration("g", &to.name, mode));
        let end = from.migration_end(&m);
        assert_eq!(end["state"], "succeeded", "{mode}: {end}");
        assert_same_pages(from, to, &m);
        assert_eq!(from.guest_state("g"), "stopped");
        // It goes on from where it was.
        assert!(written(to, "g").unwrap() >= pages);
        pages = writes_beyond(to, "g", pages);
    }
}

#[test]
fn the_document_of_a_daemon_has_its_own_drivers_and_the_stock_one_has_none_of_them() {
    let (ours, stock) = (outside("a"), Daemon::start("b"));
    let kinds = |d: &Daemon| -> Vec<Value> {
        let document = d.read("/v1/openapi.json");
        let kinds =
            document["components"]["schemas"]["Driver"]["discriminator"]["mapping"].as_object().unwrap();
        kinds.keys().map(|kind| json!(kind)).collect()
    };
    assert_eq!(kinds(&stock), ["embedded", "emulated", "qemu"]);
    assert_eq!(kinds(&ours), ["embedded", "emulated", "qemu", "outside", "unfit"]);
    let document = ours.read("/v1/openapi.json");
    let schemas = &document["components"]["schemas"];
    let union = &schemas["Driver"];
    assert_eq!(union["oneOf"][3]["$ref"], "#/components/schemas/DriverOutside");
    assert_eq!(union["discriminator"]["mapping"]["outside"], "#/components/schemas/DriverOutside");
    let entry = &schemas["DriverOutside"];
    assert_eq!(entry["required"], json!(["greeting"]));
    assert_eq!(entry["properties"]["pages_per_second"]["maximum"], 100_000);
    // Answers have its members among all others, without its bounds.
    let told = &schemas["DriverInfo"]["properties"];
    assert_ne!(told["pages_per_second"]["maximum"], 100_000);
    assert!(told["kind"]["x-extensible-enum"].as_array().unwrap().contains(&json!("outside")));
    let able = ours.read("/v1/host/capabilities")["drivers"].clone();
    assert!(able.as_array().unwrap().contains(&json!("outside")), "{able}");
}

#[test]
fn a_definition_with_bad_parameters_is_refused_by_the_driver_with_pointers() {
    let a = outside("a");
    let refused = |driver: Value| -> Vec<(String, String)> {
        let problem = a.post("/v1/guests", &definition("g", &driver)).expect(422).json();
        let errors = problem["errors"].as_array().unwrap().clone();
        let text = |e: &Value, name: &str| e[name].as_str().unwrap_or_default().to_owned();
        errors.iter().map(|e| (text(e, "pointer"), text(e, "code"))).collect()
    };
    let pair = |pointer: &str, code: &str| (pointer.to_owned(), code.to_owned());
    assert_eq!(
        refused(json!({"kind": "outside", "pages_per_second": 0, "vcpus": 1})),
        [
            pair("/driver/pages_per_second", "out_of_range"),
            pair("/driver/greeting", "missing"),
            pair("/driver/vcpus", "unknown_field"),
        ]
    );
    assert_eq!(
        refused(json!({"kind": "outside", "greeting": "grüße"})),
        [pair("/driver/greeting", "not_ascii")]
    );
    assert_eq!(refused(json!({"kind": "inside"})), [pair("/driver/kind", "unknown_value")]);
    assert_eq!(a.guest_state("g"), "absent");
}

#[test]
fn a_peer_without_the_driver_refuses_by_name_and_the_guest_goes_on() {
    let (a, stock) = (outside("a"), Daemon::start("b"));
    a.add_peer(&stock, &stock.peer_address);
    stock.add_peer(&a, &a.peer_address);
    a.run_guest(&guest("g"));
    let pages = writes_beyond(&a, "g", 0);
    let m = a.migrate(&migration("g", "b", "precopy"));
    let end = a.migration_end(&m);
    assert_eq!(
        (&end["state"], &end["error"]["code"]),
        (&json!("failed"), &json!("capability_missing")),
        "{end}"
    );
    let detail = end["error"]["detail"].as_str().unwrap();
    assert!(detail.contains("\"outside\"") && detail.contains("embedded, emulated, qemu"), "{detail}");
    assert_eq!(stock.guest_state("g"), "absent");
    assert_eq!(a.guest_state("g"), "running");
    writes_beyond(&a, "g", pages);
}

#[test]
fn what_a_third_party_s_driver_needs_and_a_host_lacks_has_the_driver_s_code_and_words() {
    let a = outside("a");
    let host = a.read("/v1/host/capabilities");
    assert!(!host["drivers"].as_array().unwrap().contains(&json!("unfit")), "{host}");
    let clock = json!({"code": "cuckoo_clock", "why": "the wall has no room", "fix": "build a larger wall"});
    assert!(host["missing"].as_array().unwrap().contains(&clock), "{host}");

    let _ = a.post("/v1/guests", &definition("g", &json!({"kind": "unfit"}))).expect(201);
    let refused = a.act("/v1/guests/g/start").expect(501).json();
    assert_eq!(refused["code"], "capability_missing");
    assert_eq!(refused["detail"], "this host lacks a clock with a cuckoo: the wall has no room");
    let reason = json!([{"code": "cuckoo_clock", "detail": "the wall has no room"}]);
    assert_eq!(refused["blocked_reasons"], reason);
}

/// A page that the writer comes to as its 2,634th: after a minute, at the rate below.
const LOST: u64 = 12 * MIB / 4096 - 1;

/// A guest whose driver loses its last write to this page.
fn forgetful(name: &str, page: u64) -> Value {
    let driver = json!({"kind": "outside", "greeting": "hello", "pages_per_second": 40, "loses_page": page});
    definition(name, &driver)
}

#[test]
fn a_write_that_a_driver_loses_is_told_by_guest_migration_event_and_metric() {
    let (a, b) = (outside("a"), outside("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    let id = a.run_guest(&forgetful("g", LOST));
    writes_beyond(&a, "g", 0);
    let m = a.migrate(&migration("g", "b", "precopy"));
    assert_eq!(a.migration_end(&m)["state"], "succeeded");
    b.migration_end(&m);
    let over = |v: &Value| v["audit"]["state"] != "pending";
    for daemon in [&a, &b] {
        let guest = daemon.follow("/v1/guests/g", 60, over);
        let audit = &guest["audit"];
        assert_eq!((&audit["state"], &audit["pages"]), (&json!("mismatch"), &json!(1)), "{guest}");
        assert_eq!(audit["first_ram_addrs"], json!([LOST * 4096]), "{guest}");
        assert_eq!(daemon.read(&format!("/v1/migrations/{m}"))["audit"], *audit);
        let condition = &guest["conditions"][0];
        assert_eq!((&condition["type"], &condition["status"]), (&json!("MemoryProven"), &json!("false")));
        assert_eq!(condition["reason"], "audit_mismatch");
        let events = daemon.items("/v1/events?type=guest.audit_mismatch&limit=100");
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!(events[0]["data"]["pages"], 1, "{events:?}");
        assert_eq!(events[0]["data"]["migration"], m.as_str());
        let metrics = daemon.get("/metrics").expect(200).text();
        assert!(metrics.lines().any(|l| l == "mirrorvm_memory_audits{state=\"mismatch\"} 1"), "{metrics}");
    }
    // It changes nothing by itself.
    assert_eq!((b.guest_state("g"), a.guest_state("g")), ("running".to_owned(), "stopped".to_owned()));
    assert_eq!(b.read("/v1/guests/g")["id"], id.as_str());
    writes_beyond(&b, "g", written(&b, "g").unwrap());
}

#[test]
fn before_commit_a_lost_write_keeps_the_guest_at_its_source() {
    let (a, b) = (outside("a"), outside("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    a.run_guest(&forgetful("g", LOST));
    let pages = writes_beyond(&a, "g", 0);
    let mut body = migration("g", "b", "precopy");
    body["audit"] = json!("before_commit");
    let m = a.migrate(&body);
    let end = a.migration_end(&m);
    assert_eq!((&end["state"], &end["error"]["code"]), (&json!("failed"), &json!("audit_mismatch")), "{end}");
    assert_eq!((&end["audit"]["state"], &end["audit"]["pages"]), (&json!("mismatch"), &json!(1)), "{end}");
    let there = b.migration_end(&m);
    assert_eq!(there["error"]["code"], "audit_mismatch", "{there}");
    assert_eq!((b.guest_state("g"), a.guest_state("g")), ("absent".to_owned(), "running".to_owned()));
    writes_beyond(&a, "g", pages);
}
