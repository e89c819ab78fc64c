//! What the command line does with a state directory, mostly while no daemon has it.
//!
//! Owns: the entries of the audit log that such acts leave. Must not know: the API.

mod identity;
pub mod state;

pub use identity::{accept as accept_identity, show as show_identity};

use mirrorvm::store::form;
use uuid::Uuid;

use crate::access::Role;
use crate::access::caller::Method;
use crate::http::audit::{AuditOutcome, AuditRecord};

/// The audit log's entry about an act from the command line; the role is who may write the directory.
fn entry(operation: &str, what: &str) -> String {
    let record = AuditRecord {
        principal: Some(format!("unix:{}", rustix::process::geteuid().as_raw())),
        authenticated_by: Some(Method::LocalUser.name().to_owned()),
        role: Some(Role::Admin.name().to_owned()),
        session: None,
        operation: operation.to_owned(),
        path: what.to_owned(),
        dry_run: false,
        outcome: AuditOutcome { status: 200, ..AuditOutcome::default() },
        request_id: Uuid::now_v7().to_string(),
        left_out: 0,
    };
    form::write(&record).expect("texts and numbers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_act_from_the_command_line_is_an_entry_like_any_other() {
        let read: AuditRecord = form::read(entry("identity_accept", "identity a -> b").as_bytes()).unwrap();
        assert_eq!((read.operation.as_str(), read.path.as_str()), ("identity_accept", "identity a -> b"));
        assert!(read.principal.is_some_and(|p| p.starts_with("unix:")));
    }
}
