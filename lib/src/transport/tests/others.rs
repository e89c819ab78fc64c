//! What a client finds at an address where no mirrorvm daemon is.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketType};

use super::*;

/// What connecting to somebody who says `words` comes to; he stays on the line until we are gone.
fn met(words: &'static [u8]) -> LinkError {
    let (client, server) = (identity(), identity());
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let at = listener.local_addr().unwrap();
    let begun = Instant::now();
    let other = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.write_all(words).unwrap();
        std::io::copy(&mut stream, &mut std::io::sink()).ok();
    });
    let error = Link::connect(at, &client, server.pin(), deadlines()).unwrap_err();
    assert!(begun.elapsed() < LONG / 2, "told after {:?}", begun.elapsed());
    other.join().unwrap();
    error
}

#[test]
fn what_is_no_mirrorvm_daemon_is_told_at_once_with_what_it_said() {
    for (words, said) in [
        (&b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"[..], "SSH-2.0-OpenSSH_9.2p1 Debian-2"),
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        (b"220 mail.example ESMTP\r\n", "220 mail.example ESMTP"),
        (b"\x16\x02\x00\x1b[2J", "\\x16\\x02\\x00\\x1b[2J"),
        (b"\n", ""),
    ] {
        match met(words) {
            LinkError::NotMirrorvm { said: heard } => assert_eq!(heard, said),
            other => panic!("{other:?}"),
        }
    }
    // TLS of another kind, and a record that is damaged: told at once, too.
    assert!(matches!(met(&[21, 3, 3, 0, 2, 2, 40]), LinkError::RefusedByPeer { alert: Some(_) }));
    assert!(matches!(met(&[22, 3, 3, 0, 4, 99, 0, 0, 0]), LinkError::Tls(_)));
}

#[test]
fn a_port_that_nobody_listens_on_is_told_at_once() {
    let (client, server) = (identity(), identity());
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let begun = Instant::now();
    let error = Link::connect(at, &client, server.pin(), deadlines()).unwrap_err();
    assert!(begun.elapsed() < LONG / 2);
    match error {
        LinkError::Connect { addr, source } => {
            assert_eq!((addr, source.kind()), (at, std::io::ErrorKind::ConnectionRefused));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn connecting_to_a_dead_address_can_be_cancelled() {
    let (client, server) = (identity(), identity());
    // A listener with a full backlog does not answer, as a dead address does not.
    let fd = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&fd, &LOOPBACK).unwrap();
    rustix::net::listen(&fd, 0).unwrap();
    let at = TcpListener::from(fd);
    let addr = at.local_addr().unwrap();
    let waiting: Vec<_> =
        (0..4).map(|_| TcpStream::connect_timeout(&addr, Duration::from_millis(200))).collect();
    assert!(waiting.iter().any(Result::is_err), "it answers everybody");
    let (begun, cancel) = channel();
    let blocked = thread::spawn(move || {
        let hand_out = |canceller| begun.send(canceller).unwrap();
        Link::connect_cancellable(addr, &client, server.pin(), deadlines(), hand_out).unwrap_err()
    });
    let canceller = cancel.recv_timeout(LONG).unwrap();
    let asked = Instant::now();
    canceller.cancel();
    assert!(matches!(blocked.join().unwrap(), LinkError::Cancelled));
    assert!(asked.elapsed() < LONG / 2);
    // Nobody cancels: the deadline does.
    let (client, server) = (identity(), identity());
    let soon = Deadlines { connect: Duration::from_millis(100), ..deadlines() };
    let error = Link::connect(addr, &client, server.pin(), soon).unwrap_err();
    assert!(
        matches!(&error, LinkError::Connect { source, .. } if source.kind() == std::io::ErrorKind::TimedOut),
        "{error:?}"
    );
}
