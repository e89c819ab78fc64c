//! Fields of the API's answers.

use serde_json::Value;

use super::error::DemoError;

pub(super) fn text(value: &Value, field: &'static str) -> Result<String, DemoError> {
    value[field].as_str().map(str::to_owned).ok_or(DemoError::Answer { field })
}

pub(super) fn number(value: &Value, field: &'static str) -> Result<u64, DemoError> {
    value[field].as_u64().ok_or(DemoError::Answer { field })
}
