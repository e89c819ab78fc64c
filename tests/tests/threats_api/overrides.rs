//! Row 56: overrides and headers that give nobody what is not his.

use super::*;

#[test]
fn row_56_overrides_of_a_migration_need_the_role_of_what_they_do() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let base = json!({"guest": "g1", "destination": {"kind": "host", "host": "b"}});
    let with = |name: &str, value: Value| {
        let mut body = base.clone();
        body[name] = value;
        body
    };
    let strategy = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    let overrides = [
        ("plain", base.clone()),
        (
            "helper image",
            with("mirror", json!({"kind": "template", "strategy": strategy, "helper_image": "other"})),
        ),
        (
            "placement",
            with("mirror", json!({"kind": "template", "strategy": strategy, "placement": {"cpus": [0]}})),
        ),
        ("where to", with("destination", json!({"kind": "ticket", "ticket": "mvmt1.AAAA"}))),
        ("limits", with("limits", json!({"on_timeout": "force"}))),
        ("what becomes of the source", with("on_success", json!({"source": "delete"}))),
        ("nothing that there is", json!({"policy": 0})),
    ];
    let id = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11";
    let secrets: Vec<(&str, String)> = ["vmm", "peer", "viewer"].map(|r| (r, token(&d, r))).into();
    for (role, secret) in &secrets {
        for (what, body) in &overrides {
            for (method, target) in [
                ("POST", "/v1/migrations".to_owned()),
                ("POST", "/v1/migrations?dry_run=true".to_owned()),
                ("PUT", format!("/v1/migrations/{id}")),
                ("PATCH", format!("/v1/migrations/{id}")),
            ] {
                let reply = d.send(&bearing(Request::new(method, &target), secret).json(body));
                let got = (reply.status, reply.problem());
                // Before a field is looked at: who may not ask learns nothing of what would do.
                assert_eq!(got, (403, "forbidden".into()), "{role}, {what}: {method} {target}");
                let entry = audited(&d, &reply);
                assert_eq!((&entry["role"], &entry["status"]), (&json!(role), &json!(403)));
            }
        }
    }
    // Policy, addresses and files are no fields of a migration: hosts and images are made known by an
    // administrator.
    let operator = token(&d, "operator");
    for (name, value) in [
        ("policy", json!(0)),
        ("address", json!("192.0.2.1:1")),
        ("identity", json!("sha256:")),
        ("helper_image_path", json!("/etc/passwd")),
        ("force", json!(true)),
    ] {
        let reply =
            d.send(&bearing(Request::new("POST", "/v1/migrations"), &operator).json(&with(name, value)));
        let body = reply.expect(422).json();
        let pointers: Vec<&str> =
            body["errors"].as_array().unwrap().iter().filter_map(|e| e["pointer"].as_str()).collect();
        assert!(pointers.contains(&format!("/{name}").as_str()), "{body}");
    }
    for (method, target, body) in [
        (
            "POST",
            "/v1/hosts",
            json!({"name": "b", "address": "192.0.2.1:1", "identity": format!("sha256:{}", "ab".repeat(32))}),
        ),
        ("POST", "/v1/helper-images", json!({"name": "other"})),
        ("PATCH", "/v1/host", json!({"migration_slots": 16})),
        ("POST", "/v1/tokens", json!({"name": "more", "role": "admin"})),
    ] {
        let reply = d.send(&bearing(Request::new(method, target), &operator).json(&body));
        assert_eq!((reply.status, reply.problem().as_str()), (403, "forbidden"), "{method} {target}");
    }
    assert_eq!(d.items("/v1/migrations"), [] as [Value; 0]);
}

#[test]
fn row_56_headers_do_not_change_what_is_asked_or_who_asks() {
    let d = Daemon::start("a");
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let viewer = token(&d, "viewer");
    for (name, value) in [
        ("x-http-method-override", "DELETE"),
        ("x-method-override", "DELETE"),
        ("x-original-url", "/v1/tokens"),
        ("x-rewrite-url", "/v1/tokens"),
        ("x-forwarded-user", "root"),
        ("x-remote-user", "root"),
        ("x-forwarded-for", "127.0.0.1"),
    ] {
        let read = bearing(Request::new("GET", "/v1/guests/g1"), &viewer).header(name, value);
        assert_eq!(d.send(&read).expect(200).json()["name"], "g1", "{name}");
        let write = bearing(Request::new("DELETE", "/v1/guests/g1"), &viewer).header(name, value);
        let _ = d.send(&write).expect(403);
        let who = bearing(Request::new("GET", "/v1/whoami"), &viewer).header(name, value);
        assert_eq!(d.send(&who).expect(200).json()["role"], "viewer", "{name}");
    }
    // Two credentials are none.
    let two = bearing(bearing(Request::new("GET", "/v1/whoami"), &viewer), &token(&d, "admin"));
    let reply = d.send(&two);
    assert!(reply.status == 401 || reply.status == 400, "{}", reply.text());
    let _ = d.get("/v1/guests/g1").expect(200);
}
