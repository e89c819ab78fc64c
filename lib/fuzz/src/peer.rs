//! What a peer host says: messages of the control link, before and after it is known.
//!
//! What is read is bounded, says the same when it is written again, and has a layout that can be made; a
//! peer's words for people are printable and short. A state message is three parts that fill it, and names
//! only pages of RAM.

use mirrorvm::addr::RamAddr;
use mirrorvm::address_space::GuestLayout;
use mirrorvm::host::{TICKET_MAX, Ticket};
use mirrorvm::migration::MigrationFault;
use mirrorvm::migration::wire::{
    Abilities, Hello, HelloAck, Holding, Outcome, Prepare, Prepared, Purpose, Refused, Settled, StateHead,
    Verdict, parse, written,
};
use mirrorvm::transport::{Endpoint, PeerIdentity};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use uuid::Uuid;

use crate::Seed;

/// Where RAM ends of the guest whose state comes.
const RAM_END: u64 = 1 << 30;

/// Which message it is, and its payload.
pub fn run(data: &[u8]) {
    let Some((which, payload)) = data.split_first() else { return };
    match which % 13 {
        0 => drop(same::<Hello>(payload)),
        1 => drop(same::<HelloAck>(payload)),
        2 => {
            if let Some(prepare) = same::<Prepare>(payload) {
                let layout = &prepare.layout;
                let made = GuestLayout::from_blocks(layout.blocks().to_vec());
                assert_eq!(made.as_ref(), Ok(layout), "a layout that cannot be made");
            }
        }
        3 => drop(same::<Prepared>(payload)),
        4 => {
            if let Some(refused) = same::<Refused>(payload) {
                words(refused);
            }
        }
        5 => drop(same::<Settled>(payload)),
        6 => drop(same::<Outcome>(payload)),
        7 => drop(same::<Vec<Holding>>(payload)),
        8 => abilities(payload),
        9 => {
            if let Ok(verdict) = Verdict::read(payload) {
                assert!(verdict.against.len() <= 64);
                verdict.against.into_iter().for_each(words);
            }
        }
        10 => state(payload),
        11 => {
            if let Ok(text) = std::str::from_utf8(payload)
                && let Ok(ticket) = Ticket::parse(text)
            {
                let text = ticket.text();
                // Written with everything in it, it may be longer than tickets are.
                let again = Ticket::parse(&text).map(|ticket| ticket.text());
                assert!(again.is_ok_and(|again| again == text) || text.len() > TICKET_MAX);
            }
        }
        _ => {
            let Ok(text) = std::str::from_utf8(payload) else { return };
            if let Ok(endpoint) = text.parse::<Endpoint>() {
                assert_eq!(endpoint.to_string().parse::<Endpoint>().as_ref(), Ok(&endpoint));
            }
            if let Ok(identity) = text.parse::<PeerIdentity>() {
                assert_eq!(identity.to_string().parse::<PeerIdentity>().as_ref(), Ok(&identity));
            }
        }
    }
}

/// A message that is read is written as what is read as the same.
fn same<T: DeserializeOwned + Serialize>(payload: &[u8]) -> Option<T> {
    let message = match parse::<T>(payload) {
        Ok(message) => message,
        Err(error) => {
            assert!(matches!(error, MigrationFault::Protocol(_)), "{error:?}");
            return None;
        }
    };
    let text = written(&message).unwrap();
    let again = parse::<T>(&text)
        .unwrap_or_else(|_| panic!("cannot be read again: {}", String::from_utf8_lossy(&text)));
    assert_eq!(*written(&again).unwrap(), *text);
    Some(message)
}

fn words(refused: Refused) {
    let MigrationFault::PeerRefused { code, detail } = MigrationFault::from(refused) else {
        panic!("a refusal is one")
    };
    assert!(detail.chars().count() <= 300 && !detail.chars().any(char::is_control), "{detail:?}");
    let code = code.as_str();
    assert!(code.len() <= 64 && code.bytes().all(|b| b.is_ascii_graphic()), "{code:?}");
}

fn abilities(payload: &[u8]) {
    let Ok(said) = Abilities::read(payload) else { return };
    let names = [&said.drivers, &said.strategies, &said.suites, &said.missing];
    assert!(names.iter().all(|list| list.len() <= 32) && said.protocol_versions.len() <= 32);
    for name in names.into_iter().flatten() {
        let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
        assert!((1..=64).contains(&name.len()) && name.bytes().all(legal), "{name:?}");
    }
    assert!(
        said.helper_abi.0 <= said.helper_abi.1 && said.max_phys_bits <= 64 && said.phys_bit_reduction <= 64
    );
    assert!(said.c_bit.is_none_or(|bit| bit < 64));
}

fn state(payload: &[u8]) {
    let Ok((head, console, machine)) = StateHead::split(payload) else { return };
    assert_eq!((console.len(), machine.len()), (head.console_bytes as usize, head.machine_bytes as usize));
    let headed = u32::from_le_bytes(*payload.first_chunk().unwrap()) as usize;
    assert_eq!(4 + headed + console.len() + machine.len(), payload.len());
    if let Ok(pages) = head.shared_pages(RamAddr::new(RAM_END)) {
        assert!(pages.iter().all(|page| page.get() < RAM_END / 4096));
        let said: u64 = head.shared.iter().map(|(_, count)| *count).fold(0, u64::saturating_add);
        assert!(pages.len() <= said);
        let outside = head.shared.iter().find(|(first, count)| *count == 0 || first + count > RAM_END / 4096);
        assert_eq!(outside, None);
    }
}

/// Each message once, and near misses of some.
pub fn seeds() -> Vec<Seed> {
    let id = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001);
    let message = |which: u8, text: Vec<u8>| [vec![which], text].concat();
    let said = |which: u8, value: serde_json::Value| message(which, value.to_string().into_bytes());
    let hello = |purpose| Hello { protocol_versions: vec![5, 6], host: "a".into(), purpose };
    let purposes = [
        ("migrate", Purpose::Migrate {}),
        ("stream", Purpose::Stream { session: id, index: 3 }),
        ("resolve", Purpose::Resolve { session: id }),
        ("find", Purpose::Find { guests: vec![id, id] }),
        ("ask", Purpose::Ask {}),
        ("check", Purpose::Check {}),
    ];
    let mut all: Vec<Seed> = purposes
        .map(|(name, purpose)| {
            (format!("hello-{name}"), message(0, serde_json::to_vec(&hello(purpose)).unwrap()))
        })
        .into();
    let block = json!({"name": "ram0", "ram_addr": 0, "size": 8 << 20, "role": "ram",
        "plugs": [{"offset": 0, "gpa": 0, "len": 8 << 20}]});
    let prepare = json!({
        "session": id, "guest": id, "definition": "{}", "layout": [block], "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}},
        "streams": 2, "stream_transport": "sealed", "suite": "aes-256-gcm", "suites": ["aes-256-gcm"], "mask": vec![1; 32],
        "helper_measurement": vec![2; 32], "nonce": vec![3; 32], "public_key": vec![4; 32], "secret": vec![5; 32],
        "readiness": {"reason": "ready", "declaration": null}, "paused": false, "elide_zero": true, "verify": false,
        "stall_timeout_ms": 30_000,
    });
    all.push(("prepare".into(), said(2, prepare.clone())));
    let mut torn = prepare;
    torn["layout"][0]["size"] = json!(4095);
    all.push(("prepare-that-cannot-be".into(), said(2, torn)));
    let refused = json!({"code": "capability_missing", "detail": "no\u{7} room"});
    all.extend([
        ("hello-of-a-later-build".into(), said(0, json!({"protocol_versions": [9], "host": "b", "purpose": {"kind": "dance", "steps": 3}, "more": 1}))),
        ("hello-ack".into(), said(1, json!({"protocol": 5, "protocol_versions": [5], "host": "b"}))),
        ("hello-ack-old".into(), said(1, json!({"protocol": 5, "host": "b"}))),
        ("prepared".into(), said(3, json!({"nonce": vec![1; 32], "public_key": vec![2; 32], "suites": ["aes-256-gcm-siv"]}))),
        ("refused".into(), said(4, refused.clone())),
        ("refused-strange".into(), said(4, json!({"code": "x".repeat(200), "detail": "y".repeat(400)}))),
        ("settled".into(), said(5, json!({"token": vec![7; 160], "verify_us": 3, "reason": refused}))),
        ("outcome-pending".into(), said(6, json!({"kind": "pending"}))),
        ("outcome-committed".into(), said(6, json!({"kind": "committed", "token": [1, 2]}))),
        ("outcome-never".into(), said(6, json!({"kind": "never_committed"}))),
        ("found".into(), said(7, json!(["here", "undecided", "not_here", {"went_to": {"identity": "sha256:00"}}]))),
        ("abilities".into(), said(8, json!({
            "drivers": ["embedded", "qemu"], "strategies": ["shifted"], "helper_abi": [3, 4], "helper_measurement": vec![7; 32],
            "suites": ["aes-256-gcm"], "protocol_versions": [5], "max_phys_bits": 48, "c_bit": 47, "phys_bit_reduction": 1,
            "slot_budget": 509, "missing": ["sev-snp"],
        }))),
        ("verdict".into(), said(9, json!({"against": [refused, refused]}))),
        ("verdict-none".into(), said(9, json!({"against": []}))),
    ]);
    let state = |head: serde_json::Value, rest: &[u8]| {
        let head = head.to_string().into_bytes();
        message(10, [&(head.len() as u32).to_le_bytes()[..], &head, rest].concat())
    };
    all.push(("state-without-its-head".into(), message(10, [&9u32.to_le_bytes()[..], b"{}"].concat())));
    let head = |console: u32, machine: u32, shared: &[(u64, u64)]| json!({"console_end": 9, "console_bytes": console, "machine_bytes": machine, "shared": shared, "labels": {"a": "b"}});
    all.extend([
        ("state".into(), state(head(3, 4, &[(0, 4), (9, 1)]), b"abcdefg")),
        ("state-of-another-length".into(), state(head(3, 5, &[]), b"abcdefg")),
        ("state-that-wraps".into(), state(head(u32::MAX, u32::MAX, &[]), b"")),
        ("state-shares-what-is-no-ram".into(), state(head(0, 0, &[(1 << 18, 1), (u64::MAX, 2)]), b"")),
        ("state-shares-all".into(), state(head(0, 0, &[(0, 1 << 18)]), b"")),
        ("state-shares-nothing".into(), state(head(0, 0, &[(5, 0)]), b"")),
        ("address".into(), message(12, b"[2001:db8::1]:7801".to_vec())),
        ("name".into(), message(12, b"host-b.example.org:7801".to_vec())),
        ("identity".into(), message(12, format!("sha256:{}", "0a".repeat(32)).into_bytes())),
        ("ticket-short".into(), message(11, b"mvmt1.7b7d".to_vec())),
    ]);
    all
}
