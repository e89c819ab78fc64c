//! Owns the thread that reads the guest's serial port. Must not know what the bytes mean.
//!
//! Lossless as long as the sink keeps up: QEMU's UART retries a full socket only a few times and then drops,
//! so a sink must not block (a bounded buffer that overwrites its oldest bytes is the right shape).

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::threads::{self, Role};

/// Takes console bytes in order, in chunks of at most 4 KiB. Runs on the console's own thread.
pub type ConsoleSink = Box<dyn FnMut(&[u8]) + Send>;

#[derive(Debug)]
pub(super) struct Console {
    reader: JoinHandle<()>,
}

impl Console {
    pub(super) fn start(mut stream: UnixStream, mut sink: ConsoleSink) -> io::Result<Self> {
        let reader = std::thread::Builder::new().name("qemu-console".to_owned()).spawn(move || {
            threads::begin(Role::Keeper);
            let mut chunk = [0u8; 4096];
            loop {
                match stream.read(&mut chunk) {
                    Ok(0) => return,
                    Ok(count) => sink(chunk.get(..count).unwrap_or_default()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        })?;
        Ok(Self { reader })
    }

    /// After QEMU's exit: waits until the last byte has been handed over. Returns false if the sink held that
    /// up.
    pub(super) fn finish(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while !self.reader.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }
}
