//! OpenAPI 3.1 to 3.0.3, as far as our own document goes: for generators that know no newer version.
//!
//! Null unions become `nullable`, `const` an `enum` of one, `examples` of a schema the first of them;
//! `mutualTLS` and the licence's identifier have no place there. Problems and patches become
//! `application/json`, so that generators which type JSON alone type them. A union does not demand `kind`,
//! as it does in 3.1: beside what else it says, progenitor would not see its variants.

use serde_json::{Map, Value, json};

use crate::http::body::MERGE_PATCH;
use crate::problem::PROBLEM_JSON;

/// Rewrites `document` in place.
pub fn to_3_0(document: &mut Value) {
    document["openapi"] = json!("3.0.3");
    if let Some(license) = document.pointer_mut("/info/license").and_then(Value::as_object_mut) {
        license.shift_remove("identifier");
        license.insert("url".into(), json!("https://www.apache.org/licenses/LICENSE-2.0"));
    }
    drop_mutual_tls(document);
    let Some(Value::Object(paths)) = document.get_mut("paths") else { return };
    for item in paths.values_mut().filter_map(Value::as_object_mut) {
        for operation in item.values_mut().filter_map(Value::as_object_mut) {
            plain_problems(operation);
            plain_patches(operation);
            without_null(operation);
        }
    }
    schemas(document);
    let kinds: Map<String, Value> = document
        .pointer("/components/schemas")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        // Our unions are of objects.
        .map(|(name, s)| (name.clone(), s.get("type").cloned().unwrap_or_else(|| json!("object"))))
        .collect();
    type_nullables(document, &kinds);
}

/// `nullable` counts only beside a `type`.
fn type_nullables(value: &mut Value, kinds: &Map<String, Value>) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(|v| type_nullables(v, kinds)),
        Value::Object(map) => {
            map.values_mut().for_each(|v| type_nullables(v, kinds));
            if map.contains_key("nullable") && !map.contains_key("type") {
                let name =
                    map.get("allOf").and_then(|a| a[0]["$ref"].as_str()).and_then(|r| r.rsplit('/').next());
                let kind = name.and_then(|n| kinds.get(n)).cloned().unwrap_or_else(|| json!("object"));
                map.insert("type".into(), kind);
            }
        }
        _ => {}
    }
}

fn drop_mutual_tls(document: &mut Value) {
    if let Some(schemes) = document.pointer_mut("/components/securitySchemes").and_then(Value::as_object_mut)
    {
        schemes.retain(|_, s| s["type"] != "mutualTLS");
    }
    let known: Vec<String> = document
        .pointer("/components/securitySchemes")
        .and_then(Value::as_object)
        .map(|s| s.keys().cloned().collect())
        .unwrap_or_default();
    let keep = |list: &mut Value| {
        if let Value::Array(list) = list {
            list.retain(|r| r.as_object().is_some_and(|r| r.keys().all(|k| known.contains(k))));
        }
    };
    keep(&mut document["security"]);
    for item in document["paths"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        for operation in item.as_object_mut().into_iter().flat_map(Map::values_mut) {
            if operation.get("security").is_some() {
                keep(&mut operation["security"]);
            }
        }
    }
}

fn plain_problems(operation: &mut Map<String, Value>) {
    for response in
        operation.get_mut("responses").and_then(Value::as_object_mut).into_iter().flat_map(Map::values_mut)
    {
        let Some(Value::Object(content)) = response.get_mut("content") else { continue };
        if let Some(problem) = content.shift_remove(PROBLEM_JSON) {
            content.insert("application/json".into(), problem);
        }
    }
}

/// A reference that may be null is an `allOf` here, of which validators say that it cannot be: examples go
/// without.
fn without_null(operation: &mut Map<String, Value>) {
    fn clean(value: &mut Value) {
        match value {
            Value::Object(map) => {
                map.retain(|_, member| !member.is_null());
                map.values_mut().for_each(clean);
            }
            Value::Array(list) => list.iter_mut().for_each(clean),
            _ => {}
        }
    }
    let responses = operation.get_mut("responses").and_then(Value::as_object_mut);
    for response in responses.into_iter().flat_map(Map::values_mut) {
        let content = response.get_mut("content").and_then(Value::as_object_mut);
        for media in content.into_iter().flat_map(Map::values_mut) {
            if let Some(example) = media.get_mut("example") {
                clean(example);
            }
        }
    }
}

/// `PATCH` takes plain JSON for a merge patch, too, and some generators know nothing else.
fn plain_patches(operation: &mut Map<String, Value>) {
    let content = operation.get_mut("requestBody").and_then(|b| b.get_mut("content"));
    if let Some(Value::Object(content)) = content
        && let Some(patch) = content.shift_remove(MERGE_PATCH)
    {
        content.insert("application/json".into(), patch);
    }
}

fn schemas(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(schemas),
        Value::Object(map) => {
            map.values_mut().for_each(schemas);
            schema(map);
        }
        _ => {}
    }
}

fn schema(map: &mut Map<String, Value>) {
    // type: [T, "null"]
    if let Some(Value::Array(kinds)) = map.get("type") {
        let others: Vec<Value> = kinds.iter().filter(|k| *k != "null").cloned().collect();
        let nullable = others.len() < kinds.len();
        if let [one] = others.as_slice() {
            map.insert("type".into(), one.clone());
        }
        if nullable {
            map.insert("nullable".into(), true.into());
        }
    }
    // oneOf: [{type: null}, X]
    if let Some(Value::Array(variants)) = map.get("oneOf") {
        let others: Vec<Value> = variants.iter().filter(|v| v["type"] != "null").cloned().collect();
        if others.len() < variants.len() {
            map.shift_remove("oneOf");
            map.insert("nullable".into(), true.into());
            match others.as_slice() {
                // A reference stands alone in 3.0; in `allOf` it may have company.
                [one] if one.get("$ref").is_some() => _ = map.insert("allOf".into(), json!([one])),
                [Value::Object(one)] => map.extend(one.clone()),
                _ => _ = map.insert("oneOf".into(), others.into()),
            }
        }
    }
    if map.contains_key("discriminator") {
        map.shift_remove("required");
    }
    // Keys of JSON objects are strings anyway.
    if map.get("propertyNames").is_some_and(Value::is_object) {
        map.shift_remove("propertyNames");
    }
    if let Some(value) = map.shift_remove("const") {
        map.insert("enum".into(), json!([value]));
    }
    // Described references.
    if map.contains_key("$ref") && map.len() > 1 && !map.contains_key("allOf") {
        let reference = map.shift_remove("$ref");
        map.insert("allOf".into(), json!([{"$ref": reference}]));
    }
    // Examples of a schema; those of a media type or parameter are objects.
    if let Some(Value::Array(examples)) = map.get("examples") {
        let first = examples.first().cloned();
        map.shift_remove("examples");
        if let Some(first) = first {
            map.insert("example".into(), first);
        }
    }
    // Bytes.
    if map.get("contentMediaType").is_some() {
        map.shift_remove("contentMediaType");
        map.insert("format".into(), json!("binary"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn down(mut value: Value) -> Value {
        schemas(&mut value);
        value
    }

    #[test]
    fn schemas_say_the_same_in_the_older_version() {
        for (new, old) in [
            (json!({"type": ["string", "null"]}), json!({"type": "string", "nullable": true})),
            (
                json!({"oneOf": [{"type": "null"}, {"$ref": "#/x"}], "description": "d"}),
                json!({"allOf": [{"$ref": "#/x"}], "nullable": true, "description": "d"}),
            ),
            (json!({"const": 1}), json!({"enum": [1]})),
            (
                json!({"$ref": "#/x", "description": "d"}),
                json!({"allOf": [{"$ref": "#/x"}], "description": "d"}),
            ),
            (json!({"$ref": "#/x"}), json!({"$ref": "#/x"})),
            (json!({"items": {"examples": [1, 2]}}), json!({"items": {"example": 1}})),
        ] {
            assert_eq!(down(new), old);
        }
    }
}
