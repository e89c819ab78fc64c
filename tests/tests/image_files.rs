//! Files that definitions of guests name: from listed directories alone, whatever the name says.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use mirrorvm_tests::{Daemon, children, kvm, linux_guest, qemu_binary};
use serde_json::{Value, json};

struct Place {
    _dir: tempfile::TempDir,
    images: PathBuf,
    outside: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let (images, outside) = (root.join("images"), root.join("outside"));
    std::fs::create_dir(&images).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(images.join("kernel"), "kernel").unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    Place { _dir: dir, images, outside }
}

fn daemon(name: &str, images: &Path) -> Daemon {
    Daemon::start_with(name, &[("MIRRORVM_IMAGE_DIRECTORIES", images.to_str().unwrap())])
}

fn guest(kernel: &Path, initrd: Option<&Path>, mib: u64) -> Value {
    json!({
        "name": "q",
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": kernel, "initrd": initrd,
            "append": "console=ttyS0 no_timer_check quiet panic=-1"},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": mib << 20, "gpa": 0}]},
    })
}

fn refusal(d: &Daemon, body: &Value) -> (String, String) {
    let problem = d.post("/v1/guests", body).expect(422).json();
    let error = &problem["errors"][0];
    (error["pointer"].as_str().unwrap().to_owned(), error["code"].as_str().unwrap().to_owned())
}

#[test]
fn a_definition_names_no_file_outside_the_listed_directories() {
    let p = place();
    let d = daemon("a", &p.images);
    let good = p.images.join("kernel");
    symlink(p.outside.join("secret"), p.images.join("link")).unwrap();
    symlink("/proc/self/root", p.images.join("root")).unwrap();
    let secret = p.outside.join("secret");
    for bad in [
        secret.clone(),
        p.images.join("../outside/secret"),
        p.images.join("link"),
        p.images.join("root").join(secret.strip_prefix("/").unwrap()),
        "/etc/shadow".into(),
        "/proc/self/environ".into(),
        "/dev/fd/0".into(),
        d.directory().join("state/identity/host-key.pem"),
        d.directory().join("state/mirrorvm.db"),
    ] {
        let outside = "outside_image_directories".to_owned();
        assert_eq!(
            refusal(&d, &guest(&bad, None, 64)),
            ("/driver/kernel".into(), outside.clone()),
            "{bad:?}"
        );
        assert_eq!(refusal(&d, &guest(&good, Some(&bad), 64)), ("/driver/initrd".into(), outside), "{bad:?}");
    }
    for (bad, code) in [(p.images.clone(), "not_a_file"), (p.images.join("none"), "not_a_file")] {
        assert_eq!(refusal(&d, &guest(&bad, None, 64)), ("/driver/kernel".into(), code.into()));
    }
    assert_eq!(d.items("/v1/guests"), [] as [Value; 0]);
    let _ = d.post("/v1/guests", &guest(&good, None, 64)).expect(201);
}

#[test]
fn without_a_listed_directory_no_definition_names_a_file() {
    let p = place();
    let d = Daemon::start_with("a", &[("MIRRORVM_IMAGE_DIRECTORIES", "")]);
    let code = refusal(&d, &guest(&p.images.join("kernel"), None, 64)).1;
    assert_eq!(code, "no_image_directory");
}

#[test]
fn what_is_larger_than_the_guest_is_refused_where_it_is_named() {
    let p = place();
    let d = daemon("a", &p.images);
    let big = p.images.join("big");
    std::fs::File::create(&big).unwrap().set_len(2 << 20).unwrap();
    let found = refusal(&d, &guest(&p.images.join("kernel"), Some(&big), 1));
    assert_eq!(found, ("/driver/initrd".into(), "too_large".into()));
    // Kernels and their disks are loaded above the first MiB.
    let found = refusal(&d, &guest(&p.images.join("kernel"), Some(&p.images.join("kernel")), 1));
    assert_eq!(found, ("/driver/initrd".into(), "too_large".into()));
}

#[test]
fn a_guest_starts_with_the_very_files_that_it_was_defined_with() {
    if qemu_binary().is_none() || !kvm() {
        println!("SKIPPED (no qemu): a guest starts with its files");
        return;
    }
    let linux = linux_guest();
    let p = place();
    for name in ["vmlinuz", "initrd.gz"] {
        std::fs::copy(linux.join(name), p.images.join(name)).unwrap();
        // Nobody but the daemon can read them: QEMU is given copies.
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(p.images.join(name), private).unwrap();
    }
    let d = daemon("a", &p.images);
    let (kernel, initrd) = (p.images.join("vmlinuz"), p.images.join("initrd.gz"));
    let _ = d.post("/v1/guests", &guest(&kernel, Some(&initrd), 256)).expect(201);
    let _ = d.act("/v1/guests/q/start").expect(202);
    d.guest_in("q", "running");
    let [qemu] = children(d.pid())[..] else { panic!("one QEMU") };
    let status = std::fs::read_to_string(format!("/proc/{qemu}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    if rustix::process::geteuid().is_root() {
        for name in ["Uid:", "Gid:"] {
            assert!(field(name).iter().all(|id| id != "0"), "{name} {:?}", field(name));
        }
        for name in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert!(field(name)[0].bytes().all(|b| b == b'0'), "{name} {:?}", field(name));
        }
    }
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    // Nothing on its command line is a file of the host.
    let line = std::fs::read(format!("/proc/{qemu}/cmdline")).unwrap();
    let line = String::from_utf8_lossy(&line).into_owned();
    assert!(!line.contains(p.images.to_str().unwrap()), "{line}");
    let _ = d.act("/v1/guests/q/stop").expect(202);
    d.guest_in("q", "stopped");

    // Another content under the same name is not what was asked for.
    std::fs::write(&kernel, "another kernel").unwrap();
    let _ = d.act("/v1/guests/q/start").expect(202);
    let guest = d.guest_in("q", "failed");
    assert_eq!(guest["error"]["code"], "boot_file_changed", "{guest}");
    assert!(children(d.pid()).is_empty());
}

#[test]
fn a_destination_opens_no_file_that_its_administrator_did_not_list() {
    if qemu_binary().is_none() || !kvm() {
        println!("SKIPPED (no qemu): a destination opens no file");
        return;
    }
    let linux = linux_guest();
    let p = place();
    let (a, b) = (Daemon::start("a"), daemon("b", &p.images));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    let body = guest(&linux.join("vmlinuz"), Some(&linux.join("initrd.gz")), 256);
    let defined = a.post("/v1/guests", &body).expect(201).json();
    let digest = |name: &str| {
        let path = linux.join(name);
        let said = std::process::Command::new("sha256sum").arg(&path).output().unwrap().stdout;
        let hex = String::from_utf8(said).unwrap().split(' ').next().unwrap().to_owned();
        json!({"size_bytes": path.metadata().unwrap().len(), "digest": format!("sha256:{hex}")})
    };
    assert_eq!(defined["boot"], json!({"kernel": digest("vmlinuz"), "initrd": digest("initrd.gz")}));
    let _ = a.act("/v1/guests/q/start").expect(202);
    a.guest_in("q", "running");
    let m = a.migrate(&mirrorvm_tests::migration("q", "b", "stop_and_copy"));
    let end = a.migration_end(&m);
    assert_eq!(end["state"], "failed", "{end}");
    assert!(end["error"]["detail"].as_str().unwrap().contains("/driver/kernel"), "{end}");
    assert_eq!(a.guest_state("q"), "running", "it goes on where it was");
    assert_eq!(b.items("/v1/guests"), [] as [Value; 0]);
}

#[test]
fn a_guest_goes_nowhere_where_it_would_boot_something_else_the_next_time() {
    if qemu_binary().is_none() || !kvm() {
        println!("SKIPPED (no qemu): a guest goes nowhere where it would boot something else");
        return;
    }
    let linux = linux_guest();
    let here = place();
    // Both hosts have their files there, as on a share; the guest keeps what it was defined with.
    for name in ["vmlinuz", "initrd.gz"] {
        std::fs::copy(linux.join(name), here.images.join(name)).unwrap();
    }
    let (a, b) = (daemon("a", &here.images), daemon("b", &here.images));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    let (kernel, initrd) = (here.images.join("vmlinuz"), here.images.join("initrd.gz"));
    let _ = a.post("/v1/guests", &guest(&kernel, Some(&initrd), 256)).expect(201);
    let _ = a.act("/v1/guests/q/start").expect(202);
    a.guest_in("q", "running");
    let go = || {
        let m = a.migrate(&mirrorvm_tests::migration("q", "b", "stop_and_copy"));
        a.migration_end(&m)
    };
    let whole = std::fs::read(&initrd).unwrap();
    std::fs::write(&initrd, &whole[..whole.len() / 2]).unwrap();
    let end = go();
    assert_eq!(
        (&end["state"], &end["error"]["code"]),
        (&json!("failed"), &json!("boot_file_differs")),
        "{end}"
    );
    let detail = end["error"]["detail"].as_str().unwrap();
    assert!(detail.contains("/driver/initrd") && detail.contains("sha256:"), "{detail}");
    assert_eq!(end["progress"]["downtime_ms"], Value::Null, "refused before the pause");
    assert_eq!(a.guest_state("q"), "running");
    assert_eq!(b.items("/v1/guests"), [] as [Value; 0]);
    std::fs::write(&initrd, &whole).unwrap();
    let end = go();
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(b.read("/v1/guests/q")["boot"], a.read("/v1/guests/q")["boot"]);
}

#[test]
fn what_qemu_says_when_it_does_not_start_is_in_the_guest_s_error() {
    if qemu_binary().is_none() || !kvm() {
        println!("SKIPPED (no qemu): what QEMU says");
        return;
    }
    let p = place();
    let d = daemon("a", &p.images);
    // No kernel at all; QEMU notices when it is to load a disk with it.
    let text = p.images.join("kernel");
    let _ = d.post("/v1/guests", &guest(&text, Some(&text), 64)).expect(201);
    let _ = d.act("/v1/guests/q/start").expect(202);
    let failed = d.guest_in("q", "failed");
    assert_eq!(failed["error"]["code"], "qemu_failed", "{failed}");
    let detail = failed["error"]["detail"].as_str().unwrap();
    assert!(detail.contains("QEMU ended with code 1: ") && detail.contains("kernel"), "{detail}");
    assert!(detail.len() < 700 && !detail.chars().any(char::is_control), "{detail:?}");
    assert!(children(d.pid()).is_empty());
    let users = &d.read("/v1/host/capabilities")["qemu"]["users"];
    assert_eq!(users.is_null(), !rustix::process::geteuid().is_root(), "{users}");
}
