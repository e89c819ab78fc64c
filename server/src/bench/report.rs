//! What a run says: figures with their spread, the targets that some have, a table, JSON.
//!
//! Owns: medians, rendering. Must not know: how anything was measured.

use std::fmt::Write as _;

/// One figure: the median of several runs, the smallest and largest beside it.
#[derive(Clone, Debug, serde::Serialize)]
pub(super) struct Row {
    pub name: String,
    pub unit: &'static str,
    pub min: f64,
    pub median: f64,
    pub max: f64,
    /// How many runs the median is of.
    pub runs: usize,
    /// What the median is to be, where something was promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Whether it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub met: Option<bool>,
}

/// A promise about a median.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    fn stricter(self, times: f64) -> Self {
        match self {
            Self::AtMost(most) => Self::AtMost(most / times),
            Self::AtLeast(least) => Self::AtLeast(least * times),
        }
    }

    /// A figure that is no number meets nothing.
    fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

impl Row {
    pub fn new(name: impl Into<String>, unit: &'static str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
        let (min, max) = (at(0), at(values.len().saturating_sub(1)));
        let (median, runs) = (median(&values), values.len());
        Self { name: name.into(), unit, min, median, max, runs, target: None, met: None }
    }

    /// The same with a promise, which is looked at here and now.
    pub fn promised(mut self, target: Target) -> Self {
        self.met = Some(target.is_met_by(self.median));
        self.target = Some(target);
        self
    }

    fn verdict(&self) -> String {
        let target = match self.target {
            None => return String::new(),
            Some(Target::AtMost(n)) => format!("<= {n}"),
            Some(Target::AtLeast(n)) => format!(">= {n}"),
        };
        format!("{target} {}", if self.met == Some(true) { "met" } else { "MISSED" })
    }
}

/// The middle value, or the mean of the two in the middle; not a number if there is none. `sorted` is.
pub(super) fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// `a / b` run by run: what was measured side by side is compared side by side.
pub(super) fn ratios(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a / b).collect()
}

/// Everything that a run found.
#[derive(Debug, serde::Serialize)]
pub(super) struct Report {
    /// The machine and what was asked for.
    pub conditions: serde_json::Map<String, serde_json::Value>,
    pub rows: Vec<Row>,
    /// What was left out, and why.
    pub skipped: Vec<String>,
}

impl Report {
    /// Rows that are not so many times better than their promise; 1: that do not keep it.
    pub fn missed(&self, strictness: f64) -> impl Iterator<Item = &Row> {
        let kept = move |r: &Row| r.target.is_none_or(|t| t.stricter(strictness).is_met_by(r.median));
        self.rows.iter().filter(move |r| !kept(r))
    }

    /// Columns, for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for (key, value) in &self.conditions {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(out, "{key}: {value}");
        }
        let width = self.rows.iter().map(|r| r.name.chars().count()).max().unwrap_or(0);
        let _ = writeln!(
            out,
            "\n{:<width$} {:>9} {:>9} {:>9} {:>4}  {:<6} target",
            "", "median", "min", "max", "runs", "unit"
        );
        for r in &self.rows {
            let line = format!(
                "{:<width$} {:>9.2} {:>9.2} {:>9.2} {:>4}  {:<6} {}",
                r.name,
                r.median,
                r.min,
                r.max,
                r.runs,
                r.unit,
                r.verdict()
            );
            let _ = writeln!(out, "{}", line.trim_end());
        }
        for what in &self.skipped {
            let _ = writeln!(out, "SKIPPED {what}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_no_runs() {
        let row = Row::new("r", "ms", vec![3.0, 1.0, 2.0]);
        assert_eq!((row.min, row.median, row.max, row.runs), (1.0, 2.0, 3.0, 3));
        assert!((Row::new("r", "ms", vec![4.0, 1.0, 2.0, 3.0]).median - 2.5).abs() < 1e-9);
        assert!(Row::new("r", "ms", vec![]).median.is_nan());
    }

    #[test]
    fn a_target_can_be_missed_and_no_number_misses_all() {
        let row = |v: f64, t| Row::new("r", "ms", vec![v]).promised(t).met;
        assert_eq!(row(1.0, Target::AtMost(1.0)), Some(true));
        assert_eq!(row(1.1, Target::AtMost(1.0)), Some(false));
        assert_eq!(row(4.0, Target::AtLeast(4.0)), Some(true));
        assert_eq!(row(3.9, Target::AtLeast(4.0)), Some(false));
        assert_eq!(row(f64::NAN, Target::AtLeast(4.0)), Some(false));
        assert_eq!(row(f64::NAN, Target::AtMost(4.0)), Some(false));
    }

    #[test]
    fn a_report_names_what_was_missed_and_what_was_left_out() {
        let rows = vec![
            Row::new("good", "ms", vec![1.0]).promised(Target::AtMost(2.0)),
            Row::new("bad", "ms", vec![3.0]).promised(Target::AtMost(2.0)),
            Row::new("plain", "ms", vec![3.0]),
        ];
        let report = Report { conditions: serde_json::Map::new(), rows, skipped: vec!["x: no x".into()] };
        let missed = |times| report.missed(times).map(|r| r.name.as_str()).collect::<Vec<_>>();
        assert_eq!(missed(1.0), ["bad"]);
        assert_eq!(missed(10.0), ["good", "bad"]);
        assert!(missed(0.5).is_empty());
        let table = report.table();
        assert!(
            table.contains("<= 2 met") && table.contains("<= 2 MISSED") && table.contains("SKIPPED x: no x")
        );
    }
}
