//! Row 61: whose code is part of this.

use super::*;

/// Whether an SPDX expression of `OR`, `AND` and brackets around the first is one that may be.
fn licence_is_good(expression: &str, allowed: &[&str]) -> bool {
    // The old way to write OR.
    let text = expression.replace(" / ", " OR ").replace('/', " OR ");
    text.split(" AND ").all(|part| {
        part.trim_matches(['(', ')', ' '])
            .split(" OR ")
            .any(|l| allowed.contains(&l.trim_matches(['(', ')', ' '])))
    })
}

#[test]
fn row_61_every_dependency_is_vetted() {
    let root = repository();
    let text = std::fs::read_to_string(root.join("deny.toml")).unwrap();
    let deny: toml::Table = text.parse().unwrap();
    let allowed: Vec<&str> =
        deny["licenses"]["allow"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
    let good = |expression: &str| licence_is_good(expression, &allowed);
    // And it does look.
    assert!(good("(MIT OR GPL-3.0) AND Unicode-3.0") && good("Apache-2.0/MIT"));
    assert!(!good("GPL-3.0-only") && !good("MIT AND SSPL-1.0") && !good(""));

    let list = std::fs::read_to_string(root.join("tests/vetted-dependencies.txt")).unwrap();
    let vetted: BTreeSet<&str> = list.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect();
    let lock: toml::Table = std::fs::read_to_string(root.join("Cargo.lock")).unwrap().parse().unwrap();
    let mut found = BTreeSet::new();
    for package in lock["package"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        match package.get("source").and_then(toml::Value::as_str) {
            // The workspace's own.
            None => assert!(name.starts_with("mirrorvm"), "{name} comes from a path"),
            Some(source) => {
                assert_eq!(source, "registry+https://github.com/rust-lang/crates.io-index", "{name}");
                assert!(package.get("checksum").is_some(), "{name} has no checksum");
                assert!(
                    vetted.contains(name),
                    "{name} is in Cargo.lock and not in tests/vetted-dependencies.txt"
                );
                found.insert(name);
            }
        }
    }
    let gone: Vec<_> = vetted.difference(&found).collect();
    assert!(gone.is_empty(), "vetted, and used no more: {gone:?}");

    // Licences are in the manifests, of which a build for this platform has all that it needs.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(&root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100);
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("");
        assert!(good(licence), "{} has the licence {licence:?}", package["name"]);
    }
}
