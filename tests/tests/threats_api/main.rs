//! The list of threats to the API, row by row: every test's name begins with its row. What other programs
//! show of a row is named here too.
//!
//! | row | shown by |
//! |---|---|
//! | 52, who connects | `row_52_the_api_lets_no_wrong_certificate_in`, `row_52_the_peer_port_lets_nobody_in_but_known_hosts`; `api_access`: `over_tls_callers_are_their_certificates_or_tokens`; the library's `transport/tests/refusals.rs` |
//! | 53, slow and large | `row_53_a_client_of_one_byte_at_a_time_is_cut`, `row_53_bodies_and_heads_beyond_the_bounds_are_refused`, `row_53_a_thousand_idle_connections_keep_nobody_out`; `api_access`: `slow_and_greedy_clients_hurt_themselves_alone` |
//! | 54, ids | `row_54_ids_that_are_none_reach_no_file`; `api_access`: `each_role_may_do_what_is_its_own_and_no_more` (another tenant's id) |
//! | 55, other users | `row_55_another_user_on_the_socket_is_refused_and_logged`, `row_55_a_reader_that_asks_for_changes_is_refused_and_logged` |
//! | 56, overrides | `row_56_overrides_of_a_migration_need_the_role_of_what_they_do`, `row_56_headers_do_not_change_what_is_asked_or_who_asks` |
//! | 57, links at start | `row_57_links_in_place_of_the_daemons_files_are_refused_at_start` |
//! | 58, secrets | `row_58_secrets_are_in_no_log_answer_metric_or_environment`, `row_58_the_daemon_and_its_children_dump_no_core`; `confined`: `a_canary_is_found_where_it_is_kept_and_nowhere_else`; `api_access`: `tokens_are_told_once_withdrawn_and_expire` |
//! | 59, system calls | `confined`: `every_thread_of_a_daemon_is_confined`; the daemon's `confine::calls`: `a_call_that_is_on_no_list_ends_the_process` |
//! | 60, any bad field | `row_60_every_body_of_the_document_is_checked_field_by_field`, `row_60_methods_that_a_path_does_not_have_are_refused`; by hand and exactly: `bad_input` |
//! | 61, dependencies | `row_61_every_dependency_is_vetted` |

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

mod bodies;
mod certificates;
mod dependencies;
mod links;
mod overrides;
mod paths;
mod secrets;
mod slow_clients;
mod users;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm_tests::{AnyServer, Daemon, Reply, Request, daemon_binary, embedded, kvm, repository, until};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, SignatureScheme};
use serde_json::{Map, Value, json};

/// No pace: these tests send more than a person would.
const HURRIED: (&str, &str) = ("MIRRORVM_LIMITS_REQUESTS_PER_SECOND", "0");
const LONG: Duration = Duration::from_secs(20);

fn token(d: &Daemon, role: &str) -> String {
    let mut body = json!({"name": role, "role": role, "expires_in_seconds": 600});
    if role == "vmm" {
        body["guest"] = json!("g1");
    }
    d.post("/v1/tokens", &body).expect(201).json()["secret"].as_str().unwrap().to_owned()
}

fn bearing(request: Request, secret: &str) -> Request {
    request.header("authorization", &format!("Bearer {secret}"))
}

/// The entry of the audit log about `reply`.
fn audited(d: &Daemon, reply: &Reply) -> Value {
    let id = reply.header("x-request-id").unwrap();
    let log = d.items("/v1/audit-log?limit=1000");
    log.into_iter().find(|e| e["request_id"] == id).unwrap_or_else(|| panic!("no entry of {id}"))
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2099, 1, 1);
    params
}

/// The daemon's socket, and `text` sent to it.
fn open(d: &Daemon, text: &[u8]) -> UnixStream {
    let mut socket = UnixStream::connect(d.socket()).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.set_write_timeout(Some(LONG)).unwrap();
    let _ = socket.write_all(text);
    socket
}

/// The document as it is committed.
fn document() -> Value {
    serde_json::from_slice(&std::fs::read(repository().join("openapi/v1.json")).unwrap()).unwrap()
}

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

/// Every operation: method in capitals, path, its definition.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in METHODS {
            if let Some(operation) = item.get(method) {
                found.push((method.to_ascii_uppercase(), path.clone(), operation.clone()));
            }
        }
    }
    found
}

/// The media type and an example of an operation's body, if it has one.
fn body_of(document: &Value, operation: &Value) -> Option<(String, Value)> {
    let (kind, media) = operation["requestBody"]["content"].as_object()?.iter().next()?;
    let schema = match media["schema"]["$ref"].as_str() {
        Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap(),
        None => &media["schema"],
    };
    let example = media.get("example").or_else(|| schema.get("example")).cloned().unwrap_or(Value::Null);
    Some((kind.clone(), example))
}
