//! The demo's course: two daemons, a driver, and one strategy after the other.

use std::io::Write as _;
use std::time::Duration;

use mirrorvm::chain::chain;
use mirrorvm_client::Client;
use serde_json::{Value, json};

use super::args::{DemoArgs, StrategyChoice};
use super::comparison::{Comparison, Failure, Refusal};
use super::daemons::Stage;
use super::error::{DemoError, doing};
use super::json::text;
use super::report::Report;
use super::setting::Setting;
use super::trial::Trial;

const SOURCE: &str = "demo-source";
pub(super) const DESTINATION: &str = "demo-destination";

/// Longest time for the guest's first lines at the destination, and for the records there to settle.
pub(super) const SETTLED: Duration = Duration::from_secs(60);

/// The two daemons' APIs.
#[derive(Debug)]
pub(super) struct Hosts {
    pub(super) source: Client,
    pub(super) destination: Client,
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Outcome {
    One(Box<Report>),
    All(Comparison),
}

impl Outcome {
    /// One object and a new line.
    pub(super) fn json(&self) -> String {
        match self {
            Self::One(report) => format!("{}\n", report.json()),
            Self::All(comparison) => format!("{}\n", comparison.json()),
        }
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        match self {
            Self::One(report) => report.table(),
            Self::All(comparison) => comparison.table(),
        }
    }

    /// Whether the daemons' logs may say more.
    pub(super) fn logs_may_help(&self) -> bool {
        match self {
            Self::One(_) => false,
            Self::All(comparison) => comparison.failed.iter().any(|f| f.logs),
        }
    }

    /// Whether something was migrated, and everything that was not refused verified.
    pub(super) fn verified(&self) -> bool {
        match self {
            Self::One(report) => report.verified(),
            Self::All(comparison) => comparison.verified(),
        }
    }
}

/// Tells people how it goes on; silent where stdout is for JSON.
#[derive(Clone, Copy, Debug)]
pub(super) struct Voice {
    pub(super) silent: bool,
}

impl Voice {
    pub(super) fn say(self, line: &str) {
        if !self.silent {
            // Who closed stdout does not want to read it.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }
}

/// Starts the daemons and shows what was asked for.
///
/// # Errors
/// A daemon that does not start, a driver that this host does not run; for a single strategy whatever kept it
/// from being shown.
pub(super) async fn run(args: &DemoArgs, stage: &mut Stage) -> Result<Outcome, DemoError> {
    let voice = Voice { silent: args.json };
    voice.say("starting two daemons on loopback");
    let images = args.image_directories();
    let hosts = Hosts {
        source: stage.start(SOURCE, &images).await?,
        destination: stage.start(DESTINATION, &images).await?,
    };
    let asking = "asking for the host's capabilities";
    let can = hosts.source.get("/v1/host/capabilities").await.map_err(doing(asking))?;
    let setting = Setting::choose(args, &can)?;
    if let Some(notice) = setting.notice() {
        voice.say(&notice);
    }
    introduce(&hosts.source, &hosts.destination).await?;
    introduce(&hosts.destination, &hosts.source).await?;

    let methods = args.methods();
    if args.strategy != StrategyChoice::All {
        let method = *methods.first().ok_or(DemoError::Answer { field: "strategy" })?;
        let trial = Trial { hosts: &hosts, setting: &setting, method, voice, shows_plan: true };
        return trial.run().await.map(|report| Outcome::One(Box::new(report)));
    }
    let mut comparison = Comparison::new(&setting);
    for (index, method) in methods.iter().enumerate() {
        voice.say(&format!("\nstrategy {} of {}: {}", index + 1, methods.len(), method.title()));
        let trial = Trial { hosts: &hosts, setting: &setting, method: *method, voice, shows_plan: false };
        let ran = trial.run().await;
        let cleared = trial.clear().await;
        match ran.and_then(|report| cleared.map(|()| report)) {
            Ok(report) => comparison.runs.push(report),
            Err(DemoError::Refused { source, .. }) => {
                voice.say(&format!("refused: {source}"));
                comparison.refused.push(Refusal::new(*method, source));
            }
            Err(error) => {
                let why = chain(&error);
                super::note!("{}: {why}", method.title());
                comparison.failed.push(Failure { method: *method, why, logs: error.logs_may_help() });
            }
        }
    }
    comparison.advise(&hosts.source.get("/v1/strategies").await.map_err(doing("asking for the strategies"))?);
    Ok(Outcome::All(comparison))
}

/// Makes `there` known at `here`.
async fn introduce(here: &Client, there: &Client) -> Result<(), DemoError> {
    let host = there.get("/v1/host").await.map_err(doing("asking for a host"))?;
    let name = text(&host, "name")?;
    let body: Value = json!({"name": name, "address": host["peer_address"], "identity": host["identity"]});
    here.post("/v1/hosts", Some(&body)).await.map_err(doing("introducing the hosts"))?;
    Ok(())
}
