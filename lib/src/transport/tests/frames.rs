//! Headers from arbitrary bytes.

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn any_eight_bytes_decode_to_themselves_or_a_refusal(bytes: [u8; HEADER_LEN], max: u32) {
        match FrameHeader::decode(bytes, max) {
            Ok(header) => {
                prop_assert!(header.len <= max);
                prop_assert_eq!(header.encode(), bytes);
            }
            Err(HeaderError::Reserved(reserved)) => prop_assert_eq!(&reserved[..], &bytes[5..]),
            Err(HeaderError::TooLong { declared, .. }) => prop_assert!(declared > max),
        }
    }

    #[test]
    fn any_header_survives(kind: u8, len: u32) {
        let header = FrameHeader { kind, len };
        prop_assert_eq!(FrameHeader::decode(header.encode(), u32::MAX), Ok(header));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// An authenticated peer that sends anything at all: frames, refusals or an end, and never a panic or a
    /// wait.
    #[test]
    fn any_plaintext_ends_in_frames_or_a_typed_error(
        bytes in prop::collection::vec(prop_oneof![4 => Just(0u8), 1 => any::<u8>()], 0..200),
    ) {
        let (mut near, mut far) = pair();
        near.send_raw(&bytes).unwrap();
        near.close().unwrap();
        let mut taken = 0;
        loop {
            match far.recv(100) {
                Ok(Some(frame)) => taken += HEADER_LEN + frame.payload.len(),
                Ok(None) => {
                    prop_assert_eq!(taken, bytes.len());
                    break;
                }
                Err(LinkError::BadFrame(_) | LinkError::Truncated { .. } | LinkError::WrongProtocol) => break,
                Err(other) => return Err(TestCaseError::fail(format!("{other:?}"))),
            }
        }
    }
}
