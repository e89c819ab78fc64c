//! What happened: as one JSON object, or as a table with what to try next.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::method::Method;
use super::plan::Facts;
use super::setting::Fallback;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// What happened.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) driver: &'static str,
    pub(super) fallback: Option<Fallback>,
    pub(super) method: Method,
    pub(super) protection_level: String,
    /// What holds at this level.
    pub(super) protection_promise: String,
    pub(super) memory_bytes: u64,
    pub(super) streams: u16,
    pub(super) plan: Facts,
    pub(super) mirror_ready_us: u64,
    /// As the source's daemon has it.
    pub(super) progress: Value,
    pub(super) rounds: Vec<Round>,
    pub(super) verified: Verified,
    pub(super) source_state: String,
    pub(super) destination_state: String,
}

/// One pass over memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    pub(super) bytes: u64,
    pub(super) duration_us: u64,
    pub(super) pages: u64,
    pub(super) dirtied_pages: u64,
    pub(super) paused: bool,
}

/// What the comparison gave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Verified {
    pub(super) pages_compared: u64,
    pub(super) mismatches: u64,
    pub(super) guest_continued: bool,
}

impl Report {
    /// Whether every page of RAM was compared and equal, and the guest runs at the destination alone.
    pub(super) fn verified(&self) -> bool {
        let v = &self.verified;
        v.pages_compared * PAGE == self.memory_bytes
            && v.pages_compared > 0
            && v.mismatches == 0
            && v.guest_continued
            && self.source_state == "stopped"
            && self.destination_state == "running"
    }

    /// Bytes of page content over the sum of the rounds' durations.
    pub(super) fn throughput(&self) -> u64 {
        let bytes: u64 = self.rounds.iter().map(|r| r.bytes).sum();
        let us: u64 = self.rounds.iter().map(|r| r.duration_us).sum();
        u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(us.max(1))).unwrap_or(u64::MAX)
    }

    /// One object.
    pub(super) fn json(&self) -> Value {
        let p = &self.progress;
        json!({
            "driver": self.driver,
            "fallback": self.fallback.as_ref().map(Fallback::json),
            "strategy": self.method.kind(),
            "via": self.method.via(),
            "protection_level": self.protection_level,
            "protection_promise": self.protection_promise,
            "memory_bytes": self.memory_bytes,
            "streams": self.streams,
            "helper_addresses": self.plan.addressing,
            "guest_can_write_helper": self.plan.guest_writes_helper(),
            "mirror_slots": self.plan.slots,
            "page_table_pages": self.plan.page_table_pages,
            "exposures": self.plan.exposures,
            "unreachable": {"codes": self.plan.unreachable, "bytes": self.plan.unreachable_bytes},
            "mirror_ready_ms": self.mirror_ready_us as f64 / 1e3,
            "pages_sealed": p["helper"]["pages_encrypted"],
            "pages_shared": p["helper"]["pages_plain"],
            "rounds": self.rounds.len(),
            "total_ms": p["elapsed_ms"],
            "downtime_ms": p["downtime_ms"],
            "verify_ms": p["verify_ms"],
            "throughput_bytes_per_second": self.throughput(),
            "verified": {
                "pages_compared": self.verified.pages_compared,
                "mismatches": self.verified.mismatches,
                "guest_continued": self.verified.guest_continued,
            },
            "source_state": self.source_state,
            "destination_state": self.destination_state,
        })
    }

    /// A table for people, and what to try next.
    pub(super) fn table(&self) -> String {
        let (p, v) = (&self.progress, &self.verified);
        let memory = &p["memory"];
        let ms = |value: &Value| value.as_f64().map_or("unknown".to_owned(), |ms| format!("{ms:.1} ms"));
        let mut out = String::from("\n");
        let mut row = |name: &str, value: String| {
            let _ = writeln!(out, "  {name:<17} {value}");
        };
        row("guest", format!("{} with {}", self.driver, size(self.memory_bytes)));
        if let Some(fallback) = &self.fallback {
            row("", format!("emulated because {} is missing: {}", fallback.code, fallback.why));
        }
        row("strategy", format!("{}, {} stream(s)", self.method.title(), self.streams));
        row("protection level", format!("{}: {}", self.protection_level, self.protection_promise));
        row("mirror ready", format!("{:.1} ms after the request", self.mirror_ready_us as f64 / 1e3));
        for (i, r) in self.rounds.iter().enumerate() {
            let name = if i == 0 { "rounds" } else { "" };
            let (ms, moved) = (r.duration_us as f64 / 1e3, size(r.bytes));
            let what = if r.paused {
                "while the guest was paused".to_owned()
            } else {
                format!("while the guest dirtied {} pages", r.dirtied_pages)
            };
            row(name, format!("{}: {} pages, {moved} in {ms:.1} ms {what}", i + 1, r.pages));
        }
        let (sealed, shared) = (&p["helper"]["pages_encrypted"], &p["helper"]["pages_plain"]);
        let zero = &memory["zero_pages"];
        row("pages", format!("{sealed} sealed (of these {zero} as a mark for zero), {shared} shared"));
        row("total time", format!("{}, with set-up and both hosts' digests", ms(&p["elapsed_ms"])));
        let verify = ms(&p["verify_ms"]);
        row(
            "downtime",
            format!("{} (and {verify} for digests, only for the comparison)", ms(&p["downtime_ms"])),
        );
        row("throughput", format!("{}/s of page content", size(self.throughput())));
        row("verified", format!("{} pages compared, {} differ", v.pages_compared, v.mismatches));
        let goes_on = if v.guest_continued { "goes on with its memory intact" } else { "DOES NOT go on" };
        row(
            "guest",
            format!("{goes_on}; source {}, destination {}", self.source_state, self.destination_state),
        );
        out.push_str(NEXT);
        out
    }
}

const NEXT: &str = "
What to try next, each after `cargo run --release --`
  demo --strategy all                    every strategy in turn, and a table that compares them
  demo --driver emulated --es            a software machine with a model of SEV-ES; needs no KVM
  demo --shift max-phys                  the RAM window in the upper half of the address space
  demo --dirty-mib-per-s 400             a guest that rewrites all it can: a longer downtime
  demo --fill zero                       pages that cross as a mark only
  demo --memory-mib 1024 --streams 1     one helper worker and one connection
  demo --driver qemu --kernel OUT/vmlinuz --initrd OUT/initrd.gz
                                         a Linux guest in QEMU; tests/guest/build-linux-guest OUT makes both files
README.md has the same session by hand, with curl; docs/ has the address spaces, with drawings, and the rest
";

/// Bytes for people.
pub(super) fn size(bytes: u64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) if bytes.is_multiple_of(*unit) => format!("{} {name}", bytes / unit),
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

/// A report of two pages, for tests.
#[cfg(test)]
pub(super) fn example(method: Method) -> Report {
    let round = |paused| Round { bytes: 1 << 20, duration_us: 500, pages: 256, dirtied_pages: 1, paused };
    Report {
        driver: "embedded",
        fallback: None,
        method,
        protection_level: "none".into(),
        protection_promise: "nothing".into(),
        memory_bytes: 8192,
        streams: 1,
        plan: Facts {
            addressing: "ram_addr".into(),
            slots: 4,
            page_table_pages: 9,
            exposures: vec!["host_sees_everything".into()],
            unreachable: Vec::new(),
            unreachable_bytes: 0,
        },
        mirror_ready_us: 1500,
        progress: json!({"elapsed_ms": 9, "downtime_ms": 1.5, "verify_ms": 2.0,
            "helper": {"pages_encrypted": 2, "pages_plain": 0}, "memory": {"zero_pages": 0}}),
        rounds: vec![round(false), round(true)],
        verified: Verified { pages_compared: 2, mismatches: 0, guest_continued: true },
        source_state: "stopped".into(),
        destination_state: "running".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        example(Method::IdentityCbit)
    }

    #[test]
    fn only_a_complete_comparison_verifies() {
        assert!(report().verified());
        let mut fewer = report();
        fewer.verified.pages_compared = 1;
        let mut differs = report();
        differs.verified.mismatches = 1;
        let mut silent = report();
        silent.verified.guest_continued = false;
        let mut twice = report();
        twice.source_state = "running".into();
        let mut nothing = report();
        (nothing.memory_bytes, nothing.verified.pages_compared) = (0, 0);
        for bad in [fewer, differs, silent, twice, nothing] {
            assert!(!bad.verified(), "{bad:?}");
        }
    }

    #[test]
    fn throughput_is_content_over_the_time_of_rounds() {
        let value = report().json();
        assert_eq!(value["throughput_bytes_per_second"], (2 << 20) * 1000);
        assert_eq!((&value["rounds"], &value["total_ms"]), (&json!(2), &json!(9)));
        assert!(report().table().contains("downtime          1.5 ms (and 2.0 ms"));
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [(0, "0 B"), (4096, "4 KiB"), (3 << 29, "1.5 GiB"), (256 << 20, "256 MiB")] {
            assert_eq!(size(bytes), text);
        }
    }
}
