//! What the daemon's documents of this version look like, to the byte, and how those of version 4 are read.

use std::fmt::Debug;
use std::path::PathBuf;

use jiff::Timestamp;
use mirrorvm::store::form::{self, Document};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::access::Role;
use crate::access::tokens::{Origin, TokenRecord};
use crate::http::audit::{AuditOutcome, AuditRecord};
use crate::http::idempotency::{Answer, Claim};

fn id(n: u128) -> Uuid {
    Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + n)
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn token(role: Role, origin: Origin) -> TokenRecord {
    TokenRecord {
        id: id(1),
        name: "control plane".into(),
        role,
        guest: (role == Role::Vmm).then(|| id(2)),
        origin,
        hash: "5a".repeat(32),
        created_at: at(0),
        expires_at: at(60),
        created_by: "unix:0".into(),
    }
}

fn claim(answer: Option<Answer>) -> Claim {
    Claim { fingerprint: format!("sha256:{}", "0f".repeat(32)), boot: id(3), resource: id(4), answer }
}

fn outcome() -> AuditOutcome {
    AuditOutcome {
        status: 201,
        code: Some("none".into()),
        location: Some("/v1/guests/x".into()),
        replayed: true,
        recorded: true,
    }
}

fn entry() -> AuditRecord {
    AuditRecord {
        principal: Some("unix:0".into()),
        authenticated_by: Some("local_user".into()),
        role: Some("admin".into()),
        session: Some(id(5)),
        operation: "guest_create".into(),
        path: "/v1/guests".into(),
        dry_run: false,
        outcome: outcome(),
        request_id: id(6).to_string(),
        left_out: 3,
    }
}

fn one<T: Document + Debug + PartialEq>(name: &str, value: &T) {
    let text = form::write(value).unwrap();
    let path = format!("{}/tests/data/stored/v5/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let path = PathBuf::from(path);
    if std::env::var_os("UPDATE_STORED").is_some() {
        std::fs::write(&path, format!("{text}\n")).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        there.trim_end(),
        text,
        "{name} looks otherwise on disk than what builds of this version write. A form that changes gets another version, and \
         a way there from this one; its files go beside these. Only for a version that was never landed: UPDATE_STORED=1"
    );
    assert_eq!(form::read::<T>(text.as_bytes()).unwrap(), *value, "{name}");
    let whole: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(whole["version"], T::VERSION);
    for member in whole.as_object().unwrap().keys().filter(|member| *member != "version") {
        let mut less = whole.clone();
        less.as_object_mut().unwrap().remove(member);
        let read = form::read::<T>(less.to_string().as_bytes());
        assert!(read.is_err(), "{name} without {member}: {read:?}");
    }
    let mut more = whole;
    more["colour"] = json!("red");
    let refused = form::read::<T>(more.to_string().as_bytes()).unwrap_err();
    assert!(format!("{refused:?}").contains("colour"), "{refused:?}");
}

#[test]
fn every_document_looks_as_its_file_and_nothing_else_is_taken_for_one() {
    one("token", &token(Role::Vmm, Origin::Session));
    let headers = vec![("content-type".into(), "application/json".into())];
    one("answer", &claim(Some(Answer { status: 201, headers, body: "{}".into() })));
    one("claim", &claim(None));
    one("audit-entry", &entry());
    one("audit-outcome", &outcome());
}

#[test]
fn every_role_and_origin_is_read_as_it_is_written() {
    for (name, role) in Role::ALL {
        for (word, origin) in
            [("api", Origin::Api), ("admin_file", Origin::AdminFile), ("session", Origin::Session)]
        {
            let text = form::write(&token(role, origin)).unwrap();
            assert!(text.contains(&format!("\"role\":\"{name}\"")), "{text}");
            assert!(text.contains(&format!("\"origin\":\"{word}\"")), "{text}");
            assert_eq!(form::read::<TokenRecord>(text.as_bytes()).unwrap(), token(role, origin));
        }
    }
}

/// From the database that a daemon of version 4 left (`lib/tests/data/stored/v4`).
fn of_version_4(table: &str, part: &str) -> Vec<String> {
    let dump = concat!(env!("CARGO_MANIFEST_DIR"), "/../lib/tests/data/stored/v4/mirrorvm.sql");
    let dump = std::fs::read_to_string(dump).unwrap();
    let begins = format!("INSERT INTO {table} VALUES(");
    let rows = dump.lines().filter(|line| line.starts_with(&begins) && line.contains(part));
    rows.map(|row| row[row.find('{').unwrap()..=row.rfind('}').unwrap()].replace("''", "'")).collect()
}

#[test]
fn what_a_daemon_of_version_4_wrote_is_read() {
    let [text] = &of_version_4("keyed", "'token'")[..] else { panic!("one token") };
    let token: TokenRecord = form::read(text.as_bytes()).unwrap();
    assert_eq!(
        (token.name.as_str(), token.role, token.origin),
        ("control plane", Role::Operator, Origin::Api)
    );
    assert_eq!((token.hash.len(), token.created_by.as_str(), token.guest), (64, "unix:0", None));
    let [text] = &of_version_4("keyed", "'idempotency'")[..] else { panic!("one key") };
    let answer = form::read::<Claim>(text.as_bytes()).unwrap().answer.unwrap();
    assert_eq!((answer.status, answer.headers.len()), (201, 3));
    assert!(answer.body.contains("embedded-1"));
    let entries: Vec<AuditRecord> =
        of_version_4("audit", "").iter().map(|text| form::read(text.as_bytes()).unwrap()).collect();
    assert!(entries.len() > 10 && entries.iter().all(|e| e.outcome.status == 0 && !e.dry_run));
    assert!(entries.iter().any(|e| e.operation == "migration_create"));
    let outcomes: Vec<AuditOutcome> =
        of_version_4("audit_outcome", "").iter().map(|text| form::read(text.as_bytes()).unwrap()).collect();
    assert_eq!(outcomes.len(), entries.len());
    assert!(outcomes.iter().all(|o| o.recorded && o.status < 300));
    // Of builds before there were sessions, other origins and outcomes apart.
    let older = r#"{"id":"01900000-0000-7000-8000-000000000001","name":"n","role":"admin","hash":"5a",
        "created_at":"2026-01-02T03:04:05Z","expires_at":"2026-01-03T03:04:05Z","created_by":"unix:0"}"#;
    assert_eq!(form::read::<TokenRecord>(older.as_bytes()).unwrap().origin, Origin::Api);
}
