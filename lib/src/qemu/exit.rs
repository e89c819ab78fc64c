//! Owns how a process ended, in words. Must not know how that was found out.

use std::fmt;

/// How much of the end of stderr is told to whoever asked for the guest, in bytes.
const LAST_WORDS: usize = 500;

/// How a process ended. Neither a code nor a signal: its keeper ended first, and QEMU with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitInfo {
    /// Exit code, if it exited.
    pub code: Option<i32>,
    /// Signal number, if one killed it.
    pub signal: Option<i32>,
    /// Whether the kernel killed it for want of memory; `None`: it cannot be told.
    pub oom_killed: Option<bool>,
    /// The end of what it wrote to stderr, at most 4 KiB, control characters other than line ends removed.
    pub stderr: String,
}

/// Characters that change how text around them is shown, and say nothing themselves.
const fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

impl ExitInfo {
    /// How QEMU ended, in a sentence with the last of what it said.
    #[must_use]
    pub fn told(&self) -> String {
        let how = match (self.code, self.signal) {
            (Some(code), _) => format!("QEMU ended with code {code}"),
            (None, Some(_)) if self.oom_killed == Some(true) => {
                "the kernel killed QEMU for want of memory".to_owned()
            }
            (None, Some(signal)) => format!("QEMU was ended by signal {signal}"),
            (None, None) => "QEMU's keeper, the process that watches over it, ended, and QEMU with it".to_owned(),
        };
        match self.last_words() {
            words if words.is_empty() => how,
            words => format!("{how}: {words}"),
        }
    }

    /// The last of what it wrote to stderr, on one line: whole lines, at most `LAST_WORDS` bytes, or the
    /// end of the last line. Empty if it wrote nothing.
    #[must_use]
    pub fn last_words(&self) -> String {
        let plain =
            |line: &str| line.chars().filter(|c| !c.is_control() && !is_invisible(*c)).collect::<String>();
        let mut words = String::new();
        for line in self.stderr.lines().rev().map(plain).filter(|line| !line.trim().is_empty()) {
            let line = line.trim();
            if words.is_empty() {
                let from = line.len().saturating_sub(LAST_WORDS);
                words = line
                    .chars()
                    .scan(0, |at, c| {
                        *at += c.len_utf8();
                        Some((*at, c))
                    })
                    .filter(|(end, _)| *end > from)
                    .map(|(_, c)| c)
                    .collect();
            } else if words.len() + line.len() + 3 <= LAST_WORDS {
                words = format!("{line} / {words}");
            } else {
                break;
            }
        }
        words
    }
}

impl fmt::Display for ExitInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "code {code}")?,
            (None, Some(signal)) => write!(f, "signal {signal}")?,
            (None, None) => write!(f, "unknown status")?,
        }
        match self.stderr.trim() {
            "" => Ok(()),
            text => write!(f, ", stderr: {text}"),
        }
    }
}
