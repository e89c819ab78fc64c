//! The host's documents as they are on disk: a form for each, apart from the types that the host works with.
//!
//! Owns: these forms, one file a kind of document, and what leads to them from those of earlier versions.
//! Must not know: when a document is written, what is done with one.
//!
//! What a form is, and how it is made so that it has every member of its type, is in
//! [`form`](crate::store::form); why there are forms is in docs/decisions/0029-stored-forms.md. What each
//! looks like is in `lib/tests/data/stored`, by its version. Whoever changes a form raises its version (to
//! that of the database, which goes up, too), says in its `forward` how the one before becomes this one, and
//! adds files beside those of the version before, which stay and are still read.

mod event;
mod fault;
mod guest;
mod hand_over;
mod host;
mod image;
mod migration;
mod peer;
mod ram;
mod strategy;
mod ticket;

#[cfg(test)]
mod tests;

pub(super) use host::{HostId, KnownIdentity, PageSecret};

use crate::host::HostSettings;
use crate::host::images::types::ImageRecord;
use crate::host::migrations::hand_over::HandOver;
use crate::host::open::{HOST_ID, IDENTITY, PAGE_SECRET};
use crate::host::settings;
use crate::host::{GuestRecord, MigrationRecord, PeerRecord};
use crate::store::form::{Unread, renewed};
use crate::store::{DocumentRef, Kind};

/// Gives a document of the host's the form of this build; `None`: it has it, or is none of the host's. For
/// whoever opens a host's [`Store`](crate::store::Store) without the host.
///
/// # Errors
/// What of it is not understood.
pub fn renew(document: &DocumentRef, body: &[u8]) -> Result<Option<String>, Unread> {
    match document {
        DocumentRef::Document(Kind::Guest, _) => renewed::<GuestRecord>(body),
        DocumentRef::Document(Kind::Migration, _) => renewed::<MigrationRecord>(body),
        DocumentRef::Document(Kind::Peer, _) => renewed::<PeerRecord>(body),
        DocumentRef::Document(Kind::HandOver, _) => renewed::<HandOver>(body),
        DocumentRef::Document(Kind::HelperImage, _) => renewed::<ImageRecord>(body),
        DocumentRef::Meta(key) => match key.as_str() {
            HOST_ID => renewed::<HostId>(body),
            IDENTITY => renewed::<KnownIdentity>(body),
            PAGE_SECRET => renewed::<PageSecret>(body),
            settings::KEY => renewed::<HostSettings>(body),
            _ => Ok(None),
        },
        DocumentRef::Entry(..) | DocumentRef::Keyed(..) => Ok(None),
    }
}
