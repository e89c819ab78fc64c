//! Many at once at a listener: strangers that are silent, slow or somebody else, and peers that want too
//! much.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::net::{AddressFamily, SocketType};

use super::*;

/// A connection from a loopback address of its own.
fn connect_from(last: u8, to: SocketAddr) -> TcpStream {
    let fd = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&fd, &SocketAddr::new(IpAddr::from([127, 0, 0, last]), 0)).unwrap();
    rustix::net::connect(&fd, &to).unwrap();
    TcpStream::from(fd)
}

/// `count` connections from `addresses` loopback addresses in turn.
fn crowd(count: usize, addresses: u8, to: SocketAddr) -> Vec<TcpStream> {
    (0..count).map(|at| connect_from(1 + at as u8 % addresses, to)).collect()
}

fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(LONG)).unwrap();
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn count_of(listener: &PeerListener, reason: &str) -> u64 {
    listener.turned_away().into_iter().find(|(name, _)| *name == reason).unwrap().1
}

/// Waits until `holds`, which it does unless something is wrong.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let by = std::time::Instant::now() + LONG;
    while !holds() {
        assert!(std::time::Instant::now() < by, "{what}");
        thread::yield_now();
    }
}

#[test]
fn silent_strangers_keep_no_peer_out_and_disturb_nobody_who_is_in() {
    let (server, client) = (identity(), identity());
    let (listener, accepted) = listen(&server, &[&client], limits());
    let at = listener.local_addr();
    let mut near = Link::connect(at, &client, server.pin(), deadlines()).unwrap();
    let mut far = accepted.recv_timeout(LONG).unwrap();
    for (count, addresses) in [(32, 1), (200, 1), (512, 8), (200, 200)] {
        let _crowd = crowd(count, addresses, at);
        let link = Link::connect(at, &client, server.pin(), deadlines()).unwrap();
        drop((link, accepted.recv_timeout(LONG).unwrap()));
        let bound = limits().max_handshakes + limits().reserved_handshakes;
        assert!(listener.occupancy().handshakes <= bound as u64, "{:?}", listener.occupancy());
    }
    assert!(count_of(&listener, "gave_way") > 0);
    near.send(1, b"still here").unwrap();
    assert_eq!(far.recv(100).unwrap().unwrap().payload, b"still here");
}

#[test]
fn the_oldest_handshake_gives_way_to_the_next() {
    let (server, client) = (identity(), identity());
    let two = ListenerLimits { max_handshakes: 2, ..limits() };
    let (listener, _accepted) = listen(&server, &[&client], two);
    let mut strangers = crowd(8, 8, listener.local_addr());
    for gone in &mut strangers[..6] {
        assert!(is_closed(gone));
    }
    for there in &mut strangers[6..] {
        there.set_nonblocking(true).unwrap();
        let silent = there.read(&mut [0]).unwrap_err();
        assert_eq!(silent.kind(), std::io::ErrorKind::WouldBlock);
    }
    until("each is counted once", || count_of(&listener, "gave_way") == 6);
    until("the last two are there", || listener.occupancy().handshakes == 2);
}

#[test]
fn strangers_that_trickle_keep_no_peer_out() {
    let (server, client) = (identity(), identity());
    let (listener, accepted) = listen(&server, &[&client], limits());
    let at = listener.local_addr();
    let mut crowd = crowd(300, 3, at);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // A record that is announced and never whole, byte after byte.
            let hello: Vec<u8> = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3].into_iter().chain([7; 500]).collect();
            for byte in hello {
                // Those that gave way do not take it.
                crowd.iter_mut().for_each(|stranger| drop(stranger.write(&[byte])));
                if done.load(Ordering::Acquire) {
                    return;
                }
            }
        });
        for _ in 0..4 {
            let link = Link::connect(at, &client, server.pin(), deadlines()).unwrap();
            drop((link, accepted.recv_timeout(LONG).unwrap()));
        }
        done.store(true, Ordering::Release);
    });
}

#[test]
fn known_addresses_have_room_that_strangers_do_not_take() {
    let (server, client) = (identity(), identity());
    let pin = *client.pin();
    let (links, accepted) = channel();
    let handler = Arc::new(move |link| links.send(link).unwrap_or(()));
    let known = Arc::new(|at: IpAddr| at == IpAddr::from([127, 0, 0, 99]));
    let few = ListenerLimits { max_handshakes: 4, reserved_handshakes: 2, ..limits() };
    let admits = Arc::new(move |peer: &PeerIdentity| *peer == pin);
    let listener = PeerListener::bind_knowing(LOOPBACK, &server, admits, known, few, handler).unwrap();
    let at = listener.local_addr();
    // Whoever comes from there stays, however many come from elsewhere.
    let mut slow = connect_from(99, at);
    let strangers = crowd(100, 50, at);
    until("they are all through", || count_of(&listener, "gave_way") >= 96);
    slow.set_nonblocking(true).unwrap();
    assert_eq!(slow.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    drop(strangers);
    // An address that a peer came from is known from then on.
    drop(Link::connect(at, &client, server.pin(), deadlines()).unwrap());
    drop(accepted.recv_timeout(LONG).unwrap());
    let mut slow = connect_from(1, at);
    let before = count_of(&listener, "gave_way");
    let _strangers: Vec<_> = (0..100).map(|n| connect_from(2 + n % 50, at)).collect();
    until("they are all through", || count_of(&listener, "gave_way") >= before + 96);
    slow.set_nonblocking(true).unwrap();
    assert_eq!(slow.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_peer_has_its_share_of_links_and_every_other_has_some_left() {
    let (server, greedy, modest) = (identity(), identity(), identity());
    let few = ListenerLimits { max_links: 5, links_per_peer: 4, reserved_links_per_peer: 1, ..limits() };
    let (listener, accepted) = listen(&server, &[&greedy, &modest], few);
    let connect = |who: &Identity| {
        let near = Link::connect(listener.local_addr(), who, server.pin(), deadlines())?;
        Ok::<_, LinkError>((near, accepted.recv_timeout(LONG).unwrap()))
    };
    let mut taken: Vec<_> = (0..4).map(|_| connect(&greedy).unwrap()).collect();
    assert!(matches!(connect(&greedy), Err(LinkError::RefusedByPeer { alert: None })));
    let one = connect(&modest).unwrap();
    // Five are taken, and nobody without a link is turned away for it.
    assert!(matches!(connect(&modest), Err(LinkError::RefusedByPeer { alert: None })));
    drop(one);
    taken.push(connect(&modest).unwrap());
    assert_eq!(listener.occupancy().links, 5);
    until("refusals are counted", || count_of(&listener, "too_many") == 2);
    // A link counts as long as it is there, whoever has it; not as long as its handler runs.
    drop(taken);
    until("all are gone", || listener.occupancy().links == 0);
    drop(connect(&greedy).unwrap());
}

#[test]
fn a_length_takes_memory_only_as_its_bytes_come() {
    let (mut near, mut far) = pair();
    near.send_raw(&FrameHeader { kind: 1, len: 16 << 20 }.encode()).unwrap();
    near.send_raw(&[1; 8]).unwrap();
    let mut payload = Vec::new();
    far.set_frame_time(Duration::from_millis(200));
    assert!(matches!(far.recv_into(16 << 20, &mut payload), Err(LinkError::Deadline(Waiting::Frame))));
    assert!(payload.capacity() <= 4096, "{}", payload.capacity());

    let (mut near, mut far) = pair();
    near.send_raw(&FrameHeader { kind: 1, len: 16 << 20 }.encode()).unwrap();
    near.send_raw(&[1; 8]).unwrap();
    far.set_frame_time(Duration::from_millis(200));
    assert!(matches!(far.recv(16 << 20), Err(LinkError::Deadline(Waiting::Frame))));
    assert!(far.buffer_capacity() <= 4096, "{}", far.buffer_capacity());

    // What comes whole is whole, and in a buffer of its size.
    let (mut near, mut far) = pair();
    let long: Vec<u8> = (0..(3 << 20) + 17).map(|at: u32| (at >> 3) as u8).collect();
    let sent = long.clone();
    let sender = thread::spawn(move || {
        near.send(1, &sent).unwrap();
        near
    });
    let mut payload = Vec::new();
    assert_eq!(far.recv_into(16 << 20, &mut payload).unwrap(), Some(1));
    assert!(payload == long && payload.capacity() == long.len());
    drop(sender.join().unwrap());
}

#[test]
fn messages_of_all_links_together_have_a_bound_and_small_ones_always_room() {
    let (server, greedy, modest) = (identity(), identity(), identity());
    let tight = ListenerLimits { max_message_bytes: 3 << 20, message_bytes_per_peer: 2 << 20, ..limits() };
    let (listener, accepted) = listen(&server, &[&greedy, &modest], tight);
    let connect = |who: &Identity| {
        let near = Link::connect(listener.local_addr(), who, server.pin(), deadlines()).unwrap();
        (near, accepted.recv_timeout(LONG).unwrap())
    };
    let deliver = |(near, far): &mut (Link, Link), bytes: usize| {
        thread::scope(|scope| {
            let sender = scope.spawn(|| near.send(1, &vec![5; bytes]));
            let mut payload = Vec::new();
            let got = far.recv_into(16 << 20, &mut payload).map(|_| payload.len());
            // What nobody reads on ends the sender, too.
            if got.is_err() {
                far.canceller().cancel();
            }
            let _ = sender.join().unwrap();
            got
        })
    };
    let mut first = connect(&greedy);
    assert_eq!(deliver(&mut first, 1 << 20).unwrap(), 1 << 20);
    assert_eq!(listener.occupancy().message_bytes, 1 << 20);
    let mut second = connect(&greedy);
    assert!(matches!(deliver(&mut second, 2 << 20), Err(LinkError::NoRoom)));
    drop(second);
    // The other peer has what is left of all.
    let mut third = connect(&modest);
    assert_eq!(deliver(&mut third, 2 << 20).unwrap(), 2 << 20);
    let mut fourth = connect(&modest);
    assert_eq!(deliver(&mut fourth, 60 << 10).unwrap(), 60 << 10);
    // The next message begins where the last one was.
    assert_eq!(deliver(&mut first, 1000).unwrap(), 1000);
    drop((first, third, fourth));
    until("nothing is held for links that are gone", || listener.occupancy() == Occupancy::default());
}
