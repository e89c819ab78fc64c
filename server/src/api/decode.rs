//! Decoding of request bodies, with problems as the API tells of them.
//!
//! Owns: how the library's words for a field become the API's. Must not know: any particular body, nor how
//! one is read (that is [`mirrorvm::reading`]).

pub use mirrorvm::reading::{Decode, Errors, Fields, Node, Patch, decode_by, one_of};
use mirrorvm::reading::{FieldError, Json};

use crate::problem::ProblemError;

/// A body that is decoded later, by something that knows more than its type.
#[derive(Clone, Debug)]
pub struct Raw(pub Json);

impl Decode for Raw {
    fn decode(node: &Node<'_>, _: &mut Errors) -> Option<Self> {
        Some(Self(node.value().clone()))
    }
}

/// Decodes a whole body.
///
/// # Errors
/// Every problem found.
pub fn decode<T: Decode>(value: &Json) -> Result<T, Vec<ProblemError>> {
    mirrorvm::reading::decode(value).map_err(problems)
}

/// What the library found, as a problem has it.
pub fn problems(found: Vec<FieldError>) -> Vec<ProblemError> {
    found.into_iter().map(|e| ProblemError::at_pointer(&e.pointer, e.code, e.detail)).collect()
}
