//! The wall clock is set while daemons run: what was promised for a while is kept for that while, and what is
//! good for a while is good for no longer.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::time::{Duration, Instant};

use mirrorvm_tests::{Daemon, Page, Preload, Request, embedded, migration, until};
use serde_json::{Value, json};

const YEAR: i64 = 365 * 86_400;

/// A daemon whose wall clock the test sets.
fn start(preload: &Preload, name: &str) -> (Daemon, Page) {
    let page = preload.page(name);
    let environment = preload.environment(&page);
    let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
    (Daemon::start_with(name, &environment), page)
}

fn emulated(name: &str) -> Value {
    let mut guest = embedded(name, 8, 0);
    guest["driver"]["kind"] = json!("emulated");
    guest
}

fn status_with(d: &Daemon, secret: &str) -> u16 {
    let request = Request::new("GET", "/v1/guests").header("authorization", &format!("Bearer {secret}"));
    d.send(&request).status
}

fn token(d: &Daemon, seconds: u64) -> String {
    let body = json!({"name": "t", "role": "viewer", "expires_in_seconds": seconds});
    d.post("/v1/tokens", &body).expect(201).json()["secret"].as_str().unwrap().to_owned()
}

#[test]
fn a_clock_that_is_set_ends_no_token_and_forgets_no_key() {
    let Some(preload) = Preload::build() else { return };
    let (mut d, page) = start(&preload, "a");
    let secret = token(&d, 3600);
    let keyed = Request::new("POST", "/v1/guests").json(&emulated("g")).header("idempotency-key", "k");
    let made = d.send(&keyed).expect(201);
    for step in [11 * YEAR, -20 * YEAR, 90] {
        page.set_clock(step);
        for started_again in [false, true] {
            if started_again {
                d.kill();
                d.restart();
            }
            assert_eq!(status_with(&d, &secret), 200, "{step} {started_again}");
            // Other keys come and go: what is in use is not tidied away with what has ended.
            let other = Request::new("POST", "/v1/guests").json(&emulated("g"));
            let other = other.header("idempotency-key", &format!("k{step}{started_again}"));
            assert_eq!(d.send(&other).expect(409).problem(), "name_taken");
            let again = d.send(&keyed).expect(201);
            assert_eq!(again.header("idempotency-replayed"), Some("true"), "{step} {started_again}");
            assert_eq!(again.json(), made.json());
        }
        // Shown as the end is by the clock as it is now.
        let listed = d.items("/v1/tokens");
        let until: jiff::Timestamp = listed[0]["expires_at"].as_str().unwrap().parse().unwrap();
        let now = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(step);
        let left = until.duration_since(now).as_secs();
        assert!((1..=3600).contains(&left), "{left} of {listed:?}");
    }
}

#[test]
fn a_clock_that_goes_back_makes_no_token_good_for_longer() {
    let Some(preload) = Preload::build() else { return };
    let (mut d, page) = start(&preload, "a");
    let (began, brief) = (Instant::now(), token(&d, 2));
    page.set_clock(-20 * YEAR);
    until("the token ends", 60, || status_with(&d, &brief) == 401);
    // Milliseconds count whole.
    assert!(began.elapsed() > Duration::from_millis(1990));
    d.kill();
    page.set_clock(-40 * YEAR);
    d.restart();
    assert_eq!(status_with(&d, &brief), 401, "and stays at its end");
    assert_eq!(d.items("/v1/tokens"), [] as [Value; 0]);
}

#[test]
fn a_ticket_is_good_for_as_long_as_it_says_and_no_longer() {
    let Some(preload) = Preload::build() else { return };
    let a = Daemon::start("a");
    let (b, page) = start(&preload, "b");
    let ticket = |seconds: u64| {
        let body = json!({"source": {"name": "a", "identity": a.identity}, "expires_in_seconds": seconds});
        b.post("/v1/incoming-migrations", &body).expect(201).json()["ticket"].clone()
    };
    let went = |guest: &str, ticket: &Value| {
        let mut body = migration(guest, "b", "precopy");
        body["destination"] = json!({"kind": "ticket", "ticket": ticket});
        let id = a.migrate(&body);
        a.migration_end(&id)["state"].as_str().unwrap().to_owned()
    };
    a.run_guest(&emulated("g1"));
    a.run_guest(&emulated("g2"));
    let (good, brief, began) = (ticket(3600), ticket(1), Instant::now());
    page.set_clock(-20 * YEAR);
    until("its time passes", 60, || began.elapsed() > Duration::from_secs(1));
    assert_eq!(went("g2", &brief), "failed");
    page.set_clock(11 * YEAR);
    assert_eq!(went("g1", &good), "succeeded");
    assert_eq!(b.guest_state("g2"), "absent");
}

#[test]
fn what_has_elapsed_is_the_time_that_passed_whatever_the_clock_is_set_to() {
    let Some(preload) = Preload::build() else { return };
    let ((a, here), (b, there)) = (start(&preload, "a"), start(&preload, "b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    a.run_guest(&emulated("g"));
    let mut body = migration("g", "b", "precopy");
    // Eight seconds at this rate.
    body["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20});
    let (began, id) = (Instant::now(), a.migrate(&body));
    let target = format!("/v1/migrations/{id}");
    let moving = a.follow(&target, 60, |m| m["progress"]["memory"]["normal_pages"].as_u64() > Some(0));
    assert_eq!(moving["state"], "precopy");
    here.set_clock(30 * 86_400);
    there.set_clock(-20 * YEAR);
    let end = a.migration_end(&id);
    let passed = began.elapsed().as_millis() as u64;
    assert_eq!(end["state"], "succeeded", "{end}");
    for d in [&a, &b] {
        let elapsed = d.read(&target)["progress"]["elapsed_ms"].as_u64().unwrap();
        assert!(elapsed > 0 && elapsed <= passed + 1000, "{elapsed} of {passed}");
    }
}
