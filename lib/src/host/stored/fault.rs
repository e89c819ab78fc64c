//! Why something failed, as records have it on disk.

use crate::codes::AnyCode;
use crate::host::Fault;
use crate::store::form::{Part, Wrong, form};

form! {
    FaultForm of Fault {
        code: AnyCode,
        detail: String,
    }
}

/// Its name: a code that was published stays, and one of a peer's can be any.
impl Part for AnyCode {
    type Form = String;

    fn form(&self) -> String {
        self.as_str().to_owned()
    }

    fn of(form: String) -> Result<Self, Wrong> {
        Ok(form.into())
    }
}
