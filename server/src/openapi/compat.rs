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
        if way == Way::Out && nullable(new) && !nullable(old) {
            self.note(at, "may be null now");
        }
        if way == Way::In && nullable(old) && !nullable(new) {
            self.note(at, "null is not taken any more");
        }
        // `oneOf` of null and one other is that other.
        if let Some(one) = other_than_null(old) {
            return self.schema(at, one, other_than_null(new).unwrap_or(new), way);
        }
        if let Some(one) = other_than_null(new) {
            return self.schema(at, old, one, way);
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

    /// Variants of a union go by their name: of the component, or the title.
    fn variants(&mut self, at: &str, old: &'a Value, new: &'a Value, way: Way) {
        let name = |v: &Value| {
            let reference = v["$ref"].as_str().and_then(|r| r.rsplit('/').next());
            v["title"].as_str().or(reference).or(v["type"].as_str()).unwrap_or_default().to_owned()
        };
        for variant in list(&old["oneOf"]) {
            let wanted = name(variant);
            let at = format!("{at}/{wanted}");
            match list(&new["oneOf"]).find(|v| name(v) == wanted) {
                Some(other) => self.schema(&at, variant, other, way),
                // One object with the members of all, which is told what it is by `kind`.
                None if new.get("properties").is_some() => {
                    let variant = resolve(self.old, variant);
                    match way {
                        Way::In => self.properties(&at, variant, new, way),
                        Way::Out => self.members(&at, variant, new),
                    }
                }
                None if way == Way::In => self.note(&at, "the variant is gone"),
                None => {}
            }
        }
    }

    /// A variant's members are among those of the object in its place, which other variants' may be missing
    /// in.
    fn members(&mut self, at: &str, variant: &'a Value, new: &'a Value) {
        for (name, property) in members(&variant["properties"]) {
            let at = format!("{at}.{name}");
            match new["properties"].get(name) {
                Some(other) => self.schema(&at, property, other, Way::Out),
                None => self.note(&at, "is gone"),
            }
        }
    }
}

fn nullable(schema: &Value) -> bool {
    schema["type"] == "null"
        || list(&schema["type"]).any(|t| t == "null")
        || list(&schema["oneOf"]).any(|v| v["type"] == "null")
}

/// The other one of a choice between null and one other.
pub(super) fn other_than_null(schema: &Value) -> Option<&Value> {
    let variants = schema["oneOf"].as_array()?;
    let mut others = variants.iter().filter(|v| v["type"] != "null");
    let one = others.next()?;
    (variants.len() == 2 && others.next().is_none()).then_some(one)
}

/// Types but null.
fn kinds(schema: &Value) -> BTreeSet<String> {
    let one = schema["type"].as_str().into_iter();
    let many = list(&schema["type"]).filter_map(Value::as_str);
    one.chain(many).filter(|t| *t != "null").map(str::to_owned).collect()
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

    /// The second edition's shapes: variants become components, unions of answers one object, enumerations of
    /// answers strings.
    #[test]
    fn named_variants_and_open_answers_break_nothing() {
        let named = |extra: Value| {
            let mut new = document();
            let schemas = new["components"]["schemas"].as_object_mut().unwrap();
            schemas.insert(
                "A".into(),
                json!({"type": "object", "properties": {"kind": {"type": "string", "enum": ["a"], "default": "a"}}}),
            );
            schemas.insert("B".into(), json!({"type": "object"}));
            schemas["New"]["properties"]["kind"] = json!({"required": ["kind"],
                "oneOf": [{"$ref": "#/components/schemas/A"}, {"$ref": "#/components/schemas/B"}]});
            let union = &mut schemas["Thing"]["properties"]["kind"];
            *union = json!({"type": "object", "properties": {"kind": {"type": "string"}, "n": {"type": "integer"}}});
            union["properties"].as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            new
        };
        let mut old = document();
        old["components"]["schemas"]["Thing"]["properties"]["kind"] = json!({"oneOf": [
            {"title": "A", "type": "object", "required": ["kind", "n"],
                "properties": {"kind": {"type": "string", "enum": ["a"]}, "n": {"type": "integer"}}}]});
        let found = breaks(&old, &named(json!({})));
        assert!(found.is_empty(), "{found:?}");
        assert!(!breaks(&old, &named(json!({"n": {"type": "string"}}))).is_empty(), "a member is another");
        let mut without = named(json!({}));
        without["components"]["schemas"]["Thing"]["properties"]["kind"]["properties"]
            .as_object_mut()
            .unwrap()
            .remove("n");
        assert!(!breaks(&old, &without).is_empty(), "a member is gone");
        let mut demanding = named(json!({}));
        demanding["components"]["schemas"]["A"]["required"] = json!(["more"]);
        demanding["components"]["schemas"]["A"]["properties"]["more"] = json!({"type": "string"});
        assert!(!breaks(&old, &demanding).is_empty(), "a variant demands more");
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
