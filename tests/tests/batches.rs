//! Mirrors beyond migrations, over REST: sealed batches between two mirrors of a guest, uploaded helper
//! images, where their threads run.
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mirrorvm_abi::mailbox::BATCH_MAX;
use mirrorvm_abi::record::{HEADER_BYTES, TAG_BYTES, front_bytes, group_bytes};
use mirrorvm_tests::{Daemon, Pair, Request, embedded, is_terminal, kvm, migration};
use serde_json::{Value, json};

const SHIFTED: &str = r#"{"kind": "shifted", "shift": {"kind": "4gib"}}"#;
const PRIVATE: &str = r#"{"kind": "psp-copied", "via": "launch-update"}"#;

fn mirror(d: &Daemon, guest: &str, strategy: &str) -> String {
    let strategy: Value = serde_json::from_str(strategy).unwrap();
    let made = d.post("/v1/mirrors", &json!({"guest": guest, "strategy": strategy})).expect(201).json();
    format!("/v1/mirrors/{}", made["id"].as_str().unwrap())
}

fn open(d: &Daemon, importer: &str) -> Value {
    let opened = d.post(&format!("{importer}/imports"), &json!({"kind": "open"})).expect(200).json();
    assert_eq!(opened["state"], "open", "{opened}");
    opened
}

fn export(d: &Daemon, exporter: &str, import: &Value, ranges: &Value, last: bool) -> Value {
    let body = json!({"import": import["import"], "nonce": import["nonce"], "ranges": ranges, "last": last});
    d.post(&format!("{exporter}/exports"), &body).expect(200).json()
}

fn give(d: &Daemon, importer: &str, batch: &Value) -> mirrorvm_tests::Reply {
    d.post(&format!("{importer}/imports"), &json!({"kind": "batch", "batch": batch}))
}

fn ranges(at: u64, pages: u64) -> Value {
    json!([{"ram_addr": at, "size_bytes": pages * 4096}])
}

fn hold(d: &Daemon, paused: bool) {
    let (act, state) = if paused { ("pause", "paused") } else { ("resume", "running") };
    let _ = d.act(&format!("/v1/guests/g1/{act}")).expect(202);
    d.guest_in("g1", state);
}

/// All of the guest's private RAM, in batches.
fn private_ranges(d: &Daemon) -> Vec<(u64, u64)> {
    let all = d.read("/v1/guests/g1/encryption-status?limit=1000");
    let mut pieces = Vec::new();
    for e in all["items"].as_array().unwrap().iter().filter(|e| e["status"] == "private") {
        let (mut at, mut left) = (e["ram_addr"].as_u64().unwrap(), e["size_bytes"].as_u64().unwrap());
        while left > 0 {
            let len = left.min(1 << 20);
            pieces.push((at, len));
            (at, left) = (at + len, left - len);
        }
    }
    pieces
}

/// Moves the paused guest and gives a digest of each of its pages, by a path that does not go through any
/// helper.
fn move_on(from: &Daemon, to: &Daemon, name: &str) -> Vec<[u8; 16]> {
    let id = from.migrate(&migration("g1", name, "stop_and_copy"));
    let end = from.migration_end(&id);
    assert_eq!(end["state"], "succeeded", "{end}");
    assert!(
        end["progress"]["helper"]["per_worker"]
            .as_array()
            .unwrap()
            .iter()
            .all(|w| w["cpu_ns"].as_u64() > Some(0))
    );
    let _ = to.follow(&format!("/v1/migrations/{id}"), 60, |m| is_terminal(&m["state"]));
    let body = from.get(&format!("/v1/migrations/{id}/page-digests")).expect(200).body;
    body.as_chunks().0.to_vec()
}

#[test]
fn pages_leave_sealed_and_come_back_after_they_changed() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let d = &pair.b;
    let _ = pair.a.run_guest(&embedded("g1", 16, 4 << 20));
    let _ = pair.a.act("/v1/guests/g1/pause").expect(202);
    pair.a.guest_in("g1", "paused");
    let before = move_on(&pair.a, d, "b");
    assert_eq!(before.len(), (16 << 20) / 4096);
    d.guest_in("g1", "paused");
    let tick = d.ticks("g1").unwrap().number;

    let importer = mirror(d, "g1", SHIFTED);
    let exporter = mirror(d, "g1", PRIVATE);
    let import = open(d, &importer);
    assert_eq!(d.read(&importer)["state"], "busy");
    let pieces = private_ranges(d);
    let seal = |i: usize, (at, len): &(u64, u64)| {
        export(d, &exporter, &import, &ranges(*at, len / 4096), i + 1 == pieces.len())
    };
    let batches: Vec<Value> = pieces.iter().enumerate().map(|(i, p)| seal(i, p)).collect();
    for (i, batch) in batches.iter().enumerate() {
        assert_eq!((&batch["epoch"], &batch["guest_state"]), (&json!(i + 1), &json!("paused")));
    }
    assert_eq!(d.read(&exporter)["state"], "ready", "its session ended with the last batch");

    // The guest goes on, and its memory with it. Meanwhile nothing comes in.
    hold(d, false);
    let _ = d.ticks_beyond("g1", tick + 3);
    let early = give(d, &importer, &batches[0]);
    assert_eq!((early.status, early.problem()), (409, "state_conflict".into()), "{}", early.text());
    hold(d, true);

    for (i, batch) in batches.iter().enumerate() {
        let report = give(d, &importer, batch).expect(200).json();
        let (at, len) = pieces[i];
        assert_eq!(report["pages"], json!([{"ram_addr": at, "size_bytes": len, "status": "written"}]));
        assert_eq!(report["state"], if i + 1 == batches.len() { "closed" } else { "receiving" });
    }
    let fresh = d.read(&importer);
    assert_eq!(fresh["state"], "ready", "with a fresh helper: {fresh}");
    let _ = give(d, &importer, &batches[0]).expect(404);
    let _ = d.delete(&exporter).expect(204);
    let _ = d.delete(&importer).expect(204);

    let after = move_on(d, &pair.a, "a");
    let sealed = |page: usize| pieces.iter().any(|(at, len)| (*at..at + len).contains(&(page as u64 * 4096)));
    let differ: Vec<usize> = (0..before.len()).filter(|p| before[*p] != after[*p]).collect();
    assert!(differ.iter().all(|p| !sealed(*p)), "every sealed page is as it was: {differ:?}");
    assert!(!differ.is_empty(), "shared pages, which no batch has, have gone on");
}

#[test]
fn batches_that_were_touched_are_refused() {
    if !kvm() {
        return;
    }
    let d = Daemon::start("a");
    let _ = d.run_guest(&embedded("g1", 16, 0));
    hold(&d, true);
    let importer = mirror(&d, "g1", SHIFTED);
    let exporter = mirror(&d, "g1", PRIVATE);
    const ALL: u64 = BATCH_MAX as u64 + 1;
    let (at, _) = *private_ranges(&d).iter().rfind(|(_, len)| *len >= ALL * 4096).unwrap();
    // Two batches of a group each.
    let first_two = |import: &Value| {
        (
            export(&d, &exporter, import, &ranges(at, 3), false),
            export(&d, &exporter, import, &ranges(at, 2), true),
        )
    };
    let refused = |batch: &Value, code: &str, index: u64| {
        let reply = give(&d, &importer, batch);
        assert_eq!((reply.status, reply.problem()), (422, "batch_refused".into()), "{}", reply.text());
        let error = reply.json()["errors"][0].clone();
        assert_eq!((&error["code"], error["index"].as_u64()), (&json!(code), Some(index)), "{error}");
        // The import is over, the mirror has a fresh helper.
        assert_eq!(d.read(&importer)["state"], "ready");
        let _ = give(&d, &importer, batch).expect(404);
    };
    let records = |batch: &Value| STANDARD.decode(batch["records"].as_str().unwrap()).unwrap();
    let with = |batch: &Value, bytes: &[u8], pages: u64| {
        let mut batch = batch.clone();
        (batch["records"], batch["pages"]) = (json!(STANDARD.encode(bytes)), json!(pages));
        batch
    };
    const PIECE: usize = 4096 + TAG_BYTES;
    let piece = |n: usize| front_bytes(3) + n * PIECE;

    // Changed: a bit of the second page's content, its number, its tag. Of the group's place in its stream
    // and its random bytes, without which no page of it opens.
    let second = [piece(1) + 40, front_bytes(1), piece(2) - 1].map(|byte| (byte, 1));
    for (byte, index) in second.into_iter().chain([(16, 0), (HEADER_BYTES - 1, 0)]) {
        let (one, _) = first_two(&open(&d, &importer));
        let mut bytes = records(&one);
        bytes[byte] ^= 1;
        refused(&with(&one, &bytes, 3), "unsealed", index);
    }
    // The last page taken out of its group, and the group made to say so; two pages swapped.
    let (one, _) = first_two(&open(&d, &importer));
    let bytes = records(&one);
    let mut shorter = [&bytes[..front_bytes(2)], &bytes[piece(0)..piece(2)]].concat();
    shorter[6] = 2;
    refused(&with(&one, &shorter, 2), "unsealed", 0);
    let (one, _) = first_two(&open(&d, &importer));
    let bytes = records(&one);
    let swapped = [
        &bytes[..front_bytes(0)],
        &bytes[front_bytes(1)..front_bytes(2)],
        &bytes[front_bytes(0)..front_bytes(1)],
        &bytes[front_bytes(2)..front_bytes(3)],
        &bytes[piece(1)..piece(2)],
        &bytes[piece(0)..piece(1)],
        &bytes[piece(2)..],
    ];
    refused(&with(&one, &swapped.concat(), 3), "unsealed", 0);
    // Of a batch of two groups: the second taken out, the first doubled, both swapped.
    let two_groups = || export(&d, &exporter, &open(&d, &importer), &ranges(at, ALL), true);
    let first = group_bytes(BATCH_MAX);
    let one = two_groups();
    refused(&with(&one, &records(&one)[..first], ALL - 1), "incomplete", ALL - 1);
    let one = two_groups();
    let bytes = records(&one);
    refused(&with(&one, &[&bytes[..first], &bytes[..first]].concat(), 2 * (ALL - 1)), "unsealed", ALL - 1);
    let one = two_groups();
    let bytes = records(&one);
    refused(&with(&one, &[&bytes[first..], &bytes[..first]].concat(), ALL), "unsealed", 0);
    // The second before the first; the first twice.
    let (_, two) = first_two(&open(&d, &importer));
    refused(&two, "unsealed", 0);
    let (one, _) = first_two(&open(&d, &importer));
    let report = give(&d, &importer, &one).expect(200).json();
    assert_eq!(report["state"], "receiving");
    refused(&one, "unsealed", 0);
    // Sealed for another import, whatever it says of itself; another's token.
    let (old, _) = first_two(&open(&d, &importer));
    let _ = d
        .post(&format!("{importer}/imports"), &json!({"kind": "close", "import": old["import"]}))
        .expect(200);
    let import = open(&d, &importer);
    let mut theirs = old.clone();
    theirs["import"] = import["import"].clone();
    refused(&theirs, "unsealed", 0);
    let (one, _) = first_two(&open(&d, &importer));
    let mut forged = one.clone();
    forged["token"] = old["token"].clone();
    refused(&forged, "unsealed", 3);
    // An exporter's key that anybody can agree with, or another one.
    let (mut one, _) = first_two(&open(&d, &importer));
    let (nonce, key) = one["nonce"].as_str().unwrap().split_at(64);
    let (low, other) = (format!("{nonce}{}", "0".repeat(64)), format!("{nonce}{nonce}"));
    assert_eq!(key.len(), 64);
    one["nonce"] = json!(low);
    let reply = give(&d, &importer, &one).expect(422);
    let error = reply.json()["errors"][0].clone();
    assert_eq!((&error["pointer"], &error["code"]), (&json!("/batch/nonce"), &json!("not_a_key")), "{error}");
    assert_eq!(d.read(&importer)["state"], "ready", "the import is over");
    let _ = give(&d, &importer, &one).expect(404);
    let (mut one, _) = first_two(&open(&d, &importer));
    one["nonce"] = json!(other);
    refused(&one, "unsealed", 0);
    // And as they are they are taken.
    let (one, two) = first_two(&open(&d, &importer));
    let _ = give(&d, &importer, &one).expect(200);
    assert_eq!(give(&d, &importer, &two).expect(200).json()["state"], "closed");

    let mut broken = one.clone();
    let import = open(&d, &importer);
    broken["import"] = import["import"].clone();
    for (records, what) in [("AAAA", "not_records"), ("not base64", "invalid_format")] {
        broken["records"] = json!(records);
        let reply = give(&d, &importer, &broken).expect(422);
        assert!(reply.text().contains(what), "{}", reply.text());
    }
    // None of which ended the import.
    assert_eq!(d.read(&importer)["state"], "busy");
    let none = |ranges: Value, what: &str| {
        let body = json!({"import": import["import"], "nonce": import["nonce"], "ranges": ranges});
        let reply = d.post(&format!("{exporter}/exports"), &body).expect(422);
        assert!(reply.text().contains(what), "{what}: {}", reply.text());
    };
    none(ranges(1 << 40, 1), "not_reachable");
    // A nonce with a key that anybody can agree with, and one of an earlier build, which has no key.
    let nonce = import["nonce"].as_str().unwrap().to_owned();
    assert_eq!(nonce.len(), 128, "{nonce}");
    for (bad, what) in
        [(format!("{}{}", &nonce[..64], "0".repeat(64)), "not_a_key"), (nonce[..64].to_owned(), "/nonce")]
    {
        let body = json!({"import": import["import"], "nonce": bad, "ranges": ranges(at, 1)});
        let reply = d.post(&format!("{exporter}/exports"), &body).expect(422);
        assert!(reply.text().contains(what), "{what}: {}", reply.text());
        assert_eq!(reply.json()["errors"][0]["pointer"], "/nonce", "{}", reply.text());
    }
    // That refusal left the exporting mirror as it was.
    assert_eq!(d.read(&exporter)["state"], "ready");
    none(ranges(at + 1, 1), "unaligned");
    none(ranges(at, 257), "out_of_range");
    none(
        json!([{"ram_addr": at, "size_bytes": 8192}, {"ram_addr": at + 4096, "size_bytes": 4096}]),
        "overlap",
    );
    none(ranges(helper_block(&d), 1), "not_reachable");
    let shared = d.read("/v1/guests/g1/encryption-status?limit=1000");
    let shared = shared["items"].as_array().unwrap().iter().find(|e| e["status"] == "shared").unwrap();
    none(ranges(shared["ram_addr"].as_u64().unwrap(), 1), "shared");
    // Busy helpers have no time for a migration, or for each other.
    let id = importer.rsplit('/').next().unwrap();
    let _ = d.post(&format!("{importer}/imports"), &json!({"kind": "open"})).expect(409);
    let _ = d
        .post(
            "/v1/hosts",
            &json!({"name": "b", "address": "127.0.0.1:9",
        "identity": format!("sha256:{}", "5a".repeat(32))}),
        )
        .expect(201);
    let mut body = migration("g1", "b", "stop_and_copy");
    body["mirror"] = json!({"kind": "existing", "mirror": id});
    assert_eq!(d.post("/v1/migrations", &body).expect(409).problem(), "in_use");
    // A look changes nothing.
    let body = json!({"import": import["import"], "nonce": import["nonce"], "ranges": ranges(at, 1)});
    let looked = d.post(&format!("{exporter}/exports?dry_run=true"), &body).expect(200).json();
    assert_eq!((&looked["records"], &looked["pages"]), (&json!(""), &json!(1)));
}

fn helper_block(d: &Daemon) -> u64 {
    let blocks = d.read("/v1/guests/g1/ram-blocks");
    let helper =
        blocks["items"].as_array().unwrap().iter().find(|b| b["name"] == "mirrorvm.helper").unwrap().clone();
    helper["ram_addr"].as_u64().unwrap()
}

#[test]
fn threads_run_where_the_mirror_says() {
    if !kvm() {
        return;
    }
    let d = Daemon::start("a");
    let _ = d.run_guest(&embedded("g1", 16, 0));
    let strategy: Value = serde_json::from_str(SHIFTED).unwrap();
    let placement = json!({"cpus": [0], "scheduler": {"kind": "batch", "nice": 5}});
    let body = json!({"guest": "g1", "strategy": strategy, "workers": 2, "placement": placement});
    let made = d.post("/v1/mirrors", &body).expect(201).json();
    assert_eq!(made["placement"], placement, "{made}");
    let path = format!("/v1/mirrors/{}", made["id"].as_str().unwrap());
    // The class is field 41 of stat(5), nice 19; names are ours.
    let seen = |worker: &Value| {
        let task = format!("/proc/{}/task/{}", d.pid(), worker["tid"]);
        let stat = std::fs::read_to_string(format!("{task}/stat")).unwrap();
        let (head, tail) = stat.rsplit_once(") ").unwrap();
        let fields: Vec<&str> = tail.split(' ').collect();
        let status = std::fs::read_to_string(format!("{task}/status")).unwrap();
        let cpus =
            status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned();
        assert!(head.contains("(mir"), "{head}");
        (fields[41 - 3].to_owned(), fields[19 - 3].to_owned(), cpus)
    };
    for worker in made["workers"].as_array().unwrap() {
        assert_eq!(seen(worker), ("3".into(), "5".into(), "0".into()));
    }
    let patch = |body: Value| d.send(&Request::new("PATCH", &path).json(&body));
    let idle = patch(json!({"placement": {"cpus": [], "scheduler": {"kind": "idle"}}})).expect(200).json();
    for worker in idle["workers"].as_array().unwrap() {
        assert_eq!(seen(worker).0, "5");
    }
    let fifo = patch(json!({"placement": {"cpus": [], "scheduler": {"kind": "fifo", "priority": 1}}}));
    match fifo.status {
        200 => assert_eq!(seen(&fifo.json()["workers"][0]).0, "1"),
        // Without CAP_SYS_NICE the kernel says no, and the mirror stays as it was.
        _ => {
            assert_eq!((fifo.status, fifo.problem()), (501, "capability_missing".into()), "{}", fifo.text());
            assert_eq!(d.read(&path)["placement"]["scheduler"]["kind"], "idle");
        }
    }
    for (bad, at) in [
        (json!({"cpus": [4096]}), "/placement/cpus/0"),
        (json!({"cpus": [], "scheduler": {"kind": "fifo", "priority": 0}}), "/placement/scheduler/priority"),
        (json!({"cpus": [], "scheduler": {"kind": "other", "nice": 20}}), "/placement/scheduler/nice"),
    ] {
        let reply = patch(json!({"placement": bad})).expect(422);
        assert_eq!(reply.json()["errors"][0]["pointer"], at, "{}", reply.text());
    }
}

#[test]
fn mirrors_run_the_image_that_was_uploaded() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    // Another image: the built-in one with another text in a message that nobody reads.
    let mut bytes = mirrorvm::mirror::HelperImage::built_in().bytes().to_vec();
    let at = bytes.windows(8).rposition(|w| w.iter().all(|b| b.is_ascii_lowercase())).expect("a text");
    bytes[at] = bytes[at].wrapping_sub(32);
    // A helper that has the default suite alone: by its header, which is all that a host looks at.
    bytes[88..96].copy_from_slice(&2u64.to_le_bytes());
    let upload = |d: &Daemon, name: &str| {
        let _ = d.post("/v1/helper-images", &json!({"name": name})).expect(201);
        let content = Request::new("PUT", &format!("/v1/helper-images/{name}/content"));
        let done = d.send(&content.header("content-type", "application/octet-stream").body(bytes.clone()));
        let done = done.expect(200).json();
        done["content"]["measurement"].as_str().unwrap().to_owned()
    };
    let _ = a.post("/v1/helper-images", &json!({"name": "empty"})).expect(201);
    let measurement = upload(a, "other");
    assert_ne!(a.read("/v1/host/capabilities")["helper_measurement"], measurement.as_str());

    let _ = a.run_guest(&embedded("g1", 16, 0));
    let strategy: Value = serde_json::from_str(SHIFTED).unwrap();
    let body = |image: &str| json!({"guest": "g1", "strategy": strategy, "helper_image": image});
    let _ = a.post("/v1/mirrors", &body("nothing")).expect(404);
    let empty = a.post("/v1/mirrors", &body("empty")).expect(422).json();
    assert_eq!(empty["errors"][0]["code"], "no_content", "{empty}");
    let made = a.post("/v1/mirrors", &body("other")).expect(201).json();
    assert_eq!(made["helper_measurement"], measurement.as_str(), "{made}");
    // While it is in use it stays.
    assert_eq!(a.delete("/v1/helper-images/other").expect(409).problem(), "in_use");
    let _ = a.delete(&format!("/v1/mirrors/{}", made["id"].as_str().unwrap())).expect(204);

    // A declaration of as many tuples as there may be fits its body.
    let tuples: Vec<Value> = (0..4096_u64)
        .map(|i| json!({"guest_gpa": i << 40, "size_bytes": 1_u64 << 40, "mirror_gpa": i << 40}))
        .collect();
    let plan = json!({"strategy": {"kind": "declared"}, "declaration": tuples});
    assert!(plan.to_string().len() > 64 << 10);
    assert_eq!(a.post("/v1/guests/g1/address-space-plans", &plan).problem(), "plan_refused");

    // Migrations with it: refused where the destination has not got it, and done where it has, under any
    // name.
    let mut with = migration("g1", "b", "precopy");
    with["mirror"] = json!({"kind": "template", "strategy": strategy, "helper_image": "other"});
    let refused = a.migration_end(&a.migrate(&with));
    assert_eq!(refused["error"]["code"], "helper_mismatch", "{refused}");
    a.guest_in("g1", "running");
    assert_eq!(upload(b, "renamed"), measurement);
    let end = a.migration_end(&a.migrate(&with));
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(end["request"]["mirror"]["helper_image"], "other");
    assert_eq!(end["suite"], "aes-256-gcm", "{end}");
    // By a suite that the image does not have: neither done nor begun.
    let mut with = migration("g1", "a", "precopy");
    with["mirror"] = json!({"kind": "template", "strategy": strategy, "helper_image": "renamed"});
    with["suite"] = json!("aes-256-gcm-siv");
    let refused = b.post("/v1/migrations", &with);
    assert_eq!(refused.problem(), "capability_missing", "{}", refused.text());
    with["suite"] = json!("aes-512");
    let refused = b.post("/v1/migrations", &with).expect(422).json();
    assert_eq!(refused["errors"][0]["pointer"], "/suite", "{refused}");
    // Migrations are found by their guest's labels.
    let labels = Request::new("PATCH", "/v1/guests/g1").json(&json!({"labels": {"rack": "r1"}}));
    let _ = a.send(&labels).expect(200);
    assert_eq!(a.items("/v1/migrations?label=rack=r1").len(), 2);
    assert_eq!(a.items("/v1/migrations?label=rack=r2").len(), 0);
    let _ = b.ticks_on("g1");

    // An encrypted guest has the helper that it was launched with; the software machine has its own.
    let emulated = |name: &str, sev: Value| {
        json!({"name": name, "driver": {"kind": "emulated", "vcpus": 1, "sev": sev},
            "memory": {"blocks": [{"name": "ram0", "size_bytes": 16 << 20, "gpa": 0}]}})
    };
    for (name, sev, code) in [
        ("e1", json!({"policy": 1, "es": false}), "helper_not_launched"),
        ("e2", Value::Null, "capability_missing"),
    ] {
        let _ = a.post("/v1/guests", &emulated(name, sev)).expect(201);
        let _ = a.act(&format!("/v1/guests/{name}/start")).expect(202);
        a.guest_in(name, "running");
        let refused =
            a.post("/v1/mirrors", &json!({"guest": name, "strategy": strategy, "helper_image": "other"}));
        assert_eq!(refused.problem(), code, "{}", refused.text());
    }
}
