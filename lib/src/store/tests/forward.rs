//! A database of the version before: saved, changed as a whole, or left as it is.

use super::*;
use crate::store::form;

/// As the host's: what has no version gets one.
fn renew(document: &DocumentRef, body: &[u8]) -> Result<Option<String>, Unread> {
    match document {
        DocumentRef::Document(Kind::Guest, _) => form::renewed::<Doc>(body),
        _ => Ok(None),
    }
}

fn forward(path: &Path) -> Result<Store, StoreError> {
    Store::open(path, renew)
}

/// A database of version 4 with three guests.
fn version_4() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = dir();
    let path = dir.path().join("host.db");
    let store = open(&path).unwrap();
    for number in 0..3u64 {
        let bare = serde_json::json!({"number": number, "text": format!("text {number}")});
        store.put(Kind::Guest, Uuid::now_v7(), Some(&format!("g{number}")), &bare).unwrap();
    }
    // Of no kind that the host renews.
    store.put(Kind::Peer, Uuid::now_v7(), None, &7u64).unwrap();
    drop(store);
    raw(&path).pragma_update(None, "user_version", 4).unwrap();
    raw(&path).query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    (dir, path)
}

fn version_of(path: &Path) -> i64 {
    raw(path).pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
}

fn backups(dir: &Path) -> Vec<std::path::PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.file_name().unwrap().to_string_lossy().contains("host.db.v4")).collect()
}

/// Everything in the tables that a database has.
fn content(path: &Path) -> Vec<String> {
    let connection = raw(path);
    let mut all = Vec::new();
    for table in ["document", "meta", "position", "event", "audit", "audit_outcome", "keyed"] {
        let mut statement = connection.prepare(&format!("SELECT * FROM {table} ORDER BY 1, 2")).unwrap();
        let columns = statement.column_count();
        let mut rows = statement.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let row: Vec<rusqlite::types::Value> = (0..columns).map(|n| row.get(n).unwrap()).collect();
            all.push(format!("{table}: {row:?}"));
        }
    }
    all
}

fn numbers(store: &Store) -> Vec<u64> {
    store.list::<Doc>(Kind::Guest).unwrap().into_iter().map(|(_, doc)| doc.number).collect()
}

#[test]
fn a_database_of_the_version_before_is_saved_whole_and_brought_forward() {
    let (dir, path) = version_4();
    let before = content(&path);
    let store = forward(&path).unwrap();
    assert_eq!(numbers(&store), [0, 1, 2]);
    drop(store);
    assert_eq!(version_of(&path), 7);
    let bodies = raw(&path)
        .prepare("SELECT body FROM document WHERE kind = 'guest'")
        .unwrap()
        .query_map([], |row| row.get::<_, String>(0))
        .unwrap()
        .collect::<Result<Vec<_>, _>>()
        .unwrap();
    assert!(bodies.iter().all(|body| body.starts_with("{\"version\":5,")), "{bodies:?}");
    // It is whole by its own digests and its mark, and is opened as any other from now on.
    state_files::check(&path).unwrap();
    drop(open(&path).unwrap());
    let [saved] = &backups(dir.path())[..] else { panic!("{:?}", backups(dir.path())) };
    assert_eq!(fs::metadata(saved).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!((version_of(saved), content(saved)), (4, before));
    // Put back it is what it was, for the build that wrote it; this one brings it forward once more.
    state_files::restore(saved, &path, "\"restored\"").unwrap();
    assert_eq!(version_of(&path), 4);
    let meta = |key: &str| -> String {
        raw(&path).query_row("SELECT body FROM meta WHERE key = ?1", [key], |row| row.get(0)).unwrap()
    };
    assert_eq!(meta(UNCONFIRMED), "\"restored\"", "as version 4 has it");
    assert_eq!(meta("epoch").len(), 18);
    state_files::check(&path).unwrap();
    let store = forward(&path).unwrap();
    assert_eq!(numbers(&store), [0, 1, 2]);
    assert_eq!(store.meta_get::<Unconfirmed>(UNCONFIRMED).unwrap().map(|u| u.doubt), Some(Doubt::Restored));
    assert_eq!(backups(dir.path()).len(), 2);
}

#[test]
fn a_start_after_a_crash_anywhere_on_the_way_forward_is_a_good_one() {
    let (dir, path) = version_4();
    let before = Image::of(dir.path());
    drop(forward(&path).unwrap());
    let after = Image::of(dir.path());
    let [saved] = &backups(dir.path())[..] else { panic!("{:?}", backups(dir.path())) };
    let name = saved.file_name().unwrap().to_str().unwrap().to_owned();
    let backup = fs::read(saved).unwrap();
    let marked = |image: &Image, torn: usize| {
        let (old, new) = (&before.0["host.mark"], &after.0["host.mark"]);
        let mut image = image.clone();
        image.0.insert("host.mark".into(), [&new[..torn], &old[torn..]].concat());
        image
    };
    let points = [
        ("before the backup has its name", before.clone(), false),
        ("before anything is changed", before.clone(), true),
        ("before the mark says so", marked(&after, 0), true),
        ("in the middle of the mark", marked(&after, 50), true),
        ("in the end", after.clone(), true),
    ];
    for (point, image, is_saved) in points {
        let crashed = image.with("", |_| {});
        let at = crashed.path().join("host.db");
        let put = |name: &str, bytes: &[u8]| {
            fs::write(crashed.path().join(name), bytes).unwrap();
            fs::set_permissions(crashed.path().join(name), fs::Permissions::from_mode(0o600)).unwrap();
        };
        if is_saved {
            put(&name, &backup);
        } else {
            put(&format!(".{name}.0123.new"), &backup[..backup.len() / 2]);
            put(&format!(".{name}.0123.new-journal"), b"");
        }
        for _ in 0..2 {
            let store = forward(&at).unwrap();
            assert_eq!(numbers(&store), [0, 1, 2], "{point}");
            store.put(Kind::Peer, Uuid::now_v7(), None, &8u64).unwrap();
        }
        assert_eq!(backups(crashed.path()), [crashed.path().join(&name)], "{point}");
        assert_eq!(content(&crashed.path().join(&name)), content(saved), "{point}");
    }
}

#[test]
fn what_has_the_backups_name_and_is_not_it_is_left_there_and_the_database_as_it_was() {
    let (dir, path) = version_4();
    let before = Image::of(dir.path());
    drop(forward(&path).unwrap());
    let saved = backups(dir.path()).remove(0);
    let name = saved.file_name().unwrap().to_str().unwrap().to_owned();
    let mut torn = fs::read(&saved).unwrap();
    let half = torn.len() / 2;
    torn.truncate(half);
    for bytes in [b"somebody's".as_slice(), &torn, b""] {
        let other = before.with("", |_| {});
        let (at, there) = (other.path().join("host.db"), other.path().join(&name));
        fs::write(&there, bytes).unwrap();
        fs::set_permissions(&there, fs::Permissions::from_mode(0o600)).unwrap();
        let error = forward(&at).unwrap_err();
        let StoreError::NotSaved { found: 4, to, source, .. } = &error else { panic!("{error:?}") };
        assert!(to == &there && matches!(**source, StoreError::Files(PrivateFileError::Exists { .. })));
        let told = error.to_string();
        assert!(
            told.contains("was left as it is") && told.contains(&name) && told.contains("move away"),
            "{told}"
        );
        assert_eq!(fs::read(&there).unwrap(), bytes);
        assert_eq!(Image::of(other.path()).0["host.db"], before.0["host.db"]);
        assert_eq!(Image::of(other.path()).0["host.mark"], before.0["host.mark"]);
        // As it says.
        fs::rename(&there, other.path().join("away")).unwrap();
        assert_eq!(numbers(&forward(&at).unwrap()), [0, 1, 2]);
    }
}

#[test]
fn a_document_that_is_not_understood_is_named_and_nothing_is_written() {
    let (dir, path) = version_4();
    raw(&path).pragma_update(None, "user_version", 6).unwrap();
    let bad = Uuid::now_v7();
    let store = open(&path).unwrap();
    store.put(Kind::Guest, bad, None, &serde_json::json!({"number": 1, "colour": "red"})).unwrap();
    drop(store);
    raw(&path).pragma_update(None, "user_version", 4).unwrap();
    let before = content(&path);
    let error = forward(&path).unwrap_err();
    let StoreError::Unreadable { document, source } = &error else { panic!("{error:?}") };
    assert_eq!(*document, DocumentRef::Document(Kind::Guest, bad));
    assert!(format!("{source:?}").contains("colour"), "{source:?}");
    assert_eq!((version_of(&path), content(&path)), (4, before));
    assert!(backups(dir.path()).is_empty());
}

#[test]
fn what_was_lost_before_is_noticed_before_anything_is_saved() {
    let (dir, path) = version_4();
    raw(&path).execute("UPDATE document SET body = '9' WHERE kind = 'peer'", []).unwrap();
    assert!(matches!(forward(&path), Err(StoreError::Untrusted { finding: Finding::Records { .. }, .. })));
    assert!(backups(dir.path()).is_empty());
    // Somebody may go on with what is left; it is still of its version, and is brought forward then.
    state_files::accept(&path, renew, |_| "\"accepted\"".to_owned()).unwrap();
    assert_eq!(version_of(&path), 4);
    let store = forward(&path).unwrap();
    assert_eq!(store.meta_get::<Unconfirmed>(UNCONFIRMED).unwrap().map(|u| u.doubt), Some(Doubt::Accepted));
    assert_eq!((numbers(&store).len(), backups(dir.path()).len()), (3, 1));
}

#[test]
fn a_database_of_a_time_before_there_were_marks_is_saved_and_brought_forward_too() {
    let dir = dir();
    let path = dir.path().join("host.db");
    let (id, old) = (Uuid::now_v7(), raw(&path));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    old.execute_batch(
        "CREATE TABLE document (kind TEXT NOT NULL, id BLOB NOT NULL, name TEXT, body TEXT NOT NULL,
             PRIMARY KEY (kind, id)) STRICT, WITHOUT ROWID;
         CREATE UNIQUE INDEX document_name ON document (kind, name) WHERE name IS NOT NULL;
         CREATE TABLE meta (key TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT, WITHOUT ROWID;
         PRAGMA application_id = 1836217965;
         PRAGMA user_version = 1;
         INSERT INTO meta VALUES ('unconfirmed', '\"accepted\"');",
    )
    .unwrap();
    let body = "{\"number\":7,\"text\":\"text 7\"}";
    old.execute("INSERT INTO document VALUES ('guest', ?1, 'g', ?2)", rusqlite::params![id.as_bytes(), body])
        .unwrap();
    drop(old);
    let store = forward(&path).unwrap();
    assert_eq!(store.get_by_name::<Doc>(Kind::Guest, "g").unwrap(), Some((id, doc(7))));
    assert_eq!(store.meta_get::<Unconfirmed>(UNCONFIRMED).unwrap().map(|u| u.doubt), Some(Doubt::Accepted));
    drop(store);
    state_files::check(&path).unwrap();
    let all = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let saved: Vec<_> = all.filter(|path| path.to_string_lossy().contains("host.db.v1-")).collect();
    let [saved] = &saved[..] else { panic!("{saved:?}") };
    let kept: String = raw(saved).query_row("SELECT body FROM document", [], |row| row.get(0)).unwrap();
    assert_eq!((version_of(saved), kept.as_str()), (1, body));
}
