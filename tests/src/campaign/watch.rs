//! Watching both hosts all the time: what every guest prints, and whether two hosts say that they run it.
//!
//! A guest's console counts its bytes from the first one on, over migrations. So two machines of one guest
//! show as two texts for one place, and work that is lost or done twice as counters that do not go on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use super::world::NAMES;
use crate::http::Request;

/// Text of one life of a guest (from a start to its end), as far as it was seen.
#[derive(Debug, Default)]
struct Life {
    /// Pieces by their offsets; they neither touch nor overlap.
    pieces: BTreeMap<u64, Vec<u8>>,
    /// Where each host's console was read to.
    read: [u64; 2],
}

/// What was seen of all guests.
#[derive(Debug, Default)]
struct Seen {
    /// By guest's id.
    lives: BTreeMap<String, Life>,
    /// Guests whose next life begins about now: nobody knows which of the two a text is of.
    between: BTreeSet<String>,
    /// How often lives were forgotten: what was asked for before says nothing of the next.
    forgotten: u64,
    violations: Vec<String>,
    looks: u64,
    ticks: u64,
}

/// The watcher; ends with its value.
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Life {
    /// Takes a piece; a violation when it says something else than was read before.
    fn take(&mut self, offset: u64, bytes: &[u8], host: &str) -> Result<(), String> {
        let end = offset + bytes.len() as u64;
        for (at, piece) in &self.pieces {
            let (from, to) = (offset.max(*at), end.min(at + piece.len() as u64));
            if from < to {
                let ours = &bytes[(from - offset) as usize..(to - offset) as usize];
                let theirs = &piece[(from - at) as usize..(to - at) as usize];
                if ours != theirs {
                    return Err(format!(
                        "two texts for {from}..{to}: {host} says {:?}, before it was {:?}",
                        String::from_utf8_lossy(ours),
                        String::from_utf8_lossy(theirs)
                    ));
                }
            }
        }
        // Those that touch become one.
        let (mut start, mut all) = (offset, bytes.to_vec());
        let touching: Vec<u64> = self
            .pieces
            .iter()
            .filter(|(at, p)| **at <= end && **at + p.len() as u64 >= offset)
            .map(|(at, _)| *at)
            .collect();
        for at in touching {
            let piece = self.pieces.remove(&at).unwrap_or_default();
            let piece_end = at + piece.len() as u64;
            let all_end = start + all.len() as u64;
            if at < start {
                let mut longer = piece[..(start - at) as usize].to_vec();
                longer.append(&mut all);
                (start, all) = (at, longer);
            }
            if piece_end > all_end {
                all.extend_from_slice(&piece[(all_end - at) as usize..]);
            }
        }
        self.pieces.insert(start, all);
        Ok(())
    }

    /// Checks the counters of whole lines: ticks go up, pages never go down, no page was found changed.
    fn check(&self) -> Result<u64, String> {
        let mut count = 0;
        let mut last: Option<(u64, u64)> = None;
        for piece in self.pieces.values() {
            let text = String::from_utf8_lossy(piece);
            // The first line may have lost its beginning and the last one its end.
            let whole = text.split_once('\n').map_or("", |(_, rest)| rest);
            let whole = &whole[..whole.rfind('\n').unwrap_or(0)];
            for line in whole.lines().filter(|l| l.starts_with("tick ")) {
                let n: Vec<u64> = line.split(' ').filter_map(|w| w.trim().parse().ok()).collect();
                let [tick, pages, errors] = n[..] else { return Err(format!("a torn line {line:?}")) };
                if errors != 0 {
                    return Err(format!("the guest found pages changed: {line:?}"));
                }
                if let Some((t, p)) = last
                    && (tick <= t || pages < p)
                {
                    return Err(format!("counters go back: tick {t} pages {p}, then {line:?}"));
                }
                last = Some((tick, pages));
                count += 1;
            }
        }
        Ok(count)
    }
}

impl Seen {
    /// The first few are enough.
    fn violates(&mut self, text: String) {
        if self.violations.len() < 20 && !self.violations.contains(&text) {
            self.violations.push(text);
        }
    }
}

/// One look at both hosts.
fn look(sockets: &[PathBuf; 2], seen: &Mutex<Seen>) {
    let list = |side: usize| -> Option<Vec<Value>> {
        let reply = Request::new("GET", "/v1/guests?limit=100").try_send(&sockets[side]).ok()?;
        if reply.status != 200 {
            return None;
        }
        let mut body = reply.json();
        match body["items"].take() {
            Value::Array(items) => Some(items),
            _ => None,
        }
    };
    let (first, other, again) = (list(0), list(1), list(0));
    seen.lock().unwrap().looks += 1;
    // Two requests are not one moment: the first host must have said the same before and after.
    if let (Some(first), Some(other), Some(again)) = (&first, &other, &again) {
        for guest in first.iter().filter(|g| g["state"] == "running") {
            let same = |list: &[Value]| {
                list.iter().find(|g| g["id"] == guest["id"]).is_some_and(|g| g["state"] == "running")
            };
            let unchanged = again
                .iter()
                .any(|g| g["id"] == guest["id"] && g["generation"] == guest["generation"] && same(again));
            if unchanged && same(other) {
                let text = format!("both hosts say that {} runs", guest["name"]);
                seen.lock().unwrap().violates(text);
            }
        }
    }
    for (side, guests) in [(0, again), (1, other)] {
        // Where it was handed over from there is the text of that life; the next one may have begun
        // elsewhere. The judge looks whether anything is printed there still.
        for guest in guests.unwrap_or_default().iter().filter(|g| g["moved_to"].is_null()) {
            if let Err(violation) = read(sockets, side, guest, seen) {
                seen.lock().unwrap().violates(format!("{}: {violation}", guest["name"]));
            }
        }
    }
}

/// Reads what a guest has printed since the last look.
fn read(sockets: &[PathBuf; 2], side: usize, guest: &Value, seen: &Mutex<Seen>) -> Result<(), String> {
    let id = guest["id"].as_str().unwrap_or_default();
    let (from, forgotten) = {
        let seen = seen.lock().unwrap();
        if seen.between.contains(id) {
            return Ok(());
        }
        (seen.lives.get(id).map_or(0, |l| l.read[side]), seen.forgotten)
    };
    let target = format!("/v1/guests/{id}/console?offset={from}&max_bytes=65536");
    let Ok(reply) = Request::new("GET", &target).try_send(&sockets[side]) else { return Ok(()) };
    if reply.status != 200 {
        return Ok(());
    }
    let chunk = reply.json();
    let number = |field: &str| chunk[field].as_u64().unwrap_or_default();
    let mut seen = seen.lock().unwrap();
    if seen.forgotten != forgotten {
        return Ok(());
    }
    // Without a machine there is no console.
    if number("end_offset") == 0 {
        return Ok(());
    }
    if number("end_offset") < from {
        return Err(format!("{} has {} bytes of a text of {from}", NAMES[side], number("end_offset")));
    }
    let data = chunk["data"].as_str().unwrap_or_default();
    if data.is_empty() {
        return Ok(());
    }
    let life = seen.lives.entry(id.to_owned()).or_default();
    life.read[side] = number("next_offset");
    life.take(number("offset"), data.as_bytes(), NAMES[side])?;
    let ticks = life.check()?;
    seen.ticks = seen.ticks.max(ticks);
    Ok(())
}

impl Watch {
    /// Begins to watch.
    pub fn start(sockets: [PathBuf; 2]) -> Self {
        let (seen, ended) = (Arc::<Mutex<Seen>>::default(), Arc::new(AtomicBool::new(false)));
        let (theirs, end) = (Arc::clone(&seen), Arc::clone(&ended));
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                look(&sockets, &theirs);
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Self { seen, ended, thread: Some(thread) }
    }

    /// A guest is to be started: what it prints begins anew, somewhere until [`Watch::forget`].
    pub fn is_started(&self, id: &str) {
        let mut seen = self.seen.lock().unwrap();
        seen.between.insert(id.to_owned());
        seen.forgotten += 1;
    }

    /// What a guest prints from now on is of a new life.
    pub fn forget(&self, id: &str) {
        let mut seen = self.seen.lock().unwrap();
        seen.lives.remove(id);
        seen.between.remove(id);
        seen.forgotten += 1;
    }

    /// What must not be and was seen.
    pub fn violations(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap().violations)
    }

    /// How often both hosts were looked at, and the longest row of counters that was followed.
    pub fn extent(&self) -> (u64, u64) {
        let seen = self.seen.lock().unwrap();
        (seen.looks, seen.ticks)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
