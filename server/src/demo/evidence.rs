//! What the two hosts say of a migration that has ended: records, page digests, rounds.

use std::time::Duration;

use mirrorvm_client::{Client, Request};
use tokio::time::timeout;

use super::course::{Hosts, SETTLED};
use super::error::{DemoError, doing, failed};
use super::json::number;
use super::report::Round;

const DIGEST_BYTES: usize = 16;
/// One long poll: the reader sees something move as often.
pub(super) const POLL: Duration = Duration::from_secs(1);

/// Waits until the destination's record of the migration has ended: it settles a moment after the source's.
pub(super) async fn await_end(destination: &Client, path: &str) -> Result<(), DemoError> {
    let ended = async {
        let mut watch = destination.watch(Request::get(path), POLL);
        loop {
            let seen = watch.changed().await.map_err(doing("watching the destination"))?;
            match seen.as_ref().map(|m| m["state"].as_str().unwrap_or_default()) {
                Some("succeeded") => return Ok(()),
                Some("failed" | "canceled" | "in_doubt") => return Err(failed(&seen.unwrap_or_default())),
                _ => {}
            }
        }
    };
    timeout(SETTLED, ended)
        .await
        .unwrap_or(Err(DemoError::TooLate { what: "the end at the destination", limit: SETTLED }))
}

/// Pages compared, and how many differ. A page that one list lacks differs. `ram` is the guest's, in bytes.
pub(super) async fn compare(hosts: &Hosts, path: &str, ram: u64) -> Result<(u64, u64), DemoError> {
    // Digests are far smaller than what they are of.
    let digests = Request::get(format!("{path}/page-digests")).answered_up_to(ram);
    let here = hosts.source.send(&digests).await.map_err(doing("fetching the source's digests"))?;
    let there =
        hosts.destination.send(&digests).await.map_err(doing("fetching the destination's digests"))?;
    Ok(differences(here.body(), there.body()))
}

fn differences(here: &[u8], there: &[u8]) -> (u64, u64) {
    let (here, there) = (here.chunks(DIGEST_BYTES), there.chunks(DIGEST_BYTES));
    let (most, least) = (here.len().max(there.len()), here.len().min(there.len()));
    let differ = here.zip(there).filter(|(a, b)| a != b || a.len() != DIGEST_BYTES).count();
    (least as u64, (differ + most - least) as u64)
}

pub(super) async fn rounds(source: &Client, path: &str) -> Result<Vec<Round>, DemoError> {
    let list = source.get(&format!("{path}/rounds")).await.map_err(doing("reading the rounds"))?;
    let items = list["items"].as_array().ok_or(DemoError::Answer { field: "items" })?;
    items
        .iter()
        .map(|r| {
            Ok(Round {
                bytes: number(r, "bytes")?,
                duration_us: number(r, "duration_us")?,
                pages: number(r, "pages")?,
                dirtied_pages: number(r, "dirtied_pages")?,
                paused: r["paused"] == true,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_counts() {
        let here = [[1u8; 16], [2; 16], [3; 16]].concat();
        assert_eq!(differences(&here, &here), (3, 0));
        let mut there = here.clone();
        there[40] ^= 1;
        assert_eq!(differences(&here, &there), (3, 1));
        assert_eq!(differences(&here, &here[..32]), (2, 1));
        assert_eq!(differences(&here[..40], &here[..40]), (3, 1), "half a digest is none");
        assert_eq!(differences(&[], &[]), (0, 0));
    }
}
