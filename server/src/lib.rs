//! `mirrorvmd`: the REST daemon over the library `mirrorvm`.
//!
//! Owns: the HTTP API, its document, the sockets, the command line. Must not know: how a guest runs, what a
//! mirror is made of, how a page moves; all of that is one library call away.
//!
//! - [`api`]: wire types. [`routes`]: parse, one library call, render. [`problem`]: what can go wrong.
//! - [`access`]: who may call what. [`config`]: file, environment, command line. [`metrics`]: what is
//!   counted.
//! - [`confine`]: what the daemon gives up.
//! - [`http`]: bodies, conditions, long polls, middleware. [`openapi`]: the document. [`draw`]: layouts as
//!   SVG.
//! - `daemon`: the daemon for programs with drivers of their own.
//! - `offline`: the command line at a state directory without its daemon.
//! - `bench`: what the parts cost. [`serve`]: sockets and the accept loop. [`cli`]: the command line.
//! - `stored`: the daemon's own documents as they are on disk.
//! - `open`: a link for a browser, as a client of the API.
//! - [`demo`]: two daemons and a migration between them; a client of the API like any other.

pub mod access;
pub mod api;
mod bench;
pub mod cli;
pub mod config;
pub mod confine;
mod daemon;
pub mod demo;
pub mod draw;
pub mod http;
pub mod metrics;
mod offline;
mod open;
pub mod openapi;
mod out;
mod pair;
pub mod problem;
pub mod routes;
mod selftest;
pub mod serve;
pub mod state;
mod stored;

pub use daemon::{Daemon, DaemonBuilder};
