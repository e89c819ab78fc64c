//! Row 57: links in place of the files of the daemon.

use super::*;

/// How a daemon ends that does not come to serving: whether it did, and what it said.
fn refused_start(arguments: &[&std::ffi::OsStr]) -> (bool, String) {
    let mut child = Command::new(daemon_binary())
        .arg("serve")
        .args(arguments)
        .env_remove("MIRRORVM_STATE_DIR")
        .stdin(Stdio::piped())
        .arg("--exit-with-stdin")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // One that serves after all would end here, in order.
    let stdin = child.stdin.take();
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        mirrorvm_tests::until_some("the end of a start that must fail", 20, || child.try_wait().unwrap())
    }));
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    (ended.is_ok_and(|s| !s.success()), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn row_57_links_in_place_of_the_daemons_files_are_refused_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let start = |state: &Path, more: &[&str]| {
        let mut words = vec!["--state-dir".as_ref(), state.as_os_str()];
        words.extend(more.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
        refused_start(&words)
    };
    let make = |path: PathBuf| {
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        path
    };
    // The state directory is a link, to an empty directory and to nowhere: refused, and nothing is made at
    // its end.
    let target = make(at("elsewhere"));
    symlink(&target, at("state-link")).unwrap();
    let (refused, said) = start(&at("state-link"), &[]);
    assert!(refused, "{said}");
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0, "something was made where the link led");
    symlink(at("nowhere"), at("dangling")).unwrap();
    let (refused, said) = start(&at("dangling"), &[]);
    assert!(refused && !at("nowhere").exists(), "{said}");
    // One that others may write.
    let open = make(at("open"));
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    let (refused, said) = start(&open, &[]);
    assert!(refused, "{said}");

    // Of a daemon that has run, each file in turn is a symbolic link to, or a second name of, the file
    // itself.
    let mut d = Daemon::start("a");
    assert!(d.terminate().success());
    for file in ["mirrorvm.db", "identity", "identity/host-key.pem", "identity/host-certificate.pem"] {
        let path = d.state_dir().join(file);
        let away = d.directory().join("away");
        std::fs::rename(&path, &away).unwrap();
        symlink(&away, &path).unwrap();
        let (refused, said) = start(&d.state_dir(), &[]);
        assert!(refused, "{file} as a symbolic link: {said}");
        std::fs::remove_file(&path).unwrap();
        if away.is_file() {
            std::fs::hard_link(&away, &path).unwrap();
            let (refused, said) = start(&d.state_dir(), &[]);
            assert!(refused, "{file} with a second name: {said}");
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::rename(&away, &path).unwrap();
    }
    // The socket's path, and its lock's.
    let victim = at("victim");
    std::fs::write(&victim, "precious").unwrap();
    for (what, name) in [("socket", "s"), ("lock", "s.lock")] {
        for hard in [false, true] {
            if hard && what == "lock" {
                // Opened, never written: a second name of it does no harm.
                continue;
            }
            let place = at(name);
            if hard {
                std::fs::hard_link(&victim, &place).unwrap()
            } else {
                symlink(&victim, &place).unwrap()
            }
            let listen = format!("unix:{}", at("s").display());
            let (refused, said) = start(&d.state_dir(), &["--listen", &listen]);
            assert!(refused, "{what}, hard: {hard}: {said}");
            assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
            std::fs::remove_file(&place).unwrap();
        }
        let _ = std::fs::remove_file(at("s.lock"));
    }
    // And it was nothing else: as it was, it starts, with the identity that it had.
    d.restart();
    let _ = d.get("/readyz").expect(200);
}
