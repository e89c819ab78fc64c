//! The OpenAPI document: what the routes say of themselves, and what holds for all of them.
//!
//! Problem responses, headers of creations and the bounds of integers are added here, once, so that no route
//! can forget them.

pub mod compat;
pub mod downgrade;
mod examples;
mod shapes;

use axum::body::Bytes;
use miniz_oxide::deflate::compress_to_vec;
use mirrorvm::guest::Drivers;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;
use utoipa::OpenApi;

use crate::access::Access;
use crate::access::table::{self, Operation};
use crate::api::version::API_VERSION;
use crate::api::{driver, sha256_text};
use crate::problem::{
    BlockedReason, Entry, MAX_SAFE_INTEGER, PROBLEM_JSON, ProblemBody, ProblemCode, ProblemError,
};

/// How hard is tried to make the document short, of 10: it is done once.
const EFFORT: u8 = 6;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "mirrorvm",
        description = "Guests of one host, their mirror VMs under selectable address spaces, and live migration \
            through them. Every response of 400 and above is an RFC 9457 problem with a code from \
            `/v1/problems`. Sizes are bytes, addresses are integers, times are RFC 3339 in UTC. Values of \
            responses that are documented as open lists may grow; clients must not fail on new ones.",
        contact(name = "mirrorvm", url = "https://github.com/mirrorvm/mirrorvm"),
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    servers((url = "/", description = "The daemon that serves this document")),
    tags(
        (name = "guests", description = "Guests: definition, lifecycle, console, RAM"),
        (name = "migrations", description = "Migrations of guests between hosts"),
        (name = "mirrors", description = "Mirror VMs that share a guest's memory and run the migration helper"),
        (name = "events", description = "What happened, in order and on disk, as pages and as a stream"),
        (name = "hosts", description = "Other hosts that this one knows, with pinned identities"),
        (name = "host", description = "This host: identity, capabilities, load"),
        (name = "strategies", description = "Ways to lay out a mirror's address space"),
        (name = "helper-images", description = "Migration helpers: the built-in one and those that were uploaded"),
        (name = "problems", description = "The catalogue of problems"),
        (name = "daemon", description = "The daemon itself: health, version, this document"),
        (name = "access", description = "Callers: who one is, bearer tokens, sessions of browsers, the audit log"),
    ),
    components(schemas(ProblemBody, ProblemError, ProblemCode, BlockedReason)),
)]
struct Base;

/// The document without routes.
pub fn base() -> utoipa::openapi::OpenApi {
    let mut api = Base::openapi();
    api.info.version = API_VERSION.to_owned();
    api
}

/// The finished document, as it is served.
#[derive(Clone, Debug)]
pub struct Document {
    bytes: Bytes,
    sha256: String,
    packed: OnceCell<Bytes>,
}

impl Document {
    fn of(document: &Value) -> Result<Self, serde_json::Error> {
        let mut text = serde_json::to_string_pretty(document)?;
        text.push('\n');
        let sha256 = sha256_text(&Sha256::digest(text.as_bytes()));
        Ok(Self { bytes: text.into(), sha256, packed: OnceCell::new() })
    }

    /// The document of the stock build in OpenAPI 3.0.3.
    ///
    /// # Errors
    /// As [`Document::with`].
    pub fn of_this_build_3_0() -> Result<Self, serde_json::Error> {
        Self::with_3_0(&Drivers::default())
    }

    /// The document of the stock build.
    ///
    /// # Errors
    /// As [`Document::with`].
    pub fn of_this_build() -> Result<Self, serde_json::Error> {
        Self::with(&Drivers::default())
    }

    /// The document of a daemon with these drivers in OpenAPI 3.0.3.
    ///
    /// # Errors
    /// As [`Document::with`].
    pub fn with_3_0(drivers: &Drivers) -> Result<Self, serde_json::Error> {
        let mut document = finished(drivers)?;
        downgrade::to_3_0(&mut document);
        Self::of(&document)
    }

    /// The document of a daemon with these drivers.
    ///
    /// # Errors
    /// When it cannot be written as JSON, which a test rules out.
    pub fn with(drivers: &Drivers) -> Result<Self, serde_json::Error> {
        Self::of(&finished(drivers)?)
    }

    /// JSON, indented, with a newline at the end.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The same in gzip, made when somebody first asks for it. `None` when the runtime ends.
    pub async fn gzip(&self) -> Option<Bytes> {
        let pack = || async {
            let bytes = self.bytes.clone();
            tokio::task::spawn_blocking(move || Bytes::from(gzip(&bytes))).await
        };
        self.packed.get_or_try_init(pack).await.ok().cloned()
    }

    /// `sha256:` and the digest of [`Document::bytes`].
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

/// `bytes` as one member of a gzip file (RFC 1952), without a name and a time: the same bytes in every build.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    // Magic, deflate, no flags, no time, no word on how hard was tried, no file system.
    let mut file = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    file.extend(compress_to_vec(bytes, EFFORT));
    file.extend(rawzip::crc32(bytes).to_le_bytes());
    // Modulo 2^32, as the format has it.
    file.extend((bytes.len() as u32).to_le_bytes());
    file
}

/// What the routes say of themselves, finished.
fn finished(drivers: &Drivers) -> Result<Value, serde_json::Error> {
    let mut document = serde_json::to_value(crate::routes::documented().split_for_parts().1)?;
    complete(&mut document, drivers);
    Ok(document)
}

fn complete(document: &mut Value, drivers: &Drivers) {
    if let Some(code) = document.pointer_mut("/components/schemas/ProblemCode/enum") {
        // The derive does not see through the catalogue's macro to the names that the API uses.
        *code = ProblemCode::ALL.iter().map(|c| c.as_str()).collect();
    }
    // Those that stand in resources alone are explained, too.
    if let Some(Value::Object(code)) = document.pointer_mut("/components/schemas/ProblemKind/properties/code")
    {
        code.insert("x-extensible-enum".into(), Entry::all().map(Entry::code).collect());
    }
    if let Some(schemas) = document.pointer_mut("/components/schemas") {
        if let Some(schemas) = schemas.as_object_mut() {
            driver::describe(schemas, drivers);
        }
        bound_integers(schemas);
        lift_descriptions(schemas);
        close_unions(schemas);
    }
    add_security(document);
    describe_operations(document);
    shapes::settle(document);
    examples::add(document);
}

/// What holds for all operations, and what each says of who may call it.
fn describe_operations(document: &mut Value) {
    let Some(Value::Object(paths)) = document.get_mut("paths") else { return };
    for (path, item) in paths {
        let Value::Object(item) = item else { continue };
        for (method, operation) in item.iter_mut() {
            bound_integers(operation);
            let known =
                table::OPERATIONS.iter().find(|o| o.method.eq_ignore_ascii_case(method) && o.path == path);
            if let (Some(known), Value::Object(operation)) = (known, &mut *operation) {
                add_access(operation, known);
            }
            octets(operation);
            let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
            for parameter in parameters.into_iter().flatten() {
                merge_inline(&mut parameter["schema"]);
                forbid_null(&mut parameter["schema"]);
                say_example(parameter);
            }
            if let Value::Object(operation) = operation {
                add_headers(operation, method == "get");
                add_problems(path, method, operation);
            }
        }
    }
}

/// How callers are recognized. A caller over a Unix socket needs nothing: the kernel says who it is.
fn add_security(document: &mut Value) {
    document["components"]["securitySchemes"] = json!({
        "bearerAuth": {
            "type": "http",
            "scheme": "bearer",
            "description": "A token of `POST /v1/tokens`, or the one in `admin.token` in the daemon's state directory. \
                Over a Unix socket a caller without one is who the kernel says it is, with the role that the daemon's \
                configuration gives that user.",
        },
        "mutualTLS": {
            "type": "mutualTLS",
            "description": "A client certificate whose alternative names the daemon's configuration gives a role.",
        },
    });
    // One of them, or neither for local callers. A browser's session is told of where it is opened: no
    // program has one, and of a key in a cookie openapi-generator makes Ruby that does not parse.
    document["security"] = json!([{"bearerAuth": []}, {"mutualTLS": []}, {}]);
}

fn add_access(operation: &mut Map<String, Value>, known: &Operation) {
    if known.access == Access::Public {
        operation.insert("security".into(), json!([]));
    }
    if let Some(Value::String(text)) = operation.get_mut("description") {
        text.push_str("\n\n");
        text.push_str(known.access.text());
    }
}

/// Integers of 64 bits have at most 53 here, so that every JSON reader keeps them exact.
fn bound_integers(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.get("format").is_some_and(|f| f == "int64") && !map.contains_key("maximum") {
                map.insert("maximum".into(), MAX_SAFE_INTEGER.into());
            }
            map.values_mut().for_each(bound_integers);
        }
        Value::Array(list) => list.iter_mut().for_each(bound_integers),
        _ => {}
    }
}

/// A reference that may be null is described beside the choice, where readers look, not inside it.
fn lift_descriptions(value: &mut Value) {
    match value {
        Value::Object(map) => {
            let text = map
                .get_mut("oneOf")
                .and_then(Value::as_array_mut)
                .filter(|variants| variants.iter().any(|v| v["type"] == "null"))
                .and_then(|variants| variants.iter_mut().find(|v| v.get("$ref").is_some()))
                .and_then(|reference| reference.as_object_mut()?.shift_remove("description"));
            if let Some(text) = text {
                map.insert("description".into(), text);
            }
            map.values_mut().for_each(lift_descriptions);
        }
        Value::Array(list) => list.iter_mut().for_each(lift_descriptions),
        _ => {}
    }
}

/// Bytes are bytes, not arrays of numbers.
fn octets(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if let Some(media) = map.get_mut("application/octet-stream") {
                media["schema"] = json!({"type": "string", "format": "binary"});
            }
            map.values_mut().for_each(octets);
        }
        Value::Array(list) => list.iter_mut().for_each(octets),
        _ => {}
    }
}

/// `allOf` of schemas that are all written out is one schema.
fn merge_inline(schema: &mut Value) {
    let Some(parts) = schema.get("allOf").and_then(Value::as_array) else { return };
    if parts.iter().any(|p| p.get("$ref").is_some()) {
        return;
    }
    // The later ones add to the first; the type is the first's.
    let all = parts.iter().rev().filter_map(Value::as_object).flatten();
    let merged: Map<String, Value> = all.map(|(k, v)| (k.clone(), v.clone())).collect();
    *schema = Value::Object(merged);
}

/// What an optional parameter looks like is said in its description: pages take an example for a value, and
/// would send a key that was used, a condition that does not hold, and a filter that nothing passes.
fn say_example(parameter: &mut Value) {
    if parameter["required"] == true {
        return;
    }
    let Some(parameter) = parameter.as_object_mut() else { return };
    let of_schema = parameter.get_mut("schema").and_then(|schema| schema.as_object_mut()?.remove("example"));
    let Some(example) = parameter.remove("example").or(of_schema) else { return };
    let shown = match example.as_array().and_then(|list| list.first()).unwrap_or(&example) {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    if let Some(Value::String(text)) = parameter.get_mut("description") {
        let end = if text.ends_with(['.', ')', ':']) { "" } else { "." };
        text.push_str(&format!("{end} Example: `{shown}`"));
    }
}

/// A parameter is there or absent; there is no way to write null.
fn forbid_null(schema: &mut Value) {
    if let Some(kinds) = schema["type"].as_array()
        && let [one] = kinds.iter().filter(|k| *k != "null").cloned().collect::<Vec<_>>().as_slice()
    {
        schema["type"] = one.clone();
    }
}

/// The variants of our tagged unions take no other fields (`decode` refuses them).
fn close_unions(schemas: &mut Value) {
    let Value::Object(schemas) = schemas else { return };
    for schema in schemas.values_mut() {
        let Some(Value::Array(variants)) = schema.get_mut("oneOf") else { continue };
        for variant in variants {
            if variant.pointer("/properties/kind").is_some()
                && let Value::Object(variant) = variant
            {
                variant.insert("additionalProperties".into(), false.into());
            }
        }
    }
}

/// Headers that go with a status.
fn add_headers(operation: &mut Map<String, Value>, reads: bool) {
    let is_resource = |content: &Value| {
        let schema = content.pointer("/content/application~1json/schema/$ref").and_then(Value::as_str);
        schema.is_some_and(|s| {
            ["Guest", "Mirror", "Migration", "PeerHost", "Host", "HelperImage", "Token"]
                .iter()
                .any(|r| s == format!("#/components/schemas/{r}"))
        })
    };
    let is_list = |content: &Value| {
        let schema = content.pointer("/content/application~1json/schema/$ref").and_then(Value::as_str);
        schema.is_some_and(|s| {
            ["GuestList", "MirrorList", "MigrationList", "PeerHostList", "HelperImageList", "TokenList"]
                .iter()
                .any(|r| s.ends_with(&format!("/{r}")))
        })
    };
    let conditional = operation
        .get("parameters")
        .and_then(Value::as_array)
        .is_some_and(|list| list.iter().any(|p| p["name"] == "If-None-Match" && reads));
    let repeatable = operation
        .get("parameters")
        .and_then(Value::as_array)
        .is_some_and(|list| list.iter().any(|p| p["name"] == "Idempotency-Key"));
    let Some(Value::Object(responses)) = operation.get_mut("responses") else { return };
    let header = |text: &str| json!({"description": text, "schema": {"type": "string"}});
    for (status, response) in responses.iter_mut() {
        let mut headers = Map::new();
        if is_resource(response) {
            headers.insert("ETag".into(), header("The resource's `generation` in quotes"));
            if status == "201" || status == "202" {
                headers.insert("Location".into(), header("Path of the resource"));
            }
            if repeatable && status != "200" {
                let text = "`true`: the answer to an earlier request with the same key";
                headers.insert("Idempotency-Replayed".into(), header(text));
            }
            if status == "202" {
                headers.insert("Retry-After".into(), header("Seconds after which to look again"));
            }
        }
        if is_list(response) {
            headers.insert("Link".into(), header("`rel=\"next\"`: the next page, when there is one"));
        }
        if let Value::Object(response) = response
            && !headers.is_empty()
        {
            response.insert("headers".into(), headers.into());
        }
    }
    if conditional {
        responses
            .insert("304".into(), json!({"description": "The caller has it already; it did not change"}));
    }
}

/// The problems that an operation can answer with, by status.
fn add_problems(path: &str, method: &str, operation: &mut Map<String, Value>) {
    let has_body = operation.contains_key("requestBody");
    let has_parameters = operation
        .get("parameters")
        .and_then(Value::as_array)
        .is_some_and(|list| list.iter().any(|p| p["in"] != "path"));
    let is_change = method != "get";
    let needs_host = !["/", "/livez", "/docs"].contains(&path)
        && !["/v1/openapi", "/v1/problems", "/v1/version"].iter().any(|p| path.starts_with(p));
    let negotiates = ["/layout", "/console", "/page-digests"].iter().any(|p| path.ends_with(p));
    let public = operation.get("security").is_some_and(|s| *s == json!([]));
    let mut list = vec![
        (400, "The request cannot be parsed"),
        (403, "The caller may not, or Host or Origin is not this machine's"),
    ];
    if !public {
        list.extend([(401, "The caller is not known"), (429, "Too many requests")]);
    }
    if path.starts_with("/v1/events") || path.ends_with("/log") {
        list.push((410, "What follows the cursor is not kept any more"));
    }
    if path == "/v1/hosts/{host}/capabilities" {
        list.extend([
            (502, "The other host did not answer as it should"),
            (504, "The other host did not answer in time"),
        ]);
    }
    if path.contains('{') || (path == "/v1/session" && method == "delete") {
        list.push((404, "No such resource"));
    }
    if negotiates {
        list.push((406, "No acceptable representation"));
    }
    if path.ends_with("/deletion-preview") {
        list.push((409, "The state does not allow it"));
    }
    if is_change {
        list.push((409, "The state does not allow it, or the name is taken"));
        list.push((501, "This host cannot do it"));
    }
    if is_change {
        list.extend([(412, "The resource has changed"), (428, "This daemon takes only conditional changes")]);
    }
    if has_body {
        list.extend([
            (404, "No such resource"),
            (408, "The request arrived too slowly"),
            (413, "The body is too large"),
            (415, "The body's media type is not supported"),
        ]);
    }
    if has_body || has_parameters {
        list.push((422, "Some values cannot be used"));
    }
    list.push((500, "The daemon failed"));
    if needs_host {
        list.push((503, "The daemon cannot do it now"));
    }
    let Some(Value::Object(responses)) = operation.get_mut("responses") else { return };
    for (status, description) in list {
        responses.entry(status.to_string()).or_insert_with(|| {
            json!({
                "description": description,
                "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            })
        });
    }
}
