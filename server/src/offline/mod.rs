//! What the command line does with a state directory, mostly while no daemon has it.
//!
//! Owns: the entries of the audit log that such acts leave. Must not know: the API.

mod identity;
pub mod state;

pub use identity::accept as accept_identity;

use serde_json::json;
use uuid::Uuid;

/// The audit log's entry about an act from the command line; the role is who may write the directory.
fn entry(operation: &str, what: &str) -> String {
    let user = rustix::process::geteuid().as_raw();
    json!({
        "principal": format!("unix:{user}"),
        "authenticated_by": "local_user",
        "role": "admin",
        "operation": operation,
        "path": what,
        "dry_run": false,
        "status": 200,
        "code": null,
        "location": null,
        "replayed": false,
        "request_id": Uuid::now_v7().to_string(),
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_act_from_the_command_line_is_an_entry_like_any_other() {
        let read: crate::http::audit::AuditRecord =
            serde_json::from_str(&entry("identity_accept", "identity a -> b")).unwrap();
        assert_eq!((read.operation.as_str(), read.path.as_str()), ("identity_accept", "identity a -> b"));
        assert!(read.principal.is_some_and(|p| p.starts_with("unix:")));
    }
}
