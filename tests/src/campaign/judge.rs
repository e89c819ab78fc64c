//! The oracle: what must hold once every fault is lifted.
//!
//! Never two running, never none without a record that says why; what was acknowledged is there; every change
//! is in the audit log once, with its outcome; in the end the daemons hold what they held in the beginning.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::model::{Doing, Model, There};
use super::watch::Watch;
use super::world::{NAMES, World};
use crate::daemon::{Census, Daemon};
use crate::guest::is_terminal;
use crate::wait::{until, until_some};

/// Longest time until everything has come to an end by itself, in seconds: generous, machines are slow.
const SETTLE: u64 = 300;
/// Time in which tokens settle what they can.
const TOKENS: Duration = Duration::from_secs(30);
/// Memory that a daemon may keep beside what a fresh one has.
const KEPT_KIB: u64 = 64 << 10;

/// All items of a list.
fn all(daemon: &Daemon, path: &str) -> Vec<Value> {
    let (mut items, mut token) = (Vec::new(), String::new());
    loop {
        let page = daemon.read(&format!("{path}?limit=200{token}"));
        items.extend(page["items"].as_array().unwrap().iter().cloned());
        match page["next_page_token"].as_str() {
            Some(next) => token = format!("&page_token={next}"),
            None => return items,
        }
    }
}

/// Where hosts are not trusted only a token settles a doubt, and a destination that was killed between START
/// and COMMIT has none: then an administrator looks at both hosts and says what he sees.
fn administer(world: &World) {
    for (side, there) in [(0, 1), (1, 0)].map(|(a, b)| (&world.sides[a].daemon, &world.sides[b].daemon)) {
        let doubts = all(side, "/v1/migrations");
        for doubt in doubts.iter().filter(|m| m["state"] == "in_doubt" && m["direction"] == "outgoing") {
            let (id, guest) = (doubt["id"].as_str().unwrap(), doubt["guest_name"].as_str().unwrap());
            let other = there.get(&format!("/v1/migrations/{id}"));
            let failed_there =
                other.status == 404 || (other.status == 200 && other.json()["state"] == "failed");
            if !failed_there || ["running", "paused"].contains(&there.guest_state(guest).as_str()) {
                continue;
            }
            let word = json!({"kind": "word", "outcome": "never_committed", "confirm": guest,
                "reason": "the destination was ended before it committed"});
            let told = side.post(&format!("/v1/migrations/{id}/resolution"), &word);
            // A token may have come meanwhile.
            assert!([202, 409].contains(&told.status), "{}: {}", told.status, told.text());
            println!("campaign: an administrator settles {id} of {guest} at {}: {}", side.name, told.status);
        }
    }
}

/// Waits until every migration at both hosts has ended and no guest is between states.
fn settle(world: &World) {
    // Tokens settle nearly all doubts, and soon.
    let mut looks = Instant::now() + TOKENS;
    for side in &world.sides {
        let (d, name) = (&side.daemon, &side.daemon.name);
        let mut going = Vec::new();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until(&format!("everything at {name} has ended"), SETTLE, || {
                if Instant::now() >= looks {
                    administer(world);
                    looks = Instant::now() + TOKENS;
                }
                going = all(d, "/v1/migrations").into_iter().filter(|m| !is_terminal(&m["state"])).collect();
                let guests = all(d, "/v1/guests");
                going.extend(guests.into_iter().filter(|g| {
                    ["starting", "stopping", "incoming", "in_doubt"].iter().any(|s| g["state"] == *s)
                        || !g["migration"].is_null()
                }));
                going.is_empty()
            });
        }));
        assert!(ended.is_ok(), "at {name} this does not end: {going:#?}");
        until(&format!("{name} says that it is ready"), SETTLE, || d.get("/readyz").status == 200);
    }
}

/// Checks everything that must hold while nothing goes on.
pub fn judge(world: &World, model: &mut Model, watch: &Watch) {
    settle(world);
    let records: [Vec<Value>; 2] = [0, 1].map(|s| all(&world.sides[s].daemon, "/v1/guests"));
    guests(world, model, watch, &records);
    migrations(world);
    let made: BTreeSet<String> =
        records.iter().flatten().map(|g| format!("/v1/guests/{}", g["id"].as_str().unwrap())).collect();
    audit(world, model, &made);
    for (side, tokens) in model.tokens.iter().enumerate() {
        let there: BTreeSet<String> = all(&world.sides[side].daemon, "/v1/tokens")
            .iter()
            .map(|t| t["id"].as_str().unwrap().to_owned())
            .collect();
        for token in tokens.iter() {
            assert!(there.contains(token), "token {token} at {} was acknowledged and is gone", NAMES[side]);
        }
    }
    let violations = watch.violations();
    assert!(violations.is_empty(), "seen on the way: {violations:#?}");
}

fn guests(world: &World, model: &mut Model, watch: &Watch, records: &[Vec<Value>; 2]) {
    let names: BTreeSet<String> =
        records.iter().flatten().map(|g| g["name"].as_str().unwrap().to_owned()).collect();
    for name in &names {
        assert!(model.guests.contains_key(name), "nobody asked for a guest {name}");
    }
    for (name, guest) in &mut model.guests {
        // Where it is; a record of where it went does not count.
        let homes: Vec<(usize, &Value)> = (0..2)
            .flat_map(|side| records[side].iter().map(move |r| (side, r)))
            .filter(|(_, r)| r["name"] == name.as_str() && r["moved_to"].is_null())
            .collect();
        assert!(homes.len() < 2, "{name} is at both hosts: {homes:#?}");
        let Some((side, record)) = homes.first().copied() else {
            assert_ne!(guest.there, There::Yes, "{name} was acknowledged and is nowhere");
            guest.there = There::No;
            continue;
        };
        assert_ne!(
            guest.there,
            There::No,
            "{name} was not to be, or not any more, and is at {}",
            NAMES[side]
        );
        guest.there = There::Yes;
        guest.id = record["id"].as_str().map(str::to_owned);
        let label = record["labels"]["n"].as_str().map(str::to_owned);
        let known = label == guest.label || label.as_ref().is_some_and(|l| guest.labels_maybe.contains(l));
        assert!(
            known,
            "{name} at {} has the label {label:?}; acknowledged was {:?}, sent since {:?}",
            NAMES[side], guest.label, guest.labels_maybe
        );
        guest.label = label;
        guest.labels_maybe.clear();
        let state = record["state"].as_str().unwrap();
        let told = !record["error"].is_null();
        let truthful = match (guest.doing, state) {
            (Doing::Unknown, "running" | "paused" | "stopped") => true,
            (Doing::Unknown | Doing::Started, "failed") => told,
            (Doing::Started | Doing::Runs, "running") | (Doing::Paused, "paused") => true,
            (Doing::Stopped, "stopped") => true,
            _ => false,
        };
        assert!(truthful, "{name} should be {:?} and is {state}: {record:#}", guest.doing);
        guest.doing = match state {
            "running" => Doing::Runs,
            "paused" => Doing::Paused,
            _ => Doing::Stopped,
        };
        if state == "running" {
            let ticks = world.sides[side].daemon.ticks(name).map_or(0, |t| t.number);
            let there = world.sides[1 - side].daemon.get(&format!("/v1/guests/{name}/console?max_bytes=1"));
            let end = |r: &crate::Reply| (r.status == 200).then(|| r.json()["end_offset"].clone());
            let before = end(&there);
            world.sides[side].daemon.ticks_beyond(name, ticks);
            let there = world.sides[1 - side].daemon.get(&format!("/v1/guests/{name}/console?max_bytes=1"));
            assert_eq!(before, end(&there), "{name} prints at {} too", NAMES[1 - side]);
        } else if let Some(id) = &guest.id {
            // It has ended; the next start is another life.
            if state != "paused" {
                watch.forget(id);
            }
        }
    }
}

/// Both hosts say the same of a migration.
fn migrations(world: &World) {
    let [ours, theirs] = [0, 1].map(|s| {
        let list = all(&world.sides[s].daemon, "/v1/migrations");
        list.into_iter().map(|m| (m["id"].as_str().unwrap().to_owned(), m)).collect::<BTreeMap<_, _>>()
    });
    for (id, one) in &ours {
        if let Some(other) = theirs.get(id) {
            let same = (one["state"] == "succeeded") == (other["state"] == "succeeded");
            assert!(same, "of one migration {one:#} and {other:#}");
        } else {
            assert!(
                one["state"] != "succeeded" || one["direction"] == "incoming",
                "{id} succeeded and the destination knows nothing of it"
            );
        }
        for record in [Some(one), theirs.get(id)].into_iter().flatten() {
            assert!(
                record["state"] != "failed" || !record["error"].is_null(),
                "it failed and nobody says why: {record:#}"
            );
            let internal = record["error"]["code"] == "internal";
            assert!(!internal, "{record:#}");
        }
    }
}

/// Every acknowledged change is in the log with its outcome, once; everything that is there is in the log as
/// made.
fn audit(world: &World, model: &mut Model, made: &BTreeSet<String>) {
    let mut noted = BTreeSet::new();
    for (side, acknowledged) in model.acknowledged.iter_mut().enumerate() {
        let d = &world.sides[side].daemon;
        let (mut entries, mut before) = (Vec::new(), String::new());
        loop {
            let page = d.read(&format!("/v1/audit-log?limit=500{before}"));
            entries.extend(page["items"].as_array().unwrap().iter().cloned());
            match page["next_before"].as_u64() {
                Some(next) => before = format!("&before={next}"),
                None => break,
            }
        }
        let numbers: Vec<u64> = entries.iter().map(|e| e["seq"].as_u64().unwrap()).collect();
        let whole: Vec<u64> = (1..=numbers.len() as u64).rev().collect();
        assert_eq!(numbers, whole, "numbers of {}'s audit log have gaps", NAMES[side]);
        let mut by_request: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        for entry in &entries {
            by_request.entry(entry["request_id"].as_str().unwrap()).or_default().push(entry);
            if entry["outcome"]["status"] == 201
                && let Some(location) = entry["location"].as_str()
            {
                noted.insert(location.to_owned());
            }
        }
        for change in acknowledged.drain(..) {
            let found = by_request.get(change.request.as_str()).map_or(&[][..], Vec::as_slice);
            assert_eq!(
                found.len(),
                1,
                "{}: entries of {} at {}: {found:#?}",
                change.what,
                change.request,
                NAMES[side]
            );
            assert_eq!(found[0]["outcome"]["status"], change.status, "{}: {:#}", change.what, found[0]);
        }
    }
    for location in made {
        assert!(noted.contains(location), "{location} is there and no audit log says that it was made");
    }
}

fn memory_kib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Waits until a daemon holds the same over some looks: threads that idle go away after a while.
fn at_rest(daemon: &Daemon, wanted: Option<&Census>) -> Census {
    let (mut last, mut same) = (daemon.census(), 0);
    until_some(&format!("{} holds what it should: {wanted:?}", daemon.name), 90, || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let now = daemon.census();
        same = if now == last { same + 1 } else { 0 };
        last = now.clone();
        match wanted {
            Some(wanted) => {
                (now.fds <= wanted.fds && now.threads <= wanted.threads && now.memfds == 0).then_some(now)
            }
            // The runtime's spare threads end after ten seconds.
            None => (same > 120).then_some(now),
        }
    })
}

/// With every guest gone, daemons hold no more than fresh ones do.
pub fn census(world: &mut World, model: &Model) {
    for name in model.guests.keys() {
        for side in &world.sides {
            if side.daemon.guest_state(name) == "absent" {
                continue;
            }
            let _ = side.daemon.act(&format!("/v1/guests/{name}/stop"));
            until(&format!("{name} is gone from {}", side.daemon.name), SETTLE, || {
                [204, 404].contains(&side.daemon.delete(&format!("/v1/guests/{name}")).status)
            });
        }
    }
    let worn = [0, 1].map(|s| (at_rest(&world.sides[s].daemon, None), memory_kib(&world.sides[s].daemon)));
    for (side, (worn, memory)) in worn.into_iter().enumerate() {
        let d = &mut world.sides[side].daemon;
        assert!(d.terminate().success(), "{} ended badly", NAMES[side]);
        d.restart();
        let fresh = at_rest(d, None);
        let fresh_memory = memory_kib(d);
        println!("{}: {worn:?}, {memory} KiB; fresh {fresh:?}, {fresh_memory} KiB", NAMES[side]);
        assert!(
            worn.fds <= fresh.fds && worn.threads <= fresh.threads && worn.children <= fresh.children,
            "{} holds {worn:?}, a fresh one {fresh:?}",
            NAMES[side]
        );
        assert_eq!((worn.memfds, worn.kvm), (fresh.memfds, fresh.kvm), "{}", NAMES[side]);
        assert!(
            memory <= fresh_memory + KEPT_KIB,
            "{} keeps {memory} KiB, a fresh one {fresh_memory}",
            NAMES[side]
        );
    }
}
