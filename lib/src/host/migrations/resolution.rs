//! Ending a doubt that two hosts cannot end between themselves: by the destination's token, carried by hand,
//! or by an administrator's word.
//!
//! Owns: who may be asked what, and what a refusal says. Must not know: tokens' content; the source's helper
//! opens them.

use tokio::sync::oneshot;
use uuid::Uuid;

use crate::host::migrations::journal;
use crate::host::{
    Answer, Ask, FieldError, HandOverToken, Host, HostError, MigrationDirection, MigrationRecord,
    MigrationState, ResourceKind,
};

/// Longest reason that an administrator gives, characters.
pub const REASON_MAX: usize = 1000;

pub(in crate::host) fn token_refused() -> HostError {
    let detail = "the migration's helper does not take it: it is of another session, or says something else";
    HostError::Invalid(vec![FieldError::new("/token", "token_refused", detail)])
}

pub(in crate::host) fn nobody_checks() -> HostError {
    let detail = "the helper that could check it went with the daemon that sent START; the destination can be asked over the \
                  network, or an administrator can decide by POST /v1/migrations/{migration}/resolution";
    HostError::Invalid(vec![FieldError::new("/token", "not_checkable", detail)])
}

impl Host {
    /// The token that this host's helper minted for an journal migration: COMMIT or ABORT.
    ///
    /// # Errors
    /// There is none: no such session, or it has not come to its end.
    pub fn hand_over_token(&self, session: Uuid) -> Result<HandOverToken, HostError> {
        journal::token_of(&self.inner, session)
    }

    /// Ends an outgoing migration's doubt. An
    /// administrator's word is stored when this returns; what it leads to is in the record.
    ///
    /// # Errors
    /// No such migration, not in doubt, [`HostError::GenerationMismatch`], a token that the helper does not
    /// take, storage.
    pub async fn resolve_migration(
        &self,
        id: Uuid,
        answer: Answer,
        ask: &Ask,
    ) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        check(&answer, id)?;
        let in_doubt = |now: &MigrationRecord| {
            ask.check(ResourceKind::Migration, now.generation)?;
            if now.direction == MigrationDirection::Outgoing && now.state == MigrationState::InDoubt {
                return Ok(());
            }
            let current = now.state.name();
            Err(HostError::WrongState {
                kind: ResourceKind::Migration.into(),
                current,
                allowed: &["in_doubt"],
            })
        };
        in_doubt(&entry.record())?;
        match answer {
            Answer::Token(_) | Answer::Word(_) if ask.dry_run => {}
            Answer::Token(token) => {
                let ended = || in_doubt(&entry.record()).err().unwrap_or(HostError::ShuttingDown);
                let (reply, answered) = oneshot::channel();
                // Whoever settles it takes one token after the other, and none when it is settled.
                let settling = entry.tokens().ok_or_else(ended)?;
                settling.send((token, reply)).await.map_err(|_| ended())?;
                answered.await.map_err(|_| ended())??;
            }
            Answer::Word(word) => {
                let store = |now: &MigrationRecord| {
                    in_doubt(now)?;
                    if let Some(said) = &now.resolution {
                        let detail = format!("it is settled already: {}", said.outcome.name());
                        return Err(HostError::Invalid(vec![FieldError::new("/outcome", "settled", detail)]));
                    }
                    let resolution = Some(word.clone());
                    let generation = now.generation + 1;
                    self.inner.store_migration(&MigrationRecord { resolution, generation, ..now.clone() })
                };
                // Found by whoever settles it, also after a restart.
                entry.write(store, |r| r.resolution = Some(word.clone()))?;
                self.inner.migration_changed(id);
            }
        }
        Ok(entry.record())
    }
}

fn check(answer: &Answer, id: Uuid) -> Result<(), HostError> {
    let error = match answer {
        Answer::Token(token) if token.session != id => {
            FieldError::new("/migration", "wrong_id", format!("the token is of migration {}", token.session))
        }
        Answer::Word(word) if !is_reason(&word.reason) => FieldError::new(
            "/reason",
            "invalid_format",
            format!("a reason is 1 to {REASON_MAX} characters, none of them a control character"),
        ),
        Answer::Token(_) | Answer::Word(_) => return Ok(()),
    };
    Err(HostError::Invalid(vec![error]))
}

/// Whether this says how an administrator knows: something, in one line.
pub fn is_reason(text: &str) -> bool {
    !text.trim().is_empty() && text.chars().count() <= REASON_MAX && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_says_something_in_one_line_and_is_bounded() {
        assert!(is_reason("its disk was destroyed, ticket 4711"));
        assert!(is_reason(&"\u{e4}".repeat(REASON_MAX)));
        for bad in ["", "  ", "two\nlines", "\u{1b}[31m", &"x".repeat(REASON_MAX + 1)] {
            assert!(!is_reason(bad), "{bad:?}");
        }
    }
}
