//! What a destination notes of a hand-over, and the end of one that the database did not take.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::host::events::EventBody;
use crate::host::migrations::endings::Ending;
use crate::host::migrations::hand_over::{HandOver, Settlement};
use crate::host::{GuestRecord, MigrationRecord};
use crate::store::form::{Document, Part, Wrong, bring, fill, form, there};

form! {
    HandOverForm of HandOver, version 8 by forward {
        peer: String,
        settled: Settlement,
        unconfirmed: bool,
        replaced: Option<Box<GuestRecord>>,
    }
}

/// Version 4 left out what says nothing, and what earlier builds did not have.
fn forward(_from: u64, document: &mut Value) {
    fill(document, [("unconfirmed", json!(false)), ("replaced", Value::Null)]);
    bring_member::<GuestRecord>(document, "replaced");
}

/// Brings a document forward that is part of another; what cannot be is found out when it is read.
fn bring_member<T: Document>(document: &mut Value, name: &str) {
    if let Some(member) = document.get_mut(name).filter(|member| !member.is_null()) {
        let _ = bring::<T>(member);
    }
}

/// The form of a [`Settlement`].
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SettlementForm {
    Open {},
    Committed {
        token: Vec<u8>,
    },
    Aborted {
        #[serde(deserialize_with = "there")]
        token: Option<Vec<u8>>,
    },
}

impl Part for Settlement {
    type Form = SettlementForm;

    fn form(&self) -> SettlementForm {
        match self {
            Self::Open => SettlementForm::Open {},
            Self::Committed { token } => SettlementForm::Committed { token: token.clone() },
            Self::Aborted { token } => SettlementForm::Aborted { token: token.clone() },
        }
    }

    fn of(form: SettlementForm) -> Result<Self, Wrong> {
        Ok(match form {
            SettlementForm::Open {} => Self::Open,
            SettlementForm::Committed { token } => Self::Committed { token },
            SettlementForm::Aborted { token } => Self::Aborted { token },
        })
    }
}

form! {
    EndingForm of Ending, version 8 by ending_forward {
        guest: Uuid,
        record: Option<GuestRecord>,
        migration: MigrationRecord,
        hand_over: Option<HandOver>,
        events: Vec<EventBody>,
    }
}

/// A daemon of an earlier version ended before its database took it.
fn ending_forward(_from: u64, document: &mut Value) {
    bring_member::<GuestRecord>(document, "record");
    bring_member::<MigrationRecord>(document, "migration");
    bring_member::<HandOver>(document, "hand_over");
    let events = document.get_mut("events").and_then(Value::as_array_mut);
    for event in events.into_iter().flatten() {
        let _ = bring::<EventBody>(event);
    }
}
