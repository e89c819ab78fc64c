//! Why a client cannot be set up, and why a request has no answer.
//!
//! Owns: both lists and their sentences. Must not know: how requests are sent. No sentence has a credential.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use hyper::StatusCode;

use crate::endpoint::{Endpoint, EndpointError};
use crate::problem::Problem;
use crate::request::RequestError;

/// Why a client cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The endpoint is none that anything may be sent to.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// TLS, and nothing to hold the daemon's certificate against.
    #[error("a tls: endpoint needs the authority or the digest of the daemon's certificate")]
    NoTrust,
    /// Certificates, and no TLS.
    #[error("certificates are for tls: endpoints; {0} has none")]
    TrustInTheClear(Endpoint),
    /// A file cannot be read, or holds nothing of what it should.
    #[error("cannot use {}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Others than the owner have access to a secret.
    #[error("{} has mode {mode:04o}: group and others must have no access to a secret", path.display())]
    TooOpen {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Certificates or keys cannot be used.
    #[error("the certificates cannot be used")]
    Certificate(#[source] Box<dyn Error + Send + Sync>),
    /// A pin has not the form of one.
    #[error("{0:?} is no SHA-256 of a certificate: 64 hexadecimal digits")]
    Pin(String),
    /// A token has not the form of one.
    #[error("a bearer token is 1 to 4096 visible ASCII characters")]
    Token,
    /// A cookie has not the form of one.
    #[error("a session's cookie is NAME=VALUE in visible ASCII, at most 4096 characters of it")]
    Cookie,
    /// The runtime of a blocking client does not start.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
}

/// What was waited for in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// An open connection, TLS included.
    Connection,
    /// The whole answer.
    Answer,
    /// The next piece of an event stream.
    Event,
}

impl Awaited {
    const fn what(self) -> &'static str {
        match self {
            Self::Connection => "no connection with",
            Self::Answer => "no whole answer from",
            Self::Event => "silence on the event stream of",
        }
    }
}

/// Why a request has no answer, or which problem it has.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The request is none; nothing was sent.
    #[error("this request cannot be sent")]
    Request(#[from] RequestError),
    /// Nobody listens there, or not for us; nothing was sent.
    #[error("cannot connect to {endpoint}")]
    Connect {
        /// Where.
        endpoint: Endpoint,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// There is no TLS with it, or not with whom it should be; nothing was sent.
    #[error("no TLS connection with {endpoint}")]
    Tls {
        /// Where.
        endpoint: Endpoint,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// A deadline passed.
    #[error("{} {endpoint} within {limit:?}", awaited.what())]
    Late {
        /// Where.
        endpoint: Endpoint,
        /// What was waited for.
        awaited: Awaited,
        /// How long.
        limit: Duration,
    },
    /// The connection ended before the whole answer was there: whether the daemon did what was asked is open.
    #[error("the connection to {endpoint} broke off")]
    Broken {
        /// Where.
        endpoint: Endpoint,
        /// What happened.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A kept connection was used after one of its exchanges had failed; nothing was sent.
    #[error("the connection to {0} is over")]
    Over(Endpoint),
    /// What came is no HTTP, or a head without end.
    #[error("what {endpoint} answers is no HTTP")]
    NotHttp {
        /// Where.
        endpoint: Endpoint,
        /// What is wrong with it.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The answer's body, or an event, has more bytes than the client takes.
    #[error("the answer of {endpoint} is longer than {limit} bytes")]
    TooLarge {
        /// Where.
        endpoint: Endpoint,
        /// Most bytes of it.
        limit: u64,
    },
    /// A good answer is not what the API would say.
    #[error("the answer of {endpoint} is not of this API: {what}")]
    Answer {
        /// Where.
        endpoint: Endpoint,
        /// What is wrong with it.
        what: String,
    },
    /// The daemon said no, and why.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// A refusal without a problem: what answered is not the daemon, but perhaps a proxy before it.
    #[error("{endpoint} answered {status} without saying which problem it is")]
    Status {
        /// Where.
        endpoint: Endpoint,
        /// The status.
        status: StatusCode,
    },
}

impl ClientError {
    /// The problem, when it is one.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            Self::Request(_)
            | Self::Connect { .. }
            | Self::Tls { .. }
            | Self::Late { .. }
            | Self::Broken { .. }
            | Self::Over(_)
            | Self::NotHttp { .. }
            | Self::TooLarge { .. }
            | Self::Answer { .. }
            | Self::Status { .. } => None,
        }
    }

    /// Whether it is certain that the daemon has done nothing of what was asked, and never will.
    pub fn is_without_effect(&self) -> bool {
        match self {
            Self::Request(_) | Self::Connect { .. } | Self::Tls { .. } | Self::Over(_) => true,
            Self::Late { awaited, .. } => *awaited == Awaited::Connection,
            // Of a fault in the middle of the act the daemon does not know either how far it came.
            Self::Problem(problem) => problem.status < 500,
            Self::Broken { .. }
            | Self::NotHttp { .. }
            | Self::TooLarge { .. }
            | Self::Answer { .. }
            | Self::Status { .. } => false,
        }
    }
}
