//! What an error is about, in the words that people read.
//!
//! Owns: those words. Must not know: which error. Resources are named by the kinds that events tell of; what
//! is only ever a part of one is listed here.

use std::fmt;

use super::events::ResourceKind;

/// A resource, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A resource.
    Resource(ResourceKind),
    /// A RAM block of a guest.
    RamBlock,
    /// A migration's digests of the guest's pages.
    PageDigests,
    /// A mirror's helper.
    Helper,
    /// An import of sealed batches into a guest.
    Import,
    /// The token by which a hand-over to this host ended.
    HandOverToken,
}

impl From<ResourceKind> for Subject {
    fn from(kind: ResourceKind) -> Self {
        Self::Resource(kind)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self {
            Self::Resource(kind) => return kind.fmt(f),
            Self::RamBlock => "RAM block",
            Self::PageDigests => "page digests of migration",
            Self::Helper => "helper",
            Self::Import => "import",
            Self::HandOverToken => "token of a hand-over to this host",
        };
        f.write_str(words)
    }
}

impl fmt::Display for ResourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            // Whoever asked for one knows which of the two.
            Self::Host | Self::PeerHost => "host",
            Self::Guest => "guest",
            Self::Mirror => "mirror",
            Self::Migration => "migration",
            Self::HelperImage => "helper image",
        })
    }
}
