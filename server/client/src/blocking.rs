//! The same client for callers without a runtime: each call returns when it is done.
//!
//! Owns: a runtime for one thread, and handing everything on to the client that awaits. Must not know:
//! anything else. Not for use within a runtime: it would block a thread that others need.

use std::future::Future;
use std::sync::Arc;

use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::error::{ClientError, SetupError};
use crate::request::Request;
use crate::response::Response;
use crate::sse::Event;

/// A runtime that does not wait, when it ends, for a name that is still being looked up.
#[derive(Debug)]
struct Own(Option<Runtime>);

impl Own {
    fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.0.as_ref().expect("it is there until it is dropped").block_on(work)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A client of one daemon whose calls block. Clones share a runtime; several threads may use it at once.
#[derive(Clone, Debug)]
pub struct Client {
    client: crate::Client,
    runtime: Arc<Own>,
}

impl Client {
    /// Makes one of a client.
    ///
    /// # Errors
    /// The system has no descriptors left for a runtime.
    pub fn new(client: crate::Client) -> Result<Self, SetupError> {
        let runtime = Builder::new_current_thread().enable_all().build().map_err(SetupError::Runtime)?;
        Ok(Self { client, runtime: Arc::new(Own(Some(runtime))) })
    }

    /// As [`crate::Client::send`].
    ///
    /// # Errors
    /// As there.
    pub fn send(&self, request: &Request) -> Result<Response, ClientError> {
        self.runtime.block_on(self.client.send(request))
    }

    /// As [`crate::Client::exchange`].
    ///
    /// # Errors
    /// As there.
    pub fn exchange(&self, request: &Request) -> Result<Response, ClientError> {
        self.runtime.block_on(self.client.exchange(request))
    }

    /// As [`crate::Client::get`].
    ///
    /// # Errors
    /// As there.
    pub fn get(&self, target: &str) -> Result<Value, ClientError> {
        self.runtime.block_on(self.client.get(target))
    }

    /// As [`crate::Client::post`].
    ///
    /// # Errors
    /// As there.
    pub fn post(&self, target: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        self.runtime.block_on(self.client.post(target, body))
    }

    /// As [`crate::Client::connect`].
    ///
    /// # Errors
    /// As there.
    pub fn connect(&self) -> Result<Connection, ClientError> {
        let connection = self.runtime.block_on(self.client.connect())?;
        Ok(Connection { connection, runtime: Arc::clone(&self.runtime) })
    }

    /// As [`crate::Client::events`].
    ///
    /// # Errors
    /// As there.
    pub fn events(&self, stream: &Request) -> Result<Events, ClientError> {
        let events = self.runtime.block_on(self.client.events(stream))?;
        Ok(Events { events, runtime: Arc::clone(&self.runtime) })
    }
}

/// A kept connection whose calls block.
#[derive(Debug)]
pub struct Connection {
    connection: crate::Connection,
    runtime: Arc<Own>,
}

impl Connection {
    /// As [`crate::Connection::send`].
    ///
    /// # Errors
    /// As there.
    pub fn send(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.runtime.block_on(self.connection.send(request))
    }

    /// As [`crate::Connection::get`].
    ///
    /// # Errors
    /// As there.
    pub fn get(&mut self, target: &str) -> Result<Value, ClientError> {
        self.runtime.block_on(self.connection.get(target))
    }

    /// As [`crate::Connection::post`].
    ///
    /// # Errors
    /// As there.
    pub fn post(&mut self, target: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        self.runtime.block_on(self.connection.post(target, body))
    }

    /// As [`crate::Connection::exchange`].
    ///
    /// # Errors
    /// As there.
    pub fn exchange(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.runtime.block_on(self.connection.exchange(request))
    }
}

/// An event stream whose calls block.
#[derive(Debug)]
pub struct Events {
    events: crate::Events,
    runtime: Arc<Own>,
}

impl Events {
    /// As [`crate::Events::next`].
    ///
    /// # Errors
    /// As there.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would hide errors and the end in one Option"
    )]
    pub fn next(&mut self) -> Result<Option<Event>, ClientError> {
        self.runtime.block_on(self.events.next())
    }

    /// As [`crate::Events::last_id`].
    pub fn last_id(&self) -> Option<&str> {
        self.events.last_id()
    }
}
