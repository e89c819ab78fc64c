//! Includes a child process killed with SIGKILL at random points.

mod forward;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use super::form::{form, leaves, unchanged};
use super::state_files::{Doubt, UNCONFIRMED, Unconfirmed};
use super::*;

#[derive(Debug, PartialEq)]
struct Doc {
    number: u64,
    text: String,
}

form! {
    DocForm of Doc, version 5 by unchanged {
        number: u64,
        text: String,
    }
}

/// What is no document of any build's, and is written as it is.
macro_rules! bare {
    ($($bare:ty),+) => {$(
        impl Document for $bare {
            const VERSION: u64 = form::UNSAID;
        }
    )+};
}

bare!(String, Uuid, u8, u64, serde_json::Value);
leaves!(serde_json::Value);

/// Every document is as it should be.
pub(super) fn as_it_is(_: &DocumentRef, _: &[u8]) -> Result<Option<String>, Unread> {
    Ok(None)
}

fn open(path: &Path) -> Result<Store, StoreError> {
    Store::open(path, as_it_is)
}

fn doc(number: u64) -> Doc {
    Doc { number, text: format!("text {number}") }
}

fn dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    dir
}

fn raw(path: &Path) -> Connection {
    Connection::open(path).unwrap()
}

#[test]
fn documents_are_there_after_reopening() {
    let dir = dir();
    let path = dir.path().join("state").join("host.db");
    let ids: Vec<Uuid> = (0..20).map(|_| Uuid::now_v7()).collect();
    {
        let store = open(&path).unwrap();
        for (number, id) in ids.iter().enumerate().rev() {
            store.insert(Kind::Guest, *id, Some(&format!("g{number}")), &doc(number as u64)).unwrap();
        }
        store.put(Kind::Guest, ids[3], Some("other"), &doc(300)).unwrap();
        store.meta_put("host", &doc(7)).unwrap();
        assert!(store.delete(Kind::Guest, ids[4]).unwrap());
        assert!(!store.delete(Kind::Guest, ids[4]).unwrap());
    }
    let store = open(&path).unwrap();
    let listed: Vec<(Uuid, Doc)> = store.list(Kind::Guest).unwrap();
    let expected: Vec<Uuid> = ids.iter().copied().filter(|id| *id != ids[4]).collect();
    assert_eq!(listed.iter().map(|(id, _)| *id).collect::<Vec<_>>(), expected);
    assert_eq!(store.get::<Doc>(Kind::Guest, ids[3]).unwrap(), Some(doc(300)));
    assert_eq!(store.get_by_name::<Doc>(Kind::Guest, "other").unwrap(), Some((ids[3], doc(300))));
    assert_eq!(store.get_by_name::<Doc>(Kind::Guest, "g3").unwrap(), None);
    assert_eq!(store.get::<Doc>(Kind::Migration, ids[3]).unwrap(), None);
    assert_eq!(store.meta_get::<Doc>("host").unwrap(), Some(doc(7)));
    assert_eq!(store.meta_get::<Doc>("absent").unwrap(), None);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
}

#[test]
fn names_are_unique_within_a_kind() {
    let dir = dir();
    let store = open(&dir.path().join("host.db")).unwrap();
    let (a, b) = (Uuid::now_v7(), Uuid::now_v7());
    store.insert(Kind::Guest, a, Some("web"), &doc(1)).unwrap();
    assert!(matches!(
        store.insert(Kind::Guest, b, Some("web"), &doc(2)),
        Err(StoreError::NameTaken { kind: Kind::Guest, id }) if id == b
    ));
    assert!(matches!(store.put(Kind::Guest, b, Some("web"), &doc(2)), Err(StoreError::NameTaken { .. })));
    assert!(matches!(
        store.insert(Kind::Guest, a, Some("new"), &doc(2)),
        Err(StoreError::Exists { kind: Kind::Guest, id }) if id == a
    ));
    store.insert(Kind::Peer, b, Some("web"), &doc(2)).unwrap();
    store.insert(Kind::Guest, b, None, &doc(2)).unwrap();
    store.put(Kind::Guest, a, Some("web"), &doc(3)).unwrap();
    store.delete(Kind::Guest, a).unwrap();
    store.put(Kind::Guest, b, Some("web"), &doc(4)).unwrap();
}

#[test]
fn a_transaction_is_all_or_nothing() {
    let dir = dir();
    let store = open(&dir.path().join("host.db")).unwrap();
    let (a, b) = (Uuid::now_v7(), Uuid::now_v7());
    let failed: Result<(), StoreError> = store.transaction(|tx| {
        tx.insert(Kind::Guest, a, None, &doc(1))?;
        tx.meta_put("m", &doc(1))?;
        tx.insert(Kind::Guest, a, None, &doc(2))
    });
    assert!(matches!(failed, Err(StoreError::Exists { .. })));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        store.transaction(|tx| -> Result<(), StoreError> {
            tx.insert(Kind::Guest, b, None, &doc(1))?;
            panic!("expected by the test")
        })
    }));
    assert!(panicked.is_err());
    assert!(store.list::<Doc>(Kind::Guest).unwrap().is_empty());
    assert_eq!(store.meta_get::<Doc>("m").unwrap(), None);
    let done: Result<u64, StoreError> = store.transaction(|tx| {
        tx.insert(Kind::Guest, a, None, &doc(1))?;
        tx.insert(Kind::Migration, b, None, &doc(2))?;
        Ok(tx.get::<Doc>(Kind::Guest, a)?.map_or(0, |doc| doc.number))
    });
    assert_eq!(done.unwrap(), 1);
}

#[test]
fn a_second_opener_is_refused() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let first = open(&path).unwrap();
    assert!(matches!(open(&path), Err(StoreError::InUse)));
    drop(first);
    open(&path).unwrap();
}

#[test]
fn an_unreadable_document_is_named() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let (good, bad) = (Uuid::now_v7(), Uuid::now_v7());
    let store = open(&path).unwrap();
    store.put(Kind::Migration, good, None, &doc(1)).unwrap();
    store.put(Kind::Migration, bad, None, &"not a Doc".to_owned()).unwrap();
    let named = |error: StoreError| match error {
        StoreError::Unreadable { document, .. } => document,
        other => panic!("{other:?}"),
    };
    let expected = DocumentRef::Document(Kind::Migration, bad);
    assert_eq!(named(store.get::<Doc>(Kind::Migration, bad).unwrap_err()), expected);
    assert_eq!(named(store.list::<Doc>(Kind::Migration).unwrap_err()), expected);
    assert_eq!(store.get::<Doc>(Kind::Migration, good).unwrap(), Some(doc(1)));
    // What nobody wrote is not even tried, whether or not it can be read.
    for body in ["{\"number\":", "{\"number\":1,\"text\":\"text 2\"}"] {
        raw(&path).execute("UPDATE document SET body = ?1", [body]).unwrap();
        let read = store.get::<Doc>(Kind::Migration, good);
        assert!(
            matches!(&read, Err(StoreError::Damaged { what, .. }) if *what == format!("migration {good}"))
        );
        assert!(matches!(store.list::<Doc>(Kind::Migration), Err(StoreError::Damaged { .. })));
    }
    store.meta_put("m", &1u64).unwrap();
    assert_eq!(named(store.meta_get::<Doc>("m").unwrap_err()), DocumentRef::Meta("m".into()));
    let long = "x".repeat(MAX_DOCUMENT);
    assert!(matches!(store.put(Kind::Guest, good, None, &long), Err(StoreError::TooLong { .. })));
}

#[test]
fn versions_and_programs_other_than_ours_are_refused() {
    let dir = dir();
    let path = dir.path().join("host.db");
    drop(open(&path).unwrap());
    raw(&path).pragma_update(None, "user_version", 8).unwrap();
    let refused = open(&path).unwrap_err();
    assert!(matches!(refused, StoreError::TooNew { found: 8, known: 7, .. }));
    let told = refused.to_string();
    assert!(told.contains("host.db has schema version 8, this program knows up to 7"), "{told}");
    for version in 0..4 {
        raw(&path).pragma_update(None, "user_version", version).unwrap();
        assert!(matches!(open(&path), Err(StoreError::Untrusted { .. })));
    }
    raw(&path).pragma_update(None, "user_version", 7).unwrap();
    drop(open(&path).unwrap());
    raw(&path).pragma_update(None, "application_id", 5).unwrap();
    assert!(matches!(open(&path), Err(StoreError::Foreign { .. })));
    // Another program's database is not even opened: ours would switch it to WAL.
    fs::remove_file(&path).unwrap();
    raw(&path).execute_batch("CREATE TABLE theirs (x)").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let before = fs::read(&path).unwrap();
    assert!(matches!(open(&path), Err(StoreError::Foreign { .. })));
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn damaged_files_are_refused_and_left_alone() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let store = open(&path).unwrap();
    for number in 0..200 {
        store.put(Kind::Guest, Uuid::now_v7(), Some(&format!("g{number}")), &doc(number)).unwrap();
    }
    drop(store);
    let good = fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = open(&path).unwrap_err();
        println!("{} bytes: {error:?}", bytes.len());
        assert_eq!(fs::read(&path).unwrap(), bytes, "a refused file was changed");
        error
    };
    assert!(matches!(refused(b""), StoreError::Empty { .. }));
    assert!(matches!(refused(b"SQLite"), StoreError::Foreign { .. }));
    assert!(matches!(refused(&[7; 8192]), StoreError::Foreign { .. }));
    assert!(matches!(refused(&good[..good.len() / 2]), StoreError::Corrupt { .. }));
    assert!(matches!(refused(&good[..4096]), StoreError::Corrupt { .. }));
    // A header alone: SQLite takes it for an empty database, we do not.
    assert!(matches!(refused(&good[..100]), StoreError::Foreign { .. } | StoreError::Corrupt { .. }));
    let mut torn = good.clone();
    torn[8192..12288].fill(0xa5);
    assert!(matches!(refused(&torn), StoreError::Corrupt { .. }));
    fs::write(&path, &good).unwrap();
    assert_eq!(open(&path).unwrap().list::<Doc>(Kind::Guest).unwrap().len(), 200);
}

#[test]
fn a_log_that_lost_its_end_is_noticed_where_anybody_was_told_of_it() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let store = open(&path).unwrap();
    let ids: Vec<Uuid> = (0..50).map(|_| Uuid::now_v7()).collect();
    for (number, id) in ids.iter().enumerate() {
        store.put(Kind::Guest, *id, None, &doc(number as u64)).unwrap();
    }
    // The pair as a crash would leave it.
    let image = Image::of(dir.path());
    // The next one gets to the log and not to the mark: nobody is told.
    store.put(Kind::Guest, Uuid::now_v7(), None, &doc(50)).unwrap();
    let next = Image::of(dir.path());
    drop(store);
    let log = image.0["host.db-wal"].len();
    for keep in [log, log - 1, log / 2 + 5, 40, 0] {
        let crashed = image.with("host.db-wal", |log| log.truncate(keep));
        let opened = open(&crashed.path().join("host.db"));
        if keep == log {
            let listed = opened.unwrap().list::<Doc>(Kind::Guest).unwrap();
            assert!(listed.iter().map(|(id, _)| *id).eq(ids.iter().copied()));
            continue;
        }
        let error = opened.unwrap_err();
        let StoreError::Untrusted { finding: Finding::Behind { found, acknowledged: 50, .. }, .. } = &error
        else {
            panic!("{keep}: {error:?}")
        };
        let missing = format!("the last {} are missing", 50 - found);
        assert!(*found < 50 && error.to_string().contains(&missing), "{error}");
        // What it refused is as it was.
        assert_eq!(fs::read(crashed.path().join("host.db-wal")).unwrap().len(), keep);
    }
    for cut in 1..60 {
        let mut early = next.clone();
        early.0.insert("host.mark".into(), image.0["host.mark"].clone());
        let crashed = early.with("host.db-wal", |log| log.truncate(log.len() - cut * 70));
        let store = open(&crashed.path().join("host.db")).unwrap();
        assert_eq!(store.list::<Doc>(Kind::Guest).unwrap().len(), 50, "{cut}");
        store.put(Kind::Guest, Uuid::now_v7(), None, &doc(51)).unwrap();
    }
}

/// The files of a state directory at one moment, as a crash would leave them.
#[derive(Clone)]
struct Image(std::collections::BTreeMap<String, Vec<u8>>);

impl Image {
    fn of(dir: &Path) -> Self {
        let names = ["host.db", "host.db-wal", "host.db-shm", "host.mark"];
        let there =
            names.into_iter().filter_map(|name| Some((name.to_owned(), fs::read(dir.join(name)).ok()?)));
        Self(there.collect())
    }

    /// A directory with these files, one of them changed.
    fn with(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
        let mut files = self.0.clone();
        if let Some(bytes) = files.get_mut(name) {
            change(bytes);
        }
        let dir = dir();
        for (name, bytes) in files {
            fs::write(dir.path().join(&name), bytes).unwrap();
            fs::set_permissions(dir.path().join(&name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        dir
    }
}

#[test]
fn a_crash_anywhere_between_commit_and_mark_starts_with_what_was_acknowledged() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let store = open(&path).unwrap();
    let ids: Vec<Uuid> = (0..6).map(|_| Uuid::now_v7()).collect();
    let mut images = vec![Image::of(dir.path())];
    for (number, id) in ids.iter().enumerate() {
        store.put(Kind::Guest, *id, None, &doc(number as u64)).unwrap();
        images.push(Image::of(dir.path()));
    }
    for step in 1..images.len() {
        let (before, after) = (&images[step - 1], &images[step]);
        // The database is committed first; of the mark, any part may be on disk.
        let (old, new) = (&before.0["host.mark"], &after.0["host.mark"]);
        for torn in [0, 7, 30, 100, 4096, 4096 + 50, 8192] {
            let mut image = after.clone();
            let mark = [&new[..torn], &old[torn..]].concat();
            image.0.insert("host.mark".into(), mark);
            let crashed = image.with("", |_| {});
            let at = crashed.path().join("host.db");
            // Twice, with a commit between: the first start leaves a good mark.
            for more in 0..2 {
                let store = open(&at).unwrap();
                let listed = store.list::<Doc>(Kind::Guest).unwrap();
                assert_eq!(listed.len(), step + more, "{step} {torn}");
                store.put(Kind::Guest, Uuid::now_v7(), None, &doc(9)).unwrap();
            }
        }
        // The other way round, which no crash does: the mark of what the database lost.
        let mut image = before.clone();
        image.0.insert("host.mark".into(), new.clone());
        let refused = open(&image.with("", |_| {}).path().join("host.db"));
        assert!(matches!(refused, Err(StoreError::Untrusted { finding: Finding::Behind { .. }, .. })));
    }
}

/// Changes one bit, cuts, or removes a file of many: what was acknowledged is there, or the start is refused.
#[test]
fn no_damage_to_any_file_loses_something_without_a_word() {
    let mut random: u64 = 0x005e_ed0f_da7a_ba5e;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below.max(1) as u64) as usize
    };
    let dir = dir();
    let path = dir.path().join("host.db");
    let store = open(&path).unwrap();
    let mut wanted: Vec<(Uuid, Doc)> = Vec::new();
    let mut images = Vec::new();
    for number in 0..60 {
        let id = Uuid::now_v7();
        store.put(Kind::Guest, id, Some(&format!("g{number}")), &doc(number)).unwrap();
        wanted.push((id, doc(number)));
        if number == 29 {
            // Half of it is in the database itself.
            drop(raw(&path).query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())));
        }
    }
    images.push(Image::of(dir.path()));
    drop(store);
    images.push(Image::of(dir.path()));
    let (mut whole, mut refused) = (0, 0);
    for round in 0..500 {
        let image = &images[next(images.len())];
        let names: Vec<&String> = image.0.keys().filter(|n| !image.0[*n].is_empty()).collect();
        let name = names[next(names.len())];
        let mut what = String::new();
        let mut image = image.clone();
        let length = image.0[name].len();
        match next(8) {
            0 => {
                what += "removed";
                image.0.remove(name);
            }
            1 => {
                let keep = next(length);
                what += &format!("cut to {keep}");
                image.0.get_mut(name).unwrap().truncate(keep);
            }
            _ => {
                let bit = next(length * 8);
                what += &format!("bit {bit}");
                image.0.get_mut(name).unwrap()[bit / 8] ^= 1 << (bit % 8);
            }
        }
        let damaged = image.with("", |_| {});
        match open(&damaged.path().join("host.db")) {
            Ok(store) => {
                let found = store.list::<Doc>(Kind::Guest).unwrap();
                assert_eq!(found, wanted, "{round}: {name} {what}");
                whole += 1;
            }
            Err(error) => {
                let told = error.to_string();
                assert!(told.contains("host."), "{round}: {name} {what}: {told}");
                refused += 1;
            }
        }
    }
    println!("{whole} whole, {refused} refused");
    assert!(whole > 40 && refused > 40);
}

#[test]
fn a_row_that_is_changed_added_or_removed_behind_our_back_is_named_or_missed() {
    type Named<'f> = &'f dyn Fn(&Finding) -> bool;
    let damages: [(&str, Named<'_>); 7] = [
        ("UPDATE document SET body = replace(body, 'text 3', 'text 4')", &|f| names(f, "guest")),
        ("UPDATE document SET name = 'other' WHERE name = 'g2'", &|f| names(f, "other")),
        ("UPDATE meta SET body = '1'", &|f| names(f, "the host's m")),
        ("DELETE FROM document WHERE name = 'g1'", &|f| matches!(f, Finding::Sum { found: 5, expected: 6 })),
        ("DELETE FROM position", &|f| matches!(f, Finding::Part { .. })),
        ("UPDATE position SET seq = seq + 1", &|f| matches!(f, Finding::Part { .. })),
        ("DROP INDEX document_name", &|f| matches!(f, Finding::Part { .. })),
    ];
    for (statement, right) in damages {
        let dir = dir();
        let path = dir.path().join("host.db");
        let store = open(&path).unwrap();
        for number in 0..5 {
            let name = format!("g{number}");
            store.put(Kind::Guest, Uuid::now_v7(), Some(&name), &doc(number)).unwrap();
        }
        store.meta_put("m", &3u64).unwrap();
        drop(store);
        raw(&path).execute(statement, []).unwrap();
        match open(&path) {
            Err(StoreError::Untrusted { finding, .. }) if right(&finding) => {}
            other => panic!("{statement}: {other:?}"),
        }
        // Somebody may go on with what is left, and the audit log has it.
        let found = state_files::accept(&path, as_it_is, |wrong| format!("\"{wrong}\""));
        if statement.starts_with("DROP") {
            assert!(matches!(found, Err(StoreError::Untrusted { .. })), "the schema is nobody's to guess");
            continue;
        }
        assert!(found.unwrap().finding.is_some(), "{statement}");
        let store = open(&path).unwrap();
        assert_eq!(
            store.meta_get::<Unconfirmed>(UNCONFIRMED).unwrap().map(|u| u.doubt),
            Some(Doubt::Accepted)
        );
        let left = store.list::<Doc>(Kind::Guest).unwrap().len();
        assert!((4..=5).contains(&left), "{statement}: {left}");
        let ledger = Ledger::open(&store, 10).unwrap();
        let audit = ledger.look(ledger::Log::Audit, 0, 10, |_| true).unwrap();
        assert!(audit.entries[0].body.contains("host.db"), "{audit:?}");
        drop((ledger, store));
        assert_eq!(
            state_files::accept(&path, as_it_is, |_| panic!("nothing is wrong")).unwrap().finding,
            None
        );
    }
}

fn names(finding: &Finding, what: &str) -> bool {
    matches!(finding, Finding::Records { damaged } if damaged.iter().any(|d| d.contains(what)))
}

#[test]
fn a_backup_of_an_open_store_is_put_back_as_it_was_and_says_so() {
    let (dir, other) = (dir(), dir());
    let path = dir.path().join("host.db");
    let (to, elsewhere) = (dir.path().join("backup.db"), other.path().join("host.db"));
    let store = open(&path).unwrap();
    let ledger = Ledger::open(&store, 10).unwrap();
    for number in 0..5 {
        store.put(Kind::Guest, Uuid::now_v7(), Some(&format!("g{number}")), &doc(number)).unwrap();
    }
    let epoch = ledger.epoch().to_owned();
    let rider = state_files::Rider { name: "key".into(), body: b"secret of the host".to_vec().into() };
    let with = |documents: &state_files::Documents<'_>| {
        assert_eq!(documents.list::<Doc>(Kind::Guest).unwrap().len(), 5);
        Ok(vec![rider])
    };
    let facts = state_files::backup(&path, &to, with).unwrap();
    assert!(facts.live && facts.records >= 6, "{facts:?}");
    assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(
        state_files::backup(&path, &to, |_| Ok(Vec::new())),
        Err(StoreError::Files(PrivateFileError::Exists { .. }))
    ));
    store.put(Kind::Guest, Uuid::now_v7(), Some("later"), &doc(9)).unwrap();
    assert!(matches!(state_files::restore(&to, &path, "e"), Err(StoreError::InUse)));
    drop((ledger, store));
    for at in [&path, &elsewhere] {
        let restored = state_files::restore(&to, at, "\"restored\"").unwrap();
        assert_eq!(restored.riders[0].body.as_slice(), b"secret of the host");
        assert_eq!(restored.replaced.is_some(), at == &path);
        let store = open(at).unwrap();
        assert_eq!(store.list::<Doc>(Kind::Guest).unwrap().len(), 5);
        assert_eq!(
            store.meta_get::<Unconfirmed>(UNCONFIRMED).unwrap().map(|u| u.doubt),
            Some(Doubt::Restored)
        );
        let ledger = Ledger::open(&store, 10).unwrap();
        assert_ne!(ledger.epoch(), epoch, "numbers of events begin to mean something else");
        assert_eq!(ledger.bounds(ledger::Log::Audit).unwrap().latest, 1);
        drop((ledger, store));
        let bytes = fs::read(at).unwrap();
        assert!(!bytes.windows(9).any(|w| w == b"secret of"), "the riders leave nothing behind");
    }
    // One that is not whole is not put back, and what is there stays.
    let good = fs::read(&to).unwrap();
    for at in (100..good.len()).step_by(997) {
        let mut bad = good.clone();
        bad[at] ^= 4;
        fs::write(&to, &bad).unwrap();
        let before = fs::read(&path).unwrap();
        if let Err(error) = state_files::restore(&to, &path, "e") {
            assert!(error.to_string().contains("backup.db"), "{at}: {error}");
            assert_eq!(fs::read(&path).unwrap(), before);
        }
        assert_eq!(open(&path).unwrap().list::<Doc>(Kind::Guest).unwrap().len(), 5, "{at}");
    }
    for (name, file) in [("host.db", &path), ("host.mark", &dir.path().join("host.mark"))] {
        fs::remove_file(file).unwrap();
        let error = open(&path).unwrap_err();
        assert!(error.to_string().contains(&format!("{name} is missing")), "{error}");
        assert!(state_files::check(&path).unwrap_err().to_string().contains(name));
        fs::write(&to, &good).unwrap();
        state_files::restore(&to, &path, "e").unwrap();
        assert!(!state_files::check(&path).unwrap().live);
    }
}

#[test]
fn directories_and_files_open_to_others_are_refused() {
    let dir = dir();
    let path = dir.path().join("host.db");
    drop(open(&path).unwrap());
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let files = |path: &Path| match open(path).unwrap_err() {
        StoreError::Files(error) => error,
        other => panic!("{other:?}"),
    };
    set(&path, 0o640);
    assert!(matches!(files(&path), PrivateFileError::TooOpen { mode: 0o640, .. }));
    set(&path, 0o600);
    set(dir.path(), 0o711);
    assert!(matches!(files(&path), PrivateFileError::TooOpen { mode: 0o711, .. }));
    set(dir.path(), 0o700);
    fs::hard_link(&path, dir.path().join("second")).unwrap();
    assert!(matches!(files(&path), PrivateFileError::HardLinked { links: 2, .. }));
    fs::remove_file(&path).unwrap();
    symlink(dir.path().join("second"), &path).unwrap();
    assert!(matches!(files(&path), PrivateFileError::SymbolicLink { .. }));
    let outer = self::dir();
    symlink(dir.path(), outer.path().join("state")).unwrap();
    let through = outer.path().join("state").join("host.db");
    assert!(matches!(files(&through), PrivateFileError::SymbolicLink { .. }));
    let below_file = dir.path().join("second").join("host.db");
    assert!(matches!(files(&below_file), PrivateFileError::WrongType { .. }));
    assert!(matches!(files(Path::new("host.db")), PrivateFileError::WrongType { .. }));
}

#[test]
fn a_read_only_directory_is_refused() {
    let dir = dir();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o500)).unwrap();
    if rustix::process::geteuid().is_root() {
        // Permission bits do not hold root back; a directory that takes no files does.
        let refused = open(Path::new("/proc/self/fdinfo/host.db"));
        assert!(matches!(refused, Err(StoreError::Files(_))), "{refused:?}");
        return;
    }
    let refused = open(&dir.path().join("host.db"));
    assert!(matches!(refused, Err(StoreError::Files(PrivateFileError::Io { .. }))), "{refused:?}");
}

const CHILD: &str = "MIRRORVM_STORE_TEST_CHILD";

/// Not a test of its own: the body of the process that the next test kills.
#[test]
fn child_that_writes_until_killed() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let store = open(Path::new(&path)).unwrap();
    for number in 0.. {
        let (a, b) = (Uuid::now_v7(), Uuid::now_v7());
        let written: Result<(), StoreError> = store.transaction(|tx| {
            tx.insert(Kind::Guest, a, Some(&a.to_string()), &doc(number))?;
            tx.insert(Kind::Migration, b, None, &a)
        });
        written.unwrap();
        println!("acknowledged {a} {b}");
    }
}

#[test]
fn what_was_acknowledged_survives_sigkill() {
    let seed = std::env::var("MIRRORVM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random: u64 = seed.unwrap_or(0x6d69_7272_6f72_766d);
    println!("seed {random} (MIRRORVM_TEST_SEED)");
    let dir = dir();
    let path = dir.path().join("host.db");
    let mut acknowledged: Vec<(Uuid, Uuid)> = Vec::new();
    for _ in 0..12 {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::child_that_writes_until_killed", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut take = |line: String| {
            let mut words = line.split("acknowledged ").nth(1)?.split(' ').map(str::parse);
            acknowledged.push((words.next()?.ok()?, words.next()?.ok()?));
            Some(())
        };
        let mut wanted = random % 40;
        while wanted > 0 {
            wanted -= u64::from(take(lines.next().unwrap().unwrap()).is_some());
        }
        // Somewhere within the next few commits.
        for _ in 0..(random >> 32) % 200_000 {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it managed to print before it died; a last line may be cut short.
        lines.map_while(Result::ok).for_each(|line| {
            take(line);
        });
        let store = open(&path).unwrap();
        for (a, b) in &acknowledged {
            assert!(store.get::<Doc>(Kind::Guest, *a).unwrap().is_some(), "lost {a}");
            assert_eq!(store.get::<Uuid>(Kind::Migration, *b).unwrap(), Some(*a));
        }
        let pairs = store.list::<Uuid>(Kind::Migration).unwrap().len();
        assert_eq!(store.list::<Doc>(Kind::Guest).unwrap().len(), pairs, "half a transaction");
        assert!(pairs <= acknowledged.len() + 12);
    }
    println!("{} commits acknowledged", acknowledged.len());
}
