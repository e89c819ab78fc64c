//! Why something failed, as records have it on disk.

use crate::host::Fault;
use crate::store::form::form;

form! {
    FaultForm of Fault {
        code: String,
        detail: String,
    }
}
