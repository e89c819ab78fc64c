//! Owns the QMP conversation: greeting, capabilities, commands with ids, events, and passing a descriptor
//! along. Must not know what the commands mean or who runs QEMU.
//!
//! Protocol: QEMU docs/interop/qmp-spec.rst. One JSON object per line. The peer is not trusted: a line is at
//! most [`MAX_LINE_BYTES`], the event queue is bounded (oldest dropped), every wait has a deadline.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use serde_json::{Map, Value, json};
use thiserror::Error;

/// Longest line taken from QEMU, in bytes. `info mtree` of a large machine is some tens of KiB.
const MAX_LINE_BYTES: usize = 4 << 20;
/// Events kept for a caller that is not looking; the oldest goes first.
const MAX_EVENTS: usize = 256;
/// Most bytes that are taken in at once while nobody waits for anything.
const MAX_TAKEN_BYTES: usize = 1 << 20;
/// Longest error class, description or event name carried along, in bytes.
const MAX_TEXT_BYTES: usize = 1024;

/// A QMP exchange failed.
#[derive(Debug, Error)]
pub enum QmpError {
    /// QEMU answered with an error; the connection is fine.
    #[error("qemu refused {command} ({class}: {desc})")]
    Refused {
        /// Name of the QMP command.
        command: String,
        /// QEMU's error class, e.g. `GenericError`; cut to 1 KiB.
        class: String,
        /// QEMU's text; cut to 1 KiB, control characters removed. Not ours, so not to be parsed.
        desc: String,
    },
    /// Nothing came in time. The connection is fine; a late answer is skipped.
    #[error("no answer from qemu to {waiting_for} by the deadline")]
    Deadline {
        /// Command, event or `greeting`.
        waiting_for: String,
    },
    /// QEMU closed the connection: it exited, or is exiting.
    #[error("qemu closed its control socket")]
    Closed,
    /// The socket failed otherwise.
    #[error("the control socket to qemu failed")]
    Io(#[source] io::Error),
    /// More than the limit without a line end; the connection is given up.
    #[error("qemu sent a line longer than {limit} bytes")]
    LineTooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// A line was not JSON; the connection is given up.
    #[error("qemu sent something that is not json")]
    NotJson(#[source] serde_json::Error),
    /// A line was JSON but not what the protocol allows here; the connection is given up.
    #[error("qemu sent a message that is not qmp: {what}")]
    NotQmp {
        /// What was wrong with the answer.
        what: &'static str,
    },
}

/// Something QEMU reported unasked.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// For example `STOP`, `RESUME`, `SHUTDOWN`, `MIGRATION`.
    pub name: String,
    /// The event's `data`, `Null` where there is none.
    pub data: Value,
}

/// One message from QEMU after the greeting.
enum Message {
    Event(QmpEvent),
    Reply { id: Option<u64>, outcome: Result<Value, (String, String)> },
}

/// A QMP connection past capability negotiation.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// Bytes received and not yet cut into lines.
    pending: Vec<u8>,
    /// How much of `pending` is known to hold no line end.
    scanned: usize,
    last_id: u64,
    events: VecDeque<QmpEvent>,
    /// The framing is lost: no further message can be trusted to start where we think.
    broken: bool,
}

impl Qmp {
    /// Takes the greeting and negotiates capabilities (none are asked for).
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn connect(stream: UnixStream, deadline: Instant) -> Result<Self, QmpError> {
        let mut qmp = Self {
            stream,
            pending: Vec::new(),
            scanned: 0,
            last_id: 0,
            events: VecDeque::new(),
            broken: false,
        };
        let greeting = qmp.receive("greeting", deadline)?;
        if !greeting.contains_key("QMP") {
            return Err(qmp.give_up("no greeting"));
        }
        qmp.execute("qmp_capabilities", json!({}), deadline)?;
        Ok(qmp)
    }

    /// Runs one command and returns its `return` value. `arguments` is a JSON object.
    ///
    /// # Errors
    /// Any [`QmpError`]. After [`QmpError::Deadline`] the command may still take effect.
    pub fn execute(&mut self, command: &str, arguments: Value, deadline: Instant) -> Result<Value, QmpError> {
        self.exchange(command, arguments, None, deadline)
    }

    /// Like [`Qmp::execute`], with a descriptor passed along (`SCM_RIGHTS`), as `getfd` wants.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        self.exchange(command, arguments, Some(fd), deadline)
    }

    /// Waits for an event with one of these names and removes it from the queue; events that arrived earlier
    /// and were not taken count. Others stay queued. A deadline some milliseconds away looks at what has
    /// arrived.
    ///
    /// # Errors
    /// [`QmpError::Deadline`] if none came; [`QmpError::Closed`] if QEMU went away first.
    pub fn wait_event(&mut self, names: &[&str], deadline: Instant) -> Result<QmpEvent, QmpError> {
        let mut next = 0;
        loop {
            // The queue only grows at the end, or is shifted by one when it is full.
            let found = (next..self.events.len())
                .find(|&at| self.events.get(at).is_some_and(|event| names.contains(&event.name.as_str())));
            if let Some(event) = found.and_then(|at| self.events.remove(at)) {
                return Ok(event);
            }
            let waiting_for = names.first().copied().unwrap_or("an event");
            // A reply here is one that its caller no longer waits for.
            if let Message::Event(event) = self.receive_message(waiting_for, deadline)? {
                self.keep(event);
            }
            next = self.events.len().saturating_sub(1);
        }
    }

    /// Takes in what has arrived, without waiting: events are queued, answers that nobody waits for any more
    /// are dropped. QEMU keeps no room for events that find the socket full when it exits.
    pub fn take_in(&mut self) {
        let mut chunk = [0u8; 16 << 10];
        let mut taken = 0;
        let mut ended = false;
        while !self.broken && !ended && taken < MAX_TAKEN_BYTES {
            match recv(&self.stream, &mut chunk[..], RecvFlags::DONTWAIT) {
                Ok((_, count)) if count > 0 => {
                    taken += count;
                    self.pending.extend_from_slice(chunk.get(..count).unwrap_or_default());
                }
                Err(Errno::INTR) => continue,
                // Nothing more, or never more: that is found out by whoever waits for an answer.
                Ok(_) | Err(_) => ended = true,
            }
            while let Some(line) = self.cut_line() {
                match self.message(&line) {
                    Ok(Message::Event(event)) => self.keep(event),
                    Ok(Message::Reply { .. }) => {}
                    Err(_) => return,
                }
            }
            self.broken |= self.pending.len() > MAX_LINE_BYTES;
        }
    }

    /// The newest queued event with this name, which stays queued.
    pub fn last_event(&self, name: &str) -> Option<&QmpEvent> {
        self.events.iter().rev().find(|event| event.name == name)
    }

    /// Takes the queued events with this name, the oldest first.
    pub fn take_events(&mut self, name: &str) -> Vec<QmpEvent> {
        let (taken, kept) = self.events.drain(..).partition(|event| event.name == name);
        self.events = kept;
        let taken: VecDeque<QmpEvent> = taken;
        taken.into()
    }

    /// Forgets queued events with this name, so that a later wait sees only new ones.
    pub fn forget_events(&mut self, name: &str) {
        self.events.retain(|event| event.name != name);
    }

    fn exchange(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        if self.broken {
            return Err(QmpError::Closed);
        }
        self.last_id += 1;
        let id = self.last_id;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        self.send(command, line.as_bytes(), fd, deadline)?;
        loop {
            match self.receive_message(command, deadline)? {
                Message::Event(event) => self.keep(event),
                Message::Reply { id: Some(other), .. } if other < id => {}
                Message::Reply { id: Some(other), outcome } if other == id => {
                    return outcome.map_err(|(class, desc)| QmpError::Refused {
                        command: command.to_owned(),
                        class,
                        desc,
                    });
                }
                Message::Reply { .. } => return Err(self.give_up("a reply to nothing we asked")),
            }
        }
    }

    /// Writes the whole line. A line cut short leaves nothing to agree on, so any failure breaks the
    /// connection.
    fn send(
        &mut self,
        command: &str,
        line: &[u8],
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), QmpError> {
        let sent = self.try_send(line, fd, deadline);
        sent.map_err(|error| {
            self.broken = true;
            match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => QmpError::Closed,
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    QmpError::Deadline { waiting_for: command.to_owned() }
                }
                _ => QmpError::Io(error),
            }
        })
    }

    fn try_send(&mut self, line: &[u8], fd: Option<BorrowedFd<'_>>, deadline: Instant) -> io::Result<()> {
        let mut sent = 0;
        if let Some(fd) = fd {
            self.stream.set_write_timeout(Some(remaining(deadline)))?;
            let fds = [fd];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            sent = sendmsg(&self.stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
        }
        while sent < line.len() {
            self.stream.set_write_timeout(Some(remaining(deadline)))?;
            match self.stream.write(line.get(sent..).unwrap_or_default()) {
                Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
                Ok(more) => sent += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive_message(&mut self, waiting_for: &str, deadline: Instant) -> Result<Message, QmpError> {
        if self.broken {
            return Err(QmpError::Closed);
        }
        let line = self.receive_line(waiting_for, deadline)?;
        self.message(&line)
    }

    fn message(&mut self, line: &[u8]) -> Result<Message, QmpError> {
        let mut object = self.object(line)?;
        if let Some(name) = object.get("event") {
            let name = text(Some(name));
            let data = object.remove("data").unwrap_or(Value::Null);
            return Ok(Message::Event(QmpEvent { name, data }));
        }
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(value) = object.remove("return") {
            return Ok(Message::Reply { id, outcome: Ok(value) });
        }
        match object.get("error") {
            Some(error) => {
                let outcome = Err((text(error.get("class")), text(error.get("desc"))));
                Ok(Message::Reply { id, outcome })
            }
            None => Err(self.give_up("neither event, return nor error")),
        }
    }

    fn receive(&mut self, waiting_for: &str, deadline: Instant) -> Result<Map<String, Value>, QmpError> {
        if self.broken {
            return Err(QmpError::Closed);
        }
        let line = self.receive_line(waiting_for, deadline)?;
        self.object(&line)
    }

    fn object(&mut self, line: &[u8]) -> Result<Map<String, Value>, QmpError> {
        match serde_json::from_slice(line) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err(self.give_up("not an object")),
            Err(error) => {
                self.broken = true;
                Err(QmpError::NotJson(error))
            }
        }
    }

    /// The next whole line, if it has arrived.
    fn cut_line(&mut self) -> Option<Vec<u8>> {
        let unseen = self.pending.get(self.scanned..).unwrap_or_default();
        let Some(at) = unseen.iter().position(|&byte| byte == b'\n') else {
            self.scanned = self.pending.len();
            return None;
        };
        let line = self.pending.drain(..=self.scanned + at).collect();
        self.scanned = 0;
        Some(line)
    }

    fn receive_line(&mut self, waiting_for: &str, deadline: Instant) -> Result<Vec<u8>, QmpError> {
        let mut chunk = [0u8; 16 << 10];
        loop {
            if let Some(line) = self.cut_line() {
                return Ok(line);
            }
            if self.pending.len() > MAX_LINE_BYTES {
                self.broken = true;
                return Err(QmpError::LineTooLong { limit: MAX_LINE_BYTES });
            }
            // Checked here and not only by the socket: a peer that never stops talking never lets a read time
            // out.
            if Instant::now() >= deadline {
                return Err(QmpError::Deadline { waiting_for: waiting_for.to_owned() });
            }
            self.stream.set_read_timeout(Some(remaining(deadline))).map_err(QmpError::Io)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    self.broken = true;
                    return Err(QmpError::Closed);
                }
                Ok(count) => self.pending.extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                        return Err(QmpError::Deadline { waiting_for: waiting_for.to_owned() });
                    }
                    io::ErrorKind::ConnectionReset => {
                        self.broken = true;
                        return Err(QmpError::Closed);
                    }
                    _ => return Err(QmpError::Io(error)),
                },
            }
        }
    }

    fn keep(&mut self, event: QmpEvent) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn give_up(&mut self, what: &'static str) -> QmpError {
        self.broken = true;
        QmpError::NotQmp { what }
    }
}

/// Time left, never zero (a zero socket timeout means "for ever").
pub(super) fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// QEMU's text, cut and without control characters, so that it may stand in a log line.
fn text(value: Option<&Value>) -> String {
    let full = value.and_then(Value::as_str).unwrap_or("?");
    let mut cut = full.len().min(MAX_TEXT_BYTES);
    while !full.is_char_boundary(cut) {
        cut -= 1;
    }
    full.get(..cut).unwrap_or_default().chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::thread::{self, JoinHandle};

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(200)
    }

    /// A QEMU that greets, accepts the capabilities, then says `script` and stays until we hang up.
    fn fake(script: impl Into<Vec<u8>>) -> (Result<Qmp, QmpError>, JoinHandle<()>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let script = script.into();
        let server = thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut line = String::new();
            theirs.write_all(format!("{GREETING}\r\n").as_bytes()).unwrap();
            reader.read_line(&mut line).unwrap();
            theirs.write_all(b"{\"return\": {}, \"id\": 1}\r\n").unwrap();
            let _ = theirs.write_all(&script);
            while reader.read_line(&mut line).is_ok_and(|count| count > 0) {}
        });
        (Qmp::connect(ours, soon()), server)
    }

    #[test]
    fn commands_events_and_refusals_keep_apart() {
        let (qmp, server) = fake(
            "{\"event\": \"STOP\", \"timestamp\": {}}\n\
             {\"return\": {\"status\": \"paused\"}, \"id\": 2}\n\
             {\"event\": \"RESUME\", \"data\": {\"a\": 1}}\n\
             {\"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u0007\"}, \"id\": 3}\n",
        );
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.execute("query-status", json!({}), soon()).unwrap()["status"], "paused");
        let refused = qmp.execute("cont", json!({}), soon());
        assert!(
            matches!(&refused, Err(QmpError::Refused { command, class, desc })
            if command == "cont" && class == "GenericError" && desc == "no"),
            "{refused:?}"
        );
        assert_eq!(qmp.wait_event(&["RESUME"], soon()).unwrap().data["a"], 1);
        assert_eq!(qmp.wait_event(&["STOP"], soon()).unwrap().data, Value::Null);
        assert!(matches!(qmp.wait_event(&["STOP"], soon()), Err(QmpError::Deadline { .. })));
        drop(qmp);
        server.join().unwrap();
    }

    #[test]
    fn a_late_reply_is_skipped() {
        let (qmp, server) = fake("");
        let mut qmp = qmp.unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        qmp.stream = ours;
        assert!(matches!(qmp.execute("slow", json!({}), soon()), Err(QmpError::Deadline { .. })));
        theirs.write_all(b"{\"return\": 1, \"id\": 2}\n{\"return\": 2, \"id\": 3}\n").unwrap();
        assert_eq!(qmp.execute("fast", json!({}), soon()).unwrap(), 2);
        server.join().unwrap();
    }

    #[test]
    fn nonsense_breaks_the_connection_and_nothing_else() {
        let long = vec![b'x'; MAX_LINE_BYTES + (64 << 10)];
        for script in [
            b"nonsense\n".to_vec(),
            b"\xff\xfe\n".to_vec(),
            b"[]\n".to_vec(),
            b"{}\n".to_vec(),
            b"{\"return\": {}}\n".to_vec(),
            b"{\"return\": {}, \"id\": 99}\n".to_vec(),
            b"[".repeat(100_000).into_iter().chain([b'\n']).collect(),
            long,
        ] {
            let (qmp, server) = fake(script);
            let mut qmp = qmp.unwrap();
            let error = qmp.execute("query-status", json!({}), Instant::now() + Duration::from_secs(5));
            assert!(
                matches!(
                    error,
                    Err(QmpError::NotJson(_) | QmpError::NotQmp { .. } | QmpError::LineTooLong { .. })
                ),
                "{error:?}"
            );
            assert!(matches!(qmp.execute("cont", json!({}), soon()), Err(QmpError::Closed)));
            assert!(matches!(qmp.wait_event(&["STOP"], soon()), Err(QmpError::Closed)));
            drop(qmp);
            server.join().unwrap();
        }
    }

    #[test]
    fn what_qemu_says_unasked_is_taken_in_without_waiting_and_bounded() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(format!("{GREETING}\n{{\"return\": {{}}, \"id\": 1}}\n").as_bytes()).unwrap();
        let mut qmp = Qmp::connect(ours, soon()).unwrap();
        qmp.take_in();
        assert_eq!(qmp.last_event("SHUTDOWN"), None);
        // Far more than a socket holds, from one who does not wait for room either.
        theirs.set_nonblocking(true).unwrap();
        for _ in 0..10 * MAX_EVENTS {
            theirs.write_all(b"{\"event\": \"RTC_CHANGE\"}\n").unwrap();
            qmp.take_in();
        }
        assert_eq!(qmp.events.len(), MAX_EVENTS);
        theirs
            .write_all(b"{\"return\": 1, \"id\": 1}\n{\"event\": \"SHUTDOWN\", \"data\": 1}\n{\"ev")
            .unwrap();
        theirs.write_all(b"ent\": \"SHUTDOWN\", \"data\": 2}\n").unwrap();
        drop(theirs);
        for _ in 0..2 {
            qmp.take_in();
            assert_eq!(qmp.last_event("SHUTDOWN").unwrap().data, 2);
        }
        assert!(matches!(qmp.execute("cont", json!({}), soon()), Err(QmpError::Closed)));

        for script in [b"nonsense\n".to_vec(), vec![b'x'; MAX_LINE_BYTES + 1]] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(format!("{GREETING}\n{{\"return\": {{}}, \"id\": 1}}\n").as_bytes()).unwrap();
            let mut qmp = Qmp::connect(ours, soon()).unwrap();
            let writer = thread::spawn(move || theirs.write_all(&script));
            let deadline = Instant::now() + Duration::from_secs(20);
            while !qmp.broken {
                assert!(Instant::now() < deadline, "what is no QMP is not given up");
                qmp.take_in();
            }
            drop(qmp);
            let _ = writer.join().unwrap();
        }
    }

    #[test]
    fn a_flood_of_events_ends_at_the_deadline_and_stays_bounded() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let flood = thread::spawn(move || {
            theirs.write_all(format!("{GREETING}\n{{\"return\": {{}}, \"id\": 1}}\n").as_bytes()).unwrap();
            while theirs.write_all(b"{\"event\": \"FLOOD\"}\n").is_ok() {}
        });
        let mut qmp = Qmp::connect(ours, soon()).unwrap();
        let start = Instant::now();
        let answer = qmp.execute("query-status", json!({}), soon());
        assert!(matches!(answer, Err(QmpError::Deadline { .. })), "{answer:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(qmp.events.len(), MAX_EVENTS);
        drop(qmp);
        flood.join().unwrap();
    }

    #[test]
    fn the_end_of_qemu_is_noticed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(Qmp::connect(ours, soon()), Err(QmpError::Closed)));
    }
}
