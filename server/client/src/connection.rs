//! One connection and the requests on it, one after the other.
//!
//! Owns: sending, reading within deadline and bound, and whether it may be used again. Must not know: what is
//! asked for.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::error::{Awaited, ClientError};
use crate::request::Request;
use crate::response::Response;
use crate::settings::Settings;
use crate::text::without;
use crate::wire::Wire;

/// Most bytes of an answer's head, and of what is read at once.
const HEAD_MAX: usize = 64 << 10;
/// Most headers of an answer.
const HEADERS_MAX: usize = 128;
/// How long the daemon has to close a connection that is over, before it is left.
const CLOSE: Duration = Duration::from_secs(1);

/// Moves the bytes of a connection for as long as something is awaited from it: nothing runs beside.
struct Driver {
    connection: http1::Connection<TokioIo<Wire>, Full<Bytes>>,
    is_over: bool,
}

impl Driver {
    async fn until<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            // How it ended is told to whoever waits for an answer.
            self.is_over = self.is_over || Pin::new(&mut self.connection).poll(cx).is_ready();
            work.as_mut().poll(cx)
        })
        .await
    }
}

/// Why there is no answer.
enum Fault {
    Http(hyper::Error),
    TooLarge(u64),
}

impl Fault {
    fn at(self, to: &Settings) -> ClientError {
        let endpoint = to.endpoint.clone();
        match self {
            Self::TooLarge(limit) => ClientError::TooLarge { endpoint, limit },
            Self::Http(e) if e.is_parse() => ClientError::NotHttp { endpoint, source: e.into() },
            Self::Http(e) => ClientError::Broken { endpoint, source: e.into() },
        }
    }
}

/// A connection that is kept for one request after the other. After a failed exchange it is over: what came
/// next on it could be the answer to another request.
///
/// The daemon closes a connection on which nothing happens for some time; a request that meets that is
/// [`ClientError::Broken`].
pub struct Connection {
    settings: Arc<Settings>,
    sender: http1::SendRequest<Full<Bytes>>,
    driver: Driver,
    /// An exchange failed, or was given up in the middle.
    is_over: bool,
}

impl Connection {
    pub(crate) async fn open(settings: &Arc<Settings>) -> Result<Self, ClientError> {
        let wire = Wire::open(settings).await?;
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_MAX).max_headers(HEADERS_MAX);
        let opened = builder.handshake(TokioIo::new(wire)).await;
        let (sender, connection) = opened.map_err(|e| Fault::Http(e).at(settings))?;
        let driver = Driver { connection, is_over: false };
        Ok(Self { settings: Arc::clone(settings), sender, driver, is_over: false })
    }

    /// Sends a request; gives the answer, whatever its status.
    ///
    /// # Errors
    /// There is no whole answer; then the connection is over.
    pub async fn exchange(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.ask(request, false).await
    }

    /// Sends a request; gives the answer, unless the daemon said no.
    ///
    /// # Errors
    /// There is no whole answer, and the connection is over; or it is a problem, and the connection goes on.
    pub async fn send(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.exchange(request).await?.accepted()
    }

    /// Reads a resource.
    ///
    /// # Errors
    /// As [`Connection::send`]; the answer is no JSON.
    pub async fn get(&mut self, target: &str) -> Result<Value, ClientError> {
        self.send(&Request::get(target)).await?.json()
    }

    /// POST, with a body or without one; gives what is answered.
    ///
    /// # Errors
    /// As [`Connection::get`].
    pub async fn post(&mut self, target: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        self.send(&Request::posted(target, body)).await?.json()
    }

    pub(crate) async fn ask(&mut self, request: &Request, last: bool) -> Result<Response, ClientError> {
        let limit = request.deadline().unwrap_or(self.settings.limits.answer);
        let up_to = request.bound().unwrap_or(self.settings.limits.body);
        let (driver, sent) = self.begin(request, last)?;
        let answer = tokio::time::timeout(
            limit,
            driver.until(async {
                let (head, body) = sent.await?.into_parts();
                Ok((head, collect(body, up_to).await?))
            }),
        );
        let answer = answer.await.map_err(|_| self.late(Awaited::Answer, limit))?;
        let (head, body) = answer.map_err(|fault: Fault| fault.at(&self.settings))?;
        self.is_over = false;
        let body = self.clean(head.status.as_u16(), body);
        Ok(Response::new(self.settings.endpoint.clone(), head, body))
    }

    /// Sends a request whose answer is read bit by bit; one of no success is given whole.
    pub(crate) async fn follow(mut self, request: &Request) -> Result<Result<Bits, Response>, ClientError> {
        let limit = request.deadline().unwrap_or(self.settings.limits.answer);
        let up_to = request.bound().unwrap_or(self.settings.limits.body);
        let (driver, sent) = self.begin(request, true)?;
        let begun = tokio::time::timeout(
            limit,
            driver.until(async {
                let (head, body) = sent.await?.into_parts();
                if head.status.is_success() {
                    return Ok((head, Err(body)));
                }
                Ok((head, Ok(collect(body, up_to).await?)))
            }),
        );
        let begun = begun.await.map_err(|_| self.late(Awaited::Answer, limit))?;
        let (head, body) = begun.map_err(|fault: Fault| fault.at(&self.settings))?;
        let endpoint = self.settings.endpoint.clone();
        Ok(match body {
            Err(body) => {
                Ok(Bits { connection: self, body, head: Response::new(endpoint, head, Bytes::new()) })
            }
            Ok(whole) => {
                let whole = self.clean(head.status.as_u16(), whole);
                Err(Response::new(endpoint, head, whole))
            }
        })
    }

    /// Begins an exchange; until it has ended well, the connection is over.
    fn begin<'a>(
        &'a mut self,
        request: &Request,
        last: bool,
    ) -> Result<
        (&'a mut Driver, impl Future<Output = Result<hyper::Response<Incoming>, Fault>> + use<'a>),
        ClientError,
    > {
        let prepared = request.prepare(&self.settings, last)?;
        if std::mem::replace(&mut self.is_over, true) {
            return Err(ClientError::Over(self.settings.endpoint.clone()));
        }
        let sender = &mut self.sender;
        let sent = async move {
            sender.ready().await.map_err(Fault::Http)?;
            sender.send_request(prepared).await.map_err(Fault::Http)
        };
        Ok((&mut self.driver, sent))
    }

    fn late(&self, awaited: Awaited, limit: Duration) -> ClientError {
        ClientError::Late { endpoint: self.settings.endpoint.clone(), awaited, limit }
    }

    /// A refusal's body goes into errors and logs. Whatever echoes requests there, our credential stays out.
    fn clean(&self, status: u16, body: Bytes) -> Bytes {
        match &self.settings.credential {
            Some(credential) if status >= 400 => without(&body, credential.secret()).into(),
            _ => body,
        }
    }

    /// Hangs up and waits a moment until the daemon has, too: its place there is free then.
    pub(crate) async fn close(self) {
        self.driver.connection.into_parts().io.into_inner().close(CLOSE).await;
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("to", &self.settings).field("is_over", &self.is_over).finish()
    }
}

impl From<hyper::Error> for Fault {
    fn from(error: hyper::Error) -> Self {
        Self::Http(error)
    }
}

/// An answer that is read bit by bit.
pub(crate) struct Bits {
    connection: Connection,
    body: Incoming,
    /// The answer without its body.
    pub(crate) head: Response,
}

impl Bits {
    /// What is read from it has no end.
    pub(crate) fn too_large(&self, limit: u64) -> ClientError {
        Fault::TooLarge(limit).at(&self.connection.settings)
    }

    /// The next bytes; `None` at the end.
    pub(crate) async fn next(&mut self, limit: Duration) -> Result<Option<Bytes>, ClientError> {
        let Self { connection, body, .. } = self;
        loop {
            let frame = tokio::time::timeout(limit, connection.driver.until(body.frame())).await;
            match frame.map_err(|_| connection.late(Awaited::Event, limit))? {
                None => return Ok(None),
                Some(Err(error)) => return Err(Fault::Http(error).at(&connection.settings)),
                // What is no data is a trailer.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

/// Reads a body to its end.
async fn collect(mut body: Incoming, up_to: u64) -> Result<Bytes, Fault> {
    if body.size_hint().lower() > up_to {
        return Err(Fault::TooLarge(up_to));
    }
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if (first.len() + rest.len() + data.len()) as u64 > up_to {
            return Err(Fault::TooLarge(up_to));
        }
        if first.is_empty() && rest.is_empty() {
            first = data;
        } else {
            if rest.is_empty() {
                // Known in advance unless the answer is chunked; what is announced is within the bound.
                rest.reserve(first.len() + data.len() + body.size_hint().lower() as usize);
                rest.extend_from_slice(&std::mem::take(&mut first));
            }
            rest.extend_from_slice(&data);
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}
