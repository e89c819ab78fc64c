//! One strategy: a fresh guest, its migration, and the proof that it arrived.

use std::time::Duration;

use mirrorvm_client::{Client, ClientError, Request};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::args::Driver;
use super::console::Reader;
use super::course::{DESTINATION, Hosts, SETTLED, Voice};
use super::error::{DemoError, Impossible, doing, failed};
use super::evidence::{POLL, await_end, compare, rounds};
use super::json::{number, text};
use super::method::Method;
use super::plan::{self, Facts};
use super::progress::Display;
use super::report::{Report, Verified};
use super::setting::Setting;

/// Between two looks at a console or at progress.
const LOOK: Duration = Duration::from_millis(100);
/// Longest time for a guest to fill its RAM, or to boot, and begin its work.
const WORKING: Duration = Duration::from_secs(300);
/// Lines that the guest must print, before the migration and after it, to count as working.
const LINES: usize = 5;
/// Most mirrors of a daemon that had none before.
const MIRRORS_MAX: usize = 100;
/// How long the source's console is watched for output that must not come.
const SILENCE: Duration = Duration::from_millis(500);

/// One strategy on the two hosts.
#[derive(Debug)]
pub(super) struct Trial<'a> {
    pub(super) hosts: &'a Hosts,
    pub(super) setting: &'a Setting<'a>,
    pub(super) method: Method,
    pub(super) voice: Voice,
    /// Whether the reader wants to see the plan, too.
    pub(super) shows_plan: bool,
}

impl Trial<'_> {
    /// Everything from the guest's definition to the comparison.
    ///
    /// # Errors
    /// [`DemoError::Refused`] when the daemon does not do it with this driver; everything else is a failure.
    pub(super) async fn run(&self) -> Result<Report, DemoError> {
        let Hosts { source, destination } = self.hosts;
        self.check_strategy().await?;
        let guest = self.start_guest().await?;
        let mut reader = Reader::default();
        self.await_work(&mut reader).await?;
        self.await_readiness().await?;
        let plan = self.plan().await?;
        let ready_us = self.time_mirror(&guest).await?;

        let migration = self.migrate().await?;
        let path = format!("/v1/migrations/{}", text(&migration, "id")?);
        self.voice.say("comparing every page of RAM at the pause point");
        await_end(destination, &path).await?;
        let (pages_compared, mismatches) =
            compare(self.hosts, &path, self.setting.args.memory_bytes()).await?;
        self.drain(&mut reader).await?;
        let guest_continued = self.continued(reader).await?;
        Ok(Report {
            driver: self.setting.driver.name(),
            fallback: self.setting.fallback.clone(),
            method: self.method,
            protection_level: text(&guest["protection"], "level")?,
            protection_promise: text(&guest["protection"], "promise")?,
            memory_bytes: number(&guest["memory"], "total_bytes")?,
            streams: self.setting.args.streams,
            plan: Facts::of(&plan),
            mirror_ready_us: ready_us,
            progress: migration["progress"].clone(),
            rounds: rounds(source, &path).await?,
            verified: Verified { pages_compared, mismatches, guest_continued },
            source_state: self.state_at(source).await?,
            destination_state: self.state_at(destination).await?,
        })
    }

    /// Takes the guest away from both hosts, in whatever state it is.
    ///
    /// # Errors
    /// A host that does not let go of it.
    pub(super) async fn clear(&self) -> Result<(), DemoError> {
        let path = self.path();
        for host in [&self.hosts.destination, &self.hosts.source] {
            let gone = async {
                loop {
                    let Err(error) = host.delete(&path).await else { return Ok(()) };
                    match error.problem().map(|p| p.status) {
                        Some(404) => return Ok(()),
                        // It runs, or a migration that came to nothing has it for a moment.
                        Some(409) => {
                            let _ = host.post(&format!("{path}/stop"), None).await;
                            sleep(LOOK).await;
                        }
                        _ => return Err(doing("removing the guest")(error)),
                    }
                }
            };
            let late = DemoError::TooLate { what: "the removal of the guest", limit: SETTLED };
            timeout(SETTLED, gone).await.unwrap_or(Err(late))?;
        }
        Ok(())
    }

    fn path(&self) -> String {
        format!("/v1/guests/{}", self.method.guest())
    }

    /// What goes wrong here because the daemon does not do it with this driver is a refusal.
    fn asking(&self, what: &'static str) -> impl FnOnce(ClientError) -> DemoError {
        let title = self.method.title();
        move |source| match source.problem().and_then(Impossible::of) {
            Some(source) => DemoError::Refused { what, strategy: title, source },
            None => DemoError::Request { what, source },
        }
    }

    async fn check_strategy(&self) -> Result<(), DemoError> {
        let path = format!("/v1/strategies/{}", self.method.kind());
        let info = self.hosts.source.get(&path).await.map_err(doing("asking for the strategy"))?;
        if info["available"] == true {
            return Ok(());
        }
        let reason = text(&info, "unavailable_reason")?;
        let source = Impossible { status: 501, code: "strategy_unavailable".into(), reason };
        Err(DemoError::Refused { what: "asking for the strategy", strategy: self.method.title(), source })
    }

    /// Gives the guest when it runs.
    async fn start_guest(&self) -> Result<Value, DemoError> {
        let (source, path) = (&self.hosts.source, self.path());
        let body = json!({
            "name": self.method.guest(), "driver": self.setting.driver_body(self.method),
            "memory": {"blocks": [{"name": "ram0", "size_bytes": self.setting.args.memory_bytes(), "gpa": 0}]},
        });
        source.post("/v1/guests", Some(&body)).await.map_err(self.asking("defining the guest"))?;
        let starting = "starting the guest";
        source.post(&format!("{path}/start"), None).await.map_err(self.asking(starting))?;
        let running = async {
            let mut watch = source.watch(Request::get(&path), POLL);
            loop {
                let guest = watch.changed().await.map_err(doing(starting))?;
                if let Some(guest) = guest.filter(|g| g["state"] != "starting") {
                    return alive(guest);
                }
            }
        };
        timeout(WORKING, running)
            .await
            .unwrap_or(Err(DemoError::TooLate { what: "the start of the guest", limit: WORKING }))
    }

    async fn look(&self) -> Result<Value, DemoError> {
        alive(self.hosts.source.get(&self.path()).await.map_err(doing("reading the guest"))?)
    }

    /// Waits until the guest has filled its RAM, or booted, and works.
    async fn await_work(&self, reader: &mut Reader) -> Result<(), DemoError> {
        self.voice.say(match self.setting.driver {
            Driver::Embedded | Driver::Emulated => {
                "the guest runs; it fills its RAM before it begins to work"
            }
            Driver::Qemu => "the guest runs; its Linux boots before it begins to work",
        });
        let began = Instant::now();
        let name = self.method.guest();
        let mut lines = 0;
        while lines < LINES {
            if began.elapsed() > WORKING {
                return Err(DemoError::TooLate { what: "the guest's work", limit: WORKING });
            }
            sleep(LOOK).await;
            lines +=
                reader.read(&self.hosts.source, &name).await.map_err(doing("reading the console"))?.len();
            self.look().await?;
        }
        self.voice.say(&format!("the guest works, {:.1} s after its start", began.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Waits until the guest says that it can be migrated, and for `declared` until its helper has declared
    /// itself. A Linux guest in QEMU says nothing of either: what that means is the daemon's to say.
    async fn await_readiness(&self) -> Result<(), DemoError> {
        if self.setting.driver == Driver::Qemu {
            return Ok(());
        }
        let ready = async {
            let mut watch = self.hosts.source.watch(Request::get(self.path()), POLL);
            loop {
                let seen = watch.changed().await.map_err(doing("watching the guest"))?;
                let Some(guest) = seen else { continue };
                let guest = alive(guest)?;
                if is_ready(&guest["migration_readiness"], self.method) {
                    return Ok(());
                }
            }
        };
        timeout(WORKING, ready)
            .await
            .unwrap_or(Err(DemoError::TooLate { what: "the guest's readiness", limit: WORKING }))
    }

    async fn plan(&self) -> Result<Value, DemoError> {
        let body = json!({"strategy": self.method.body(), "workers": self.setting.args.streams});
        let path = format!("{}/address-space-plans", self.path());
        let plan = self.hosts.source.post(&path, Some(&body)).await;
        let plan = plan.map_err(self.asking("planning the address space"))?;
        if self.shows_plan {
            self.voice.say(&plan::text(&plan));
        }
        Ok(plan)
    }

    /// Microseconds from the request for a mirror to its helper's first idle doorbell. The mirror is gone
    /// afterwards: the migration makes its own, which is part of its time. A guest that was launched with its
    /// mirror keeps it.
    async fn time_mirror(&self, guest: &Value) -> Result<u64, DemoError> {
        let source = &self.hosts.source;
        if self.setting.args.es {
            let all = source.pages(Request::get("/v1/mirrors")).all(MIRRORS_MAX).await;
            let all = all.map_err(doing("reading the mirrors"))?;
            let own = all.iter().find(|m| m["guest"] == guest["id"]);
            return number(own.unwrap_or(&Value::Null), "ready_after_us");
        }
        let body = json!({"guest": self.method.guest(), "strategy": self.method.body(),
            "workers": self.setting.args.streams});
        let mirror = source.post("/v1/mirrors", Some(&body)).await.map_err(self.asking("making a mirror"))?;
        let path = format!("/v1/mirrors/{}", text(&mirror, "id")?);
        source.delete(&path).await.map_err(doing("removing the mirror"))?;
        number(&mirror, "ready_after_us")
    }

    /// Gives the migration when it has succeeded.
    async fn migrate(&self) -> Result<Value, DemoError> {
        let source = &self.hosts.source;
        let body = json!({
            "guest": self.method.guest(), "destination": {"kind": "host", "host": DESTINATION},
            "mode": "precopy",
            "mirror": {"kind": "template", "strategy": self.method.body()},
            "streams": self.setting.args.streams, "verify": true,
        });
        let started = source
            .post("/v1/migrations", Some(&body))
            .await
            .map_err(self.asking("starting the migration"))?;
        let path = format!("/v1/migrations/{}", text(&started, "id")?);
        let mut display = Display::new();
        let mut watch = source.watch(Request::get(&path), POLL);
        loop {
            let seen = watch.changed().await.map_err(doing("watching the migration"))?;
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

    /// Reads the source's console to its end.
    async fn drain(&self, reader: &mut Reader) -> Result<(), DemoError> {
        let name = self.method.guest();
        loop {
            let before = reader.offset();
            reader.read(&self.hosts.source, &name).await.map_err(doing("reading the console"))?;
            if reader.offset() == before {
                return Ok(());
            }
        }
    }

    /// Whether the guest goes on at the destination, and nothing goes on at the source. `here` has read the
    /// source's console to its end.
    async fn continued(&self, mut here: Reader) -> Result<bool, DemoError> {
        self.voice.say("waiting for the guest's work at the destination");
        let name = self.method.guest();
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
            let beats = there.read(&self.hosts.destination, &name).await;
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
        here.read(&self.hosts.source, &name).await.map_err(doing("reading the console here"))?;
        Ok(here.offset() == end)
    }

    async fn state_at(&self, host: &Client) -> Result<String, DemoError> {
        text(&host.get(&self.path()).await.map_err(doing("reading the guest"))?, "state")
    }
}

/// Whether a guest has said all that the strategy needs; a declaration that was not taken is the planner's to
/// refuse.
fn is_ready(readiness: &Value, method: Method) -> bool {
    let declared = !readiness["declared_pieces"].is_null()
        || readiness["declaration_refusals"].as_array().is_some_and(|all| !all.is_empty());
    readiness["ready"] == true && (method != Method::Declared || declared)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::args::ShiftChoice;

    #[test]
    fn only_declared_waits_for_a_declaration() {
        let readiness = |ready: bool, pieces: Value, refusals: Value| json!({"ready": ready, "declared_pieces": pieces, "declaration_refusals": refusals});
        let shifted = Method::Shifted(ShiftChoice::FourGib);
        let announced = readiness(true, Value::Null, json!([]));
        assert!(is_ready(&announced, shifted) && !is_ready(&announced, Method::Declared));
        assert!(is_ready(&readiness(true, json!(6), json!([])), Method::Declared));
        assert!(is_ready(&readiness(true, Value::Null, json!(["overlap"])), Method::Declared));
        assert!(!is_ready(&readiness(false, json!(6), json!([])), Method::Declared));
        assert!(!is_ready(&Value::Null, shifted));
    }
}
