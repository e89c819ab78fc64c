//! The service before its host is open: routing, refusals and bodies, which need none. Whatever is sound gets
//! as far as `not_ready`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::LazyLock;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use mirrorvm::codes::Code;
use mirrorvmd::access::caller::Peer;
use mirrorvmd::http::guard::Transport;
use mirrorvmd::openapi::Document;
use mirrorvmd::problem::ProblemCode;
use mirrorvmd::routes;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::sync::watch;
use tower::ServiceExt;

fn service() -> Router {
    static SERVICE: LazyLock<Router> = LazyLock::new(|| routes::service(watch::channel(false).1).0);
    SERVICE.clone()
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Checks the form of a problem and gives its code.
    fn problem(&self) -> String {
        assert_eq!(self.headers["content-type"], "application/problem+json");
        let body = self.json();
        let code = body["code"].as_str().unwrap().to_owned();
        let known = ProblemCode::parse(&code).unwrap();
        assert_eq!(self.status, known.status());
        assert_eq!(body["status"], self.status.as_u16());
        assert_eq!(body["type"], format!("/v1/problems/{code}"));
        assert_eq!(body["title"], known.title());
        assert_eq!(body["retryable"], known.retryable());
        assert_eq!(body["request_id"].as_str().unwrap(), self.headers["x-request-id"]);
        assert!(body["instance"].as_str().unwrap().starts_with('/'));
        assert!(body["errors"].is_array() && body["detail"].is_string());
        code
    }
}

/// Sends as the daemon's own user over a Unix socket.
async fn send(service: &Router, mut request: Request<Body>) -> Answer {
    if request.extensions().get::<Peer>().is_none() {
        let uid = rustix::process::geteuid().as_raw();
        request.extensions_mut().insert(Peer::Unix { uid, gid: uid });
    }
    if !request.headers().contains_key("host") {
        request.headers_mut().insert("host", "localhost".parse().unwrap());
    }
    let (parts, body) = service.clone().oneshot(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes().to_vec();
    Answer { status: parts.status, headers: parts.headers, body }
}

async fn get(path: &str) -> Answer {
    send(&service(), Request::get(path).body(Body::empty()).unwrap()).await
}

async fn post(path: &str, content_type: &str, body: impl Into<Body>) -> Answer {
    send(&service(), Request::post(path).header("content-type", content_type).body(body.into()).unwrap())
        .await
}

#[tokio::test]
async fn what_needs_no_host_works() {
    assert_eq!(get("/livez").await.status, 200);
    assert_eq!(get("/readyz").await.problem(), "not_ready");
    let document = get("/v1/openapi.json").await;
    assert_eq!(document.headers["content-type"], "application/json");
    let version = get("/v1/version").await.json();
    assert_eq!(version["openapi_sha256"], Document::of_this_build().unwrap().sha256());
    assert_eq!(version["api_version"], document.json()["info"]["version"]);
    let page = get("/docs/").await;
    assert_eq!((page.status.as_u16(), get("/docs").await.status.as_u16()), (200, 308));
    let html = String::from_utf8(page.body).unwrap();
    assert!(!html.contains("http://") && !html.contains("https://") && !html.contains("//cdn"), "{html}");
    assert!(page.headers["content-security-policy"].to_str().unwrap().contains("connect-src 'self'"));
    assert_eq!(get("/docs/swagger-ui-bundle.js").await.status, 200);
}

#[tokio::test]
async fn the_document_is_sent_short_and_once() {
    let ask = async |path: &str, headers: &[(&str, &str)]| {
        let request = headers.iter().fold(Request::get(path), |r, (name, value)| r.header(*name, *value));
        send(&service(), request.body(Body::empty()).unwrap()).await
    };
    let mut tags = std::collections::BTreeSet::new();
    for path in ["/v1/openapi.json", "/v1/openapi-3.0.json"] {
        let plain = ask(path, &[]).await;
        let packed = ask(path, &[("accept-encoding", "br, gzip;q=0.9")]).await;
        assert_eq!(plain.headers.get("content-encoding"), None);
        assert_eq!(packed.headers["content-encoding"], "gzip");
        assert!(packed.body.len() * 5 < plain.body.len(), "{} {}", packed.body.len(), plain.body.len());
        // Ten bytes of head, and eight at the end: a checksum and the length.
        let (deflated, end) = packed.body[10..].split_at(packed.body.len() - 18);
        assert_eq!(miniz_oxide::inflate::decompress_to_vec(deflated).unwrap(), plain.body);
        let sum = [rawzip::crc32(&plain.body), u32::try_from(plain.body.len()).unwrap()];
        assert_eq!(end, sum.map(u32::to_le_bytes).concat());
        for (answer, coding) in [(&plain, "identity"), (&packed, "gzip")] {
            assert_eq!(answer.headers["content-type"], "application/json");
            assert_eq!(answer.headers["vary"], "accept-encoding");
            let tag = answer.headers["etag"].to_str().unwrap().to_owned();
            assert!(tag.starts_with('"') && tags.insert(tag.clone()), "each has its own: {tag}");
            for known in [tag.clone(), format!("\"x\", W/{tag}"), "*".to_owned()] {
                let again = ask(path, &[("accept-encoding", coding), ("if-none-match", &known)]).await;
                assert_eq!((again.status.as_u16(), again.body.len()), (304, 0), "{known}");
                assert_eq!(again.headers["etag"], *tag);
                assert_eq!(again.headers["vary"], "accept-encoding");
            }
            let other = ask(path, &[("accept-encoding", coding), ("if-none-match", "\"3\"")]).await;
            assert_eq!((other.status.as_u16(), &other.body), (200, &answer.body));
        }
    }
    assert_eq!(ask("/v1/openapi.json", &[("if-none-match", "3")]).await.problem(), "validation_failed");
    // What answers to callers is never packed: with a secret beside something of the caller's own, its length
    // would tell of the secret.
    for path in ["/v1/problems", "/v1/version", "/docs/", "/metrics"] {
        let answer = ask(path, &[("accept-encoding", "gzip")]).await;
        assert_eq!(answer.headers.get("content-encoding"), None, "{path}");
    }
}

#[tokio::test]
async fn the_catalogue_explains_every_code() {
    let list = get("/v1/problems").await.json();
    // The library's closed list, so that no code of a resource's can be forgotten.
    let codes: Vec<&str> =
        list["items"].as_array().unwrap().iter().map(|item| item["code"].as_str().unwrap()).collect();
    for code in ProblemCode::ALL.iter().map(|c| c.as_str()).chain(Code::ALL.iter().map(|c| c.as_str())) {
        assert_eq!(codes.iter().filter(|c| **c == code).count(), 1, "{code}");
    }
    for item in list["items"].as_array().unwrap() {
        let page = get(item["type"].as_str().unwrap()).await;
        assert_eq!(page.json(), *item);
    }
    assert_eq!(get("/v1/problems/nonsense").await.problem(), "not_found");
}

#[tokio::test]
async fn wrong_paths_and_methods_are_problems() {
    for path in ["/v1", "/v2/guests", "/v1/guests/", "/v1/guests/a/b/c", "/docs/nothing.js"] {
        assert_eq!(get(path).await.problem(), "route_not_found", "{path}");
    }
    for (method, path, allow) in [
        ("DELETE", "/v1/guests", "GET,HEAD,POST"),
        ("POST", "/v1/guests/g", "GET,HEAD,PUT,PATCH,DELETE"),
        ("GET", "/v1/guests/g/start", "POST"),
        ("POST", "/v1/version", "GET,HEAD"),
        ("OPTIONS", "/v1/host", "GET,HEAD,PATCH"),
    ] {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let answer = send(&service(), request).await;
        assert_eq!(answer.problem(), "method_not_allowed", "{method} {path}");
        assert_eq!(answer.headers["allow"], allow, "{method} {path}");
    }
    assert_eq!(get("/v1/guests/%ff").await.problem(), "malformed_request");
    for (path, end) in [
        ("/v1/guest", "; did you mean /v1/guests?"),
        ("/guests/g1/", "; did you mean /v1/guests/g1?"),
        ("/v1/frobnicate", "not part of the API"),
    ] {
        let detail = get(path).await.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.ends_with(end), "{path}: {detail}");
    }
    let body = json!({"name": "g1", "drivr": {}, "memory": {}}).to_string();
    let refused = post("/v1/guests", "application/json", body).await.json();
    let said: Vec<&str> =
        refused["errors"].as_array().unwrap().iter().map(|e| e["detail"].as_str().unwrap()).collect();
    assert!(said.iter().any(|s| s.ends_with("\"drivr\" here; did you mean driver?")), "{said:?}");
}

#[tokio::test]
async fn whoever_knows_the_address_alone_is_told_where_to_go_on() {
    let index = get("/").await;
    assert_eq!(
        (index.status.as_u16(), &index.headers["content-type"]),
        (200, &"application/json".parse().unwrap())
    );
    for (what, path) in index.json()["links"].as_object().unwrap() {
        let answer = get(path.as_str().unwrap()).await;
        let there = answer.status == 200 || answer.problem() == "not_ready";
        assert!(there, "{what}: {}", answer.status);
    }
    for accepts in
        ["text/html", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8", "image/png, TEXT/HTML;q=0.3"]
    {
        let browser = Request::get("/").header("accept", accepts).body(Body::empty()).unwrap();
        let answer = send(&service(), browser).await;
        assert_eq!((answer.status.as_u16(), &answer.headers["location"]), (303, &"/docs/".parse().unwrap()));
    }
    let tool = Request::get("/").header("accept", "*/*").body(Body::empty()).unwrap();
    assert_eq!(send(&service(), tool).await.status, 200);
}

#[tokio::test]
async fn bodies_are_refused_for_what_is_wrong_with_them() {
    let json = "application/json";
    assert_eq!(post("/v1/guests", json, "").await.problem(), "malformed_json");
    assert_eq!(post("/v1/guests", json, "{\"a\":1,\"a\":2}").await.problem(), "malformed_json");
    assert_eq!(post("/v1/guests", json, vec![b' '; (64 << 10) + 1]).await.problem(), "payload_too_large");
    let text = post("/v1/guests", "text/plain", "{}").await;
    assert_eq!(text.problem(), "unsupported_media_type");
    assert_eq!(text.headers["accept-post"], "application/json");
    let empty = post("/v1/guests", json, "{}").await;
    assert_eq!(empty.problem(), "validation_failed");
    let pointers: Vec<Value> =
        empty.json()["errors"].as_array().unwrap().iter().map(|e| e["pointer"].clone()).collect();
    assert_eq!(pointers, [json!("/name"), json!("/driver"), json!("/memory")]);
    let peer = json!({"name": "b", "address": "b", "identity": "x"}).to_string();
    let peer = post("/v1/hosts", json, peer).await;
    assert_eq!(
        (peer.problem().as_str(), &peer.json()["errors"][0]["pointer"]),
        ("validation_failed", &json!("/address"))
    );
}

#[tokio::test]
async fn the_documented_examples_get_as_far_as_the_host() {
    let document = get("/v1/openapi.json").await.json();
    for (path, item) in document["paths"].as_object().unwrap() {
        let Some(body) = item["post"].get("requestBody") else { continue };
        let name = body["content"]["application/json"]["schema"]["$ref"].as_str().unwrap();
        let example = document.pointer(&name[1..]).unwrap()["example"].to_string();
        let request = Request::post(path.replace(['{', '}'], ""))
            .header("content-type", "application/json")
            .header("x-mirrorvm", "1");
        let answer = send(&service(), request.body(example.into()).unwrap()).await;
        assert_eq!(answer.problem(), "not_ready", "{path}");
        assert_eq!(answer.headers["retry-after"], "1");
    }
}

#[tokio::test]
async fn parameters_and_conditions_are_checked_before_anything_else() {
    for path in [
        "/v1/guests?limit=0",
        "/v1/guests?limit=1001",
        "/v1/guests?page_token=x",
        "/v1/guests?color=red",
        "/v1/mirrors?guest=a&guest=b",
        "/v1/migrations?state=done",
        "/v1/guests/g?wait=5",
        "/v1/guests/g/console?offset=-1",
        "/v1/guests/g/console?max_bytes=0",
    ] {
        let answer = get(path).await;
        assert_eq!(answer.problem(), "validation_failed", "{path}");
        assert!(answer.json()["errors"][0]["parameter"].is_string(), "{path}");
    }
    for path in ["/v1/migrations?state=failed&state=canceled&guest=g&limit=5", "/v1/guests/g?wait=5s"] {
        assert_eq!(get(path).await.problem(), "not_ready", "{path}");
    }
    let request = Request::delete("/v1/guests/g").header("if-match", "3").body(Body::empty()).unwrap();
    let answer = send(&service(), request).await;
    assert_eq!(answer.problem(), "validation_failed");
    assert_eq!(answer.json()["errors"][0]["header"], "if-match");
    let request =
        Request::get("/v1/mirrors/m/layout").header("accept", "text/html").body(Body::empty()).unwrap();
    assert_eq!(send(&service(), request).await.problem(), "not_acceptable");
}

#[tokio::test]
async fn the_callers_request_id_comes_back() {
    let request = Request::get("/nowhere").header("x-request-id", "abc-1").body(Body::empty()).unwrap();
    let answer = send(&service(), request).await;
    answer.problem();
    assert_eq!(answer.headers["x-request-id"], "abc-1");
}

#[tokio::test]
async fn a_name_that_is_not_this_machine_is_refused_over_tcp() {
    let request = |transport, host: &str| {
        Request::get("/livez").extension(transport).header("host", host).body(Body::empty()).unwrap()
    };
    let evil = send(&service(), request(Transport::LoopbackTcp, "evil.example")).await;
    assert_eq!(evil.problem(), "origin_refused");
    assert_eq!(send(&service(), request(Transport::LoopbackTcp, "localhost:1")).await.status, 200);
    assert_eq!(send(&service(), request(Transport::Unix, "evil.example")).await.status, 200);
}

#[tokio::test]
async fn head_is_get_without_a_body() {
    let request = Request::head("/v1/version").body(Body::empty()).unwrap();
    let answer = send(&service(), request).await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (200, 0));
}

/// Any JSON, with the words of the API more often than not.
fn any_json() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        "[a-z_]{0,6}",
        proptest::sample::select(vec![
            "name",
            "driver",
            "kind",
            "embedded",
            "qemu",
            "vcpus",
            "memory",
            "blocks",
            "size_bytes",
            "gpa",
            "labels",
            "guest",
            "strategy",
            "shifted",
            "shift",
            "4gib",
            "explicit",
            "bytes",
            "workers",
            "mirror",
            "template",
            "destination",
            "host",
            "limits",
            "streams",
            "verify",
            "on_success",
            "source",
            "address",
            "identity",
        ])
        .prop_map(str::to_owned),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 8, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(word.clone(), inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_body_panics_or_is_our_fault(body in any_json(), raw in proptest::collection::vec(any::<u8>(), 0..64)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let service = service();
        for path in ["/v1/guests", "/v1/mirrors", "/v1/migrations", "/v1/hosts", "/v1/guests/g/address-space-plans"] {
            for bytes in [body.to_string().into_bytes(), raw.clone()] {
                let request = Request::post(path).header("content-type", "application/json");
                let answer = runtime.block_on(send(&service, request.body(Body::from(bytes)).unwrap()));
                let code = answer.problem();
                prop_assert!(["malformed_json", "validation_failed", "not_ready"].contains(&code.as_str()), "{}", code);
            }
        }
    }
}
