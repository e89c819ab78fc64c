//! The API of a host with ten thousand guests: one of them, a page, definitions, many connections, many
//! followers, what it holds in memory and how long it takes to start again; against the same with fewer
//! guests, against libvirt's RPC and, where there is one, against LXD's REST API.
//!
//! Owns: what is asked of the daemon and how it is timed. Must not know: how libvirt and LXD are driven.

use std::sync::{Barrier, mpsc};
use std::time::{Duration, Instant};

use mirrorvm_client::Request;
use mirrorvm_client::blocking::{Client, Connection};
use serde_json::json;

use super::api::{Libvirt, define, expect, median};
use super::daemon::Daemon;
use super::lxd::{CONTAINERS, Lxd};
use super::report::median as middle;
use super::{BenchArgs, BenchError, Found, Row, Target, ratios};

/// Room for everybody who connects here: a principal has half of the streams, streams a quarter of the
/// connections.
const LIMITS: [(&str, &str); 2] =
    [("MIRRORVM_LIMITS_CONNECTIONS", "2048"), ("MIRRORVM_LIMITS_STREAMS", "512")];
/// Clients that define at once.
const CLIENTS: usize = 32;
/// How long a follower waits for what it is to be sent; a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// How much of everything.
struct Size {
    few: usize,
    many: usize,
    reads: usize,
    connections: usize,
    reads_each: usize,
    followers: usize,
    changes: usize,
}

const FULL: Size = Size {
    few: 1000,
    many: 10_000,
    reads: 500,
    connections: 256,
    reads_each: 40,
    followers: 200,
    changes: 100,
};
const SMOKE: Size =
    Size { few: 20, many: 100, reads: 20, connections: 16, reads_each: 4, followers: 8, changes: 4 };

pub(super) fn measure(args: &BenchArgs) -> Result<Found, BenchError> {
    let size = if args.smoke { &SMOKE } else { &FULL };
    let (few, many) = (size.few, size.many);
    let libvirt = Libvirt::start();
    let lxd = Lxd::start();
    let mut daemon = Daemon::start_with("many", &LIMITS)?;
    // What the first requests bring into memory is no guest's.
    all_define(&daemon, "first", CLIENTS)?;
    let empty = resident(&daemon)?;
    all_define(&daemon, "g", few)?;
    let page = Request::get("/v1/guests?limit=100");
    let one = Request::get(format!("/v1/guests/g{}", few / 2));
    let runs = args.runs() as usize;
    let of_few = (0..runs).map(|_| read(&daemon, &page, size.reads)).collect::<Result<Vec<_>, _>>()?;
    let begun = Instant::now();
    all_define_from(&daemon, "g", few, many)?;
    let rate = (many - few) as f64 / begun.elapsed().as_secs_f64();
    let each = (resident(&daemon)?.saturating_sub(empty)) as f64 / many as f64 / 1024.0;
    let (mut gets, mut of_many, mut by_resource) = (vec![], vec![], vec![]);
    let (mut p50, mut p99) = (vec![], vec![]);
    let (mut sse50, mut sse99, mut delivered) = (vec![], vec![], vec![]);
    let (mut theirs, mut their_list, mut their_rate) = (vec![], vec![], vec![]);
    let (mut lxds, mut lxds_list) = (vec![], vec![]);
    let told = Request::get(format!("/v1/events?resource=g{}", few / 2));
    for run in 0..runs {
        gets.push(read(&daemon, &one, size.reads)?);
        of_many.push(read(&daemon, &page, size.reads)?);
        by_resource.push(read(&daemon, &told, size.reads)?);
        let times = crowd(&daemon, &one, size)?;
        p50.push(at(&times, 0.5) * 1e3);
        p99.push(at(&times, 0.99) * 1e3);
        let (times, share) = follow(&daemon, size, run)?;
        sse50.push(at(&times, 0.5) * 1e3);
        sse99.push(at(&times, 0.99) * 1e3);
        delivered.push(share * 100.0);
        if let Ok(libvirt) = &libvirt {
            let found = libvirt.many(size.reads, many, CLIENTS)?;
            theirs.push(found.info_us / 1e3);
            their_list.push(found.list_ms);
            their_rate.extend(found.defined_per_second);
        }
        if let Ok(lxd) = &lxd {
            let (one, list) = lxd.once(size.reads)?;
            lxds.push(one);
            lxds_list.push(list);
        }
    }
    let mut restarts = Vec::new();
    for _ in 0..runs {
        let begun = Instant::now();
        daemon.again()?;
        restarts.push(begun.elapsed().as_secs_f64());
    }
    let mut found = Found::from(vec![
        Row::new(format!("of {many} guests: GET one, p50"), "ms", gets.clone()),
        Row::new(format!("of {many} guests: a page of 100, p50"), "ms", of_many.clone()),
        Row::new(format!("a page of 100: of {many} guests / of {few}"), "ratio", ratios(&of_many, &of_few))
            .promised(Target::AtMost(1.5)),
        Row::new(format!("of {many} guests: events of one, p50"), "ms", by_resource),
        Row::new(format!("definitions up to {many}, {CLIENTS} clients at once"), "1/s", vec![rate]),
        Row::new(format!("GET one, {} connections, p50", size.connections), "ms", p50),
        Row::new(format!("GET one, {} connections, p99", size.connections), "ms", p99),
        Row::new(format!("{} followers: events delivered", size.followers), "%", delivered)
            .promised(Target::AtLeast(100.0)),
        Row::new(format!("{} followers: from the request to the event, p50", size.followers), "ms", sse50),
        Row::new(format!("{} followers: from the request to the event, p99", size.followers), "ms", sse99),
        Row::new("memory for each guest", "KiB", vec![each]).promised(Target::AtMost(4.0)),
        Row::new(format!("killed, then ready again with {many} guests"), "s", restarts)
            .promised(Target::AtMost(1.0)),
    ]);
    match libvirt {
        Ok(_) => found.rows.extend([
            Row::new("libvirt: virDomainGetInfo, p50", "ms", theirs.clone()),
            Row::new(format!("libvirt: listing all of {many} domains"), "ms", their_list.clone()),
            Row::new(
                format!("libvirt: definitions up to {many}, {CLIENTS} clients at once"),
                "1/s",
                their_rate,
            ),
            Row::new(format!("of {many}: one, ours / libvirt"), "ratio", ratios(&gets, &theirs)),
            Row::new(
                format!("of {many}: a page of 100 / libvirt's list"),
                "ratio",
                ratios(&of_many, &their_list),
            ),
        ]),
        Err(why) => found.skipped.push(format!("ten thousand guests against libvirt: {why}")),
    }
    match lxd {
        Ok(_) => found.rows.extend([
            Row::new("LXD: GET one container, p50", "ms", lxds.clone()),
            Row::new(format!("LXD: listing all of {CONTAINERS} containers"), "ms", lxds_list.clone()),
            Row::new(format!("of {many}: one, ours / LXD's of {CONTAINERS}"), "ratio", ratios(&gets, &lxds)),
            Row::new(
                format!("of {many}: a page of 100 / LXD's list of {CONTAINERS}"),
                "ratio",
                ratios(&of_many, &lxds_list),
            ),
        ]),
        Err(why) => found.skipped.push(format!("ten thousand guests against LXD: {why}")),
    }
    Ok(found)
}

/// The median of so many reads, milliseconds.
fn read(daemon: &Daemon, what: &Request, reads: usize) -> Result<f64, BenchError> {
    let mut client = daemon.connect()?;
    expect(&client.exchange(what)?)?;
    Ok(median(reads, || expect(&client.exchange(what)?).map(drop))? / 1e3)
}

fn all_define(daemon: &Daemon, name: &str, count: usize) -> Result<(), BenchError> {
    all_define_from(daemon, name, 0, count)
}

/// Defines guests `from` to `to` by several clients at once.
fn all_define_from(daemon: &Daemon, name: &str, from: usize, to: usize) -> Result<(), BenchError> {
    let clients = (0..CLIENTS).map(|_| daemon.connect()).collect::<Result<Vec<_>, _>>()?;
    at_once(clients, |c, client| {
        (from + c..to).step_by(CLIENTS).try_for_each(|n| define(client, &format!("{name}{n}")))
    })
    .map(drop)
}

/// Has every client do something in a thread of its own.
fn at_once<T: Send>(
    clients: Vec<Connection>,
    act: impl Fn(usize, &mut Connection) -> Result<T, BenchError> + Sync,
) -> Result<Vec<T>, BenchError> {
    std::thread::scope(|s| {
        let act = &act;
        let run = |(c, mut client): (usize, Connection)| s.spawn(move || act(c, &mut client));
        let threads: Vec<_> = clients.into_iter().enumerate().map(run).collect();
        threads.into_iter().map(|t| t.join().map_err(|_| "a client panicked")?).collect()
    })
}

/// Seconds of reads over many connections that are kept and all used at once; sorted.
fn crowd(daemon: &Daemon, what: &Request, size: &Size) -> Result<Vec<f64>, BenchError> {
    let clients = (0..size.connections).map(|_| daemon.connect()).collect::<Result<Vec<_>, _>>()?;
    let start = Barrier::new(size.connections);
    let times = at_once(clients, |_, client| {
        let first = client.exchange(what);
        start.wait();
        expect(&first?)?;
        let one = |_| {
            let begun = Instant::now();
            expect(&client.exchange(what)?)?;
            Ok(begun.elapsed().as_secs_f64())
        };
        (0..size.reads_each).map(one).collect::<Result<Vec<_>, BenchError>>()
    })?;
    Ok(sorted(times.into_iter().flatten()))
}

/// Followers of all events, while guests are changed one after the other: seconds from before the request to
/// the event, sorted, and which share of the events came.
fn follow(daemon: &Daemon, size: &Size, run: usize) -> Result<(Vec<f64>, f64), BenchError> {
    let epoch = Instant::now();
    let label = format!("at{run}");
    let (opened, open) = mpsc::channel();
    let times = std::thread::scope(|s| {
        let mut threads = Vec::with_capacity(size.followers);
        for _ in 0..size.followers {
            let (opened, label) = (opened.clone(), label.as_str());
            threads.push(s.spawn(move || -> Result<Vec<f64>, BenchError> {
                let client = Client::new(mirrorvm_client::Client::local(daemon.socket()))?;
                let request = Request::get(format!("/v1/events/stream?type=guest.updated&label={label}"));
                let stream = client.events(&request);
                opened.send(())?;
                let (mut stream, mut times) = (stream?, Vec::new());
                while times.len() < size.changes && epoch.elapsed() < PATIENCE {
                    let Some(event) = stream.next()? else { break };
                    let now = epoch.elapsed().as_nanos();
                    // Bookmarks have no labels.
                    let Some(data) = event.json() else { continue };
                    let sent = data["data"]["labels"][label].as_str().and_then(|at| at.parse().ok());
                    times.extend(sent.map(|at: u128| now.saturating_sub(at) as f64 / 1e9));
                }
                Ok(times)
            }));
        }
        for _ in 0..size.followers {
            open.recv_timeout(PATIENCE).map_err(|_| "a follower does not come to its stream")?;
        }
        let mut client = daemon.connect()?;
        for n in 0..size.changes {
            let at = epoch.elapsed().as_nanos().to_string();
            let body = json!({"labels": {&label: at}});
            let patch = Request::patch(format!("/v1/guests/g{n}")).merge_patch(&body);
            client.send(&patch)?;
        }
        let join = |t: std::thread::ScopedJoinHandle<'_, _>| t.join().map_err(|_| "a follower panicked")?;
        threads.into_iter().map(join).collect::<Result<Vec<_>, BenchError>>()
    })?;
    let times = sorted(times.into_iter().flatten());
    let share = times.len() as f64 / (size.followers * size.changes) as f64;
    Ok((times, share))
}

fn sorted(times: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    times
}

/// The value below which a share of sorted ones lies.
fn at(sorted: &[f64], share: f64) -> f64 {
    if share == 0.5 {
        return middle(sorted);
    }
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// Bytes of the daemon that lie in memory.
fn resident(daemon: &Daemon) -> Result<u64, BenchError> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kib: u64 = line.split_whitespace().next().ok_or("an empty VmRSS")?.parse()?;
    Ok(kib << 10)
}
