//! The one table of operations: method, path, operation id, who may call it. What is not in it is for nobody.

use std::collections::HashMap;
use std::sync::LazyLock;

use axum::http::Method;

use super::Access;

/// An operation of the API, with who may call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// HTTP method, in capitals.
    pub method: &'static str,
    /// Path, as the router has it.
    pub path: &'static str,
    /// Id of the operation in the document.
    pub id: &'static str,
    /// Which callers may call it.
    pub access: Access,
}

macro_rules! operations {
    ($($access:ident $method:ident $path:literal $id:ident,)+) => {
        /// All operations, in the order of the table.
        pub const OPERATIONS: &[Operation] = &[$(Operation {
            method: stringify!($method), path: $path, id: stringify!($id), access: Access::$access,
        },)+];
    };
}

operations! {
    Public GET "/" index_get,
    Public GET "/livez" health_live,
    Public GET "/readyz" health_ready,
    Read GET "/metrics" metrics_get,
    Public GET "/docs" openapi_docs,
    Public GET "/v1/openapi.json" openapi_get,
    Public GET "/v1/openapi-3.0.json" openapi_3_0_get,
    Public GET "/v1/version" version_get,
    Public GET "/v1/problems" problem_list,
    Public GET "/v1/problems/{code}" problem_get,
    Known GET "/v1/whoami" whoami_get,
    Read GET "/v1/host" host_get,
    Administer PATCH "/v1/host" host_update,
    Read GET "/v1/host/capabilities" host_capabilities_get,
    Read GET "/v1/strategies" strategy_list,
    Read GET "/v1/strategies/{kind}" strategy_get,
    Read GET "/v1/hosts" peer_host_list,
    Administer POST "/v1/hosts" peer_host_create,
    Read GET "/v1/hosts/{host}" peer_host_get,
    Administer PATCH "/v1/hosts/{host}" peer_host_update,
    Administer DELETE "/v1/hosts/{host}" peer_host_delete,
    Read GET "/v1/hosts/{host}/deletion-preview" peer_host_deletion_preview_get,
    Read GET "/v1/hosts/{host}/capabilities" peer_host_capabilities_get,
    Read GET "/v1/guests" guest_list,
    Operate POST "/v1/guests" guest_create,
    Read GET "/v1/guests/{guest}" guest_get,
    Operate PUT "/v1/guests/{guest}" guest_put,
    Operate PATCH "/v1/guests/{guest}" guest_update,
    Operate DELETE "/v1/guests/{guest}" guest_delete,
    Read GET "/v1/guests/{guest}/deletion-preview" guest_deletion_preview_get,
    Operate POST "/v1/guests/{guest}/start" guest_start,
    Operate POST "/v1/guests/{guest}/pause" guest_pause,
    Operate POST "/v1/guests/{guest}/resume" guest_resume,
    Operate POST "/v1/guests/{guest}/stop" guest_stop,
    Administer POST "/v1/guests/{guest}/confirm" guest_confirm,
    Read GET "/v1/guests/{guest}/console" guest_console_get,
    Read GET "/v1/guests/{guest}/console.txt" guest_console_text_get,
    Read GET "/v1/guests/{guest}/stats" guest_stats_get,
    Read GET "/v1/guests/{guest}/ram-blocks" ram_block_list,
    Operate POST "/v1/guests/{guest}/ram-blocks" ram_block_create,
    Read GET "/v1/guests/{guest}/ram-blocks/{block}" ram_block_get,
    Operate POST "/v1/guests/{guest}/ram-blocks/{block}/plug" ram_block_plug,
    Operate POST "/v1/guests/{guest}/ram-blocks/{block}/unplug" ram_block_unplug,
    Report GET "/v1/guests/{guest}/encryption-status" encryption_status_list,
    Report POST "/v1/guests/{guest}/encryption-status" encryption_status_update,
    Read POST "/v1/guests/{guest}/address-space-plans" address_space_plan_create,
    Read GET "/v1/helper-images" helper_image_list,
    Administer POST "/v1/helper-images" helper_image_create,
    Read GET "/v1/helper-images/{image}" helper_image_get,
    Administer DELETE "/v1/helper-images/{image}" helper_image_delete,
    Read GET "/v1/helper-images/{image}/deletion-preview" helper_image_deletion_preview_get,
    Administer PUT "/v1/helper-images/{image}/content" helper_image_content_put,
    Read GET "/v1/mirrors" mirror_list,
    Operate POST "/v1/mirrors" mirror_create,
    Read GET "/v1/mirrors/{mirror}" mirror_get,
    Operate PUT "/v1/mirrors/{mirror}" mirror_put,
    Operate PATCH "/v1/mirrors/{mirror}" mirror_update,
    Operate DELETE "/v1/mirrors/{mirror}" mirror_delete,
    Read GET "/v1/mirrors/{mirror}/deletion-preview" mirror_deletion_preview_get,
    Operate POST "/v1/mirrors/{mirror}/exports" mirror_export,
    Operate POST "/v1/mirrors/{mirror}/imports" mirror_import,
    Read GET "/v1/mirrors/{mirror}/layout" mirror_layout_get,
    Read GET "/v1/mirrors/{mirror}/layout.svg" mirror_drawing_get,
    Read GET "/v1/mirrors/{mirror}/stats" mirror_stats_get,
    Read GET "/v1/mirrors/{mirror}/log" mirror_log_list,
    Read POST "/v1/migration-checks" migration_check_create,
    Read GET "/v1/migrations" migration_list,
    Operate POST "/v1/migrations" migration_create,
    Read GET "/v1/migrations/{migration}" migration_get,
    Operate PUT "/v1/migrations/{migration}" migration_put,
    Operate PATCH "/v1/migrations/{migration}" migration_update,
    Operate DELETE "/v1/migrations/{migration}" migration_delete,
    Read GET "/v1/migrations/{migration}/deletion-preview" migration_deletion_preview_get,
    Operate POST "/v1/migrations/{migration}/cancel" migration_cancel,
    Operate POST "/v1/migrations/{migration}/switchover" migration_switchover,
    Administer POST "/v1/migrations/{migration}/resolution" migration_resolve,
    Read GET "/v1/migrations/{migration}/hand-over-token" migration_hand_over_token_get,
    Read GET "/v1/migrations/{migration}/rounds" migration_round_list,
    Read GET "/v1/migrations/{migration}/page-digests" migration_page_digests_get,
    LetIn POST "/v1/incoming-migrations" incoming_migration_create,
    Read GET "/v1/events" event_list,
    Read GET "/v1/events/stream" event_stream,
    Administer GET "/v1/audit-log" audit_log_list,
    Administer GET "/v1/tokens" token_list,
    Administer POST "/v1/tokens" token_create,
    Administer DELETE "/v1/tokens/{token}" token_delete,
    Administer GET "/v1/tokens/{token}/deletion-preview" token_deletion_preview_get,
    Known POST "/v1/session-links" session_link_create,
    Public POST "/v1/session" session_create,
    Known DELETE "/v1/session" session_delete,
}

/// Finds the operation for a method and a path as the router has it. `HEAD` counts as `GET`.
pub fn find(method: &Method, path: &str) -> Option<&'static Operation> {
    static BY_ROUTE: LazyLock<HashMap<(&str, &str), &'static Operation>> =
        LazyLock::new(|| OPERATIONS.iter().map(|o| ((o.path, o.method), o)).collect());
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    BY_ROUTE.get(&(path, method)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Role;

    #[test]
    fn changes_need_more_than_reading() {
        // Who can do what is for those to know who decide on it.
        let admins = ["audit_log_list", "token_list", "token_deletion_preview_get"];
        for o in OPERATIONS {
            let pure = ["address_space_plan_create", "migration_check_create"].contains(&o.id);
            // What a caller may do is the same before and after.
            let own = ["session_link_create", "session_create", "session_delete"].contains(&o.id);
            let reads = o.method == "GET" || pure || own;
            assert_eq!(
                o.access.allows(Role::Viewer),
                reads && !admins.contains(&o.id) && o.access != Access::Report,
                "{}",
                o.id
            );
            assert!(o.access.allows(Role::Admin), "{}", o.id);
            assert!(o.access != Access::Public || o.method == "GET" || o.id == "session_create", "{}", o.id);
            assert!(!o.access.allows(Role::Operator) || o.access.text() != Access::Administer.text());
        }
        assert_eq!(find(&Method::HEAD, "/livez").unwrap().id, "health_live");
        assert!(find(&Method::TRACE, "/livez").is_none());
    }
}
