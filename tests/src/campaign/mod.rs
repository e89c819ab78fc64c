//! A campaign: two daemons are used and broken at random for some minutes, and must keep every promise.
//!
//! Owns: the order of steps, the report. What is done is in `actions` and `world`, what is right in `judge`
//! and `watch`. Every step's decisions follow from the seed and the step's number; when things happen is the
//! machine's affair.

mod actions;
mod dice;
mod judge;
mod model;
mod watch;
mod world;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use actions::{ACTIONS, Action, Caller};
use dice::Dice;
use model::Model;
use watch::Watch;
use world::{FAULTS, Fault, World};

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Options {
    /// Seed of all decisions.
    pub seed: u64,
    /// How long it goes on; the round that is under way then is finished and judged.
    pub time: Duration,
    /// Where every step is written to.
    pub log: Option<PathBuf>,
    /// Faults that are left out, by name.
    pub without: Vec<String>,
}

/// Names of all faults.
pub fn faults() -> Vec<String> {
    FAULTS.iter().map(|(_, f)| format!("{f:?}")).collect()
}

/// What was done.
#[derive(Debug, Default)]
pub struct Report {
    /// Steps.
    pub steps: u64,
    /// Rounds: after each everything was judged.
    pub rounds: u64,
    /// How often each thing was done, by name.
    pub done: BTreeMap<String, u64>,
    /// Migrations that succeeded.
    pub succeeded: u64,
    /// Migrations that ended otherwise.
    pub ended: u64,
    /// Syncs that failed.
    pub failed_syncs: i64,
    /// How often both hosts were looked at.
    pub looks: u64,
    /// Actions and faults that never were.
    pub never: Vec<String>,
}

/// Writes what happens, with the time since the beginning.
struct Log {
    began: Instant,
    file: Option<File>,
    last: Vec<String>,
}

impl Log {
    fn say(&mut self, text: &str) {
        let line = format!("{:9.3} {text}", self.began.elapsed().as_secs_f64());
        if let Some(file) = &mut self.file {
            let _ = writeln!(file, "{line}");
        }
        self.last.push(line);
        if self.last.len() > 60 {
            self.last.remove(0);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the last steps:\n{}", self.last.join("\n"));
        }
    }
}

/// Runs one.
///
/// # Panics
/// When a promise is broken, with the seed and the last steps.
pub fn run(options: &Options) -> Report {
    println!("campaign: seed {}, {} s", options.seed, options.time.as_secs());
    let mut world = World::start();
    let mut model = Model::default();
    let mut report = Report::default();
    let file = options.log.as_ref().map(|path| File::create(path).unwrap());
    let mut log = Log { began: Instant::now(), file, last: Vec::new() };
    log.say(&format!("seed {}", options.seed));
    let watch = Watch::start([0, 1].map(|s: usize| world.sides[s].daemon.socket()));
    while log.began.elapsed() < options.time {
        let mut dice = Dice::of_step(options.seed, report.steps);
        let length = 8 + dice.below(16);
        for _ in 0..length {
            report.steps += 1;
            step(&mut world, &mut model, &watch, &mut report, &mut log, options);
        }
        world.lift();
        log.say("everything is lifted");
        judge::judge(&world, &mut model, &watch);
        log.say("judged");
        report.rounds += 1;
    }
    for side in &world.sides {
        for migration in side.daemon.items("/v1/migrations?limit=1000") {
            if migration["direction"] == "outgoing" {
                let counter =
                    if migration["state"] == "succeeded" { &mut report.succeeded } else { &mut report.ended };
                *counter += 1;
            }
        }
    }
    report.failed_syncs = world.failed_syncs();
    report.looks = watch.extent().0;
    // It looks over the sockets that are counted next.
    drop(watch);
    judge::census(&mut world, &model);
    let names = ACTIONS.iter().map(|(_, a)| format!("{a:?}"));
    let possible = FAULTS.iter().filter(|(_, f)| !world.impossible().contains(f));
    report.never = names
        .chain(possible.map(|(_, f)| format!("{f:?}")))
        .filter(|n| !report.done.contains_key(n) && !options.without.contains(n))
        .collect();
    report
}

fn step(
    world: &mut World,
    model: &mut Model,
    watch: &Watch,
    report: &mut Report,
    log: &mut Log,
    options: &Options,
) {
    let mut dice = Dice::of_step(options.seed, report.steps);
    // A daemon that was ended comes back after some steps.
    for side in 0..2 {
        if !world.sides[side].up && dice.once_in(3) {
            world.restart(side);
            log.say(&format!("{} is started again", world::NAMES[side]));
        }
    }
    let (what, said) = if dice.once_in(4) {
        let fault = *dice.weighted(&FAULTS);
        if options.without.contains(&format!("{fault:?}")) {
            return;
        }
        let said = world.make(fault, &mut dice);
        if said.is_some() && matches!(fault, Fault::Kill | Fault::Terminate) {
            model.ended();
        }
        (format!("{fault:?}"), said)
    } else {
        let action: Action = *dice.weighted(&ACTIONS);
        let mut caller = Caller { world, model, watch, step: report.steps };
        let said = caller.act(action, &mut dice);
        (format!("{action:?}"), said)
    };
    if let Some(said) = said {
        log.say(&format!("step {}: {said}", report.steps));
        *report.done.entry(what).or_default() += 1;
    }
    // Things take time to go wrong in.
    if dice.once_in(3) {
        std::thread::sleep(Duration::from_millis(dice.below(400)));
    }
}
