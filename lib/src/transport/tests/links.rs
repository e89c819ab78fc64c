//! Good pairs, and what one end does to the other after the handshake.

use std::thread;
use std::time::Instant;

use super::*;

#[test]
fn frames_travel_both_ways_and_the_end_is_seen() {
    let (mut near, mut far) = pair();
    near.send(1, b"hello").unwrap();
    assert_eq!(far.recv(5).unwrap(), Some(Frame { kind: 1, payload: b"hello" }));
    far.send(255, &[]).unwrap();
    assert_eq!(near.recv(0).unwrap(), Some(Frame { kind: 255, payload: b"" }));
    let big: Vec<u8> = (0..3_000_001u32).map(|at| ((at * 7) >> 3) as u8).collect();
    let sender = thread::spawn({
        let big = big.clone();
        move || {
            // Parts around the record size, empty ones, and one long.
            let (a, rest) = big.split_at(16383);
            let (b, rest) = rest.split_at(1);
            let (c, rest) = rest.split_at(16384 * 3);
            near.send_parts(9, &[a, b, &[], c, rest, &[]]).unwrap();
            near.send_parts(10, &[]).unwrap();
            near.send(11, &big).unwrap();
            near
        }
    });
    assert_eq!(far.recv(4 << 20).unwrap(), Some(Frame { kind: 9, payload: &big }));
    assert_eq!(far.recv(4 << 20).unwrap(), Some(Frame { kind: 10, payload: b"" }));
    let header = far.recv_header(4 << 20).unwrap().unwrap();
    assert_eq!((header.kind, header.len as usize), (11, big.len()));
    let mut back = vec![0; big.len()];
    for piece in back.chunks_mut(100_003) {
        far.read_payload(piece).unwrap();
    }
    assert!(back == big);
    assert_eq!(far.payload_left(), 0);
    let near = sender.join().unwrap();
    let (sent, received) = (near.counters(), far.counters());
    assert_eq!((sent.frames_out, sent.frames_in, received.frames_in, received.frames_out), (4, 1, 4, 1));
    assert!(sent.wire_out > 6_000_000 && sent.wire_out == received.wire_in);
    near.close().unwrap();
    assert_eq!(far.recv(10).unwrap(), None);
    assert_eq!(far.recv(10).unwrap(), None);
    // The other direction is still open for us, though nobody listens.
    far.close().unwrap();
}

#[test]
fn keys_are_renewed_long_before_they_wear_out() {
    let (server, client) = (identity(), identity());
    let (listener, accepted) = listen(&server, &[&client], limits());
    let stream = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    // A suite that wears out after 50 records.
    let mut provider = tls::provider();
    let rustls::SupportedCipherSuite::Tls13(suite) = provider.cipher_suites[0];
    let weak = rustls::Tls13CipherSuite {
        common: rustls::crypto::CipherSuiteCommon { confidentiality_limit: 50, ..copy(&suite.common) },
        ..*suite
    };
    provider.cipher_suites = vec![rustls::SupportedCipherSuite::Tls13(Box::leak(Box::new(weak)))];
    let connection = tls::client(provider, &client, *server.pin()).unwrap();
    let session = session::Session::client(socket::Socket::new(stream).unwrap(), connection);
    let mut near = Link::start_client(session, deadlines()).unwrap();
    let mut far = accepted.recv_timeout(LONG).unwrap();
    let data: Vec<u8> = (0..2_000_000u32).map(|at| (at >> 4) as u8).collect();
    thread::scope(|scope| {
        scope.spawn(|| (0..10).for_each(|_| near.send(1, &data).unwrap()));
        for _ in 0..10 {
            assert!(far.recv(4 << 20).unwrap().unwrap().payload == data);
        }
    });
    far.send(2, b"still here").unwrap();
    assert_eq!(near.recv(100).unwrap().unwrap().payload, b"still here");
}

fn copy(common: &rustls::crypto::CipherSuiteCommon) -> rustls::crypto::CipherSuiteCommon {
    rustls::crypto::CipherSuiteCommon {
        suite: common.suite,
        hash_provider: common.hash_provider,
        confidentiality_limit: common.confidentiality_limit,
    }
}

#[test]
fn a_length_over_the_bound_is_refused_before_allocation() {
    for declared in [101, 1 << 31, u32::MAX] {
        let (mut near, mut far) = pair();
        near.send_raw(&FrameHeader { kind: 1, len: declared }.encode()).unwrap();
        let refused = far.recv(100).unwrap_err();
        assert!(
            matches!(refused, LinkError::BadFrame(HeaderError::TooLong { declared: d, max: 100 }) if d == declared)
        );
        assert_eq!(far.buffer_capacity(), 0);
        assert!(matches!(far.recv(100), Err(LinkError::Broken)));
        assert!(matches!(far.send(1, b""), Err(LinkError::Broken)));
    }
}

#[test]
fn the_reserved_kind_is_neither_sent_nor_taken() {
    let (mut near, mut far) = pair();
    assert!(matches!(near.send(0, b""), Err(LinkError::Misuse(_))));
    near.send_raw(&FrameHeader { kind: 0, len: 0 }.encode()).unwrap();
    assert!(matches!(far.recv(100), Err(LinkError::WrongProtocol)));
}

#[test]
fn an_end_inside_a_frame_is_an_error() {
    // Cut in the header, and in the payload; properly closed, and not.
    let header = FrameHeader { kind: 1, len: 50 }.encode();
    for (bytes, missing) in [(header[..3].to_vec(), 5), ([&header[..], &[7; 20]].concat(), 30)] {
        for properly in [true, false] {
            let (mut near, mut far) = pair();
            near.send_raw(&bytes).unwrap();
            if properly {
                near.close().unwrap();
            } else {
                drop(near);
            }
            let error = far.recv(100).unwrap_err();
            assert!(matches!(error, LinkError::Truncated { missing: m } if m == missing), "{error:?}");
        }
    }
    // Between frames, without a goodbye.
    let (mut near, mut far) = pair();
    near.send(1, b"last").unwrap();
    drop(near);
    assert_eq!(far.recv(100).unwrap().unwrap().payload, b"last");
    assert!(matches!(far.recv(100), Err(LinkError::Truncated { missing: 0 })));
}

#[test]
fn a_trickle_is_cut_at_the_frame_deadline() {
    let frame = Duration::from_millis(300);
    let (mut near, mut far) = pair_with(deadlines());
    far.set_frame_time(frame);
    let trickle = thread::spawn(move || {
        let bytes = [&FrameHeader { kind: 1, len: 1 << 20 }.encode()[..], &[0; 4096]].concat();
        // One byte at a time as fast as it goes: there is always progress, and never an end in time.
        let mut sent = 0u64;
        for byte in bytes.iter().chain(std::iter::repeat(&0)) {
            if near.send_raw(std::slice::from_ref(byte)).is_err() {
                break;
            }
            sent += 1;
            // Pace without sleeping: at most some 5000 bytes a second.
            let next = Instant::now() + Duration::from_micros(200);
            while Instant::now() < next {
                thread::yield_now();
            }
        }
        sent
    });
    let started = Instant::now();
    let error = far.recv(1 << 20).unwrap_err();
    assert!(matches!(error, LinkError::Deadline(Waiting::Frame)), "{error:?}");
    assert!(started.elapsed() >= frame && started.elapsed() < frame * 20);
    drop(far);
    assert!(trickle.join().unwrap() > 8);
}

#[test]
fn silence_between_frames_breaks_nothing() {
    let idle = Some(Duration::from_millis(20));
    let (mut near, mut far) = pair_with(Deadlines { idle, ..deadlines() });
    assert!(matches!(near.recv(10), Err(LinkError::Deadline(Waiting::FrameStart))));
    near.set_deadline(Some(Instant::now()));
    assert!(matches!(near.recv(10), Err(LinkError::Deadline(Waiting::FrameStart))));
    near.set_deadline(None);
    far.send(1, b"late").unwrap();
    let received = loop {
        match near.recv(10) {
            Err(LinkError::Deadline(Waiting::FrameStart)) => {}
            Ok(Some(frame)) => break frame.payload.to_vec(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(received, b"late");
    // A peer that takes nothing is not waited for beyond the deadline either.
    near.set_deadline(Some(Instant::now() + Duration::from_millis(100)));
    let error = (0..1000).find_map(|_| near.send(1, &[0; 1 << 20]).err()).unwrap();
    assert!(matches!(error, LinkError::Deadline(Waiting::Send)), "{error:?}");
    assert!(matches!(near.send(1, b""), Err(LinkError::Broken)));
}

#[test]
fn what_the_caller_takes_between_pieces_is_not_the_peers() {
    let frame = Duration::from_millis(100);
    let (mut near, mut far) = pair();
    far.set_frame_time(frame);
    near.send(1, &[5; 1000]).unwrap();
    far.recv_header(1000).unwrap().unwrap();
    let until = Instant::now() + 3 * frame;
    while Instant::now() < until {
        thread::yield_now();
    }
    far.read_payload(&mut [0; 1000]).unwrap();
}

#[test]
fn payload_is_read_in_turn() {
    let (mut near, mut far) = pair();
    near.send(1, b"12345").unwrap();
    assert!(matches!(far.read_payload(&mut [0]), Err(LinkError::Misuse(_))));
    far.recv_header(10).unwrap().unwrap();
    assert!(matches!(far.recv_header(10), Err(LinkError::Misuse(_))));
    assert!(matches!(far.read_payload(&mut [0; 6]), Err(LinkError::Misuse(_))));
    let mut payload = [0; 5];
    far.read_payload(&mut payload).unwrap();
    assert_eq!(&payload, b"12345");
    near.send(2, b"678").unwrap();
    let mut buffer = vec![9; 100];
    assert_eq!(far.recv_into(10, &mut buffer).unwrap(), Some(2));
    assert_eq!(buffer, b"678");
}

/// A thread on its way into the kernel cannot be observed; both orders of cancelling and blocking must do.
#[test]
fn cancelling_ends_a_blocked_recv() {
    let (mut near, _far) = pair();
    let canceller = near.canceller();
    let (started, begun) = channel();
    let blocked = thread::spawn(move || {
        started.send(()).unwrap();
        let first = near.recv(10).unwrap_err();
        (first, near.recv(10).unwrap_err())
    });
    begun.recv_timeout(LONG).unwrap();
    canceller.cancel();
    let (first, second) = blocked.join().unwrap();
    assert!(matches!((first, second), (LinkError::Cancelled, LinkError::Broken)));
    canceller.cancel();
}

#[test]
fn cancelling_ends_a_blocked_send() {
    let (mut near, _far) = pair();
    let canceller = near.canceller();
    let (progress, sent) = channel();
    let blocked = thread::spawn(move || {
        loop {
            // Each message says that one more MiB is in the sockets' buffers; they hold a few.
            match near.send(1, &[0; 1 << 20]) {
                Ok(()) => progress.send(()).unwrap(),
                Err(error) => return error,
            }
        }
    });
    // Until nothing moves for a while, it is surely blocked in the kernel.
    while sent.recv_timeout(Duration::from_millis(200)).is_ok() {}
    let cancelled = Instant::now();
    canceller.cancel();
    assert!(matches!(blocked.join().unwrap(), LinkError::Cancelled));
    assert!(cancelled.elapsed() < LONG / 2);
}

#[test]
fn a_canceller_keeps_no_connection_alive() {
    let (near, mut far) = pair();
    let canceller = near.canceller();
    drop(near);
    assert!(matches!(far.recv(10), Err(LinkError::Truncated { missing: 0 })));
    canceller.cancel();
}

#[test]
fn an_end_is_seen_without_reading_and_loses_nothing() {
    let (near, mut far) = pair();
    assert!(!near.ended() && !far.ended());
    near.canceller().cancel();
    assert!(near.ended());

    let (mut near, mut far_too) = pair();
    far_too.send(7, b"last words").unwrap();
    far_too.close().unwrap();
    let by = Instant::now() + Duration::from_secs(10);
    while !near.ended() {
        assert!(Instant::now() < by, "the other end is closed");
        thread::yield_now();
    }
    assert_eq!(near.recv(100).unwrap(), Some(Frame { kind: 7, payload: b"last words" }));
    assert_eq!(near.recv(100).unwrap(), None);
    assert!(far.recv(1).is_err() || far.ended());
}
