//! A host's state directory that somebody or something damaged: what was acknowledged is there, or the daemon says what
//! is missing and does not start.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use mirrorvm_tests::{Daemon, embedded};
use serde_json::{Value, json};

const FILES: [&str; 4] = ["mirrorvm.db", "mirrorvm.db-wal", "mirrorvm.db-shm", "mirrorvm.mark"];
const GUESTS: usize = 30;

fn emulated(name: &str) -> Value {
    let mut guest = embedded(name, 8, 0);
    guest["driver"]["kind"] = json!("emulated");
    guest
}

fn seeded() -> impl FnMut(usize) -> usize {
    let seed = std::env::var("MIRRORVM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random: u64 = seed.unwrap_or(0x6d69_7272_6f72);
    println!("seed {random} (MIRRORVM_TEST_SEED)");
    move |below| {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below.max(1) as u64) as usize
    }
}

fn files(state: &Path) -> BTreeMap<&'static str, Vec<u8>> {
    FILES.into_iter().filter_map(|name| Some((name, fs::read(state.join(name)).ok()?))).collect()
}

fn put(state: &Path, files: &BTreeMap<&'static str, Vec<u8>>) {
    for name in FILES {
        match files.get(name) {
            Some(bytes) => {
                fs::write(state.join(name), bytes).unwrap();
                fs::set_permissions(state.join(name), fs::Permissions::from_mode(0o600)).unwrap();
            }
            None => drop(fs::remove_file(state.join(name))),
        }
    }
}

#[test]
fn what_was_acknowledged_is_there_after_any_damage_or_the_daemon_says_what_is_missing() {
    let mut next = seeded();
    let mut d = Daemon::start("a");
    for n in 0..GUESTS {
        let _ = d.post("/v1/guests", &emulated(&format!("g{n}"))).expect(201);
    }
    d.kill();
    let state = d.state_dir();
    let good = files(&state);
    let directory = state.to_string_lossy().into_owned();
    let (mut whole, mut refused) = (0, 0);
    let removals = good.keys().map(|name| (*name, None));
    let random: Vec<(&str, Option<usize>)> = (0..14)
        .map(|_| {
            let names: Vec<&&str> = good.keys().filter(|name| !good[*name].is_empty()).collect();
            let name = names[next(names.len())];
            (*name, Some(next(good[name].len() * 8)))
        })
        .collect();
    for (round, (name, bit)) in removals.chain(random).enumerate() {
        let mut damaged = good.clone();
        match bit {
            None => drop(damaged.remove(name)),
            Some(bit) if round % 3 == 0 => damaged.get_mut(name).unwrap().truncate(bit / 8),
            Some(bit) => damaged.get_mut(name).unwrap()[bit / 8] ^= 1 << (bit % 8),
        }
        put(&state, &damaged);
        // The one that only looks says the same, and changes nothing.
        let (code, out, said) = d.command_line(&["state", "check", &directory]);
        let after = files(&state);
        // Without a log there is an empty one afterwards.
        let content = |files: &BTreeMap<&str, Vec<u8>>, f| files.get(f).cloned().unwrap_or_default();
        for file in ["mirrorvm.db", "mirrorvm.db-wal", "mirrorvm.mark"] {
            assert_eq!(
                content(&after, file),
                content(&damaged, file),
                "{name} {bit:?}: looking changed {file}"
            );
        }
        if code == 0 {
            whole += 1;
            assert!(out.starts_with("whole: "), "{out}");
            d.restart();
            let found = d.items("/v1/guests?limit=200");
            let names = |list: &[Value]| {
                let mut names: Vec<String> =
                    list.iter().map(|g| g["name"].as_str().unwrap().into()).collect();
                names.sort();
                names
            };
            let mut wanted: Vec<String> = (0..GUESTS).map(|n| format!("g{n}")).collect();
            wanted.sort();
            assert_eq!(names(&found), wanted, "{name} {bit:?}");
            d.kill();
        } else {
            refused += 1;
            let told = d.restart_refused();
            for said in [&said, &told] {
                let names_it = said.contains("mirrorvm.db") || said.contains("mirrorvm.mark");
                let helps =
                    said.contains("mirrorvmd state restore") || said.contains("not a mirrorvm database");
                assert!(names_it && helps, "{name} {bit:?}: {said}");
            }
        }
    }
    println!("{whole} whole, {refused} refused");
    assert!(refused >= 3, "the log, the database and the mark are each missed");
    put(&state, &good);
    d.restart();
    assert_eq!(d.items("/v1/guests?limit=200").len(), GUESTS);
}

#[test]
fn a_start_after_any_kill_is_a_healthy_one() {
    let mut next = seeded();
    let mut d = Daemon::start("a");
    let directory = d.state_dir().to_string_lossy().into_owned();
    let mut made = 0;
    for round in 0..6 {
        for _ in 0..next(12) {
            let _ = d.post("/v1/guests", &emulated(&format!("g{made}"))).expect(201);
            made += 1;
        }
        if round == 3 {
            assert!(d.terminate().success());
        } else {
            d.kill();
        }
        let (code, out, said) = d.command_line(&["state", "check", &directory]);
        assert!(code == 0 && out.starts_with("whole: "), "{said}");
        d.restart();
        assert_eq!(d.items("/v1/guests?limit=200").len(), made);
        let (code, out, said) = d.command_line(&["state", "check", &directory]);
        assert!(code == 0 && out.contains("a daemon has it open"), "{said}");
    }
}
