//! The planners against an independent oracle: what they accept is checked byte-page by byte-page, what they
//! refuse must break a rule that the oracle states for itself, and nothing legal is refused.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by unwrapping it")]

mod accepted;
mod by_name;
mod declarations;
mod digests;
mod generate;
mod layouts;
mod oracle;
mod sizes;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

use mirrorvm::address_space::{MirrorPlan, PlanRequest, Refusal, RefusalCode, plan};
use proptest::test_runner::{Config, TestRunner};

use generate::{Case, cases};
use oracle::Oracle;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

impl Case {
    fn plan(&self) -> Result<MirrorPlan, Vec<Refusal>> {
        plan(&PlanRequest {
            layout: &self.layout,
            helper: &self.header,
            limits: &self.limits,
            strategy: self.strategy,
            mailbox: self.mailbox,
            declaration: self.declaration.as_ref(),
            shared: self.shared.as_ref(),
            confidentiality: self.confidentiality,
            read_only_text: self.read_only_text,
        })
    }
}

/// Codes that are looked for only when nothing else is wrong: they need a layout that stands.
const LATE: [RefusalCode; 6] = [
    RefusalCode::HelperUnplugged,
    RefusalCode::DeclarationIncomplete,
    RefusalCode::ConfigSpace,
    RefusalCode::PageTableSpace,
    RefusalCode::TablesNotContiguous,
    RefusalCode::PageTables,
];
/// Codes after which nothing else can be computed, or not everything.
const FINAL: [RefusalCode; 2] = [RefusalCode::SlotBudget, RefusalCode::Wraps];

/// Asks planner and oracle; gives the codes of the refusals.
fn check(case: &Case) -> HashSet<RefusalCode> {
    let oracle = Oracle::new(case);
    let broken = oracle.broken();
    match case.plan() {
        Ok(plan) => {
            assert_eq!(broken, HashSet::new(), "accepted what breaks a rule");
            accepted::check(&oracle, &plan);
            HashSet::new()
        }
        Err(refusals) => {
            assert!(!refusals.is_empty());
            for r in &refusals {
                assert!(broken.contains(&r.code), "{r:?}: the oracle knows only of {broken:?}");
                assert!(!r.to_string().is_empty());
            }
            let codes: HashSet<_> = refusals.iter().map(|r| r.code).collect();
            if !broken.iter().any(|c| FINAL.contains(c)) {
                let missing: Vec<_> =
                    broken.iter().filter(|c| !codes.contains(c) && !LATE.contains(c)).collect();
                assert!(missing.is_empty(), "not all at once: {missing:?} beside {refusals:?}");
            }
            assert!(
                !case.sized || !codes.contains(&RefusalCode::HelperTooSmall),
                "block_size is too small: {refusals:?}"
            );
            codes
        }
    }
}

#[test]
fn plans_agree_with_the_oracle() {
    // New seeds every time; a failure prints its smallest case.
    let mut runner = TestRunner::new(Config { cases: 1024, failure_persistence: None, ..Config::default() });
    runner
        .run(&cases(), |case| {
            check(&case);
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn the_oracle_is_asked_about_everything() {
    // The same cases every time, so that what they cover can be promised.
    let seen = RefCell::new((BTreeMap::new(), HashSet::new()));
    let config = Config { cases: 3072, failure_persistence: None, ..Config::default() };
    let rng = TestRunner::deterministic().rng().clone();
    TestRunner::new_with_rng(config, rng)
        .run(&cases(), |case| {
            let codes = check(&case);
            let mut seen = seen.borrow_mut();
            *seen.0.entry(case.strategy.name()).or_insert(0) += usize::from(codes.is_empty());
            seen.1.extend(codes);
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
    let (accepted, codes) = seen.into_inner();
    println!("accepted: {accepted:?}");
    assert_eq!(accepted.len(), 4);
    assert!(accepted.values().all(|n| *n > 50), "{accepted:?}");
    // What no layout and no declaration can bring about, or only one that is made for it (`by_name`).
    let others = [
        RefusalCode::HelperLayoutMismatch,
        RefusalCode::MailboxSize,
        RefusalCode::SlotAlias,
        RefusalCode::ConfigSpace,
        RefusalCode::PageTableSpace,
        RefusalCode::TablesNotContiguous,
        RefusalCode::PageTables,
        RefusalCode::StrategyUnavailable,
        RefusalCode::DeclarationCount,
    ];
    for code in RefusalCode::ALL.iter().filter(|c| !others.contains(c)) {
        assert!(codes.contains(code), "{code:?} never came up");
    }
}
