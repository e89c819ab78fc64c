//! Sessions of people's browsers, and the links that open them.
//!
//! Owns: which links and sessions there are, how long each is good, that a link opens one session and no
//! more. Must not know: requests, cookies.
//!
//! All of it is in memory alone, and of each secret a hash: sessions end with the daemon. That is on purpose.
//! Whoever may ask for a link has another within a second, and a session that outlived the daemon would be
//! one more thing on disk that opens it. Time is monotonic: setting the clock neither prolongs a link nor
//! ends a session.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::Role;
use super::caller::{Caller, Method};
use super::lease::Lease;
use super::secrets;
use super::tokens::{NewToken, Origin, TokenRecord};
use crate::problem::{Problem, ProblemCode};
use mirrorvm::sync::Locked;

/// What the text of a session's secret begins with.
pub const PREFIX: &str = "mvs_";
/// What the text of a link's code begins with.
const CODE_PREFIX: &str = "mvo_";
/// How long a link can be followed.
pub const LINK_LIFE: Duration = Duration::from_secs(60);
/// How long a session stays good without being used.
pub const IDLE: Duration = Duration::from_secs(60 * 60);
/// How long a session stays good at most.
pub const LIFE: Duration = Duration::from_secs(12 * 60 * 60);
/// How many unused links one principal may have.
pub const LINKS_EACH: usize = 8;
/// How many sessions one principal may have. A further one takes the place of the one that was unused for
/// longest.
pub const SESSIONS_EACH: usize = 32;

/// A link that has not been used yet. Its record is that of the session that it will open, except for the
/// secret.
#[derive(Debug)]
struct Link {
    record: TokenRecord,
    until: Instant,
}

#[derive(Debug)]
struct Session {
    record: TokenRecord,
    /// The end that no use postpones.
    end: Instant,
    used: Instant,
}

impl Session {
    fn until(&self) -> Instant {
        self.end.min(self.used + IDLE)
    }
}

/// The principal has as many unused links as are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TooManyLinks;

/// Links and sessions, as of the moments that callers pass in. Pure: it reads no clock.
#[derive(Debug, Default)]
struct Book {
    links: HashMap<Uuid, Link>,
    sessions: HashMap<Uuid, Session>,
}

impl Book {
    fn forget(&mut self, now: Instant) {
        self.links.retain(|_, l| l.until > now);
        self.sessions.retain(|_, s| s.until() > now);
    }

    /// Takes a link in.
    fn offer(&mut self, now: Instant, record: TokenRecord) -> Result<(), TooManyLinks> {
        self.forget(now);
        if self.links.values().filter(|l| l.record.created_by == record.created_by).count() >= LINKS_EACH {
            return Err(TooManyLinks);
        }
        self.links.insert(record.id, Link { record, until: now + LINK_LIFE });
        Ok(())
    }

    /// Uses a link up, if it is there and this is its secret. Whoever comes second finds none.
    fn claim(&mut self, now: Instant, id: Uuid, secret: &str) -> Option<TokenRecord> {
        self.forget(now);
        // A wrong secret leaves it: its id is no secret, and nobody may use up another's link with it.
        self.links.get(&id).filter(|l| l.record.opens_with(secret))?;
        self.links.remove(&id).map(|l| l.record)
    }

    /// Begins a session, and says which one had to make room.
    fn begin(&mut self, now: Instant, record: TokenRecord) -> Option<Uuid> {
        self.forget(now);
        let of_the_same = || self.sessions.iter().filter(|(_, s)| s.record.created_by == record.created_by);
        let full = of_the_same().count() >= SESSIONS_EACH;
        let oldest = of_the_same().min_by_key(|(_, s)| s.used).map(|(id, _)| *id).filter(|_| full);
        if let Some(oldest) = oldest {
            self.sessions.remove(&oldest);
        }
        self.sessions.insert(record.id, Session { record, end: now + LIFE, used: now });
        oldest
    }

    /// The session with this secret, which is used now.
    fn use_now(&mut self, now: Instant, id: Uuid, secret: &str) -> Option<(&TokenRecord, Instant)> {
        self.forget(now);
        let session = self.sessions.get_mut(&id).filter(|s| s.record.opens_with(secret))?;
        session.used = now;
        Some((&session.record, session.until()))
    }

    fn good_until(&self, now: Instant, id: Uuid) -> Option<Instant> {
        self.sessions.get(&id).map(Session::until).filter(|until| *until > now)
    }

    /// Ends a session, or a link before it was used.
    fn withdraw(&mut self, now: Instant, id: Uuid) -> Option<TokenRecord> {
        self.forget(now);
        let session = self.sessions.remove(&id).map(|s| s.record);
        session.or_else(|| self.links.remove(&id).map(|l| l.record))
    }

    /// Sessions, with the time that they end unless they are used before.
    fn list(&self, now: Instant, clock: Timestamp) -> Vec<TokenRecord> {
        let shown = |s: &Session| {
            let left = s.until().checked_duration_since(now).filter(|left| !left.is_zero())?;
            let expires_at = clock.saturating_add(left).unwrap_or(Timestamp::MAX);
            let mut record = s.record.clone();
            record.expires_at = expires_at;
            Some(record)
        };
        self.sessions.values().filter_map(shown).collect()
    }
}

/// The daemon's links and sessions.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<Book>);

/// A session that has just begun.
#[derive(Debug)]
pub struct Opened {
    /// The caller that the session stands for.
    pub caller: Caller,
    /// The value of the cookie that the browser gets.
    pub cookie: Zeroizing<String>,
    /// Whether another session had to make room for it.
    pub displaced: bool,
}

impl Sessions {
    /// Makes a link: its code opens one session of this principal and role, once, within [`LINK_LIFE`].
    ///
    /// # Errors
    /// `too_many_requests`; `internal` when the system gives no random numbers.
    pub fn offer(&self, id: Uuid, principal: &str, role: Role) -> Result<Zeroizing<String>, Problem> {
        let (record, secret) = TokenRecord::make(session(id, principal, role, LINK_LIFE), Origin::Session)?;
        self.lock().offer(Instant::now(), record).map_err(|TooManyLinks| {
            let detail = format!("{LINKS_EACH} links of {principal} have not been used yet");
            Problem::new(ProblemCode::TooManyRequests, detail)
        })?;
        Ok(secrets::text(CODE_PREFIX, id, &secret))
    }

    /// Opens the session that a link is for.
    ///
    /// # Errors
    /// `link_refused`; `internal` when the system gives no random numbers.
    pub fn open(&self, code: &str) -> Result<Opened, Problem> {
        let claimed = secrets::split(CODE_PREFIX, code)
            .and_then(|(id, secret)| self.lock().claim(Instant::now(), id, secret));
        let link = claimed.ok_or_else(|| {
            let detail = "no link has this code: it was used, is older than 60 seconds, was withdrawn or is none of this \
                          run of the daemon";
            Problem::new(ProblemCode::LinkRefused, detail)
        })?;
        let (record, secret) =
            TokenRecord::make(session(link.id, &link.created_by, link.role, LIFE), Origin::Session)?;
        let cookie = record.text(&secret);
        let now = Instant::now();
        let caller = caller(&record, now + IDLE.min(LIFE));
        let displaced = self.lock().begin(now, record).is_some();
        Ok(Opened { caller, cookie, displaced })
    }

    /// The caller whose session has this secret.
    pub fn recognize(&self, text: &str) -> Option<Caller> {
        let (id, secret) = secrets::split(PREFIX, text)?;
        self.lock().use_now(Instant::now(), id, secret).map(|(record, until)| caller(record, until))
    }

    /// Until when a session is good, unless it is used before.
    pub fn good_until(&self, id: Uuid) -> Option<Instant> {
        self.lock().good_until(Instant::now(), id)
    }

    /// Sessions that are good.
    pub fn list(&self) -> Vec<TokenRecord> {
        self.lock().list(Instant::now(), Timestamp::now())
    }

    /// Ends a session, or a link that was not used yet. The caller announces it to whoever reads by it.
    pub fn withdraw(&self, id: Uuid) -> Option<TokenRecord> {
        self.lock().withdraw(Instant::now(), id)
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.locked()
    }
}

fn session(id: Uuid, principal: &str, role: Role, life: Duration) -> NewToken {
    NewToken {
        id,
        name: "browser".to_owned(),
        role,
        guest: None,
        life: Some(life),
        created_by: principal.to_owned(),
    }
}

/// A session is its opener's: what is done by it, that principal has done.
fn caller(record: &TokenRecord, until: Instant) -> Caller {
    Caller {
        principal: record.created_by.clone(),
        method: Method::Session,
        role: record.role,
        guest: record.guest,
        lease: Some(Lease { id: record.id, until }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn record(principal: &str) -> (TokenRecord, Zeroizing<String>) {
        let new = session(Uuid::now_v7(), principal, Role::Viewer, LIFE);
        TokenRecord::make(new, Origin::Session).unwrap()
    }

    #[test]
    fn a_link_opens_once_and_within_its_minute() {
        let (mut book, start) = (Book::default(), Instant::now());
        let (link, secret) = record("unix:1");
        let (_, wrong) = record("unix:1");
        book.offer(start, link.clone()).unwrap();
        let late = start + LINK_LIFE - SECOND;
        assert!(
            book.claim(late, link.id, &wrong).is_none() && book.claim(late, Uuid::nil(), &secret).is_none()
        );
        let claimed = book.claim(late, link.id, &secret).unwrap();
        assert_eq!(
            (claimed.id, claimed.role, claimed.created_by.as_str()),
            (link.id, Role::Viewer, "unix:1")
        );
        assert!(book.claim(late, link.id, &secret).is_none(), "once");

        book.offer(start, link.clone()).unwrap();
        assert!(book.claim(start + LINK_LIFE, link.id, &secret).is_none(), "its minute is over");
        book.offer(start, link.clone()).unwrap();
        assert_eq!(book.withdraw(start, link.id).map(|r| r.id), Some(link.id));
        assert!(book.claim(start, link.id, &secret).is_none(), "withdrawn");
    }

    #[test]
    fn of_many_who_claim_a_link_at_once_one_has_it() {
        let sessions = Sessions::default();
        let code = sessions.offer(Uuid::now_v7(), "unix:1", Role::Admin).unwrap();
        let opened = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..16).map(|_| scope.spawn(|| sessions.open(&code).is_ok())).collect();
            tries.into_iter().map(|t| t.join().unwrap()).filter(|opened| *opened).count()
        });
        assert_eq!((opened, sessions.list().len()), (1, 1));
    }

    #[test]
    fn unused_links_are_bounded_for_each_principal() {
        let (mut book, start) = (Book::default(), Instant::now());
        for _ in 0..LINKS_EACH {
            book.offer(start, record("unix:1").0).unwrap();
        }
        assert_eq!(book.offer(start, record("unix:1").0), Err(TooManyLinks));
        book.offer(start, record("unix:2").0).unwrap();
        book.offer(start + LINK_LIFE, record("unix:1").0).unwrap();
        assert_eq!(book.links.len(), 1, "those that nobody used are forgotten");
    }

    #[test]
    fn a_session_ends_when_it_is_not_used_and_at_last_whatever_it_is() {
        let (mut book, start) = (Book::default(), Instant::now());
        let (one, secret) = record("unix:1");
        assert_eq!(book.begin(start, one.clone()), None);
        let (mut now, mut uses) = (start, 0);
        while book.use_now(now, one.id, &secret).is_some() {
            assert_eq!(book.good_until(now, one.id), Some((now + IDLE).min(start + LIFE)));
            now += IDLE - SECOND;
            uses += 1;
        }
        assert_eq!(uses, 13, "an hour less a second each, 12 hours in all");

        book.begin(start, one.clone());
        assert!(book.use_now(start, one.id, &record("unix:1").1).is_none(), "another's secret");
        let clock = Timestamp::now();
        let listed = book.list(start + SECOND, clock);
        assert_eq!(listed[0].expires_at, clock + IDLE - SECOND);
        let idle = start + IDLE;
        assert_eq!((book.list(idle, clock).len(), book.good_until(idle, one.id)), (0, None));
        assert!(book.use_now(idle, one.id, &secret).is_none());
        assert!(book.sessions.is_empty());
    }

    #[test]
    fn the_session_that_was_used_least_makes_room_for_a_new_one_of_the_same_principal() {
        let (mut book, start) = (Book::default(), Instant::now());
        let (other, theirs) = record("unix:2");
        book.begin(start, other.clone());
        let all: Vec<_> = (0..SESSIONS_EACH).map(|_| record("unix:1")).collect();
        for (record, _) in &all {
            assert_eq!(book.begin(start + SECOND, record.clone()), None);
        }
        for (record, secret) in all.iter().filter(|(r, _)| r.id != all[3].0.id) {
            assert!(book.use_now(start + 2 * SECOND, record.id, secret).is_some());
        }
        assert_eq!(book.begin(start + 3 * SECOND, record("unix:1").0), Some(all[3].0.id));
        assert!(book.use_now(start + 4 * SECOND, all[3].0.id, &all[3].1).is_none());
        assert!(book.use_now(start + 4 * SECOND, other.id, &theirs).is_some());
    }

    #[test]
    fn a_code_opens_nothing_as_a_cookie_nor_a_cookie_as_a_code() {
        let sessions = Sessions::default();
        let code = sessions.offer(Uuid::now_v7(), "unix:7", Role::Operator).unwrap();
        assert!(sessions.recognize(&code).is_none());
        let opened = sessions.open(&code).unwrap();
        assert!(sessions.open(&opened.cookie).is_err());
        let known = sessions.recognize(&opened.cookie).unwrap();
        assert_eq!(
            (known.principal.as_str(), known.role, known.method),
            ("unix:7", Role::Operator, Method::Session)
        );
        assert!(sessions.withdraw(known.lease.unwrap().id).is_some());
        assert!(sessions.recognize(&opened.cookie).is_none());
    }
}
