//! Migrations that are called off, refused or fail again and again: nothing of them stays.

use super::*;

#[test]
fn a_destination_without_memory_or_with_the_name_taken_refuses_before_the_pause() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    // Zero fill: addresses, not memory, are what is scarce here.
    let mut guest = embedded(GUEST, 1024, 0);
    guest["driver"]["workload"]["fill"] = json!("zero");
    a.run_guest(&guest);
    b.limit_memory(Some(512 << 20));
    let before = a.ticks(GUEST).unwrap().number;
    let m = a.migrate(&quick("b", "precopy"));
    let end = a.migration_end(&m);
    assert_eq!((state_of(&end), code_of(&end)), ("failed".into(), "no_memory".into()), "{end}");
    assert_eq!(end["progress"]["downtime_ms"], Value::Null);
    assert_eq!(end["progress"]["memory"]["iteration"], 0, "refused before the first page");
    a.ticks_beyond(GUEST, before);
    b.nothing_of(GUEST);
    assert!(b.items("/v1/guests").is_empty() && b.items("/v1/migrations").is_empty());
    b.limit_memory(None);

    let _ = b.post("/v1/guests", &embedded(GUEST, 16, 0)).expect(201);
    let m = a.migrate(&quick("b", "precopy"));
    let end = a.migration_end(&m);
    assert_eq!((state_of(&end), code_of(&end)), ("failed".into(), "name_taken".into()), "{end}");
    a.ticks_on(GUEST);
    let theirs = b.items("/v1/guests");
    assert_eq!((theirs.len(), &theirs[0]["state"]), (1, &json!("stopped")), "the other guest is untouched");
    let _ = b.delete(&format!("/v1/guests/{GUEST}")).expect(204);

    let m = a.migrate(&quick("b", "precopy"));
    let (at, end) = settled(a, b, &m);
    assert_eq!((at.name.as_str(), state_of(&end)), ("b", "succeeded".into()), "{end}");
}

#[test]
fn cancel_in_every_state() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    // Left alone, each of these takes a minute: what ends sooner was canceled, on a busy machine, too.
    a.run_guest(&embedded(GUEST, 64, 0));
    let held = |mode: &str| {
        let mut m = migration(GUEST, "b", mode);
        m["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20, "stall_timeout_ms": 60_000});
        m
    };
    let whole = stop_and_copy_records(&pair);
    let canceled = |m: &str, within: Duration| {
        let begun = std::time::Instant::now();
        let reply = a.act(&format!("/v1/migrations/{m}/cancel")).expect(202).json();
        assert!(reply["cancel_requested_at"].is_string());
        let end = a.migration_end(m);
        println!("canceled within {:?}", begun.elapsed());
        assert!(begun.elapsed() < within, "cancel took {:?}", begun.elapsed());
        assert_eq!((state_of(&end), code_of(&end)), ("canceled".into(), "-".into()), "{end}");
        pair.to_b.mend();
        assert_eq!(settled(a, b, m).0.name, "a");
    };
    let in_state = |m: &str, state: &str| {
        a.follow(&format!("/v1/migrations/{m}"), 60, |now| now["state"] == state);
        println!("in {state}");
    };
    let soon = Duration::from_secs(20);

    // Queued: the host's four slots are taken by other guests.
    let others: Vec<String> = (0..4).map(|i| format!("other-{i}")).collect();
    let taken: Vec<String> = others
        .iter()
        .map(|name| {
            a.run_guest(&embedded(name, 64, 0));
            let mut m = held("precopy");
            m["guest"] = json!(name);
            a.migrate(&m)
        })
        .collect();
    for m in &taken {
        in_state(m, "precopy");
    }
    let m = a.migrate(&held("precopy"));
    assert_eq!(state_of(&a.read(&format!("/v1/migrations/{m}"))), "queued");
    let begun = std::time::Instant::now();
    let _ = a.act(&format!("/v1/migrations/{m}/cancel")).expect(202);
    assert_eq!(state_of(&a.migration_end(&m)), "canceled");
    assert!(begun.elapsed() < soon, "cancel in the queue took {:?}", begun.elapsed());
    for other in &taken {
        let _ = a.act(&format!("/v1/migrations/{other}/cancel")).expect(202);
        assert_eq!(state_of(&a.migration_end(other)), "canceled");
    }
    assert_eq!(b.get(&format!("/v1/migrations/{m}")).status, 404, "the destination never heard of it");
    for name in &others {
        a.ticks_on(name);
        let _ = a.act(&format!("/v1/guests/{name}/stop")).expect(202);
        a.guest_in(name, "stopped");
        let _ = a.delete(&format!("/v1/guests/{name}")).expect(204);
    }
    until("the others are gone there", 30, || b.items("/v1/guests").iter().all(|g| g["name"] == GUEST));

    // Preparing: in the handshake, and while PREPARED is held up.
    for records in [1, whole.down - 4] {
        pair.to_b.arm(Break { connection: 0, way: Way::Down, records, bytes: 0, act: Act::Stall });
        let m = a.migrate(&held("stop_and_copy"));
        pair.to_b.wait_broken(20);
        assert_eq!(state_of(&a.read(&format!("/v1/migrations/{m}"))), "preparing");
        canceled(&m, soon);
    }
    // Pre-copy.
    let m = a.migrate(&held("precopy"));
    in_state(&m, "precopy");
    canceled(&m, soon);
    // Switchover: the guest is paused, and goes on.
    let m = a.migrate(&held("stop_and_copy"));
    in_state(&m, "switchover");
    canceled(&m, soon);
    // From the destination's side.
    let m = a.migrate(&held("precopy"));
    until("it is there", 30, || b.get(&format!("/v1/migrations/{m}")).status == 200);
    in_state(&m, "precopy");
    let _ = b.act(&format!("/v1/migrations/{m}/cancel")).expect(202);
    let (at, end) = settled(a, b, &m);
    assert_eq!(at.name, "a");
    println!("canceled by the destination: {} {}", state_of(&end), code_of(&end));
    assert_eq!(state_of(&b.read(&format!("/v1/migrations/{m}"))), "canceled");

    // Finishing and in doubt: too late.
    pair.to_b.arm(before_commit(whole, Act::Stall));
    let m = a.migrate(&quick("b", "stop_and_copy"));
    let path = format!("/v1/migrations/{m}");
    in_state(&m, "finishing");
    pair.to_b.wait_broken(20);
    assert_eq!(a.act(&format!("{path}/cancel")).expect(409).problem(), "past_point_of_no_return");
    pair.to_b.cut();
    in_state(&m, "in_doubt");
    assert_eq!(a.act(&format!("{path}/cancel")).expect(409).problem(), "past_point_of_no_return");
    assert_eq!(a.read(&path)["cancel_requested_at"], Value::Null, "a refused request leaves no trace");
    pair.to_b.mend();
    let (at, end) = settled(a, b, &m);
    assert_eq!((at.name.as_str(), state_of(&end)), ("b", "succeeded".into()));
    // Ended: the record as it is.
    let after = a.act(&format!("{path}/cancel")).expect(200).json();
    assert_eq!(after, end);
}

#[test]
fn failing_and_retrying_leaks_nothing() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    let both = || (a.census(), b.census());
    // Idle threads of the runtime's blocking pool come and go on their own: what counts is that the rounds do
    // not add to them. One whole round before the first count has made everything that is made once.
    let round = |i: u64| {
        pair.to_b.arm(Break {
            connection: i as usize % 2,
            way: if i.is_multiple_of(3) { Way::Down } else { Way::Up },
            records: [3, whole.up - 3, 2, whole.down - 3, 5][i as usize % 5],
            bytes: i % 7,
            act: Act::Cut,
        });
        let m = a.migrate(&quick("b", if i.is_multiple_of(2) { "precopy" } else { "stop_and_copy" }));
        let end = a.follow(&format!("/v1/migrations/{m}"), 60, |m| {
            is_terminal(&m["state"]) || m["state"] == "in_doubt"
        });
        pair.to_b.mend();
        let at = settled(a, b, &m).0;
        println!("round {i}: {} {}; {:?}", state_of(&end), code_of(&end), both());
        // Back to where it was, through a migration that works.
        if at.name == "a" {
            let m = a.migrate(&quick("b", "precopy"));
            assert_eq!(settled(a, b, &m).0.name, "b");
        }
        let m = b.migrate(&quick("a", "precopy"));
        assert_eq!(settled(b, a, &m).0.name, "a");
    };
    round(0);
    // The connection of the last look may still be closing: what counts is the least of several looks.
    let least = |x: mirrorvm_tests::Census, y: mirrorvm_tests::Census| if y.fds < x.fds { y } else { x };
    let start = (0..10).map(|_| both()).reduce(|x, y| (least(x.0, y.0), least(x.1, y.1))).unwrap();
    for i in 1..=15 {
        round(i);
    }
    let mut last = start.clone();
    let what = format!("descriptors and threads as at the start: {start:?}");
    let end = until_some(&what, 20, || {
        let now = both();
        if now != last {
            println!("now {now:?}");
            last = now.clone();
        }
        let same = |s: &mirrorvm_tests::Census, n: &mirrorvm_tests::Census| {
            (n.fds, n.memfds, n.kvm, n.children) == (s.fds, s.memfds, s.kvm, s.children)
                && n.threads <= s.threads
        };
        (same(&start.0, &now.0) && same(&start.1, &now.1)).then_some(now)
    });
    println!("from {start:?} to {end:?}");
}
