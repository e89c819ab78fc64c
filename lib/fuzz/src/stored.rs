//! Documents of a host's journal and records, in any version, as a start reads them.
//!
//! What is understood is brought into the form of this build, which is left as it is from then on. What is
//! not is refused with what is wrong.

use mirrorvm::host::renew;
use mirrorvm::store::{DocumentRef, Kind};
use serde_json::Value;
use uuid::Uuid;

use crate::Seed;

fn documents() -> [DocumentRef; 9] {
    let of = |kind| DocumentRef::Document(kind, Uuid::nil());
    let meta = |key: &str| DocumentRef::Meta(key.to_owned());
    [
        of(Kind::Guest),
        of(Kind::Migration),
        of(Kind::Peer),
        of(Kind::HandOver),
        of(Kind::HelperImage),
        meta("host_id"),
        meta("identity"),
        meta("page_secret"),
        meta("host_settings"),
    ]
}

/// Which document it is, and its body.
pub fn run(data: &[u8]) {
    let Some((which, body)) = data.split_first() else { return };
    let document = &documents()[usize::from(*which) % documents().len()];
    match renew(document, body) {
        Ok(None) => assert!(serde_json::from_slice::<serde_json::Value>(body).is_ok(), "{document}"),
        Ok(Some(text)) => {
            assert_ne!(text.as_bytes(), body);
            nothing_is_lost(body, &text);
            let again = renew(document, text.as_bytes());
            assert!(matches!(again, Ok(None)), "{document} is not what it is written as: {again:?}\n{text}");
        }
        Err(unread) => assert!(!unread.to_string().is_empty()),
    }
}

/// Of a document of this version every member is kept, and every item of a list; how a value is spelled may
/// change.
fn nothing_is_lost(before: &[u8], after: &str) {
    let (Ok(before), Ok(after)) =
        (serde_json::from_slice::<Value>(before), serde_json::from_str::<Value>(after))
    else {
        panic!("what was understood is JSON")
    };
    if before["version"] == after["version"] {
        assert_eq!(shape(&before), shape(&after), "{before}\n{after}");
    }
}

/// Names of members and lengths of lists.
fn shape(value: &Value) -> Value {
    match value {
        Value::Array(items) => items.iter().map(shape).collect(),
        Value::Object(members) => members.iter().map(|(name, value)| (name.clone(), shape(value))).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Value::Null,
    }
}

/// The documents of the tests, of this version and of those before.
pub fn seeds() -> Vec<Seed> {
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/stored");
    let which = |name: &str| {
        let begins = [
            "guest",
            "migration",
            "peer",
            "hand-over",
            "helper-image",
            "host-id",
            "identity",
            "page-secret",
            "settings",
        ];
        begins.iter().position(|begin| name.starts_with(begin)).map(|at| at as u8)
    };
    let mut all = Vec::new();
    for version in ["v5", "v6"] {
        for entry in std::fs::read_dir(data.join(version)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            let Some(which) = which(&name) else { continue };
            let body = std::fs::read(&path).unwrap();
            let body = body.trim_ascii_end();
            all.push((format!("{name}-{version}"), [&[which][..], body].concat()));
            if version == "v5" {
                // As those of version 4 were: without a version, and without what says nothing.
                let mut value: serde_json::Value = serde_json::from_slice(body).unwrap();
                let members = value.as_object_mut().unwrap();
                members.remove("version");
                members.retain(|_, member| !member.is_null());
                all.push((format!("{name}-unsaid"), [&[which][..], value.to_string().as_bytes()].concat()));
            }
        }
    }
    all.sort();
    all
}
