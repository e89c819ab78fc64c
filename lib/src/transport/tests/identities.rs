//! Identity files and their refusals.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::*;
use crate::private_files::PrivateFileError;

const KEY: &str = "host-key.pem";
const CERTIFICATE: &str = "host-certificate.pem";

fn dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    dir
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn an_identity_is_created_once_and_stays() {
    let dir = dir();
    let at = dir.path().join("identity");
    assert!(matches!(Identity::load(&at), Err(IdentityError::Missing)));
    let made = Identity::create(&at).unwrap();
    assert!(matches!(Identity::create(&at), Err(IdentityError::Exists)));
    assert_eq!(Identity::load(&at).unwrap().pin(), made.pin());
    assert_eq!(Identity::load_or_create(&at).unwrap().pin(), made.pin());
    assert_eq!((mode(&at), mode(&at.join(KEY))), (0o700, 0o600));
    let names: Vec<_> = fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "no temporary file stays: {names:?}");
    let other = Identity::load_or_create(&dir.path().join("other")).unwrap();
    assert_ne!(other.pin(), made.pin());
}

#[test]
fn creators_at_once_agree() {
    let dir = dir();
    let pins: Vec<PeerIdentity> = std::thread::scope(|scope| {
        let make = || loop {
            match Identity::load_or_create(dir.path()) {
                Ok(identity) => return *identity.pin(),
                // Another creator is at it.
                Err(IdentityError::Files(PrivateFileError::Locked { .. })) => std::thread::yield_now(),
                Err(other) => panic!("{other:?}"),
            }
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(make)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(pins.iter().all(|pin| *pin == pins[0]));
}

#[test]
fn a_crash_before_the_key_leaves_nothing_in_the_way() {
    let dir = dir();
    fs::write(dir.path().join(CERTIFICATE), "left behind").unwrap();
    assert!(matches!(Identity::load(dir.path()), Err(IdentityError::Missing)));
    Identity::load_or_create(dir.path()).unwrap();
}

#[test]
fn key_files_that_others_can_reach_are_refused() {
    let dir = dir();
    let key = dir.path().join(KEY);
    Identity::create(dir.path()).unwrap();
    let files = || match Identity::load(dir.path()).unwrap_err() {
        IdentityError::Files(error) => error,
        other => panic!("{other:?}"),
    };
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    set(&key, 0o640);
    assert!(matches!(files(), PrivateFileError::TooOpen { mode: 0o640, .. }));
    set(&key, 0o600);
    set(dir.path(), 0o750);
    assert!(matches!(files(), PrivateFileError::TooOpen { mode: 0o750, .. }));
    set(dir.path(), 0o700);
    let second = dir.path().join("second");
    fs::hard_link(&key, &second).unwrap();
    assert!(matches!(files(), PrivateFileError::HardLinked { links: 2, .. }));
    fs::remove_file(&key).unwrap();
    symlink(&second, &key).unwrap();
    assert!(matches!(files(), PrivateFileError::SymbolicLink { .. }));
    // Creating does not write through the link either.
    assert!(matches!(Identity::create(dir.path()), Err(IdentityError::Exists)));
    fs::remove_file(&key).unwrap();
    fs::create_dir(&key).unwrap();
    set(&key, 0o700);
    assert!(matches!(files(), PrivateFileError::WrongType { .. }));
    fs::remove_dir(&key).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &key,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert!(matches!(files(), PrivateFileError::WrongType { .. }));
    if rustix::process::geteuid().is_root() {
        fs::remove_file(&key).unwrap();
        fs::rename(&second, &key).unwrap();
        std::os::unix::fs::chown(&key, Some(12345), None).unwrap();
        assert!(matches!(files(), PrivateFileError::WrongOwner { owner: 12345, .. }));
    } else {
        eprintln!("owner check not run: giving a file away needs root");
    }
}

#[test]
fn a_certificate_that_is_lost_or_bad_is_made_again_for_the_same_key() {
    const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
    let (dir, other) = (dir(), dir());
    let made = Identity::create(dir.path()).unwrap();
    Identity::create(other.path()).unwrap();
    let at = dir.path().join(CERTIFICATE);
    let good = fs::read(&at).unwrap();
    let key = fs::read_to_string(dir.path().join(KEY)).unwrap();
    let now = SystemTime::now();
    let dated = |from, until| {
        let key = rcgen::KeyPair::from_pem(&key).unwrap();
        super::identity::envelope(&key, from, until).unwrap().into_bytes()
    };
    for bad in [
        None,
        Some(fs::read(other.path().join(CERTIFICATE)).unwrap()),
        Some(Vec::new()),
        Some(b"nonsense".to_vec()),
        Some(vec![b'x'; 1 << 20]),
        Some(good[..good.len() / 2].to_vec()),
        // As a daemon of an earlier build leaves it, first started long ago or under a clock that was wrong.
        Some(dated(now - 11 * YEAR, now - YEAR)),
        Some(dated(now - YEAR, now + 9 * YEAR)),
        Some(dated(now + YEAR, now + 11 * YEAR)),
    ] {
        match bad {
            Some(bytes) => fs::write(&at, bytes).unwrap(),
            None => fs::remove_file(&at).unwrap(),
        }
        assert_eq!(Identity::load(dir.path()).unwrap().pin(), made.pin());
        let again = fs::read(&at).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap().pin(), made.pin());
        assert_eq!(fs::read(&at).unwrap(), again, "a good one stays");
        assert_eq!(mode(&at), 0o600);
    }
    assert_eq!(fs::read_to_string(dir.path().join(KEY)).unwrap(), key);
}

#[test]
fn a_damaged_key_is_refused_and_never_replaced() {
    let dir = dir();
    Identity::create(dir.path()).unwrap();
    let at = dir.path().join(KEY);
    for (bad, too_long) in [(b"nonsense".to_vec(), false), (Vec::new(), false), (vec![b'x'; 1 << 20], true)] {
        fs::write(&at, &bad).unwrap();
        for error in
            [Identity::load(dir.path()).unwrap_err(), Identity::load_or_create(dir.path()).unwrap_err()]
        {
            match error {
                IdentityError::Files(PrivateFileError::TooLong { .. }) => assert!(too_long),
                IdentityError::Pem { file: KEY, .. } => assert!(!too_long),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(fs::read(&at).unwrap(), bad);
    }
}

#[test]
fn an_identity_has_one_spelling_and_shows_no_key() {
    let identity = identity();
    let text = identity.pin().to_string();
    assert_eq!(text.len(), 7 + 64);
    assert_eq!(text.parse(), Ok(*identity.pin()));
    let upper = text.to_uppercase().replacen("SHA256", "sha256", 1);
    for wrong in ["", "sha256:", &text[1..], &text[..70], &format!("{text}0"), &upper, "sha256:\u{e9}"] {
        assert_eq!(wrong.parse::<PeerIdentity>(), Err(ParsePeerIdentityError), "{wrong}");
    }
    assert_eq!(format!("{identity:?}"), format!("Identity {{ pin: {text}, .. }}"));
}
