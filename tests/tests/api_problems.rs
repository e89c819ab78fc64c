//! Every code of the catalogue, and how to get it. What cannot be reached from outside on a sound host is
//! named, with the test that reaches it.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mirrorvm_tests::{Daemon, Pair, Request, embedded, is_terminal, kvm, migration, until};
use serde_json::{Value, json};

/// Codes that take a broken host, a moment or a limit, and what shows them.
const ELSEWHERE: &[(&str, &str)] = &[
    ("internal", "problem::host_error::tests: a fault of the host says nothing; http::middleware for panics"),
    ("no_memory", "memory: a_guest_on_huge_pages_that_are_not_there_is_refused_by_name_and_the_others_live"),
    ("no_resources", "api_events: there_are_only_so_many_streams"),
    ("storage_full", "storage: a_full_disk_refuses_changes_by_name_and_loses_nothing_that_was_acknowledged"),
    ("storage_busy", "storage: somebody_who_keeps_the_database_locked_is_named_and_nobody_waits_for_him"),
    ("storage_failed", "storage: a_disk_that_fails_is_named_and_nothing_is_lost_when_it_works_again"),
    ("not_ready", "without_a_host: everything about resources before the host is open"),
    ("shutting_down", "problem::host_error::tests; state::AppState::ready"),
    ("timed_out", "http::middleware: 120 s for one answer"),
    ("request_timeout", "api_access: slow_and_greedy_clients_hurt_themselves_alone"),
    ("origin_refused", "without_a_host: a_name_that_is_not_this_machine_is_refused_over_tcp"),
    ("headers_too_large", "crowds: a_head_has_64_kib_and_not_a_byte_more"),
    ("uri_too_long", "crowds: a_head_has_64_kib_and_not_a_byte_more"),
    ("too_many_connections", "crowds: a_full_listener_still_says_that_the_daemon_lives"),
    (
        "too_many_long_polls",
        "crowds: long_polls_have_a_share_of_their_own_and_those_of_one_principal_half_of_it",
    ),
    ("session_header_required", "api_sessions: a_change_by_session_needs_our_header_and_is_its_openers"),
    (
        "link_refused",
        "api_sessions: a_link_opens_one_session_with_a_cookie_that_scripts_and_other_sites_do_not_get",
    ),
    (
        "no_network_listener",
        "api_sessions: links_are_for_who_waits_for_them_few_at_a_time_and_where_there_is_something_to_open",
    ),
    ("too_many_requests", "api_access: a_principal_that_asks_too_often_waits"),
    ("precondition_required", "api_access: a_daemon_may_insist_on_conditions"),
    ("idempotency_key_in_use", "api_changes: of_many_requests_with_a_key_at_once_one_takes_effect"),
    ("past_point_of_no_return", "faults: cancelling after START"),
    ("guest_unconfirmed", "state_files: after_a_restore_a_guest_starts_when_every_known_peer_was_asked"),
    ("layout_unusable", "bad_input: ram_that_no_guest_can_start_in_is_refused_when_it_is_defined"),
    ("policy_forbids", "ram: policies_and_levels_are_obeyed_over_rest"),
    ("mirror_at_launch", "ram: what_a_launch_decided_stays_decided"),
    ("helper_not_launched", "ram: what_a_launch_decided_stays_decided"),
    ("guest_not_ready", "ram: what_a_launch_decided_stays_decided"),
    ("helper_image_failed", "state_files: helper_images_are_whole_named_or_brought_back"),
    ("batch_refused", "batches: batches_that_were_touched_are_refused"),
    ("plug_refused", "ram: an_encrypted_guest_s_ram_is_plugged_reported_and_moved"),
];

struct Walk<'d> {
    d: &'d Daemon,
    seen: BTreeMap<String, String>,
}

impl Walk<'_> {
    /// Sends a request that must be refused with this code, in the catalogue's words.
    fn reach(&mut self, code: &str, request: &Request) {
        let reply = self.d.send(request);
        assert_eq!(reply.problem(), code, "{request:?}: {}", reply.text());
        let kind = self.d.read(&format!("/v1/problems/{code}"));
        let body = reply.json();
        assert_eq!((&body["title"], &body["retryable"]), (&kind["title"], &kind["retryable"]));
        assert_eq!(kind["status"], reply.status);
        assert!(reply.status != 500 && body["blocked_reasons"].is_array() && body["errors"].is_array());
        self.seen.insert(code.to_owned(), format!("{request:?}"));
    }
}

fn get(target: &str) -> Request {
    Request::new("GET", target)
}

fn post(target: &str, body: &Value) -> Request {
    Request::new("POST", target).json(body)
}

#[test]
fn every_code_can_be_reached() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let d = &pair.a;
    let mut walk = Walk { d, seen: BTreeMap::new() };
    let guest = embedded("g1", 16, 0);

    walk.reach("malformed_json", &post("/v1/guests", &json!(0)).body("{"));
    walk.reach("malformed_request", &get("/v1/guests/%ff"));
    walk.reach("route_not_found", &get("/v2"));
    walk.reach("method_not_allowed", &Request::new("DELETE", "/v1/guests"));
    walk.reach("not_found", &get("/v1/guests/nothing"));
    walk.reach("unauthenticated", &get("/v1/guests").header("authorization", "Bearer x"));
    let viewer = d.post("/v1/tokens", &json!({"name": "v", "role": "viewer"})).expect(201).json();
    let bearer = format!("Bearer {}", viewer["secret"].as_str().unwrap());
    walk.reach("forbidden", &get("/v1/tokens").header("authorization", &bearer));
    walk.reach("unsupported_media_type", &Request::new("POST", "/v1/guests").body("x"));
    walk.reach("payload_too_large", &post("/v1/guests", &json!("x".repeat(70_000))));
    walk.reach("validation_failed", &post("/v1/guests", &json!({})));
    let image =
        Request::new("PUT", "/v1/helper-images/h/content").header("content-type", "application/octet-stream");
    let _ = d.post("/v1/helper-images", &json!({"name": "h"})).expect(201);
    walk.reach("helper_image_invalid", &image.body("x"));
    walk.reach("event_cursor_expired", &get("/v1/events?after=0000000000000000-1"));

    let _ = d.post("/v1/guests", &guest).expect(201);
    walk.reach("name_taken", &post("/v1/guests", &guest));
    walk.reach("precondition_failed", &Request::new("DELETE", "/v1/guests/g1").header("if-match", "\"9\""));
    let id = d.read("/v1/guests/g1")["id"].as_str().unwrap().to_owned();
    walk.reach("id_taken", &Request::new("PUT", &format!("/v1/guests/{id}")).json(&embedded("g9", 8, 0)));
    walk.reach("state_conflict", &Request::new("POST", "/v1/guests/g1/pause"));
    let keyed = |body: &Value| post("/v1/guests?dry_run=true", body).header("idempotency-key", "k");
    let _ = d.send(&keyed(&embedded("g2", 8, 0))).expect(200);
    walk.reach("idempotency_key_reused", &keyed(&embedded("g3", 8, 0)));
    let maintenance = |on: bool| Request::new("PATCH", "/v1/host").json(&json!({"maintenance": on}));
    let _ = d.send(&maintenance(true)).expect(200);
    walk.reach("host_in_maintenance", &post("/v1/guests", &embedded("g2", 8, 0)));
    let _ = d.send(&maintenance(false)).expect(200);
    let low = json!({"strategy": {"kind": "shifted", "shift": {"kind": "explicit", "bytes": 4096}}});
    walk.reach("plan_refused", &post("/v1/guests/g1/address-space-plans", &low));

    let _ = d.act("/v1/guests/g1/start").expect(202);
    d.guest_in("g1", "running");
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let mirror = d.post("/v1/mirrors", &json!({"guest": "g1", "strategy": strategy})).expect(201).json();
    let path = format!("/v1/mirrors/{}", mirror["id"].as_str().unwrap());
    walk.reach("in_use", &post("/v1/mirrors", &json!({"guest": "g1", "strategy": strategy})));
    walk.reach("not_acceptable", &get(&format!("{path}/layout")).header("accept", "text/html"));
    let _ = d.delete(&path).expect(204);

    // A peer that is nobody, one that accepts and says nothing, one that is somebody else, and a name that
    // nobody has.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (at_silent, at_else) = (silent.local_addr().unwrap(), other.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut stream = other.accept().unwrap().0;
        let _ = std::io::Write::write_all(&mut stream, b"SSH-2.0-OpenSSH_9.2\r\n");
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    for (byte, name, address) in [
        ("5a", "dead", "127.0.0.1:9".to_owned()),
        ("5b", "silent", at_silent.to_string()),
        ("5c", "else", at_else.to_string()),
        ("5d", "nobody", "nobody.invalid:7801".to_owned()),
    ] {
        let identity = format!("sha256:{}", byte.repeat(32));
        let _ =
            d.post("/v1/hosts", &json!({"name": name, "address": address, "identity": identity})).expect(201);
    }
    walk.reach("peer_failed", &get("/v1/hosts/dead/capabilities"));
    walk.reach("peer_timed_out", &get("/v1/hosts/silent/capabilities"));
    walk.reach("peer_not_mirrorvm", &get("/v1/hosts/else/capabilities"));
    walk.reach("peer_unresolved", &get("/v1/hosts/nobody/capabilities"));

    // A host that does not find QEMU.
    let lonely = Daemon::start_as("c", &[("PATH", "/nowhere")], |_| Vec::new());
    let mut other = Walk { d: &lonely, seen: BTreeMap::new() };
    let kernel = mirrorvm_tests::repository().join("tests/guest/build-linux-guest");
    let mut machine = embedded("q", 16, 0);
    machine["driver"] = json!({"kind": "qemu", "kernel": kernel});
    let _ = lonely.post("/v1/guests", &machine).expect(201);
    other.reach("capability_missing", &Request::new("POST", "/v1/guests/q/start"));
    walk.seen.extend(other.seen);

    let look = post("/v1/migrations?dry_run=true", &migration("g1", "b", "precopy"));
    let _ = pair.b.send(&maintenance(true)).expect(200);
    walk.reach("destination_refuses", &look);
    let _ = pair.b.send(&maintenance(false)).expect(200);

    let mut slow = migration("g1", "b", "precopy");
    slow["limits"] = json!({"bandwidth_bytes_per_second": 4 << 20});
    let m = d.migrate(&slow);
    until("it has the guest", 20, || d.read("/v1/guests/g1")["migration"].is_string());
    walk.reach("guest_migrating", &Request::new("POST", "/v1/guests/g1/pause"));
    let _ = d.act(&format!("/v1/migrations/{m}/cancel")).expect(202);
    d.follow(&format!("/v1/migrations/{m}"), 60, |m| is_terminal(&m["state"]));
    until("nothing of it is left there", 20, || pair.b.guest_state("g1") == "absent");
    let m = d.migrate(&migration("g1", "b", "precopy"));
    assert_eq!(d.migration_end(&m)["state"], "succeeded");
    walk.reach("guest_moved", &Request::new("POST", "/v1/guests/g1/start"));

    // What stands in resources alone answers no request; the tests of migrations and guests meet those.
    let answers = d.items("/v1/problems").into_iter().filter(|p| p["status"] != 200);
    let catalogue: Vec<String> = answers.map(|p| p["code"].as_str().unwrap().to_owned()).collect();
    let elsewhere = |code: &str| ELSEWHERE.iter().any(|(c, _)| *c == code);
    let missing: Vec<&String> =
        catalogue.iter().filter(|c| !walk.seen.contains_key(*c) && !elsewhere(c)).collect();
    assert!(missing.is_empty(), "nothing shows how to reach {missing:?}");
    for (code, how) in ELSEWHERE {
        assert!(catalogue.iter().any(|c| c == code), "{code} is no code; {how}");
    }
}

/// What no route answers is a problem, too.
#[test]
fn heads_that_are_no_http_close_the_connection() {
    let d = Daemon::start("a");
    for head in
        ["\0\0\0\0", "GET / HTTP/9.9\r\n\r\n", "POST /v1/guests HTTP/1.1\r\ncontent-length: -1\r\n\r\n"]
    {
        let mut socket = UnixStream::connect(d.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.write_all(head.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{head:?}: {answer:?}");
    }
    let _ = d.get("/livez").expect(200);
}
