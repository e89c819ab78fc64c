//! The documents of the store's own, of each of which there is one.
//!
//! Owns: their forms, and how databases of earlier versions have them. Must not know: when they are written.

use serde_json::{Value, json};
use uuid::Uuid;

use super::form::{self, Document, UNSAID, Unread, form, words};
use super::hours::{self, Note};

/// Key of the document that says that the database may be older than what others know.
pub const UNCONFIRMED: &str = "unconfirmed";
/// Key of [`Epoch`].
pub(super) const EPOCH: &str = "epoch";

/// Made with the database: numbers of another epoch mean nothing. 16 hexadecimal digits.
pub(super) struct Epoch {
    pub epoch: String,
}

impl Epoch {
    /// Another than there ever was.
    pub fn fresh() -> Self {
        Self { epoch: format!("{:016x}", Uuid::new_v4().as_u64_pair().0) }
    }
}

form! {
    EpochForm of Epoch, version 5 by epoch_forward {
        epoch: String,
    }
}

/// It was the text alone.
fn epoch_forward(_from: u64, document: &mut Value) {
    *document = json!({ "epoch": document.take() });
}

/// Why nothing that the database says of guests may be acted upon before others were asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// A backup was put back.
    Restored,
    /// Somebody said to go on with what was left.
    Accepted,
}

words! {
    DoubtWord of Doubt {
        Restored = "restored",
        Accepted = "accepted",
    }
}

/// That nothing which the database says of guests may be acted upon before others were asked.
pub struct Unconfirmed {
    /// Why.
    pub doubt: Doubt,
}

form! {
    UnconfirmedForm of Unconfirmed, version 5 by unconfirmed_forward {
        doubt: Doubt,
    }
}

/// It was the word alone.
fn unconfirmed_forward(_from: u64, document: &mut Value) {
    *document = json!({ "doubt": document.take() });
}

/// A document of the store's own as databases of this version have it.
pub(super) fn written_for<T: Document>(
    version: i64,
    document: &T,
    bare: &str,
) -> Result<String, serde_json::Error> {
    if version > UNSAID as i64 { form::write(document) } else { serde_json::to_string(bare) }
}

/// A document of the store's own in the form of this build; `None`: it is none of them.
pub(super) fn renewed(key: &str, body: &[u8]) -> Option<Result<Option<String>, Unread>> {
    match key {
        EPOCH => Some(form::renewed::<Epoch>(body)),
        hours::KEY => Some(form::renewed::<Note>(body)),
        UNCONFIRMED => Some(form::renewed::<Unconfirmed>(body)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one<T: Document>(name: &str, value: &T, version_4: &str) {
        let text = form::write(value).unwrap();
        let path = format!("{}/tests/data/stored/v5/{name}.json", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("UPDATE_STORED").is_some() {
            std::fs::write(&path, format!("{text}\n")).unwrap();
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(there.trim_end(), text, "{name}: see host/stored/mod.rs");
        assert_eq!(renewed(name, text.as_bytes()).unwrap().unwrap(), None);
        assert_eq!(renewed(name, version_4.as_bytes()).unwrap().unwrap(), Some(text));
        assert!(
            renewed(name, b"{}").unwrap().is_err() && renewed(name, b"{\"version\":6}").unwrap().is_err()
        );
    }

    #[test]
    fn every_document_of_the_store_looks_as_its_file_and_is_read_as_version_4_had_it() {
        let epoch = Epoch { epoch: "00112233445566ff".into() };
        one(EPOCH, &epoch, "\"00112233445566ff\"");
        one(UNCONFIRMED, &Unconfirmed { doubt: Doubt::Restored }, "\"restored\"");
        let note = r#"{"at_least":1,"at_most":2,"boot":"b","since_boot":3,"wall":4}"#;
        one(hours::KEY, &form::read::<Note>(note.as_bytes()).unwrap(), note);
        assert!(renewed("host_id", b"1").is_none(), "that is the host's");
        let accepted = written_for(4, &Unconfirmed { doubt: Doubt::Accepted }, "accepted").unwrap();
        assert_eq!(accepted, "\"accepted\"");
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_document_or_refused(text in "\\PC{0,200}", number in proptest::num::u64::ANY) {
            let said = format!("{{\"version\":{number},\"epoch\":{text:?}}}");
            for body in [text.as_bytes(), said.as_bytes()] {
                if let Ok(epoch) = form::read::<Epoch>(body) {
                    let again = form::write(&epoch).unwrap();
                    proptest::prop_assert_eq!(form::read::<Epoch>(again.as_bytes()).unwrap().epoch, epoch.epoch);
                }
            }
        }
    }
}
