//! How guests run, on the wire: what the drivers of this daemon say of themselves.
//!
//! Owns: the way of a definition's driver from and to JSON, and its place in the document. Must not know: any
//! particular driver, nor its members.

use std::borrow::Cow;
use std::sync::Arc;

use mirrorvm::guest::{DriverSpec, Drivers};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// How a guest runs: a driver's name as `kind`, and that driver's own members beside it.
#[derive(Clone, Debug)]
pub struct DriverBody(Arc<RawValue>);

impl Serialize for DriverBody {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl DriverBody {
    /// As callers see it, defaults filled in.
    pub fn shown(spec: &DriverSpec, drivers: &Drivers) -> Self {
        Self(drivers.shown(spec))
    }
}

/// Name of the union of all drivers in the document.
const NAME: &str = "Driver";

impl PartialSchema for DriverBody {
    /// A place for what [`describe`] puts there.
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().into()
    }
}

impl ToSchema for DriverBody {
    fn name() -> Cow<'static, str> {
        NAME.into()
    }
}

/// Puts into the document's schemas what each driver's part of a definition looks like.
pub fn describe(schemas: &mut serde_json::Map<String, Value>, drivers: &Drivers) {
    let mut union = Vec::new();
    for driver in drivers.iter() {
        let schema = driver.schema();
        union.push(schema.entry(driver.name()));
        for (name, component) in schema.components {
            schemas.entry(name).or_insert(component);
        }
    }
    schemas.insert(NAME.into(), json!({"description": "How a guest runs.", "oneOf": union}));
}
