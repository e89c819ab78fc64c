//! What ends a migration's doubt, on the wire.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use mirrorvm::host as lib;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::batches::Base64;
use super::decode::{Decode, Errors, Fields, Node, one_of};

/// What became of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = HandOverOutcome)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeBody {
    /// The guest belongs to the destination: it runs there, or did.
    Committed,
    /// The destination never took the guest over, and never will.
    NeverCommitted,
}

/// What a destination's helper said about a hand-over, as a file that can be carried to the source. It is the
/// body of `POST /v1/migrations/{migration}/resolution` there. The two helpers' session seals it, so the
/// source's helper can tell whether it is genuine, and nobody else can make use of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HandOverToken {
    /// Always `token`.
    #[schema(example = "token")]
    pub kind: &'static str,
    /// Id of the migration.
    pub migration: Uuid,
    /// What the token says.
    pub outcome: OutcomeBody,
    /// The token, in base64.
    pub token: String,
}

/// What is to end the doubt about a migration.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = MigrationResolve, example = json!({
    "kind": "word",
    "outcome": "never_committed",
    "reason": "host b was taken apart, ticket 4711",
    "confirm": "g1"
}))]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ResolveBody {
    /// The destination's token, as `GET /v1/migrations/{migration}/hand-over-token` gave it there. The helper
    /// checks it.
    #[schema(title = "ResolveByToken")]
    Token {
        /// Id of the migration.
        migration: Uuid,
        /// What the token says.
        outcome: OutcomeBody,
        /// The token, in base64.
        token: String,
    },
    /// An administrator's word, which nobody can check. **Dangerous**: saying `never_committed` of a guest
    /// that the destination runs lets it run twice, and saying `committed` of a guest that the destination
    /// never took loses it.
    #[schema(title = "ResolveByWord")]
    Word {
        /// What has become of the guest.
        outcome: OutcomeBody,
        /// How the administrator knows. Kept in the migration's record.
        #[schema(min_length = 1, max_length = 1000, example = "host b was taken apart, ticket 4711")]
        reason: String,
        /// The guest's name, to confirm which guest is meant and that the danger is understood.
        #[schema(example = "g1")]
        confirm: String,
    },
}

/// What is to end a doubt, decoded.
#[derive(Clone, Debug)]
pub enum Resolve {
    /// The destination's token.
    Token(lib::HandOverToken),
    /// An administrator's word, and the name of the guest that it is about.
    Word(lib::Resolution, String),
}

impl Decode for OutcomeBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("committed", Self::Committed), ("never_committed", Self::NeverCommitted)])
    }
}

impl Decode for Resolve {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        match f.kind(&["token", "word"])? {
            "token" => {
                let session = f.required("migration");
                let outcome: Option<OutcomeBody> = f.required("outcome");
                let token: Option<Base64> = f.required("token");
                f.done()?;
                let (session, outcome) = (session?, outcome?.into());
                Some(Self::Token(lib::HandOverToken { session, outcome, token: token?.0 }))
            }
            _ => {
                let outcome: Option<OutcomeBody> = f.required("outcome");
                let reason: Option<String> = f.required("reason");
                let confirm = f.required("confirm");
                f.done()?;
                let (outcome, reason, at) = (outcome?.into(), reason?, Timestamp::now());
                if !lib::is_reason(&reason) {
                    let detail = format!("1 to {} characters, no control characters", lib::REASON_MAX);
                    errors.add("/reason", "invalid_format", detail);
                    return None;
                }
                Some(Self::Word(lib::Resolution { outcome, reason, at }, confirm?))
            }
        }
    }
}

/// What an administrator said had become of a migration.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MigrationResolution {
    /// What is assumed to have become of the guest.
    pub outcome: OutcomeBody,
    /// How the administrator knows.
    pub reason: String,
    /// When the administrator said so.
    #[serde(serialize_with = "super::time::to_ms")]
    pub at: Timestamp,
}

impl From<lib::Resolution> for MigrationResolution {
    fn from(r: lib::Resolution) -> Self {
        Self { outcome: r.outcome.into(), reason: r.reason, at: r.at }
    }
}

impl From<lib::HandOverToken> for HandOverToken {
    fn from(t: lib::HandOverToken) -> Self {
        Self {
            kind: "token",
            migration: t.session,
            outcome: t.outcome.into(),
            token: STANDARD.encode(t.token),
        }
    }
}

impl From<lib::HandOverOutcome> for OutcomeBody {
    fn from(outcome: lib::HandOverOutcome) -> Self {
        match outcome {
            lib::HandOverOutcome::Committed => Self::Committed,
            lib::HandOverOutcome::NeverCommitted => Self::NeverCommitted,
        }
    }
}

impl From<OutcomeBody> for lib::HandOverOutcome {
    fn from(outcome: OutcomeBody) -> Self {
        match outcome {
            OutcomeBody::Committed => Self::Committed,
            OutcomeBody::NeverCommitted => Self::NeverCommitted,
        }
    }
}
