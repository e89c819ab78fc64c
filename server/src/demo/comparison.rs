//! Strategies compared: as one JSON object, or as a table with advice.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::error::Impossible;
use super::method::Method;
use super::plan::GUEST_WRITES;
use super::report::{Report, size};
use super::setting::{Fallback, Setting};

/// Characters of a cell's lines, unless a word is longer.
const CELL: usize = 20;

/// What came of all strategies.
#[derive(Debug)]
pub(super) struct Comparison {
    driver: &'static str,
    fallback: Option<Fallback>,
    memory_bytes: u64,
    streams: u16,
    /// Those that were migrated by, verified or not.
    pub(super) runs: Vec<Report>,
    /// Those that the daemon does not do with the driver.
    pub(super) refused: Vec<Refusal>,
    /// Those that it should do, and did not bring to an end.
    pub(super) failed: Vec<Failure>,
    /// When to use which: a kind and a sentence.
    advice: Vec<(String, String)>,
}

/// What the daemon says to a strategy that it does not do.
#[derive(Debug)]
pub(super) struct Refusal {
    method: Method,
    code: String,
    status: u16,
    reason: String,
}

/// A strategy that broke.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) method: Method,
    pub(super) why: String,
    /// Whether the daemons' logs may say more.
    pub(super) logs: bool,
}

impl Refusal {
    pub(super) fn new(method: Method, why: Impossible) -> Self {
        let Impossible { status, code, reason } = why;
        Self { method, code, status, reason }
    }
}

impl Comparison {
    pub(super) fn new(setting: &Setting<'_>) -> Self {
        Self {
            driver: setting.driver.name(),
            fallback: setting.fallback.clone(),
            memory_bytes: setting.args.memory_bytes(),
            streams: setting.args.streams,
            runs: Vec::new(),
            refused: Vec::new(),
            failed: Vec::new(),
            advice: Vec::new(),
        }
    }

    /// Takes the daemon's advice from its list of strategies.
    pub(super) fn advise(&mut self, strategies: &Value) {
        let text = |s: &Value, field: &str| s[field].as_str().unwrap_or_default().to_owned();
        let items = strategies["items"].as_array().into_iter().flatten();
        self.advice = items.map(|s| (text(s, "kind"), text(s, "when_to_use"))).collect();
    }

    /// Whether something was migrated, and everything that was not refused verified.
    pub(super) fn verified(&self) -> bool {
        !self.runs.is_empty() && self.failed.is_empty() && self.runs.iter().all(Report::verified)
    }

    /// One object.
    pub(super) fn json(&self) -> Value {
        let advice = |kind: &str| self.advice.iter().find(|(k, _)| k == kind).map(|(_, text)| text.as_str());
        let runs = self.runs.iter().map(|run| {
            let mut body = run.json();
            body["when_to_use"] = json!(advice(run.method.kind()));
            body
        });
        let refused = self.refused.iter().map(|r| {
            json!({"strategy": r.method.kind(), "via": r.method.via(), "code": r.code, "status": r.status,
                "reason": r.reason})
        });
        let failed = self
            .failed
            .iter()
            .map(|f| json!({"strategy": f.method.kind(), "via": f.method.via(), "error": f.why}));
        json!({
            "driver": self.driver,
            "fallback": self.fallback.as_ref().map(Fallback::json),
            "runs": runs.collect::<Vec<_>>(),
            "refused": refused.collect::<Vec<_>>(),
            "failed": failed.collect::<Vec<_>>(),
        })
    }

    /// The table, what all have in common, what was refused, and when to use which.
    pub(super) fn table(&self) -> String {
        let mut out = format!(
            "\n{} strategies moved a guest: driver {}, {}, {} stream(s)\n",
            self.runs.len(),
            self.driver,
            size(self.memory_bytes),
            self.streams
        );
        if let Some(Fallback { code, why, .. }) = &self.fallback {
            let _ = writeln!(out, "emulated because {code} is missing: {why}");
        }
        if let Some(run) = self.runs.first() {
            let _ = writeln!(out, "protection {}: {}", run.protection_level, run.protection_promise);
        }
        out.push('\n');
        out.push_str(&grid(&self.cells()));
        let common = self.common();
        if !common.is_empty() {
            let _ = writeln!(out, "exposed by all: {}", words(&common));
        }
        for refusal in &self.refused {
            let Refusal { method, code, status, reason } = refusal;
            let _ = writeln!(out, "\nrefused: {}\n  {reason} ({status} {code})", method.title());
        }
        for failure in &self.failed {
            let _ = writeln!(out, "\nFAILED: {}\n  {}", failure.method.title(), failure.why);
        }
        if !self.runs.is_empty() {
            out.push_str("\nThe times are those of one run each; `mirrorvmd bench` measures.\n");
        }
        out.push_str("\nwhen to use which\n");
        for (kind, text) in &self.advice {
            let _ = writeln!(out, "  {kind:<14} {text}");
        }
        out
    }

    /// Exposures that every run has: they do not help to choose.
    fn common(&self) -> Vec<&str> {
        let Some((first, rest)) = self.runs.split_first() else { return Vec::new() };
        let everywhere = |code: &&str| rest.iter().all(|r| r.plan.exposures.iter().any(|c| c == code));
        first.plan.exposures.iter().map(String::as_str).filter(everywhere).collect()
    }

    fn cells(&self) -> Vec<Vec<String>> {
        let common = self.common();
        let head = [
            "strategy",
            "pages by",
            "guest writes helper",
            "slots",
            "table pages",
            "mirror ready",
            "throughput",
            "downtime",
            "pages verified",
            "exposed besides",
            "out of reach",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for run in &self.runs {
            let plan = &run.plan;
            let own = plan.exposures.iter().map(String::as_str);
            let own: Vec<&str> = own.filter(|c| *c != GUEST_WRITES && !common.contains(c)).collect();
            let downtime = &run.progress["downtime_ms"];
            let v = &run.verified;
            let verified = match (run.verified(), v.mismatches) {
                (true, _) => format!("{}", v.pages_compared),
                (false, 0) => format!("NO ({}, guest or states wrong)", v.pages_compared),
                (false, wrong) => format!("NO ({wrong} of {} differ)", v.pages_compared),
            };
            let unreachable = match plan.unreachable_bytes {
                0 => "nothing".to_owned(),
                bytes => format!("{}: {}", size(bytes), words(&plan.unreachable)),
            };
            rows.push(vec![
                run.method.title(),
                plan.addressing.clone(),
                if plan.guest_writes_helper() { "yes" } else { "no" }.to_owned(),
                plan.slots.to_string(),
                plan.page_table_pages.to_string(),
                format!("{:.1} ms", run.mirror_ready_us as f64 / 1e3),
                format!("{}/s", size(run.throughput())),
                downtime.as_f64().map_or_else(|| "unknown".to_owned(), |ms| format!("{ms:.1} ms")),
                verified,
                if own.is_empty() { "-".to_owned() } else { words(&own) },
                unreachable,
            ]);
        }
        rows
    }
}

/// Codes as words.
fn words<S: AsRef<str>>(codes: &[S]) -> String {
    codes.iter().map(|c| c.as_ref().replace('_', " ")).collect::<Vec<_>>().join(", ")
}

/// One line for each property and one column for each run: the names of properties are long, runs are few.
/// The first cell of a row is its heading.
fn grid(rows: &[Vec<String>]) -> String {
    let properties = rows.first().map_or(0, Vec::len);
    let mut out = String::new();
    let widths: Vec<usize> =
        rows.iter().map(|row| row.iter().map(|c| width_of(c)).max().unwrap_or(0)).collect();
    for property in 0..properties {
        let cells: Vec<Vec<String>> =
            rows.iter().map(|row| wrapped(row.get(property).map_or("", String::as_str))).collect();
        for line in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
            let mut text = String::new();
            for (cell, width) in cells.iter().zip(&widths) {
                let _ = write!(text, "  {:<width$}", cell.get(line).map_or("", String::as_str));
            }
            let _ = writeln!(out, "{}", text.trim_end());
        }
    }
    out.push('\n');
    out
}

fn width_of(cell: &str) -> usize {
    wrapped(cell).iter().map(|line| line.chars().count()).max().unwrap_or(0)
}

/// A cell's text in lines.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= CELL => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::args::{ShiftChoice, parsed};
    use crate::demo::method::Via;
    use crate::demo::report::example;

    fn comparison() -> Comparison {
        let args = parsed(&["--driver", "emulated", "--strategy", "all"]);
        let can = json!({"drivers": ["emulated"], "kvm": {"available": false}, "missing": []});
        let mut comparison = Comparison::new(&Setting::choose(&args, &can).unwrap());
        let shifted = example(Method::Shifted(ShiftChoice::FourGib));
        let mut identity = example(Method::IdentityCbit);
        identity.plan.exposures.extend(["plain_alias".to_owned(), GUEST_WRITES.to_owned()]);
        identity.plan.unreachable = vec!["beyond_window".into()];
        identity.plan.unreachable_bytes = 8192;
        comparison.runs = vec![shifted, identity];
        let why = Impossible { status: 422, code: "plan_refused".into(), reason: "no context".into() };
        comparison.refused = vec![Refusal::new(Method::PspCopied(Via::SendReceive), why)];
        comparison.advise(&json!({"items": [{"kind": "shifted", "when_to_use": "Always."}]}));
        comparison
    }

    #[test]
    fn the_table_has_a_column_for_each_run_and_names_what_was_refused() {
        let text = comparison().table();
        let lines: Vec<String> =
            text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for line in [
            "strategy shifted identity-cbit",
            "guest writes helper no yes",
            "mirror ready 1.5 ms 1.5 ms",
            "pages verified 2 2",
            "exposed besides - plain alias",
            "out of reach nothing 8 KiB: beyond window",
            "exposed by all: host sees everything",
            "refused: psp-copied send-receive",
            "no context (422 plan_refused)",
            "shifted Always.",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line} is no line of\n{text}");
        }
    }

    #[test]
    fn the_object_has_runs_and_refusals() {
        let body = comparison().json();
        assert_eq!(body["runs"].as_array().map(Vec::len), Some(2));
        assert_eq!(body["runs"][0]["when_to_use"], "Always.");
        assert_eq!(body["runs"][1]["unreachable"], json!({"codes": ["beyond_window"], "bytes": 8192}));
        let refused = json!([{"strategy": "psp-copied", "via": "send-receive", "code": "plan_refused", "status": 422,
            "reason": "no context"}]);
        assert_eq!((&body["refused"], &body["failed"]), (&refused, &json!([])));
    }

    #[test]
    fn refusals_are_no_failures_but_nothing_is_no_success() {
        assert!(comparison().verified());
        let mut broken = comparison();
        broken.failed.push(Failure { method: Method::Declared, why: "it broke".into(), logs: true });
        assert!(!broken.verified() && broken.table().contains("FAILED: declared\n  it broke"));
        let mut wrong = comparison();
        wrong.runs[1].verified.mismatches = 1;
        assert!(!wrong.verified() && wrong.table().contains("NO (1 of 2"));
        let mut nothing = comparison();
        nothing.runs.clear();
        assert!(!nothing.verified(), "nothing was shown");
    }

    #[test]
    fn long_cells_are_wrapped_at_words() {
        assert_eq!(
            wrapped("helper private to mirror, helper memory"),
            ["helper private to", "mirror, helper", "memory"]
        );
        assert_eq!(wrapped("a-word-that-is-longer-than-a-cell"), ["a-word-that-is-longer-than-a-cell"]);
        assert_eq!(wrapped("-"), ["-"]);
    }
}
