//! `mirrorvmd identity show` and `accept`: what a host is to its peers; and it becomes another one, because
//! somebody says so.

use std::error::Error;
use std::io::Write as _;
use std::path::Path;

use mirrorvm::transport::{Identity, IdentityFacts, PeerIdentity};
use serde_json::json;

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

/// Prints what the host of `state_dir` is to its peers. Changes nothing.
///
/// # Errors
/// No key there, or one that cannot be used.
pub fn show(state_dir: &Path, as_json: bool) -> Result<(), Box<dyn Error>> {
    let IdentityFacts { pin, key, certificate, names, validity } =
        Identity::facts(&state_dir.join("identity"))?;
    let mut out = out();
    if as_json {
        let said = json!({
            "identity": pin.to_string(),
            "names": names,
            "valid_from": validity.as_ref().map(|v| &v.0),
            "valid_until": validity.as_ref().map(|v| &v.1),
            "key_path": key,
            "certificate_path": certificate,
        });
        serde_json::to_writer_pretty(&mut out, &said)?;
        return Ok(writeln!(out)?);
    }
    writeln!(out, "identity     {pin}")?;
    writeln!(out, "names        {}", if names.is_empty() { "none".into() } else { names.join(", ") })?;
    match validity {
        Some((from, until)) => {
            writeln!(out, "validity     {from} to {until}; dates decide nothing between hosts")?
        }
        None => writeln!(out, "validity     no certificate of this key; the next start makes one")?,
    }
    writeln!(out, "key          {}", key.display())?;
    writeln!(out, "certificate  {}", certificate.display())?;
    Ok(())
}
