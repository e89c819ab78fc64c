//! The ledger as its users see it: what is numbered, kept, owed and refused.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::store::hours::tests::Set;
use crate::store::tests::as_it_is;
use crate::store::{Kind, Store, Trouble};

fn open(dir: &Path, kept: u64) -> (Store, Ledger) {
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    let path = dir.join("host.db");
    let store = Store::open(&path, as_it_is).unwrap();
    {
        let ledger = Ledger::open(&store, kept).unwrap();
        (store, ledger)
    }
}

fn seqs(look: &Look) -> Vec<u64> {
    look.entries.iter().map(|e| e.seq).collect()
}

#[tokio::test]
async fn numbers_go_on_after_reopening_and_old_entries_go() {
    let dir = tempfile::tempdir().unwrap();
    let epoch = {
        let (_store, ledger) = open(dir.path(), 10);
        for n in 1..=7 {
            ledger.append(Log::Event, format!("{n}"));
        }
        ledger.append_durably(Log::Event, "8".into()).await.unwrap();
        assert_eq!(*ledger.watch(Log::Event).borrow(), 8);
        assert_eq!(ledger.bounds(Log::Event).unwrap(), Bounds { oldest: 1, latest: 8 });
        let look = ledger.look(Log::Event, 3, 2, |e| e.body != "5").unwrap();
        assert_eq!((seqs(&look), look.seen, look.more), (vec![4, 6], 6, true));
        let rest = ledger.look(Log::Event, look.seen, 9, |_| true).unwrap();
        assert_eq!((seqs(&rest), rest.more), (vec![7, 8], false));
        ledger.epoch().to_owned()
    };
    let (_store, ledger) = open(dir.path(), 10);
    assert_eq!(ledger.epoch(), epoch);
    for n in 9..=30 {
        ledger.append_durably(Log::Event, format!("{n}")).await.unwrap();
    }
    assert_eq!(ledger.bounds(Log::Event).unwrap(), Bounds { oldest: 21, latest: 30 });
    for (after, fits) in [(19, false), (20, true), (30, true), (31, false)] {
        let look = ledger.look(Log::Event, after, 100, |_| true);
        assert_eq!(look.is_ok(), fits, "{after}: {look:?}");
    }
    assert_eq!(ledger.bounds(Log::Audit).unwrap(), Bounds { oldest: 1, latest: 0 });
    let back = ledger.look_back(Log::Event, Some(29), 3, |_| true).unwrap();
    assert_eq!((seqs(&back), back.more), (vec![28, 27, 26], true));
}

#[tokio::test]
async fn one_of_many_claims_and_one_of_many_takes() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, ledger) = open(dir.path(), 10);
    let ledger = Arc::new(ledger);
    let claims = (0..16).map(|n| {
        let ledger = Arc::clone(&ledger);
        tokio::spawn(async move { ledger.claim(Space::Idempotency, "k".into(), None, format!("{n}")).await })
    });
    let mut winners = 0;
    for claim in claims.collect::<Vec<_>>() {
        winners += usize::from(claim.await.unwrap().unwrap().is_none());
    }
    assert_eq!(winners, 1);
    assert_eq!(ledger.find(Space::Token, "k").unwrap(), None, "spaces are apart");
    assert!(ledger.take(Space::Idempotency, "k".into()).await.unwrap().is_some());
    assert!(ledger.take(Space::Idempotency, "k".into()).await.unwrap().is_none());
}

#[tokio::test]
async fn what_goes_with_a_record_is_written_when_that_was_there_and_not_again() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, ledger) = open(dir.path(), 10);
    ledger.put(Space::Token, "t".into(), None, "x".into()).await.unwrap();
    for (body, there) in [("1", Some("x")), ("2", None)] {
        let mut batch = Batch::new();
        batch.keyed_put(Space::Ticket, "told".into(), None, body.into()).unwrap();
        let taken = ledger.take_with(Space::Token, "t".into(), batch).await.unwrap();
        assert_eq!(taken.as_deref(), there);
        assert_eq!(ledger.find(Space::Ticket, "told").unwrap().unwrap().body, "1");
    }
    assert_eq!(ledger.find(Space::Token, "t").unwrap(), None);
}

#[tokio::test]
async fn what_has_expired_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, ledger) = open(dir.path(), 10);
    let hour = Duration::from_secs(3600);
    ledger.put(Space::Ticket, "old".into(), Some(Duration::ZERO), "x".into()).await.unwrap();
    ledger.put(Space::Ticket, "new".into(), Some(hour), "y".into()).await.unwrap();
    assert_eq!(ledger.find(Space::Ticket, "old").unwrap(), None);
    let all = ledger.all(Space::Ticket).unwrap();
    let [(key, Kept { body, left: Some(left) })] = &all[..] else { panic!("{all:?}") };
    assert!(key == "new" && body == "y" && !left.is_zero() && *left <= hour, "{all:?}");
    assert_eq!(ledger.take(Space::Ticket, "old".into()).await.unwrap(), None);
    assert_eq!(ledger.claim(Space::Ticket, "old".into(), None, "z".into()).await.unwrap(), None);
    let endless = Kept { body: "z".into(), left: None };
    assert_eq!(ledger.find(Space::Ticket, "old").unwrap(), Some(endless));
}

#[tokio::test]
async fn a_key_is_not_forgotten_early_nor_a_token_good_for_longer_whatever_the_wall_clock_says() {
    const HOUR: i64 = 3_600_000;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let set = Set::new();
    let day = Duration::from_secs(24 * 3600);
    let start = || {
        let store = Store::open(&dir.path().join("host.db"), as_it_is).unwrap();
        let ledger = Ledger::open_by(Box::new(set.clone()), &store, 10).unwrap();
        (store, ledger)
    };
    let (mut store, mut ledger) = start();
    for space in [Space::Idempotency, Space::Token] {
        ledger.put(space, "k".into(), Some(day), "x".into()).await.unwrap();
    }
    let there =
        |ledger: &Ledger| [Space::Idempotency, Space::Token].map(|s| ledger.find(s, "k").unwrap().is_some());
    for step in [20 * 365 * 24 * HOUR, -40 * 365 * 24 * HOUR, HOUR] {
        set.change(|h| h.wall += step);
        assert_eq!(there(&ledger), [true, true], "{step}");
        drop((ledger, store));
        (store, ledger) = start();
        assert_eq!(there(&ledger), [true, true], "{step}, started again");
        // What is claimed is not claimed again, and what has not expired is not tidied away.
        let again = ledger.claim(Space::Idempotency, "k".into(), Some(day), "y".into()).await.unwrap();
        assert_eq!(again.as_deref(), Some("x"));
    }
    set.pass(23 * HOUR);
    drop((ledger, store));
    // Off for two days, and so its clock says: what was promised is kept, what opens something opens it
    // no longer.
    set.reboot("two", 48 * HOUR);
    (store, ledger) = start();
    assert_eq!(there(&ledger), [true, false]);
    set.pass(2 * HOUR);
    assert_eq!(there(&ledger), [true, false], "the hour before was not noted, and may not have been");
    set.pass(23 * HOUR);
    assert_eq!(there(&ledger), [false, false], "nothing is kept for ever");
    assert_eq!(ledger.claim(Space::Idempotency, "k".into(), None, "z".into()).await.unwrap(), None);
    drop((ledger, store));
}

/// Lets the database have no page more, or as many as it likes.
async fn bound(ledger: &Ledger, pages: Option<u64>) {
    let set = move |t: &Rows<'_>| {
        let now: i64 = t.pragma_query_value(None, "page_count", |r| r.get(0)).map_err(StoreError::from)?;
        let most = pages.map_or(1 << 30, |more| now + more as i64);
        t.query_row(&format!("PRAGMA max_page_count = {most}"), [], |_| Ok(())).map_err(StoreError::from)
    };
    ledger.run(set).await.unwrap();
}

fn document(name: &str, bytes: usize) -> (Uuid, Batch) {
    let (id, mut batch) = (Uuid::now_v7(), Batch::new());
    batch.put(Kind::Guest, id, Some(name), &"x".repeat(bytes)).unwrap();
    (id, batch)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_refused_does_not_touch_its_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let (store, ledger) = open(dir.path(), 1000);
    let ledger = Arc::new(ledger);
    let (id, batch) = document("taken", 10);
    ledger.commit(batch).await.unwrap();
    let all = (0..64u32).map(|n| {
        let ledger = Arc::clone(&ledger);
        tokio::spawn(async move {
            let (id, mut batch) = document(if n % 2 == 0 { "taken" } else { "free" }, 10);
            let mut other = Batch::new();
            // The entry comes first: it must go with the document that is refused.
            other.append(Log::Event, format!("{n}"));
            let (name, _) = (format!("g{n}"), batch.is_empty());
            if n % 2 != 0 {
                batch = Batch::new();
                batch.put(Kind::Guest, id, Some(&name), &u64::from(n)).unwrap();
            }
            other.join(batch);
            (n, id, ledger.commit(other).await)
        })
    });
    let mut made = 0;
    for done in all.collect::<Vec<_>>() {
        let (n, id, result) = done.await.unwrap();
        let there = store.get::<serde_json::Value>(Kind::Guest, id).unwrap().is_some();
        assert_eq!(result.is_ok(), n % 2 != 0, "{n}: {result:?}");
        assert_eq!(there, n % 2 != 0, "{n}");
        assert!(result.is_ok() || matches!(result, Err(StoreError::NameTaken { .. })));
        made += u64::from(there);
    }
    let look = ledger.look(Log::Event, 0, 1000, |_| true).unwrap();
    assert_eq!(seqs(&look), (1..=made).collect::<Vec<_>>());
    assert!(look.entries.iter().all(|e| e.body.parse::<u32>().unwrap() % 2 != 0));
    assert!(store.get::<serde_json::Value>(Kind::Guest, id).unwrap().is_some());
    assert_eq!(ledger.writing().failing, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_happened_is_owed_and_written_first_as_soon_as_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let (store, ledger) = open(dir.path(), 1000);
    ledger.append_durably(Log::Event, "before".into()).await.unwrap();
    bound(&ledger, Some(2)).await;
    let (refused, batch) = document("refused", 100_000);
    let error = ledger.commit_and(batch, || panic!("it is not on disk")).await.unwrap_err();
    assert_eq!(error.trouble(), Some(Trouble::Full), "{error:?}");
    assert_eq!(ledger.writing().failing.map(|f| f.0), Some(Trouble::Full));
    bound(&ledger, None).await;
    assert_eq!(ledger.writing().failing, None);
    // From here on somebody keeps the database locked.
    let raw = Connection::open(dir.path().join("host.db")).unwrap();
    raw.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (owed, mut batch) = document("owed", 100_000);
    batch.append(Log::Event, "owed".into());
    let shown = Arc::new(AtomicU64::new(0));
    let theirs = Arc::clone(&shown);
    let then = move || theirs.store(1, std::sync::atomic::Ordering::SeqCst);
    let error = tokio::task::block_in_place(|| ledger.owe_blocking(batch, then)).unwrap_err();
    assert_eq!(error.trouble(), Some(Trouble::Busy), "{error:?}");
    assert_eq!(shown.load(std::sync::atomic::Ordering::SeqCst), 1, "it has happened");
    let writing = ledger.writing();
    assert_eq!((writing.failing.map(|f| f.0), writing.owed), (Some(Trouble::Busy), 1));
    // A later word on the same document takes the place of the earlier one.
    let mut later = Batch::new();
    later.put(Kind::Guest, owed, Some("owed"), &"y".repeat(100_000)).unwrap();
    ledger.owe(later).await.unwrap_err();
    assert_eq!(*ledger.watch(Log::Event).borrow(), 1);
    assert_eq!(store.get::<String>(Kind::Guest, owed).unwrap(), None);
    // The lock goes while nobody writes.
    raw.execute_batch("ROLLBACK").unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while ledger.writing() != (Writing { failing: None, owed: 0, lost_events: 0 }) {
        assert!(std::time::Instant::now() < deadline, "{:?}", ledger.writing());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(store.get::<String>(Kind::Guest, owed).unwrap(), Some("y".repeat(100_000)));
    assert_eq!(store.get::<String>(Kind::Guest, refused).unwrap(), None);
    ledger.append_durably(Log::Event, "after".into()).await.unwrap();
    let look = ledger.look(Log::Event, 0, 10, |_| true).unwrap();
    let bodies: Vec<&str> = look.entries.iter().map(|e| e.body.as_str()).collect();
    assert_eq!((seqs(&look), bodies), (vec![1, 2, 3], vec!["before", "owed", "after"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_does_not_end_is_trouble_and_is_none_when_it_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, ledger) = open(dir.path(), 10);
    let ledger = Arc::new(ledger);
    let (go_on, goes_on) = sync_channel::<()>(0);
    let stuck = {
        let ledger = Arc::clone(&ledger);
        tokio::spawn(async move { ledger.commit_and(document("g", 10).1, move || _ = goes_on.recv()).await })
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while ledger.writing().failing.map(|f| f.0) != Some(Trouble::Failed) {
        assert!(std::time::Instant::now() < deadline, "{:?}", ledger.writing());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    drop(go_on);
    stuck.await.unwrap().unwrap();
    ledger.commit(document("h", 10).1).await.unwrap();
    assert_eq!(ledger.writing().failing, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_is_gone_is_trouble_and_no_silence() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, ledger) = open(dir.path(), 10);
    let lost = ledger.commit_and(document("g", 10).1, || panic!("a fault of ours, for this test")).await;
    assert!(lost.is_err(), "nobody can say whether it is on disk");
    let refused = ledger.commit(document("h", 10).1).await.unwrap_err();
    assert_eq!(refused.trouble(), Some(Trouble::Failed));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while ledger.writing().failing.map(|f| f.0) != Some(Trouble::Failed) {
        assert!(std::time::Instant::now() < deadline, "{:?}", ledger.writing());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn files_of_earlier_schemas_get_what_they_lack_and_keep_what_they_have() {
    const OLD: &str = "
        CREATE TABLE document (kind TEXT NOT NULL, id BLOB NOT NULL, name TEXT, body TEXT NOT NULL,
            PRIMARY KEY (kind, id)) STRICT, WITHOUT ROWID;
        CREATE UNIQUE INDEX document_name ON document (kind, name) WHERE name IS NOT NULL;
        CREATE TABLE meta (key TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT, WITHOUT ROWID;
        PRAGMA application_id = 1836217965;";
    const LEDGER: &str = "
        CREATE TABLE event (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL) STRICT;
        CREATE TABLE audit (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL) STRICT;
        CREATE TABLE keyed (space TEXT NOT NULL, key TEXT NOT NULL, expires INTEGER, body TEXT NOT NULL,
            PRIMARY KEY (space, key)) STRICT, WITHOUT ROWID;
        CREATE INDEX keyed_expires ON keyed (expires) WHERE expires IS NOT NULL;
        INSERT INTO event VALUES (7, 8, 'seventh');
        INSERT INTO keyed VALUES ('token', 'k', NULL, 'v');";
    const OUTCOMES: &str = "CREATE TABLE audit_outcome (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL) STRICT;";
    let id = Uuid::now_v7();
    for version in 1..=3 {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let path = dir.path().join("host.db");
        let raw = Connection::open(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        raw.execute_batch(OLD).unwrap();
        raw.execute("INSERT INTO document VALUES ('guest', ?1, 'g', '5')", [id.as_bytes()]).unwrap();
        if version >= 2 {
            raw.execute_batch(LEDGER).unwrap();
        }
        if version >= 3 {
            raw.execute_batch(OUTCOMES).unwrap();
        }
        raw.pragma_update(None, "user_version", version).unwrap();
        drop(raw);
        for _ in 0..2 {
            let (store, ledger) = open(dir.path(), 10);
            assert_eq!(store.get::<u8>(Kind::Guest, id).unwrap(), Some(5));
            assert_eq!(store.get_by_name::<u8>(Kind::Guest, "g").unwrap(), Some((id, 5)));
            assert_eq!(ledger.epoch().len(), 16);
            if version >= 2 {
                assert_eq!(ledger.look(Log::Event, 6, 9, |_| true).unwrap().entries[0].body, "seventh");
                assert_eq!(ledger.find(Space::Token, "k").unwrap().map(|k| k.body).as_deref(), Some("v"));
            }
            ledger.append_durably(Log::Audit, "x".into()).await.unwrap();
        }
        std::fs::remove_file(dir.path().join("host.mark")).unwrap();
        assert!(Store::open(&path, as_it_is).unwrap_err().to_string().contains("host.mark is missing"));
    }
}

#[tokio::test]
async fn without_anything_to_write_the_log_is_moved_into_the_database() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, ledger) = open(dir.path(), 10);
    let log = dir.path().join("host.db-wal");
    for n in 0..2 {
        ledger.append_durably(Log::Event, format!("{n}")).await.unwrap();
        assert!(std::fs::metadata(&log).unwrap().len() > 0);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while std::fs::metadata(&log).unwrap().len() > 0 {
            assert!(std::time::Instant::now() < deadline, "the log stays");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
    assert_eq!(ledger.bounds(Log::Event).unwrap().latest, 2);
}
