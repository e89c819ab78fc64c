//! The program against a memory of vectors, with registers and words that anybody may have written.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

use std::collections::HashMap;

use proptest::prelude::*;

use crate::{
    Boot, CPU_WORDS, Cpu, IN_USE_AT, MORE_MAX, Memory, PAGE, PLUGGED_AT, PORT_TICK, Pattern, STATS_BYTES,
    Step,
};

/// Shared words by offset, and what was last filled into a page.
#[derive(Default)]
struct Soft {
    words: HashMap<usize, u64>,
    /// What words hold that nobody wrote.
    garbage: u64,
    pages: HashMap<u64, u64>,
    touched: Vec<u64>,
    fail: bool,
}

impl Memory for Soft {
    type Fault = ();

    fn load(&mut self, at: usize) -> Result<u64, ()> {
        assert!(at.is_multiple_of(8) && at < 16 * PAGE);
        if self.fail { Err(()) } else { Ok(*self.words.get(&at).unwrap_or(&self.garbage)) }
    }

    fn store(&mut self, at: usize, value: u64) -> Result<(), ()> {
        assert!(at.is_multiple_of(8) && at < 16 * PAGE);
        self.words.insert(at, value);
        if self.fail { Err(()) } else { Ok(()) }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), ()> {
        assert!(at + bytes.len() <= 2 * PAGE);
        if self.fail { Err(()) } else { Ok(()) }
    }

    fn matches(&mut self, page: u64, mut content: Pattern) -> Result<bool, ()> {
        self.touched.push(page);
        if self.fail { Err(()) } else { Ok(self.pages.get(&page) == Some(&content.word())) }
    }

    fn fill(&mut self, page: u64, mut content: Pattern) -> Result<(), ()> {
        self.touched.push(page);
        self.pages.insert(page, content.word());
        if self.fail { Err(()) } else { Ok(()) }
    }
}

fn boot() -> Boot {
    let mut more = [(0, 0); MORE_MAX];
    more[0] = (64 * PAGE as u64, 8 * PAGE as u64);
    more[3] = (100 * PAGE as u64, 3 * PAGE as u64);
    Boot {
        vcpus: 2,
        free_from: 10 * PAGE as u64,
        free_to: 30 * PAGE as u64,
        fill: 1,
        working_set: 12,
        pages_per_tick_q16: 3 << 15,
        shared_gpa: 0,
        more,
    }
}

fn allowed(boot: &Boot, page: u64) -> bool {
    let at = page * PAGE as u64;
    (boot.free_from..boot.free_to).contains(&at)
        || boot.more.iter().any(|(from, len)| (*from..from + len).contains(&at))
}

#[test]
fn two_vcpus_fill_everything_between_them_and_keep_it_right() {
    let boot = Boot::decode(&boot().encode()).unwrap();
    let mut memory = Soft::default();
    for at in [PLUGGED_AT, IN_USE_AT] {
        memory.words.insert(at, 0b1001);
    }
    let mut cpus = [Cpu::new(0), Cpu::new(1)];
    let mut ticks = 0;
    while ticks < 400 {
        for cpu in &mut cpus {
            // What travels is all there is.
            *cpu = Cpu::decode(&cpu.encode()).unwrap();
            if let Step::In(port) = cpu.step(&mut memory, &boot).unwrap() {
                cpu.answer(u32::from(port == PORT_TICK));
                ticks += u32::from(port == PORT_TICK);
            }
        }
    }
    let all: Vec<u64> = (0..128).filter(|p| allowed(&boot, *p)).collect();
    assert!(all.iter().all(|p| memory.pages.contains_key(p)), "every page is filled");
    assert!(memory.touched.iter().all(|p| allowed(&boot, *p)));
    for vcpu in 0..2 {
        let stat = |field: usize| memory.words.get(&(vcpu * STATS_BYTES + field * 8)).copied().unwrap_or(0);
        assert!(stat(0) >= 90 && stat(1) > 50, "{} ticks, {} pages", stat(0), stat(1));
        assert_eq!((stat(2), stat(3), stat(4)), (0, 1, 0b1001));
    }
    for page in [64, 71, 100, 102] {
        assert!(memory.touched.iter().filter(|p| **p == page).count() > 10, "page {page} is verified");
    }
}

#[test]
fn a_vcpu_that_is_ahead_expects_nothing_of_what_another_has_yet_to_fill() {
    let boot = Boot::decode(&boot().encode()).unwrap();
    let mut memory = Soft::default();
    let mut run = |cpu: &mut Cpu, ticks: u32| {
        let mut left = ticks;
        while left > 0 {
            if let Step::In(port) = cpu.step(&mut memory, &boot).unwrap() {
                cpu.answer(u32::from(port == PORT_TICK));
                left -= u32::from(port == PORT_TICK);
            }
        }
        [0, 1].map(|vcpu| [1, 2].map(|f| *memory.words.get(&(vcpu * STATS_BYTES + f * 8)).unwrap_or(&0)))
    };
    let mut cpus = [Cpu::new(0), Cpu::new(1)];
    // The second is through with its share before the first has begun.
    assert_eq!(run(&mut cpus[1], 50), [[0, 0]; 2], "pages worked on, errors");
    run(&mut cpus[0], 50);
    let [first, second] = run(&mut cpus[1], 50);
    assert!(first[0] > 0 && second[0] > 0 && first[1] + second[1] == 0, "{first:?} {second:?}");
}

#[test]
fn a_vcpu_that_is_not_started_switches_off() {
    let boot = boot();
    let mut cpu = Cpu::new(2);
    for _ in 0..3 {
        assert_eq!(cpu.step(&mut Soft::default(), &boot), Ok(Step::Out(crate::PORT_POWER_OFF, 0)));
    }
}

proptest! {
    #[test]
    fn hostile_registers_and_words_lead_nowhere_else(
        mut words: [u64; CPU_WORDS],
        phase in 0u64..12,
        index in 0u64..4,
        small: bool,
        garbage: u64,
        answers in prop::collection::vec(any::<u32>(), 1..40),
    ) {
        (words[0], words[1]) = (phase, index);
        if small {
            words[2..].iter_mut().for_each(|w| *w %= 70);
        }
        let boot = boot();
        let Some(mut cpu) = Cpu::decode(&words) else { return Ok(()) };
        prop_assert_eq!(cpu.encode(), words);
        let mut memory = Soft { garbage, ..Soft::default() };
        for answer in answers {
            for _ in 0..50 {
                if let Ok(Step::In(_)) = cpu.step(&mut memory, &boot) {
                    cpu.answer(answer);
                    break;
                }
            }
        }
        prop_assert!(memory.touched.iter().all(|p| allowed(&boot, *p)));
    }

    #[test]
    fn a_fault_leaves_the_registers_alone(mut words: [u64; CPU_WORDS], phase in 0u64..11, index in 0u64..2) {
        (words[0], words[1]) = (phase, index);
        let mut cpu = Cpu::decode(&words).unwrap();
        let mut memory = Soft { fail: true, ..Soft::default() };
        if cpu.step(&mut memory, &boot()).is_err() {
            prop_assert_eq!(cpu.encode(), words);
        }
    }

    #[test]
    fn a_boot_page_is_either_sane_or_refused(mut bytes in prop::collection::vec(any::<u8>(), crate::BOOT_BYTES), small: bool) {
        if small {
            for word in bytes.as_chunks_mut::<8>().0 {
                *word = (u64::from_le_bytes(*word) % 16 * PAGE as u64).to_le_bytes();
            }
            bytes[..8].copy_from_slice(&1u64.to_le_bytes());
        }
        if let Some(boot) = Boot::decode(bytes.as_slice().try_into().unwrap()) {
            let mut cpu = Cpu::new(0);
            let mut memory = Soft::default();
            for _ in 0..200 {
                if let Ok(Step::In(_)) = cpu.step(&mut memory, &boot) {
                    cpu.answer(1);
                }
            }
            prop_assert!(memory.touched.iter().all(|p| allowed(&boot, *p)));
        }
    }
}
