//! The story of the other examples, told with the crate that openapi-generator makes from openapi/v1.json.
//!
//! `MIRRORVM_A` and `MIRRORVM_B` are the daemons' URLs, `MIRRORVM_A_TOKEN` and `MIRRORVM_B_TOKEN` bearer tokens for them.

use std::collections::{BTreeSet, HashMap};

use mirrorvm_oag::apis::configuration::Configuration;
use mirrorvm_oag::apis::{Error, events_api, guests_api, migrations_api, mirrors_api};
use mirrorvm_oag::models::*;

type Anything = Box<dyn std::error::Error>;

/// The daemon whose URL and token the environment has under this name.
fn daemon(name: &str) -> Result<Configuration, Anything> {
    Ok(Configuration {
        base_path: std::env::var(name)?,
        bearer_access_token: Some(std::env::var(format!("{name}_TOKEN"))?),
        ..Configuration::default()
    })
}

/// The code of the problem (RFC 9457) that a call was refused with: what programs go by.
fn code<T: std::fmt::Debug, E>(answer: Result<T, Error<E>>) -> Result<String, Anything> {
    match answer {
        Err(Error::ResponseError(refused)) => {
            Ok(serde_json::from_str::<Problem>(&refused.content)?.code)
        }
        Err(_) => Err("the daemon did not answer".into()),
        Ok(answer) => Err(format!("a refusal was expected, not {answer:?}").into()),
    }
}

async fn get(at: &Configuration, guest: &str) -> Result<Guest, Anything> {
    Ok(guests_api::guest_get(at, guest, None, None).await?)
}

async fn wait_for(at: &Configuration, guest: &str, state: &str) -> Result<(), Anything> {
    let mut now = get(at, guest).await?;
    while now.state != state {
        let tag = format!("\"{}\"", now.generation);
        match guests_api::guest_get(at, guest, Some("30s"), Some(&tag)).await {
            Ok(changed) => now = changed,
            // 304: nothing has changed yet.
            Err(Error::ResponseError(e)) if e.status.as_u16() == 304 => {}
            // The client takes 304 for a success, and has no guest in it.
            Err(Error::Serde(_) | Error::Reqwest(_)) => now = get(at, guest).await?,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Anything> {
    let (a, b) = (daemon("MIRRORVM_A")?, daemon("MIRRORVM_B")?);
    let name = format!("oag-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);

    let driver = Driver::Embedded(Box::new(DriverEmbedded { vcpus: Some(1), ..DriverEmbedded::new() }));
    let block = MemoryBlock { gpa: Some(Some(0)), ..MemoryBlock::new("ram0".into(), 32 << 20) };
    let definition = GuestCreate::new(name.clone(), driver, Memory::new(vec![block]));
    let guest = guests_api::guest_create(&a, definition.clone(), None, None).await?;
    assert_eq!((guest.state.as_str(), guest.driver.kind.as_str()), ("stopped", "embedded"));
    guests_api::guest_start(&a, &name, None, None, None).await?;
    wait_for(&a, &name, "running").await?;
    println!("runs: {} {}", guest.name, guest.id);

    // Whatever other guests the daemon has, and whatever drivers run them.
    let list = guests_api::guest_list(&a, None, None, None, Some(1000), None).await?;
    let kinds: BTreeSet<String> = list.items.into_iter().map(|g| g.driver.kind).collect();
    assert!(kinds.contains("embedded"), "{kinds:?}");
    let nobody = guests_api::guest_get(&a, "nobody", None, None).await;
    println!("drivers: {kinds:?} and nobody is {}", code(nobody)?);

    let shifted = Strategy::Shifted(Box::new(StrategyShifted::new(Shift::default())));
    for strategy in [shifted.clone(), Strategy::IdentityCbit(Box::default())] {
        let wanted = AddressSpacePlanCreate::new(strategy);
        match guests_api::address_space_plan_create(&a, &name, wanted, None).await {
            Ok(plan) => println!("{} has {} slots", plan.strategy.kind, plan.slots.len()),
            // A host may not execute a strategy; the plan says why.
            refused => assert_eq!(code(refused)?, "plan_refused"),
        }
    }

    let mirror = mirrors_api::mirror_create(&a, MirrorCreate::new(name.clone(), shifted), None, None).await?;
    assert_eq!(mirror.state, "ready");
    mirrors_api::mirror_delete(&a, &mirror.id.to_string(), None).await?;

    let destination = Destination::Host(Box::new(DestinationHost::new("b".into())));
    let wanted = MigrationCreate::new(name.clone(), destination);
    let look = migrations_api::migration_check_create(&a, wanted.clone(), None).await?;
    assert!(look.migratable, "{:?}", look.blockers);
    let events = async |after: Option<&str>, of: Vec<String>, limit, wait| {
        events_api::event_list(&a, after, None, Some(of), None, Some(limit), wait).await
    };
    let mut page = events(None, vec![], 1000, None).await?;
    while page.more {
        page = events(Some(&page.next_cursor), vec![], 1000, None).await?;
    }
    let mut cursor = page.next_cursor;
    let key = format!("{name}-move");
    let migrate = || migrations_api::migration_create(&a, wanted.clone(), None, Some(&key), None);
    let migration = migrate().await?;
    assert_eq!(migrate().await?.id, migration.id, "a repeated request has no second effect");

    // Events, a few at a time; every call resumes where the last one ended, as a client that was restarted would.
    let mut states: Vec<String> = Vec::new();
    while !states.last().is_some_and(|s| ["succeeded", "failed", "canceled"].contains(&s.as_str())) {
        let some = events(Some(&cursor), vec![migration.id.to_string()], 2, Some("30s")).await?;
        let changed = some.items.into_iter().filter(|e| e.r#type == "migration.state_changed");
        states.extend(changed.filter_map(|e| e.data.state));
        cursor = some.next_cursor;
    }
    println!("states: {}", states.join(" "));
    assert_eq!(states.last().map(String::as_str), Some("succeeded"));
    // It is the destination's from then on, and runs there a moment later.
    wait_for(&b, &name, "running").await?;

    // Three errors, each acted on by its code.
    assert_eq!(code(guests_api::guest_start(&a, &name, None, None, None).await)?, "guest_moved");
    assert_eq!(get(&b, &name).await?.id, guest.id, "so it is the other host's now");
    assert_eq!(code(guests_api::guest_create(&b, definition, None, None).await)?, "name_taken");
    assert_eq!(get(&b, &name).await?.id, guest.id, "so the one that is there will do");
    let labels = Some(Some(HashMap::from([("by".to_owned(), "rust".to_owned())])));
    let relabel = async |tag: &str| {
        let update = GuestUpdate { labels: labels.clone() };
        guests_api::guest_update(&b, &name, update, None, Some(tag)).await
    };
    assert_eq!(code(relabel("\"1\"").await)?, "precondition_failed");
    // So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
    let relabelled = loop {
        let fresh = format!("\"{}\"", get(&b, &name).await?.generation);
        match relabel(&fresh).await {
            Ok(guest) => break guest,
            refused => assert_eq!(code(refused)?, "precondition_failed"),
        }
    };
    assert_eq!(relabelled.labels["by"], "rust");

    guests_api::guest_stop(&b, &name, None, None, None).await?;
    wait_for(&b, &name, "stopped").await?;
    for at in [&b, &a] {
        guests_api::guest_delete(at, &name, None).await?;
    }
    println!("the story went well with openapi-generator's crate");
    Ok(())
}
