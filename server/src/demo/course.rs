//! The demo's steps in order.

use std::io::Write as _;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::args::{DemoArgs, Driver};
use super::client::Client;
use super::console::Reader;
use super::daemons::Stage;
use super::error::{DemoError, doing};
use super::plan;
use super::progress::Display;
use super::report::{Report, Round, Verified};

const SOURCE: &str = "demo-source";
const DESTINATION: &str = "demo-destination";
const GUEST: &str = "demo-guest";
const DIGEST_BYTES: usize = 16;

/// Between two looks at a console or at progress.
const LOOK: Duration = Duration::from_millis(100);
/// Longest time for a guest to fill its RAM, or to boot, and begin its work.
const WORKING: Duration = Duration::from_secs(300);
/// Longest time for the guest's first lines at the destination, and for the records there to settle.
const SETTLED: Duration = Duration::from_secs(60);
/// Lines that the guest must print, before the migration and after it, to count as working.
const LINES: usize = 5;
/// How long the source's console is watched for output that must not come.
const SILENCE: Duration = Duration::from_millis(500);

/// The two daemons' APIs.
struct Hosts {
    source: Client,
    destination: Client,
}

pub(super) struct Course<'a> {
    args: &'a DemoArgs,
}

impl<'a> Course<'a> {
    pub(super) fn new(args: &'a DemoArgs) -> Self {
        Self { args }
    }

    pub(super) async fn run(&self, stage: &mut Stage) -> Result<Report, DemoError> {
        self.say("starting two daemons on loopback");
        let hosts =
            Hosts { source: stage.start(SOURCE).await?, destination: stage.start(DESTINATION).await? };
        self.check_abilities(&hosts).await?;
        introduce(&hosts.source, &hosts.destination).await?;
        introduce(&hosts.destination, &hosts.source).await?;

        let guest = self.start_guest(&hosts.source).await?;
        let mut reader = Reader::default();
        self.await_work(&hosts.source, &mut reader).await?;
        self.show_plan(&hosts.source).await?;

        let migration = self.migrate(&hosts.source).await?;
        let id = text(&migration, "id")?;
        let path = format!("/v1/migrations/{id}");
        self.say("comparing every page of RAM at the pause point");
        await_end(&hosts.destination, &path).await?;
        let (pages_compared, mismatches) = compare(&hosts, &path).await?;
        drain(&hosts.source, &mut reader).await?;
        let guest_continued = self.continued(&hosts, reader).await?;

        let state = async |client: &Client| {
            let guest =
                client.get(&format!("/v1/guests/{GUEST}")).await.map_err(doing("reading the guest"))?;
            text(&guest, "state")
        };
        let rounds = rounds(&hosts.source, &path).await?;
        Ok(Report {
            driver: self.args.driver.name(),
            strategy: self.args.strategy.name(),
            protection_level: text(&guest["protection"], "level")?,
            memory_bytes: number(&guest["memory"], "total_bytes")?,
            streams: self.args.streams,
            progress: migration["progress"].clone(),
            rounds,
            verified: Verified { pages_compared, mismatches, guest_continued },
            source_state: state(&hosts.source).await?,
            destination_state: state(&hosts.destination).await?,
        })
    }

    fn say(&self, line: &str) {
        if !self.args.json {
            // Who closed stdout does not want to read it.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }

    /// Asks the daemons, so that what cannot work fails with their reason and not half-way.
    async fn check_abilities(&self, hosts: &Hosts) -> Result<(), DemoError> {
        let strategy = self.args.strategy.name();
        for client in [&hosts.source, &hosts.destination] {
            let path = format!("/v1/strategies/{strategy}");
            let info = client.get(&path).await.map_err(doing("asking for the strategy"))?;
            if info["available"] != true {
                let reason = text(&info, "unavailable_reason")?;
                return Err(DemoError::Strategy { strategy, reason });
            }
            let can = client
                .get("/v1/host/capabilities")
                .await
                .map_err(doing("asking for the host's capabilities"))?;
            self.check_driver(&can)?;
        }
        Ok(())
    }

    fn check_driver(&self, can: &Value) -> Result<(), DemoError> {
        let driver = self.args.driver.name();
        let has = can["drivers"].as_array().is_some_and(|all| all.iter().any(|d| d == driver));
        if has && can["kvm"]["available"] == true {
            return Ok(());
        }
        let wanted = if has || self.args.driver == Driver::Embedded { "kvm" } else { driver };
        let missing = can["missing"].as_array().and_then(|all| all.iter().find(|m| m["code"] == wanted));
        let missing = missing.ok_or(DemoError::Answer { field: "missing" })?;
        Err(DemoError::Driver { driver, why: text(missing, "why")?, fix: text(missing, "fix")? })
    }

    /// Gives the guest when it runs.
    async fn start_guest(&self, source: &Client) -> Result<Value, DemoError> {
        let body = json!({
            "name": GUEST, "driver": self.args.driver_body(),
            "memory": {"blocks": [{"name": "ram0", "size_bytes": self.args.memory_bytes(), "gpa": 0}]},
        });
        source.post("/v1/guests", Some(&body)).await.map_err(doing("defining the guest"))?;
        let path = format!("/v1/guests/{GUEST}");
        source.post(&format!("{path}/start"), None).await.map_err(doing("starting the guest"))?;
        let running = async {
            let mut etag = None;
            loop {
                let guest = source.changed(&path, &mut etag).await.map_err(doing("starting the guest"))?;
                if let Some(guest) = guest.filter(|g| g["state"] != "starting") {
                    return alive(guest);
                }
            }
        };
        timeout(WORKING, running)
            .await
            .unwrap_or(Err(DemoError::TooLate { what: "the start of the guest", limit: WORKING }))
    }

    /// Waits until the guest has filled its RAM, or booted, and works.
    async fn await_work(&self, source: &Client, reader: &mut Reader) -> Result<(), DemoError> {
        self.say(match self.args.driver {
            Driver::Embedded => "the guest runs; it fills its RAM before it begins to work",
            Driver::Qemu => "the guest runs; its Linux boots before it begins to work",
        });
        let began = Instant::now();
        let mut lines = 0;
        while lines < LINES {
            if began.elapsed() > WORKING {
                return Err(DemoError::TooLate { what: "the guest's work", limit: WORKING });
            }
            sleep(LOOK).await;
            lines += reader.read(source, GUEST).await.map_err(doing("reading the console"))?.len();
            alive(source.get(&format!("/v1/guests/{GUEST}")).await.map_err(doing("reading the guest"))?)?;
        }
        self.say(&format!("the guest works, {:.1} s after its start", began.elapsed().as_secs_f64()));
        Ok(())
    }

    async fn show_plan(&self, source: &Client) -> Result<(), DemoError> {
        let body = json!({"strategy": self.args.strategy_body(), "workers": self.args.streams});
        let path = format!("/v1/guests/{GUEST}/address-space-plans");
        let plan = source.post(&path, Some(&body)).await.map_err(doing("planning the address space"))?;
        self.say(&plan::text(&plan));
        Ok(())
    }

    /// Gives the migration when it has succeeded.
    async fn migrate(&self, source: &Client) -> Result<Value, DemoError> {
        let body = json!({
            "guest": GUEST, "destination": {"kind": "host", "host": DESTINATION}, "mode": self.args.mode(),
            "mirror": {"kind": "template", "strategy": self.args.strategy_body()},
            "streams": self.args.streams, "verify": true,
        });
        let started =
            source.post("/v1/migrations", Some(&body)).await.map_err(doing("starting the migration"))?;
        let path = format!("/v1/migrations/{}", text(&started, "id")?);
        let mut display = Display::new();
        let mut etag = None;
        loop {
            let seen = source.changed(&path, &mut etag).await.map_err(doing("watching the migration"))?;
            let Some(migration) = seen else { continue };
            display.show(&migration);
            match migration["state"].as_str() {
                Some("succeeded") => {
                    display.done();
                    return Ok(migration);
                }
                Some("failed" | "canceled" | "in_doubt") => {
                    display.done();
                    return Err(failed(&migration));
                }
                _ => sleep(LOOK).await,
            }
        }
    }

    /// Whether the guest goes on at the destination, and nothing goes on at the source. `here` has read the source's
    /// console to its end.
    async fn continued(&self, hosts: &Hosts, mut here: Reader) -> Result<bool, DemoError> {
        self.say("waiting for the guest's work at the destination");
        let began = Instant::now();
        let Some(mut before) = here.last().cloned() else { return Ok(false) };
        // From where the source's console ended: everything read here was printed there.
        let mut there = here.clone();
        let mut lines = 0;
        while lines < LINES {
            if began.elapsed() > SETTLED {
                return Ok(false);
            }
            sleep(LOOK).await;
            let beats = there.read(&hosts.destination, GUEST).await;
            for beat in beats.map_err(doing("reading the console there"))? {
                if !beat.follows(&before) {
                    return Ok(false);
                }
                lines += 1;
                before = beat;
            }
        }
        let end = here.offset();
        sleep(SILENCE.saturating_sub(began.elapsed())).await;
        here.read(&hosts.source, GUEST).await.map_err(doing("reading the console here"))?;
        Ok(here.offset() == end)
    }
}

/// Makes `there` known at `here`.
async fn introduce(here: &Client, there: &Client) -> Result<(), DemoError> {
    let host = there.get("/v1/host").await.map_err(doing("asking for a host"))?;
    let body = json!({"name": host["name"], "address": host["peer_address"], "identity": host["identity"]});
    here.post("/v1/hosts", Some(&body)).await.map_err(doing("introducing the hosts"))?;
    Ok(())
}

/// The guest, unless it failed.
fn alive(guest: Value) -> Result<Value, DemoError> {
    match guest["state"].as_str() {
        Some("running") => Ok(guest),
        state => {
            let why = guest["error"]["detail"].as_str().or(state).unwrap_or("it has no state");
            Err(DemoError::Guest(why.to_owned()))
        }
    }
}

fn failed(migration: &Value) -> DemoError {
    DemoError::Migration {
        state: migration["state"].as_str().unwrap_or("unknown").to_owned(),
        reason: migration["error"]["detail"].as_str().unwrap_or("no reason is given").to_owned(),
    }
}

/// Waits until the destination's record of the migration has ended: it settles a moment after the source's.
async fn await_end(destination: &Client, path: &str) -> Result<(), DemoError> {
    let ended = async {
        let mut etag = None;
        loop {
            let seen =
                destination.changed(path, &mut etag).await.map_err(doing("watching the destination"))?;
            match seen.as_ref().map(|m| m["state"].as_str().unwrap_or_default()) {
                Some("succeeded") => return Ok(()),
                Some("failed" | "canceled" | "in_doubt") => return Err(failed(&seen.unwrap_or_default())),
                _ => {}
            }
        }
    };
    timeout(SETTLED, ended)
        .await
        .unwrap_or(Err(DemoError::TooLate { what: "the end at the destination", limit: SETTLED }))
}

/// Pages compared, and how many differ. A page that one list lacks differs.
async fn compare(hosts: &Hosts, path: &str) -> Result<(u64, u64), DemoError> {
    let path = format!("{path}/page-digests");
    let here = hosts.source.get_bytes(&path).await.map_err(doing("fetching the source's digests"))?;
    let there =
        hosts.destination.get_bytes(&path).await.map_err(doing("fetching the destination's digests"))?;
    Ok(differences(&here, &there))
}

fn differences(here: &[u8], there: &[u8]) -> (u64, u64) {
    let (here, there) = (here.chunks(DIGEST_BYTES), there.chunks(DIGEST_BYTES));
    let (most, least) = (here.len().max(there.len()), here.len().min(there.len()));
    let differ = here.zip(there).filter(|(a, b)| a != b || a.len() != DIGEST_BYTES).count();
    (least as u64, (differ + most - least) as u64)
}

/// Reads a console to its end.
async fn drain(client: &Client, reader: &mut Reader) -> Result<(), DemoError> {
    loop {
        let before = reader.offset();
        reader.read(client, GUEST).await.map_err(doing("reading the console"))?;
        if reader.offset() == before {
            return Ok(());
        }
    }
}

async fn rounds(source: &Client, path: &str) -> Result<Vec<Round>, DemoError> {
    let list = source.get(&format!("{path}/rounds")).await.map_err(doing("reading the rounds"))?;
    let items = list["items"].as_array().ok_or(DemoError::Answer { field: "items" })?;
    items
        .iter()
        .map(|r| {
            Ok(Round {
                bytes: number(r, "bytes")?,
                duration_us: number(r, "duration_us")?,
                pages: number(r, "pages")?,
                dirtied_pages: number(r, "dirtied_pages")?,
                paused: r["paused"] == true,
            })
        })
        .collect()
}

fn text(value: &Value, field: &'static str) -> Result<String, DemoError> {
    value[field].as_str().map(str::to_owned).ok_or(DemoError::Answer { field })
}

fn number(value: &Value, field: &'static str) -> Result<u64, DemoError> {
    value[field].as_u64().ok_or(DemoError::Answer { field })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_counts() {
        let here = [[1u8; 16], [2; 16], [3; 16]].concat();
        assert_eq!(differences(&here, &here), (3, 0));
        let mut there = here.clone();
        there[40] ^= 1;
        assert_eq!(differences(&here, &there), (3, 1));
        assert_eq!(differences(&here, &here[..32]), (2, 1));
        assert_eq!(differences(&here[..40], &here[..40]), (3, 1), "half a digest is none");
        assert_eq!(differences(&[], &[]), (0, 0));
    }
}
