//! The OpenAPI document: committed as it is served, complete, and of one mind with the decoders.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::sync::LazyLock;

use mirrorvmd::access::table::OPERATIONS;
use mirrorvmd::openapi::{Document, compat};
use mirrorvmd::problem::{Entry, ProblemCode};
use serde_json::{Value, json};

fn document() -> Value {
    static DOCUMENT: LazyLock<Value> =
        LazyLock::new(|| serde_json::from_slice(Document::of_this_build().unwrap().bytes()).unwrap());
    DOCUMENT.clone()
}

/// Every operation with its path and method.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut list = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            list.push((path.clone(), method.clone(), operation.clone()));
        }
    }
    list
}

/// The committed file `name` is what this build makes; a change that clients would trip over is named.
fn committed(name: &str, built: &Document) {
    let path = format!("{}/../openapi/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, built.bytes()).unwrap();
    }
    let committed = std::fs::read(&path).unwrap_or_default();
    let same = committed == built.bytes().as_ref();
    let breaks = match serde_json::from_slice(&committed) {
        Ok(old) if !same => compat::breaks(&old, &serde_json::from_slice(built.bytes()).unwrap()),
        _ => Vec::new(),
    };
    assert!(
        same,
        "openapi/{name} is not what this build serves. Breaking changes: {breaks:#?}. If the change is meant and nothing \
         breaks, run this test with UPDATE_OPENAPI=1 and commit the file"
    );
}

#[test]
fn the_committed_documents_are_those_that_are_served() {
    committed("v1.json", &Document::of_this_build().unwrap());
    committed("v1-3.0.json", &Document::of_this_build_3_0().unwrap());
}

/// `openapi/v1-base.json` is the document that clients were last told of: what it promises must hold.
#[test]
fn nothing_breaks_for_clients_of_the_last_published_document() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../openapi/v1-base.json");
    let base: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let breaks: BTreeSet<String> = compat::breaks(&base, &document()).into_iter().collect();
    let meant = meant_breaks();
    let (found, gone) = (breaks.difference(&meant), meant.difference(&breaks));
    let found: Vec<_> = found.collect();
    assert!(found.is_empty(), "clients of openapi/v1-base.json would trip over: {found:#?}");
    assert_eq!(gone.collect::<Vec<_>>(), Vec::<&String>::new(), "these do not break anything (any more)");
}

/// What a client of the base document would trip over and is meant, each with its reason; a landing empties
/// it, because its document becomes the base.
const fn meant_breaks() -> BTreeSet<String> {
    BTreeSet::new()
}

/// The table says who may call what, so that an operation without an entry is for nobody.
#[test]
fn the_table_of_operations_is_the_documents() {
    let wanted: BTreeSet<_> =
        OPERATIONS.iter().map(|o| (o.method.to_lowercase(), o.path.to_owned(), o.id.to_owned())).collect();
    assert_eq!(wanted.len(), OPERATIONS.len());
    let found: BTreeSet<_> = operations(&document())
        .into_iter()
        .map(|(p, m, o)| (m, p, o["operationId"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(found, wanted);
}

#[test]
fn codes_are_documented_as_they_are_sent() {
    let answers: Vec<&str> = ProblemCode::ALL.iter().map(|c| c.as_str()).collect();
    let all: Vec<&str> = Entry::all().map(Entry::code).collect();
    for (schema, codes) in [("Problem", answers), ("ProblemKind", all)] {
        let code = &document()["components"]["schemas"][schema]["properties"]["code"];
        assert_eq!(code["x-extensible-enum"], json!(codes), "{schema}");
        assert_eq!(code["type"], "string", "{schema}");
    }
}

#[test]
fn the_older_version_says_the_same() {
    let old: Value = serde_json::from_slice(Document::of_this_build_3_0().unwrap().bytes()).unwrap();
    assert_eq!(old["openapi"], "3.0.3");
    let ids = |d: &Value| -> BTreeSet<String> {
        operations(d).iter().map(|(_, _, o)| o["operationId"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&old), ids(&document()));
    let text = old.to_string();
    for newer in ["\"const\"", "\"null\"", "mutualTLS\":", "problem+json"] {
        assert!(!text.contains(newer), "{newer} is left");
    }
}

#[test]
fn everything_is_described() {
    let document = document();
    assert_eq!(document["openapi"], "3.1.0");
    let mut bare = Vec::new();
    for (path, method, operation) in operations(&document) {
        for member in ["summary", "description", "operationId"] {
            if operation[member].as_str().is_none_or(str::is_empty) {
                bare.push(format!("{method} {path}: {member}"));
            }
        }
        assert_eq!(operation["tags"].as_array().map(Vec::len), Some(1), "{method} {path}");
        for (status, response) in operation["responses"].as_object().unwrap() {
            let json = response.pointer("/content/application~1json");
            if status.starts_with('2') && json.is_some_and(|j| j.get("example").is_none()) {
                bare.push(format!("{method} {path}: example of {status}"));
            }
        }
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            if parameter["description"].as_str().is_none_or(str::is_empty) {
                bare.push(format!("{method} {path}: parameter {}", parameter["name"]));
            }
        }
        if operation.get("requestBody").is_some() {
            let (kind, media) =
                operation["requestBody"]["content"].as_object().unwrap().iter().next().unwrap();
            if kind == "application/octet-stream" {
                continue;
            }
            let schema = resolve(&document, &media["schema"]);
            if schema.get("example").or(schema.get("examples")).is_none() {
                bare.push(format!("{method} {path}: example of the body"));
            }
        }
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        if schema["description"].as_str().is_none() {
            bare.push(name.clone());
        }
        undescribed(name, schema, &mut bare);
    }
    assert!(bare.is_empty(), "without description: {bare:#?}");
}

/// Pages and generators take the example of a parameter for its value.
#[test]
fn parameters_have_examples_where_they_are_required_and_nowhere_else() {
    let document = document();
    let mut wrong = Vec::new();
    let mut said = 0;
    for (path, method, operation) in operations(&document) {
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let required = parameter["required"] == true;
            let example = parameter.get("example").or(parameter["schema"].get("example")).is_some();
            if required != example {
                wrong.push(format!("{method} {path}: {}", parameter["name"]));
            }
            said += u32::from(parameter["description"].as_str().unwrap().contains("Example: `"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(said > 50, "{said}");
}

fn undescribed(name: &str, schema: &Value, bare: &mut Vec<String>) {
    for (property, schema) in schema["properties"].as_object().into_iter().flatten() {
        let at = format!("{name}.{property}");
        if schema["description"].as_str().is_none() && property != "kind" {
            bare.push(at.clone());
        }
        undescribed(&at, schema, bare);
    }
    for (index, variant) in schema["oneOf"].as_array().into_iter().flatten().enumerate() {
        undescribed(&format!("{name}/{index}"), variant, bare);
    }
}

/// The schemas that a part of every operation leads to, components and others.
fn schemas_of<'a>(document: &'a Value, parts: &[&str]) -> Vec<(String, &'a Value)> {
    let mut stack: Vec<(String, &Value)> = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            stack.extend(parts.iter().map(|p| (format!("{method} {path} {p}"), &operation[*p])));
        }
    }
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    while let Some((at, value)) = stack.pop() {
        match value {
            Value::Object(map) => {
                if let Some(target) = map.get("$ref").and_then(Value::as_str)
                    && seen.insert(target)
                {
                    let name = target.rsplit('/').next().unwrap().to_owned();
                    stack.push((name, document.pointer(target.trim_start_matches('#')).unwrap()));
                }
                found.push((at.clone(), value));
                let plain = ["example", "examples", "enum", "default"];
                let inner = map.iter().filter(|(k, _)| !plain.contains(&k.as_str()));
                stack.extend(inner.map(|(k, v)| (format!("{at}/{k}"), v)));
            }
            Value::Array(list) => stack.extend(list.iter().map(|v| (at.clone(), v))),
            _ => {}
        }
    }
    found
}

/// Unions are what clients send, in the one shape that every generator handles: named components that a
/// discriminator tells apart, `kind` among their members, and only the union demands it.
#[test]
fn unions_have_the_shape_that_generators_survive() {
    let document = document();
    let mut unions = BTreeSet::new();
    for (at, schema) in schemas_of(&document, &["requestBody", "parameters"]) {
        assert!(schema.get("allOf").is_none() && schema.get("anyOf").is_none(), "{at}");
        let Some(variants) = schema.get("oneOf").and_then(Value::as_array) else { continue };
        if variants.iter().any(|v| v["type"] == "null") {
            // Null is for objects that can be left out, not one more variant of a union.
            assert!(variants.iter().all(|v| resolve(&document, v).get("oneOf").is_none()), "{at}");
            continue;
        }
        assert_eq!(schema["required"], json!(["kind"]), "{at}");
        assert_eq!(schema["discriminator"]["propertyName"], "kind", "{at}");
        let mapping = schema["discriminator"]["mapping"].as_object().unwrap();
        assert_eq!(mapping.len(), variants.len(), "{at}");
        for variant in variants {
            let named = resolve(&document, variant);
            let kind = named["properties"]["kind"]["default"].as_str().unwrap();
            assert_eq!(mapping[kind], variant["$ref"], "{at}");
            assert_eq!(named["properties"]["kind"]["enum"], json!([kind]), "{at}");
            assert_eq!(named["properties"].as_object().unwrap().keys().next().unwrap(), "kind", "{at}");
            let required = named["required"].as_array().into_iter().flatten();
            assert!(required.clone().all(|r| r != "kind"), "{at}");
            assert_eq!(named["additionalProperties"], false, "{at}");
        }
        unions.insert(at);
    }
    let wanted = [
        "Destination",
        "Driver",
        "MigrationResolve",
        "MirrorChoice",
        "MirrorImportCreate",
        "QemuNetwork",
        "Scheduler",
        "Shift",
        "Strategy",
    ];
    assert_eq!(unions, wanted.map(str::to_owned).into());
}

/// A client that is strict about what it was told of must survive a driver, a state and a code that come
/// later.
#[test]
fn what_clients_read_is_open() {
    let document = document();
    for (at, schema) in schemas_of(&document, &["responses"]) {
        assert!(schema.get("enum").is_none() && schema.get("const").is_none(), "{at} is closed");
        assert!(schema.get("additionalProperties").is_none_or(|a| *a != false), "{at} forbids more");
        assert!(schema.get("default").is_none(), "{at} has a default, which clients would fill in");
        let variants = schema.get("oneOf").and_then(Value::as_array);
        assert!(variants.is_none_or(|v| v.len() == 2 && v.iter().any(|v| v["type"] == "null")), "{at}");
    }
}

/// In languages with one name space for constants, values of two enumerations would collide.
#[test]
fn enumerations_are_written_out_where_they_are_used() {
    for (name, schema) in document()["components"]["schemas"].as_object().unwrap() {
        assert!(schema.get("enum").is_none(), "{name}");
    }
}

/// Merge patches demand nothing, and generators send nothing of their own accord.
#[test]
fn nothing_is_sent_that_nobody_asked_for() {
    let document = document();
    for (path, method, operation) in operations(&document) {
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let name = &parameter["name"];
            assert!(name != "dry_run" || parameter["schema"].get("default").is_none(), "{method} {path}");
        }
    }
    let patches = {
        let mut only = document.clone();
        for item in only["paths"].as_object_mut().unwrap().values_mut() {
            item.as_object_mut().unwrap().retain(|method, _| method == "patch");
        }
        only
    };
    let schemas = schemas_of(&patches, &["requestBody"]);
    assert!(schemas.iter().any(|(at, _)| at == "PlacementUpdate"));
    for (at, schema) in schemas {
        assert!(schema.get("required").is_none_or(Value::is_boolean), "{at} demands {}", schema["required"]);
    }
}

/// Every operation answers success with one kind of body.
#[test]
fn an_operation_has_one_body_of_success() {
    for (path, method, operation) in operations(&document()) {
        let responses = operation["responses"].as_object().unwrap();
        let bodies: BTreeSet<String> = responses
            .iter()
            .filter(|(status, _)| status.starts_with('2'))
            .map(|(_, response)| {
                response.get("content").map_or_else(String::new, |content| {
                    let media = content.as_object().unwrap();
                    media
                        .iter()
                        .map(|(kind, media)| format!("{kind} {}", media["schema"]))
                        .collect::<Vec<_>>()
                        .join(", ")
                })
            })
            .collect();
        assert!(bodies.len() <= 1 && bodies.iter().all(|b| !b.contains(", ")), "{method} {path}: {bodies:?}");
    }
}

#[test]
fn no_generic_was_inlined_and_every_reference_leads_somewhere() {
    let document = document();
    let mut stack = vec![&document];
    while let Some(value) = stack.pop() {
        match value {
            Value::Object(map) => {
                if let Some(target) = map.get("$ref").and_then(Value::as_str) {
                    assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target}");
                }
                stack.extend(map.values());
            }
            Value::Array(list) => stack.extend(list),
            _ => {}
        }
    }
}

/// Follows a reference.
pub fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(target) => document.pointer(target.trim_start_matches('#')).unwrap(),
        None => schema,
    }
}

mod decoders {
    //! Schemas and decoders are written apart; here they are held against each other.

    use mirrorvm::guest::Drivers;
    use mirrorvmd::api::decode::{self, Decode, Errors, Node};
    use mirrorvmd::api::guests::GuestCreate;
    use mirrorvmd::api::layout::AddressSpacePlanCreate;
    use mirrorvmd::api::migrations::MigrationCreate;
    use mirrorvmd::api::mirrors::MirrorCreate;
    use mirrorvmd::api::peers::PeerHostCreate;
    use proptest::prelude::*;

    use super::*;

    /// A definition, read by the stock drivers.
    struct StockGuest;

    impl Decode for StockGuest {
        fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
            GuestCreate::decode(node, errors, &Drivers::default()).map(|_| Self)
        }
    }

    /// Reads a body as the daemon does.
    fn decode<T: Decode>(value: &Value) -> Result<T, Vec<mirrorvmd::problem::ProblemError>> {
        decode::decode(&mirrorvm::reading::json::parse(value.to_string().as_bytes()).unwrap())
    }

    /// A source of choices for the generator of values.
    struct Choices(Vec<u8>, usize);

    impl Choices {
        fn below(&mut self, n: usize) -> usize {
            self.1 += 1;
            self.0.get(self.1 - 1).map_or(0, |b| usize::from(*b) % n)
        }
    }

    /// How many hexadecimal digits a pattern asks for, if it is of that kind.
    fn hexadecimal(pattern: &str) -> Option<usize> {
        pattern.strip_prefix("^[0-9a-f]{")?.strip_suffix("}$")?.parse().ok()
    }

    /// A value that the schema allows.
    fn value(document: &Value, schema: &Value, c: &mut Choices) -> Value {
        let schema = resolve(document, schema);
        if let Some(variants) = schema["oneOf"].as_array() {
            let index = c.below(variants.len());
            let mut chosen = value(document, &variants[index], c);
            if schema.get("discriminator").is_some() {
                let variant = resolve(document, &variants[index]);
                chosen["kind"] = variant["properties"]["kind"]["default"].clone();
            }
            return chosen;
        }
        if let Some(values) = schema["enum"].as_array() {
            let index = c.below(values.len());
            return values[index].clone();
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => {
                let index = c.below(kinds.len());
                kinds[index].as_str().unwrap()
            }
            kind => kind.as_str().unwrap(),
        };
        match kind {
            "object" => {
                let required: Vec<&str> =
                    schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let mut map = serde_json::Map::new();
                for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
                    if required.contains(&name.as_str()) || c.below(2) == 1 {
                        map.insert(name.clone(), value(document, schema, c));
                    }
                }
                Value::Object(map)
            }
            "array" => {
                let count = 1 + c.below(3);
                (0..count).map(|_| value(document, &schema["items"], c)).collect()
            }
            "integer" => {
                let low = schema["minimum"].as_i64().unwrap();
                // Items of a list have no bound of their own but their format's.
                let by_format = (schema["format"] == "int32").then_some(i64::from(i32::MAX));
                let high = schema["maximum"].as_i64().or(by_format).unwrap();
                match c.below(3) {
                    0 => json!(low),
                    1 => json!(high),
                    _ => json!(low + (high - low) / 3),
                }
            }
            "boolean" => json!(c.below(2) == 1),
            "null" => Value::Null,
            "string" if schema["format"] == "uuid" => json!("0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11"),
            "string" if schema["format"] == "ipv4" => json!("127.0.0.1"),
            "string" => match (schema["pattern"].as_str().and_then(hexadecimal), &schema["example"]) {
                (Some(digits), _) => json!("5a".repeat(digits / 2)),
                // Any other pattern has an example beside it.
                (None, example @ Value::String(_)) if schema["pattern"].is_string() => example.clone(),
                (None, _) => json!("x"),
            },
            other => panic!("{other} is not handled: {schema}"),
        }
    }

    /// Every object in `value` with its pointer.
    fn objects(value: &Value, at: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                found.push(at.to_owned());
                map.iter().for_each(|(k, v)| objects(v, &format!("{at}/{k}"), found));
            }
            Value::Array(list) => {
                list.iter().enumerate().for_each(|(i, v)| objects(v, &format!("{at}/{i}"), found));
            }
            _ => {}
        }
    }

    fn agree<T: Decode>(name: &str, bytes: Vec<u8>) -> Result<(), TestCaseError> {
        let document = document();
        let schema = &document["components"]["schemas"][name];
        let mut choices = Choices(bytes, 0);
        let valid = value(&document, schema, &mut choices);
        let decoded = decode::<T>(&valid);
        prop_assert!(decoded.is_ok(), "{valid} is refused: {:?}", decoded.err());

        // An unknown field anywhere (labels hold any) is refused, by its pointer.
        let mut places = Vec::new();
        objects(&valid, "", &mut places);
        places.retain(|p| p != "/labels");
        let place = &places[choices.below(places.len())];
        let mut broken = valid.clone();
        broken.pointer_mut(place).unwrap()["surprise"] = json!(1);
        let errors = decode::<T>(&broken).err().unwrap();
        let at = format!("{place}/surprise");
        prop_assert_eq!(errors[0].pointer.as_deref(), Some(at.as_str()));
        prop_assert_eq!(errors[0].code.as_str(), "unknown_field");
        Ok(())
    }

    proptest! {
        #[test]
        fn what_a_schema_allows_is_decoded(bytes in proptest::collection::vec(any::<u8>(), 40)) {
            agree::<StockGuest>("GuestCreate", bytes.clone())?;
            agree::<AddressSpacePlanCreate>("AddressSpacePlanCreate", bytes.clone())?;
            agree::<MirrorCreate>("MirrorCreate", bytes.clone())?;
            agree::<MigrationCreate>("MigrationCreate", bytes.clone())?;
            agree::<PeerHostCreate>("PeerHostCreate", bytes)?;
        }
    }

    /// Without a required property: refused; without another one: accepted. With a value off its range:
    /// refused.
    #[test]
    fn required_properties_and_bounds_are_enforced() {
        fn check<T: Decode>(name: &str, checked: &mut u32) {
            let document = document();
            let schema = &document["components"]["schemas"][name];
            let all = value(&document, schema, &mut Choices(vec![1; 64], 0));
            let required = schema["required"].as_array().unwrap();
            for (property, schema) in schema["properties"].as_object().unwrap() {
                let mut without = all.clone();
                without.as_object_mut().unwrap().remove(property);
                assert_eq!(
                    decode::<T>(&without).is_err(),
                    required.contains(&json!(property)),
                    "{name}.{property}"
                );
                let schema = resolve(&document, schema);
                if schema["type"] == "integer" {
                    let mut above = all.clone();
                    above[property] = json!(schema["maximum"].as_u64().unwrap() + 1);
                    assert_eq!(
                        decode::<T>(&above).err().unwrap()[0].code,
                        "out_of_range",
                        "{name}.{property}"
                    );
                    *checked += 1;
                }
            }
        }
        let mut checked = 0;
        check::<StockGuest>("GuestCreate", &mut checked);
        check::<AddressSpacePlanCreate>("AddressSpacePlanCreate", &mut checked);
        check::<MirrorCreate>("MirrorCreate", &mut checked);
        check::<MigrationCreate>("MigrationCreate", &mut checked);
        check::<PeerHostCreate>("PeerHostCreate", &mut checked);
        assert_eq!(checked, 3);
    }

    #[test]
    fn examples_are_decoded() {
        let document = document();
        let example = |name: &str| document["components"]["schemas"][name]["example"].clone();
        decode::<StockGuest>(&example("GuestCreate")).unwrap();
        decode::<AddressSpacePlanCreate>(&example("AddressSpacePlanCreate")).unwrap();
        decode::<MirrorCreate>(&example("MirrorCreate")).unwrap();
        decode::<MigrationCreate>(&example("MigrationCreate")).unwrap();
        decode::<PeerHostCreate>(&example("PeerHostCreate")).unwrap();
    }
}
