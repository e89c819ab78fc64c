//! Server-sent events as text (the HTML standard, section 9.2).
//!
//! Owns: reading them from bytes that come in any pieces, within a bound. Must not know: connections.

use std::collections::VecDeque;

use serde_json::Value;

/// One event of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where in the stream it is: what to continue after.
    pub id: Option<String>,
    /// Its type: `guest.created`, ...; `message` when the stream says none.
    pub kind: String,
    /// What it says.
    pub data: String,
}

impl Event {
    /// What it says, as JSON; `None` when it is none.
    pub fn json(&self) -> Option<Value> {
        serde_json::from_str(&self.data).ok()
    }
}

/// An event or a line is longer than the bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLong;

/// Reads events from pieces.
#[derive(Debug)]
pub(crate) struct Parser {
    /// Most bytes of one line, and of one event's data.
    most: usize,
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed belongs to it.
    after_return: bool,
    /// A first line was there: a byte order mark counts before it alone.
    begun: bool,
    id: Option<String>,
    kind: String,
    data: String,
    events: VecDeque<Event>,
}

impl Parser {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            line: Vec::new(),
            after_return: false,
            begun: false,
            id: None,
            kind: String::new(),
            data: String::new(),
            events: VecDeque::new(),
        }
    }

    /// The next event that is complete.
    pub(crate) fn next(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// A line or an event is too long.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        for byte in bytes {
            let after_return = std::mem::replace(&mut self.after_return, *byte == b'\r');
            match byte {
                b'\n' if after_return => {}
                b'\r' | b'\n' => self.end_line()?,
                other if self.line.len() < self.most => self.line.push(*other),
                _ => return Err(TooLong),
            }
        }
        Ok(())
    }

    fn end_line(&mut self) -> Result<(), TooLong> {
        let bytes = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&bytes);
        let line = if self.begun { &*text } else { text.strip_prefix('\u{feff}').unwrap_or(&text) };
        self.begun = true;
        if line.is_empty() {
            self.end_event();
            return Ok(());
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => {
                if self.data.len() + value.len() >= self.most {
                    return Err(TooLong);
                }
                self.data.push_str(value);
                self.data.push('\n');
            }
            "event" => value.clone_into(&mut self.kind),
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            // A comment, or a field that the standard adds later: both are to be passed over.
            _ => {}
        }
        Ok(())
    }

    fn end_event(&mut self) {
        let mut data = std::mem::take(&mut self.data);
        let kind = std::mem::take(&mut self.kind);
        // The last line end is the event's, not the data's. Without data there is no event.
        if data.pop().is_some() {
            let kind = if kind.is_empty() { "message".to_owned() } else { kind };
            self.events.push_back(Event { id: self.id.clone(), kind, data });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(pieces: &[&[u8]], most: usize) -> Result<Vec<Event>, TooLong> {
        let mut parser = Parser::new(most);
        pieces.iter().try_for_each(|piece| parser.take(piece))?;
        Ok(std::iter::from_fn(|| parser.next()).collect())
    }

    fn event(id: Option<&str>, kind: &str, data: &str) -> Event {
        Event { id: id.map(str::to_owned), kind: kind.to_owned(), data: data.to_owned() }
    }

    const STREAM: &[u8] =
        b"\xef\xbb\xbf: mirrorvm events\n\nid: e-1\nevent: guest.created\ndata: {\"a\": 1}\n\n\
        data: one\r\ndata:two\r\rid: e-2\nretry: 5\nnew: x\nevent\ndata\n\nevent: none\n\ndata: cut";

    #[test]
    fn events_are_read_as_the_standard_says() {
        let read = events(&[STREAM], 100).unwrap();
        let wanted = [
            event(Some("e-1"), "guest.created", "{\"a\": 1}"),
            // The id stays until there is another.
            event(Some("e-1"), "message", "one\ntwo"),
            event(Some("e-2"), "message", ""),
        ];
        assert_eq!(read, wanted, "what is not complete is no event");
        assert_eq!(read[0].json().unwrap()["a"], 1);
        assert_eq!(read[1].json(), None);
    }

    proptest! {
        #[test]
        fn events_are_the_same_in_whatever_pieces_they_come(cuts in prop::collection::vec(0..STREAM.len(), 0..12)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let (mut pieces, mut rest, mut at) = (Vec::new(), STREAM, 0);
            for cut in cuts {
                let (piece, after) = rest.split_at(cut - at);
                pieces.push(piece);
                (rest, at) = (after, cut);
            }
            pieces.push(rest);
            prop_assert_eq!(events(&pieces, 100), events(&[STREAM], 100));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(read) = events(&[&bytes], 64) {
                prop_assert!(read.iter().all(|e| e.data.len() <= 64 * 3));
            }
        }
    }

    #[test]
    fn a_line_or_an_event_without_end_is_refused() {
        assert_eq!(events(&[&[b'x'; 101]], 100), Err(TooLong));
        assert_eq!(events(&[&b"data: 0123456789\n".repeat(11)], 100), Err(TooLong));
        assert_eq!(events(&[b"data: 0123456789\n\n".repeat(11).as_slice()], 100).unwrap().len(), 11);
    }
}
