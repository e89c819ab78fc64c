//! A minute of the campaign: two daemons, used and broken at random.

use std::time::Duration;

use mirrorvm_tests::campaign::{Options, run};

#[test]
fn a_minute_of_use_and_breakage_breaks_no_promise() {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse().ok());
    let seed = number("MIRRORVM_CAMPAIGN_SEED").unwrap_or(20_261_129);
    let seconds = number("MIRRORVM_CAMPAIGN_SECONDS").unwrap_or(60);
    let report = run(&Options { seed, time: Duration::from_secs(seconds), log: None, without: Vec::new() });
    println!("{report:#?}");
    assert!(report.rounds > 0 && report.steps >= 8, "nothing was done");
}
