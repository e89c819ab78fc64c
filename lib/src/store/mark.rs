//! What was acknowledged, told by a file beside the database: a log that lost its end does not know that it
//! had more.
//!
//! Owns: the file, and what its word means for the database that is found. Must not know: what is in the
//! database.
//!
//! Every commit gives the database a new [`Position`] in its own transaction. When that is on disk the
//! position is written to the mark, and only when that is on disk, too, is anybody told. So a database that
//! is whole is at its mark, or one step ahead of it (the daemon ended between the two, and nobody was told);
//! one that is behind has lost what somebody was told.
//!
//! The mark has two slots, in different blocks of the file, that take turns. A write that is torn damages the
//! slot that was about to be replaced, and the other still has the position one step before, which the rule
//! above allows for.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use ring::digest::{SHA256, digest};
use rustix::fs::OFlags;

use crate::private_files::{PrivateDir, PrivateFileError};

/// Bytes of a slot: no disk writes more than that at once, none less than a sector of it.
const SLOT: usize = 4096;
const SLOTS: usize = 2;
const MAGIC: &[u8; 8] = b"mrvmmark";
const VERSION: u32 = 1;
/// Magic, version, sequence, rows, chain, before, sum, digest.
const USED: usize = 8 + 4 + 8 + 8 + 16 + 16 + 16 + 16;

/// 128 bits of a SHA-256.
pub(super) type Digest = [u8; 16];

/// The first bits of the SHA-256 of some parts; each part's length counts.
pub(super) fn digest_of(parts: &[&[u8]]) -> Digest {
    let mut all = Vec::with_capacity(parts.iter().map(|p| p.len() + 8).sum());
    for part in parts {
        all.extend_from_slice(&(part.len() as u64).to_le_bytes());
        all.extend_from_slice(part);
    }
    let mut short = [0; 16];
    short.copy_from_slice(&digest(&SHA256, &all).as_ref()[..16]);
    short
}

/// What a database holds after a commit, in a few bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    /// Commits since the first.
    pub seq: u64,
    /// Rows in all tables.
    pub rows: u64,
    /// Of everything that ever was committed: two histories never have the same.
    pub chain: Digest,
    /// The chain one commit before.
    pub before: Digest,
    /// The digests of all rows, XORed.
    pub sum: Digest,
}

/// What a transaction does to the content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Delta {
    /// Writes, whether or not they change anything.
    pub writes: u64,
    /// Rows that are more, or fewer.
    pub rows: i64,
    /// Digests of rows that come and of rows that go, XORed.
    pub sum: Digest,
}

impl Delta {
    pub fn comes(&mut self, row: &Digest) {
        (self.writes, self.rows) = (self.writes + 1, self.rows + 1);
        mix(&mut self.sum, row);
    }

    pub fn goes(&mut self, row: &Digest) {
        (self.writes, self.rows) = (self.writes + 1, self.rows - 1);
        mix(&mut self.sum, row);
    }
}

pub(super) fn mix(sum: &mut Digest, row: &Digest) {
    sum.iter_mut().zip(row).for_each(|(s, r)| *s ^= r);
}

impl Position {
    /// Of a database that has begun: nobody else's begins so.
    pub fn first(rows: u64, sum: Digest) -> Self {
        let chain = *uuid::Uuid::new_v4().as_bytes();
        Self { seq: 0, rows, chain, before: [0; 16], sum }
    }

    /// Of a database that goes on from `seq` without what came before.
    pub fn anew(seq: u64, rows: u64, sum: Digest) -> Self {
        let before = *uuid::Uuid::new_v4().as_bytes();
        Self { seq, rows, chain: chain(&before, seq, rows, &sum), before, sum }
    }

    /// The position after a transaction that does `delta`.
    pub fn next(&self, delta: &Delta) -> Self {
        let mut sum = self.sum;
        mix(&mut sum, &delta.sum);
        let (seq, rows) = (self.seq + 1, self.rows.wrapping_add_signed(delta.rows));
        Self { seq, rows, chain: chain(&self.chain, seq, rows, &sum), before: self.chain, sum }
    }

    /// Whether its parts belong together.
    pub fn is_sound(&self) -> bool {
        self.seq == 0 || self.chain == chain(&self.before, self.seq, self.rows, &self.sum)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SLOT);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.seq.to_le_bytes());
        bytes.extend_from_slice(&self.rows.to_le_bytes());
        for part in [&self.chain, &self.before, &self.sum] {
            bytes.extend_from_slice(part);
        }
        let seal = digest_of(&[&bytes]);
        bytes.extend_from_slice(&seal);
        bytes.resize(SLOT, 0);
        bytes
    }

    fn decode(slot: &[u8]) -> Option<Self> {
        let used = slot.get(..USED)?;
        let (content, seal) = used.split_at(USED - 16);
        if digest_of(&[content]) != seal {
            return None;
        }
        let rest = content.strip_prefix(MAGIC)?.strip_prefix(&VERSION.to_le_bytes())?;
        let number = |at: usize| Some(u64::from_le_bytes(rest.get(at..at + 8)?.try_into().ok()?));
        let part = |at: usize| rest.get(at..at + 16)?.try_into().ok();
        Some(Self { seq: number(0)?, rows: number(8)?, chain: part(16)?, before: part(32)?, sum: part(48)? })
    }
}

fn chain(before: &Digest, seq: u64, rows: u64, sum: &Digest) -> Digest {
    digest_of(&[b"chain", before, &seq.to_le_bytes(), &rows.to_le_bytes(), sum])
}

/// What the mark says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// There is no mark.
    Missing,
    /// There is one, and neither slot can be read.
    Damaged,
    /// The newest position that can be read.
    At(Position),
}

/// What the mark's word means for a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Everything that was acknowledged is there. `mark` says whether the mark is to be written.
    Whole {
        /// Whether the mark does not say so yet.
        mark: bool,
    },
    /// The database has begun, and nothing was acknowledged: there is no mark yet.
    Begun,
    /// What was acknowledged is not there.
    Refused(Refusal),
}

/// Why a database is not the one that its mark tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The mark is gone.
    NoMark,
    /// Neither slot of the mark can be read.
    MarkDamaged,
    /// Commits that were acknowledged are missing at the end.
    Behind {
        /// Where the mark is.
        acknowledged: u64,
    },
    /// The database has another history.
    Apart,
}

/// Whether a database at `found` holds everything that was acknowledged.
pub(super) fn judge(found: &Position, word: &Word) -> Verdict {
    match word {
        Word::Missing if found.seq == 0 => Verdict::Begun,
        Word::Missing => Verdict::Refused(Refusal::NoMark),
        Word::Damaged => Verdict::Refused(Refusal::MarkDamaged),
        Word::At(mark) if found.seq < mark.seq => {
            Verdict::Refused(Refusal::Behind { acknowledged: mark.seq })
        }
        Word::At(mark) if found == mark => Verdict::Whole { mark: false },
        Word::At(mark) if mark.seq.checked_add(1) == Some(found.seq) && found.before == mark.chain => {
            Verdict::Whole { mark: true }
        }
        Word::At(_) => Verdict::Refused(Refusal::Apart),
    }
}

/// The same while a daemon writes, for a word that was read before the database was.
pub(super) fn judge_live(found: &Position, word: &Word) -> Verdict {
    match word {
        Word::At(mark) if found.seq > mark.seq => Verdict::Whole { mark: false },
        word => judge(found, word),
    }
}

/// The name of a database's mark.
pub(super) fn name_of(database: &str) -> String {
    format!("{}.mark", database.strip_suffix(".db").unwrap_or(database))
}

/// What the mark `name` says.
pub(super) fn read(dir: &PrivateDir, name: &str) -> Result<Word, PrivateFileError> {
    let file = match dir.open_file(name, OFlags::RDONLY) {
        Ok(file) => file,
        Err(PrivateFileError::Missing { .. }) => return Ok(Word::Missing),
        Err(other) => return Err(other),
    };
    let mut bytes = Vec::with_capacity(SLOT * SLOTS);
    file.take((SLOT * SLOTS) as u64).read_to_end(&mut bytes).map_err(|source| PrivateFileError::Io {
        operation: "read",
        path: dir.entry(name),
        source,
    })?;
    Ok(word_of(&bytes))
}

fn word_of(bytes: &[u8]) -> Word {
    let readable = bytes.chunks(SLOT).filter_map(Position::decode);
    readable.max_by_key(|p| p.seq).map_or(Word::Damaged, Word::At)
}

/// Puts a mark of this position in the place of whatever is there.
pub(super) fn make(dir: &PrivateDir, name: &str, at: &Position) -> Result<(), PrivateFileError> {
    let mut bytes = at.encode();
    // Both, so that the file has its length and its blocks from now on.
    bytes.extend_from_within(..);
    dir.replace(name, &bytes)
}

/// The mark of an open database.
#[derive(Debug)]
pub(super) struct Mark {
    file: File,
    path: PathBuf,
}

impl Mark {
    pub fn open(dir: &PrivateDir, name: &str) -> Result<Self, PrivateFileError> {
        Ok(Self { file: dir.open_file(name, OFlags::RDWR)?, path: dir.entry(name) })
    }

    /// Says that everything up to `at` is acknowledged from now on; it is on disk on return.
    pub fn write(&self, at: &Position) -> Result<(), PrivateFileError> {
        let slot = (at.seq % SLOTS as u64) * SLOT as u64;
        self.file
            .write_all_at(&at.encode(), slot)
            .and_then(|()| self.file.sync_data())
            .map_err(|source| PrivateFileError::Io { operation: "write", path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A history of that many commits; whoever looks on has its positions.
    fn history(commits: u64) -> Vec<Position> {
        let mut all = vec![Position::first(3, [9; 16])];
        for n in 0..commits {
            let mut delta = Delta::default();
            delta.comes(&digest_of(&[&n.to_le_bytes()]));
            let next = all[n as usize].next(&delta);
            all.push(next);
        }
        all
    }

    /// The mark's file as commits that were marked leave it.
    fn file_after(history: &[Position]) -> Vec<u8> {
        let mut bytes = [history[0].encode(), history[0].encode()].concat();
        for at in &history[1..] {
            let slot = (at.seq % SLOTS as u64) as usize * SLOT;
            bytes[slot..slot + SLOT].copy_from_slice(&at.encode());
        }
        bytes
    }

    proptest! {
        /// The daemon ends anywhere in a commit: before the database has it, before the mark is begun, in its
        /// middle, after.
        #[test]
        fn no_end_in_the_middle_of_a_commit_refuses_a_start(
            commits in 1u64..30, committed: bool, torn in 0usize..=SLOT,
        ) {
            let all = history(commits);
            let marked = &all[..all.len() - 1];
            let mut bytes = file_after(marked);
            let next = &all[all.len() - 1];
            let found = if committed {
                // As much of the slot as the disk took, and of the rest what was there.
                let slot = (next.seq % SLOTS as u64) as usize * SLOT;
                bytes[slot..slot + torn].copy_from_slice(&next.encode()[..torn]);
                next
            } else {
                &all[all.len() - 2]
            };
            let verdict = judge(found, &word_of(&bytes));
            prop_assert!(matches!(verdict, Verdict::Whole { .. }), "{verdict:?}");
            // Nothing changes with the order in which a disk takes the parts of a slot.
            let slot = (next.seq % SLOTS as u64) as usize * SLOT;
            if committed {
                bytes[slot + torn / 2..slot + torn].fill(0x5a);
                let verdict = judge(found, &word_of(&bytes));
                prop_assert!(matches!(verdict, Verdict::Whole { .. }), "{verdict:?}");
            }
        }

        #[test]
        fn whatever_was_marked_and_is_gone_is_noticed(commits in 1u64..30, lost in 1u64..30) {
            let all = history(commits);
            let word = word_of(&file_after(&all));
            let found = all[(commits - lost.min(commits)) as usize];
            let verdict = judge(&found, &word);
            prop_assert_eq!(verdict, Verdict::Refused(Refusal::Behind { acknowledged: commits }));
            // The same when it goes on from there, as far as it likes.
            let mut other = found;
            for _ in 0..40 {
                let mut delta = Delta::default();
                delta.comes(&[7; 16]);
                other = other.next(&delta);
                prop_assert!(matches!(judge(&other, &word), Verdict::Refused(_)), "{other:?}");
            }
        }

        /// One bit is either of no consequence or makes the mark unreadable; it never makes a lie.
        #[test]
        fn a_bit_of_the_mark_never_vouches_for_a_database_that_lost_something(
            commits in 1u64..10, bit in 0usize..SLOT * SLOTS * 8, lost in 1u64..10,
        ) {
            let all = history(commits);
            let mut bytes = file_after(&all);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let word = word_of(&bytes);
            let verdict = judge(&all[commits as usize], &word);
            prop_assert!(matches!(verdict, Verdict::Whole { .. }), "one slot is enough: {verdict:?}");
            // Of two faults at once the second is one commit away at most.
            let older = all[(commits - lost.min(commits)) as usize];
            let refused = matches!(judge(&older, &word), Verdict::Refused(_));
            prop_assert!(refused || lost.min(commits) == 1, "{word:?}");
        }

        #[test]
        fn any_bytes_are_a_word(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
            prop_assert_eq!(word_of(&bytes), Word::Damaged);
        }
    }

    #[test]
    fn histories_do_not_vouch_for_each_other() {
        let (ours, theirs) = (history(5), history(5));
        for (n, at) in theirs.iter().enumerate() {
            let verdict = judge(at, &word_of(&file_after(&ours[..=n])));
            assert_eq!(verdict, Verdict::Refused(Refusal::Apart), "{n}");
        }
        assert_eq!(judge(&ours[0], &Word::Missing), Verdict::Begun);
        assert_eq!(judge(&ours[1], &Word::Missing), Verdict::Refused(Refusal::NoMark));
        assert!(ours.iter().all(Position::is_sound));
        assert!(!Position { rows: 99, ..ours[3] }.is_sound());
        // A database that goes on while somebody looks is not behind.
        let early = word_of(&file_after(&ours[..3]));
        assert_eq!(judge_live(&ours[5], &early), Verdict::Whole { mark: false });
        assert!(matches!(judge_live(&ours[1], &early), Verdict::Refused(Refusal::Behind { .. })));
    }
}
