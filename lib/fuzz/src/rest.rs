//! Bodies of requests, as callers of the REST API send them.
//!
//! A body is read in full or refused with a list of problems, each with a pointer into the body, a code and a
//! sentence. What was read is written as JSON that reads the same.

use mirrorvm::guest::Drivers;
use mirrorvm::host::{GuestSpec, MigrationSpec};
use mirrorvm::reading::{Decode, Errors, FieldError, Json, Node, decode, decode_by, json};
use mirrorvmd::api::batches::{ExportBody, ImportRequest};
use mirrorvmd::api::encryption::{EncryptionStatusUpdate, RamBlockPlug};
use mirrorvmd::api::guests::{GuestConfirm, GuestCreate};
use mirrorvmd::api::helper_images::HelperImageCreate;
use mirrorvmd::api::layout::AddressSpacePlanCreate;
use mirrorvmd::api::migrations::MigrationCreate;
use mirrorvmd::api::mirrors::MirrorCreate;
use mirrorvmd::api::patch::{GuestUpdate, HostUpdate, MigrationUpdate, MirrorUpdate, PeerHostUpdate};
use mirrorvmd::api::peers::PeerHostCreate;
use mirrorvmd::api::resolution::Resolve;
use mirrorvmd::api::tickets::IncomingMigrationCreate;
use mirrorvmd::api::tokens::{SessionCreate, TokenCreate};
use serde::Serialize;

use crate::Seed;

/// How many kinds of bodies there are.
const KINDS: u8 = 20;

/// Which body it is, and its bytes.
pub fn run(data: &[u8]) {
    let Some((which, body)) = data.split_first() else { return };
    let value = match json::parse(body) {
        Ok(value) => value,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    match which % KINDS {
        0 => guest(&value),
        1 => same::<GuestConfirm>(&value),
        2 => read::<GuestUpdate>(&value),
        3 => same::<MirrorCreate>(&value),
        4 => read::<MirrorUpdate>(&value),
        5 => migration(&value),
        6 => read::<MigrationUpdate>(&value),
        7 => same::<PeerHostCreate>(&value),
        8 => read::<PeerHostUpdate>(&value),
        9 => read::<HostUpdate>(&value),
        10 => same::<TokenCreate>(&value),
        11 => read::<SessionCreate>(&value),
        12 => read::<IncomingMigrationCreate>(&value),
        13 => same::<HelperImageCreate>(&value),
        14 => same::<RamBlockPlug>(&value),
        15 => same::<EncryptionStatusUpdate>(&value),
        16 => same::<ExportBody>(&value),
        17 => read::<ImportRequest>(&value),
        18 => read::<Resolve>(&value),
        _ => read::<AddressSpacePlanCreate>(&value),
    }
}

fn read<T: Decode>(value: &Json) {
    if let Err(found) = decode::<T>(value) {
        problems(&found, value);
    }
}

fn same<T: Decode + Serialize>(value: &Json) {
    match decode::<T>(value) {
        Ok(body) => again(&body, |text| decode::<T>(text)),
        Err(found) => problems(&found, value),
    }
}

fn again<T: Serialize>(body: &T, read: impl Fn(&Json) -> Result<T, Vec<FieldError>>) {
    let text = serde_json::to_vec(body).unwrap();
    let shown = || String::from_utf8_lossy(&text).into_owned();
    let second = read(&json::parse(&text).unwrap()).unwrap_or_else(|e| panic!("{e:?} of {}", shown()));
    assert_eq!(serde_json::to_vec(&second).unwrap(), text);
}

fn guest(value: &Json) {
    let drivers = Drivers::default();
    let by = |node: &Node<'_>, errors: &mut Errors| GuestCreate::decode(node, errors, &drivers);
    match decode_by(value, by) {
        Ok(body) => {
            let spec = GuestSpec::from(body);
            assert!(spec.blocks.iter().all(|block| block.size_bytes >= 4096));
        }
        Err(found) => problems(&found, value),
    }
}

fn migration(value: &Json) {
    match decode::<MigrationCreate>(value) {
        Ok(body) => {
            let body = MigrationCreate::from(MigrationSpec::from(body));
            again(&body, |text| {
                decode::<MigrationCreate>(text).map(|b| MigrationCreate::from(MigrationSpec::from(b)))
            });
        }
        Err(found) => problems(&found, value),
    }
}

/// Each problem leads to something in the body, or to what is missing in something.
fn problems(found: &[FieldError], value: &Json) {
    assert!((1..=64).contains(&found.len()), "{} problems", found.len());
    for FieldError { pointer, code, detail } in found {
        assert!(
            !code.is_empty()
                && code.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        );
        assert!(!detail.is_empty() && detail.len() < 4096, "{} bytes of detail", detail.len());
        leads(pointer, value);
    }
}

/// A name that is absurdly long is cut in a pointer, which then leads nowhere.
const CUT: usize = 64;

fn leads(pointer: &str, value: &Json) {
    let mut at = value;
    let steps: Vec<&str> = pointer.split('/').collect();
    assert!(pointer.is_empty() || pointer.starts_with('/'), "{pointer:?}");
    for (n, step) in steps.iter().enumerate().skip(1) {
        let name = step.replace("~1", "/").replace("~0", "~");
        let next = match at {
            Json::Object(members) => members.get(&name),
            Json::Array(items) => name.parse::<usize>().ok().and_then(|n| items.get(n)),
            Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => None,
        };
        match next {
            Some(next) => at = next,
            None => {
                let last = n + 1 == steps.len();
                assert!(last || name.chars().count() >= CUT, "{pointer} leads nowhere at {name:?}");
                return;
            }
        }
    }
}

/// A good body of every kind, and bodies that readers disagree on.
pub fn seeds() -> Vec<Seed> {
    let id = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11";
    let zeros = "A".repeat(44);
    let workload = r#"{"fill":"random","working_set_bytes":4096,"dirty_bytes_per_second":0}"#;
    let memory = r#"{"blocks":[{"name":"ram0","size_bytes":8388608,"gpa":"0x0"},{"name":"dimm","size_bytes":2097152}],"backing":"auto"}"#;
    let bodies: Vec<(&str, u8, String)> = vec![
        ("guest-embedded", 0, format!(r#"{{"name":"g","driver":{{"kind":"embedded","vcpus":1,"workload":{workload}}},"memory":{memory},"labels":{{"a":"b"}}}}"#)),
        ("guest-emulated-sev", 0, format!(r#"{{"name":"g","driver":{{"kind":"emulated","workload":{workload},"sev":{{"policy":{{}}}}}},"memory":{memory}}}"#)),
        ("guest-qemu", 0, format!(r#"{{"name":"g","driver":{{"kind":"qemu","machine":"pc","kernel":"/boot/vmlinuz","cmdline":"console=ttyS0","accel":"auto"}},"memory":{memory}}}"#)),
        ("guest-of-nobody", 0, r#"{"name":"","driver":{"kind":"x"},"memory":{"blocks":[]}}"#.into()),
        ("confirm", 1, r#"{"confirm":"lives_here"}"#.into()),
        ("relabel", 2, r#"{"labels":{"a":null,"b":"c"}}"#.into()),
        ("mirror", 3, format!(r#"{{"guest":"{id}","strategy":{{"kind":"shifted","shift":{{"kind":"4gib"}}}},"workers":2,"placement":{{"cpus":[0,1],"scheduler":{{"kind":"other","nice":3}}}}}}"#)),
        ("mirror-moved", 4, r#"{"placement":{"cpus":[],"scheduler":{"kind":"fifo","priority":99}}}"#.into()),
        ("migration-short", 5, r#"{"guest":"g","destination":{"kind":"host","host":"b"}}"#.into()),
        ("migration", 5, format!(r#"{{"guest":"g","destination":{{"kind":"ticket","ticket":"mvmt1.7b"}},"mode":"stop_and_copy","mirror":{{"kind":"existing","mirror":"{id}"}},"streams":16,"stream_transport":"tls","suite":"aes-256-gcm-siv","limits":{{"bandwidth_bytes_per_second":1048576,"downtime_ms":2,"timeout_ms":3,"stall_timeout_ms":1000,"auto_throttle":true,"on_timeout":"force"}},"on_success":{{"source":"delete"}},"verify":true}}"#)),
        ("limits", 6, r#"{"limits":{"bandwidth_bytes_per_second":null,"downtime_ms":5,"on_timeout":"cancel"}}"#.into()),
        ("peer", 7, format!(r#"{{"name":"b","address":"192.0.2.8:7801","identity":"sha256:{}","labels":{{}}}}"#, "0a".repeat(32))),
        ("peer-moved", 8, r#"{"address":"host-b:7801","labels":null}"#.into()),
        ("host", 9, r#"{"labels":{"rack":"r2"}}"#.into()),
        ("token", 10, r#"{"name":"t","role":"operator","expires_in_seconds":60}"#.into()),
        ("session", 11, r#"{"token":"mvm_abc"}"#.into()),
        ("incoming", 12, format!(r#"{{"source":{{"kind":"identity","identity":"sha256:{}"}},"guest":"{id}","expires_in_seconds":60}}"#, "0a".repeat(32))),
        ("helper-image", 13, r#"{"name":"mine"}"#.into()),
        ("plug", 14, r#"{"gpa":4294967296}"#.into()),
        ("encryption", 15, r#"{"status":"shared","gpa":4096,"pages":3}"#.into()),
        ("export", 16, format!(r#"{{"session":"{id}","importer":{{"nonce":"{zeros}","public_key":"{zeros}"}},"ranges":[{{"ram_addr":0,"len":4096}}]}}"#)),
        ("import", 17, format!(r#"{{"kind":"batch","batch":{{"session":"{id}","epoch":1,"records":"AAAA","token":"AAAA"}}}}"#)),
        ("resolve", 18, r#"{"outcome":"committed","reason":"I looked"}"#.into()),
        ("plan", 19, r#"{"strategy":{"kind":"declared"},"workers":2,"host_limits":{"max_phys_bits":48,"c_bit_position":47,"phys_bit_reduction":1,"slot_budget":509,"gib_pages":true},"declaration":[{"guest":4096,"len":4096,"mirror":8192}],"confidentiality":"sev_es","read_only_text":true}"#.into()),
        ("key-twice", 2, r#"{"labels":{"a":"1","a":"2"}}"#.into()),
        ("numbers", 14, r#"{"gpa":9007199254740993}"#.into()),
        ("number-with-exponent", 14, r#"{"gpa":1e3,"x":-0,"y":0.5,"z":99999999999999999999999999}"#.into()),
        ("escapes", 13, r#"{"name":"\ud83d\ude00\u0000\\\"","a~/b":[[[{}]]]}"#.into()),
        ("deep", 3, format!("{}1{}", "[".repeat(120), "]".repeat(120))),
        ("too-deep", 3, format!("{}1{}", "[".repeat(140), "]".repeat(140))),
        ("cut", 5, r#"{"guest":"g","destination":{"kind":"ho"#.into()),
        ("trailing", 1, r#"{"confirm":"x"}}"#.into()),
        ("no-object", 6, "[null,true,\"x\"]".into()),
    ];
    bodies
        .into_iter()
        .map(|(name, which, body)| (name.to_owned(), [&[which][..], body.as_bytes()].concat()))
        .collect()
}
