//! One story over the API: define a guest, start it, preview two strategies, make a mirror, check and run a
//! migration, follow it by events with a resume in the middle, and act on three errors by their codes.
//!
//! The client is made by progenitor from the OpenAPI 3.0 document at compile time. `MIRRORVM_A` and
//! `MIRRORVM_B` are the daemons' URLs, `MIRRORVM_A_TOKEN` and `MIRRORVM_B_TOKEN` bearer tokens for them.

mod api {
    progenitor::generate_api!(spec = "../../openapi/v1-3.0.json", interface = Builder);
}

use std::collections::BTreeSet;

use api::Client;
use api::types::{
    AddressSpacePlanCreate, Guest, GuestCreate, MigrationCreate, MirrorCreate, Problem, Strategy,
};
use progenitor_client::{Error, ResponseValue};
use reqwest::header::{AUTHORIZATION, HeaderValue};
use serde_json::json;

type Anything = Box<dyn std::error::Error>;

/// A body written as JSON: the type checks that it is one.
fn body<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> Result<T, Anything> {
    Ok(serde_json::from_value(value)?)
}

/// The code of a refusal: what programs go by.
fn code<T: std::fmt::Debug>(answer: Result<ResponseValue<T>, Error<Problem>>) -> String {
    match answer {
        Err(Error::ErrorResponse(problem)) => problem.into_inner().code,
        other => panic!("a refusal was expected, not {other:?}"),
    }
}

/// The daemon whose URL and token the environment has under this name.
fn daemon(name: &str) -> Result<Client, Anything> {
    let mut bearer = HeaderValue::try_from(format!("Bearer {}", std::env::var(format!("{name}_TOKEN"))?))?;
    bearer.set_sensitive(true);
    let headers = [(AUTHORIZATION, bearer)].into_iter().collect();
    let client = reqwest::Client::builder().default_headers(headers).build()?;
    Ok(Client::new_with_client(&std::env::var(name)?, client))
}

async fn get(api: &Client, guest: &str) -> Result<Guest, Anything> {
    Ok(api.guest_get().guest(guest).send().await?.into_inner())
}

async fn wait_for(api: &Client, guest: &str, state: &str) -> Result<(), Anything> {
    let mut now = get(api, guest).await?;
    while now.state != state {
        let tag = format!("\"{}\"", now.generation);
        match api.guest_get().guest(guest).wait("30s").if_none_match(tag).send().await {
            Ok(changed) => now = changed.into_inner(),
            // 304: nothing has changed yet.
            Err(e) if e.status().is_some_and(|s| s.as_u16() == 304) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Anything> {
    let (a, b) = (daemon("MIRRORVM_A")?, daemon("MIRRORVM_B")?);
    let name = format!("rs-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    let definition: GuestCreate = body(json!({
        "name": name,
        "driver": {"kind": "embedded", "vcpus": 1},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 32 << 20, "gpa": 0}]},
    }))?;

    let guest = a.guest_create().body(definition.clone()).send().await?.into_inner();
    assert_eq!(guest.state, "stopped");
    a.guest_start().guest(&name).send().await?;
    wait_for(&a, &name, "running").await?;
    println!("runs: {} {}", guest.name, guest.id);

    // Whatever other guests the daemon has, and whatever drivers run them.
    let kinds: BTreeSet<String> =
        a.guest_list().limit(1000).send().await?.into_inner().items.into_iter().map(|g| g.driver.kind).collect();
    assert!(kinds.contains("embedded"), "{kinds:?}");
    println!("drivers: {kinds:?} and nobody is {}", code(a.guest_get().guest("nobody").send().await));

    let shifted = json!({"kind": "shifted", "shift": {"kind": "4gib"}});
    for strategy in [shifted.clone(), json!({"kind": "identity-cbit"})] {
        let typed: Strategy = body(strategy.clone())?;
        let plan: AddressSpacePlanCreate = body(json!({ "strategy": typed }))?;
        match a.address_space_plan_create().guest(&name).body(plan).send().await {
            Ok(plan) => println!("{}: {} slots", strategy["kind"], plan.slots.len()),
            // A host may not execute a strategy; the plan says why.
            refused => assert_eq!(code(refused), "plan_refused"),
        }
    }

    let wanted: MirrorCreate = body(json!({"guest": name, "strategy": shifted}))?;
    let mirror = a.mirror_create().body(wanted).send().await?.into_inner();
    assert_eq!(mirror.state, "ready");
    a.mirror_delete().mirror(mirror.id.to_string()).send().await?;

    let wanted: MigrationCreate = body(json!({"guest": name, "destination": {"kind": "host", "host": "b"}}))?;
    let check = a.migration_check_create().body(wanted.clone()).send().await?.into_inner();
    assert!(check.migratable, "{:?}", check.blockers);
    let mut page = a.event_list().limit(1000).send().await?.into_inner();
    while page.more {
        page = a.event_list().after(page.next_cursor.clone()).limit(1000).send().await?.into_inner();
    }
    let mut cursor = page.next_cursor;
    let key = format!("{name}-move");
    let migrate = || a.migration_create().idempotency_key(key.as_str()).body(wanted.clone()).send();
    let migration = migrate().await?.into_inner();
    assert_eq!(migrate().await?.id, migration.id, "a repeated request has no second effect");

    // Events, a few at a time; every call resumes where the last one ended, as a client that was restarted
    // would.
    let mut states: Vec<String> = Vec::new();
    while !states.last().is_some_and(|s| ["succeeded", "failed", "canceled"].contains(&s.as_str())) {
        let some = a.event_list().after(cursor).resource(vec![migration.id.to_string()]).limit(2).wait("30s");
        let some = some.send().await?.into_inner();
        let changed = some.items.into_iter().filter(|e| e.type_ == "migration.state_changed");
        states.extend(changed.filter_map(|e| e.data.state));
        cursor = some.next_cursor;
    }
    println!("states: {}", states.join(" "));
    assert_eq!(states.last().map(String::as_str), Some("succeeded"));
    // It is the destination's from then on, and runs there a moment later.
    wait_for(&b, &name, "running").await?;

    // Three errors, each acted on by its code.
    assert_eq!(code(a.guest_start().guest(&name).send().await), "guest_moved");
    assert_eq!(get(&b, &name).await?.id, guest.id, "so it is the other host's now");
    assert_eq!(code(b.guest_create().body(definition).send().await), "name_taken");
    assert_eq!(get(&b, &name).await?.id, guest.id, "so the one that is there will do");
    println!("three refusals, each by its code");

    b.guest_stop().guest(&name).send().await?;
    wait_for(&b, &name, "stopped").await?;
    let stale = b.guest_delete().guest(&name).if_match("\"1\"").send().await;
    assert_eq!(code(stale), "precondition_failed");
    // So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
    loop {
        let fresh = format!("\"{}\"", get(&b, &name).await?.generation);
        match b.guest_delete().guest(&name).if_match(fresh).send().await {
            Ok(_) => break,
            refused => assert_eq!(code(refused), "precondition_failed"),
        }
    }
    a.guest_delete().guest(&name).send().await?;
    println!("the story went well with progenitor");
    Ok(())
}
