//! What a client written against one version of the document would trip over in another.
//!
//! The rules: what a client may send must stay accepted (paths, parameters, properties, values), and what it
//! reads must stay there and stay what it is. New operations, optional parameters and properties, values of
//! answers and statuses are additions.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// Which way a value goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the client: nothing that was accepted may be refused.
    In,
    /// To the client: nothing that was there may be missing or be something else.
    Out,
}

/// Every breaking change from `old` to `new`, each with its place.
pub fn breaks(old: &Value, new: &Value) -> Vec<String> {
    let mut check = Check { old, new, seen: BTreeSet::new(), found: Vec::new() };
    for (path, item) in members(&old["paths"]) {
        for (method, operation) in item.as_object().into_iter().flatten() {
            let at = format!("{} {path}", method.to_uppercase());
            match new["paths"].get(path).and_then(|i| i.get(method)) {
                Some(other) => check.operation(&at, operation, other),
                None => check.note(&at, "the operation is gone"),
            }
        }
    }
    check.found
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

struct Check<'a> {
    old: &'a Value,
    new: &'a Value,
    seen: BTreeSet<(String, String, bool)>,
    found: Vec<String>,
}

impl<'a> Check<'a> {
    fn note(&mut self, at: &str, what: impl AsRef<str>) {
        self.found.push(format!("{at}: {}", what.as_ref()));
    }

    fn operation(&mut self, at: &str, old: &'a Value, new: &'a Value) {
        if old["operationId"] != new["operationId"] {
            self.note(at, "operationId has changed");
        }
        let same = |a: &Value, b: &Value| a["name"] == b["name"] && a["in"] == b["in"];
        for parameter in list(&old["parameters"]) {
            let at = format!("{at} parameter {}", parameter["name"].as_str().unwrap_or("?"));
            match list(&new["parameters"]).find(|p| same(p, parameter)) {
                None => self.note(&at, "is gone"),
                Some(other) => {
                    if other["required"] == true && parameter["required"] != true {
                        self.note(&at, "is required now");
                    }
                    self.schema(&at, &parameter["schema"], &other["schema"], Way::In);
                }
            }
        }
        for parameter in list(&new["parameters"]) {
            let is_new = !list(&old["parameters"]).any(|p| same(p, parameter));
            if is_new && parameter["required"] == true {
                self.note(at, format!("parameter {} is new and required", parameter["name"]));
            }
        }
        self.body(at, &old["requestBody"], &new["requestBody"]);
        for (status, response) in members(&old["responses"]).filter(|(s, _)| s.starts_with('2')) {
            let at = format!("{at} {status}");
            match new["responses"].get(status) {
                None => self.note(&at, "the answer is gone"),
                Some(other) => self.content(&at, &response["content"], &other["content"], Way::Out),
            }
        }
    }

    fn body(&mut self, at: &str, old: &'a Value, new: &'a Value) {
        let at = format!("{at} body");
        if old.is_null() && new["required"] == true {
            self.note(&at, "is required now");
        }
        if !old.is_null() && new.is_null() {
            self.note(&at, "is gone");
        } else {
            self.content(&at, &old["content"], &new["content"], Way::In);
        }
    }

    fn content(&mut self, at: &str, old: &'a Value, new: &'a Value, way: Way) {
        for (kind, media) in members(old) {
            match new.get(kind) {
                None => self.note(at, format!("{kind} is gone")),
                Some(other) => self.schema(at, &media["schema"], &other["schema"], way),
            }
        }
    }

    fn schema(&mut self, at: &str, old: &'a Value, new: &'a Value, way: Way) {
        let key = |v: &Value| v["$ref"].as_str().unwrap_or_default().to_owned();
        if old.get("$ref").is_some() || new.get("$ref").is_some() {
            // Each pair of named schemas once for each way.
            if old.get("$ref").is_some() && !self.seen.insert((key(old), key(new), way == Way::In)) {
                return;
            }
            let (old, new) = (resolve(self.old, old), resolve(self.new, new));
            return self.schema(at, old, new, way);
        }
        self.kinds(at, old, new, way);
        self.values(at, old, new, way);
        self.bounds(at, old, new, way);
        self.properties(at, old, new, way);
        if old.get("items").is_some() {
            self.schema(&format!("{at}[]"), &old["items"], &new["items"], way);
        }
        self.variants(at, old, new, way);
    }

    fn kinds(&mut self, at: &str, old: &Value, new: &Value, way: Way) {
        let (before, after) = (kinds(old), kinds(new));
        if before.is_empty() || before == after {
            return;
        }
        let narrower = before.difference(&after).next().is_some();
        let wider = after.difference(&before).next().is_some();
        if (way == Way::In && narrower) || (way == Way::Out && wider) {
            self.note(at, format!("type was {before:?} and is {after:?}"));
        }
    }

    fn values(&mut self, at: &str, old: &Value, new: &Value, way: Way) {
        let gone = list(&old["enum"]).find(|v| !list(&new["enum"]).any(|n| n == *v));
        if let (Way::In, Some(value)) = (way, gone)
            && new.get("enum").is_some()
        {
            self.note(at, format!("the value {value} is gone"));
        }
        if way == Way::In && old.get("enum").is_none() && new.get("enum").is_some() {
            self.note(at, "only certain values are taken now");
        }
    }

    fn bounds(&mut self, at: &str, old: &Value, new: &Value, way: Way) {
        if way == Way::Out {
            return;
        }
        for (name, sign) in [
            ("minimum", 1.0),
            ("maximum", -1.0),
            ("minLength", 1.0),
            ("maxLength", -1.0),
            ("minItems", 1.0),
            ("maxItems", -1.0),
        ] {
            let (before, after) = (old[name].as_f64(), new[name].as_f64());
            let tighter = match (before, after) {
                (Some(before), Some(after)) => (after - before) * sign > 0.0,
                (None, Some(_)) => true,
                (_, None) => false,
            };
            if tighter {
                self.note(at, format!("{name} is tighter"));
            }
        }
        if new.get("pattern").is_some() && new["pattern"] != old["pattern"] {
            self.note(at, "the pattern is another");
        }
    }

    fn properties(&mut self, at: &str, old: &'a Value, new: &'a Value, way: Way) {
        let required = |schema: &Value, name: &str| list(&schema["required"]).any(|r| r == name);
        for (name, property) in members(&old["properties"]) {
            let at = format!("{at}.{name}");
            let Some(other) = new["properties"].get(name) else {
                self.note(&at, "is gone");
                continue;
            };
            match way {
                Way::In if required(new, name) && !required(old, name) => self.note(&at, "is required now"),
                Way::Out if required(old, name) && !required(new, name) => {
                    self.note(&at, "may be missing now");
                }
                _ => {}
            }
            self.schema(&at, property, other, way);
        }
        for (name, _) in members(&new["properties"]) {
            let is_new = old.get("properties").is_some() && old["properties"].get(name).is_none();
            if way == Way::In && is_new && required(new, name) {
                self.note(&format!("{at}.{name}"), "is new and required");
            }
        }
    }

    /// Variants of a union go by their title, the null variant by itself.
    fn variants(&mut self, at: &str, old: &'a Value, new: &'a Value, way: Way) {
        let name = |v: &Value| {
            let title = v["title"].as_str().or(v["$ref"].as_str()).or(v["type"].as_str());
            title.unwrap_or_default().to_owned()
        };
        for variant in list(&old["oneOf"]) {
            let wanted = name(variant);
            let other = list(&new["oneOf"]).find(|v| name(v) == wanted);
            match other {
                Some(other) => self.schema(&format!("{at}/{wanted}"), variant, other, way),
                None if way == Way::In => self.note(at, format!("the variant {wanted} is gone")),
                None => {}
            }
        }
        let null = |v: &Value| list(&v["oneOf"]).any(|v| v["type"] == "null");
        if way == Way::Out && null(new) && !null(old) {
            self.note(at, "may be null now");
        }
    }
}

fn kinds(schema: &Value) -> BTreeSet<String> {
    match &schema["type"] {
        Value::String(kind) => BTreeSet::from([kind.clone()]),
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => BTreeSet::new(),
    }
}

fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str().and_then(|r| r.strip_prefix('#')) {
        Some(pointer) => document.pointer(pointer).unwrap_or(&Value::Null),
        None => schema,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document() -> Value {
        json!({
            "paths": {"/v1/things": {
                "get": {"operationId": "thing_list",
                    "parameters": [{"name": "limit", "in": "query", "schema": {"type": "integer", "maximum": 10}}],
                    "responses": {"200": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}}},
                        "404": {}}},
                "post": {"operationId": "thing_create",
                    "requestBody": {"required": true, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/New"}}}},
                    "responses": {"201": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}}}}},
            }},
            "components": {"schemas": {
                "Thing": {"type": "object", "required": ["id"], "properties": {
                    "id": {"type": "string"}, "state": {"type": "string", "enum": ["a"]},
                    "next": {"oneOf": [{"type": "null"}, {"$ref": "#/components/schemas/Thing"}]}}},
                "New": {"type": "object", "required": ["name"], "properties": {
                    "name": {"type": "string", "maxLength": 9},
                    "kind": {"oneOf": [{"title": "A", "type": "object", "properties": {"kind": {"type": "string", "enum": ["a"]}}},
                        {"title": "B", "type": "object"}]}}},
            }},
        })
    }

    /// What breaks when the value at `pointer` is replaced, or removed.
    fn after(pointer: &str, value: Option<Value>) -> Vec<String> {
        let mut new = document();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        let name = name.replace("~1", "/");
        match (new.pointer_mut(parent).unwrap(), value) {
            (Value::Object(map), Some(value)) => drop(map.insert(name, value)),
            (Value::Object(map), None) => drop(map.remove(&name).unwrap()),
            (Value::Array(list), Some(value)) => list.push(value),
            (Value::Array(list), None) => drop(list.remove(name.parse().unwrap())),
            _ => panic!("{pointer}"),
        }
        breaks(&document(), &new)
    }

    #[test]
    fn additions_break_nothing() {
        assert!(breaks(&document(), &document()).is_empty());
        let get = "/paths/~1v1~1things/get";
        for (pointer, value) in [
            ("/paths/~1v2", json!({"get": {}})),
            (
                &format!("{get}/parameters/-"),
                json!({"name": "x", "in": "query", "schema": {"type": "string"}}),
            ),
            (&format!("{get}/parameters/0/schema/x"), json!(1)),
            (&format!("{get}/responses/410"), json!({})),
            ("/components/schemas/Thing/properties/more", json!({"type": "string"})),
            ("/components/schemas/Thing/properties/state/enum/-", json!("b")),
            ("/components/schemas/New/properties/more", json!({"type": "string"})),
            ("/components/schemas/New/properties/kind/oneOf/-", json!({"title": "C", "type": "object"})),
            ("/components/schemas/New/properties/name/maxLength", json!(10)),
        ] {
            let found = after(pointer, Some(value));
            assert!(found.is_empty(), "{pointer}: {found:?}");
        }
        assert!(after("/components/schemas/New/properties/name/maxLength", None).is_empty());
    }

    #[test]
    fn what_clients_trip_over_is_found() {
        let get = "/paths/~1v1~1things/get";
        let gone = [
            "/paths/~1v1~1things",
            get,
            &format!("{get}/parameters/0"),
            &format!("{get}/responses/200"),
            &format!("{get}/responses/200/content/application~1json"),
            "/paths/~1v1~1things/post/requestBody",
            "/components/schemas/Thing/properties/id",
            "/components/schemas/Thing/required/0",
            "/components/schemas/New/properties/kind/oneOf/1",
            "/components/schemas/New/properties/name",
        ];
        for pointer in gone {
            assert!(!after(pointer, None).is_empty(), "{pointer}");
        }
        for (pointer, value) in [
            (format!("{get}/operationId"), json!("x")),
            (format!("{get}/parameters/-"), json!({"name": "x", "in": "query", "required": true})),
            (format!("{get}/parameters/0/schema/maximum"), json!(9)),
            (format!("{get}/parameters/0/schema/type"), json!("string")),
            (format!("{get}/parameters/0/required"), json!(true)),
            ("/components/schemas/Thing/properties/id/type".into(), json!(["string", "null"])),
            ("/components/schemas/New/required/-".into(), json!("kind")),
            ("/components/schemas/New/properties/name/pattern".into(), json!("^a$")),
            ("/components/schemas/New/properties/name/enum".into(), json!(["a"])),
            ("/components/schemas/New/properties/kind/oneOf/0/properties/kind/enum".into(), json!(["z"])),
        ] {
            assert!(!after(&pointer, Some(value)).is_empty(), "{pointer}");
        }
    }
}
