//! Daemons that are killed, at either end and in every phase, and doubts that are settled afterwards.

use super::*;

#[test]
fn a_destination_killed_in_precopy_costs_nothing() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 32, 0));
    let m = pair.a.migrate(&slow("b", "precopy"));
    pair.a.follow(&format!("/v1/migrations/{m}"), 60, |now| now["state"] == "precopy");
    until("it is there", 20, || pair.b.guest_state(GUEST) == "incoming");
    let before = pair.a.ticks(GUEST).unwrap().number;
    pair.b.kill();
    let end = pair.a.migration_end(&m);
    assert_eq!((state_of(&end), code_of(&end)), ("failed".into(), "peer_lost".into()), "{end}");
    pair.a.ticks_beyond(GUEST, before);
    pair.b.restart();
    honest(&pair.b);
    assert!(pair.b.items("/v1/guests").is_empty(), "what never arrived is not there");
    assert_eq!(code_of(&pair.b.migration_end(&m)), "daemon_restarted");
    let m = pair.a.migrate(&quick("b", "precopy"));
    let (at, _) = settled(&pair.a, &pair.b, &m);
    assert_eq!(at.name, "b");
}

#[test]
fn a_source_killed_in_precopy_loses_its_guest_and_says_so() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 32, 0));
    let m = pair.a.migrate(&slow("b", "precopy"));
    pair.a.follow(&format!("/v1/migrations/{m}"), 60, |now| now["state"] == "precopy");
    until("it is there", 20, || pair.b.guest_state(GUEST) == "incoming");
    pair.a.kill();
    pair.b.nothing_of(GUEST);
    assert!(pair.b.items("/v1/guests").is_empty());
    assert_eq!(state_of(&pair.b.migration_end(&m)), "failed");
    pair.a.restart();
    honest(&pair.a);
    let guest = pair.a.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!(
        (&guest["error"]["code"], &guest["moved_to"]),
        (&json!("daemon_restarted"), &Value::Null),
        "{guest}"
    );
    assert_eq!(code_of(&pair.a.migration_end(&m)), "daemon_restarted");
    // It can be started afresh and moved.
    let _ = pair.a.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
    pair.a.ticks_on(GUEST);
    let m = pair.a.migrate(&quick("b", "precopy"));
    assert_eq!(settled(&pair.a, &pair.b, &m).0.name, "b");
}

fn before_start(whole: mirrorvm_tests::Traffic, act: Act) -> Break {
    Break { connection: 0, way: Way::Up, records: whole.up - 2, bytes: 0, act }
}

#[test]
fn a_destination_killed_before_it_saw_start_gives_the_guest_back() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    println!("{whole:?}");
    pair.to_b.arm(before_start(whole, Act::Stall));
    let m = pair.a.migrate(&quick("b", "stop_and_copy"));
    let path = format!("/v1/migrations/{m}");
    pair.a.follow(&path, 30, |now| now["state"] == "finishing");
    pair.to_b.wait_broken(10);
    pair.b.kill();
    pair.to_b.cut();
    pair.a.follow(&path, 30, |now| now["state"] == "in_doubt");
    assert_eq!(pair.a.act(&format!("{path}/cancel")).expect(409).problem(), "past_point_of_no_return");
    let held = pair.a.ticks(GUEST).unwrap();
    pair.b.restart();
    honest(&pair.b);
    assert_eq!(pair.a.ticks(GUEST).unwrap(), held, "in doubt, the source holds still");
    pair.to_b.mend();
    let (at, end) = settled(&pair.a, &pair.b, &m);
    assert_eq!((at.name.as_str(), state_of(&end)), ("a", "failed".into()), "{end}");
    let m = pair.a.migrate(&quick("b", "stop_and_copy"));
    assert_eq!(settled(&pair.a, &pair.b, &m).0.name, "b");
}

#[test]
fn a_destination_killed_after_it_committed_keeps_what_it_took() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    pair.to_b.arm(before_commit(whole, Act::Stall));
    let m = pair.a.migrate(&quick("b", "stop_and_copy"));
    pair.to_b.wait_broken(60);
    // As soon as the token is on its way, which is in the midst of the destination's last steps.
    pair.b.kill();
    pair.to_b.cut();
    let path = format!("/v1/migrations/{m}");
    pair.a.follow(&path, 30, |now| now["state"] == "in_doubt");
    pair.b.restart();
    honest(&pair.b);
    // The guest was the destination's: it went with that daemon, and both say so.
    let there = pair.b.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!(there["error"]["code"], "daemon_restarted", "{there}");
    assert_eq!(
        state_of(&pair.b.read(&path)),
        "succeeded",
        "the destination's record: {}",
        pair.b.read(&path)
    );
    pair.to_b.mend();
    let end = pair.a.migration_end(&m);
    assert_eq!(state_of(&end), "succeeded", "{end}");
    let here = pair.a.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!((&here["state"], &here["moved_to"]), (&json!("stopped"), &json!("b")), "{here}");
    assert_eq!(pair.a.act(&format!("/v1/guests/{GUEST}/start")).expect(409).problem(), "guest_moved");
    let _ = pair.b.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
    pair.b.ticks_on(GUEST);
}

#[test]
fn a_doubt_is_settled_with_a_peer_that_has_another_address_by_then() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    pair.to_b.arm(before_commit(whole, Act::Cut));
    let m = pair.a.migrate(&quick("b", "stop_and_copy"));
    pair.a.follow(&format!("/v1/migrations/{m}"), 60, |now| now["state"] == "in_doubt");
    // The old way stays cut for good.
    let moved = json!({"address": pair.b.peer_address});
    let _ = pair.a.send(&Request::new("PATCH", "/v1/hosts/b").json(&moved)).expect(200);
    let end = pair.a.migration_end(&m);
    assert_eq!(end["state"], "succeeded", "{end}");
    pair.b.ticks_on(GUEST);
}

#[test]
fn a_source_killed_in_doubt_asks_on_when_it_is_back() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    for (plan, arrives) in [(before_start(whole, Act::Cut), false), (before_commit(whole, Act::Cut), true)] {
        pair.to_b.arm(plan);
        let m = pair.a.migrate(&quick("b", "stop_and_copy"));
        let path = format!("/v1/migrations/{m}");
        pair.a.follow(&path, 60, |now| now["state"] == "in_doubt");
        pair.a.kill();
        pair.a.restart();
        // Still cut off: the new daemon does not guess.
        assert_eq!(state_of(&pair.a.read(&path)), "in_doubt");
        let guest = pair.a.read(&format!("/v1/guests/{GUEST}"));
        assert_eq!(guest["state"], "in_doubt", "{guest}");
        for (verb, target) in [("start", "/start"), ("resume", "/resume"), ("stop", "/stop")] {
            let refused = pair.a.act(&format!("/v1/guests/{GUEST}{target}"));
            assert_eq!(refused.status, 409, "{verb}: {}", refused.text());
        }
        assert_eq!(pair.a.delete(&format!("/v1/guests/{GUEST}")).status, 409);
        assert_eq!(pair.a.delete(&path).status, 409);
        pair.to_b.mend();
        let end = pair.a.migration_end(&m);
        println!("arrives {arrives}: {} {}", state_of(&end), code_of(&end));
        honest(&pair.a);
        let here = pair.a.read(&format!("/v1/guests/{GUEST}"));
        if arrives {
            assert_eq!(
                (state_of(&end), &here["moved_to"]),
                ("succeeded".into(), &json!("b")),
                "{end} {here}"
            );
            pair.b.ticks_on(GUEST);
        } else {
            // The memory went with the killed daemon; the destination never ran it: it may be started afresh.
            assert_eq!(
                (state_of(&end), code_of(&end)),
                ("failed".into(), "source_restarted".into()),
                "{end}"
            );
            pair.b.nothing_of(GUEST);
            let _ = pair.a.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
            pair.a.ticks_on(GUEST);
        }
    }
}
