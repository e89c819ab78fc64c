//! What handlers share: the host, once it is open; the document; whether the daemon shuts down.

use std::sync::{Arc, OnceLock};

use mirrorvm::host::Host;
use tokio::sync::watch;

use crate::openapi::Document;
use crate::problem::{Problem, ProblemCode};

/// Shared state of all handlers; cheap to clone.
#[derive(Clone, Debug)]
pub struct AppState {
    host: Arc<OnceLock<Host>>,
    closing: watch::Receiver<bool>,
    document: Arc<Document>,
}

impl AppState {
    /// State without a host: `/livez` works, everything about resources is `not_ready`. `closing` turns true
    /// when the daemon shuts down, and ends long polls.
    pub fn new(document: Document, closing: watch::Receiver<bool>) -> Self {
        Self { host: Arc::default(), closing, document: Arc::new(document) }
    }

    /// Gives the state its host. A second one is not taken.
    pub fn set_host(&self, host: Host) {
        let _ = self.host.set(host);
    }

    /// The host.
    ///
    /// # Errors
    /// `not_ready` before it is open.
    pub fn host(&self) -> Result<&Host, Problem> {
        self.host
            .get()
            .ok_or_else(|| Problem::new(ProblemCode::NotReady, "the state directory is still being opened"))
    }

    /// Whether requests about resources work: the host is open and the daemon does not shut down.
    pub fn ready(&self) -> Result<(), Problem> {
        self.host()?;
        if *self.closing.borrow() {
            return Err(Problem::new(ProblemCode::ShuttingDown, "the daemon shuts down"));
        }
        Ok(())
    }

    /// Turns true when the daemon shuts down.
    pub fn closing(&self) -> watch::Receiver<bool> {
        self.closing.clone()
    }

    /// The OpenAPI document.
    pub fn document(&self) -> &Document {
        &self.document
    }
}
