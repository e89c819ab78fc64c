//! Connections that are cut, at every record and within it.

use super::*;

#[derive(Default, Debug)]
struct Tally {
    failed: u32,
    succeeded: u32,
    in_doubt: u32,
    untouched: u32,
}

/// With an audit behind COMMIT, which may be cut, too.
fn audited(to: &str, mode: &str) -> Value {
    let mut m = quick(to, mode);
    m["audit"] = json!("after");
    m
}

/// One migration with the network broken at one point, then the network mended, then all checks. Gives where
/// the guest is.
fn broken_migration(pair: &Pair, from_a: bool, mode: &str, plan: Break, tally: &mut Tally) -> bool {
    let (from, to, proxy) =
        if from_a { (&pair.a, &pair.b, &pair.to_b) } else { (&pair.b, &pair.a, &pair.to_a) };
    let before = from.ticks(GUEST).unwrap();
    proxy.arm(plan);
    let id = from.migrate(&audited(&to.name, mode));
    let first = from.follow(&format!("/v1/migrations/{id}"), 60, |m| {
        is_terminal(&m["state"]) || m["state"] == "in_doubt"
    });
    let broken = proxy.is_broken();
    if first["state"] == "in_doubt" {
        tally.in_doubt += 1;
        let guest = from.follow(&format!("/v1/guests/{GUEST}"), 10, |g| g["state"] == "in_doubt");
        assert_eq!(guest["migration"], json!(id));
        // The source holds still while nobody knows, whatever the destination does.
        let held = from.ticks(GUEST).unwrap();
        for action in ["start", "resume", "stop"] {
            let refused = from.act(&format!("/v1/guests/{GUEST}/{action}"));
            assert_eq!(refused.expect(409).problem(), "guest_migrating", "{action}");
        }
        assert_eq!(from.ticks(GUEST).unwrap(), held);
    }
    proxy.mend();
    let (at, end) = settled(from, to, &id);
    println!(
        "{} to {}, {mode}, {:?} {:?} of link {} after {} records and {} bytes: {}{} {}",
        from.name,
        to.name,
        plan.act,
        plan.way,
        plan.connection,
        plan.records,
        plan.bytes,
        if first["state"] == "in_doubt" { "in_doubt, then " } else { "" },
        state_of(&end),
        code_of(&end)
    );
    match (broken, state_of(&end).as_str()) {
        (false, s) => {
            assert_eq!(s, "succeeded", "nothing was broken: {end}");
            tally.untouched += 1;
        }
        (true, "failed") => {
            tally.failed += 1;
            assert!(
                ["peer_lost", "peer_unreachable", "peer_protocol"].contains(&code_of(&end).as_str()),
                "{end}"
            );
            assert_eq!(end["guest_state_after"], "running");
        }
        (true, "succeeded") => tally.succeeded += 1,
        (true, other) => panic!("{other}: {end}"),
    }
    at.ticks_beyond(GUEST, before.number);
    std::ptr::eq(at, &pair.a)
}

/// Cuts at points spread over both directions of the control link and of the stream: handshake, preparation,
/// every epoch, state, START, COMMIT. The guest goes to and fro, so that every break is followed by another
/// try.
#[test]
fn a_cut_anywhere_leaves_the_guest_at_exactly_one_host() {
    if !kvm() {
        return;
    }
    let seed: u64 = 0x5eed_2026;
    println!("seed {seed:#x}");
    let pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 1 << 20));

    // What a whole migration carries, in records.
    let mut at_a = true;
    let mut whole = Vec::new();
    for mode in ["stop_and_copy", "precopy"] {
        let (from, to, proxy) =
            if at_a { (&pair.a, &pair.b, &pair.to_b) } else { (&pair.b, &pair.a, &pair.to_a) };
        proxy.watch();
        let id = from.migrate(&audited(&to.name, mode));
        let (at, end) = settled(from, to, &id);
        assert_eq!(end["state"], "succeeded", "{end}");
        at_a = std::ptr::eq(at, &pair.a);
        let traffic = proxy.traffic();
        println!("{mode}: {traffic:?}");
        assert_eq!(traffic.len(), 3, "a control link and two streams");
        whole.push((mode, traffic));
    }

    let mut points = Vec::new();
    let mut random = seed;
    let mut dice = |n: u64| {
        // SplitMix64.
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    };
    let control = whole[0].1[0];
    // Stop-and-copy has the same records each time: every boundary of the control link, both ways; every
    // second one in the middle of the record.
    for (way, records) in [(Way::Up, control.up), (Way::Down, control.down)] {
        for record in 0..records {
            let act = if record % 3 == 2 { Act::Truncate } else { Act::Cut };
            points.push((
                "stop_and_copy",
                Break { connection: 0, way, records: record, bytes: dice(2) * (1 + dice(20)), act },
            ));
        }
    }
    for connection in [1, 2] {
        let stream = whole[0].1[connection];
        for (way, records) in [(Way::Up, stream.up), (Way::Down, stream.down)] {
            for _ in 0..3 {
                let (records, bytes) = (dice(records), dice(30));
                points.push(("stop_and_copy", Break { connection, way, records, bytes, act: Act::Cut }));
            }
        }
    }
    let control = whole[1].1[0];
    for _ in 0..4 {
        let up =
            Break { connection: 0, way: Way::Up, records: dice(control.up), bytes: dice(20), act: Act::Cut };
        let down = Break { way: Way::Down, records: dice(control.down), ..up };
        let connection = 1 + dice(2) as usize;
        let data = Break { connection, records: dice(whole[1].1[connection].up), ..up };
        points.extend([("precopy", up), ("precopy", down), ("precopy", data)]);
    }
    assert!(points.len() >= 25, "{}", points.len());
    let mut tally = Tally::default();
    for (mode, plan) in &points {
        at_a = broken_migration(&pair, at_a, mode, *plan, &mut tally);
    }
    println!("{} points: {tally:?}", points.len());
    // The spread is worth its name only if it reached both sides of START.
    assert!(tally.failed >= 10 && tally.in_doubt >= 2 && tally.succeeded >= 1, "{tally:?}");

    // And a clean one.
    let (from, to) = if at_a { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
    let id = from.migrate(&audited(&to.name, "precopy"));
    assert_eq!(settled(from, to, &id).1["state"], "succeeded");
}
