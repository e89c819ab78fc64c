//! Where the time of a migration goes: fault, seal, headers, socket, open, of CPU time; and what streams wait
//! for.
//!
//! The guest of vs-qemu's smallest size, paused. Helpers are threads of their own: what they compute in the
//! guest is sealing and opening, what the kernel does for them is faults of RAM that nobody touched before
//! (and exits, which are few). Streams keep a clock ([`mirrorvm::migration::stages`]): records go from the
//! mailbox to the socket and from the socket to the mailbox, so that the only copies are the kernel's and
//! count as the socket's; what streams do themselves is headers.

use mirrorvm::migration::stages::{self, Reading, Stage};

use super::pair::{Course, Pair};
use super::threads::{Sampler, Thread, is_helper};
use super::{BenchArgs, BenchError, Found, Row};

/// CPU seconds of one migration.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Spent {
    fault: f64,
    seal: f64,
    headers: f64,
    socket: f64,
    open: f64,
}

impl Spent {
    /// `streams`: how many helpers each side has; the source's are older.
    fn new(threads: &[Thread], streams: usize, clocks: &Reading) -> Result<Self, BenchError> {
        let helpers: Vec<_> = threads.iter().filter(|t| is_helper(t)).collect();
        if helpers.len() != 2 * streams {
            return Err(format!("{} helpers were seen, not {}", helpers.len(), 2 * streams).into());
        }
        let cpu = |stages: &[Stage]| stages.iter().map(|s| clocks.of(*s).cpu.as_secs_f64()).sum::<f64>();
        let socket = cpu(&[Stage::Send, Stage::Receive]);
        if socket <= 0.0 {
            return Err("the streams keep no clock".into());
        }
        let (source, destination) = helpers.split_at(streams);
        let user = |of: &[&Thread]| of.iter().map(|t| t.user).sum::<f64>();
        Ok(Self {
            fault: helpers.iter().map(|t| t.system).sum::<f64>() + cpu(&[Stage::Fault]),
            seal: user(source) + cpu(&[Stage::Submit, Stage::Seal]),
            headers: cpu(&[Stage::Hide, Stage::Show]),
            socket,
            open: user(destination) + cpu(&[Stage::Open]),
        })
    }

    fn shares(&self) -> [(&'static str, f64); 5] {
        let all = self.fault + self.seal + self.headers + self.socket + self.open;
        [
            ("fault: first touch of RAM, exits", self.fault),
            ("seal: the source's helpers", self.seal),
            ("headers: hidden, shown, walked over", self.headers),
            ("socket: loopback and its copies, both ends", self.socket),
            ("open: the destination's helpers", self.open),
        ]
        .map(|(name, seconds)| (name, seconds / all * 100.0))
    }

    fn seconds(&self) -> f64 {
        self.fault + self.seal + self.headers + self.socket + self.open
    }
}

pub(super) fn measure(args: &BenchArgs) -> Result<Found, BenchError> {
    let bytes = args.sizes().first().copied().ok_or("no size")?;
    let gib = bytes as f64 / f64::from(1 << 30);
    let course = Course::paused(bytes, args.streams());
    let mut shares: Vec<(&str, Vec<f64>)> = Vec::new();
    let mut waits: Vec<(Stage, Vec<f64>)> = Stage::ALL.iter().map(|s| (*s, Vec::new())).collect();
    let (mut seconds, mut cpu, mut faults) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.runs() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let (moved, threads, clocks) = runtime.block_on(async {
            let pair = Pair::new(course).await?;
            let (sampler, before) = (Sampler::start()?, stages::read());
            let moved = pair.migrate().await;
            let (clocks, threads) = (stages::read().since(&before), sampler.finish()?);
            pair.end().await;
            Ok::<_, BenchError>((moved?, threads, clocks))
        })?;
        let spent = Spent::new(&threads, usize::from(course.streams), &clocks)?;
        for (index, (name, share)) in spent.shares().into_iter().enumerate() {
            if shares.len() <= index {
                shares.push((name, Vec::new()));
            }
            shares[index].1.push(share);
        }
        for (stage, values) in &mut waits {
            values.push(clocks.of(*stage).wall.as_secs_f64() / gib * 1e3 / f64::from(course.streams));
        }
        let helpers = threads.iter().filter(|t| is_helper(t));
        faults.push(helpers.map(|t| t.faults).sum::<u64>() as f64 / gib);
        seconds.push(moved.seconds / gib);
        cpu.push(spent.seconds() / gib);
    }
    let mut rows = vec![
        Row::new("stages: time per GiB", "s", seconds),
        Row::new("stages: CPU time of streams and helpers per GiB", "s", cpu),
    ];
    rows.extend(shares.into_iter().map(|(name, v)| Row::new(format!("of that, {name}"), "%", v)));
    rows.extend(
        waits
            .into_iter()
            .map(|(stage, v)| Row::new(format!("a stream's wall time per GiB: {}", stage.name()), "ms", v)),
    );
    rows.push(Row::new("page faults of helpers per GiB", "1", faults));
    Ok(rows.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(name: &str, user: f64, system: f64) -> Thread {
        Thread { name: name.into(), user, system, ..Thread::default() }
    }

    #[test]
    fn older_helpers_seal_and_younger_open() {
        // Clocks come from the streams: one lap that computes.
        let before = stages::read();
        let mut clock = stages::Clock::start();
        std::hint::black_box((0..2_000_000u64).fold(0u64, |a, b| a.wrapping_mul(31) ^ b));
        clock.lap(Stage::Send);
        let clocks = stages::read().since(&before);
        let threads = [thread("mir0-g", 3.0, 1.0), thread("mirrorvmd", 9.0, 9.0), thread("mir0-g", 2.0, 0.5)];
        let spent = Spent::new(&threads, 1, &clocks).unwrap();
        assert!((spent.seal - 3.0).abs() < 1e-9 && (spent.open - 2.0).abs() < 1e-9);
        assert!((spent.fault - 1.5).abs() < 1e-9 && spent.socket > 0.0);
        let sum: f64 = spent.shares().iter().map(|(_, share)| share).sum();
        assert!((sum - 100.0).abs() < 1e-6);
        assert!(Spent::new(&threads, 2, &clocks).is_err(), "a helper that nobody saw");
        assert!(Spent::new(&threads, 1, &Reading::default()).is_err(), "streams without a clock");
    }
}
