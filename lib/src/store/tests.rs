//! Includes a child process killed with SIGKILL at random points.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Doc {
    number: u64,
    text: String,
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
        let store = Store::open(&path).unwrap();
        for (number, id) in ids.iter().enumerate().rev() {
            store.insert(Kind::Guest, *id, Some(&format!("g{number}")), &doc(number as u64)).unwrap();
        }
        store.put(Kind::Guest, ids[3], Some("other"), &doc(300)).unwrap();
        store.meta_put("host", &doc(7)).unwrap();
        assert!(store.delete(Kind::Guest, ids[4]).unwrap());
        assert!(!store.delete(Kind::Guest, ids[4]).unwrap());
    }
    let store = Store::open(&path).unwrap();
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
    let store = Store::open(&dir.path().join("host.db")).unwrap();
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
    let store = Store::open(&dir.path().join("host.db")).unwrap();
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
    let first = Store::open(&path).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::InUse)));
    drop(first);
    Store::open(&path).unwrap();
}

#[test]
fn an_unreadable_document_is_named() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let (good, bad) = (Uuid::now_v7(), Uuid::now_v7());
    let store = Store::open(&path).unwrap();
    store.put(Kind::Migration, good, None, &doc(1)).unwrap();
    store.put(Kind::Migration, bad, None, &"not a Doc").unwrap();
    let named = |error: StoreError| match error {
        StoreError::Unreadable { document, .. } => document,
        other => panic!("{other:?}"),
    };
    let expected = DocumentRef::Document(Kind::Migration, bad);
    assert_eq!(named(store.get::<Doc>(Kind::Migration, bad).unwrap_err()), expected);
    assert_eq!(named(store.list::<Doc>(Kind::Migration).unwrap_err()), expected);
    assert_eq!(store.get::<Doc>(Kind::Migration, good).unwrap(), Some(doc(1)));
    raw(&path).execute("UPDATE document SET body = '{\"number\":'", []).unwrap();
    assert!(matches!(store.get::<Doc>(Kind::Migration, good), Err(StoreError::Unreadable { .. })));
    store.meta_put("m", &1).unwrap();
    assert_eq!(named(store.meta_get::<Doc>("m").unwrap_err()), DocumentRef::Meta("m".into()));
    let long = "x".repeat(MAX_DOCUMENT);
    assert!(matches!(store.put(Kind::Guest, good, None, &long), Err(StoreError::TooLong { .. })));
}

#[test]
fn versions_and_programs_other_than_ours_are_refused() {
    let dir = dir();
    let path = dir.path().join("host.db");
    drop(Store::open(&path).unwrap());
    raw(&path).pragma_update(None, "user_version", 4).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::TooNew { found: 4, known: 3, .. })));
    raw(&path).pragma_update(None, "user_version", 0).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Corrupt { .. })));
    raw(&path).pragma_update(None, "user_version", 3).unwrap();
    drop(Store::open(&path).unwrap());
    raw(&path).pragma_update(None, "application_id", 5).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Foreign { .. })));
    // Another program's database is not even opened: ours would switch it to WAL.
    fs::remove_file(&path).unwrap();
    raw(&path).execute_batch("CREATE TABLE theirs (x)").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let before = fs::read(&path).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Foreign { .. })));
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn damaged_files_are_refused_and_left_alone() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let store = Store::open(&path).unwrap();
    for number in 0..200 {
        store.put(Kind::Guest, Uuid::now_v7(), Some(&format!("g{number}")), &doc(number)).unwrap();
    }
    drop(store);
    let good = fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = Store::open(&path).unwrap_err();
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
    assert_eq!(Store::open(&path).unwrap().list::<Doc>(Kind::Guest).unwrap().len(), 200);
}

#[test]
fn a_torn_log_is_cut_back_to_the_last_good_commit() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let store = Store::open(&path).unwrap();
    let ids: Vec<Uuid> = (0..50).map(|_| Uuid::now_v7()).collect();
    for (number, id) in ids.iter().enumerate() {
        store.put(Kind::Guest, *id, None, &doc(number as u64)).unwrap();
    }
    // The pair as a crash would leave it.
    let (database, log) = (fs::read(&path).unwrap(), fs::read(dir.path().join("host.db-wal")).unwrap());
    drop(store);
    let mut counts = Vec::new();
    for keep in [log.len(), log.len() - 1, log.len() / 2 + 5, 40, 0] {
        let crashed = self::dir();
        let path = crashed.path().join("host.db");
        for (name, bytes) in [("host.db", &database[..]), ("host.db-wal", &log[..keep])] {
            fs::write(crashed.path().join(name), bytes).unwrap();
            fs::set_permissions(crashed.path().join(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        let listed = Store::open(&path).unwrap().list::<Doc>(Kind::Guest).unwrap();
        assert!(listed.iter().zip(&ids).all(|((id, _), expected)| id == expected), "a prefix, no gaps");
        counts.push(listed.len());
    }
    assert_eq!((counts[0], counts[1]), (50, 49));
    assert!(counts[2] < 49 && counts[4] == 0, "{counts:?}");
}

#[test]
fn directories_and_files_open_to_others_are_refused() {
    let dir = dir();
    let path = dir.path().join("host.db");
    drop(Store::open(&path).unwrap());
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let files = |path: &Path| match Store::open(path).unwrap_err() {
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
        let refused = Store::open(Path::new("/proc/self/fdinfo/host.db"));
        assert!(matches!(refused, Err(StoreError::Files(_))), "{refused:?}");
        return;
    }
    let refused = Store::open(&dir.path().join("host.db"));
    assert!(matches!(refused, Err(StoreError::Files(PrivateFileError::Io { .. }))), "{refused:?}");
}

const CHILD: &str = "MIRRORVM_STORE_TEST_CHILD";

/// Not a test of its own: the body of the process that the next test kills.
#[test]
fn child_that_writes_until_killed() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let store = Store::open(Path::new(&path)).unwrap();
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
        let store = Store::open(&path).unwrap();
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
