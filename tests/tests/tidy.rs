//! Rules of the house that run: what the architecture says of layers, heads, lists and comments is held by
//! the sources.
//!
//! Text alone: it reads the tree as a reviewer would, and builds nothing of its own. Exceptions are named
//! here, each with its reason; one that is not needed any more fails, too.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Modules of the library, lowest floor first: what is on a floor knows of nothing above it, nor of its
/// neighbours.
const FLOORS: [&[&str]; 14] = [
    &["addr", "chain", "codes", "named", "sync", "threads", "waiting", "private_files", "boot_files"],
    &["reading"],
    &["pages", "qemu"],
    &["address_space"],
    &["memory"],
    &["sev"],
    &["hypervisor"],
    &["guest"],
    &["mirror"],
    &["store"],
    &["transport"],
    &["migration"],
    &["host"],
    &["lib"],
];

/// Arrows that run up, and why they may still.
const UP: [(&str, &str, &str); 0] = [];

/// Circles between the files of a folder, and why they may be.
const CIRCLES: [(&str, &str, &str); 6] = [
    ("address_space", "plan", "the planner hands over to strategies, which draft with it"),
    ("guest", "embedded/vcpu", "a vCPU hands ports over, and ports stop vCPUs"),
    ("hypervisor", "emulated/vcpu", "a vCPU of the software machine runs in its VM, which makes it"),
    ("sev", "model/context", "commands change contexts, which refuse in the commands' words"),
    ("transport", "identity", "TLS has the identity's certificate, the identity the names that TLS knows"),
    ("transport", "link", "a link gives its place at the listener back"),
];

/// Functions that map a closed list of ours, and must not swallow a new entry.
const TABLES: [(&str, &str); 15] = [
    ("server/src/problem/host_error.rs", "fn from"),
    ("lib/src/codes/any.rs", "fn as_str"),
    ("lib/src/host/codes/mod.rs", "fn codes_of"),
    ("lib/src/host/codes/mod.rs", "fn of_trouble"),
    ("lib/src/host/codes/mod.rs", "fn of_silence"),
    ("lib/src/host/codes/mod.rs", "fn of_machine"),
    ("lib/src/host/codes/mod.rs", "fn of_end"),
    ("lib/src/host/subject.rs", "fn fmt"),
    ("lib/src/host/migrations/findings.rs", "fn findings"),
    ("lib/src/migration/error.rs", "fn code"),
    ("lib/src/migration/error.rs", "fn of_connecting"),
    ("lib/src/address_space/strategy.rs", "fn facts"),
    ("lib/src/address_space/strategy.rs", "fn kind"),
    ("lib/src/address_space/strategy.rs", "fn via"),
    ("lib/src/store/writer.rs", "fn trouble"),
];

/// As in rustfmt.toml.
const WIDTH: usize = 110;

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

struct Source {
    /// From the top of the tree.
    path: String,
    text: String,
}

impl Source {
    /// Without comments, literals of text, and tests in the file.
    fn code(&self) -> String {
        let lines = self.text.lines().take_while(|l| !l.starts_with("#[cfg(test)]"));
        lines.filter(|l| !l.trim_start().starts_with("//")).fold(String::new(), |all, l| all + l + "\n")
    }

    /// Paths from `crate`, `self` or `super` on.
    fn paths(&self) -> BTreeSet<Vec<String>> {
        let (code, mut found) = (self.code(), BTreeSet::new());
        for start in ["crate::", "self::", "super::"] {
            for (at, _) in code.match_indices(start) {
                if !code[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':') {
                    take_path(&code[at..], &[], &mut found);
                }
            }
        }
        found
    }

    /// Modules that follow `start` in a path or in a list of paths.
    fn names_after(&self, start: &str) -> BTreeSet<String> {
        let (code, mut found) = (self.code(), BTreeSet::new());
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        for (at, _) in code.match_indices(start) {
            // `super::` within `super::super::`, and `mirrorvm_crate::`.
            if code[..at].ends_with(|c: char| is_word(c) || c == ':') {
                continue;
            }
            let rest = &code[at + start.len()..];
            if let Some(list) = rest.strip_prefix('{') {
                let (mut depth, mut first) = (0, true);
                for (i, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' => first = depth == 0,
                        c if is_word(c) && first => {
                            found.insert(list[i..].chars().take_while(|c| is_word(*c)).collect());
                            first = false;
                        }
                        _ => {}
                    }
                }
            } else {
                found.insert(rest.chars().take_while(|c| is_word(*c)).collect());
            }
        }
        found
    }
}

/// Takes a path with the lists in it apart; gives what follows it.
fn take_path<'a>(text: &'a str, before: &[String], found: &mut BTreeSet<Vec<String>>) -> &'a str {
    if let Some(mut list) = text.strip_prefix('{') {
        loop {
            list = list.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
            match list.chars().next() {
                Some('}') => return &list[1..],
                Some(_) => list = take_path(list, before, found),
                None => return list,
            }
        }
    }
    let word = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    // `*`, or what is no path.
    let word = word.max(text.chars().next().map_or(0, char::len_utf8));
    let mut path = before.to_vec();
    path.push(text[..word].to_owned());
    let rest = &text[word..];
    match rest.strip_prefix("::") {
        Some(rest) => take_path(rest, &path, found),
        None => {
            found.insert(path);
            // Another name for it.
            let other = rest.strip_prefix(" as ").map(|r| r.trim_start_matches(char::is_alphanumeric));
            other.unwrap_or(rest)
        }
    }
}

fn sources(below: &str) -> Vec<Source> {
    let (mut found, mut left) = (Vec::new(), vec![top().join(below)]);
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // What was built or fetched is not ours.
                let name = path.file_name().unwrap().to_str().unwrap();
                if !name.starts_with('.') && name != "target" && name != "node_modules" {
                    left.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let path = path.strip_prefix(top()).unwrap().to_str().unwrap().to_owned();
                found.push(Source { path, text });
            }
        }
    }
    assert!(!found.is_empty(), "{below}");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn everything() -> Vec<Source> {
    ["lib", "server", "tests"].iter().flat_map(|d| sources(d)).collect()
}

/// The module of `lib/src` that a file belongs to.
fn module(path: &str) -> Option<&str> {
    let first = path.strip_prefix("lib/src/")?.split('/').next()?;
    Some(first.strip_suffix(".rs").unwrap_or(first))
}

#[test]
fn no_module_of_the_library_knows_of_a_higher_one() {
    let floor = |m: &str| FLOORS.iter().position(|f| f.contains(&m));
    let (mut wrong, mut needed) = (Vec::new(), BTreeSet::new());
    for source in sources("lib/src") {
        let from = module(&source.path).unwrap();
        let Some(here) = floor(from) else {
            wrong.push(format!("{from} is on no floor"));
            continue;
        };
        for to in source.names_after("crate::") {
            let Some(there) = floor(&to).filter(|_| to != from) else { continue };
            if let Some(up) = UP.iter().find(|(a, b, _)| *a == from && *b == to) {
                needed.insert(*up);
            } else if there >= here {
                wrong.push(format!("{}: {from} uses {to}, which is not below it", source.path));
            }
        }
    }
    wrong
        .extend(UP.iter().filter(|up| !needed.contains(up)).map(|up| format!("not needed any more: {up:?}")));
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The path of a file's module from the top of the library.
fn module_path(file: &str) -> Option<Vec<String>> {
    let path = file.strip_prefix("lib/src/")?.strip_suffix(".rs")?;
    Some(path.strip_suffix("/mod").unwrap_or(path).split('/').map(str::to_owned).collect())
}

/// Which file of a folder of the library uses which, by what they name; what a folder's own `mod.rs` hands on
/// has no file.
fn arrows(folder: &str, files: &[Source]) -> BTreeMap<String, BTreeSet<String>> {
    let within = |f: &Source| module_path(&f.path).filter(|p| p[0] == folder && p.len() > 1);
    let files: Vec<_> = files.iter().filter_map(|f| Some((within(f)?, f))).collect();
    let known: BTreeSet<&[String]> = files.iter().map(|(path, _)| &path[..]).collect();
    let name = |path: &[String]| path[1..].join("/");
    let mut arrows = BTreeMap::<String, BTreeSet<String>>::new();
    for (path, file) in &files {
        let to = arrows.entry(name(path)).or_default();
        for named in file.paths() {
            let mut at = match named[0].as_str() {
                "crate" => Vec::new(),
                _ => path.clone(),
            };
            for step in &named {
                match step.as_str() {
                    "crate" | "self" => {}
                    "super" => _ = at.pop(),
                    step => at.push(step.to_owned()),
                }
            }
            let used = (2..=at.len()).rev().map(|n| &at[..n]).find(|part| known.contains(part));
            to.extend(used.filter(|used| *used != &path[..]).map(name));
        }
    }
    arrows
}

fn reached(arrows: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let (mut seen, mut left) = (BTreeSet::new(), vec![from.to_owned()]);
    while let Some(at) = left.pop() {
        for next in arrows.get(&at).into_iter().flatten() {
            if seen.insert(next.clone()) {
                left.push(next.clone());
            }
        }
    }
    seen
}

#[test]
fn files_of_a_folder_do_not_go_in_circles() {
    let all = sources("lib/src");
    let folders: BTreeSet<&str> =
        all.iter().filter(|s| s.path.matches('/').count() > 2).filter_map(|s| module(&s.path)).collect();
    let (mut wrong, mut needed) = (BTreeSet::new(), BTreeSet::new());
    for folder in folders {
        let arrows = arrows(folder, &all);
        for file in arrows.keys() {
            let circle: BTreeSet<String> =
                reached(&arrows, file).into_iter().filter(|to| reached(&arrows, to).contains(file)).collect();
            if circle.is_empty() {
                continue;
            }
            match CIRCLES.iter().find(|(f, member, _)| *f == folder && circle.contains(*member)) {
                Some(known) => _ = needed.insert(*known),
                None => _ = wrong.insert(format!("{folder}: {circle:?}")),
            }
        }
    }
    wrong.extend(
        CIRCLES.iter().filter(|c| !needed.contains(c)).map(|c| format!("not needed any more: {c:?}")),
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_says_at_its_head_what_it_is() {
    let without: Vec<_> =
        everything().into_iter().filter(|s| !s.text.starts_with("//! ")).map(|s| s.path).collect();
    assert!(without.is_empty(), "{without:#?}");
}

#[test]
fn comments_keep_to_the_width_of_the_code() {
    let told = std::fs::read_to_string(top().join("rustfmt.toml")).unwrap();
    assert!(told.contains(&format!("max_width = {WIDTH}")), "{told}");
    let mut wide = Vec::new();
    for source in everything() {
        for (n, line) in source.text.lines().enumerate() {
            let comment = line.trim_start();
            // Drawings, tables and addresses cannot be wrapped.
            let whole = comment.contains('|')
                || comment.contains("--")
                || !comment[2.min(comment.len())..].trim().contains(' ');
            if comment.starts_with("//") && line.chars().count() > WIDTH && !whole {
                wide.push(format!("{}:{}", source.path, n + 1));
            }
        }
    }
    assert!(wide.is_empty(), "{wide:#?}");
}

/// Under TCG a Linux counts ticks of its timer while it starts. On a busy
/// host there are none, and it panics ("IO-APIC + timer doesn't work"). All of ours are told not to.
#[test]
fn every_linux_that_is_started_is_told_not_to_count_ticks() {
    let console = format!("console={} ", "ttyS0");
    let mut counts = Vec::new();
    for source in everything() {
        for (n, line) in source.text.lines().enumerate() {
            if line.contains(&console) && !line.contains("no_timer_check") {
                counts.push(format!("{}:{}", source.path, n + 1));
            }
        }
    }
    assert!(counts.is_empty(), "{counts:#?}");
}

#[test]
fn tables_of_closed_lists_name_every_entry() {
    for (path, function) in TABLES {
        let text = std::fs::read_to_string(top().join(path)).unwrap();
        let at = text.find(&format!("{function}(")).unwrap_or_else(|| panic!("{path} has no {function}"));
        let indent = text[..at].lines().last().unwrap().chars().take_while(|c| *c == ' ').count();
        let end = format!("\n{}}}\n", " ".repeat(indent));
        let body = &text[at..at + text[at..].find(&end).unwrap()];
        assert!(body.contains("match "), "{path}: {function} is no table");
        assert!(!body.contains("_ =>"), "{path}: {function} swallows what it does not know:\n{body}");
    }
}

#[test]
fn every_document_that_the_sources_cite_is_in_the_tree() {
    let mut missing = Vec::new();
    for source in everything() {
        let words = source.text.split(|c: char| !(c.is_ascii_alphanumeric() || "._-/".contains(c)));
        // A document of another project has its address before it.
        for word in
            words.filter(|w| w.len() > 3 && w.ends_with(".md") && !w.contains("..") && !w.contains("//"))
        {
            let beside = top().join(&source.path).parent().unwrap().join(word);
            if !top().join(word).exists() && !beside.exists() && !top().join("docs").join(word).exists() {
                missing.push(format!("{}: {word}", source.path));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// The documents of the tree, by their path from its top.
fn documents() -> Vec<Source> {
    let (mut found, mut left) = (Vec::new(), vec![top(), top().join("docs"), top().join("docs/decisions")]);
    left.push(top().join("client-examples"));
    for dir in left {
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.extension().is_some_and(|e| e == "md") {
                let text = std::fs::read_to_string(&path).unwrap();
                let path = path.strip_prefix(top()).unwrap().to_str().unwrap().to_owned();
                found.push(Source { path, text });
            }
        }
    }
    assert!(found.len() > 10);
    found
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut dead = Vec::new();
    for document in documents() {
        let folder = top().join(&document.path).parent().unwrap().to_owned();
        for (at, _) in document.text.match_indices("](") {
            let target: String = document.text[at + 2..].chars().take_while(|c| *c != ')').collect();
            let file = target.split('#').next().unwrap();
            if !file.is_empty() && !file.contains("://") && !folder.join(file).exists() {
                dead.push(format!("{}: {target}", document.path));
            }
        }
    }
    assert!(dead.is_empty(), "{dead:#?}");
}

/// Rows of the table of promises that are kept: their number, and the tests that they name. A word of three
/// parts or more, in code's type, is the name of a test.
fn promises() -> Vec<(u64, String, Vec<String>)> {
    let security = std::fs::read_to_string(top().join("SECURITY.md")).unwrap();
    let rows = security.lines().filter(|line| line.starts_with("| ") && line.contains("kept"));
    let of = |row: &str| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let last = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let words = last.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() > 2);
        let kept = cells[3].starts_with("kept");
        kept.then(|| Some((cells[1].parse().ok()?, row.to_owned(), words.map(str::to_owned).collect())))?
    };
    let rows: Vec<_> = rows.filter_map(of).collect();
    assert!(rows.len() > 20, "the table of promises");
    rows
}

fn functions() -> BTreeSet<String> {
    let all = everything();
    let all =
        all.iter().flat_map(|source| source.text.match_indices("fn ").map(|(at, _)| &source.text[at + 3..]));
    all.map(|rest| rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()).collect()
}

#[test]
fn every_test_that_a_promise_names_is_there() {
    let (functions, mut missing) = (functions(), Vec::new());
    for (_, row, named) in promises() {
        if named.is_empty() && !row.contains("`tests/run`") {
            missing.push(format!("no test: {row}"));
        }
        missing.extend(named.into_iter().filter(|name| !functions.contains(name)));
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Tests of promises that have no guard to be taken out by `tests/tools/guards`, and why.
const WITHOUT_GUARD: [(&str, &str); 2] = [
    ("each_rule_is_needed", "takes them out itself, one by one"),
    ("the_checker_finds_what_is_broken_on_purpose", "is itself about what is broken"),
];

/// `tests/tools/guards` takes out what stands behind a promise and has its tests fail. That takes hours; that
/// no promise is forgotten and no guard is out of date can be seen at once.
#[test]
fn every_test_of_a_promise_has_a_guard_that_can_be_taken_out() {
    let list = std::fs::read_to_string(top().join("tests/tools/guards.toml")).unwrap();
    let list: toml::Table = list.parse().unwrap();
    let functions = functions();
    let (mut wrong, mut noticed) = (Vec::new(), BTreeSet::new());
    for guard in list["guard"].as_array().unwrap() {
        let text = |key: &str| guard[key].as_str().unwrap_or_else(|| panic!("{key} of {guard}"));
        let (row, file) = (guard["row"].as_integer().unwrap(), text("file"));
        let source = std::fs::read_to_string(top().join(file)).unwrap_or_default();
        let times = source.matches(text("there")).count();
        if times != 1 || text("there") == text("instead") {
            wrong.push(format!("row {row}, {}: stands {times} times in {file}", text("what")));
        }
        for test in guard["tests"].as_array().unwrap() {
            let name = test[1].as_str().unwrap();
            let name = name.rsplit("::").next().unwrap();
            if !functions.contains(name) {
                wrong.push(format!("row {row}: no test is called {name}"));
            }
            noticed.insert((u64::try_from(row).unwrap(), name.to_owned()));
        }
    }
    for (row, _, named) in promises() {
        for name in named {
            let excepted = WITHOUT_GUARD.iter().any(|(test, _)| *test == name);
            if noticed.contains(&(row, name.clone())) == excepted {
                wrong.push(format!("row {row}: {name} has {} guard", if excepted { "a" } else { "no" }));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_decision_is_in_the_list_and_says_what_would_change_it() {
    let all = documents();
    let list = &all.iter().find(|d| d.path == "docs/decisions/README.md").unwrap().text;
    let records: Vec<_> =
        all.iter().filter_map(|d| Some((d.path.strip_prefix("docs/decisions/0")?, d))).collect();
    assert!(!records.is_empty());
    for (name, record) in records {
        assert!(list.contains(&format!("(0{name})")), "{} is not in the list", record.path);
        for heading in ["Context", "Decision", "Consequences", "What would change our mind"] {
            assert!(record.text.contains(&format!("\n## {heading}\n")), "{}: {heading}", record.path);
        }
    }
}

#[test]
fn every_fault_that_may_survive_is_of_a_function_that_is_there_and_has_a_reason() {
    let list = std::fs::read_to_string(top().join("tests/tools/mutants-survive.txt")).unwrap();
    let sources = everything();
    // Past the head, which says what the list is.
    let (mut reasoned, mut wrong) = (false, Vec::new());
    for line in list.split_once("\n\n").map_or("", |(_, lists)| lists).lines() {
        if line.is_empty() || line.starts_with('#') {
            reasoned = !line.is_empty();
            continue;
        }
        // FILE: FAULT in FUNCTION, or FILE: replace FUNCTION -> TYPE with VALUE.
        let (file, fault) = line.split_once(": ").unwrap_or((line, ""));
        let whole = fault.strip_prefix("replace ").and_then(|f| f.split_once(" with ")).map(|(f, _)| f);
        let function = match fault.rsplit_once(" in ") {
            Some((_, function)) => function,
            None => whole.map_or("", |f| f.split(" -> ").next().unwrap()),
        };
        let name = function.rsplit("::").next().unwrap();
        let there = sources.iter().find(|s| s.path == file).is_some_and(|s| {
            s.code().contains(&format!("fn {name}(")) || s.code().contains(&format!("fn {name}<"))
        });
        if name.is_empty() || !there {
            wrong.push(format!("no such function: {line}"));
        }
        if !reasoned {
            wrong.push(format!("no reason above: {line}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

const QUOTED: &str = "a text in quotes, with escapes for what is not printable";
const DUMP: &str = "what a processor did last, for whoever debugs a hypervisor";
const OURS: &str = "a fault of our own, which is to be reported";
const REPORT: &str = "the names of the SEV API, in a report for whoever works on it";

/// What is formatted as `Debug` and may be, by its file, and why.
const SHOWN: [(&str, &str, &str); 40] = [
    ("lib/src/address_space/layout.rs", "name", QUOTED),
    ("lib/src/guest/drivers/table.rs", "kind", QUOTED),
    ("lib/src/guest/drivers/table.rs", "name", QUOTED),
    ("lib/src/guest/embedded/vcpu.rs", "?exit", DUMP),
    ("lib/src/guest/embedded/vcpu.rs", "?last", DUMP),
    ("lib/src/host/error.rs", "key", QUOTED),
    ("lib/src/host/error.rs", "name", QUOTED),
    ("lib/src/host/guests/task/life.rs", "?event", OURS),
    ("lib/src/host/images/files.rs", "", QUOTED),
    ("lib/src/host/migrations/admission.rs", "wanted", QUOTED),
    ("lib/src/host/open.rs", "name", QUOTED),
    ("lib/src/host/validate.rs", "cut", QUOTED),
    ("lib/src/memory/foreign.rs", "block", QUOTED),
    ("lib/src/memory/foreign.rs", "other", QUOTED),
    ("lib/src/mirror/worker.rs", "?vcpu.last_exit", DUMP),
    ("lib/src/reading/json.rs", "key", QUOTED),
    ("lib/src/reading/mod.rs", "name", QUOTED),
    ("lib/src/reading/mod.rs", "shown", QUOTED),
    ("lib/src/reading/mod.rs", "value", QUOTED),
    ("lib/src/store/rows.rs", "", QUOTED),
    ("lib/src/store/rows.rs", "name", QUOTED),
    ("server/src/cli.rs", "asked", QUOTED),
    ("server/src/config/file.rs", "value", QUOTED),
    ("server/src/config/sources.rs", "name", QUOTED),
    ("server/src/http/query.rs", "", QUOTED),
    ("server/src/http/query.rs", "name", QUOTED),
    ("server/src/http/query.rs", "shown", QUOTED),
    ("server/src/openapi/compat.rs", "after", QUOTED),
    ("server/src/openapi/compat.rs", "before", QUOTED),
    ("server/src/problem/mod.rs", "key", QUOTED),
    ("server/src/routes/events.rs", "shown", QUOTED),
    ("server/src/routes/guests.rs", "name", QUOTED),
    ("server/src/routes/resolution.rs", "name", QUOTED),
    ("server/src/routes/swagger.rs", "document", QUOTED),
    ("server/src/routes/swagger.rs", "FIRST", QUOTED),
    ("server/src/routes/swagger.rs", "LAST", QUOTED),
    ("server/src/selftest/steps.rs", "", REPORT),
    ("server/src/selftest/steps.rs", "other", REPORT),
    ("server/src/selftest/steps.rs", "state", REPORT),
    ("server/src/selftest/steps.rs", "unfit", REPORT),
];

/// Files of tests and measurements, of which no caller reads a word.
fn is_of_tests(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap();
    path.contains("/tests/")
        || path.contains("/model/")
        || path.contains("/bench/")
        || name == "tests.rs"
        || name.ends_with("_tests.rs")
}

/// What a line formats as `Debug` does: names in `{name:?}`, fields of the log as `?field`.
fn debugged(line: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in line.match_indices(":?}").chain(line.match_indices(":#?}")) {
        let start = line[..at].rfind('{').map_or(0, |i| i + 1);
        found.push(line[start..at].to_owned());
    }
    for (at, _) in line.match_indices('?') {
        let before = line[..at].trim_end();
        let rest: String =
            line[at + 1..].chars().take_while(|c| c.is_alphanumeric() || "_.".contains(*c)).collect();
        let is_field = before.is_empty() || before.ends_with(['(', ',', '=']);
        if is_field && rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '_') {
            found.push(format!("?{rest}"));
        }
    }
    found
}

#[test]
fn no_message_shows_what_rust_calls_a_value() {
    let mut needed: BTreeSet<usize> = BTreeSet::new();
    let mut wrong = Vec::new();
    for source in ["lib/src", "server/src"].iter().flat_map(|d| sources(d)).filter(|s| !is_of_tests(&s.path))
    {
        for line in source.code().lines() {
            // Below `info` the log is for whoever works on the daemon, and a panic is for nobody else.
            if [
                "debug!",
                "trace!",
                "assert",
                "panic!",
                "unreachable!",
                "SELECT",
                "UPDATE ",
                "DELETE",
                "WHERE",
            ]
            .iter()
            .any(|w| line.contains(w))
            {
                continue;
            }
            for what in debugged(line) {
                match SHOWN.iter().position(|(path, shown, _)| *path == source.path && *shown == what) {
                    Some(at) => drop(needed.insert(at)),
                    None => wrong.push(format!("{}: {what} in {}", source.path, line.trim())),
                }
            }
        }
    }
    let unneeded: Vec<_> = SHOWN.iter().enumerate().filter(|(at, _)| !needed.contains(at)).collect();
    assert!(wrong.is_empty() && unneeded.is_empty(), "{}\nnot needed: {unneeded:?}", wrong.join("\n"));
}
