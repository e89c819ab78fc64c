//! What handlers share: the host, once it is open; the document; the configuration; whether the daemon shuts
//! down.

use std::sync::{Arc, OnceLock};

use mirrorvm::guest::Drivers;
use mirrorvm::host::Host;
use ring::hmac;
use ring::rand::SystemRandom;
use tokio::sync::{OnceCell, watch};
use uuid::Uuid;

use crate::access::credentials::Credentials;
use crate::config::Config;
use crate::confine::{Confine, Confinement};
use crate::http::audit::Acts;
use crate::http::gate::Pace;
use crate::http::places::Places;
use crate::http::refusals::Refusals;
use crate::metrics::Metrics;
use crate::openapi::Document;
use crate::problem::{Problem, ProblemCode};

/// Shared state of all handlers; cheap to clone.
#[derive(Clone, Debug)]
pub struct AppState(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    host: OnceLock<Host>,
    closing: watch::Receiver<bool>,
    document: OnceCell<Document>,
    document_3_0: OnceCell<Document>,
    drivers: Drivers,
    config: Config,
    boot: Uuid,
    fallback_key: hmac::Key,
    page_key: OnceLock<hmac::Key>,
    pace: Pace,
    refusals: Refusals,
    credentials: Credentials,
    acts: Acts,
    streams: Arc<Places>,
    long_polls: Arc<Places>,
    metrics: Metrics,
    confinement: OnceLock<Confinement>,
}

impl AppState {
    /// State without a host: `/livez` works, everything about resources is `not_ready`. `closing` turns true
    /// when the daemon shuts down, and ends long polls and streams.
    pub fn new(drivers: Drivers, config: Config, closing: watch::Receiver<bool>) -> Self {
        let streams = Places::new(config.limits.open_streams());
        let long_polls = Places::new(config.limits.waiting());
        Self(Arc::new(Shared {
            host: OnceLock::new(),
            closing,
            document: OnceCell::new(),
            document_3_0: OnceCell::new(),
            drivers,
            config,
            boot: Uuid::new_v4(),
            fallback_key: fresh_key(),
            page_key: OnceLock::new(),
            pace: Pace::default(),
            refusals: Refusals::default(),
            credentials: Credentials::default(),
            acts: Acts::default(),
            streams,
            long_polls,
            metrics: Metrics::default(),
            confinement: OnceLock::new(),
        }))
    }

    /// Says what the daemon is confined by. A second word is not taken.
    pub fn set_confinement(&self, confinement: Confinement) {
        let _ = self.0.confinement.set(confinement);
    }

    /// What the daemon is confined by; nothing, unless somebody said so.
    pub fn confinement(&self) -> Confinement {
        self.0.confinement.get().cloned().unwrap_or(Confinement::none(Confine::None))
    }

    /// Gives the state its host. A second one is not taken.
    pub fn set_host(&self, host: Host) {
        let _ = self.0.page_key.set(hmac::Key::new(hmac::HMAC_SHA256, host.page_secret().as_slice()));
        let _ = self.0.host.set(host);
    }

    /// The host.
    ///
    /// # Errors
    /// `not_ready` before it is open.
    pub fn host(&self) -> Result<&Host, Problem> {
        self.0
            .host
            .get()
            .ok_or_else(|| Problem::new(ProblemCode::NotReady, "the state directory is still being opened"))
    }

    /// Whether requests about resources work: the host is open and the daemon does not shut down.
    ///
    /// # Errors
    /// `not_ready`, `shutting_down`.
    pub fn ready(&self) -> Result<(), Problem> {
        self.host()?;
        if *self.0.closing.borrow() {
            return Err(Problem::new(ProblemCode::ShuttingDown, "the daemon shuts down"));
        }
        Ok(())
    }

    /// Turns true when the daemon shuts down.
    pub fn closing(&self) -> watch::Receiver<bool> {
        self.0.closing.clone()
    }

    /// The OpenAPI document, made when somebody first asks for it: it is half of what a daemon without guests
    /// has on its heap, and most daemons are never asked. However many ask at once, it is made once.
    ///
    /// # Errors
    /// `internal` when it cannot be made, which a test rules out.
    pub async fn document(&self) -> Result<&Document, Problem> {
        self.made(&self.0.document, Document::with).await
    }

    /// The same in OpenAPI 3.0.3, for tools that know no newer one.
    ///
    /// # Errors
    /// As [`AppState::document`].
    pub async fn document_3_0(&self) -> Result<&Document, Problem> {
        self.made(&self.0.document_3_0, Document::with_3_0).await
    }

    async fn made<'a>(
        &self,
        place: &'a OnceCell<Document>,
        make: fn(&Drivers) -> Result<Document, serde_json::Error>,
    ) -> Result<&'a Document, Problem> {
        let failed = |error: &dyn std::fmt::Display| Problem::new(ProblemCode::Internal, error.to_string());
        place
            .get_or_try_init(|| async {
                let drivers = self.0.drivers.clone();
                let made = tokio::task::spawn_blocking(move || {
                    let made = make(&drivers);
                    mirrorvm::memory::give_back_heap();
                    made
                });
                made.await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
            })
            .await
    }

    /// What runs guests.
    pub fn drivers(&self) -> &Drivers {
        &self.0.drivers
    }

    /// What the daemon was told.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// This run of the daemon.
    pub fn boot(&self) -> Uuid {
        self.0.boot
    }

    /// The key of page tokens: the database's, so that a token outlives the daemon.
    pub fn page_key(&self) -> &hmac::Key {
        self.0.page_key.get().unwrap_or(&self.0.fallback_key)
    }

    /// How fast each principal goes.
    pub fn pace(&self) -> &Pace {
        &self.0.pace
    }

    /// Whose refusals have entries of their own in the audit log.
    pub fn refusals(&self) -> &Refusals {
        &self.0.refusals
    }

    /// What this run of the daemon has given out.
    pub fn credentials(&self) -> &Credentials {
        &self.0.credentials
    }

    /// Changes that go on.
    pub fn acts(&self) -> &Acts {
        &self.0.acts
    }

    /// Event streams that may still be opened.
    pub fn streams(&self) -> &Arc<Places> {
        &self.0.streams
    }

    /// Callers that may still begin to wait.
    pub fn long_polls(&self) -> &Arc<Places> {
        &self.0.long_polls
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }
}

fn fresh_key() -> hmac::Key {
    // Without random numbers nothing else works either; tokens made before the host is open lead nowhere
    // anyway.
    hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
        .unwrap_or_else(|_| hmac::Key::new(hmac::HMAC_SHA256, Uuid::new_v4().as_bytes()))
}
