//! An idempotency key on disk: what it was claimed for, and the answer that it was given.

use mirrorvm::store::form::{Document, Part, Version, Wrong, fill, there};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::http::idempotency::{Answer, Claim};

/// The form of a [`Claim`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimForm {
    version: Version<5>,
    fingerprint: String,
    boot: Uuid,
    resource: Uuid,
    #[serde(deserialize_with = "there")]
    answer: Option<AnswerForm>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AnswerForm {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Part for Claim {
    type Form = ClaimForm;

    fn form(&self) -> ClaimForm {
        let Self { fingerprint, boot, resource, answer } = self;
        let answer = answer.as_ref().map(|answer| {
            let Answer { status, headers, body } = answer;
            AnswerForm { status: *status, headers: headers.clone(), body: body.clone() }
        });
        let (fingerprint, boot, resource) = (fingerprint.clone(), *boot, *resource);
        ClaimForm { version: Version, fingerprint, boot, resource, answer }
    }

    fn of(form: ClaimForm) -> Result<Self, Wrong> {
        let ClaimForm { version: _, fingerprint, boot, resource, answer } = form;
        let answer = answer.map(|answer| {
            let AnswerForm { status, headers, body } = answer;
            Answer { status, headers, body }
        });
        Ok(Self { fingerprint, boot, resource, answer })
    }
}

impl Document for Claim {
    const VERSION: u64 = 5;

    fn forward(_from: u64, document: &mut Value) {
        fill(document, [("answer", Value::Null)]);
    }
}
