//! How changes are asked for: once, conditionally, only to look, under an id of one's own; and lists.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm::migration::wire;
use mirrorvm::store::ledger::{EVENTS_KEPT, Space};
use mirrorvm::store::{Batch, Ledger, Store};
use mirrorvm_tests::{Daemon, Pair, Request, embedded, kvm, migration};
use serde_json::{Value, json};

fn post(target: &str, key: &str, body: &Value) -> Request {
    Request::new("POST", target).json(body).header("idempotency-key", key)
}

fn patch(target: &str, body: &Value) -> Request {
    Request::new("PATCH", target)
        .header("content-type", "application/merge-patch+json")
        .body(body.to_string())
}

#[test]
fn a_request_with_a_key_takes_effect_once() {
    let mut d = Daemon::start("a");
    let body = embedded("g1", 8, 0);
    let first = d.send(&post("/v1/guests", "k1", &body)).expect(201);
    assert_eq!(first.header("idempotency-replayed"), None);
    let again = d.send(&post("/v1/guests", "k1", &body)).expect(201);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.body, first.body);
    for header in ["etag", "location", "content-type"] {
        assert_eq!(again.header(header), first.header(header), "{header}");
    }
    let other = d.send(&post("/v1/guests", "k1", &embedded("g2", 8, 0))).expect(422);
    assert_eq!(other.problem(), "idempotency_key_reused");
    let elsewhere = d.send(&post("/v1/guests?dry_run=true", "k1", &body)).expect(422);
    assert_eq!(elsewhere.problem(), "idempotency_key_reused");
    // A final refusal stays the answer; one that may pass does not.
    let taken = d.send(&post("/v1/guests", "k2", &body)).expect(409);
    let _ = d.delete("/v1/guests/g1").expect(204);
    let still = d.send(&post("/v1/guests", "k2", &body)).expect(409);
    assert_eq!((&still.body, still.header("idempotency-replayed").is_some()), (&taken.body, true));
    // Over a restart, also without warning.
    d.kill();
    d.restart();
    let replayed = d.send(&post("/v1/guests", "k1", &body)).expect(201);
    assert_eq!((&replayed.body, replayed.header("idempotency-replayed")), (&first.body, Some("true")));
    assert!(d.items("/v1/guests").is_empty(), "it was an answer, not a guest");
    for bad in ["", " ", &"k".repeat(256)] {
        let refused = d.send(&post("/v1/guests", bad, &body)).expect(422);
        assert_eq!(refused.json()["errors"][0]["header"], "idempotency-key", "{bad}");
    }
}

#[test]
fn patches_that_come_at_once_all_count() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    for round in 0..5 {
        std::thread::scope(|s| {
            for n in 0..8 {
                let d = &d;
                s.spawn(move || {
                    let body = json!({"labels": {format!("k{n}"): format!("{round}")}});
                    let _ = d.send(&patch("/v1/guests/g1", &body)).expect(200);
                });
            }
        });
        let labels = d.read("/v1/guests/g1")["labels"].clone();
        let wanted: serde_json::Map<_, _> =
            (0..8).map(|n| (format!("k{n}"), json!(format!("{round}")))).collect();
        assert_eq!(labels, Value::Object(wanted));
    }
    // A condition of the caller's still holds.
    let stale = d
        .send(&patch("/v1/guests/g1", &json!({"labels": {"x": "y"}})).header("if-match", "\"1\""))
        .expect(412);
    assert_eq!(stale.problem(), "precondition_failed");
}

#[test]
fn of_many_requests_with_a_key_at_once_one_takes_effect() {
    let d = Daemon::start("a");
    let body = embedded("g1", 8, 0);
    let answers: Vec<(u16, Option<String>)> = std::thread::scope(|s| {
        let ask = || {
            let reply = d.send(&post("/v1/guests", "k", &body));
            (reply.status, reply.json()["id"].as_str().map(str::to_owned))
        };
        let threads: Vec<_> = (0..16).map(|_| s.spawn(ask)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|(status, _)| [201, 409].contains(status)), "{answers:?}");
    let ids: std::collections::BTreeSet<_> = answers.iter().filter_map(|(_, id)| id.clone()).collect();
    assert_eq!((ids.len(), d.items("/v1/guests").len()), (1, 1));
}

/// A daemon dies over requests with keys before it has kept the answer: with what was asked for there
/// already, or not yet. No kill from outside meets that moment each time, so the answers are taken out of its
/// database.
#[test]
fn what_a_killed_daemon_did_not_answer_takes_effect_once() {
    let (mut d, other) = (Daemon::start("a"), Daemon::start("b"));
    let guest = |name| ("/v1/guests", name, embedded(name, 8, 0));
    let host = json!({"name": "b", "address": other.peer_address, "identity": other.identity});
    let asked = [guest("there"), guest("not-yet-there"), ("/v1/hosts", "b", host)];
    let ask = |d: &Daemon| -> Vec<Value> {
        let reply = |(target, name, body): &(&str, &str, Value)| {
            let reply = d.send(&post(target, &format!("key of {name}"), body)).expect(201);
            assert_eq!(reply.header("idempotency-replayed"), None, "{name}");
            reply.json()["id"].clone()
        };
        asked.iter().map(reply).collect()
    };
    let made = ask(&d);
    let _ = d.delete("/v1/guests/not-yet-there").expect(204);
    d.kill();
    let store = Store::open(&d.state_dir().join("mirrorvm.db"), |_, _| Ok(None)).unwrap();
    let ledger = Ledger::open(&store, EVENTS_KEPT).unwrap();
    let mut batch = Batch::new();
    let keys = ledger.all(Space::Idempotency).unwrap();
    assert_eq!(keys.len(), asked.len());
    for (key, kept) in keys {
        let mut claim: Value = serde_json::from_str(&kept.body).unwrap();
        assert!(claim["answer"].take().is_object(), "{claim}");
        batch.keyed_put(Space::Idempotency, key, None, claim.to_string()).unwrap();
    }
    ledger.commit_blocking(batch, || {}).unwrap();
    drop((ledger, store));
    d.restart();
    assert_eq!(ask(&d), made, "each has the id that it was begun with");
    assert_eq!((d.items("/v1/guests").len(), d.items("/v1/hosts").len()), (2, 1));
}

/// A daemon killed at any moment under requests with keys: afterwards each key has made one guest, and
/// repeating the requests gives those.
#[test]
fn keys_hold_through_kill_9() {
    let mut d = Daemon::start("a");
    for round in 0..4u64 {
        let names: Vec<String> = (0..12).map(|n| format!("r{round}-{n}")).collect();
        std::thread::scope(|s| {
            for name in &names {
                let (socket, request) = (d.socket(), post("/v1/guests", name, &embedded(name, 8, 0)));
                s.spawn(move || request.try_send(&socket));
            }
            std::thread::sleep(std::time::Duration::from_millis(3 + 7 * round));
            d.kill();
        });
        d.restart();
        for name in &names {
            let reply = d.send(&post("/v1/guests", name, &embedded(name, 8, 0))).expect(201);
            let there = d.read(&format!("/v1/guests/{name}"));
            assert_eq!(reply.json()["id"], there["id"], "{name}");
        }
    }
    assert_eq!(d.items("/v1/guests?limit=1000").len(), 48);
}

#[test]
fn ids_of_ones_own() {
    let d = Daemon::start("a");
    let id = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11";
    let path = format!("/v1/guests/{id}");
    let put = |body: &Value| Request::new("PUT", &path).json(body);
    let body = embedded("g1", 8, 0);
    let made = d.send(&put(&body)).expect(201);
    assert_eq!((made.json()["id"].as_str(), made.header("location")), (Some(id), Some(path.as_str())));
    let again = d.send(&put(&body)).expect(200);
    assert_eq!(again.json(), made.json(), "the same definition finds it");
    assert_eq!(d.send(&put(&embedded("g1", 16, 0))).expect(409).problem(), "id_taken");
    let only_new = d.send(&put(&body).header("if-none-match", "*")).expect(412);
    assert_eq!(
        (only_new.problem().as_str(), only_new.header("etag")),
        ("precondition_failed", Some("\"1\""))
    );
    let _ = d.send(&put(&body).header("if-match", "\"1\"")).expect(200);
    assert_eq!(d.send(&put(&body).header("if-match", "\"7\"")).expect(412).problem(), "precondition_failed");
    let absent = Request::new("PUT", &path.replace("0199", "0200")).json(&body);
    assert_eq!(d.send(&absent.clone().header("if-match", "*")).expect(404).problem(), "not_found");
    assert_eq!(d.send(&absent).expect(409).problem(), "name_taken");
    for bad in ["x", "00000000-0000-0000-0000-000000000000", "g1"] {
        let reply = d.send(&Request::new("PUT", &format!("/v1/guests/{bad}")).json(&body));
        assert_eq!(reply.expect(422).problem(), "validation_failed", "{bad}");
    }
}

#[test]
fn patches_merge_and_conditions_hold_in_the_act() {
    let d = Daemon::start("a");
    let mut body = embedded("g1", 8, 0);
    body["labels"] = json!({"a": "1", "b": "2"});
    let tag = d.post("/v1/guests", &body).expect(201).header("etag").unwrap().to_owned();
    let change = json!({"labels": {"a": null, "c": "3"}});
    let looked = d.send(&patch("/v1/guests/g1?dry_run=true", &change)).expect(200).json();
    assert_eq!((&looked["labels"], looked["preview"].is_object()), (&json!({"b": "2", "c": "3"}), true));
    assert_eq!(d.read("/v1/guests/g1")["labels"], body["labels"], "looking changes nothing");
    let patched = d.send(&patch("/v1/guests/g1", &change).header("if-match", &tag)).expect(200);
    assert_eq!(patched.json()["labels"], json!({"b": "2", "c": "3"}));
    let stale = d.send(&patch("/v1/guests/g1", &change).header("if-match", &tag)).expect(412);
    assert_eq!((stale.problem().as_str(), stale.header("etag")), ("precondition_failed", Some("\"2\"")));
    let delete = Request::new("DELETE", "/v1/guests/g1").header("if-match", &tag);
    assert_eq!(d.send(&delete).expect(412).problem(), "precondition_failed");
    for (body, place) in [
        (json!({"labels": {"x": 1}}), "/labels/x"),
        (json!({"name": "g2"}), "/name"),
        (json!({"labels": []}), "/labels"),
        (json!([]), ""),
    ] {
        let refused = d.send(&patch("/v1/guests/g1", &body)).expect(422).json();
        assert_eq!(refused["errors"][0]["pointer"], place, "{body}");
    }
    let typed = Request::new("PATCH", "/v1/guests/g1").header("content-type", "text/plain").body("{}");
    let refused = d.send(&typed).expect(415);
    assert_eq!(refused.header("accept-patch"), Some("application/merge-patch+json"));

    // One of many that saw the same version changes it.
    let tag = d.get("/v1/guests/g1").header("etag").unwrap().to_owned();
    let won = std::thread::scope(|s| {
        let threads: Vec<_> = (0..12)
            .map(|n| {
                let request = patch("/v1/guests/g1", &json!({"labels": {"n": n.to_string()}}));
                let request = request.header("if-match", &tag);
                let d = &d;
                s.spawn(move || d.send(&request).status)
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).filter(|s| *s == 200).count()
    });
    assert_eq!(won, 1);
}

#[test]
fn the_host_and_its_peers_are_changed_too() {
    let d = Daemon::start("a");
    let host = d.get("/v1/host").expect(200);
    let tag = host.header("etag").unwrap().to_owned();
    let set = patch("/v1/host", &json!({"maintenance": true, "labels": {"site": "x"}, "migration_slots": 2}));
    let set = d.send(&set.header("if-match", &tag)).expect(200).json();
    assert_eq!(
        (&set["maintenance"], &set["labels"]["site"], &set["migration_slots"]),
        (&json!(true), &json!("x"), &json!(2))
    );
    assert_eq!(d.post("/v1/guests", &embedded("g1", 8, 0)).expect(409).problem(), "host_in_maintenance");
    assert_eq!(
        d.send(&patch("/v1/host", &json!({"migration_slots": 17}))).expect(422).problem(),
        "validation_failed"
    );
    let _ = d.send(&patch("/v1/host", &json!({"maintenance": false}))).expect(200);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);

    let identity = format!("sha256:{}", "5a".repeat(32));
    let peer = json!({"name": "b", "address": "127.0.0.1:9", "identity": identity, "labels": {"rack": "r1"}});
    let _ = d.post("/v1/hosts", &peer).expect(201);
    let moved = d.send(&patch("/v1/hosts/b", &json!({"address": "127.0.0.1:10"}))).expect(200).json();
    assert_eq!((&moved["address"], &moved["generation"]), (&json!("127.0.0.1:10"), &json!(2)));
    assert_eq!(d.items("/v1/hosts?label=rack").len(), 1);
    assert_eq!(d.items("/v1/hosts?label=rack=r2").len(), 0);
    let dead = d.get("/v1/hosts/b/capabilities").expect(502);
    assert_eq!(dead.problem(), "peer_failed");
    let looked = d.send(&Request::new("DELETE", "/v1/hosts/b?dry_run=true")).expect(200).json();
    assert_eq!(looked["name"], "b");
    let _ = d.delete("/v1/hosts/b").expect(204);
}

#[test]
fn a_look_says_what_would_be_and_does_nothing() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    let looked = a.post("/v1/guests?dry_run=true", &embedded("g1", 8, 0)).expect(200).json();
    assert_eq!((&looked["state"], looked["preview"]["warnings"].is_array()), (&json!("stopped"), true));
    assert!(a.items("/v1/guests").is_empty());
    assert_eq!(
        a.post("/v1/guests?dry_run=maybe", &embedded("g1", 8, 0)).expect(422).problem(),
        "validation_failed"
    );
    a.run_guest(&embedded("g1", 16, 0));
    let stop = a.act("/v1/guests/g1/stop?dry_run=true").expect(200).json();
    assert_eq!(
        (&stop["state"], &stop["preview"]["warnings"][0]["code"]),
        (&json!("stopped"), &json!("memory_is_lost"))
    );
    assert_eq!(a.act("/v1/guests/g1/resume?dry_run=true").expect(200).json()["state"], "running");
    assert_eq!(
        a.send(&Request::new("DELETE", "/v1/guests/g1?dry_run=true")).expect(409).problem(),
        "state_conflict"
    );
    a.ticks_on("g1");

    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let mirror =
        a.post("/v1/mirrors?dry_run=true", &json!({"guest": "g1", "strategy": strategy})).expect(200).json();
    let plan = a.post("/v1/guests/g1/address-space-plans", &json!({"strategy": strategy})).expect(200).json();
    assert_eq!(mirror["preview"]["address_space_plan"], plan);
    assert!(a.items("/v1/mirrors").is_empty());

    let wanted = migration("g1", "b", "precopy");
    let looked = a.post("/v1/migrations?dry_run=true", &wanted).expect(200).json();
    assert_eq!(looked["state"], "queued");
    assert!(a.items("/v1/migrations").is_empty());
    let check = a.post("/v1/migration-checks", &wanted).expect(200).json();
    assert_eq!((&check["migratable"], &check["blockers"]), (&json!(true), &json!([])), "{check}");
    assert!(check["estimate"]["precopy_ms"].is_u64());
    let answers = a.read("/v1/hosts/b/capabilities");
    assert_eq!(
        (&answers["reachable"], &answers["protocol_versions"]),
        (&json!(true), &json!(wire::PROTOCOL_VERSIONS))
    );
    let there = b.read("/v1/host/capabilities");
    for field in
        ["drivers", "helper_abi", "helper_measurement", "max_phys_bits", "c_bit_position", "slot_budget"]
    {
        assert_eq!(answers[field], there[field], "{field}");
    }
    let names =
        |list: &Value, key: &str| list.as_array().unwrap().iter().map(|m| m[key].clone()).collect::<Vec<_>>();
    assert_eq!(answers["missing"], json!(names(&there["missing"], "code")));
    assert_eq!(answers["strategies"], json!(names(&there["strategies"], "kind")));
    // Everything that stands in the way at once: a guest that is stopped, and a host that nobody knows.
    let _ = a.post("/v1/guests", &embedded("g2", 8, 0)).expect(201);
    let check = a.post("/v1/migration-checks", &migration("g2", "nowhere", "precopy")).expect(200).json();
    assert_eq!(check["migratable"], false);
    assert!(check["blockers"].as_array().unwrap().iter().all(|f| f["fix"].is_string()), "{check}");
    assert!(b.items("/v1/guests").is_empty());

    // A preference to wait for the end.
    let prefer = Request::new("POST", "/v1/migrations").json(&wanted).header("prefer", "wait=60");
    let ended = a.send(&prefer.header("idempotency-key", "m")).expect(201);
    assert_eq!(ended.header("preference-applied"), Some("wait=60"));
    assert_eq!(ended.json()["state"], "succeeded", "{}", ended.text());
    let conditions = ended.json()["conditions"].clone();
    assert_eq!(conditions.as_array().unwrap().len(), 3);
    b.ticks_on("g1");
}

#[test]
fn a_ticket_lets_one_migration_in() {
    if !kvm() {
        return;
    }
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.run_guest(&embedded("g1", 8, 0));
    a.run_guest(&embedded("g2", 8, 0));
    let identity = a.read("/v1/host")["identity"].clone();
    let leave = json!({"source": {"name": "a", "identity": identity}, "expires_in_seconds": 300});
    let given = b.send(&post("/v1/incoming-migrations", "t", &leave)).expect(201).json();
    let ticket = given["ticket"].as_str().unwrap();
    let replayed = b.send(&post("/v1/incoming-migrations", "t", &leave)).expect(201).json();
    assert_eq!(
        (&replayed["migration"], &replayed["ticket"]),
        (&given["migration"], &Value::Null),
        "a secret is told once"
    );
    let wanted = |guest: &str| {
        let mut body = migration(guest, "b", "precopy");
        body["destination"] = json!({"kind": "ticket", "ticket": ticket});
        body
    };
    let m = a.post("/v1/migrations", &wanted("g1")).expect(201).json();
    assert_eq!(m["id"], given["migration"]);
    let end = a.migration_end(m["id"].as_str().unwrap());
    assert_eq!(end["state"], "succeeded", "{end}");
    b.ticks_on("g1");
    // Once is enough.
    assert_eq!(a.post("/v1/migrations", &wanted("g2")).expect(409).problem(), "id_taken");
    let _ = a.delete(&format!("/v1/migrations/{}", m["id"].as_str().unwrap())).expect(204);
    let again = a.post("/v1/migrations", &wanted("g2")).expect(201).json();
    let end = a.migration_end(again["id"].as_str().unwrap());
    assert_eq!(end["state"], "failed", "{end}");
    a.ticks_on("g2");
    assert_eq!(b.get("/v1/guests/g2").expect(404).problem(), "not_found");
    let mut bad = wanted("g2");
    bad["destination"]["ticket"] = json!("mvmt1.00");
    assert_eq!(
        a.post("/v1/migrations", &bad).expect(422).json()["errors"][0]["pointer"],
        "/destination/ticket"
    );
    // Another host cannot use it: it is bound to its key.
    let c = Daemon::start("c");
    c.run_guest(&embedded("g3", 8, 0));
    let given = b.post("/v1/incoming-migrations", &leave).expect(201).json();
    let mut stolen = migration("g3", "b", "precopy");
    stolen["destination"] = json!({"kind": "ticket", "ticket": given["ticket"]});
    let m = c.post("/v1/migrations", &stolen).expect(201).json();
    assert_eq!(c.migration_end(m["id"].as_str().unwrap())["state"], "failed");
    c.ticks_on("g3");
}

#[test]
fn lists_are_sorted_filtered_and_continued() {
    let d = Daemon::start("a");
    for (n, name) in ["d", "b", "e", "a", "c"].iter().enumerate() {
        let mut body = embedded(name, 8, 0);
        body["labels"] = json!({"half": if n % 2 == 0 { "even" } else { "odd" }, "n": n.to_string()});
        let _ = d.post("/v1/guests", &body).expect(201);
    }
    let names = |query: &str| -> Vec<String> {
        d.items(&format!("/v1/guests?{query}"))
            .iter()
            .map(|g| g["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(""), ["d", "b", "e", "a", "c"]);
    assert_eq!(names("sort_by=-created_at"), ["c", "a", "e", "b", "d"]);
    assert_eq!(names("sort_by=name"), ["a", "b", "c", "d", "e"]);
    assert_eq!(names("sort_by=-name&label=half=even"), ["e", "d", "c"]);
    assert_eq!(names("label=half=even&label=n=2"), ["e"]);
    assert_eq!(names("label=nothing"), [""; 0]);
    assert_eq!(names("state=running&state=paused"), [""; 0]);
    assert_eq!(names("state=stopped").len(), 5);
    // Along the links.
    let (mut next, mut seen) = (Some("/v1/guests?sort_by=-name&label=half&limit=2".to_owned()), Vec::new());
    while let Some(target) = next {
        let reply = d.get(&target).expect(200);
        seen.extend(reply.json()["items"].as_array().unwrap().iter().map(|g| g["name"].clone()));
        let link = reply.header("link").map(str::to_owned);
        assert_eq!(link.is_some(), reply.json()["next_page_token"].is_string());
        next = link.map(|l| l.trim_start_matches('<').split_once('>').unwrap().0.to_owned());
    }
    assert_eq!(seen, ["e", "d", "c", "b", "a"]);
    let token = d.read("/v1/guests?limit=2")["next_page_token"].as_str().unwrap().to_owned();
    for wrong in ["sort_by=name&", "label=half&", "state=stopped&"] {
        let reply = d.get(&format!("/v1/guests?{wrong}page_token={token}")).expect(422);
        assert_eq!(reply.json()["errors"][0]["code"], "invalid_page_token", "{wrong}");
    }
    let mut forged = token.clone();
    forged.replace_range(10..12, if &token[10..12] == "00" { "11" } else { "00" });
    assert_eq!(
        d.get(&format!("/v1/guests?page_token={forged}")).expect(422).json()["errors"][0]["code"],
        "invalid_page_token"
    );
    assert_eq!(d.get("/v1/mirrors?sort_by=name").expect(422).problem(), "validation_failed");
}

#[test]
fn helper_images_are_checked_before_they_are_kept() {
    let d = Daemon::start("a");
    let built_in = d.read("/v1/helper-images/built-in");
    assert_eq!(built_in["content"]["measurement"], d.read("/v1/host/capabilities")["helper_measurement"]);
    assert_eq!(d.delete("/v1/helper-images/built-in").expect(409).problem(), "in_use");
    let made = d.post("/v1/helper-images", &json!({"name": "h2"})).expect(201).json();
    assert_eq!((&made["state"], &made["content"]), (&json!("empty"), &Value::Null));
    let put = |bytes: Vec<u8>| {
        Request::new("PUT", "/v1/helper-images/h2/content")
            .header("content-type", "application/octet-stream")
            .body(bytes)
    };
    for bad in [Vec::new(), b"no image".to_vec(), vec![0; 1 << 20]] {
        assert_eq!(d.send(&put(bad)).expect(422).problem(), "helper_image_invalid");
    }
    assert_eq!(d.read("/v1/helper-images/h2")["state"], "empty");
    let good = mirrorvm::mirror::HelperImage::built_in().bytes().to_vec();
    let mut broken = good.clone();
    broken.truncate(good.len() - 1);
    assert_eq!(d.send(&put(broken)).expect(422).problem(), "helper_image_invalid");
    let filled = d.send(&put(good.clone())).expect(200).json();
    assert_eq!((&filled["state"], &filled["content"]), (&json!("ready"), &built_in["content"]));
    assert_eq!(d.send(&put(good)).expect(200).json(), filled, "the same again changes nothing");
    assert_eq!(d.send(&put(vec![0; (16 << 20) + 1])).expect(413).problem(), "payload_too_large");
    let typed =
        Request::new("PUT", "/v1/helper-images/h2/content").header("content-type", "text/plain").body("x");
    assert_eq!(d.send(&typed).expect(415).problem(), "unsupported_media_type");
    let _ = d.delete("/v1/helper-images/h2").expect(204);
    assert_eq!(d.items("/v1/helper-images").len(), 1);
    assert!(
        std::fs::read_dir(d.state_dir().join("helper-images")).unwrap().next().is_none(),
        "its file is gone"
    );
}
