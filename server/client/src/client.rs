//! A client of one daemon: one connection per request.
//!
//! Owns: putting it together, and its ways to ask. Must not know: bytes on the wire.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::connection::Connection;
use crate::credential::Credential;
use crate::endpoint::Endpoint;
use crate::error::{ClientError, SetupError};
use crate::events::Events;
use crate::limits::Limits;
use crate::pages::Pages;
use crate::request::Request;
use crate::response::Response;
use crate::settings::Settings;
use crate::trust::{Identity, Trust};
use crate::watch::Watch;

/// A client of one daemon. Clones share their settings.
///
/// Every request has a connection of its own, which ends with it: so there is no kept one that the daemon may
/// have closed meanwhile, and no doubt whether a request on it was read. Callers that ask often
/// [`connect`](Client::connect). Redirects are not followed: a credential is for one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    settings: Arc<Settings>,
}

/// A client that is being put together.
#[derive(Clone, Debug)]
pub struct Builder {
    endpoint: Endpoint,
    credential: Option<Credential>,
    trust: Option<Trust>,
    identity: Option<Identity>,
    limits: Limits,
}

impl Builder {
    /// The same with a credential, sent with every request that has none of its own.
    #[must_use]
    pub fn credential(mut self, credential: Credential) -> Self {
        self.credential = Some(credential);
        self
    }

    /// The same with what the daemon's certificate is held against; TLS needs it.
    #[must_use]
    pub fn trust(mut self, trust: Trust) -> Self {
        self.trust = Some(trust);
        self
    }

    /// The same with a certificate to show.
    #[must_use]
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// The same with other limits.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The client. Nothing is sent yet.
    ///
    /// # Errors
    /// TLS without trust, or trust without TLS; TCP beyond this machine; certificates that cannot be used.
    pub fn build(self) -> Result<Client, SetupError> {
        let Self { endpoint, credential, trust, identity, limits } = self;
        let settings = Settings::new(endpoint, credential, trust.as_ref(), identity.as_ref(), limits)?;
        Ok(Client { settings: Arc::new(settings) })
    }
}

impl Client {
    /// A client without a credential and with the usual limits: all that a Unix socket needs.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn new(endpoint: Endpoint) -> Result<Self, SetupError> {
        Self::builder(endpoint).build()
    }

    /// A client of the daemon at a Unix socket, as the local user.
    pub fn local(socket: impl Into<PathBuf>) -> Self {
        Self { settings: Arc::new(Settings::local(socket.into())) }
    }

    /// A client to be put together.
    pub fn builder(endpoint: Endpoint) -> Builder {
        Builder { endpoint, credential: None, trust: None, identity: None, limits: Limits::default() }
    }

    /// Where its daemon is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.settings.endpoint
    }

    /// Sends a request; gives the answer, unless the daemon said no.
    ///
    /// # Errors
    /// [`ClientError::Problem`] says why it said no; the others why there is no whole answer.
    pub async fn send(&self, request: &Request) -> Result<Response, ClientError> {
        self.exchange(request).await?.accepted()
    }

    /// Sends a request; gives the answer, whatever its status.
    ///
    /// # Errors
    /// There is no whole answer.
    pub async fn exchange(&self, request: &Request) -> Result<Response, ClientError> {
        let mut connection = Connection::open(&self.settings).await?;
        let answer = connection.ask(request, true).await?;
        connection.close().await;
        Ok(answer)
    }

    /// Reads a resource.
    ///
    /// # Errors
    /// As [`Client::send`]; the answer is no JSON.
    pub async fn get(&self, target: &str) -> Result<Value, ClientError> {
        self.send(&Request::get(target)).await?.json()
    }

    /// POST, with a body or without one; gives what is answered.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn post(&self, target: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        self.send(&Request::posted(target, body)).await?.json()
    }

    /// Deletes a resource.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn delete(&self, target: &str) -> Result<(), ClientError> {
        self.send(&Request::delete(target)).await.map(drop)
    }

    /// A connection that is kept for many requests.
    ///
    /// # Errors
    /// There is none.
    pub async fn connect(&self) -> Result<Connection, ClientError> {
        Connection::open(&self.settings).await
    }

    /// The pages of a list: a GET, with its filters.
    pub fn pages(&self, list: Request) -> Pages {
        Pages::new(self.clone(), list)
    }

    /// One resource as it changes, by long polls of `wait` at most, in whole seconds up to 60.
    pub fn watch(&self, resource: Request, wait: Duration) -> Watch {
        Watch::new(self.clone(), resource, wait)
    }

    /// The event stream: `GET /v1/events/stream` with its filters, `after` among them.
    ///
    /// # Errors
    /// As [`Client::send`]; the answer is no event stream.
    pub async fn events(&self, stream: &Request) -> Result<Events, ClientError> {
        let connection = Connection::open(&self.settings).await?;
        Events::open(connection, stream, &self.settings.limits).await
    }
}
