//! What daemons hold in memory beyond the guest's RAM while it moves from one to the other.
//!
//! Two daemons, each a process of its own; their mappings are read again and again (`/proc/PID/smaps`) until
//! the migration has ended. The digests that every run is checked by, 16 bytes a page, are no part of a
//! migration and are taken off. RAM is what lies in mappings that are at least as large as RAM, but never
//! more than RAM has bytes: whatever else lies there, and everything elsewhere, counts as the daemon's,
//! buffers, mailbox, helper and page lists included.

use std::time::{Duration, Instant};

use mirrorvm::host::AuditMode;
use mirrorvm_client::Request;
use mirrorvm_client::blocking::Connection;
use serde_json::json;

use super::daemon::Daemon;
use super::{BenchArgs, BenchError, Row, Target};

const MIB: f64 = (1 << 20) as f64;
/// Most bytes of a daemon, and most of them per byte of RAM.
const MOST: (f64, f64) = (24.0 * MIB, 0.002);
/// What an audit's digests take of it, per byte of RAM: 16 bytes a page.
const DIGESTS: f64 = 16.0 / 4096.0;
const EVERY: Duration = Duration::from_millis(20);

/// Bytes of `smaps` that are not guest RAM of `ram` bytes.
fn beyond(smaps: &str, ram: u64) -> Option<u64> {
    let (mut small, mut large) = (0, 0);
    let (mut size, mut any) = (0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        match key {
            "Size:" => size = value.parse::<u64>().ok()? << 10,
            "Rss:" if size < ram => small += value.parse::<u64>().ok()? << 10,
            // A file that is mapped twice is there once.
            "Pss:" if size >= ram => large += value.parse::<u64>().ok()? << 10,
            _ => continue,
        }
        any = true;
    }
    any.then(|| small + u64::saturating_sub(large, ram))
}

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    let ram = args.sizes().first().copied().ok_or("no size")?;
    let most = (MOST.0 + MOST.1 * ram as f64) / MIB;
    let mut peaks = [Vec::new(), Vec::new()];
    let (mut idle, mut audited) = (Vec::new(), Vec::new());
    for _ in 0..args.runs() {
        let found = one(ram, args.streams(), AuditMode::Never)?;
        idle.push(found.idle as f64 / MIB);
        for (values, peak) in peaks.iter_mut().zip(found.peaks) {
            values.push(peak as f64 / MIB);
        }
        audited.push(one(ram, args.streams(), AuditMode::After)?.peaks[1] as f64 / MIB);
    }
    let [source, destination] = peaks;
    let what = |who: &str| format!("{who} beyond {} MiB of guest RAM, peak of a migration", ram >> 20);
    Ok(vec![
        Row::new("daemon without guests", "MiB", idle),
        Row::new(what("source"), "MiB", source).promised(Target::AtMost(most)),
        Row::new(what("destination"), "MiB", destination).promised(Target::AtMost(most)),
        Row::new(what("destination that keeps digests for an audit,"), "MiB", audited)
            .promised(Target::AtMost(most + DIGESTS * ram as f64 / MIB)),
    ])
}

struct Peaks {
    idle: u64,
    peaks: [u64; 2],
}

fn one(ram: u64, streams: u16, audit: AuditMode) -> Result<Peaks, BenchError> {
    let daemons = [Daemon::start("a")?, Daemon::start("b")?];
    let resident = |daemon: &Daemon| {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", daemon.pid()))?;
        beyond(&smaps, ram).ok_or_else(|| BenchError::from("smaps says nothing"))
    };
    let idle = resident(&daemons[0])?;
    let (mut a, mut b) = (daemons[0].connect()?, daemons[1].connect()?);
    introduce(&mut a, &mut b)?;
    introduce(&mut b, &mut a)?;
    let guest = json!({
        "name": "g",
        "driver": {"kind": "embedded", "vcpus": 1, "workload": {"fill": "random"}},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": ram, "gpa": 0}]},
    });
    a.post("/v1/guests", Some(&guest))?;
    a.post("/v1/guests/g/start", None)?;
    until(|| {
        let console = a.get("/v1/guests/g/console")?;
        Ok(console["data"].as_str().is_some_and(|t| t.contains("tick ")))
    })?;
    // Paused: what the source holds then is what moves, and no page goes twice.
    a.post("/v1/guests/g/pause", None)?;
    let migration = json!({
        "guest": "g", "destination": {"kind": "host", "host": "b"}, "streams": streams, "verify": true,
        "audit": audit.name(),
    });
    let id = a.post("/v1/migrations", Some(&migration))?;
    let path = format!("/v1/migrations/{}", id["id"].as_str().ok_or("a migration without an id")?);
    let mut peaks = [0; 2];
    let end = until_some(|| {
        for (peak, daemon) in peaks.iter_mut().zip(&daemons) {
            *peak = resident(daemon)?.max(*peak);
        }
        let record = a.get(&path)?;
        let ended =
            matches!(record["state"].as_str(), Some("succeeded" | "failed" | "canceled" | "in_doubt"));
        Ok(ended.then_some(record))
    })?;
    if end["state"] != "succeeded" {
        return Err(format!("the migration ended as {end}").into());
    }
    until(|| Ok(b.get(&path)?["state"] == "succeeded"))?;
    let digests = format!("{path}/page-digests");
    let digests = Request::get(digests).answered_up_to(ram / 4096 * 16);
    let of = |connection: &mut Connection| {
        let body = connection.send(&digests)?.into_body();
        if body.len() as u64 != ram / 4096 * 16 {
            return Err(BenchError::from(format!("page digests: {} bytes", body.len())));
        }
        Ok(body)
    };
    if of(&mut a)? != of(&mut b)? {
        return Err("pages differ".into());
    }
    let digests = ram / 4096 * 16;
    Ok(Peaks { idle, peaks: peaks.map(|peak| peak.saturating_sub(digests)) })
}

fn introduce(here: &mut Connection, there: &mut Connection) -> Result<(), BenchError> {
    let host = there.get("/v1/host")?;
    let peer = json!({"name": host["name"], "address": host["peer_address"], "identity": host["identity"]});
    here.post("/v1/hosts", Some(&peer))?;
    Ok(())
}

fn until(mut reached: impl FnMut() -> Result<bool, BenchError>) -> Result<(), BenchError> {
    until_some(|| Ok(reached()?.then_some(())))
}

fn until_some<T>(mut look: impl FnMut() -> Result<Option<T>, BenchError>) -> Result<T, BenchError> {
    let deadline = Instant::now() + Duration::from_secs(300);
    while Instant::now() < deadline {
        if let Some(found) = look()? {
            return Ok(found);
        }
        std::thread::sleep(EVERY);
    }
    Err("nothing came of it in 300 s".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_taken_off_once_and_nothing_else() {
        let mapping = |size: u64, rss: u64, pss: u64| {
            format!(
                "7f00-7f01 rw-p 0 00:00 0\nSize: {size} kB\nKernelPageSize: 4 kB\nRss: {rss} kB\nPss: {pss} kB\n"
            )
        };
        let of = |parts: &[(u64, u64, u64)]| {
            let text: String = parts.iter().map(|(s, r, p)| mapping(*s, *r, *p)).collect();
            beyond(&text, 1024 << 10).map(|bytes| bytes >> 10)
        };
        // Half arrived: all that is in RAM's mapping is RAM.
        assert_eq!(of(&[(1026, 512, 512), (100, 40, 20)]), Some(40));
        // Merged with a mailbox: what RAM cannot hold is the daemon's.
        assert_eq!(of(&[(1100, 1090, 1090), (100, 40, 20)]), Some(66 + 40));
        // Two views of one file, each with half of its proportion.
        assert_eq!(of(&[(1024, 1024, 512), (1024, 1024, 512), (8, 8, 8)]), Some(8));
        // A copy of RAM would be seen.
        assert_eq!(of(&[(1024, 1024, 1024), (1024, 1024, 1024)]), Some(1024));
        assert_eq!(beyond("", 1), None);
        assert_eq!(beyond("Size: x kB", 1), None);
    }
}
