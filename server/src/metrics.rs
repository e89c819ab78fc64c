//! What the daemon counts, for Prometheus (OpenMetrics text).
//!
//! Owns: names and labels of metrics. Labels are bounded: operation ids, status classes, states; never ids or
//! names.

use std::time::Duration;

use mirrorvm::host::Host;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::problem::ProblemCode;

/// Operation and class of its answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Asked {
    operation: &'static str,
    class: &'static str,
}

impl EncodeLabelSet for Asked {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        [("operation", self.operation), ("status", self.class)].encode(encoder)
    }
}

/// What became of a connection that came to a full listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turned {
    /// It took the place of one that asked for nothing.
    Replaced,
    /// It is one of the few beyond the bound, for monitoring.
    Reserved,
    /// It was closed.
    Refused,
}

impl Turned {
    /// As log and counters have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Replaced => "replaced",
            Self::Reserved => "reserved",
            Self::Refused => "refused",
        }
    }
}

/// One label.
type State = [(&'static str, &'static str); 1];

/// Counters of one daemon.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Asked, Counter>,
    latency: Histogram,
    connections: Gauge,
    crowded: Family<State, Counter>,
    problems: Family<State, Counter>,
    streams: Gauge,
    long_polls: Gauge,
    guests: Family<State, Gauge>,
    mirrors: Family<State, Gauge>,
    migrations: Family<State, Gauge>,
    audits: Family<State, Gauge>,
    events: Gauge,
    peer_handshakes: Gauge,
    peer_links: Gauge,
    peer_message_bytes: Gauge,
    peer_turned_away: Family<State, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("mirrorvm");
        // 50 microseconds to about 26 seconds.
        let latency = Histogram::new(exponential_buckets(5e-5, 4.0, 10));
        let metrics = Self {
            registry: Registry::default(),
            requests: Family::default(),
            latency,
            connections: Gauge::default(),
            crowded: Family::default(),
            problems: Family::default(),
            streams: Gauge::default(),
            long_polls: Gauge::default(),
            guests: Family::default(),
            mirrors: Family::default(),
            migrations: Family::default(),
            audits: Family::default(),
            events: Gauge::default(),
            peer_handshakes: Gauge::default(),
            peer_links: Gauge::default(),
            peer_message_bytes: Gauge::default(),
            peer_turned_away: Family::default(),
        };
        registry.register("http_requests", "Requests answered", metrics.requests.clone());
        registry.register("http_request_duration_seconds", "Time to the answer", metrics.latency.clone());
        registry.register("http_connections", "Open connections", metrics.connections.clone());
        registry.register(
            "http_listener_full",
            "Connections that came to a full listener, by what became of them",
            metrics.crowded.clone(),
        );
        registry.register("http_problems", "Problems answered, by code", metrics.problems.clone());
        registry.register("long_polls", "Callers that wait for a change", metrics.long_polls.clone());
        registry.register("event_streams", "Open event streams", metrics.streams.clone());
        registry.register("guests", "Guests by state", metrics.guests.clone());
        registry.register("mirrors", "Mirrors by state", metrics.mirrors.clone());
        registry.register("migrations", "Migrations by state", metrics.migrations.clone());
        registry.register(
            "memory_audits",
            "Migrations by what the comparison of memory found",
            metrics.audits.clone(),
        );
        registry.register("events_latest", "Number of the newest event", metrics.events.clone());
        let (handshakes, links) = (metrics.peer_handshakes.clone(), metrics.peer_links.clone());
        registry.register("peer_handshakes", "Connections to the peer port in their handshake", handshakes);
        registry.register("peer_links", "Links of peers", links);
        let bytes = metrics.peer_message_bytes.clone();
        registry.register("peer_message_bytes", "Bytes of messages that links of peers hold", bytes);
        let turned = metrics.peer_turned_away.clone();
        registry.register(
            "peer_connections_turned_away",
            "Connections to the peer port that came to nothing",
            turned,
        );
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// One request was answered.
    pub fn answered(&self, operation: &'static str, status: u16, took: Duration) {
        let class = match status / 100 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            _ => "5xx",
        };
        self.requests.get_or_create(&Asked { operation, class }).inc();
        self.latency.observe(took.as_secs_f64());
    }

    /// One request was answered with a problem.
    pub fn problem(&self, code: ProblemCode) {
        self.problems.get_or_create(&[("code", code.as_str())]).inc();
    }

    /// A connection is open until the guard goes.
    pub fn connection(&self) -> Open {
        self.connections.inc();
        Open(self.connections.clone())
    }

    /// A connection came to a full listener.
    pub fn turned(&self, turned: Turned) {
        self.crowded.get_or_create(&[("what", turned.name())]).inc();
    }

    /// A caller waits until the guard goes.
    pub fn long_poll(&self) -> Open {
        self.long_polls.inc();
        Open(self.long_polls.clone())
    }

    /// An event stream is open until the guard goes.
    pub fn stream(&self) -> Open {
        self.streams.inc();
        Open(self.streams.clone())
    }

    /// Everything as text, the resources counted now.
    ///
    /// # Errors
    /// None that a String gives.
    pub fn text(&self, host: Option<&Host>) -> Result<String, std::fmt::Error> {
        if let Some(host) = host {
            self.guests.clear();
            for (state, guests) in host.guests_by_state() {
                self.guests.get_or_create(&[("state", state.name())]).set(guests as i64);
            }
            count(&self.mirrors, host.mirrors().iter().map(|m| m.state.name()));
            let migrations = host.migrations();
            count(&self.migrations, migrations.iter().map(|m| m.state.name()));
            count(&self.audits, migrations.iter().filter_map(|m| Some(m.audit.as_ref()?.state.name())));
            self.events.set(host.events().latest().seq as i64);
            if let Some((now, turned)) = host.peer_port() {
                self.peer_handshakes.set(now.handshakes as i64);
                self.peer_links.set(now.links as i64);
                self.peer_message_bytes.set(now.message_bytes as i64);
                for (reason, count) in turned {
                    let counter = self.peer_turned_away.get_or_create(&[("reason", reason)]);
                    // The listener counts; a scrape that came between takes nothing back.
                    counter.inc_by(count.saturating_sub(counter.get()));
                }
            }
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn count(family: &Family<State, Gauge>, states: impl Iterator<Item = &'static str>) {
    family.clear();
    for state in states {
        family.get_or_create(&[("state", state)]).inc();
    }
}

/// Something is open as long as this lives.
#[derive(Debug)]
pub struct Open(Gauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_counted() {
        let metrics = Metrics::default();
        metrics.answered("guest_get", 200, Duration::from_millis(1));
        metrics.answered("guest_get", 404, Duration::from_millis(1));
        metrics.turned(Turned::Replaced);
        metrics.problem(ProblemCode::TooManyLongPolls);
        let open = metrics.connection();
        let text = metrics.text(None).unwrap();
        for line in [
            "mirrorvm_http_requests_total{operation=\"guest_get\",status=\"2xx\"} 1",
            "mirrorvm_http_requests_total{operation=\"guest_get\",status=\"4xx\"} 1",
            "mirrorvm_http_connections 1",
            "mirrorvm_http_problems_total{code=\"too_many_long_polls\"} 1",
            "mirrorvm_http_listener_full_total{what=\"replaced\"} 1",
            "mirrorvm_http_request_duration_seconds_count 2",
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        drop(open);
        assert!(metrics.text(None).unwrap().contains("mirrorvm_http_connections 0"));
    }
}
