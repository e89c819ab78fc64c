//! Evidence of a destination over REST, between two daemons: who demands what, what was verified, and what a
//! refusal looks like.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm_tests::{Daemon, emulated, migration, two_daemons};
use serde_json::{Value, json};

const GUEST: &str = "g1";

/// An encrypted guest of the software machine, so that every machine runs this.
fn encrypted(attestation: &Value) -> Value {
    emulated(GUEST, 32, 1 << 20, &json!({"attestation": attestation}))
}

fn end(from: &Daemon, to: &Daemon) -> Value {
    let id = from.migrate(&migration(GUEST, &to.name, "precopy"));
    let end = from.migration_end(&id);
    to.migration_end(&id);
    end
}

#[test]
fn what_the_helper_has_verified_is_told_and_is_the_destinations() {
    let (a, b) = two_daemons();
    a.run_guest(&encrypted(&Value::Null));
    a.ticks_beyond(GUEST, 2);
    let shown = a.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!(shown["protection"]["evidence"], "demanded", "{shown}");
    let asked = json!({"demanded": true, "platforms": null, "launches": null});
    assert_eq!(shown["driver"]["sev"]["attestation"], asked, "every default is shown");
    let end = end(&a, &b);
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(end["evidence"]["state"], "verified", "{end}");
    let host = b.read("/v1/host");
    assert_eq!(host["platform_key"]["fingerprint"], end["evidence"]["platform_key"], "{host}");
    // A machine with SEV shows the real chip's, which no modelled guest's owner demands.
    if host["platform_key"]["modelled"] == true {
        assert_eq!(host["platform_key"]["key"].as_str().unwrap().len(), 192);
    }
    let there = b.read(&format!("/v1/migrations/{}", end["id"].as_str().unwrap()));
    assert_eq!(there["evidence"], Value::Null);
    assert_eq!(b.read(&format!("/v1/guests/{GUEST}"))["driver"]["sev"]["attestation"], asked);
    b.ticks_on(GUEST);
}

#[test]
fn a_destination_that_is_something_else_is_refused_and_the_guest_goes_on() {
    let (a, b) = two_daemons();
    let other = json!({"launches": ["17".repeat(32)]});
    a.run_guest(&encrypted(&other));
    a.ticks_beyond(GUEST, 2);
    let end = end(&a, &b);
    assert_eq!(end["state"], "failed", "{end}");
    assert_eq!(end["error"]["code"], "evidence_refused", "{end}");
    assert!(end["error"]["detail"].as_str().unwrap().contains("launched as something else"), "{end}");
    assert_eq!(
        (&end["evidence"], &end["progress"]["helper"]["pages_encrypted"]),
        (&Value::Null, &json!(0)),
        "{end}"
    );
    a.ticks_on(GUEST);
    let _ = b.get(&format!("/v1/guests/{GUEST}")).expect(404);
}

#[test]
fn a_demand_that_makes_no_sense_is_refused_with_its_field() {
    let a = Daemon::start("a");
    let hex = |digits: usize| "5".repeat(digits);
    for (attestation, pointer) in [
        (json!({"demanded": false, "launches": [hex(64)]}), "/driver/sev/attestation/demanded"),
        (json!({"launches": []}), "/driver/sev/attestation/launches"),
        (json!({"launches": [hex(63)]}), "/driver/sev/attestation/launches/0"),
        (json!({"platforms": vec![hex(192); 5]}), "/driver/sev/attestation/platforms"),
        (json!({"platforms": ["X".repeat(192)]}), "/driver/sev/attestation/platforms/0"),
        (json!({"platform": [hex(192)]}), "/driver/sev/attestation/platform"),
    ] {
        let problem = a.post("/v1/guests", &encrypted(&attestation)).expect(422).json();
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    // A real platform's key is known to nobody here.
    let mut body = encrypted(&json!({}));
    body["driver"]["kind"] = json!("embedded");
    let problem = a.post("/v1/guests", &body).expect(422).json();
    assert_eq!(problem["errors"][0]["pointer"], "/driver/sev/attestation/platforms", "{problem}");
}
