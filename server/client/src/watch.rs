//! One resource as it changes.
//!
//! Owns: long polls and the ETag between them. Must not know: what is watched.

use std::time::Duration;

use hyper::StatusCode;
use serde_json::Value;

use crate::client::Client;
use crate::error::ClientError;
use crate::request::Request;

/// Longest wait of a long poll, in seconds.
const WAIT_MAX: u64 = 60;

/// One resource, as it is and as it changes.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    resource: Request,
    etag: Option<String>,
}

impl Watch {
    pub(crate) fn new(client: Client, resource: Request, wait: Duration) -> Self {
        let wait = format!("{}s", wait.as_secs().min(WAIT_MAX));
        Self { client, resource: resource.query("wait", &wait), etag: None }
    }

    /// The resource, as soon as it is not what was given last; `None` when it did not change for the time of
    /// a long poll.
    ///
    /// # Errors
    /// As [`Client::send`]; the next call asks for the same again.
    pub async fn changed(&mut self) -> Result<Option<Value>, ClientError> {
        let request = match &self.etag {
            Some(etag) => self.resource.clone().if_none_match(etag),
            None => self.resource.clone(),
        };
        let answer = self.client.send(&request).await?;
        if answer.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        let value = answer.json()?;
        self.etag = answer.etag().map(str::to_owned);
        Ok(Some(value))
    }
}
