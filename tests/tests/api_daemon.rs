//! The daemon beside its API: configuration with its sources, systemd's sockets and readiness, the end of
//! streams.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use mirrorvm_tests::{Daemon, Request, daemon_binary, repository, until};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::{Value, json};

fn config(arguments: &[&str], environment: &[(&str, &str)]) -> (bool, String, String) {
    let output = Command::new(daemon_binary())
        .args(["config", "--json"])
        .args(arguments)
        .env_remove("MIRRORVM_STATE_DIR")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn each_value_says_where_it_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    let text = "name = \"f\"\npeer_listen = \"127.0.0.1:1\"\nmetrics_listen = [\"unix:/m\", \"tcp:127.0.0.1:0\"]\n[limits]\nstreams = 7\n";
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let environment = [("MIRRORVM_PEER_LISTEN", "127.0.0.1:2"), ("MIRRORVM_LIMITS_CONNECTIONS", "9")];
    let (good, out, err) = config(&["--config", file, "--state-dir", "/x"], &environment);
    assert!(good, "{err}");
    let settings: Vec<Value> = serde_json::from_str(&out).unwrap();
    let of = |name: &str| {
        let s = settings.iter().find(|s| s["name"] == name).unwrap();
        (s["value"].as_str().unwrap_or("-").to_owned(), s["source"].as_str().unwrap().to_owned())
    };
    for (name, value, source) in [
        ("state_dir", "/x", "flag"),
        ("name", "f", "file"),
        ("peer_listen", "127.0.0.1:2", "environment"),
        ("metrics_listen", "unix:/m, tcp:127.0.0.1:0", "file"),
        ("limits.streams", "7", "file"),
        ("limits.connections", "9", "environment"),
        ("limits.drain_seconds", "10", "default"),
        ("listen", "-", "default"),
        ("socket", "unix:/x/mirrorvmd.sock", "flag"),
        ("advertise", "127.0.0.1:2", "default"),
        ("confine", "enforce", "default"),
    ] {
        assert_eq!(of(name), (value.to_owned(), source.to_owned()), "{name}");
    }
    // Nobody gave any: what would be used is shown all the same, and never a dash.
    let output = Command::new(daemon_binary())
        .arg("config")
        .env_clear()
        .envs([("HOME", "/h"), ("MIRRORVM_LISTEN", "tcp:127.0.0.1:0"), ("MIRRORVM_DEFAULT_SOCKET", "false")])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |name: &str| {
        let line = text.lines().find(|l| l.split_whitespace().next() == Some(name)).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let own =
        if rustix::process::geteuid().is_root() { "/var/lib/mirrorvm" } else { "/h/.local/state/mirrorvm" };
    let node = rustix::system::uname().nodename().to_string_lossy().into_owned();
    for (name, value, source) in [
        ("state_dir", own, "default"),
        ("name", &node, "default"),
        ("listen", "tcp:127.0.0.1:0", "environment"),
        ("default_socket", "false", "environment"),
        ("socket", "none", "environment"),
        ("peer_listen", "none", "default"),
        ("tls.key", "none", "default"),
    ] {
        assert_eq!(line(name), [value, source], "{text}");
    }
    assert!(!text.lines().any(|l| l.split_whitespace().nth(1) == Some("-")), "{text}");
    let places = [("MIRRORVM_METRICS_LISTEN", "unix:/e")];
    for (flags, value, source) in
        [(&[][..], "unix:/e", "environment"), (&["--metrics-listen", "unix:/f"], "unix:/f", "flag")]
    {
        let (good, out, err) = config(&[&["--config", file], flags].concat(), &places);
        assert!(good, "{err}");
        let settings: Vec<Value> = serde_json::from_str(&out).unwrap();
        let found = settings.iter().find(|s| s["name"] == "metrics_listen").unwrap();
        assert_eq!((&found["value"], &found["source"]), (&json!(value), &json!(source)));
    }
    for (text, named) in [
        ("colour = 1", "colour"),
        ("[limits]\nstreams = 99999999", "limits.streams"),
        ("listen = [\"tcp:0.0.0.0:1\"]", "listen"),
        ("metrics_listen = [\"tcp:0.0.0.0:1\"]", "metrics_listen"),
        ("metrics_listen = [\"tls:127.0.0.1:1\"]", "metrics_listen"),
        ("metrics_listen = [\"systemd\"]", "metrics_listen"),
    ] {
        std::fs::write(file, text).unwrap();
        let (good, _, err) = config(&["--config", file], &[]);
        assert!(!good && (err.contains(named)), "{text}: {err}");
    }
    // The example has every key, and says nothing but defaults.
    let example = repository().join("server/systemd/mirrorvmd.toml");
    let (good, out, err) = config(&["--config", example.to_str().unwrap()], &[]);
    assert!(good, "{err}");
    assert!(!out.contains("\"file\""), "{out}");
    let text = std::fs::read_to_string(example).unwrap();
    for setting in serde_json::from_str::<Vec<Value>>(&out).unwrap() {
        // Where the state directory is decides where its socket is: shown, and no key.
        if setting["name"] == "socket" {
            continue;
        }
        let key = setting["name"].as_str().unwrap().rsplit('.').next().unwrap().to_owned();
        assert!(text.contains(&format!("# {key} = ")), "{key} is not in the example");
    }
}

#[test]
fn the_service_manager_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut d = Daemon::start_with("a", &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    let told = || {
        let mut buffer = [0; 256];
        let read = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..read]).into_owned()
    };
    assert!(told().contains("READY=1"));
    assert!(d.terminate().success());
    assert!(told().contains("STOPPING=1"));
}

#[test]
fn sockets_of_the_service_manager_are_served() {
    let Some(activate) = ["/usr/bin", "/bin"]
        .iter()
        .map(|d| format!("{d}/systemd-socket-activate"))
        .find(|p| std::path::Path::new(p).is_file())
    else {
        println!("SKIPPED (no systemd-socket-activate): sockets of the service manager");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let mut manager = Command::new(activate)
        .arg("-l")
        .arg(&socket)
        .arg(daemon_binary())
        .args(["serve", "--listen", "systemd", "--state-dir"])
        .arg(dir.path().join("state"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("the socket", 20, || socket.exists());
    // The first connection starts the daemon, and is served.
    until("an answer", 30, || {
        Request::new("GET", "/readyz").try_send(&socket).is_ok_and(|r| r.status == 200)
    });
    let who = Request::new("GET", "/v1/whoami").send(&socket).json();
    assert_eq!(who["method"], "local_user");
    manager.kill().unwrap();
    manager.wait().unwrap();
}

#[test]
fn the_program_and_its_daemon_say_which_build_they_are() {
    let d = Daemon::start("a");
    let version = d.read("/v1/version");
    let build = &version["build"];
    let (code, said, _) = d.command_line(&["--version"]);
    assert_eq!(code, 0);
    let profile = if build["release"] == true { "release" } else { "debug" };
    let commit = match build["commit"].as_str().unwrap() {
        "unknown" => "an unknown commit".to_owned(),
        commit => format!("commit {commit}"),
    };
    let api = version["api_version"].as_str().unwrap();
    let wanted = format!(
        "mirrorvmd {} ({profile} build of {commit}, API {api})\n",
        build["version"].as_str().unwrap()
    );
    assert_eq!(said, wanted);
}

/// The protocol of sd_listen_fds(3) by hand, so that it is tested without systemd, too.
#[test]
fn a_socket_that_is_passed_on_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // The shell has the pid that the daemon will have.
    let script = "exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
    let mut daemon = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(daemon_binary())
        .args(["serve", "--listen", "systemd", "--state-dir"])
        .arg(dir.path().join("state"))
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("an answer", 30, || {
        Request::new("GET", "/readyz").try_send(&socket).is_ok_and(|r| r.status == 200)
    });
    assert_eq!(Request::new("GET", "/v1/whoami").send(&socket).json()["method"], "local_user");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn the_units_are_what_systemd_takes() {
    let Some(analyze) = ["/usr/bin/systemd-analyze", "/bin/systemd-analyze"]
        .into_iter()
        .find(|p| std::path::Path::new(p).is_file())
    else {
        println!("SKIPPED (no systemd-analyze): the units");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let units = repository().join("server/systemd");
    let service = std::fs::read_to_string(units.join("mirrorvmd.service")).unwrap();
    let installed = "ExecStart=/usr/bin/mirrorvmd ";
    assert!(service.contains(installed), "where it is installed");
    let here = service.replace(installed, &format!("ExecStart={} ", daemon_binary().display()));
    std::fs::write(dir.path().join("mirrorvmd.service"), &here).unwrap();
    std::fs::copy(units.join("mirrorvmd.socket"), dir.path().join("mirrorvmd.socket")).unwrap();
    let verify = || {
        let output = Command::new(analyze)
            .args(["verify", "--man=no"])
            .args(["mirrorvmd.service", "mirrorvmd.socket"].map(|u| dir.path().join(u)))
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // Of units of this machine that ours pulls in nothing is asked here.
    let ours =
        |text: &str| text.lines().filter(|l| l.contains("mirrorvmd")).map(str::to_owned).collect::<Vec<_>>();
    let (_, said) = verify();
    assert_eq!(ours(&said), [] as [String; 0], "{said}");
    // And it does look.
    std::fs::write(dir.path().join("mirrorvmd.service"), here.replace("Type=notify", "Type=nothing"))
        .unwrap();
    let (_, said) = verify();
    assert!(!ours(&said).is_empty(), "{said}");
}

#[test]
fn without_a_service_manager_its_sockets_are_a_named_error() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(daemon_binary())
        .args(["serve", "--listen", "systemd", "--state-dir"])
        .arg(dir.path().join("state"))
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && err.contains("service manager"), "{err}");
}

#[test]
fn both_documents_are_printed_as_they_are_served() {
    let d = Daemon::start("a");
    for (version, path) in [("3.1", "/v1/openapi.json"), ("3.0", "/v1/openapi-3.0.json")] {
        let output = Command::new(daemon_binary()).args(["openapi", "--version", version]).output().unwrap();
        assert_eq!(output.stdout, d.get(path).expect(200).body, "{version}");
    }
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let run = |arguments: &[&str]| {
        let output = Command::new(daemon_binary()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]);
        assert!(script.contains("peer-listen") && script.contains("selftest"), "{shell}");
    }
    let bash = Command::new("bash").args(["-n", "-c", &run(&["completions", "bash"])]).status();
    assert!(bash.map_or(true, |status| status.success()), "a shell takes it");
    let page = run(&["man"]);
    assert!(page.contains(".TH mirrorvmd 1") && page.contains("serve"), "{page}");
    let dir = tempfile::tempdir().unwrap();
    let _ = run(&["man", dir.path().to_str().unwrap()]);
    let pages: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for page in ["mirrorvmd.1", "mirrorvmd-serve.1", "mirrorvmd-state-check.1"] {
        assert!(pages.contains(&page.to_owned()), "{page} is not among {pages:?}");
    }
    // What the daemon starts for itself is nobody's command.
    assert!(!pages.iter().any(|page| page.contains("launcher")), "{pages:?}");
}

#[test]
fn what_prints_and_ends_does_not_mind_that_nobody_reads_on() {
    for arguments in [&["openapi"][..], &["config"], &["config", "--json"]] {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let output = Command::new(daemon_binary()).args(arguments).stdout(writer).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.is_empty(), "{arguments:?}: {} {said}", output.status);
    }
    // What cannot be written for another reason is a failure.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(daemon_binary()).arg("openapi").stdout(full).output().unwrap();
    assert!(!output.status.success() && !output.stderr.is_empty());
}

#[test]
fn a_log_on_a_terminal_has_no_colours_where_nobody_wants_any() {
    for (no_color, coloured) in [("", true), ("1", false)] {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let stderr = std::fs::OpenOptions::new().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(daemon_binary())
            .args(["serve", "--exit-with-stdin", "--state-dir"])
            .arg(dir.path().join("state"))
            .env("NO_COLOR", no_color)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        assert!(ready.starts_with("ready"), "{ready}");
        drop(child.stdin.take());
        let mut log = Vec::new();
        // It ends as an error when the last one that could write is gone.
        let _ = std::fs::File::from(terminal).read_to_end(&mut log);
        assert!(child.wait().unwrap().success());
        let log = String::from_utf8_lossy(&log);
        assert!(log.contains("INFO") && log.contains('\u{1b}') == coloured, "{no_color:?}: {log:?}");
    }
}

#[test]
fn counters_alone_on_a_socket_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let place = format!("unix:{},tcp:127.0.0.1:0", path.display());
    let d = Daemon::start_with("a", &[("MIRRORVM_METRICS_LISTEN", &place)]);
    let of = |target: &str| Request::new("GET", target).try_send(&path).unwrap();
    let metrics = of("/metrics");
    assert_eq!(metrics.status, 200);
    assert!(
        metrics.text().contains("mirrorvm_") && metrics.text().ends_with("# EOF\n"),
        "{}",
        metrics.text()
    );
    assert_eq!((of("/livez").text().as_str(), of("/readyz").text().as_str()), ("ok\n", "ok\n"));
    // Nothing else is there, for anybody, and nothing can be changed.
    for target in ["/v1/guests", "/v1/host", "/v1/openapi.json", "/docs", "/"] {
        let reply = of(target);
        assert_eq!((reply.status, reply.problem().as_str()), (404, "route_not_found"), "{target}");
    }
    let reply = Request::new("POST", "/metrics").try_send(&path).unwrap();
    assert_eq!((reply.status, reply.problem().as_str()), (405, "method_not_allowed"));
    // The API is where it was, and the one on TCP answers as well.
    let _ = d.get("/v1/guests").expect(200);
    let address = d.ready.split_whitespace().find_map(|w| w.strip_prefix("metrics:tcp:")).unwrap();
    assert_eq!(Request::new("GET", "/livez").send_tcp(address).expect(200).text(), "ok\n");
}
