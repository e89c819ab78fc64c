//! The eight bytes before every payload.
//!
//! Owns: their layout, both ways. Must not know: sockets, TLS, what a kind means. Pure.

/// Bytes of an encoded header.
pub const HEADER_LEN: usize = 8;

/// Kind of the frame that a link sends on its own behalf to say "admitted"; not for callers.
pub(super) const KIND_ADMITTED: u8 = 0;

/// What a frame says of itself before its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// The caller's label, 1 to 255.
    pub kind: u8,
    /// Payload bytes that follow.
    pub len: u32,
}

/// Why eight bytes are no header for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Reserved bytes are set: a newer protocol, or not our protocol.
    #[error("reserved header bytes are {0:02x?}, expected zeros")]
    Reserved([u8; 3]),
    /// The payload is longer than the receiver takes now.
    #[error("frame declares {declared} payload bytes, at most {max} are taken here")]
    TooLong {
        /// Bytes that the header declares.
        declared: u32,
        /// The longest payload that the receiver takes.
        max: u32,
    },
}

impl FrameHeader {
    /// The header as it goes over the wire.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let len = self.len.to_le_bytes();
        [len[0], len[1], len[2], len[3], self.kind, 0, 0, 0]
    }

    /// Reads the wire form; a payload of more than `max` bytes is refused.
    pub fn decode(bytes: [u8; HEADER_LEN], max: u32) -> Result<Self, HeaderError> {
        let [a, b, c, d, kind, reserved @ ..] = bytes;
        if reserved != [0; 3] {
            return Err(HeaderError::Reserved(reserved));
        }
        let len = u32::from_le_bytes([a, b, c, d]);
        if len > max {
            return Err(HeaderError::TooLong { declared: len, max });
        }
        Ok(Self { kind, len })
    }
}
