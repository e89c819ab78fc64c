//! Examples of the API's document are answers of daemons, recorded here, with names, times and numbers of
//! one story.
//!
//! `UPDATE_EXAMPLES=1` records them anew; without it, every answer must have the members of its example and
//! none more, so that the document goes on showing what one gets.

use std::collections::BTreeMap;

use mirrorvm_tests::{Daemon, Pair, Request, embedded, kvm, migration, repository, until};
use serde_json::{Map, Value, json};

/// Answers by operation and status.
#[derive(Default)]
struct Recorded(BTreeMap<String, BTreeMap<String, Value>>);

impl Recorded {
    /// Notes an answer, and gives it.
    fn note(&mut self, operation: &str, status: u16, answer: Value) -> Value {
        let statuses = self.0.entry(operation.to_owned()).or_default();
        statuses.entry(status.to_string()).or_insert_with(|| answer.clone());
        answer
    }

    fn get(&mut self, operation: &str, daemon: &Daemon, path: &str) -> Value {
        let answer = daemon.get(path).expect(200).json();
        self.note(operation, 200, answer)
    }

    fn post(&mut self, operation: &str, daemon: &Daemon, path: &str, body: &Value, status: u16) -> Value {
        let answer = daemon.post(path, body).expect(status).json();
        self.note(operation, status, answer)
    }

    fn act(&mut self, operation: &str, daemon: &Daemon, path: &str) -> Value {
        let answer = daemon.act(path).expect(202).json();
        self.note(operation, 202, answer)
    }

    fn patch(&mut self, operation: &str, daemon: &Daemon, path: &str, body: &Value) -> Value {
        let request = Request::new("PATCH", path).json(body);
        let answer = daemon.send(&request).expect(200).json();
        self.note(operation, 200, answer)
    }
}

/// Takes out of answers what is of one machine and one moment: ids, times, digests, addresses. What was
/// counted and measured stays.
#[derive(Default)]
struct Plain {
    ids: BTreeMap<String, usize>,
}

impl Plain {
    fn id(&mut self, id: &str) -> String {
        let next = self.ids.len() + 1;
        let number = *self.ids.entry(id.to_owned()).or_insert(next);
        format!("0199d3c5-6f0e-7c4c-a2b1-{number:012x}")
    }

    fn text(&mut self, text: &str) -> String {
        // Ids wherever they stand, as in paths.
        let mut out = String::new();
        let mut rest = text;
        while !rest.is_empty() {
            let id = rest.get(..36).filter(|t| is_id(t));
            match id {
                Some(id) => {
                    out.push_str(&self.id(id));
                    rest = &rest[36..];
                }
                None => {
                    let next = rest.chars().next().map_or(1, char::len_utf8);
                    out.push_str(&rest[..next]);
                    rest = &rest[next..];
                }
            }
        }
        let is_time = out.len() == 24 && out.ends_with('Z') && out.as_bytes()[10] == b'T';
        if is_time {
            return "2026-11-30T09:30:00.000Z".into();
        }
        let hexadecimal = |t: &str| t.len() >= 32 && t.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(digest) = out.strip_prefix("sha256:")
            && hexadecimal(digest)
        {
            return format!("sha256:{}", "5a".repeat(digest.len() / 2));
        }
        if hexadecimal(&out) { "5a".repeat(out.len() / 2) } else { out }
    }

    fn of(&mut self, name: &str, value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                map.iter().map(|(k, v)| (k.clone(), self.of(k, v))).collect::<Map<_, _>>().into()
            }
            Value::Array(list) => list.iter().map(|v| self.of(name, v)).collect(),
            Value::String(cursor) if name == "next_cursor" || is_cursor(cursor) => {
                json!("8f1c0a7d5be2460c-42")
            }
            Value::String(_) if ["address", "peer_address", "peer_listen"].contains(&name) => {
                json!("192.0.2.7:7801")
            }
            // What is the machine's on which they are recorded.
            Value::String(_) if name == "kernel" => json!("6.12.57"),
            Value::String(_) if name == "cpu" => json!("AMD EPYC 9554 64-Core Processor"),
            Value::String(text) => json!(self.text(text)),
            other => other.clone(),
        }
    }
}

/// A UUID.
fn is_id(text: &str) -> bool {
    text.bytes().enumerate().all(|(at, b)| match at {
        8 | 13 | 18 | 23 => b == b'-',
        _ => b.is_ascii_hexdigit(),
    })
}

/// `<epoch>-<seq>`.
fn is_cursor(text: &str) -> bool {
    let parts = text.split_once('-');
    parts.is_some_and(|(epoch, seq)| {
        epoch.len() == 16
            && epoch.bytes().all(|b| b.is_ascii_hexdigit())
            && !seq.is_empty()
            && seq.bytes().all(|b| b.is_ascii_digit())
    })
}

/// Longest list of an example.
const ITEMS: usize = 2;

fn shortened(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            map.iter().map(|(k, v)| (k.clone(), shortened(v))).collect::<Map<_, _>>().into()
        }
        Value::Array(list) => list.iter().take(ITEMS).map(shortened).collect(),
        other => other.clone(),
    }
}

/// Members of the objects on the way to every leaf, without those that depend on what a moment had to tell.
fn members(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                let at = format!("{at}.{name}");
                found.push(at.clone());
                // Its lists and choices are each their own.
                if !["preview", "conditions", "labels", "data", "progress", "kvm"].contains(&name.as_str()) {
                    members(value, &at, found);
                }
            }
        }
        Value::Array(list) => {
            if let Some(first) = list.first() {
                members(first, &format!("{at}[]"), found);
            }
        }
        _ => {}
    }
}

/// The story, each kind of answer once.
fn told(pair: &Pair) -> Recorded {
    let (a, b, mut r) = (&pair.a, &pair.b, Recorded::default());
    let _ = r.get("whoami_get", a, "/v1/whoami");
    let _ = r.get("host_get", a, "/v1/host");
    let _ = r.get("peer_host_list", a, "/v1/hosts");
    let _ = r.get("peer_host_get", a, "/v1/hosts/b");
    let _ = r.get("peer_host_deletion_preview_get", a, "/v1/hosts/b/deletion-preview");

    let mut definition = embedded("g1", 32, 8 << 20);
    definition["labels"] = json!({"rack": "r1"});
    let _ = r.post("guest_create", a, "/v1/guests?dry_run=true", &definition, 200);
    let guest = r.post("guest_create", a, "/v1/guests", &definition, 201);
    let _ = r.get("guest_deletion_preview_get", a, "/v1/guests/g1/deletion-preview");
    let _ = r.act("guest_start", a, "/v1/guests/g1/start");
    let _ = a.guest_in("g1", "running");
    let _ = r.act("guest_pause", a, "/v1/guests/g1/pause");
    let _ = r.act("guest_resume", a, "/v1/guests/g1/resume");
    let _ = a.ticks_beyond("g1", 5);
    let _ = r.get("guest_get", a, "/v1/guests/g1");
    let _ = r.get("guest_list", a, "/v1/guests");
    let _ = r.get("guest_stats_get", a, "/v1/guests/g1/stats");
    let _ = r.get("ram_block_list", a, "/v1/guests/g1/ram-blocks");
    let _ = r.get("ram_block_get", a, "/v1/guests/g1/ram-blocks/ram0");
    let _ = r.patch("guest_update", a, "/v1/guests/g1", &json!({"labels": {"rack": "r2"}}));

    let shifted = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let plans = "/v1/guests/g1/address-space-plans";
    let _ = r.post("address_space_plan_create", a, plans, &json!({"strategy": shifted}), 200);
    let wanted = json!({"guest": "g1", "strategy": shifted, "workers": 1});
    let mirror = r.post("mirror_create", a, "/v1/mirrors", &wanted, 201);
    let path = format!("/v1/mirrors/{}", mirror["id"].as_str().unwrap_or_default());
    let _ = r.get("mirror_list", a, "/v1/mirrors");
    let _ = r.get("mirror_get", a, &path);
    let _ = r.get("mirror_layout_get", a, &format!("{path}/layout"));
    let _ = r.get("mirror_stats_get", a, &format!("{path}/stats"));
    let _ = r.patch("mirror_update", a, &path, &json!({"placement": {"cpus": [0]}}));
    let _ = r.get("mirror_deletion_preview_get", a, &format!("{path}/deletion-preview"));
    let _ = a.delete(&path).expect(204);

    let wanted = migration("g1", "b", "precopy");
    let _ = r.post("migration_check_create", a, "/v1/migration-checks", &wanted, 200);
    let begun = r.post("migration_create", a, "/v1/migrations", &wanted, 201);
    let id = begun["id"].as_str().unwrap_or_default().to_owned();
    let _ = a.migration_end(&id);
    let path = format!("/v1/migrations/{id}");
    let _ = r.get("migration_get", a, &path);
    let _ = r.get("migration_list", a, "/v1/migrations");
    let _ = r.get("migration_round_list", a, &format!("{path}/rounds"));
    let _ = r.get("migration_deletion_preview_get", a, &format!("{path}/deletion-preview"));
    let guests = format!("/v1/events?resource={}", guest["id"].as_str().unwrap_or_default());
    until("the destination runs the guest", 60, || b.guest_state("g1") == "running");
    let _ = r.get("event_list", a, &guests);
    let _ = r.act("guest_stop", b, "/v1/guests/g1/stop");
    r
}

#[test]
fn examples_of_the_document_are_what_daemons_answer() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let mut plain = Plain::default();
    let told = told(&pair).0;
    let told: BTreeMap<String, Value> = told
        .into_iter()
        .map(|(operation, statuses)| {
            let statuses = statuses.iter().map(|(status, v)| (status.clone(), plain.of("", &shortened(v))));
            (operation, statuses.collect::<Map<_, _>>().into())
        })
        .collect();
    let path = repository().join("server/src/openapi/examples.json");
    if std::env::var_os("UPDATE_EXAMPLES").is_some() {
        let text = serde_json::to_string_pretty(&told).unwrap_or_default();
        assert!(std::fs::write(&path, format!("{text}\n")).is_ok());
    }
    let there = std::fs::read(&path).unwrap_or_default();
    let there: BTreeMap<String, Value> = serde_json::from_slice(&there).unwrap_or_default();
    assert_eq!(there.keys().collect::<Vec<_>>(), told.keys().collect::<Vec<_>>());
    for (operation, answers) in &told {
        for (status, answer) in answers.as_object().into_iter().flatten() {
            let (mut shown, mut got) = (Vec::new(), Vec::new());
            members(&there[operation][status], "", &mut shown);
            members(answer, "", &mut got);
            shown.sort();
            got.sort();
            assert_eq!(
                shown, got,
                "{operation} {status}: with UPDATE_EXAMPLES=1 the example is recorded anew"
            );
        }
    }
}
