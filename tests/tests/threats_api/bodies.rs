//! Row 60: any bad field of any body, and methods that a path does not have.

use super::*;

/// Every place in `value` that has something wrong with it in `mutate`d form: where, and the whole body.
fn mutations(base: &Value) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    let mut places = vec![String::new()];
    while let Some(at) = places.pop() {
        let value = base.pointer(&at).unwrap().clone();
        let mut put = |what: &str, wrong: Value| {
            let mut body = base.clone();
            *body.pointer_mut(&at).unwrap() = wrong;
            found.push((at.clone(), what.to_owned(), body));
        };
        let wrong: Vec<(&str, Value)> = match &value {
            Value::Object(_) => {
                vec![("an array", json!([])), ("a string", json!("x")), ("a number", json!(7))]
            }
            Value::Array(_) => vec![("an object", json!({})), ("a string", json!("x"))],
            Value::String(_) => vec![
                ("a number", json!(7)),
                ("an object", json!({})),
                ("true", json!(true)),
                ("empty", json!("")),
                ("long", json!("x".repeat(5000))),
                ("with NUL", json!("a\u{0}b")),
            ],
            Value::Number(_) => vec![
                ("a string", json!("1")),
                ("negative", json!(-1)),
                ("beyond u64", serde_json::from_str("18446744073709551616").unwrap()),
                ("far beyond u64", serde_json::from_str("1e40").unwrap()),
                ("a fraction", json!(1.5)),
                ("an array", json!([1])),
            ],
            Value::Bool(_) => vec![("a number", json!(1)), ("a string", json!("true"))],
            Value::Null => vec![],
        };
        // What a text names need not be there, which is another answer than a field's; and a label may be
        // empty. Of a code nobody is told what is wrong with it.
        let names = at.ends_with("/guest") || at.ends_with("/host") || at == "/confirm" || at == "/code";
        let label = at.starts_with("/labels/");
        for (what, wrong) in wrong {
            let text = wrong.as_str();
            if value.is_string() && text.is_some_and(|t| names || label && t.is_empty()) {
                continue;
            }
            put(what, wrong);
        }
        match value {
            Value::Object(map) => {
                let mut more = base.clone();
                more.pointer_mut(&at).unwrap()["zz_extra"] = json!(7);
                found.push((format!("{at}/zz_extra"), "an extra field".into(), more));
                places.extend(map.keys().map(|k| format!("{at}/{k}")));
            }
            Value::Array(list) => places.extend((0..list.len()).map(|i| format!("{at}/{i}"))),
            _ => {}
        }
    }
    found
}

/// The schema of `name`d component with its references followed.
fn resolved<'d>(document: &'d Value, schema: &'d Value) -> &'d Value {
    match schema["$ref"].as_str() {
        Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap(),
        None => schema,
    }
}

#[test]
fn row_60_every_body_of_the_document_is_checked_field_by_field() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let everything = || {
        ["/v1/guests", "/v1/mirrors", "/v1/migrations", "/v1/hosts", "/v1/helper-images"].map(|p| d.items(p))
    };
    let before = everything();
    let document = document();
    let (mut sent, mut bodies, mut wrong) = (0, 0, Vec::new());
    for (method, path, operation) in operations(&document) {
        let Some((kind, example)) = body_of(&document, &operation) else { continue };
        if !kind.contains("json") {
            continue;
        }
        let id = operation["operationId"].as_str().unwrap();
        assert!(example.is_object(), "{id} has no example of its body");
        bodies += 1;
        // An existing guest, but for the operation that makes one of the caller's id.
        let guest = if id == "guest_put" { "{guest}" } else { "g1" };
        let target = path.replace("{guest}", guest).replace("{block}", "ram0");
        let target: Vec<&str> = target
            .split('/')
            .map(|p| if p.starts_with('{') { "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11" } else { p })
            .collect();
        let target = target.join("/");
        let mut cases = mutations(&example);
        let schema = resolved(&document, &operation["requestBody"]["content"][&kind]["schema"]);
        // A variant's kind is required of all of them.
        let variants = schema["oneOf"].as_array().map(|_| vec![json!("kind")]);
        let required = schema["required"].as_array().cloned().or(variants).unwrap_or_default();
        for field in required.iter().map(|f| f.as_str().unwrap()) {
            let mut missing: Map<String, Value> = example.as_object().unwrap().clone();
            missing.remove(field);
            cases.push((format!("/{field}"), "missing".into(), Value::Object(missing.clone())));
            missing.insert(field.to_owned(), Value::Null);
            cases.push((format!("/{field}"), "null".into(), Value::Object(missing)));
        }
        for (at, what, body) in cases {
            let request = Request::new(&method, &target).header("content-type", &kind).body(body.to_string());
            // A session is only made for who sends it.
            let reply = d.send(&request.header("x-mirrorvm", "1"));
            sent += 1;
            let said = reply.json();
            let errors = said["errors"].as_array().cloned().unwrap_or_default();
            // At the place, in it, or (of what a union cannot be) right above it.
            let named = errors.iter().filter_map(|e| e["pointer"].as_str()).any(|p| {
                let above = at.rsplit_once('/').map_or("", |(above, _)| above);
                p == at || p.starts_with(&format!("{at}/")) || p == above && !above.is_empty()
            });
            if reply.status != 422 || !named {
                wrong.push(format!("{id} {at} {what}: {} {:.300}", reply.status, reply.text()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {sent}:\n{}", wrong.len(), wrong.join("\n"));
    println!("{sent} bodies of {bodies} operations");
    assert!(bodies >= 20 && sent > 500, "{sent} bodies of {bodies} operations");
    assert_eq!(everything(), before, "something changed");
}

#[test]
fn row_60_methods_that_a_path_does_not_have_are_refused() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let document = document();
    for (path, item) in document["paths"].as_object().unwrap() {
        let target: Vec<&str> = path.split('/').map(|p| if p.starts_with('{') { "g1" } else { p }).collect();
        for method in METHODS.into_iter().chain(["trace", "options", "connect", "propfind", "x"]) {
            if item.get(method).is_some() {
                continue;
            }
            let reply = d.send(&Request::new(&method.to_ascii_uppercase(), &target.join("/")));
            assert!((400..500).contains(&reply.status), "{method} {path}: {} {}", reply.status, reply.text());
            if METHODS.contains(&method) {
                assert_eq!(
                    (reply.status, reply.problem().as_str()),
                    (405, "method_not_allowed"),
                    "{method} {path}"
                );
                let allowed = reply.header("allow").unwrap().to_ascii_lowercase();
                let has = |m: &&str| allowed.split([',', ' ']).any(|a| a == *m);
                let documented: Vec<&str> = METHODS.into_iter().filter(|m| item.get(m).is_some()).collect();
                assert_eq!(
                    METHODS.iter().filter(|m| has(m)).copied().collect::<Vec<_>>(),
                    documented,
                    "{path}"
                );
            }
        }
    }
}
