//! Why a database is not trusted, in words that say what is missing and what helps.
//!
//! Owns: the words, and the errors that say them. Must not know: how it was found out.

use std::fmt;
use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use super::StoreError;
use super::mark::{self, Refusal, Word};

/// What is wrong with the files that a host's state is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The database is gone, and something of it is still there.
    Gone {
        /// Changes that its mark says were acknowledged; `None`: only its log is there.
        acknowledged: Option<u64>,
    },
    /// The database's mark is gone.
    MarkGone {
        /// Path of the mark.
        mark: PathBuf,
    },
    /// The database's mark cannot be read.
    MarkDamaged {
        /// Path of the mark.
        mark: PathBuf,
    },
    /// Changes that were acknowledged are not in the database and its log.
    Behind {
        /// The last that is there.
        found: u64,
        /// The last that was acknowledged.
        acknowledged: u64,
        /// Whether the database's log, where the last changes are, is gone.
        log_gone: bool,
    },
    /// The database is not the one that the mark tells of: one of the two was put there from elsewhere.
    Apart {
        /// Path of the mark.
        mark: PathBuf,
    },
    /// Records are not what was written.
    Records {
        /// Which, as people know them.
        damaged: Vec<String>,
    },
    /// Records are missing, or are there again, that are nowhere else to be seen.
    Sum {
        /// How many there are.
        found: u64,
        /// How many there should be.
        expected: u64,
    },
    /// A part of the database that is not a record.
    Part {
        /// What does not agree.
        what: &'static str,
    },
    /// Files that belong to the database are not what it says.
    Beside {
        /// Which, as people know them, and what is wrong.
        wrong: Vec<String>,
        /// What to do about it.
        help: &'static str,
    },
}

/// Records that are named at most.
const NAMED: usize = 20;
/// What helps against most of it.
const HELP: &str = "put the file back if it is elsewhere, restore a backup with `mirrorvmd state restore`, or go on with what \
                    is there with `mirrorvmd state accept`";

impl Finding {
    pub(super) fn of(refusal: Refusal, database: &Path, found: u64) -> Self {
        let name = database.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mark = database.with_file_name(mark::name_of(&name));
        match refusal {
            Refusal::NoMark => Self::MarkGone { mark },
            Refusal::MarkDamaged => Self::MarkDamaged { mark },
            Refusal::Behind { acknowledged } => {
                // Looking at a database without a log makes an empty one.
                let log = std::fs::metadata(database.with_file_name(format!("{name}-wal")));
                let log_gone = !log.is_ok_and(|log| log.len() > 0);
                Self::Behind { found, acknowledged, log_gone }
            }
            Refusal::Apart => Self::Apart { mark },
        }
    }

    /// What is wrong, without what helps.
    pub(super) fn bare(&self, database: &Path) -> String {
        Told(self, database).to_string()
    }

    pub(super) fn told(&self, database: &Path) -> String {
        let help = match self {
            Self::Beside { help, .. } => help,
            Self::Gone { .. }
            | Self::MarkGone { .. }
            | Self::MarkDamaged { .. }
            | Self::Behind { .. }
            | Self::Apart { .. }
            | Self::Records { .. }
            | Self::Sum { .. }
            | Self::Part { .. } => HELP,
        };
        format!("{}; {help}", Told(self, database))
    }
}

struct Told<'a>(&'a Finding, &'a Path);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(finding, path) = self;
        let database = path.display();
        match finding {
            Finding::Gone { acknowledged: Some(n) } => {
                write!(f, "{database} is missing, and all of the {n} changes that were acknowledged with it")
            }
            Finding::Gone { acknowledged: None } => {
                write!(f, "{database} is missing, and its log or what is left of its mark is still there")
            }
            Finding::MarkGone { mark } => write!(
                f,
                "{} is missing, and without it nobody can say whether {database} has everything that was acknowledged",
                mark.display()
            ),
            Finding::MarkDamaged { mark } => write!(
                f,
                "{} is damaged, and without it nobody can say whether {database} has everything that was acknowledged",
                mark.display()
            ),
            Finding::Behind { found, acknowledged, log_gone } => {
                let log = if *log_gone { "is gone" } else { "is cut off, damaged or of another time" };
                write!(
                    f,
                    "{database} is at change {found}, and {acknowledged} were acknowledged: the last {} are missing. Either \
                     it is older than its mark, or its log {database}-wal {log}",
                    acknowledged - found
                )
            }
            Finding::Apart { mark } => write!(
                f,
                "{database} is not the database that {} tells of: one of the two comes from another time or host",
                mark.display()
            ),
            Finding::Records { damaged } => {
                let shown = damaged.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
                let more = damaged.len().saturating_sub(NAMED);
                write!(f, "{database} has records that are not what was written: {shown}")?;
                if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
            }
            Finding::Sum { found, expected } if found != expected => {
                write!(f, "{database} has {found} records, and {expected} were written")
            }
            Finding::Sum { .. } => write!(f, "{database} has records of another time among its own"),
            Finding::Beside { wrong, .. } => {
                write!(f, "{database} is whole, and what belongs to it is not: {}", wrong.join("; "))
            }
            Finding::Part { what } => write!(f, "{database} is damaged in {what}"),
        }
    }
}

/// A database that is not trusted.
pub(super) fn untrusted(path: &Path, finding: Finding) -> StoreError {
    StoreError::Untrusted { path: path.to_owned(), finding }
}

/// A database of a time before there were marks, beside a mark.
pub(super) fn older_than(path: &Path, word: &Word) -> StoreError {
    let refusal = match word {
        Word::At(at) => Refusal::Behind { acknowledged: at.seq },
        Word::Missing | Word::Damaged => Refusal::MarkDamaged,
    };
    untrusted(path, Finding::of(refusal, path, 0))
}

/// What an error over a file means that was opened with nothing known of it.
pub(super) fn damaged_or(path: &Path, error: impl Into<StoreError>) -> StoreError {
    match error.into() {
        StoreError::Damaged { source: Some(error), .. } => match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => StoreError::Foreign { path: path.to_owned() },
            _ => StoreError::Corrupt { path: path.to_owned(), source: Some(error) },
        },
        other => other,
    }
}
