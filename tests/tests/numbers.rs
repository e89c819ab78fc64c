//! One reader for each input: numbers by their digits, bounds as the document has them, queries and paths
//! however they are written.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::BTreeSet;

use mirrorvm_tests::{Daemon, Request, embedded, repository};
use serde_json::{Value, json};

/// The document as it is committed.
fn document() -> Value {
    serde_json::from_slice(&std::fs::read(repository().join("openapi/v1.json")).unwrap()).unwrap()
}

/// Bodies that have every number of a request between them: method, target, body.
fn bodies() -> Vec<(&'static str, &'static str, &'static str, Value)> {
    let mut plain = embedded("n1", 64, 0);
    plain["driver"] = json!({"kind": "embedded", "vcpus": 1, "workload": {"working_set_bytes": 4096,
        "dirty_bytes_per_second": 4096, "withdraws_readiness_after_ms": 1000}});
    let mut sealed = embedded("n2", 64, 0);
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let apart = json!({"kind": "shifted", "shift": {"kind": "explicit", "bytes": 1u64 << 32}});
    sealed["driver"] = json!({"kind": "emulated", "vcpus": 1,
        "sev": {"policy": 0, "es": false, "mirror": {"strategy": apart, "workers": 1}}});
    let limits = json!({"bandwidth_bytes_per_second": 2_000_000, "downtime_ms": 10, "timeout_ms": 60_000,
        "stall_timeout_ms": 5_000, "audit_timeout_ms": 60_000});
    let fifo = json!({"cpus": [0], "scheduler": {"kind": "fifo", "priority": 1}});
    let nice = json!({"cpus": [0], "scheduler": {"kind": "other", "nice": 0}});
    let mirror = |placement: &Value| json!({"guest": "g1", "strategy": strategy, "workers": 1, "placement": placement});
    let host = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11";
    vec![
        ("POST", "/v1/guests", "GuestCreate", plain),
        ("POST", "/v1/guests", "GuestCreate", sealed),
        ("POST", "/v1/mirrors", "MirrorCreate", mirror(&fifo)),
        ("POST", "/v1/mirrors", "MirrorCreate", mirror(&nice)),
        (
            "POST",
            "/v1/migrations",
            "MigrationCreate",
            json!({"guest": "g1", "destination": {"kind": "host", "host": host}, "streams": 1, "limits": limits}),
        ),
        (
            "PATCH",
            "/v1/migrations/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11",
            "MigrationUpdate",
            json!({"limits": limits}),
        ),
        (
            "POST",
            "/v1/migrations",
            "MigrationCreate",
            json!({"guest": "g1", "destination": {"kind": "host", "host": host},
                "mirror": {"kind": "template", "strategy": apart, "placement": fifo}}),
        ),
        (
            "POST",
            "/v1/migrations",
            "MigrationCreate",
            json!({"guest": "g1", "destination": {"kind": "host", "host": host},
                "mirror": {"kind": "template", "strategy": strategy, "placement": nice}}),
        ),
        (
            "PATCH",
            "/v1/mirrors/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11",
            "MirrorUpdate",
            json!({"placement": fifo}),
        ),
        (
            "PATCH",
            "/v1/mirrors/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11",
            "MirrorUpdate",
            json!({"placement": nice}),
        ),
        (
            "POST",
            "/v1/mirrors/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11/exports",
            "MirrorExportCreate",
            json!({"import": host, "nonce": "5a".repeat(64), "ranges": [{"ram_addr": 0, "size_bytes": 4096}]}),
        ),
        (
            "POST",
            "/v1/mirrors/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11/imports",
            "MirrorImportCreate",
            json!({"kind": "batch", "batch": {"import": host, "epoch": 1, "nonce": "5a".repeat(64), "addressing": "gpa",
                "pages": 1, "records": "", "token": "", "last": true, "guest_state": "paused"}}),
        ),
        ("POST", "/v1/mirrors", "MirrorCreate", json!({"guest": "g1", "strategy": apart})),
        (
            "POST",
            "/v1/guests/g1/ram-blocks",
            "MemoryBlock",
            json!({"name": "r", "size_bytes": 4096, "gpa": 1u64 << 32}),
        ),
        ("POST", "/v1/guests/g1/ram-blocks/ram0/plug", "RamBlockPlug", json!({"gpa": 1u64 << 32})),
        (
            "POST",
            "/v1/guests/g1/encryption-status",
            "EncryptionStatusUpdate",
            json!({"gpa": 0, "pages": 1, "encrypted": false}),
        ),
        (
            "POST",
            "/v1/guests/g1/address-space-plans",
            "AddressSpacePlanCreate",
            json!({"strategy": apart, "workers": 1,
                "host_limits": {"max_phys_bits": 48, "c_bit_position": 47, "phys_bit_reduction": 0, "slot_budget": 509,
                    "gib_pages": true},
                "declaration": [{"guest_gpa": 0, "size_bytes": 4096, "mirror_gpa": 4096}]}),
        ),
        (
            "POST",
            "/v1/incoming-migrations",
            "IncomingMigrationCreate",
            json!({"source": {"name": "a", "identity": format!("sha256:{}", "5a".repeat(32))},
                "expires_in_seconds": 600}),
        ),
        ("PATCH", "/v1/host", "HostUpdate", json!({"migration_slots": 4})),
        (
            "POST",
            "/v1/tokens",
            "TokenCreate",
            json!({"name": "t", "role": "viewer", "expires_in_seconds": 600}),
        ),
    ]
}

/// Pointers of all numbers in `value`.
fn numbers(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(at.to_owned()),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, v)| numbers(v, &format!("{at}/{i}"), found));
        }
        Value::Object(map) => map.iter().for_each(|(k, v)| numbers(v, &format!("{at}/{k}"), found)),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// `body` with other text for the number at `pointer`: also what no JSON library would write.
fn with(body: &Value, pointer: &str, text: &str) -> String {
    let mut body = body.clone();
    *body.pointer_mut(pointer).unwrap() = json!("@number@");
    body.to_string().replace("\"@number@\"", text)
}

/// The schema of the value at `pointer` in a value of `schema`, of a union the variant that `value` is.
fn schema_at<'d>(document: &'d Value, schema: &'d Value, value: &Value, pointer: &str) -> Option<&'d Value> {
    if let Some(reference) = schema["$ref"].as_str() {
        return schema_at(
            document,
            document.pointer(reference.trim_start_matches('#')).unwrap(),
            value,
            pointer,
        );
    }
    for variants in ["oneOf", "anyOf", "allOf"] {
        if let Some(list) = schema[variants].as_array() {
            return list.iter().find_map(|v| schema_at(document, v, value, pointer));
        }
    }
    let Some(rest) = pointer.strip_prefix('/') else { return Some(schema) };
    let (name, rest) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if let Value::Array(list) = value {
        return schema_at(document, &schema["items"], &list[name.parse::<usize>().unwrap()], rest);
    }
    let kinds = &schema["properties"]["kind"]["enum"];
    if value["kind"].is_string() && kinds.is_array() && !kinds.as_array().unwrap().contains(&value["kind"]) {
        return None;
    }
    schema_at(document, schema["properties"].get(name)?, &value[name], rest)
}

/// What the answer to a body says of the value at `pointer`.
fn said(
    d: &Daemon,
    (method, target, _, _): &(&str, &str, &str, Value),
    body: String,
    pointer: &str,
) -> Vec<Value> {
    let target = format!("{target}?dry_run=true");
    let reply = d.send(&Request::new(method, &target).header("content-type", "application/json").body(body));
    if reply.status < 300 {
        return Vec::new();
    }
    let problem = reply.json();
    let errors = problem["errors"].as_array().cloned().unwrap_or_default();
    errors.into_iter().filter(|e| e["pointer"] == pointer).collect()
}

#[test]
fn an_integer_is_taken_by_its_digits_and_no_other_spelling() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("g1", 64, 0)).expect(201);
    let mut tried = 0;
    for case in bodies() {
        let mut places = Vec::new();
        numbers(&case.3, "", &mut places);
        for pointer in places {
            let odd = [
                "67108864.000000001",
                "67108863.9999999999",
                "1e0",
                "1E0",
                "-0",
                "0.0",
                "1.0",
                "4.096e3",
                "-0.0",
                "1e-0",
            ];
            for text in odd {
                let errors = said(&d, &case, with(&case.3, &pointer, text), &pointer);
                let of =
                    |e: &Value| e["code"] == "wrong_type" && e["detail"].as_str().unwrap().contains(text);
                assert!(errors.len() == 1 && of(&errors[0]), "{} {pointer} {text}: {errors:?}", case.2);
                tried += 1;
            }
            for text in [
                "9007199254740993",
                "18446744073709551615",
                "18446744073709551616",
                "340282366920938463463374607431768211457",
            ] {
                let errors = said(&d, &case, with(&case.3, &pointer, text), &pointer);
                let of = |e: &Value| {
                    e["code"] == "out_of_range" && e["detail"].as_str().unwrap().starts_with(text)
                };
                assert!(errors.len() == 1 && of(&errors[0]), "{} {pointer} {text}: {errors:?}", case.2);
            }
        }
    }
    assert!(tried > 200, "{tried}");
    assert_eq!(d.items("/v1/guests").len(), 1);
}

#[test]
fn a_number_s_bounds_are_one_statement_in_the_document_and_everywhere() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("g1", 64, 0)).expect(201);
    let document = document();
    // What these may be depends on the host or on other fields, inside what the document says.
    let depends = [
        "size_bytes",
        "gpa",
        "working_set_bytes",
        "0",
        "policy",
        "priority",
        "bytes",
        "pages",
        "guest_gpa",
        "mirror_gpa",
        "ram_addr",
        "c_bit_position",
        "max_phys_bits",
        "phys_bit_reduction",
    ];
    let mut seen = 0;
    for case in bodies() {
        let schema = &document["components"]["schemas"][case.2];
        assert!(schema.is_object(), "{}", case.2);
        let mut places = Vec::new();
        numbers(&case.3, "", &mut places);
        for pointer in places {
            let name = pointer.rsplit('/').next().unwrap();
            let Some(of) = schema_at(&document, schema, &case.3, &pointer) else {
                panic!("{} {pointer}", case.2)
            };
            let (Some(low), Some(high)) = (of["minimum"].as_i64(), of["maximum"].as_i64()) else {
                assert!(depends.contains(&name), "{} {pointer} has no bounds: {of}", case.2);
                continue;
            };
            let wanted = format!("is not between {low} and {high}");
            for outside in [low - 1, high + 1, low - 1000, high.saturating_mul(2)] {
                let errors = said(&d, &case, with(&case.3, &pointer, &outside.to_string()), &pointer);
                assert_eq!(errors.len(), 1, "{} {pointer} {outside}: {errors:?}", case.2);
                let detail = errors[0]["detail"].as_str().unwrap();
                assert_eq!(detail, format!("{outside} {wanted}"), "{} {pointer}", case.2);
            }
            for inside in [low, high] {
                let errors = said(&d, &case, with(&case.3, &pointer, &inside.to_string()), &pointer);
                assert!(
                    depends.contains(&name) || errors.is_empty(),
                    "{} {pointer} {inside}: {errors:?}",
                    case.2
                );
            }
            seen += 1;
        }
    }
    assert!(seen >= 18, "{seen}");
}

/// Pointers of all numbers that a value of `schema` may have.
fn numbers_of(document: &Value, schema: &Value, at: &str, above: &[&str], found: &mut BTreeSet<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        if !above.contains(&reference) {
            let of = document.pointer(reference.trim_start_matches('#')).unwrap();
            numbers_of(document, of, at, &[above, &[reference]].concat(), found);
        }
        return;
    }
    let variants = ["oneOf", "anyOf", "allOf"].iter().filter_map(|v| schema[v].as_array());
    variants.flatten().for_each(|v| numbers_of(document, v, at, above, found));
    let is = |t: &Value| t == "integer" || t == "number";
    if is(&schema["type"]) || schema["type"].as_array().is_some_and(|list| list.iter().any(is)) {
        found.insert(at.to_owned());
    }
    for (name, of) in schema["properties"].as_object().into_iter().flatten() {
        numbers_of(document, of, &format!("{at}/{name}"), above, found);
    }
    if schema["items"].is_object() {
        numbers_of(document, &schema["items"], &format!("{at}/0"), above, found);
    }
}

#[test]
fn no_number_of_any_request_is_left_out_here() {
    let document = document();
    let mut all = BTreeSet::new();
    for operation in
        document["paths"].as_object().unwrap().values().flat_map(|p| p.as_object().unwrap().values())
    {
        let contents = operation["requestBody"]["content"].as_object().into_iter().flat_map(|c| c.values());
        for name in contents.filter_map(|c| c["schema"]["$ref"].as_str()) {
            let mut found = BTreeSet::new();
            numbers_of(&document, &json!({"$ref": name}), "", &[], &mut found);
            // What an answer shows beside a batch is not read when it comes back.
            found.retain(|at| !at.starts_with("/batch/preview/"));
            all.extend(found.into_iter().map(|at| (name.rsplit('/').next().unwrap().to_owned(), at)));
        }
    }
    assert!(all.len() > 40, "{all:?}");
    for (_, _, schema, body) in bodies() {
        let mut places = Vec::new();
        numbers(&body, "", &mut places);
        places.into_iter().for_each(|at| _ = all.remove(&(schema.to_owned(), at)));
    }
    assert!(all.is_empty(), "{all:?}");
}

#[test]
fn a_text_s_longest_is_one_statement_in_the_document_and_everywhere() {
    let directory = tempfile::tempdir().unwrap();
    let images = directory.path().canonicalize().unwrap();
    let d = Daemon::start_with("a", &[("MIRRORVM_IMAGE_DIRECTORIES", images.to_str().unwrap())]);
    let document = document();
    std::fs::write(images.join("kernel"), [0; 5000]).unwrap();
    let mut linux = embedded("q1", 64, 0);
    linux["driver"] = json!({"kind": "qemu", "kernel": images.join("kernel"), "append": "", "accel": "tcg"});
    let host = json!({"kind": "ticket", "ticket": ""});
    let cases = [
        ("/v1/guests", "GuestCreate", "/driver/append", linux),
        ("/v1/tokens", "TokenCreate", "/name", json!({"name": "", "role": "viewer"})),
        (
            "/v1/migrations",
            "MigrationCreate",
            "/destination/ticket",
            json!({"guest": "q1", "destination": host}),
        ),
        (
            "/v1/migrations/0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11/resolution",
            "MigrationResolve",
            "/reason",
            json!({"kind": "word", "outcome": "committed", "reason": "", "confirm": "g1"}),
        ),
    ];
    for (target, name, pointer, mut body) in cases {
        let of = schema_at(&document, &document["components"]["schemas"][name], &body, pointer).unwrap();
        let said_in_words =
            of["description"].as_str().is_some_and(|text| text.contains("at most 2047 bytes"));
        let longest = if said_in_words { 2047 } else { of["maxLength"].as_u64().unwrap() as usize };
        for (bytes, fits) in [(longest, true), (longest + 1, false)] {
            *body.pointer_mut(pointer).unwrap() = json!("x".repeat(bytes));
            let case = ("POST", target, name, Value::Null);
            let errors = said(&d, &case, body.to_string(), pointer);
            // As a ticket none of them is one.
            let fits = fits && !pointer.ends_with("ticket");
            assert_eq!(errors.is_empty(), fits, "{name} {pointer} {bytes}: {errors:?}");
            let told = errors.iter().all(|e| e["detail"].as_str().unwrap().len() < 200);
            assert!(told, "the value is not repeated: {errors:?}");
        }
    }
}

#[test]
fn what_is_wrong_is_named_in_one_line() {
    let d = Daemon::start("a");
    let mut body = embedded("g 1", 64, 0);
    let problem = d.post("/v1/guests", &body).expect(422).json();
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.starts_with("/name: \"g 1\" is no name"), "{detail}");
    body["labels"] = json!({"a=b": "x"});
    let problem = d.post("/v1/guests", &body).expect(422).json();
    assert_eq!(problem["detail"], "2 values of the request cannot be used: /name, /labels");
    let problem = d.get("/v1/guests?limit=0").expect(422).json();
    assert_eq!(problem["detail"], "limit: \"0\" is not an integer between 1 and 1000");
}

#[test]
fn the_audit_log_says_what_was_done_however_it_was_written() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("g1", 16, 0)).expect(201);
    let newest = |operation: &str| d.items(&format!("/v1/audit-log?operation={operation}&limit=1")).remove(0);
    for query in ["dry_run=true", "dry%5Frun=true", "dry_run=tru%65", "%64%72y_run=%74rue&"] {
        let _ = d.post(&format!("/v1/guests?{query}"), &embedded("g2", 16, 0)).expect(200);
        let entry = newest("guest_create");
        assert_eq!((&entry["dry_run"], &entry["status"]), (&json!(true), &json!(200)), "{query}: {entry}");
    }
    // What contradicts itself or cannot be read is refused, does nothing, and is noted as that.
    for (query, status) in [
        ("dry_run=true&dry_run=true", 422),
        ("dry_run=false&dry%5frun=true", 422),
        ("dry_run=true&dry_run=false", 422),
        ("dry_run=+true", 422),
        ("dry_run=TRUE", 422),
        ("dry_run=%", 400),
        ("Dry_run=true", 422),
    ] {
        let _ = d.post(&format!("/v1/guests?{query}"), &embedded("g2", 16, 0)).expect(status);
        let entry = newest("guest_create");
        assert_eq!(
            (&entry["dry_run"], &entry["status"]),
            (&json!(false), &json!(status)),
            "{query}: {entry}"
        );
    }
    assert_eq!(d.items("/v1/guests").len(), 1);
    // A path as well.
    let patch = json!({"labels": {"a": "b"}});
    let _ = d.send(&Request::new("PATCH", "/v1/guests/%67%31").json(&patch)).expect(200);
    assert_eq!(newest("guest_update")["path"], "/v1/guests/g1");
    // The same request with the same key, written in another way, is the same request.
    let keyed = |query: &str| {
        let request = Request::new("POST", &format!("/v1/guests?{query}")).json(&embedded("g3", 16, 0));
        d.send(&request.header("idempotency-key", "k1"))
    };
    let _ = keyed("dry_run=true").expect(200);
    assert_eq!(keyed("dry%5Frun=%74rue").expect(200).header("idempotency-replayed"), Some("true"));
    assert_eq!(keyed("dry_run=false").problem(), "idempotency_key_reused");
}

#[test]
fn a_token_of_one_guest_reaches_it_however_the_path_is_written() {
    let d = Daemon::start("a");
    for name in ["g1", "g2"] {
        let _ = d.post("/v1/guests", &embedded(name, 16, 0)).expect(201);
    }
    let body = json!({"name": "v", "role": "vmm", "guest": "g1", "expires_in_seconds": 600});
    let token = d.post("/v1/tokens", &body).expect(201).json();
    let bearer = format!("Bearer {}", token["secret"].as_str().unwrap());
    let ask = |path: &str| d.send(&Request::new("GET", path).header("authorization", &bearer)).status;
    for (path, status) in [
        ("/v1/guests/g1/encryption-status", 200),
        ("/v1/guests/%67%31/encryption-status", 200),
        ("/v1/guests/g2/encryption-status", 403),
        ("/v1/guests/%672/encryption-status", 403),
        ("/v1/guests/g1%2f..%2fg2/encryption-status", 403),
    ] {
        assert_eq!(ask(path), status, "{path}");
    }
}

#[test]
fn a_header_that_is_there_twice_counts_as_neither() {
    let d = Daemon::start("a");
    let patch = json!({"labels": {"a": "b"}});
    let twice = |method: &str, target: &str, name: &str, values: [&str; 2]| {
        let request = Request::new(method, target).json(&patch);
        d.send(&request.header(name, values[0]).header(name, values[1]))
    };
    assert_eq!(
        twice("PATCH", "/v1/host", "content-type", ["application/json"; 2]).problem(),
        "unsupported_media_type"
    );
    let encodings = ["identity", "gzip"];
    assert_eq!(twice("PATCH", "/v1/host", "content-encoding", encodings).problem(), "unsupported_media_type");
    assert_eq!(
        twice("PATCH", "/v1/host", "authorization", ["Bearer a", "Bearer b"]).problem(),
        "unauthenticated"
    );
    assert_eq!(twice("POST", "/v1/guests", "idempotency-key", ["a", "b"]).problem(), "validation_failed");
    let ids = ["0000000000000000-1"; 2];
    assert_eq!(twice("GET", "/v1/events/stream", "last-event-id", ids).problem(), "validation_failed");
    let reply = twice("GET", "/v1/host", "x-request-id", ["one", "two"]).expect(200);
    assert!(!["one", "two"].contains(&reply.header("x-request-id").unwrap()));
    // A list in two headers is a list.
    let tag = d.get("/v1/host").header("etag").unwrap().to_owned();
    let _ = twice("PATCH", "/v1/host", "if-match", ["\"999\"", &tag]).expect(200);
}
