//! HTTP client of one daemon's API, for whoever operates it: tools, the demo, the benchmarks, the tests.
//!
//! Owns: connecting (Unix socket, TCP on loopback, TLS), credentials, deadlines and bounds of answers,
//! problems as values, pages, long polls and event streams. Must not know: the resources of the API, whose
//! bodies are JSON values here; the daemon's and the library's types.
//!
//! - [`Endpoint`]: where the daemon is. [`Credential`]: who asks. [`Trust`], [`Identity`]: certificates.
//! - [`Client`]: one connection per request. [`Connection`]: one that is kept for many.
//! - [`Request`], [`Response`], [`ClientError`], [`Problem`].
//! - [`Pages`]: lists. [`Watch`]: one resource as it changes. [`Events`]: the event stream.
//! - [`blocking`]: the same for callers without a runtime.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use mirrorvm_client::{Client, ClientError, Request};
//!
//! let client = Client::local("/var/lib/mirrorvm/mirrorvmd.sock");
//! match client.send(&Request::post("/v1/guests/g1/start").once()).await {
//!     Ok(answer) => println!("{}", answer.json()?["state"]),
//!     Err(ClientError::Problem(p)) if p.code == "guest_moved" => println!("it is elsewhere now"),
//!     Err(error) => return Err(error.into()),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Nothing runs in the background: a connection makes progress while its method is awaited, and dropping the
//! future hangs up.

pub mod blocking;
mod client;
mod connection;
mod credential;
mod endpoint;
mod error;
mod events;
mod limits;
mod pages;
mod problem;
mod request;
mod response;
mod settings;
mod sse;
mod text;
mod trust;
mod watch;
mod wire;

pub use client::{Builder, Client};
pub use connection::Connection;
pub use credential::Credential;
pub use endpoint::{Endpoint, EndpointError};
pub use error::{Awaited, ClientError, SetupError};
pub use events::Events;
pub use hyper::{HeaderMap, StatusCode};
pub use limits::Limits;
pub use pages::Pages;
pub use problem::{BlockedReason, Place, Problem, ValueError};
pub use request::{Request, RequestError};
pub use response::Response;
pub use sse::Event;
pub use text::escape;
pub use trust::{Identity, Trust};
pub use watch::Watch;
