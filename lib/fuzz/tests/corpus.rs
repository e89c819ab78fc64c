//! What lies in the corpora is run through its targets, and what of it was made is made again.
//!
//! `UPDATE_CORPUS=1` writes the seeds. What a search has found lies beside them as `found-…` and stays.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mirrorvm_fuzz::{TARGETS, Target};

fn corpus(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

fn files(target: &Target) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(corpus(target)).into_iter().flatten().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// What is random in a helper is not in a machine of the tests, so that seeds are the same every time.
fn seeds(target: &Target) -> BTreeMap<String, Vec<u8>> {
    let all = (target.seeds)();
    let named: BTreeMap<_, _> = all.iter().cloned().collect();
    assert_eq!(named.len(), all.len(), "{}: two seeds of one name", target.name);
    named
}

#[test]
fn seeds_are_those_that_are_made() {
    let update = std::env::var_os("UPDATE_CORPUS").is_some();
    let mut wrong = Vec::new();
    for target in &TARGETS {
        let (there, made) = (files(target), seeds(target));
        assert!(made.len() >= 15, "{}: {} seeds", target.name, made.len());
        let found = |name: &str| name.starts_with("found-");
        assert!(!made.keys().any(|name| found(name)));
        for name in there.keys().filter(|name| !found(name) && !made.contains_key(*name)) {
            if update {
                fs::remove_file(corpus(target).join(name)).unwrap();
            }
            wrong.push(format!("{}/{name} is not made any more", target.name));
        }
        for (name, bytes) in made.iter().filter(|(name, bytes)| there.get(*name) != Some(bytes)) {
            if update {
                fs::create_dir_all(corpus(target)).unwrap();
                fs::write(corpus(target).join(name), bytes).unwrap();
            }
            wrong.push(format!("{}/{name} is another", target.name));
        }
    }
    assert!(update || wrong.is_empty(), "UPDATE_CORPUS=1 writes them: {wrong:#?}");
}

#[test]
fn whatever_lies_in_a_corpus_breaks_no_promise() {
    let mut broken = Vec::new();
    for target in &TARGETS {
        let files = files(target);
        assert!(!files.is_empty(), "{} has no corpus", target.name);
        for (name, bytes) in files {
            if std::panic::catch_unwind(|| (target.run)(&bytes)).is_err() {
                broken.push(format!("{}/{name}", target.name));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_target_has_a_program_and_a_corpus() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(here.join("Cargo.toml")).unwrap();
    let mut programs: Vec<String> = fs::read_dir(here.join("fuzz_targets"))
        .unwrap()
        .map(|e| e.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    let mut names: Vec<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    names.sort();
    programs.sort();
    assert_eq!(programs, names);
    for name in names {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is no program");
    }
}
