//! Bad input over REST: each case has one exact answer that names what is wrong, and changes nothing.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use mirrorvm::mirror::HelperImage;
use mirrorvm_abi::header::HeaderError;
use mirrorvm_tests::{Daemon, Request, embedded, kvm};
use serde_json::{Value, json};

/// What a case is expected to be answered: status, problem code, and each error as `place code`, in order.
type Wanted<'w> = (u16, &'w str, &'w [&'w str]);

fn check(d: &Daemon, what: &str, request: &Request, wanted: Wanted<'_>) -> Option<String> {
    let reply = d.send(request);
    let code = if reply.status >= 400 { reply.problem() } else { reply.text() };
    let errors: Vec<String> = reply.json()["errors"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|e| {
            let place = ["pointer", "parameter", "header"].iter().find_map(|k| e[k].as_str());
            assert!(!e["detail"].as_str().unwrap().is_empty(), "{what}: {e}");
            format!("{} {}", place.unwrap_or("-"), e["code"].as_str().unwrap())
        })
        .collect();
    let got = (reply.status, code.as_str(), errors.iter().map(String::as_str).collect::<Vec<_>>());
    let same = got.0 == wanted.0 && got.1 == wanted.1 && got.2 == wanted.2;
    (!same).then(|| format!("{what}\n  wanted {wanted:?}\n  got    {got:?}"))
}

/// Runs the cases; fails with all of them that were answered otherwise. What the daemon holds stays as it
/// was.
fn run(d: &Daemon, cases: Vec<(String, Request, Wanted<'_>)>) {
    let everything = || ["/v1/guests", "/v1/mirrors", "/v1/migrations", "/v1/hosts"].map(|p| d.items(p));
    let before = everything();
    let count = cases.len();
    let wrong: Vec<String> =
        cases.iter().filter_map(|(what, request, wanted)| check(d, what, request, *wanted)).collect();
    assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
    println!("{count} cases");
    // Only what the workers count may differ.
    let still = |mut lists: [Vec<Value>; 4]| {
        lists[1].iter_mut().for_each(|m| m["workers"] = Value::Null);
        lists
    };
    assert_eq!(still(everything()), still(before), "something changed");
}

fn post(target: &str, body: &Value) -> Request {
    Request::new("POST", target).json(body)
}

fn raw(target: &str, body: impl Into<Vec<u8>>) -> Request {
    Request::new("POST", target).header("content-type", "application/json").body(body)
}

/// `base` with the value at `pointer` replaced, or removed.
fn with(base: &Value, pointer: &str, value: Option<Value>) -> Value {
    let mut body = base.clone();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let place = body.pointer_mut(parent).unwrap();
    match (place, value) {
        (Value::Object(map), Some(v)) => drop(map.insert(name.into(), v)),
        (Value::Object(map), None) => drop(map.remove(name)),
        (Value::Array(list), Some(v)) => list[name.parse::<usize>().unwrap()] = v,
        _ => panic!("{pointer}"),
    }
    body
}

const INVALID: &str = "validation_failed";

#[test]
fn bodies_that_are_no_json_objects() {
    let d = Daemon::start("a");
    let good = embedded("g", 16, 0).to_string();
    let mut cases = Vec::new();
    for (what, body) in [
        ("nothing", String::new()),
        ("half", good[..good.len() / 2].to_owned()),
        ("NaN", "{\"name\": NaN}".into()),
        ("infinity", "{\"name\": Infinity}".into()),
        ("a comment", format!("{good}//")),
        ("two values", format!("{good}{good}")),
        ("a key twice", "{\"name\": \"a\", \"name\": \"b\"}".into()),
        ("nested too deeply", "[".repeat(5000)),
        ("a lone surrogate", "{\"name\": \"\\ud800\"}".into()),
        ("a huge exponent", "{\"name\": 1e999}".into()),
    ] {
        for target in ["/v1/guests", "/v1/mirrors", "/v1/migrations", "/v1/hosts"] {
            cases.push((
                format!("{what} to {target}"),
                raw(target, body.clone()),
                (400, "malformed_json", &[][..]),
            ));
        }
    }
    cases.push((
        "not UTF-8".into(),
        raw("/v1/guests", b"{\"name\": \"\xff\"}".to_vec()),
        (400, "malformed_json", &[]),
    ));
    for (what, body) in [("an array", "[]"), ("a string", "\"x\""), ("null", "null"), ("a number", "7")] {
        cases.push((what.into(), raw("/v1/guests", body), (422, INVALID, &[" wrong_type"])));
    }
    let large = format!("{{\"name\": \"{}\"}}", "x".repeat(70_000));
    cases.push(("70 kB".into(), raw("/v1/guests", large), (413, "payload_too_large", &[])));
    let typed =
        |kind: &str| Request::new("POST", "/v1/guests").header("content-type", kind).body(good.clone());
    for kind in ["text/plain", "application/xml", "application/json; charset=latin1", ""] {
        cases.push((format!("as {kind:?}"), typed(kind), (415, "unsupported_media_type", &[])));
    }
    let untyped = Request::new("POST", "/v1/guests").body(good.clone());
    cases.push(("without a type".into(), untyped, (415, "unsupported_media_type", &[])));
    let packed = typed("application/json").header("content-encoding", "gzip");
    cases.push(("compressed".into(), packed, (415, "unsupported_media_type", &[])));
    run(&d, cases);
}

#[test]
fn guests_that_cannot_be() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("taken", 16, 0)).expect(201);
    let base = embedded("g", 16, 0);
    let block = |size: Value, gpa: Value| json!([{"name": "ram0", "size_bytes": size, "gpa": gpa}]);
    let two = |first: Value, second: Value| json!([first, second]);
    let one = |name: &str, size: u64, gpa: u64| json!({"name": name, "size_bytes": size, "gpa": gpa});
    let size = "/memory/blocks/0/size_bytes";
    let gpa = "/memory/blocks/0/gpa";
    let many: Vec<Value> =
        (0..1200u64).map(|i| json!({"name": format!("b{i}"), "size_bytes": 4096})).collect();
    // What is put where, and which error it gives.
    let table: Vec<(&str, Option<Value>, Vec<String>)> = vec![
        ("/name", None, vec!["/name missing".into()]),
        ("/name", Some(Value::Null), vec!["/name wrong_type".into()]),
        ("/name", Some(json!(7)), vec!["/name wrong_type".into()]),
        ("/name", Some(json!("")), vec!["/name invalid_name".into()]),
        ("/name", Some(json!("-g")), vec!["/name invalid_name".into()]),
        ("/name", Some(json!("../g")), vec!["/name invalid_name".into()]),
        ("/name", Some(json!("g\u{0}")), vec!["/name invalid_name".into()]),
        ("/name", Some(json!("g\u{456}")), vec!["/name invalid_name".into()]),
        ("/name", Some(json!("x".repeat(65))), vec!["/name invalid_name".into()]),
        ("/name", Some(json!("0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11")), vec!["/name invalid_name".into()]),
        ("/nmae", Some(json!("x")), vec!["/nmae unknown_field".into()]),
        ("/a~b", Some(json!("x")), vec!["/a~0b unknown_field".into()]),
        ("/labels", Some(Value::Null), vec!["/labels wrong_type".into()]),
        ("/labels", Some(json!({"k": 1})), vec!["/labels/k wrong_type".into()]),
        ("/labels", Some(json!({"": "v"})), vec!["/labels out_of_range".into()]),
        ("/labels", Some(json!({"k": "v".repeat(256)})), vec!["/labels out_of_range".into()]),
        ("/driver", None, vec!["/driver missing".into()]),
        ("/driver", Some(json!("embedded")), vec!["/driver wrong_type".into()]),
        ("/driver", Some(json!({})), vec!["/driver/kind missing".into()]),
        ("/driver/kind", Some(json!("xen")), vec!["/driver/kind unknown_value".into()]),
        ("/driver/kind", Some(json!("xen")), vec!["/driver/kind unknown_value".into()]),
        ("/driver/vcpus", Some(json!(0)), vec!["/driver/vcpus out_of_range".into()]),
        ("/driver/vcpus", Some(json!(17)), vec!["/driver/vcpus out_of_range".into()]),
        ("/driver/vcpus", Some(json!(-1)), vec!["/driver/vcpus out_of_range".into()]),
        ("/driver/vcpus", Some(json!(1.5)), vec!["/driver/vcpus wrong_type".into()]),
        ("/driver/vcpus", Some(json!("1")), vec!["/driver/vcpus wrong_type".into()]),
        ("/driver/vcpus", Some(Value::Null), vec!["/driver/vcpus wrong_type".into()]),
        ("/driver/kernel", Some(json!("/x")), vec!["/driver/kernel unknown_field".into()]),
        ("/driver/workload/fill", Some(json!("ones")), vec!["/driver/workload/fill unknown_value".into()]),
        (
            "/driver/workload/working_set_bytes",
            Some(json!(1)),
            vec!["/driver/workload/working_set_bytes out_of_range".into()],
        ),
        (
            "/driver/workload/working_set_bytes",
            Some(json!(12 << 20)),
            vec!["/driver/workload/working_set_bytes out_of_range".into()],
        ),
        (
            "/driver/workload/dirty_bytes_per_second",
            Some(json!(-5)),
            vec!["/driver/workload/dirty_bytes_per_second out_of_range".into()],
        ),
        (
            "/driver/workload/dirty_bytes_per_second",
            Some(json!(1u64 << 41)),
            vec!["/driver/workload/dirty_bytes_per_second out_of_range".into()],
        ),
        ("/memory", None, vec!["/memory missing".into()]),
        ("/memory", Some(json!([])), vec!["/memory wrong_type".into()]),
        ("/memory/blocks", Some(json!({})), vec!["/memory/blocks wrong_type".into()]),
        ("/memory/blocks", Some(block(json!(0), json!(0))), vec![format!("{size} out_of_range")]),
        ("/memory/blocks", Some(block(json!(4095), json!(0))), vec![format!("{size} out_of_range")]),
        ("/memory/blocks", Some(block(json!(-4096), json!(0))), vec![format!("{size} out_of_range")]),
        ("/memory/blocks", Some(block(json!(1u64 << 53), json!(0))), vec![format!("{size} out_of_range")]),
        ("/memory/blocks", Some(block(json!(u64::MAX), json!(0))), vec![format!("{size} out_of_range")]),
        ("/memory/blocks", Some(block(json!("16M"), json!(0))), vec![format!("{size} wrong_type")]),
        ("/memory/blocks", Some(block(json!(16 << 20), json!("0x0"))), vec![format!("{gpa} wrong_type")]),
        ("/memory/blocks", Some(block(json!(16 << 20), json!(-1))), vec![format!("{gpa} out_of_range")]),
        ("/memory/blocks", Some(block(json!(16 << 20), json!(1.25))), vec![format!("{gpa} wrong_type")]),
        ("/memory/blocks", Some(block(json!((16 << 20) + 1), json!(0))), vec![format!("{size} unaligned")]),
        ("/memory/blocks", Some(block(json!(16 << 20), json!(100))), vec![format!("{gpa} unaligned")]),
        ("/memory/blocks", Some(json!([7])), vec!["/memory/blocks/0 wrong_type".into()]),
        ("/memory/blocks/0/name", None, vec!["/memory/blocks/0/name missing".into()]),
        ("/memory/blocks/0/name", Some(json!("a b")), vec!["/memory/blocks/0/name invalid_name".into()]),
        ("/memory/blocks/0/extra", Some(json!(1)), vec!["/memory/blocks/0/extra unknown_field".into()]),
        (
            "/memory/blocks",
            Some(two(one("ram0", 16 << 20, 0), one("ram0", 4096, 1 << 32))),
            vec!["/memory/blocks/1/name duplicate_name".into()],
        ),
        (
            "/memory/blocks",
            Some(two(one("ram0", 16 << 20, 0), one("ram1", 16 << 20, 8 << 20))),
            vec!["/memory/blocks/1/gpa overlap".into()],
        ),
    ];
    let owned: Vec<(String, Request, u16, &str, Vec<String>)> = table
        .into_iter()
        .map(|(at, value, errors)| {
            let what = format!("{at} = {}", value.as_ref().map_or("absent".into(), Value::to_string));
            (what, post("/v1/guests", &with(&base, at, value)), 422, INVALID, errors)
        })
        .chain([
            (
                "the name of another".into(),
                post("/v1/guests", &embedded("taken", 16, 0)),
                409,
                "name_taken",
                vec![],
            ),
            (
                "no blocks".into(),
                post(
                    "/v1/guests",
                    &with(&with(&base, "/memory/blocks", Some(json!([]))), "/driver/workload", None),
                ),
                422,
                INVALID,
                vec!["/memory/blocks out_of_range".into()],
            ),
            (
                "three problems at once".into(),
                post(
                    "/v1/guests",
                    &json!({"nmae": "x", "driver": {"kind": "embedded", "vcpus": 99}, "memory": 1}),
                ),
                422,
                INVALID,
                vec![
                    "/name missing".into(),
                    "/driver/vcpus out_of_range".into(),
                    "/memory wrong_type".into(),
                    "/nmae unknown_field".into(),
                ],
            ),
            (
                "three that are of the right type and cannot be".into(),
                post(
                    "/v1/guests",
                    &json!({"name": "no/name", "driver": {"kind": "embedded", "vcpus": 0}, "memory": {"blocks": []}}),
                ),
                422,
                INVALID,
                vec![
                    "/driver/vcpus out_of_range".into(),
                    "/name invalid_name".into(),
                    "/memory/blocks out_of_range".into(),
                ],
            ),
            (
                "256 TiB, told once".into(),
                post("/v1/guests", &with(&base, "/memory/blocks/0/size_bytes", Some(json!(1u64 << 48)))),
                422,
                INVALID,
                vec!["/memory/blocks/0/size_bytes out_of_range".into()],
            ),
            (
                "a host of which nothing is right".into(),
                post("/v1/hosts", &json!({"name": "no/name", "address": "nowhere", "identity": "sha256:12"})),
                422,
                INVALID,
                vec![
                    "/address invalid_format".into(),
                    "/name invalid_name".into(),
                    "/identity invalid_identity".into(),
                ],
            ),
            (
                "a mirror of which nothing is right".into(),
                post(
                    "/v1/mirrors",
                    &json!({
                        "guest": "g1",
                        "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}},
                        "workers": 99,
                        "placement": {"cpus": [4095, 0, 4094]},
                    }),
                ),
                422,
                INVALID,
                vec![
                    "/workers out_of_range".into(),
                    "/placement/cpus/0 out_of_range".into(),
                    "/placement/cpus/2 out_of_range".into(),
                ],
            ),
            (
                "a migration of which nothing is right".into(),
                post(
                    "/v1/migrations",
                    &json!({
                        "guest": "g1",
                        "destination": {"kind": "host", "host": "b"},
                        "mirror": {
                            "kind": "template",
                            "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}},
                            "placement": {"cpus": [4095]},
                        },
                        "streams": 0,
                        "limits": {"downtime_ms": 1u64 << 40},
                    }),
                ),
                422,
                INVALID,
                vec![
                    "/streams out_of_range".into(),
                    "/limits/downtime_ms out_of_range".into(),
                    "/mirror/placement/cpus/0 out_of_range".into(),
                ],
            ),
            (
                "a kernel that is nowhere".into(),
                post(
                    "/v1/guests",
                    &with(
                        &base,
                        "/driver",
                        Some(json!({"kind": "qemu", "kernel": "/nowhere/k", "initrd": "rel"})),
                    ),
                ),
                422,
                INVALID,
                vec!["/driver/kernel outside_image_directories".into(), "/driver/initrd not_a_file".into()],
            ),
        ])
        .collect();
    let errors: Vec<Vec<&str>> = owned.iter().map(|o| o.4.iter().map(String::as_str).collect()).collect();
    let cases = owned
        .iter()
        .zip(&errors)
        .map(|(o, e)| (o.0.clone(), o.1.clone(), (o.2, o.3, e.as_slice())))
        .collect();
    run(&d, cases);
    // Many, but not too many: planned without delay.
    let begun = std::time::Instant::now();
    let reply = d.post(
        "/v1/guests",
        &with(&with(&base, "/driver/workload", None), "/memory/blocks", Some(json!(many))),
    );
    println!("1200 blocks: {} in {:?}", reply.status, begun.elapsed());
    let made = reply.expect(201).json();
    assert_eq!(made["memory"]["blocks"].as_array().unwrap().len(), 1200);
    assert!(begun.elapsed().as_secs() < 10);
}

/// Whether it is the body's reading that finds something first or not: who mends a request mends all of it.
#[test]
fn all_that_cannot_be_is_told_at_once_also_where_every_field_could_be_read() {
    let d = Daemon::start("a");
    let block = |name: &str, gpa: u64| json!({"name": name, "size_bytes": 16 << 20, "gpa": gpa});
    let guest = json!({
        "name": "no/name",
        "labels": {"": "v"},
        "driver": {"kind": "embedded"},
        "memory": {"blocks": [block("ram0", 0), block("ram1", 8 << 20), block("ram0", 64 << 20), block("ram3", 7)]},
    });
    // What is wrong with a name or with one block's range hides nothing that is wrong with the others.
    let wrong = [
        "/name invalid_name",
        "/labels out_of_range",
        "/memory/blocks/2/name duplicate_name",
        "/memory/blocks/3/gpa unaligned",
        "/memory/blocks/1/gpa overlap",
    ];
    let booted = json!({
        "name": "no/name",
        "driver": {"kind": "qemu", "kernel": "/nowhere/k"},
        "memory": {"blocks": [block("ram0", 0)]},
    });
    let of_booted = ["/name invalid_name", "/driver/kernel outside_image_directories"];
    let host = json!({
        "name": "no/name",
        "labels": {"": "v"},
        "identity": "sha256:12",
        "address": "127.0.0.1:0",
    });
    let of_host = ["/name invalid_name", "/labels out_of_range", "/identity invalid_identity"];
    let [name, labels, identity] = of_host;
    let with_address = [name, labels, identity, "/address out_of_range"];
    let unread = ["/address wrong_type", name, labels, identity];
    let malformed = ["/address invalid_format", name, labels, identity];
    let address = |value: Value| post("/v1/hosts", &with(&host, "/address", Some(value)));
    run(
        &d,
        vec![
            ("a guest".into(), post("/v1/guests", &guest), (422, INVALID, &wrong)),
            ("a guest and its kernel".into(), post("/v1/guests", &booted), (422, INVALID, &of_booted)),
            ("a host".into(), post("/v1/hosts", &host), (422, INVALID, &with_address)),
            ("a host, one field of another type".into(), address(json!(7)), (422, INVALID, &unread)),
            ("a host without an address".into(), address(json!("nowhere")), (422, INVALID, &malformed)),
        ],
    );
}

/// Not when somebody starts it: by then who wrote the definition may be gone.
#[test]
fn ram_that_no_guest_can_start_in_is_refused_when_it_is_defined() {
    let d = Daemon::start("a");
    let mib = |n: u64| n << 20;
    let guest = |name: &str, blocks: Value| {
        let driver = json!({"kind": "emulated", "workload": {"working_set_bytes": 0}});
        json!({"name": name, "driver": driver, "memory": {"blocks": blocks}})
    };
    let first = |bytes: u64| json!([{"name": "ram0", "size_bytes": bytes, "gpa": 0}]);
    let mut needed = Vec::new();
    for path in ["/v1/guests", "/v1/guests?dry_run=true"] {
        let refused = d.post(path, &guest("small", first(4096))).expect(422).json();
        let error = &refused["errors"][0];
        assert_eq!(
            (&error["pointer"], &error["code"]),
            (&json!("/memory/blocks/0/size_bytes"), &json!("layout_unusable")),
            "{refused}"
        );
        let detail = error["detail"].as_str().unwrap();
        let words = detail.split_once("the workload needs ").unwrap().1;
        needed.push(words.split(':').next().unwrap().parse::<u64>().unwrap());
    }
    assert!(d.items("/v1/guests").is_empty());
    // A default that goes by all RAM, and a first block that is a fortieth of it.
    let many: Vec<Value> = (0..40u64)
        .map(|i| json!({"name": format!("b{i}"), "size_bytes": mib(4), "gpa": mib(8) * i}))
        .collect();
    let mut spread = guest("spread", many.into());
    spread["driver"] = json!({"kind": "emulated"});
    assert_eq!(d.post("/v1/guests", &spread).expect(422).problem(), INVALID);
    // The bound is that of a start, to the page.
    let need = needed[0].next_multiple_of(4096);
    assert_eq!(needed, [needed[0]; 2]);
    let _ = d.post("/v1/guests", &guest("less", first(need - 4096))).expect(422);
    let _ = d.post("/v1/guests", &guest("just", first(need))).expect(201);
    // What a block more takes of the first is looked at, too, where it has an address.
    let block = |name: &str, gpa: Value| json!({"name": name, "size_bytes": mib(2), "gpa": gpa});
    let more = d.post("/v1/guests/just/ram-blocks", &block("ram1", json!(mib(64)))).expect(422).json();
    assert_eq!(more["errors"][0]["code"], "layout_unusable", "{more}");
    let _ = d.post("/v1/guests/just/ram-blocks", &block("ram1", Value::Null)).expect(201);
    let _ = d.act("/v1/guests/just/start").expect(202);
    d.guest_in("just", "running");
    // Blocks can be plugged into a definition; until then it does not start, and says so at once.
    let bare = json!([{"name": "ram0", "size_bytes": mib(8)}]);
    let _ = d.post("/v1/guests", &guest("bare", bare)).expect(201);
    for path in ["/v1/guests/bare/start?dry_run=true", "/v1/guests/bare/start"] {
        let refused = d.act(path).expect(409);
        assert_eq!(refused.problem(), "layout_unusable", "{path}: {}", refused.text());
    }
    assert_eq!(d.guest_state("bare"), "stopped");
    let _ = d.post("/v1/guests/bare/ram-blocks", &block("ram1", json!(0))).expect(201);
    let _ = d.act("/v1/guests/bare/start").expect(202);
    d.guest_in("bare", "running");
}

#[test]
fn actions_that_do_not_fit_the_state() {
    if !kvm() {
        return;
    }
    let d = Daemon::start("a");
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    for name in ["stopped", "running", "paused"] {
        let _ = d.post("/v1/guests", &embedded(name, 16, 0)).expect(201);
    }
    for name in ["running", "paused"] {
        let _ = d.act(&format!("/v1/guests/{name}/start")).expect(202);
        d.guest_in(name, "running");
    }
    let _ = d.act("/v1/guests/paused/pause").expect(202);
    let identity = format!("sha256:{}", "ab".repeat(32));
    let _ = d
        .post("/v1/hosts", &json!({"name": "b", "address": "127.0.0.1:1", "identity": identity}))
        .expect(201);
    let mirror = d.post("/v1/mirrors", &json!({"guest": "running", "strategy": strategy})).expect(201).json();
    let conflict: Wanted<'_> = (409, "state_conflict", &[]);
    let act = |target: &str| Request::new("POST", target);
    let del = |target: &str| Request::new("DELETE", target);
    let moving = |guest: &str| json!({"guest": guest, "destination": {"kind": "host", "host": "b"}});
    let cases = vec![
        ("pause a stopped guest".into(), act("/v1/guests/stopped/pause"), conflict),
        ("resume a stopped guest".into(), act("/v1/guests/stopped/resume"), conflict),
        ("start a paused guest".into(), act("/v1/guests/paused/start"), conflict),
        ("delete a running guest".into(), del("/v1/guests/running"), conflict),
        ("delete a paused guest".into(), del("/v1/guests/paused"), conflict),
        (
            "mirror a stopped guest".into(),
            post("/v1/mirrors", &json!({"guest": "stopped", "strategy": strategy})),
            conflict,
        ),
        ("migrate a stopped guest".into(), post("/v1/migrations", &moving("stopped")), conflict),
        (
            "a second mirror".into(),
            post("/v1/mirrors", &json!({"guest": "running", "strategy": strategy})),
            (409, "in_use", &[]),
        ),
        (
            "migrate through another guest's mirror".into(),
            post(
                "/v1/migrations",
                &with(
                    &moving("paused"),
                    "/mirror",
                    Some(json!({"kind": "existing", "mirror": mirror["id"]})),
                ),
            ),
            (404, "not_found", &[]),
        ),
        (
            "a stale If-Match".into(),
            act("/v1/guests/running/pause").header("if-match", "\"1\""),
            (412, "precondition_failed", &[]),
        ),
        (
            "a broken If-Match".into(),
            act("/v1/guests/running/pause").header("if-match", "1"),
            (422, INVALID, &["if-match invalid_format"]),
        ),
    ];
    run(&d, cases);
    // Each conflict says where the resource is and where it would work.
    let said = d.act("/v1/guests/stopped/pause").json();
    assert_eq!((&said["current_state"], &said["allowed_states"]), (&json!("stopped"), &json!(["running"])));
    d.ticks_on("running");
}

#[test]
fn ids_paths_methods_and_parameters() {
    let d = Daemon::start("a");
    for i in 0..3 {
        let _ = d.post("/v1/guests", &embedded(&format!("g{i}"), 16, 0)).expect(201);
    }
    let get = |target: &str| Request::new("GET", target);
    let id = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11";
    let missing: Wanted<'_> = (404, "not_found", &[]);
    let route: Wanted<'_> = (404, "route_not_found", &[]);
    let method: Wanted<'_> = (405, "method_not_allowed", &[]);
    let mut cases: Vec<(String, Request, Wanted<'_>)> = Vec::new();
    let long = "x".repeat(300);
    for key in ["nope", id, "%2e%2e", "..%2fg0", "g0%00", "%d1%96", long.as_str()] {
        for target in [
            format!("/v1/guests/{key}"),
            format!("/v1/guests/{key}/console"),
            format!("/v1/hosts/{key}"),
            format!("/v1/mirrors/{key}"),
            format!("/v1/migrations/{key}"),
            format!("/v1/migrations/{key}/page-digests"),
        ] {
            cases.push((format!("GET {target:.60}"), get(&target), missing));
        }
        cases.push((
            format!("start {key:.20}"),
            Request::new("POST", &format!("/v1/guests/{key}/start")),
            missing,
        ));
        cases.push((
            format!("cancel {key:.20}"),
            Request::new("POST", &format!("/v1/migrations/{key}/cancel")),
            missing,
        ));
        cases.push((
            format!("delete {key:.20}"),
            Request::new("DELETE", &format!("/v1/mirrors/{key}")),
            missing,
        ));
    }
    for target in [
        "/v1",
        "/v2/guests",
        "/v1/guests/",
        "/v1/guest",
        "/v1/guests/g0/",
        "/v1/guests/g0/explode",
        "//v1/guests",
    ] {
        cases.push((target.into(), get(target), route));
    }
    for (name, target) in [
        ("PUT", "/v1/guests"),
        ("PUT", "/v1/guests/g0/start"),
        ("DELETE", "/v1/guests"),
        ("GET", "/v1/guests/g0/start"),
        ("POST", "/v1/version"),
        ("DELETE", "/v1/migrations"),
        ("TRACE", "/v1/guests"),
    ] {
        cases.push((format!("{name} {target}"), Request::new(name, target), method));
    }
    for (query, error) in [
        ("limit=0", "limit out_of_range"),
        ("limit=1001", "limit out_of_range"),
        ("limit=-1", "limit out_of_range"),
        ("limit=x", "limit out_of_range"),
        ("limit=", "limit out_of_range"),
        ("limit=1&limit=2", "limit duplicate"),
        ("page_token=zz", "page_token invalid_page_token"),
        ("page_token=", "page_token invalid_page_token"),
        ("colour=red", "colour unknown_parameter"),
    ] {
        let errors: &'static [&'static str] = Vec::leak(vec![error]);
        cases.push((query.into(), get(&format!("/v1/guests?{query}")), (422, INVALID, errors)));
    }
    for (query, error) in [
        ("wait=1", "wait invalid_format"),
        ("wait=61s", "wait invalid_format"),
        ("wait=-1s", "wait invalid_format"),
        ("wait=1m", "wait invalid_format"),
        ("wait=NaNs", "wait invalid_format"),
        ("limit=1", "limit unknown_parameter"),
    ] {
        let errors: &'static [&'static str] = Vec::leak(vec![error]);
        cases.push((query.into(), get(&format!("/v1/guests/g0?{query}")), (422, INVALID, errors)));
    }
    for (query, error) in [
        ("offset=-1", "offset out_of_range"),
        ("offset=9007199254740992", "offset out_of_range"),
        ("max_bytes=0", "max_bytes out_of_range"),
        ("max_bytes=1048577", "max_bytes out_of_range"),
    ] {
        let errors: &'static [&'static str] = Vec::leak(vec![error]);
        cases.push((query.into(), get(&format!("/v1/guests/g0/console?{query}")), (422, INVALID, errors)));
    }
    cases.push((
        "state=dead".into(),
        get("/v1/migrations?state=dead"),
        (422, INVALID, &["state unknown_value"]),
    ));
    cases.push(("a broken escape".into(), get("/v1/guests?limit=%zz"), (400, "malformed_request", &[])));
    cases.push((
        "XML".into(),
        get("/v1/guests/g0/console").header("accept", "application/xml"),
        (406, "not_acceptable", &[]),
    ));
    run(&d, cases);
    let allowed = d.send(&Request::new("PUT", "/v1/guests"));
    let mut methods: Vec<&str> =
        allowed.header("allow").unwrap().split([',', ' ']).filter(|m| !m.is_empty()).collect();
    methods.sort_unstable();
    assert_eq!(methods, ["GET", "HEAD", "POST"]);
    // A token holds for its own list alone; and pages put together are the list.
    let page = d.read("/v1/guests?limit=2");
    let token = page["next_page_token"].as_str().unwrap();
    assert_eq!(d.items(&format!("/v1/guests?limit=2&page_token={token}"))[0]["name"], "g2");
    let other = d.get(&format!("/v1/migrations?page_token={token}"));
    assert_eq!((other.status, other.problem().as_str()), (422, INVALID));
}

#[test]
fn mirrors_plans_migrations_and_hosts_that_cannot_be() {
    if !kvm() {
        return;
    }
    let d = Daemon::start("a");
    d.run_guest(&embedded("g0", 16, 0));
    let identity = format!("sha256:{}", "ab".repeat(32));
    let host = json!({"name": "b", "address": "127.0.0.1:1", "identity": identity});
    let _ = d.post("/v1/hosts", &host).expect(201);
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let mirror = json!({"guest": "g0", "strategy": strategy});
    let plan = json!({"strategy": strategy});
    let migration = json!({"guest": "g0", "destination": {"kind": "host", "host": "b"}, "limits": {}});
    let explicit = |bytes: Value| json!({"kind": "shifted", "shift": {"kind": "explicit", "bytes": bytes}});
    let mut cases: Vec<(String, Request, Wanted<'_>)> = Vec::new();
    let mut add = |target: &str,
                   base: &Value,
                   at: &str,
                   value: Option<Value>,
                   status: u16,
                   code: &'static str,
                   error: &str| {
        let errors: &'static [&'static str] = if error.is_empty() {
            &[]
        } else {
            Vec::leak(error.split(", ").map(|e| &*e.to_owned().leak()).collect())
        };
        let what = format!("{target}: {at} = {}", value.as_ref().map_or("absent".into(), Value::to_string));
        cases.push((what, post(target, &with(base, at, value)), (status, code, errors)));
    };
    for (target, base) in [("/v1/mirrors", &mirror), ("/v1/guests/g0/address-space-plans", &plan)] {
        add(target, base, "/strategy", None, 422, INVALID, "/strategy missing");
        add(
            target,
            base,
            "/strategy",
            Some(json!({"kind": "magic"})),
            422,
            INVALID,
            "/strategy/kind unknown_value",
        );
        add(
            target,
            base,
            "/strategy",
            Some(json!({"kind": "shifted"})),
            422,
            INVALID,
            "/strategy/shift missing",
        );
        add(
            target,
            base,
            "/strategy",
            Some(explicit(json!(-1))),
            422,
            INVALID,
            "/strategy/shift/bytes out_of_range",
        );
        add(
            target,
            base,
            "/strategy",
            Some(explicit(Value::Null)),
            422,
            INVALID,
            "/strategy/shift/bytes wrong_type",
        );
        add(target, base, "/strategy/extra", Some(json!(1)), 422, INVALID, "/strategy/extra unknown_field");
        add(target, base, "/workers", Some(json!(0)), 422, INVALID, "/workers out_of_range");
        add(target, base, "/workers", Some(json!(17)), 422, INVALID, "/workers out_of_range");
        add(target, base, "/workers", Some(json!("two")), 422, INVALID, "/workers wrong_type");
        add(
            target,
            base,
            "/strategy",
            Some(explicit(json!((4u64 << 30) + 4096))),
            422,
            "plan_refused",
            "/strategy shift_unaligned",
        );
        add(
            target,
            base,
            "/strategy",
            Some(explicit(json!(1 << 30))),
            422,
            "plan_refused",
            "/strategy shift_too_low",
        );
        let sent = json!({"kind": "psp-copied", "via": "send-receive"});
        add(target, base, "/strategy", Some(sent), 422, "plan_refused", "/strategy send_receive_unencrypted");
        let via = json!({"kind": "psp-copied", "via": "post"});
        add(target, base, "/strategy", Some(via), 422, INVALID, "/strategy/via unknown_value");
    }
    add("/v1/mirrors", &mirror, "/guest", Some(json!("nope")), 404, "not_found", "");
    add("/v1/mirrors", &mirror, "/guest", Some(json!(7)), 422, INVALID, "/guest wrong_type");
    let target = "/v1/migrations";
    for (at, value, error) in [
        ("/guest", None, "/guest missing"),
        ("/guest", Some(Value::Null), "/guest wrong_type"),
        ("/destination", None, "/destination missing"),
        (
            "/destination",
            Some(json!({"kind": "ticket", "ticket": "t"})),
            "/destination/ticket invalid_ticket",
        ),
        ("/destination", Some(json!({"kind": "host"})), "/destination/host missing"),
        ("/mode", Some(json!("postcopy")), "/mode unknown_value"),
        ("/streams", Some(json!(0)), "/streams out_of_range"),
        ("/streams", Some(json!(17)), "/streams out_of_range"),
        ("/streams", Some(json!(-1)), "/streams out_of_range"),
        ("/streams", Some(json!(2.5)), "/streams wrong_type"),
        ("/verify", Some(json!("yes")), "/verify wrong_type"),
        ("/limits", Some(Value::Null), "/limits wrong_type"),
        ("/limits/downtime_ms", Some(json!(-1)), "/limits/downtime_ms out_of_range"),
        ("/limits/downtime_ms", Some(json!(3_600_001)), "/limits/downtime_ms out_of_range"),
        ("/limits/timeout_ms", Some(json!(0)), "/limits/timeout_ms out_of_range"),
        ("/limits/stall_timeout_ms", Some(json!(0)), "/limits/stall_timeout_ms out_of_range"),
        ("/limits/stall_timeout_ms", Some(json!(999)), "/limits/stall_timeout_ms out_of_range"),
        (
            "/limits/bandwidth_bytes_per_second",
            Some(json!(0)),
            "/limits/bandwidth_bytes_per_second out_of_range",
        ),
        (
            "/limits/bandwidth_bytes_per_second",
            Some(json!(1000)),
            "/limits/bandwidth_bytes_per_second out_of_range",
        ),
        ("/limits/colour", Some(json!(1)), "/limits/colour unknown_field"),
        ("/on_success", Some(json!({"source": "burn"})), "/on_success/source unknown_value"),
        ("/mirror", Some(json!({"kind": "existing"})), "/mirror/mirror missing"),
        ("/mirror", Some(json!({"kind": "existing", "mirror": "m"})), "/mirror/mirror invalid_format"),
        ("/mirror", Some(json!({"kind": "template"})), "/mirror/strategy missing"),
        ("/policy", Some(json!(0)), "/policy unknown_field"),
    ] {
        add(target, &migration, at, value, 422, INVALID, error);
    }
    add(target, &migration, "/guest", Some(json!("nope")), 404, "not_found", "");
    add(target, &migration, "/destination/host", Some(json!("nope")), 404, "not_found", "");
    let gone = json!({"kind": "existing", "mirror": "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"});
    add(target, &migration, "/mirror", Some(gone), 404, "not_found", "");
    let low = json!({"kind": "template", "strategy": explicit(json!(1 << 30))});
    add(target, &migration, "/mirror", Some(low), 422, "plan_refused", "/strategy shift_too_low");
    let target = "/v1/hosts";
    let host = with(&host, "/name", Some(json!("c")));
    for (at, value, error) in [
        ("/name", Some(json!("a b")), "/name invalid_name"),
        ("/name", None, "/name missing"),
        ("/address", Some(json!("some where:80")), "/address invalid_format"),
        ("/address", Some(json!("127.0.0.1")), "/address invalid_format"),
        ("/address", Some(json!("127.0.0.1:0")), "/address out_of_range"),
        ("/address", Some(json!("127.0.0.1:65536")), "/address invalid_format"),
        ("/identity", Some(json!("sha256:12")), "/identity invalid_identity"),
        ("/identity", Some(json!("md5:abc")), "/identity invalid_identity"),
        ("/identity", Some(json!(1)), "/identity wrong_type"),
        ("/url", Some(json!("x")), "/url unknown_field"),
    ] {
        add(target, &host, at, value, 422, INVALID, error);
    }
    add(target, &host, "/name", Some(json!("b")), 409, "name_taken", "");
    run(&d, cases);
    d.ticks_on("g0");
}

#[test]
fn helper_images_that_are_none_are_refused() {
    let good = HelperImage::built_in().bytes().to_vec();
    assert_eq!(
        HelperImage::parse(good.clone()).unwrap().measurement(),
        HelperImage::built_in().measurement()
    );
    let patched = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        HelperImage::parse(image).unwrap_err()
    };
    assert!(matches!(HelperImage::parse(Vec::new()), Err(HeaderError::Short { len: 0 })));
    assert!(matches!(HelperImage::parse(good[..95].to_vec()), Err(HeaderError::Short { len: 95 })));
    assert!(matches!(HelperImage::parse(vec![0x7f; 8192]), Err(HeaderError::NotAHelper)));
    assert!(matches!(patched(0, &[0]), HeaderError::NotAHelper));
    assert!(matches!(patched(16, &2u32.to_le_bytes()), HeaderError::HeaderVersion { version: 2 }));
    let abi = |min: u32, max: u32| patched(24, &[min.to_le_bytes(), max.to_le_bytes()].concat());
    let (before, after) = (mirrorvm_abi::ABI_VERSION - 1, mirrorvm_abi::ABI_VERSION + 1);
    for (min, max) in [(after, after), (1, before), (0, 0), (0, 1), (2, 1), (u32::MAX, u32::MAX)] {
        let got = abi(min, max);
        assert!(matches!(got, HeaderError::Abi { min: m, max: n } if (m, n) == (min, max)), "{got}");
    }
    assert!(matches!(patched(32, &[0xff; 8]), HeaderError::Layout { hash: u64::MAX }));
    for (field, at) in
        [("base", 40), ("entry", 48), ("text_end", 56), ("rodata_end", 64), ("data_end", 72), ("bss_end", 80)]
    {
        for value in [0, 1, u64::MAX, 1 << 63] {
            let got = patched(at, &u64::to_le_bytes(value));
            assert!(
                matches!(got, HeaderError::Section { field: f, value: v } if f == field && v == value),
                "{field} {value}: {got}"
            );
        }
    }
    // One suite every helper has; what a later build's helper has besides is none of this one's business.
    for suites in [0u64, 1, 1 << 2, u64::MAX - 2] {
        let got = patched(88, &suites.to_le_bytes());
        assert!(matches!(got, HeaderError::Suites { suites: s } if s == suites), "{suites:#x}: {got}");
    }
    let mut later = good.clone();
    later[88..96].copy_from_slice(&(2u64 | 1 << 63).to_le_bytes());
    assert!(HelperImage::parse(later).is_ok());
    let mut longer = good.clone();
    longer.push(0);
    assert!(matches!(HelperImage::parse(longer), Err(HeaderError::FileLength { .. })));
    assert!(matches!(
        HelperImage::parse(good[..good.len() - 4096].to_vec()),
        Err(HeaderError::FileLength { .. })
    ));
    assert!(matches!(HelperImage::parse(vec![0; (16 << 20) + 1]), Err(HeaderError::FileLength { .. })));
}
