//! A host's identity over restarts: it is lost only by somebody's decision, and no date ends it.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, SystemTime};

use mirrorvm_tests::{Daemon, daemon_binary, embedded, migration, until};
use serde_json::{Value, json};

fn key(d: &Daemon) -> PathBuf {
    d.state_dir().join("identity/host-key.pem")
}

fn certificate(d: &Daemon) -> PathBuf {
    d.state_dir().join("identity/host-certificate.pem")
}

fn emulated(name: &str) -> Value {
    let mut guest = embedded(name, 8, 0);
    guest["driver"]["kind"] = json!("emulated");
    guest
}

#[test]
fn a_host_whose_key_is_gone_does_not_become_another_one_by_itself() {
    let mut d = Daemon::start("a");
    let _ = d.post("/v1/guests", &emulated("g")).expect(201);
    let was = d.identity.clone();
    for what in ["key", "directory", "all at once, killed"] {
        if what == "all at once, killed" {
            d.kill();
        } else {
            assert!(d.terminate().success());
        }
        let kept = fs::read(key(&d)).unwrap();
        if what == "key" {
            fs::remove_file(key(&d)).unwrap();
        } else {
            fs::remove_dir_all(d.state_dir().join("identity")).unwrap();
        }
        let said = d.restart_refused();
        assert!(said.contains("identity accept") && said.contains(&was), "{what}: {said}");
        assert!(!key(&d).exists(), "{what}: a refused start made a key");
        fs::create_dir_all(d.state_dir().join("identity")).unwrap();
        let private =
            |path: PathBuf, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        private(d.state_dir().join("identity"), 0o700);
        fs::write(key(&d), kept).unwrap();
        private(key(&d), 0o600);
        // The certificate is made for the key that came back; `restart` checks that the identity is the same.
        d.restart();
        assert_eq!(d.read("/v1/guests/g")["name"], "g");
    }
}

#[test]
fn another_key_beside_the_database_is_noticed_and_taken_only_when_somebody_says_so() {
    let mut d = Daemon::start("a");
    let was = d.identity.clone();
    assert!(d.terminate().success());
    fs::remove_dir_all(d.state_dir().join("identity")).unwrap();
    let directory = d.state_dir().join("identity").to_string_lossy().into_owned();
    let (code, made, said) = d.command_line(&["identity", "init", &directory]);
    assert_eq!(code, 0, "{said}");
    let said = d.restart_refused();
    assert!(said.contains(&was) && said.contains(made.trim()), "{said}");
    let state = d.state_dir().to_string_lossy().into_owned();
    let (code, now, said) = d.command_line(&["identity", "accept", &state]);
    assert_eq!((code, &now), (0, &made), "{said}");
    assert!(said.contains(&was), "{said}");
    d.identity = made.trim().to_owned();
    d.restart();
    let audit = d.items("/v1/audit-log");
    let entry = audit.iter().find(|e| e["operation"] == "identity_accept").unwrap();
    let path = entry["path"].as_str().unwrap();
    assert!(path.contains(&was) && path.contains(made.trim()), "{entry}");
    // Not under a daemon that runs.
    let (code, _, said) = d.command_line(&["identity", "accept", &state]);
    assert!(code != 0 && said.contains("in use by another daemon"), "{said}");
    // With no key there one is made.
    assert!(d.terminate().success());
    fs::remove_file(key(&d)).unwrap();
    let (code, again, said) = d.command_line(&["identity", "accept", &state]);
    assert!(code == 0 && again != made, "{said}");
    d.identity = again.trim().to_owned();
    d.restart();
}

/// Gives the host of a daemon that does not run a certificate for its key with these dates.
fn date(d: &Daemon, from: SystemTime, until: SystemTime) {
    let pair = rcgen::KeyPair::from_pem(&fs::read_to_string(key(d)).unwrap()).unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.not_before = from.into();
    params.not_after = until.into();
    fs::write(certificate(d), params.self_signed(&pair).unwrap().pem()).unwrap();
}

#[test]
fn hosts_whose_certificates_are_out_of_date_start_and_migrate_between_each_other() {
    const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
    let (mut a, mut b) = (Daemon::start("a"), Daemon::start("b"));
    a.terminate();
    b.terminate();
    let now = SystemTime::now();
    // First started under a clock at the beginning of 2000, and long ago.
    date(&a, now - 26 * YEAR, now - 16 * YEAR);
    date(&b, now + YEAR, now + 11 * YEAR);
    a.restart();
    b.restart();
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    a.run_guest(&emulated("g"));
    let id = a.migrate(&migration("g", "b", "precopy"));
    let end = a.migration_end(&id);
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(b.read("/v1/guests/g")["state"], "running");
    until("the guest's end at a", 10, || a.read("/v1/guests/g")["moved_to"] == "b");
}

#[test]
fn a_host_is_named_by_the_rule_for_names_or_does_not_start() {
    let d = Daemon::start("a");
    let fresh = d.state_dir().with_file_name("another");
    let state = fresh.to_string_lossy();
    let long = "n".repeat(300);
    for name in ["", "x/y", "-x", "a b", long.as_str(), "0190a4c2-7b1e-7c00-8000-000000000000"] {
        let (code, _, said) = d.command_line(&["serve", "--state-dir", &state, &format!("--name={name}")]);
        assert!(
            code != 0 && said.contains("name is") && said.contains("1 to 64 characters"),
            "{name}: {said}"
        );
        assert!(!fresh.exists(), "{name}");
    }
}

#[test]
fn a_state_directory_behind_a_link_is_refused_with_where_the_link_leads() {
    let d = Daemon::start("a");
    let (link, target) = (d.state_dir().with_file_name("link"), d.state_dir().with_file_name("target"));
    std::os::unix::fs::symlink(&target, &link).unwrap();
    // Whether or not it leads anywhere.
    for made in [false, true] {
        if made {
            fs::create_dir(&target).unwrap();
        }
        let (code, _, said) = d.command_line(&["serve", "--state-dir", &link.to_string_lossy()]);
        let named = format!("{} is a symbolic link to {}", link.display(), target.display());
        assert!(code != 0 && said.contains(&named), "{said}");
        assert!(!(target.exists() && fs::read_dir(&target).unwrap().count() > 0));
    }
}

/// One `mirrorvmd identity pair`, by a daemon's socket.
struct Pairing {
    child: Child,
    input: ChildStdin,
    output: BufReader<std::process::ChildStdout>,
}

impl Pairing {
    fn of(d: &Daemon, more: &[&str]) -> Self {
        let mut child = Command::new(daemon_binary())
            .args(["identity", "pair", "--socket"])
            .arg(d.socket())
            .args(more)
            .env_remove("MIRRORVM_STATE_DIR")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    /// The code that it prints.
    fn code(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    fn give(&mut self, line: &str) {
        writeln!(self.input, "{}", line.trim()).unwrap();
    }

    /// Whether it did what it was for, and what it said.
    fn end(mut self) -> (bool, String) {
        drop(self.input);
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().success(), said)
    }
}

/// What is shown to be compared.
fn shown(said: &str) -> String {
    let line = said.lines().find_map(|l| l.strip_prefix("Both hosts show "));
    line.unwrap_or_else(|| panic!("{said}")).to_owned()
}

#[test]
fn two_codes_make_two_hosts_known_to_each_other() {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    // Twice: what is known already is no failure.
    for (yes, answers) in [(&[][..], "y"), (&["--yes"], "")] {
        let mut at_a = Pairing::of(&a, yes);
        let mut at_b = Pairing::of(&b, &[&["--answer"], yes].concat());
        at_b.give(&at_a.code());
        at_a.give(&at_b.code());
        if !answers.is_empty() {
            at_a.give(answers);
            at_b.give(answers);
        }
        let ((good_a, said_a), (good_b, said_b)) = (at_a.end(), at_b.end());
        assert!(good_a && good_b, "{said_a}\n{said_b}");
        assert_eq!(shown(&said_a), shown(&said_b));
        assert!(said_a.contains(&b.identity) && said_b.contains(&a.identity), "{said_a}\n{said_b}");
    }
    for (here, there) in [(&a, &b), (&b, &a)] {
        let record = here.read(&format!("/v1/hosts/{}", there.name));
        assert_eq!(
            (&record["identity"], &record["address"]),
            (&json!(there.identity), &json!(there.peer_address))
        );
        assert_eq!(here.items("/v1/hosts").len(), 1);
        // Each is let in by the other.
        let _ = here.get(&format!("/v1/hosts/{}/capabilities", there.name)).expect(200);
    }
}

#[test]
fn nobody_is_registered_who_did_not_see_the_code_or_was_not_confirmed() {
    let (a, b, c) = (Daemon::start("a"), Daemon::start("b"), Daemon::start("c"));
    // Whoever carries the codes puts another host's in: at each end it is another fingerprint.
    let (mut at_a, mut at_c) = (Pairing::of(&a, &[]), Pairing::of(&c, &[]));
    let (mut of_b, mut of_c) = (Pairing::of(&b, &["--answer"]), Pairing::of(&c, &["--answer"]));
    of_b.give(&at_c.code());
    let _ = of_b.code();
    of_c.give(&at_a.code());
    at_a.give(&of_c.code());
    at_a.give("n");
    of_b.give("n");
    let ((good_a, said_a), (good_b, said_b)) = (at_a.end(), of_b.end());
    assert!(!good_a && !good_b && said_a.contains("not confirmed"), "{said_a}\n{said_b}");
    assert_ne!(shown(&said_a), shown(&said_b));
    drop((at_c.end(), of_c.end()));

    // An answer to another code, three times.
    let (mut at_a, mut other) = (Pairing::of(&a, &["--yes"]), Pairing::of(&c, &["--yes"]));
    let mut of_b = Pairing::of(&b, &["--answer"]);
    let _ = at_a.code();
    of_b.give(&other.code());
    let answer = of_b.code();
    for _ in 0..3 {
        at_a.give(&answer);
    }
    let (good, said) = at_a.end();
    assert!(!good && said.contains("another code") && said.contains("begin again"), "{said}");
    let _ = (of_b.end(), other.end());
    for d in [&a, &b, &c] {
        assert_eq!(d.items("/v1/hosts").len(), 0, "{}", d.name);
    }
}

#[test]
fn an_identity_is_shown_and_stays_as_it_is() {
    let mut d = Daemon::start("a");
    let state = d.state_dir().to_string_lossy().into_owned();
    let show = |d: &Daemon, more: &[&str]| {
        let (code, text, said) = d.command_line(&[&["identity", "show", &state], more].concat());
        assert_eq!(code, 0, "{said}");
        text
    };
    let text = show(&d, &[]);
    for part in [d.identity.as_str(), "mirrorvm host", "9999-12-31", "host-key.pem", "host-certificate.pem"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let said: Value = serde_json::from_str(&show(&d, &["--json"])).unwrap();
    assert_eq!(said["identity"], d.identity.as_str());
    assert_eq!(said["key_path"], key(&d).to_string_lossy().as_ref());
    // Without a certificate the key counts; looking makes none.
    assert!(d.terminate().success());
    fs::remove_file(certificate(&d)).unwrap();
    assert!(show(&d, &[]).contains(&d.identity));
    assert!(!certificate(&d).exists());
    let (code, _, said) = d.command_line(&["identity", "show", "/nonexistent"]);
    assert!(code != 0 && said.contains("no host identity"), "{said}");
    d.restart();
}
