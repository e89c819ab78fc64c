//! Standard output of commands that print and end.

use std::io::{ErrorKind, Result, Stdout, Write, stdout};

/// Standard output, of which nobody has to read all: `mirrorvmd openapi | head` is no failure.
#[derive(Debug)]
pub struct Out(Stdout);

/// Standard output.
pub fn out() -> Out {
    Out(stdout())
}

fn unread<T>(written: Result<T>, instead: T) -> Result<T> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(instead),
        written => written,
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        unread(self.0.write(bytes), bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        unread(self.0.flush(), ())
    }
}
