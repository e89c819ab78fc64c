//! What happened: pages of events, and a stream of them.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderName, header};
use axum::response::{IntoResponse, Response};
use mirrorvm::host::events::{EventCursor, Events, EventsError};
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;

use super::common::LabelParams;
use crate::access::caller::Caller;
use crate::api::events::{Event, EventFilter, EventList};
use crate::api::page::{LIMIT_DEFAULT, LIMIT_MAX};
use crate::http::middleware::sole;
use crate::http::places::Full;
use crate::http::query::{Parameters, Query};
use crate::http::stream::{self, Chunks, Hangup};
use crate::http::wait;
use crate::problem::{Problem, ProblemCode, ProblemError};
use crate::state::AppState;

/// How long a stream stays quiet before it sends a bookmark.
const BOOKMARK: Duration = Duration::from_secs(15);
/// Events that a stream takes from the log at a time.
const BATCH: usize = 256;
/// How many values a repeatable filter may have.
const FILTERS_MAX: usize = 32;
/// Stands for the newest event.
const LATEST: &str = "latest";
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Turns the reason why there are no events into a problem.
pub(super) fn expired(e: EventsError) -> Problem {
    match e {
        EventsError::Expired { oldest, latest } => {
            let detail = "the events after this cursor are not kept any more, or it is another host's";
            Problem::new(ProblemCode::EventCursorExpired, detail)
                .with_cursors(oldest.to_string(), latest.to_string())
        }
        EventsError::Host(e) => e.into(),
    }
}

fn cursor(text: &str) -> Option<EventCursor> {
    text.parse().ok()
}

/// Where a reader goes on.
enum After {
    /// Behind whatever has happened by now.
    Latest,
    /// Behind this one.
    Event(EventCursor),
}

impl After {
    fn cursor(self, events: &Events) -> EventCursor {
        match self {
            Self::Latest => events.latest(),
            Self::Event(cursor) => cursor,
        }
    }
}

fn after(parameters: &mut Parameters) -> Option<After> {
    let text = parameters.one("after")?;
    if text == LATEST {
        return Some(After::Latest);
    }
    let found = cursor(&text).map(After::Event);
    if found.is_none() {
        let shown: String = text.chars().take(64).collect();
        let detail = format!("{shown:?} is neither an event's id nor {LATEST}");
        parameters.problem(ProblemError::at_parameter("after", "invalid_format", detail));
    }
    found
}

fn filter(parameters: &mut Parameters) -> EventFilter {
    let mut few = |name: &str| {
        let values = parameters.all(name);
        if values.len() > FILTERS_MAX {
            let detail = format!("{name} is given more than {FILTERS_MAX} times");
            parameters.problem(ProblemError::at_parameter(name, "too_many", detail));
        }
        values
    };
    let (types, resources) = (few("type"), few("resource"));
    EventFilter { types, resources, labels: parameters.labels() }
}

/// List events
///
/// In order, the oldest first. `after` continues where the last page ended (its `next_cursor`). With `wait`
/// the answer comes as soon as there is an event. To hold a list and follow it, begin after its
/// `events_cursor`: what it does not have yet comes as events, and an event may tell of what it has already.
/// The problem `event_cursor_expired` means that the events after a cursor are not kept any more.
#[utoipa::path(get, path = "/v1/events", operation_id = "event_list", tag = "events",
    params(
        ("after" = Option<String>, Query, description = "Only events after this one, or, as `latest`, after the newest; absent: from the oldest that is kept"),
        ("type" = Option<Vec<String>>, Query, description = "Only these types, exact or as `guest.*`; may be repeated",
            example = json!(["guest.*"])),
        ("resource" = Option<Vec<String>>, Query,
            description = "Only of these resources, by id or name, or those of this guest; may be repeated"),
        LabelParams,
        ("limit" = Option<u32>, Query, description = "Most events", minimum = 1, maximum = 1000),
        ("wait" = Option<String>, Query, description = "How long to wait for the first, 0 to 60 seconds with the unit",
            pattern = "^([0-9]|[1-5][0-9]|60)s$", example = "30s"),
    ),
    responses((status = 200, description = "A page of events", body = EventList)))]
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    query: Query,
) -> Result<Json<EventList>, Problem> {
    let mut parameters = query.read()?;
    let after = after(&mut parameters);
    let filter = filter(&mut parameters);
    let limit = parameters.int("limit", 1, LIMIT_MAX).unwrap_or(LIMIT_DEFAULT);
    let patience = parameters.wait();
    parameters.done()?;
    let host = state.host()?;
    let mut after = after.map(|after| after.cursor(host.events()));
    let id = host.info().id;
    let deadline = Instant::now() + patience;
    let (mut news, mut closing) = (host.events().watch(), state.closing());
    let mut waiting = None;
    loop {
        news.mark_unchanged();
        let page = host.events().page(after.as_ref(), limit, &filter.resources, |body| filter.wants(body));
        let page = page.map_err(expired)?;
        if page.events.is_empty() {
            if !page.more && waiting.is_none() && !patience.is_zero() {
                waiting = Some(wait::begin(&state, &caller)?);
            }
            let more = page.more || {
                tokio::select! {
                    changed = news.changed() => changed.is_ok(),
                    _ = closing.wait_for(|closing| *closing) => false,
                    () = tokio::time::sleep_until(deadline) => false,
                }
            };
            if more {
                after = Some(page.next);
                continue;
            }
        }
        let items = page.events.into_iter().map(|e| Event::new(e, id)).collect();
        return Ok(Json(EventList { items, next_cursor: page.next.to_string(), more: page.more }));
    }
}

/// Follow events
///
/// Server-sent events: `id` is the event's id, `event` its type, and `data` the event as JSON. The stream
/// begins after `Last-Event-ID` or `after`, and without either with what happens from now on. Every 15
/// seconds `event: bookmark` gives an id to continue from, and `event: closing` comes before the daemon ends;
/// both are events of the host in form, and in no list. A reader that takes nothing for long is disconnected.
/// No event is ever left out.
#[utoipa::path(get, path = "/v1/events/stream", operation_id = "event_stream", tag = "events",
    params(
        ("after" = Option<String>, Query, description = "Only events after this one, or, as `latest` and when absent, after the newest"),
        ("Last-Event-ID" = Option<String>, Header, description = "The same, as browsers send it; counts before `after`"),
        ("type" = Option<Vec<String>>, Query, description = "Only these types, exact or as `guest.*`; may be repeated",
            example = json!(["guest.*"])),
        ("resource" = Option<Vec<String>>, Query,
            description = "Only of these resources, by id or name, or those of this guest; may be repeated"),
        LabelParams,
    ),
    responses((status = 200, description = "Events as they come, each as the `data` of one", body = Event, content_type = "text/event-stream")))]
pub async fn stream(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    hangup: Option<Extension<Hangup>>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let mut parameters = query.read()?;
    let mut start = after(&mut parameters);
    let filter = filter(&mut parameters);
    if headers.contains_key(&LAST_EVENT_ID) {
        start = sole(&headers, &LAST_EVENT_ID).and_then(cursor).map(After::Event);
        if start.is_none() {
            let detail = "last-event-id is not given once with an event's id";
            parameters.problem(ProblemError::at_header(&LAST_EVENT_ID, "invalid_format", detail));
        }
    }
    parameters.done()?;
    let host = state.host()?;
    let start = start.unwrap_or(After::Latest).cursor(host.events());
    // A cursor that is no good is said now, as a problem.
    let _ = host.events().page(Some(&start), 1, &[], |_| false).map_err(expired)?;
    let full = |full| {
        let detail = match full {
            Full::All => "there are as many event streams as there may be".to_owned(),
            Full::Theirs { each } => {
                format!("{} has {each} event streams, as many as one principal may", caller.principal)
            }
        };
        Problem::new(ProblemCode::NoResources, detail)
    };
    let slot = state.streams().take(&caller.principal).map_err(full)?;
    let counted = state.metrics().stream();
    let stall = Duration::from_secs(state.config().limits.stream_stall_seconds.into());
    let (sender, body) = stream::channel(stall, hangup.map(|Extension(h)| h));
    let follow = Follow { state: state.clone(), filter, host: host.info().id, sender };
    tokio::spawn(async move {
        follow.run(start).await;
        drop((slot, counted));
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::new(body)).into_response())
}

/// Returns when the daemon ends.
async fn closed(closing: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, and the daemon with it.
    let _ = closing.wait_for(|closing| *closing).await;
}

/// The stream of one reader, and where it stands.
struct Follow {
    state: AppState,
    filter: EventFilter,
    host: Uuid,
    sender: Arc<Chunks>,
}

impl Follow {
    async fn run(self, start: EventCursor) {
        if let Err(end) = self.send_all(start).await {
            tracing::debug!(?end, "an event stream ended");
        }
    }

    async fn send_all(&self, mut at: EventCursor) -> Result<(), stream::Gone> {
        let Ok(host) = self.state.host() else { return Ok(()) };
        let (mut news, mut closing) = (host.events().watch(), self.state.closing());
        self.sender.send(Bytes::from_static(b": mirrorvm events\n\n")).await?;
        loop {
            news.mark_unchanged();
            match host.events().page(Some(&at), BATCH, &self.filter.resources, |body| self.filter.wants(body))
            {
                Ok(page) => {
                    for event in page.events {
                        self.tell(&Event::new(event, self.host)).await?;
                    }
                    at = page.next;
                    if page.more {
                        continue;
                    }
                }
                // The reader is slower than the log is short.
                Err(_) => return self.mark("expired", &at).await,
            }
            tokio::select! {
                changed = news.changed() => {
                    if changed.is_err() {
                        return self.mark("closing", &at).await;
                    }
                }
                () = closed(&mut closing) => return self.mark("closing", &at).await,
                () = tokio::time::sleep(BOOKMARK) => self.mark("bookmark", &at).await?,
                () = self.sender.closed() => return Ok(()),
            }
        }
    }

    async fn tell(&self, event: &Event) -> Result<(), stream::Gone> {
        let data = serde_json::to_string(event).unwrap_or_default();
        self.sender.send(format!("id: {}\nevent: {}\ndata: {data}\n\n", event.id, event.kind).into()).await
    }

    async fn mark(&self, kind: &str, at: &EventCursor) -> Result<(), stream::Gone> {
        self.tell(&Event::mark(kind, at, self.host)).await
    }
}
