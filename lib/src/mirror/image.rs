//! Helper images: bytes that were checked.

use mirrorvm_abi::header::{FILE_MAX, Header, HeaderError};
use ring::digest;

/// A helper image with its facts.
#[derive(Clone)]
pub struct HelperImage {
    bytes: std::borrow::Cow<'static, [u8]>,
    header: Header,
    measurement: [u8; 32],
}

/// The image that the build script made.
static BUILT_IN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mirrorvm-helper.bin"));

impl std::fmt::Debug for HelperImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HelperImage").field("header", &self.header).finish_non_exhaustive()
    }
}

impl HelperImage {
    /// The image that belongs to this build.
    pub fn built_in() -> Self {
        Self::check(BUILT_IN.into()).expect("the build makes a good image")
    }

    /// An image from anywhere.
    ///
    /// # Errors
    /// What is wrong with its header.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, HeaderError> {
        Self::check(bytes.into())
    }

    fn check(bytes: std::borrow::Cow<'static, [u8]>) -> Result<Self, HeaderError> {
        if bytes.len() > FILE_MAX {
            return Err(HeaderError::FileLength { declared: FILE_MAX as u64, actual: bytes.len() });
        }
        let header = Header::parse(&bytes)?;
        let mut measurement = [0; 32];
        measurement.copy_from_slice(digest::digest(&digest::SHA256, &bytes).as_ref());
        Ok(Self { bytes, header, measurement })
    }

    /// The content of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The header, which was checked.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// SHA-256 of the file.
    pub const fn measurement(&self) -> [u8; 32] {
        self.measurement
    }
}
