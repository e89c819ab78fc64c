//! What every change has in common: its conditions, whether it is only looked at, the id it uses.

use axum::extract::{FromRequestParts, MatchedPath};
use axum::http::Method;
use axum::http::request::Parts;
use mirrorvm::host::{Ask, Expected};
use uuid::Uuid;

use super::idempotency::ChosenId;
use super::precondition::{IfMatch, IfNoneMatch};
use super::query::{DRY_RUN, Query};
use crate::access::caller::Caller;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

/// The conditions under which a change is asked for.
#[derive(Clone, Debug)]
pub struct Change {
    /// The generation that the resource must be at.
    pub expected: Expected,
    /// Whether `If-Match` was given.
    pub conditional: bool,
    /// Whether the resource must not exist yet (`If-None-Match: *`).
    pub only_new: bool,
    /// Whether the request is a dry run.
    pub dry_run: bool,
    /// The id that a creation must use, for a request with an idempotency key.
    pub chosen: Option<ChosenId>,
    /// The principal that asks.
    pub principal: String,
}

impl Change {
    /// The id that a creation must use.
    pub fn id(&self) -> Option<Uuid> {
        self.chosen.map(|c| c.id)
    }

    /// The same as the host takes it.
    pub fn ask(&self) -> Ask {
        Ask { id: self.id(), expected: self.expected.clone(), dry_run: self.dry_run }
    }

    /// Whether an earlier daemon may have carried out the request already, under [`Change::id`].
    pub fn again(&self) -> bool {
        self.chosen.is_some_and(|c| c.again)
    }
}

impl FromRequestParts<AppState> for Change {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Problem> {
        let condition = IfMatch::read(&parts.headers)?;
        let Ok(query) = Query::from_request_parts(parts, state).await;
        let mut parameters = query.read()?;
        let dry_run = parameters.flag(DRY_RUN);
        parameters.done()?;
        let only_new = parts.method == Method::PUT && IfNoneMatch::read(&parts.headers)?.is_any();
        if !only_new {
            let route = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
            need_condition(state, &parts.method, route, &condition)?;
        }
        Ok(Self {
            expected: condition.expected(),
            conditional: !condition.is_absent(),
            only_new,
            dry_run,
            chosen: parts.extensions.get::<ChosenId>().copied(),
            principal: parts.extensions.get::<Caller>().map_or_else(String::new, |c| c.principal.clone()),
        })
    }
}

/// With `require_if_match`, existing resources can be changed only by those who say which version they have
/// seen.
fn need_condition(
    state: &AppState,
    method: &Method,
    route: &str,
    condition: &IfMatch,
) -> Result<(), Problem> {
    // Creations have a collection's path: two segments.
    let of_collection = *method == Method::POST && route.matches('/').count() == 2;
    if !state.config().require_if_match || of_collection || !condition.is_absent() {
        return Ok(());
    }
    Err(Problem::new(ProblemCode::PreconditionRequired, "this daemon takes changes with If-Match alone"))
}
