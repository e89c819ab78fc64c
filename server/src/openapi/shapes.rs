//! The shapes of schemas, so that generators of every language make types that work, today and after
//! additions.
//!
//! What a client sends is closed: a union is a named component of named components that `kind` tells apart
//! (`discriminator`), and only the union demands `kind`; variants have it among their properties, with its
//! one value as default. (Generators that write the tag themselves would miss or double a `kind` that
//! variants demand; those that do not, take it from the variant.)
//!
//! What a client reads is open: where lists may grow, kinds, states and codes are strings, a union is one
//! object with the members of all its variants, and nothing forbids further members. So what is in requests
//! and answers alike has two components, `Driver` and `DriverInfo`.
//!
//! Enumerations are written out where they are used: in languages with one name space for constants, two
//! components with a value in common collide.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::compat::other_than_null;
use crate::problem::MAX_SAFE_INTEGER;

/// Where components are.
const PLACE: &str = "#/components/schemas/";

/// Names of answers' components that are not the request's with `Info` behind it, because that is taken.
const NAMES: [(&str, &str); 1] = [("Strategy", "StrategyChosen")];

/// Members of a schema whose values are not schemas.
const PLAIN: [&str; 7] = ["example", "examples", "default", "enum", "const", "mapping", "x-extensible-enum"];

/// At most so many values of an open list are named in its description. Longer lists have a page of their
/// own.
const NAMED: usize = 16;

/// Gives all schemas of the document their shapes.
pub fn settle(document: &mut Value) {
    let Some(Value::Object(schemas)) = document.pointer_mut("/components/schemas").map(Value::take) else {
        return;
    };
    let Some(Value::Object(paths)) = document.get_mut("paths") else { return };
    let operations = || paths.values().filter_map(Value::as_object).flat_map(Map::values);
    let asked =
        reached(&schemas, operations().flat_map(|o| [&o["requestBody"], &o["parameters"]]), |schema| {
            schema["readOnly"] == true
        });
    let told = reached(&schemas, operations().map(|o| &o["responses"]), |_| false);
    let shapes = Shapes { own: own(&schemas, &asked, &told), schemas };

    for operation in paths.values_mut().filter_map(Value::as_object_mut).flat_map(Map::values_mut) {
        for part in ["requestBody", "parameters"] {
            if let Some(part) = operation.get_mut(part) {
                *part = shapes.asked(part);
            }
        }
        if let Some(responses) = operation.get_mut("responses") {
            *responses = shapes.told(responses, false);
        }
    }
    let mut settled = BTreeMap::new();
    for name in &asked {
        if !is_enumeration(&shapes.schemas[name]) {
            shapes.ask(name, &mut settled);
        }
    }
    for name in &told {
        if !is_enumeration(&shapes.schemas[name]) {
            settled.insert(shapes.answers_name(name), shapes.tell(name));
        }
    }
    document["components"]["schemas"] = settled.into_iter().collect::<Map<_, _>>().into();
}

/// The component that a schema refers to.
fn referred(schema: &Value) -> Option<&str> {
    schema["$ref"].as_str()?.strip_prefix(PLACE)
}

/// Calls `see` with each schema right inside `value`.
fn inside<'a>(value: &'a Value, see: &mut dyn FnMut(&'a Value)) {
    match value {
        Value::Object(map) => {
            map.iter().filter(|(k, _)| !PLAIN.contains(&k.as_str())).for_each(|(_, v)| see(v))
        }
        Value::Array(list) => list.iter().for_each(see),
        _ => {}
    }
}

/// Names of the components that the roots lead to, but for what is behind a schema to `skip`.
fn reached<'a>(
    schemas: &'a Map<String, Value>,
    roots: impl Iterator<Item = &'a Value>,
    skip: impl Fn(&Value) -> bool,
) -> BTreeSet<String> {
    let (mut names, mut stack) = (BTreeSet::new(), roots.collect::<Vec<_>>());
    while let Some(value) = stack.pop() {
        if skip(value) {
            continue;
        }
        if let Some(name) = referred(value)
            && let Some(schema) = schemas.get(name)
            && names.insert(name.to_owned())
        {
            stack.push(schema);
        }
        inside(value, &mut |v| stack.push(v));
    }
    names
}

/// A component that is but a list of values.
fn is_enumeration(schema: &Value) -> bool {
    schema.get("enum").is_some()
}

/// A component whose variants have a `kind` each.
fn is_union(schema: &Value) -> bool {
    let variants = schema["oneOf"].as_array();
    variants.is_some_and(|list| list.iter().all(|v| v.pointer("/properties/kind").is_some()))
}

/// What is in requests and answers and differs between them.
fn own(schemas: &Map<String, Value>, asked: &BTreeSet<String>, told: &BTreeSet<String>) -> BTreeSet<String> {
    fn closed(value: &Value) -> bool {
        let mut found = value.get("enum").is_some()
            || value["additionalProperties"] == false
            || value["readOnly"] == true
            || is_union(value);
        inside(value, &mut |v| found = found || closed(v));
        found
    }
    let shared: Vec<&String> = asked.intersection(told).collect();
    let mut own: BTreeSet<String> =
        shared.iter().filter(|n| closed(&schemas[n.as_str()])).map(|n| (*n).clone()).collect();
    loop {
        let more: Vec<String> = shared
            .iter()
            .filter(|n| !own.contains(**n))
            .filter(|n| !reached(schemas, std::iter::once(&schemas[n.as_str()]), |_| false).is_disjoint(&own))
            .map(|n| (*n).clone())
            .collect();
        if more.is_empty() {
            return own;
        }
        own.extend(more);
    }
}

struct Shapes {
    schemas: Map<String, Value>,
    /// Components that have one form for requests and one for answers.
    own: BTreeSet<String>,
}

impl Shapes {
    /// What the answers' form of a component is called.
    fn answers_name(&self, name: &str) -> String {
        if !self.own.contains(name) {
            return name.to_owned();
        }
        NAMES
            .iter()
            .find(|(asked, _)| *asked == name)
            .map_or_else(|| format!("{name}Info"), |(_, told)| (*told).to_owned())
    }

    /// The enumeration that a schema refers to.
    fn enumeration(&self, schema: &Value) -> Option<&Value> {
        referred(schema).and_then(|name| self.schemas.get(name)).filter(|s| is_enumeration(s))
    }

    /// Requests' form of a schema, or of what holds schemas.
    fn asked(&self, value: &Value) -> Value {
        if let Some(values) = self.enumeration(value) {
            return beside(values.clone(), value);
        }
        if let Some(inner) = other_than_null(value) {
            if let Some(values) = self.enumeration(inner) {
                let mut values = beside(values.clone(), value);
                values["type"] = json!([values["type"], "null"]);
                if let Some(list) = values["enum"].as_array_mut() {
                    list.push(Value::Null);
                }
                return values;
            }
            if referred(inner).is_some_and(|name| is_union(&self.schemas[name])) {
                // Left out, not null: a variant that is null is a variant that some clients cannot write.
                return beside(self.asked(inner), value);
            }
        }
        walk(value, |v| self.asked(v), |v| v["readOnly"] != true)
    }

    /// Answers' form of a schema, or of what holds schemas; `copy`: of one that requests have, too, and whose
    /// bounds are those of today's requests.
    fn told(&self, value: &Value, copy: bool) -> Value {
        if let Some(values) = self.enumeration(value) {
            return open_list(beside(values.clone(), value));
        }
        if let Some(inner) = other_than_null(value)
            && let Some(values) = self.enumeration(inner)
        {
            let mut values = open_list(beside(values.clone(), value));
            values["type"] = json!([values["type"], "null"]);
            return values;
        }
        let mut told = walk(value, |v| self.told(v, copy), |_| true);
        if let Some(name) = referred(value) {
            told["$ref"] = format!("{PLACE}{}", self.answers_name(name)).into();
        }
        if let Value::Object(map) = &mut told {
            if map.get("additionalProperties").is_some_and(|a| *a == false) {
                map.shift_remove("additionalProperties");
            }
            if map.contains_key("type") {
                map.shift_remove("default");
                map.shift_remove("readOnly");
                if copy {
                    unbound(map);
                }
            }
        }
        if told.get("enum").is_some() { open_list(told) } else { told }
    }

    /// Adds requests' form of a component, a union with its variants.
    fn ask(&self, name: &str, settled: &mut BTreeMap<String, Value>) {
        let schema = self.asked(&self.schemas[name]);
        if !is_union(&schema) {
            settled.insert(name.to_owned(), schema);
            return;
        }
        let (mut variants, mut mapping) = (Vec::new(), Map::new());
        for variant in schema["oneOf"].as_array().into_iter().flatten() {
            let (Some(title), Some(kind)) = (variant["title"].as_str(), kind_of(variant)) else { continue };
            let place = format!("{PLACE}{title}");
            settled.insert(title.to_owned(), named(variant, kind));
            variants.push(json!({"$ref": place}));
            mapping.insert(kind.to_owned(), place.into());
        }
        let union = json!({
            "description": schema["description"],
            "required": ["kind"],
            "oneOf": variants,
            "discriminator": {"propertyName": "kind", "mapping": mapping},
        });
        settled.insert(name.to_owned(), beside(union, &schema));
    }

    /// Answers' form of a component.
    fn tell(&self, name: &str) -> Value {
        let (schema, copy) = (&self.schemas[name], self.own.contains(name));
        if !is_union(schema) {
            return self.told(schema, copy);
        }
        let variants = || schema["oneOf"].as_array().into_iter().flatten();
        let kinds: Vec<&str> = variants().filter_map(kind_of).collect();
        let kind = json!({"type": "string", "description": "Which kind it is.", "enum": kinds});
        let mut properties = Map::from_iter([("kind".to_owned(), open_list(kind))]);
        for (name, property) in variants().filter_map(|v| v["properties"].as_object()).flatten() {
            if name == "kind" {
                continue;
            }
            let told = self.told(property, copy);
            match properties.get_mut(name) {
                None => _ = properties.insert(name.clone(), told),
                // Two variants mean different things by the name: anything.
                Some(known)
                    if ["type", "$ref", "oneOf", "items"].iter().any(|k| known.get(k) != told.get(k)) =>
                {
                    *known = json!({"description": known["description"]});
                }
                Some(_) => {}
            }
        }
        json!({
            "description": schema["description"],
            "type": "object",
            "properties": properties,
            "required": ["kind"],
        })
    }
}

/// The same with its inner schemas changed, and without those that are not kept.
fn walk(value: &Value, change: impl Fn(&Value) -> Value, keep: impl Fn(&Value) -> bool) -> Value {
    match value {
        Value::Object(map) => map
            .iter()
            .filter(|(_, v)| keep(v))
            .map(|(k, v)| (k.clone(), if PLAIN.contains(&k.as_str()) { v.clone() } else { change(v) }))
            .collect::<Map<_, _>>()
            .into(),
        Value::Array(list) => list.iter().map(change).collect(),
        other => other.clone(),
    }
}

/// The one value of a variant's `kind`.
fn kind_of(variant: &Value) -> Option<&str> {
    variant.pointer("/properties/kind/enum/0").and_then(Value::as_str)
}

/// A variant as a component of its own.
fn named(variant: &Value, kind: &str) -> Value {
    let mut named = variant.clone();
    if let Value::Object(map) = &mut named {
        map.shift_remove("title");
        let required: Vec<Value> =
            variant["required"].as_array().into_iter().flatten().filter(|r| *r != "kind").cloned().collect();
        map.shift_remove("required");
        if !required.is_empty() {
            map.insert("required".into(), required.into());
        }
        let description = "Which kind it is: always this one.";
        let kind = json!({"type": "string", "description": description, "enum": [kind], "default": kind});
        let rest =
            variant["properties"].as_object().into_iter().flatten().filter(|(name, _)| *name != "kind");
        let rest = rest.map(|(name, schema)| (name.clone(), schema.clone()));
        let properties: Map<String, Value> = std::iter::once(("kind".to_owned(), kind)).chain(rest).collect();
        map.insert("properties".into(), properties.into());
    }
    named
}

/// What `value` says beside a reference or a choice, added to what it refers to, and counting before that.
fn beside(mut schema: Value, value: &Value) -> Value {
    if let Value::Object(map) = &mut schema {
        let more = value.as_object().into_iter().flatten();
        for (key, value) in more.filter(|(k, _)| !["$ref", "oneOf"].contains(&k.as_str())) {
            map.insert(key.clone(), value.clone());
        }
    }
    schema
}

/// A string whose values of today are listed, and which may have others tomorrow.
fn open_list(mut schema: Value) -> Value {
    if let Value::Object(map) = &mut schema
        && let Some(values) = map.shift_remove("enum")
    {
        let names: Vec<String> = values
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(|v| format!("`{v}`"))
            .collect();
        if names.len() <= NAMED {
            let text = map.get("description").and_then(Value::as_str).unwrap_or_default();
            let list = format!("{text} Now {}; more may come.", names.join(", "));
            map.insert("description".into(), list.trim_start().into());
        }
        map.insert("x-extensible-enum".into(), values);
        map.shift_remove("default");
    }
    schema
}

/// Takes the bounds away that only requests have.
fn unbound(map: &mut Map<String, Value>) {
    for bound in ["minLength", "maxLength", "minItems", "maxItems", "pattern", "multipleOf", "maximum"] {
        map.shift_remove(bound);
    }
    if map.get("format").is_some_and(|f| f == "int64") {
        map.insert("maximum".into(), MAX_SAFE_INTEGER.into());
    }
    if map.get("minimum").is_some_and(|m| *m != 0) {
        map.shift_remove("minimum");
    }
}
