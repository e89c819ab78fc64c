//! Row 54: ids that are none.

use super::*;

/// Paths, sizes and times of change of everything below `dir`, but for what every request may write: the
/// database and what belongs to it.
fn listing(dir: &Path) -> BTreeSet<(PathBuf, u64, i64)> {
    let mut found = BTreeSet::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            let database = path.file_name().unwrap().to_string_lossy().starts_with("mirrorvm.");
            if meta.is_dir() {
                open.push(path.clone());
            }
            let (size, time) = if database {
                (0, 0)
            } else {
                (meta.len(), meta.mtime() * 1_000_000_000 + meta.mtime_nsec())
            };
            found.insert((path, size, time));
        }
    }
    found
}

#[test]
fn row_54_ids_that_are_none_reach_no_file() {
    let d = Daemon::start_with("a", &[HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    // Beside the state directory: what a climbing path would reach.
    std::fs::write(d.directory().join("secret"), "canary-of-row-54").unwrap();
    let document = document();
    let before = listing(&d.state_dir());
    let long = "x".repeat(300);
    let ids = [
        "..",
        ".",
        "../..",
        "../secret",
        "..%2f..%2fsecret",
        "%2e%2e",
        "%2e%2e%2fsecret",
        "%2e",
        "..%5c..%5csecret",
        "%2fetc%2fpasswd",
        "g1%00",
        "%00",
        "g1%0a",
        "g1%20",
        "%ff%fe",
        "%c0%ae%c0%ae%c0%afsecret",
        "g%D1%96",
        "%EF%BD%871",
        "g1%E2%80%8B",
        "G1",
        "g1;a=b",
        "g1%3f",
        "%25",
        "mirrorvm.db",
        "'%20or%201=1--",
        long.as_str(),
    ];
    let (mut sent, mut wrong) = (0, Vec::new());
    for (method, path, operation) in operations(&document) {
        let parameters: Vec<&str> =
            path.split('/').filter_map(|p| p.strip_prefix('{')?.strip_suffix('}')).collect();
        let body = body_of(&document, &operation);
        for at in &parameters {
            for id in ids {
                // The other parameters name what is there.
                let mut target = path.replace(&format!("{{{at}}}"), id);
                for other in &parameters {
                    target = target
                        .replace(&format!("{{{other}}}"), if *other == "guest" { "g1" } else { "ram0" });
                }
                let mut request = Request::new(&method, &target);
                match &body {
                    Some((kind, Value::Null)) => {
                        request = request.header("content-type", kind).body(vec![0; 64])
                    }
                    Some((kind, example)) => {
                        request = request.header("content-type", kind).body(example.to_string());
                    }
                    None => {}
                }
                let reply = d.send(&request);
                sent += 1;
                // An id that the caller chooses is a value like others.
                let refused = if method == "PUT" { 422 } else { 404 };
                if ![400, 404, refused].contains(&reply.status) || reply.text().contains("canary-of-row-54") {
                    wrong.push(format!("{method} {target:.80}: {} {:.200}", reply.status, reply.text()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {sent}:\n{}", wrong.len(), wrong.join("\n"));
    println!("{sent} requests");
    assert!(sent > 1000);
    assert_eq!(listing(&d.state_dir()), before, "a file was touched");
    assert_eq!(d.items("/v1/guests").len(), 1);
}
