//! What the guest says: both guests print a line with a growing number and the health of their memory.

use mirrorvm_client::{Client, ClientError};

/// One line of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Beat {
    /// Grows by the time that the guest ran.
    pub(super) tick: u64,
    health: Health,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Health {
    /// The embedded guest: pages that it found other than it had left them.
    Errors(u64),
    /// The Linux guest: digest of a file in its RAM.
    Sum(String),
}

impl Beat {
    /// From `tick N pages P errors E` or `tick N sum=S uptime=U`.
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["tick", tick, "pages", _, "errors", errors] => {
                Some(Self { tick: tick.parse().ok()?, health: Health::Errors(errors.parse().ok()?) })
            }
            ["tick", tick, sum, ..] => {
                let sum = sum.strip_prefix("sum=").filter(|s| !s.is_empty())?.to_owned();
                Some(Self { tick: tick.parse().ok()?, health: Health::Sum(sum) })
            }
            _ => None,
        }
    }

    /// Whether this may come from the guest that said `before`, later, with its memory as it was.
    pub(super) fn follows(&self, before: &Self) -> bool {
        let healthy = match (&self.health, &before.health) {
            (Health::Errors(now), Health::Errors(then)) => *now == 0 && *then == 0,
            (Health::Sum(now), Health::Sum(then)) => now == then,
            (Health::Errors(_), Health::Sum(_)) | (Health::Sum(_), Health::Errors(_)) => false,
        };
        healthy && self.tick > before.tick
    }
}

/// Reads a guest's console on from where it was read last. A clone goes on at another host: offsets survive
/// migration.
#[derive(Clone, Debug, Default)]
pub(super) struct Reader {
    offset: u64,
    line: String,
    last: Option<Beat>,
}

impl Reader {
    /// Reads what is new; gives the lines that tell of a beat.
    pub(super) async fn read(&mut self, client: &Client, guest: &str) -> Result<Vec<Beat>, ClientError> {
        let path = format!("/v1/guests/{guest}/console?max_bytes=1048576&offset={}", self.offset);
        let answer = client.get(&path).await?;
        self.offset = answer["next_offset"].as_u64().unwrap_or(self.offset);
        Ok(self.take(answer["data"].as_str().unwrap_or_default()))
    }

    /// The newest beat.
    pub(super) const fn last(&self) -> Option<&Beat> {
        self.last.as_ref()
    }

    /// Bytes of console output so far.
    pub(super) const fn offset(&self) -> u64 {
        self.offset
    }

    /// Beats of complete lines; the beginning of an incomplete one is kept.
    fn take(&mut self, text: &str) -> Vec<Beat> {
        self.line.push_str(text);
        let Some(end) = self.line.rfind('\n') else { return Vec::new() };
        let rest = self.line.split_off(end + 1);
        let lines = std::mem::replace(&mut self.line, rest);
        let beats: Vec<Beat> = lines.lines().filter_map(Beat::parse).collect();
        self.last = beats.last().cloned().or(self.last.take());
        beats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_beats_when_they_are_complete() {
        let mut reader = Reader::default();
        assert_eq!(reader.take("mirrorvm workload: filling RAM\ntick 10 pages 2"), []);
        let first = reader.take("00 errors 0\ntick 20 pages 300 errors 0\ntick 3");
        assert_eq!(first.iter().map(|b| b.tick).collect::<Vec<_>>(), [10, 20]);
        assert_eq!(reader.take(""), []);
        assert_eq!(reader.last(), first.last());
        let next = reader.take("0 pages 400 errors 1\n").remove(0);
        assert!(first[1].follows(&first[0]) && !first[0].follows(&first[1]));
        assert!(!next.follows(&first[1]), "it found a wrong page");
    }

    #[test]
    fn a_linux_guest_keeps_its_sum() {
        let beat = |line| Beat::parse(line).unwrap();
        let before = beat("tick 3 sum=aabb uptime=1.50\r");
        assert!(beat("tick 4 sum=aabb uptime=1.75").follows(&before));
        assert!(!beat("tick 4 sum=aacc uptime=1.75").follows(&before));
        assert!(Beat::parse("tick 1 sum= uptime=1.00").is_none());
        assert!(Beat::parse("file sha256=aabb").is_none());
    }
}
