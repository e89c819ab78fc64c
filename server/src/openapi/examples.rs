//! An example for every JSON answer: one that a daemon gave, where `tests/tests/document_examples.rs` has
//! recorded it, and for others one that is put together from the examples of their properties.

use serde_json::{Map, Value, json};

/// What daemons answered, by operation and status.
const RECORDED: &str = include_str!("examples.json");

/// Deepest nesting of an example.
const DEPTH: usize = 24;

/// Gives every JSON answer of success an example.
pub fn add(document: &mut Value) {
    let schemas = document.pointer("/components/schemas").cloned().unwrap_or_default();
    // A test holds the file against what daemons answer.
    let recorded: Value = serde_json::from_str(RECORDED).unwrap_or_default();
    let Some(Value::Object(paths)) = document.get_mut("paths") else { return };
    for operation in paths.values_mut().filter_map(Value::as_object_mut).flat_map(Map::values_mut) {
        let id = operation["operationId"].as_str().unwrap_or_default().to_owned();
        let responses = operation.get_mut("responses").and_then(Value::as_object_mut);
        for (status, response) in
            responses.into_iter().flatten().filter(|(status, _)| status.starts_with('2'))
        {
            let Some(media) =
                response.pointer_mut("/content/application~1json").and_then(Value::as_object_mut)
            else {
                continue;
            };
            if media.contains_key("example") {
                continue;
            }
            if let Some(given) = recorded.pointer(&format!("/{id}/{status}")) {
                media.insert("example".into(), given.clone());
            } else if let Some(example) = media.get("schema").and_then(|s| example(s, &schemas, DEPTH)) {
                media.insert("example".into(), example);
            }
        }
    }
}

/// A value of the schema; `None` beyond the depth.
fn example(schema: &Value, schemas: &Value, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    if let Some(given) = schema.get("example") {
        return Some(given.clone());
    }
    if let Some(reference) = schema["$ref"].as_str() {
        return example(schemas.get(reference.rsplit('/').next()?)?, schemas, depth);
    }
    if let Some(variants) = schema["oneOf"].as_array() {
        return if variants.iter().any(|v| v["type"] == "null") {
            Some(Value::Null)
        } else {
            example(variants.first()?, schemas, depth)
        };
    }
    if let Some(values) = schema["enum"].as_array().or(schema["x-extensible-enum"].as_array()) {
        return values.first().cloned();
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) if kinds.iter().any(|k| k == "null") => return Some(Value::Null),
        kind => kind.as_str().unwrap_or("object"),
    };
    Some(match kind {
        "string" => string(schema),
        "integer" | "number" => schema.get("minimum").cloned().unwrap_or_else(|| json!(1)),
        "boolean" => json!(false),
        "array" => example(&schema["items"], schemas, depth).map_or_else(|| json!([]), |item| json!([item])),
        "null" => Value::Null,
        _ => object(schema, schemas, depth)?,
    })
}

/// With its required properties, and of the others those that are not there in some answers alone.
fn object(schema: &Value, schemas: &Value, depth: usize) -> Option<Value> {
    let mut map = Map::new();
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let required = schema["required"].as_array().is_some_and(|r| r.iter().any(|n| n == name));
        match example(property, schemas, depth) {
            Some(value) if required || property.get("example").is_some() => {
                _ = map.insert(name.clone(), value)
            }
            Some(_) => {}
            None if required => return None,
            None => {}
        }
    }
    Some(Value::Object(map))
}

fn string(schema: &Value) -> Value {
    match schema["format"].as_str() {
        Some("uuid") => json!("0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"),
        Some("date-time") => json!("2026-11-22T19:27:00.000Z"),
        _ if schema["pattern"].as_str().is_some_and(|p| p.starts_with("^sha256:")) => {
            json!("sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")
        }
        _ => json!("text"),
    }
}
