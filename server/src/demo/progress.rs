//! Progress of the migration on stderr: a bar where it is a terminal, else a line now and then.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::report::size;

/// Between two lines where stderr is no terminal, unless the state changes.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Over which time the rate is taken.
const RATE_OVER: Duration = Duration::from_millis(300);

pub(super) struct Display {
    bar: Option<ProgressBar>,
    shown: Option<(String, Instant)>,
    since: (Instant, u64),
    rate: u64,
}

/// What is shown of a migration.
struct Look {
    state: String,
    round: u64,
    total: u64,
    /// Bytes of RAM that are not at the destination as they are here.
    left: u64,
    moved: u64,
}

impl Look {
    fn of(migration: &Value) -> Self {
        let memory = &migration["progress"]["memory"];
        let number = |field: &str| memory[field].as_u64().unwrap_or_default();
        let round = number("iteration");
        let total = number("total_bytes");
        Self {
            state: migration["state"].as_str().unwrap_or("unknown").to_owned(),
            round,
            total,
            // Before the first round nothing is there yet.
            left: if round == 0 { total } else { number("remaining_bytes").min(total) },
            moved: number("processed_bytes"),
        }
    }
}

impl Display {
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{bar:32} {percent:>3}%  {msg}";
            let bar = ProgressBar::new(1);
            // A template that does not parse would only mean a bar of the default style.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Self { bar, shown: None, since: (Instant::now(), 0), rate: 0 }
    }

    pub(super) fn show(&mut self, migration: &Value) {
        let look = Look::of(migration);
        let (since, before) = self.since;
        if since.elapsed() >= RATE_OVER {
            let moved = look.moved.saturating_sub(before);
            self.rate = (moved as f64 / since.elapsed().as_secs_f64()) as u64;
            self.since = (Instant::now(), look.moved);
        }
        let (moved, rate) = (size(look.moved), size(self.rate));
        let message = format!("{} round {}, {moved} moved, {rate}/s", look.state, look.round);
        match &self.bar {
            Some(bar) => {
                bar.set_message(message);
                bar.set_length(look.total.max(1));
                bar.set_position(look.total - look.left);
            }
            None => {
                let due = self
                    .shown
                    .as_ref()
                    .is_none_or(|(state, at)| *state != look.state || at.elapsed() >= LINE_EVERY);
                if due {
                    super::note!("migration: {message}");
                    self.shown = Some((look.state, Instant::now()));
                }
            }
        }
    }

    pub(super) fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
