//! HTTP without resources: bodies, queries, preconditions, long polls, the middleware around every route.
//!
//! Must not know: guests, mirrors, migrations.

pub mod audit;
pub mod body;
pub mod change;
pub mod gate;
pub mod guard;
pub mod idempotency;
pub mod meant;
pub mod middleware;
pub mod negotiate;
pub mod places;
pub mod precondition;
pub mod query;
pub mod quiet;
pub mod refusals;
pub mod respond;
pub mod stream;
pub mod trace;
pub mod wait;
