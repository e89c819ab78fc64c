//! `tests/campaign`: see the library's module of that name.
#![allow(clippy::unwrap_used, reason = "a harness fails by panicking, with the place")]

use std::process::ExitCode;
use std::time::Duration;

use mirrorvm_tests::campaign::{Options, faults, run};

const USAGE: &str = "usage: tests/campaign [--seed N] [--minutes M] [--log FILE] [--without FAULT,...]

Uses and breaks two daemons at random for M minutes (1) and checks that every promise holds; a broken one ends it with
the seed and the last steps. The same seed decides the same.";

fn main() -> ExitCode {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_secs());
    let mut options = Options { seed: since, time: Duration::from_secs(60), log: None, without: Vec::new() };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next();
        let taken = match (argument.as_str(), &value) {
            ("--seed", Some(v)) => v.parse().map(|n| options.seed = n).is_ok(),
            ("--minutes", Some(v)) => v
                .parse()
                .ok()
                .and_then(|m: f64| Duration::try_from_secs_f64(m * 60.0).ok())
                .map(|t| options.time = t)
                .is_some(),
            ("--log", Some(v)) => {
                options.log = Some(v.into());
                true
            }
            ("--without", Some(v)) => {
                options.without = v.split(',').map(str::to_owned).collect();
                options.without.iter().all(|w| faults().contains(w))
            }
            _ => false,
        };
        if !taken {
            eprintln!("{USAGE}\n\nFaults: {}", faults().join(", "));
            return ExitCode::from(2);
        }
    }
    let long = options.time >= Duration::from_secs(300);
    let report = run(&options);
    println!("{report:#?}");
    // A long run in which something never was shows less than it says.
    if long && !report.never.is_empty() {
        eprintln!("never done: {:?}", report.never);
        return ExitCode::FAILURE;
    }
    println!("campaign: seed {}, clean", options.seed);
    ExitCode::SUCCESS
}
