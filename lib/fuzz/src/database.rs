//! A host's database, its log and its mark, after a disk has done what it likes with them.
//!
//! Either everything that was acknowledged is there, or the start is refused with what is missing; and a
//! start that is refused leaves what it found. (Of two faults at once, in the mark and in what it tells of,
//! one change may be gone: see `mark` in the library.)

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use mirrorvm::host::{HostSettings, PeerRecord, check_state, renew};
use mirrorvm::store::{Kind, Store};
use tempfile::TempDir;

use crate::{Bytes, Seed};

/// Its files, in the order in which edits name them.
const FILES: [&str; 3] = ["mirrorvm.db", "mirrorvm.db-wal", "mirrorvm.mark"];
/// Which of them is the mark.
const MARK: usize = 2;

/// What a state directory has; no file where there is none.
type Content = [Option<Vec<u8>>; 3];

/// A database that was left in one of two ways: closed, or killed with its log full.
struct Template {
    content: Content,
    changes: u64,
    records: u64,
    peers: usize,
}

struct Stage {
    dir: TempDir,
    templates: [Template; 2],
}

fn private(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Memory rather than a disk, where there is some: what is looked for is not in the disk.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// A log without anything in it says what none says.
fn content(dir: &Path) -> Content {
    FILES.map(|name| {
        fs::read(dir.join(name)).ok().filter(|bytes| !name.ends_with("-wal") || !bytes.is_empty())
    })
}

/// What is to be found of these files.
fn told(files: &Content) -> Content {
    let mut told = files.clone();
    told[1] = told[1].take().filter(|bytes| !bytes.is_empty());
    told
}

fn put(dir: &Path, content: &Content) {
    for (name, bytes) in FILES.iter().zip(content) {
        let path = dir.join(name);
        let _ = fs::remove_file(&path);
        if let Some(bytes) = bytes {
            fs::write(&path, bytes).unwrap();
            private(&path, 0o600);
        }
    }
    let _ = fs::remove_file(dir.join("mirrorvm.db-shm"));
}

fn database(dir: &Path) -> PathBuf {
    dir.join(FILES[0])
}

impl Stage {
    /// The database of the tests, brought forward, with changes behind that.
    fn new() -> Self {
        let dir = scratch();
        private(dir.path(), 0o700);
        let v4 = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/stored/v4");
        let connection = rusqlite::Connection::open(database(dir.path())).unwrap();
        connection.execute_batch(&fs::read_to_string(v4.join("mirrorvm.sql")).unwrap()).unwrap();
        drop(connection);
        private(&database(dir.path()), 0o600);
        fs::copy(v4.join("mirrorvm.mark"), dir.path().join(FILES[MARK])).unwrap();
        private(&dir.path().join(FILES[MARK]), 0o600);
        drop(Store::open(&database(dir.path()), renew).unwrap());
        let closed = Template::of(&dir, content(dir.path()));
        let store = Store::open(&database(dir.path()), renew).unwrap();
        for _ in 0..3 {
            let peers = store.list::<PeerRecord>(Kind::Peer).unwrap();
            let (id, peer) = &peers[0];
            store.put(Kind::Peer, *id, Some("a-new-name"), peer).unwrap();
            store.meta_put("host_settings", &HostSettings::default()).unwrap();
        }
        let killed = content(dir.path());
        drop(store);
        let killed = Template::of(&dir, killed);
        assert!(killed.content[1].as_ref().is_some_and(|log| !log.is_empty()), "its log has something");
        Self { dir, templates: [closed, killed] }
    }
}

impl Template {
    fn of(dir: &TempDir, content: Content) -> Self {
        put(dir.path(), &content);
        let facts = check_state(dir.path()).unwrap();
        let peers =
            Store::open(&database(dir.path()), renew).unwrap().list::<PeerRecord>(Kind::Peer).unwrap().len();
        Self { content, changes: facts.changes, records: facts.records, peers }
    }
}

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage::new());
}

/// What it was like, then edits: a file, how it is edited, where, and with what.
pub fn run(data: &[u8]) {
    STAGE.with_borrow_mut(|stage| {
        let mut bytes = Bytes(data);
        let template = &stage.templates[usize::from(bytes.u8()) % 2];
        let mut files = template.content.clone();
        while !bytes.is_empty() {
            edit(&mut files, &mut bytes);
        }
        let changed: Vec<bool> = files.iter().zip(&template.content).map(|(a, b)| a != b).collect();
        let dir = stage.dir.path();
        put(dir, &files);
        // Of two faults, one in the mark, the second is one change away at most.
        let least = template.changes - u64::from(changed[MARK] && (changed[0] || changed[1]));
        let looked = check_state(dir);
        assert!(content(dir) == told(&files), "a look has changed something");
        match &looked {
            Ok(facts) => {
                assert!((least..=template.changes).contains(&facts.changes), "{facts:?}");
                assert!(facts.changes < template.changes || facts.records == template.records, "{facts:?}");
            }
            Err(error) => {
                assert!(changed.contains(&true), "refused as it was: {error:?}");
                assert!(!error.to_string().is_empty());
            }
        }
        if files.iter().all(Option::is_none) {
            // To a start, there never was one.
            assert!(looked.is_err());
            return;
        }
        match Store::open(&database(dir), renew) {
            Ok(store) => {
                assert!(looked.is_ok(), "opened what a look refuses: {looked:?}");
                if let Ok(peers) = store.list::<PeerRecord>(Kind::Peer) {
                    assert_eq!(peers.len(), template.peers);
                }
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert!(changed.contains(&true), "refused as it was: {error:?}");
                assert!(
                    content(dir) == told(&files),
                    "a start that was refused has changed something: {error:?}"
                );
            }
        }
    });
}

fn edit(files: &mut Content, bytes: &mut Bytes<'_>) {
    let (which, how, at) = (usize::from(bytes.u8()) % 3, bytes.u8(), bytes.u32() as usize);
    let Some(file) = &mut files[which] else {
        if how == 5 {
            files[which] = Some(bytes.up_to(64).to_vec());
        }
        return;
    };
    if file.is_empty() {
        return;
    }
    let at = at % file.len();
    match how % 6 {
        0 => file[at] ^= bytes.u8(),
        1 => file.truncate(at),
        // A block that never came to the disk, and one that went to another place.
        2 => {
            let block = at / 512 * 512;
            let end = (block + 512).min(file.len());
            file[block..end].fill(0);
        }
        3 => {
            let (from, to) = (at / 512 * 512, usize::from(bytes.u16()) * 512 % file.len() / 512 * 512);
            let len = 512.min(file.len() - from.max(to));
            file.copy_within(from..from + len, to);
        }
        4 => files[which] = None,
        _ => {
            let new = bytes.up_to(16);
            let end = (at + new.len()).min(file.len());
            file[at..end].copy_from_slice(&new[..end - at]);
        }
    }
}

/// Every kind of edit to every file, by itself and two together.
pub fn seeds() -> Vec<Seed> {
    let edit = |which: usize, how: u8, at: u32, rest: &[u8]| {
        [&[which as u8, how][..], &at.to_le_bytes(), rest].concat()
    };
    let mut all: Vec<Seed> = vec![("closed".into(), vec![0]), ("killed".into(), vec![1])];
    for way in 0..2u8 {
        for (which, file) in FILES.iter().enumerate() {
            let name = |what: &str| {
                format!("{}-{what}-{}", ["closed", "killed"][usize::from(way)], file.replace('.', "-"))
            };
            let with = |edits: Vec<u8>| [vec![way], edits].concat();
            all.push((name("flip-begin"), with(edit(which, 0, 18, &[1]))));
            all.push((name("flip"), with(edit(which, 0, 4200, &[0x40]))));
            all.push((name("cut"), with(edit(which, 1, 4096, &[]))));
            all.push((name("hole"), with(edit(which, 2, 4096, &[]))));
            all.push((name("moved"), with(edit(which, 3, 512, &[3, 0]))));
            all.push((name("gone"), with(edit(which, 4, 0, &[]))));
            all.push((name("written"), with(edit(which, 5, 100, &[0xff; 16]))));
        }
    }
    all.push(("torn-twice".into(), [vec![1], edit(1, 1, 30_000, &[]), edit(2, 0, 40, &[1])].concat()));
    all.push(("mark-of-both-slots".into(), [vec![0], edit(2, 0, 40, &[1]), edit(2, 0, 4136, &[1])].concat()));
    all
}
