//! `mirrorvmd identity accept`: a host becomes another one to its peers, because somebody says so.

use std::error::Error;
use std::io::Write as _;
use std::path::Path;

use mirrorvm::transport::PeerIdentity;

use crate::out::out;

/// Makes the key in `state_dir` the host's, or makes one; prints the identity.
///
/// # Errors
/// A running daemon, a database or a key that cannot be used.
pub fn accept(state_dir: &Path) -> Result<(), Box<dyn Error>> {
    let entry = |old: Option<&PeerIdentity>, new: &PeerIdentity| {
        let old = old.map_or_else(|| "none".to_owned(), ToString::to_string);
        super::entry("identity_accept", &format!("identity {old} -> {new}"))
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let (old, new) = runtime.block_on(mirrorvm::host::accept_identity(state_dir, entry))?;
    if let Some(old) = old.filter(|old| *old != new) {
        writeln!(std::io::stderr(), "mirrorvmd: every peer that pins {old} has to be told the new identity")?;
    }
    writeln!(out(), "{new}")?;
    Ok(())
}
