//! Prints what a link moves: `cargo test --release -p mirrorvm --lib throughput -- --nocapture`. Asserts
//! nothing on time.

use std::thread;
use std::time::Instant;

use super::*;

const TOTAL: usize = 256 << 20;

fn measure(name: &str, frame: usize, parts: usize) {
    let (mut near, mut far) = pair();
    let data: Vec<u8> = (0..frame).map(|at| ((at * 31) >> 5) as u8).collect();
    let expected = data.clone();
    let sender = thread::spawn(move || {
        let parts: Vec<&[u8]> = data.chunks(frame.div_ceil(parts)).collect();
        for _ in 0..TOTAL / frame {
            near.send_parts(1, &parts).unwrap();
        }
        assert_eq!(near.recv(0).unwrap().unwrap().kind, 2);
    });
    let mut buffer = vec![0; frame];
    let started = Instant::now();
    for _ in 0..TOTAL / frame {
        let header = far.recv_header(frame as u32).unwrap().unwrap();
        far.read_payload(&mut buffer[..header.len as usize]).unwrap();
    }
    let took = started.elapsed();
    assert!(buffer == expected);
    far.send(2, &[]).unwrap();
    sender.join().unwrap();
    println!("{name}: {:.2} GB/s", TOTAL as f64 / took.as_secs_f64() / 1e9);
}

#[test]
fn throughput_of_bulk_frames() {
    measure("2 MiB frames, 1 part", 2 << 20, 1);
    measure("2 MiB frames, 512 parts", 2 << 20, 512);
    measure("64 KiB frames, 1 part", 64 << 10, 1);
    measure("4 MiB frames, 1 part", 4 << 20, 1);
}
