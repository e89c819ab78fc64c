//! A host's state directory that somebody or something damaged: what was acknowledged is there, or the daemon
//! says what is missing and does not start.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use mirrorvm_tests::{Daemon, Request, embedded, migration, until};
use serde_json::{Value, json};

const FILES: [&str; 4] = ["mirrorvm.db", "mirrorvm.db-wal", "mirrorvm.db-shm", "mirrorvm.mark"];
const GUESTS: usize = 30;

fn emulated(name: &str) -> Value {
    let mut guest = embedded(name, 8, 0);
    guest["driver"]["kind"] = json!("emulated");
    guest
}

fn seeded() -> impl FnMut(usize) -> usize {
    let seed = std::env::var("MIRRORVM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random: u64 = seed.unwrap_or(0x6d69_7272_6f72);
    println!("seed {random} (MIRRORVM_TEST_SEED)");
    move |below| {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below.max(1) as u64) as usize
    }
}

fn files(state: &Path) -> BTreeMap<&'static str, Vec<u8>> {
    FILES.into_iter().filter_map(|name| Some((name, fs::read(state.join(name)).ok()?))).collect()
}

fn put(state: &Path, files: &BTreeMap<&'static str, Vec<u8>>) {
    for name in FILES {
        match files.get(name) {
            Some(bytes) => {
                fs::write(state.join(name), bytes).unwrap();
                fs::set_permissions(state.join(name), fs::Permissions::from_mode(0o600)).unwrap();
            }
            None => drop(fs::remove_file(state.join(name))),
        }
    }
}

#[test]
fn what_was_acknowledged_is_there_after_any_damage_or_the_daemon_says_what_is_missing() {
    let mut next = seeded();
    let mut d = Daemon::start("a");
    for n in 0..GUESTS {
        let _ = d.post("/v1/guests", &emulated(&format!("g{n}"))).expect(201);
    }
    d.kill();
    let state = d.state_dir();
    let good = files(&state);
    let directory = state.to_string_lossy().into_owned();
    let (mut whole, mut refused) = (0, 0);
    let removals = good.keys().map(|name| (*name, None));
    let random: Vec<(&str, Option<usize>)> = (0..14)
        .map(|_| {
            let names: Vec<&&str> = good.keys().filter(|name| !good[*name].is_empty()).collect();
            let name = names[next(names.len())];
            (*name, Some(next(good[name].len() * 8)))
        })
        .collect();
    for (round, (name, bit)) in removals.chain(random).enumerate() {
        let mut damaged = good.clone();
        match bit {
            None => drop(damaged.remove(name)),
            Some(bit) if round % 3 == 0 => damaged.get_mut(name).unwrap().truncate(bit / 8),
            Some(bit) => damaged.get_mut(name).unwrap()[bit / 8] ^= 1 << (bit % 8),
        }
        put(&state, &damaged);
        // The one that only looks says the same, and changes nothing.
        let (code, out, said) = d.command_line(&["state", "check", &directory]);
        let after = files(&state);
        // Without a log there is an empty one afterwards.
        let content = |files: &BTreeMap<&str, Vec<u8>>, f| files.get(f).cloned().unwrap_or_default();
        for file in ["mirrorvm.db", "mirrorvm.db-wal", "mirrorvm.mark"] {
            assert_eq!(
                content(&after, file),
                content(&damaged, file),
                "{name} {bit:?}: looking changed {file}"
            );
        }
        if code == 0 {
            whole += 1;
            assert!(out.starts_with("whole: "), "{out}");
            d.restart();
            let found = d.items("/v1/guests?limit=200");
            let names = |list: &[Value]| {
                let mut names: Vec<String> =
                    list.iter().map(|g| g["name"].as_str().unwrap().into()).collect();
                names.sort();
                names
            };
            let mut wanted: Vec<String> = (0..GUESTS).map(|n| format!("g{n}")).collect();
            wanted.sort();
            assert_eq!(names(&found), wanted, "{name} {bit:?}");
            d.kill();
        } else {
            refused += 1;
            let told = d.restart_refused();
            for said in [&said, &told] {
                let names_it = said.contains("mirrorvm.db") || said.contains("mirrorvm.mark");
                let helps =
                    said.contains("mirrorvmd state restore") || said.contains("not a mirrorvm database");
                assert!(names_it && helps, "{name} {bit:?}: {said}");
            }
        }
    }
    println!("{whole} whole, {refused} refused");
    assert!(refused >= 3, "the log, the database and the mark are each missed");
    put(&state, &good);
    d.restart();
    assert_eq!(d.items("/v1/guests?limit=200").len(), GUESTS);
}

#[test]
fn a_start_after_any_kill_is_a_healthy_one() {
    let mut next = seeded();
    let mut d = Daemon::start("a");
    let directory = d.state_dir().to_string_lossy().into_owned();
    let mut made = 0;
    for round in 0..6 {
        for _ in 0..next(12) {
            let _ = d.post("/v1/guests", &emulated(&format!("g{made}"))).expect(201);
            made += 1;
        }
        if round == 3 {
            assert!(d.terminate().success());
        } else {
            d.kill();
        }
        let (code, out, said) = d.command_line(&["state", "check", &directory]);
        assert!(code == 0 && out.starts_with("whole: "), "{said}");
        d.restart();
        assert_eq!(d.items("/v1/guests?limit=200").len(), made);
        let (code, out, said) = d.command_line(&["state", "check", &directory]);
        assert!(code == 0 && out.contains("a daemon has it open"), "{said}");
    }
}

fn state_of(d: &Daemon) -> String {
    d.state_dir().to_string_lossy().into_owned()
}

fn backup(d: &Daemon, name: &str) -> String {
    let file = d.state_dir().with_file_name(name).to_string_lossy().into_owned();
    let (code, _, said) = d.command_line(&["state", "backup", &state_of(d), &file]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    file
}

fn restore(d: &Daemon, file: &str) {
    let (code, _, said) = d.command_line(&["state", "restore", file, &state_of(d)]);
    assert!(code == 0 && said.contains("unconfirmed"), "{said}");
}

fn code_of_start(d: &Daemon, guest: &str) -> String {
    d.act(&format!("/v1/guests/{guest}/start")).expect(409).problem()
}

#[test]
fn after_a_restore_a_guest_starts_when_every_known_peer_was_asked_and_not_where_a_peer_has_it() {
    let (mut a, mut b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    for guest in ["goes", "goes-and-is-deleted", "stays"] {
        a.run_guest(&emulated(guest));
    }
    let file = backup(&a, "backup");
    // Not under a daemon that runs.
    let (code, _, said) = a.command_line(&["state", "restore", &file, &state_of(&a)]);
    assert!(code != 0 && said.contains("in use by another daemon"), "{said}");
    for guest in ["goes", "goes-and-is-deleted"] {
        let id = a.migrate(&migration(guest, "b", "precopy"));
        assert_eq!(a.migration_end(&id)["state"], "succeeded");
    }
    let _ = b.act("/v1/guests/goes-and-is-deleted/stop").expect(202);
    until("the guest to stop", 30, || b.read("/v1/guests/goes-and-is-deleted")["state"] == "stopped");
    let _ = b.delete("/v1/guests/goes-and-is-deleted").expect(204);
    assert!(a.terminate().success() && b.terminate().success());
    restore(&a, &file);
    // While b says nothing, nobody knows.
    a.restart();
    for guest in ["goes", "goes-and-is-deleted", "stays"] {
        assert_eq!(a.read(&format!("/v1/guests/{guest}"))["unconfirmed"], true);
        assert_eq!(code_of_start(&a, guest), "guest_unconfirmed");
        let there = a.post("/v1/migrations", &migration(guest, "b", "precopy"));
        assert_eq!(there.expect(409).problem(), "guest_unconfirmed");
    }
    a.kill();
    a.restart();
    assert_eq!(code_of_start(&a, "stays"), "guest_unconfirmed");
    b.restart();
    for guest in ["goes", "goes-and-is-deleted", "stays"] {
        let path = format!("/v1/guests/{guest}");
        until("all known peers to be asked", 60, || a.read(&path)["unconfirmed"] == false);
    }
    for guest in ["goes", "goes-and-is-deleted"] {
        assert_eq!(a.read(&format!("/v1/guests/{guest}"))["moved_to"], "b", "{guest}");
        assert_eq!(code_of_start(&a, guest), "guest_moved");
    }
    let _ = a.act("/v1/guests/stays/start").expect(202);
    assert!(a.items("/v1/audit-log").iter().any(|e| e["operation"] == "state_restore"));
}

/// Why a guest does not start, as its refusal says.
fn why_not(d: &Daemon, guest: &str) -> String {
    let refused = d.act(&format!("/v1/guests/{guest}/start")).expect(409);
    assert_eq!(refused.problem(), "guest_unconfirmed");
    refused.json()["blocked_reasons"].to_string()
}

#[test]
fn after_a_restore_a_guest_that_was_passed_on_is_where_it_went_or_nobody_starts_it() {
    let (mut a, b, c) = (Daemon::start("a"), Daemon::start("b"), Daemon::start("c"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    b.add_peer(&c, &c.peer_address);
    c.add_peer(&b, &b.peer_address);
    for guest in ["further", "back"] {
        a.run_guest(&emulated(guest));
    }
    let file = backup(&a, "backup");
    let goes = |from: &Daemon, guest: &str, to: &str| {
        let id = from.migrate(&migration(guest, to, "precopy"));
        let end = from.migration_end(&id);
        assert_eq!(end["state"], "succeeded", "{end}");
    };
    goes(&a, "further", "b");
    goes(&b, "further", "c");
    // There, here and there again: what b says last is what counts.
    goes(&a, "back", "b");
    goes(&b, "back", "a");
    goes(&a, "back", "b");
    goes(&b, "back", "c");
    // Whom b knows by that name today says nothing of where the guest went.
    let _ = b.delete("/v1/hosts/c").expect(204);
    assert!(a.terminate().success());
    restore(&a, &file);
    a.restart();
    for guest in ["further", "back"] {
        until("a has asked b", 60, || why_not(&a, guest).contains(&c.identity));
        let why = why_not(&a, guest);
        assert!(
            why.contains("b sent it on to the host with identity") && why.contains("no peer here"),
            "{why}"
        );
        let resumed = a.act(&format!("/v1/guests/{guest}/resume"));
        assert_eq!(resumed.expect(409).problem(), "guest_unconfirmed");
        let shown = a.read(&format!("/v1/guests/{guest}"));
        assert_eq!((&shown["unconfirmed"], &shown["moved_to"]), (&json!(true), &Value::Null));
    }
    // Known, it is asked itself.
    c.add_peer(&a, &a.peer_address);
    a.add_peer(&c, &c.peer_address);
    for guest in ["further", "back"] {
        let path = format!("/v1/guests/{guest}");
        until("c is asked", 60, || a.read(&path)["unconfirmed"] == false);
        assert_eq!(a.read(&path)["moved_to"], "c", "{guest}");
        assert_eq!(code_of_start(&a, guest), "guest_moved");
        assert_eq!(c.guest_state(guest), "running");
    }
}

/// An image that is like the built-in one and is not it.
fn other_image() -> Vec<u8> {
    let mut bytes = mirrorvm::mirror::HelperImage::built_in().bytes().to_vec();
    let text = |w: &[u8]| w.iter().all(u8::is_ascii_lowercase);
    let at = bytes.windows(8).rposition(text).unwrap();
    bytes[at] -= 32;
    bytes
}

fn upload(d: &Daemon, name: &str, bytes: &[u8]) -> mirrorvm_tests::Reply {
    let put = Request::new("PUT", &format!("/v1/helper-images/{name}/content"));
    d.send(&put.header("content-type", "application/octet-stream").body(bytes.to_vec()))
}

#[test]
fn helper_images_are_whole_named_or_brought_back() {
    let mut d = Daemon::start("a");
    let image = other_image();
    for name in ["full", "empty"] {
        let _ = d.post("/v1/helper-images", &json!({ "name": name })).expect(201);
    }
    let made = upload(&d, "full", &image).expect(200).json();
    assert_eq!((&made["state"], &made["error"]), (&json!("ready"), &Value::Null));
    let _ = d.post("/v1/guests", &emulated("g")).expect(201);
    let plan = json!({"strategy": {"kind": "shifted", "shift": {"kind": "4gib"}}, "helper_image": "full"});
    let plan_refused = |d: &Daemon| d.post("/v1/guests/g/address-space-plans", &plan).expect(409);
    let kept = backup(&d, "backup");
    let directory = d.state_dir().join("helper-images");
    let file = fs::read_dir(&directory).unwrap().next().unwrap().unwrap().path();
    let damages: [(&str, &str, &dyn Fn()); 4] = [
        ("content_changed", "not what was uploaded", &|| {
            let mut bad = image.clone();
            bad[image.len() / 2] ^= 1;
            fs::write(&file, bad).unwrap();
        }),
        ("content_changed", "not what was uploaded", &|| {
            fs::write(&file, &image[..image.len() - 1]).unwrap()
        }),
        ("content_missing", "missing", &|| fs::remove_file(&file).unwrap()),
        ("content_missing", "missing", &|| fs::remove_dir_all(&directory).unwrap()),
    ];
    for (round, (code, word, damage)) in damages.into_iter().enumerate() {
        // Under a daemon that runs, and while none does.
        if round % 2 == 1 {
            d.kill();
        }
        damage();
        let (status, _, said) = d.command_line(&["state", "check", &state_of(&d)]);
        assert!(status != 0 && said.contains("\"full\"") && said.contains(word), "{said}");
        let other = d.state_dir().with_file_name("other").to_string_lossy().into_owned();
        let (status, _, said) = d.command_line(&["state", "backup", &state_of(&d), &other]);
        assert!(status != 0 && said.contains("\"full\""), "{said}");
        assert!(!Path::new(&other).exists());
        if round % 2 == 1 {
            d.restart();
            assert!(d.log().contains("a helper image cannot be used"));
        }
        let shown = d.read("/v1/helper-images/full");
        assert_eq!((&shown["state"], &shown["error"]["code"]), (&json!("failed"), &json!(code)), "{shown}");
        assert!(d.items("/v1/helper-images").contains(&shown));
        assert_eq!(d.read("/v1/helper-images/empty")["state"], "empty");
        let refused = plan_refused(&d);
        assert_eq!(refused.problem(), "helper_image_failed", "{}", refused.text());
        assert!(refused.json()["detail"].as_str().unwrap().contains(word), "{}", refused.text());
        // Other content is not its content; the same is.
        let other = mirrorvm::mirror::HelperImage::built_in().bytes().to_vec();
        assert_eq!(upload(&d, "full", &other).expect(409).problem(), "state_conflict");
        let mended = upload(&d, "full", &image).expect(200).json();
        assert_eq!((&mended["state"], &mended["error"]), (&json!("ready"), &Value::Null));
        assert_eq!(d.read("/v1/helper-images/full"), made);
        assert_eq!(d.command_line(&["state", "check", &state_of(&d)]).0, 0);
    }
    d.kill();
    // What was uploaded comes back with the rest, also where nothing was.
    fs::remove_dir_all(&directory).unwrap();
    restore(&d, &kept);
    assert_eq!(d.command_line(&["state", "check", &state_of(&d)]).0, 0);
    d.restart();
    assert_eq!(d.read("/v1/helper-images/full"), made);
    assert_eq!(fs::read(&file).unwrap(), image);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn an_administrator_confirms_a_guest_that_a_lost_peer_says_nothing_about_and_the_audit_log_has_it() {
    let (mut a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    let _ = a.post("/v1/guests", &emulated("g")).expect(201);
    a.kill();
    drop(b);
    fs::remove_file(a.state_dir().join("mirrorvm.mark")).unwrap();
    let said = a.restart_refused();
    assert!(said.contains("mirrorvm.mark is missing") && said.contains("mirrorvmd state accept"), "{said}");
    let (code, _, said) = a.command_line(&["state", "accept", &state_of(&a)]);
    assert!(code == 0 && said.contains("mirrorvm.mark is missing"), "{said}");
    a.restart();
    assert_eq!(code_of_start(&a, "g"), "guest_unconfirmed");
    let confirm = "/v1/guests/g/confirm";
    let _ = a.post(confirm, &json!({ "confirm": "another" })).expect(422);
    assert_eq!(code_of_start(&a, "g"), "guest_unconfirmed");
    let shown = a.post(confirm, &json!({ "confirm": "g" })).expect(202).json();
    assert_eq!(shown["unconfirmed"], false);
    let _ = a.act("/v1/guests/g/start").expect(202);
    let audit = a.items("/v1/audit-log");
    for operation in ["state_accept", "guest_confirm"] {
        assert!(audit.iter().any(|e| e["operation"] == operation), "{operation}: {audit:?}");
    }
}

/// What a daemon of version 4 left, in the place of what is there.
fn put_version_4(state: &Path) {
    for name in FILES {
        let _ = fs::remove_file(state.join(name));
    }
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lib/tests/data/stored/v4");
    let database = rusqlite::Connection::open(state.join("mirrorvm.db")).unwrap();
    database.execute_batch(&fs::read_to_string(data.join("mirrorvm.sql")).unwrap()).unwrap();
    drop(database);
    fs::copy(data.join("mirrorvm.mark"), state.join("mirrorvm.mark")).unwrap();
    for name in ["mirrorvm.db", "mirrorvm.mark"] {
        fs::set_permissions(state.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
}

#[test]
fn the_state_of_the_last_landing_is_served_and_goes_back_by_its_backup() {
    let mut d = Daemon::start("a");
    d.terminate();
    let (state, path) = (d.state_dir(), state_of(&d));
    put_version_4(&state);
    // The key is another daemon's: by then the database has come forward, and that is said.
    let said = d.restart_refused();
    let backup = "mirrorvm.db.v4-62-e49b657c";
    for part in ["was of version 4 and is of version 7 now", backup, "state restore"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let accept = |d: &Daemon| {
        let (code, _, err) = d.command_line(&["identity", "accept", &path]);
        assert_eq!(code, 0, "{err}");
    };
    accept(&d);
    d.restart();
    let names = |d: &Daemon| -> Vec<String> {
        d.items("/v1/guests").iter().map(|g| g["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&d), ["embedded-1", "emulated-1", "sev-1", "qemu-1"]);
    assert!(d.items("/v1/guests").iter().all(|g| g["unconfirmed"] == false));
    assert_eq!(d.items("/v1/migrations").len(), 4);
    assert_eq!(d.items("/v1/hosts").len(), 2);
    assert_eq!(d.read("/v1/host")["labels"], json!({"site": "lab"}));
    // Entries that the last landing wrote, and those of this one.
    let audit = d.items("/v1/audit-log?limit=100");
    for operation in ["migration_create", "token_create", "identity_accept"] {
        assert!(audit.iter().any(|entry| entry["operation"] == operation), "{operation}: {audit:?}");
    }
    let _ = d.act("/v1/guests/sev-1/start").expect(202);
    d.guest_in("sev-1", "running");
    d.terminate();
    let (code, out, err) = d.command_line(&["state", "check", &path]);
    assert!(code == 0 && out.starts_with("whole"), "{out} {err}");
    restore(&d, &format!("{path}/{backup}"));
    accept(&d);
    d.restart();
    assert_eq!(names(&d).len(), 4);
    assert!(d.items("/v1/guests").iter().all(|g| g["unconfirmed"] == true && g["state"] == "stopped"));
}
