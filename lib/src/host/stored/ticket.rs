//! A ticket on disk, as the host that gave it keeps it.

use jiff::Timestamp;
use serde_json::Value;

use crate::host::migrations::tickets::Kept;
use crate::store::form::{fill, form};

form! {
    TicketForm of Kept, version 5 by forward {
        source_name: String,
        source_identity: String,
        used: bool,
        good_until: Option<Timestamp>,
    }
}

/// Version 4 left out what says nothing.
fn forward(_from: u64, document: &mut Value) {
    fill(document, [("good_until", Value::Null)]);
}
