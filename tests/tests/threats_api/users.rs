//! Row 55: other users of this machine on the socket.

use super::*;

/// Status and body of what curl gets as the user `uid`; `None`, said loudly, where that cannot be tried.
fn as_user(uid: u32, socket: &Path, arguments: &[&str]) -> Option<(u16, String)> {
    let run = |uid: u32, arguments: &[&str]| {
        Command::new("setpriv")
            .args(["--reuid", &uid.to_string(), "--regid", &uid.to_string(), "--clear-groups", "curl", "-s"])
            .args(["-w", "\n%{http_code}", "--unix-socket"])
            .arg(socket)
            .args(arguments)
            .output()
    };
    if !rustix::process::geteuid().is_root()
        || !run(0, &["http://localhost/livez"]).is_ok_and(|o| o.status.success())
    {
        println!("SKIPPED (not root, or no setpriv or curl): another user on the socket");
        return None;
    }
    let text = String::from_utf8(run(uid, arguments).unwrap().stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    Some((status.parse().unwrap(), body.to_owned()))
}

/// Opens the way to a daemon's socket to everybody, as an administrator may.
fn open_the_way(d: &Daemon) {
    for (path, mode) in [(d.directory().to_owned(), 0o711), (d.state_dir(), 0o711), (d.socket(), 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
}

#[test]
fn row_55_another_user_on_the_socket_is_refused_and_logged() {
    let d = Daemon::start("a");
    let socket = d.socket();
    let make = |name: &str| {
        let body = embedded(name, 8, 0).to_string();
        let words = ["-H", "content-type: application/json", "-d", &body, "http://localhost/v1/guests"];
        as_user(65534, &socket, &words)
    };
    // As it is made, the socket is nobody else's at all: no connection, so no status.
    let Some((closed, _)) = make("g1") else { return };
    assert_eq!(closed, 0);
    open_the_way(&d);
    let (status, body) = make("g1").unwrap();
    assert_eq!(status, 403, "{body}");
    for target in ["/v1/guests", "/v1/tokens", "/v1/audit-log", "/metrics", "/v1/whoami", "/v1/events/stream"]
    {
        let (status, body) = as_user(65534, &socket, &[&format!("http://localhost{target}")]).unwrap();
        assert_eq!(status, 403, "{target}: {body}");
        assert!(body.contains("\"forbidden\""), "{target}: {body}");
    }
    let log = d.items("/v1/audit-log");
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(
        (&log[0]["operation"], &log[0]["status"], &log[0]["code"]),
        (&json!("guest_create"), &json!(403), &json!("forbidden"))
    );
    assert_eq!(d.items("/v1/guests"), [] as [Value; 0]);
}

#[test]
fn row_55_a_reader_that_asks_for_changes_is_refused_and_logged() {
    let d = Daemon::start_as("a", &[HURRIED], |dir| {
        let config = dir.join("config.toml");
        std::fs::write(&config, "[access.users]\n65534 = \"viewer\"\n").unwrap();
        vec!["--config".into(), config.to_str().unwrap().into()]
    });
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let secret = token(&d, "viewer");
    let document = document();
    let mut refused = 0;
    for (method, path, operation) in operations(&document) {
        let id = operation["operationId"].as_str().unwrap();
        let secrets = ["token_list", "audit_log_list"].contains(&id);
        // These two compute and change nothing.
        if (method == "GET" && !secrets)
            || ["address_space_plan_create", "migration_check_create"].contains(&id)
            // Everybody's own: who has a link's code, and who has a session.
            || ["session_create", "session_delete"].contains(&id)
        {
            continue;
        }
        let mut target = path.clone();
        for (name, value) in [("guest", "g1"), ("block", "ram0")] {
            target = target.replace(&format!("{{{name}}}"), value);
        }
        let target = target
            .split('/')
            .map(|p| if p.starts_with('{') { "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11" } else { p });
        let target = target.collect::<Vec<_>>().join("/");
        let mut request = bearing(Request::new(&method, &target), &secret);
        if let Some((kind, example)) = body_of(&document, &operation) {
            request = request.header("content-type", &kind).body(example.to_string());
        }
        let reply = d.send(&request);
        assert_eq!((reply.status, reply.problem().as_str()), (403, "forbidden"), "{id}");
        if method != "GET" {
            let entry = audited(&d, &reply);
            assert_eq!(
                (&entry["operation"], &entry["role"], &entry["status"], &entry["code"]),
                (&json!(id), &json!("viewer"), &json!(403), &json!("forbidden")),
                "{entry}"
            );
        }
        refused += 1;
    }
    assert!(refused > 25, "{refused}");
    assert_eq!(d.items("/v1/guests").len(), 1);
    // The same by user id.
    open_the_way(&d);
    let socket = d.socket();
    let Some((status, body)) = as_user(65534, &socket, &["http://localhost/v1/guests/g1"]) else { return };
    assert_eq!(status, 200, "{body}");
    let (status, body) = as_user(65534, &socket, &["-X", "DELETE", "http://localhost/v1/guests/g1"]).unwrap();
    assert_eq!(status, 403, "{body}");
    let last = &d.items("/v1/audit-log?operation=guest_delete")[0];
    assert_eq!((&last["principal"], &last["status"]), (&json!("unix:65534"), &json!(403)));
}
