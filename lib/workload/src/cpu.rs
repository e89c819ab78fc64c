//! The program that every workload vCPU runs, as a machine of small steps.
//!
//! Owns: all of its registers. Must not know: how memory is reached, who answers ports. A step does at most
//! one page's work, so that a software machine can be interrupted between any two.

use crate::line::Line;
use crate::{
    Boot, CONSOLE_AT, IN_USE_AT, MAP_RANGE_AT, MORE_MAX, PAGE, PLUGGED_AT, PORT_CONSOLE, PORT_MAP_RANGE,
    PORT_POWER_OFF, PORT_TICK, Pattern, SHARED_PAGES, STATS_BYTES, VCPUS_MAX, share,
};

/// The memory under the program. On bare metal nothing can fail that the program would see; on the software
/// machine an access ends in a fault, and the step it happened in has no further effect.
pub trait Memory {
    /// What an access that cannot be done leaves behind.
    type Fault;

    /// Reads an aligned word at byte offset `at` of the shared pages.
    ///
    /// # Errors
    /// A fault, as for all of these.
    fn load(&mut self, at: usize) -> Result<u64, Self::Fault>;

    /// Writes an aligned word at byte offset `at` of the shared pages.
    ///
    /// # Errors
    /// A fault.
    fn store(&mut self, at: usize, value: u64) -> Result<(), Self::Fault>;

    /// Writes bytes at byte offset `at` of the shared pages.
    ///
    /// # Errors
    /// A fault.
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Self::Fault>;

    /// Whether page `page` of the RAM window has this content.
    ///
    /// # Errors
    /// A fault.
    fn matches(&mut self, page: u64, content: Pattern) -> Result<bool, Self::Fault>;

    /// Overwrites page `page` of the RAM window.
    ///
    /// # Errors
    /// A fault.
    fn fill(&mut self, page: u64, content: Pattern) -> Result<(), Self::Fault>;
}

/// What a step ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more to do.
    More,
    /// It reads a port: [`Cpu::answer`], then go on.
    In(u16),
    /// It writes a port.
    Out(u16, u32),
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing was done yet.
    Begin,
    /// The host answers whether it takes the shared pages.
    Shared,
    /// The first line is to be printed.
    Greet,
    /// RAM is being filled.
    Fill,
    /// It is time to wait for a tick.
    Ask,
    /// The host answers how many ticks passed.
    Ticked,
    /// Pages of the working set are due.
    Rewrite,
    /// vCPU 0 looks after plugged pieces.
    Tend,
    /// vCPU 0 verifies pages of plugged pieces.
    Sweep,
    /// vCPU 0 prints a line, if it is time.
    Report,
    /// The machine is off.
    Off,
}

const PHASES: [Phase; 11] = [
    Phase::Begin,
    Phase::Shared,
    Phase::Greet,
    Phase::Fill,
    Phase::Ask,
    Phase::Ticked,
    Phase::Rewrite,
    Phase::Tend,
    Phase::Sweep,
    Phase::Report,
    Phase::Off,
];

/// Pages of plugged pieces that are verified a tick.
const SWEEP_PAGES: u64 = 4;

/// All registers of a workload vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    phase: Phase,
    /// Which vCPU it is.
    index: u64,
    /// The answer of the port that was read last.
    input: u64,
    /// The piece being filled (0: free RAM, then `Boot::more`), and pages done there.
    piece: u64,
    done: u64,
    /// Pieces that were plugged when this vCPU began.
    filled: u64,
    /// The page of the working set that is next, from its start, and what is there now.
    next: u64,
    generation: u64,
    /// Pages to rewrite, times 65536.
    due: u64,
    /// Tenths of a second that the last line told.
    shown: u64,
    /// Pages left to verify this tick; where to go on: bit number of a piece, page there.
    sweep: u64,
    sweep_piece: u64,
    sweep_page: u64,
}

/// Words of an encoded [`Cpu`].
pub const CPU_WORDS: usize = 13;

impl Cpu {
    /// vCPU `index` before its first instruction.
    pub const fn new(index: u64) -> Self {
        Self {
            phase: Phase::Begin,
            index,
            input: 0,
            piece: 0,
            done: 0,
            filled: 0,
            next: 0,
            generation: 0,
            due: 0,
            shown: 0,
            sweep: 0,
            sweep_piece: 0,
            sweep_page: 0,
        }
    }

    /// As words that travel.
    pub const fn encode(&self) -> [u64; CPU_WORDS] {
        [
            self.phase as u64,
            self.index,
            self.input,
            self.piece,
            self.done,
            self.filled,
            self.next,
            self.generation,
            self.due,
            self.shown,
            self.sweep,
            self.sweep_piece,
            self.sweep_page,
        ]
    }

    /// From words, whoever wrote them; `None` when they name no phase.
    pub fn decode(words: &[u64; CPU_WORDS]) -> Option<Self> {
        let [
            phase,
            index,
            input,
            piece,
            done,
            filled,
            next,
            generation,
            due,
            shown,
            sweep,
            sweep_piece,
            sweep_page,
        ] = *words;
        let phase = *PHASES.get(usize::try_from(phase).ok()?)?;
        Some(Self {
            phase,
            index,
            input,
            piece,
            done,
            filled,
            next,
            generation,
            due,
            shown,
            sweep,
            sweep_piece,
            sweep_page,
        })
    }

    /// The answer to [`Step::In`].
    pub fn answer(&mut self, value: u32) {
        self.input = u64::from(value);
    }

    /// Does a bounded piece of work: one page at most. `boot` is one that [`Boot::decode`] gave.
    ///
    /// # Errors
    /// The fault of an access that cannot be done; the registers are then as before.
    pub fn step<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        // A program on bare metal has no fault to come back from; on the software machine registers stay as
        // they were.
        let mut after = *self;
        let step = after.act(memory, boot)?;
        *self = after;
        Ok(step)
    }

    // Inlined, so that the bare-metal loop keeps its registers in registers.
    #[inline(always)]
    fn act<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        if self.phase == Phase::Off || self.index >= boot.vcpus {
            self.phase = Phase::Off;
            return Ok(Step::Out(PORT_POWER_OFF, 0));
        }
        match self.phase {
            Phase::Begin => self.begin(memory, boot),
            Phase::Shared => {
                self.phase = Phase::Greet;
                if self.input == 0 {
                    return Ok(Step::More);
                }
                print(memory, &Line::new(&["the host refuses to share pages"], &[]))
            }
            Phase::Greet => {
                self.phase = Phase::Fill;
                print(memory, &Line::new(&["mirrorvm workload: filling RAM"], &[]))
            }
            Phase::Fill => self.fill(memory, boot),
            Phase::Ask | Phase::Off => {
                self.phase = Phase::Ticked;
                Ok(Step::In(PORT_TICK))
            }
            Phase::Ticked => self.ticked(memory, boot),
            Phase::Rewrite => self.rewrite(memory, boot),
            Phase::Tend => self.tend(memory, boot),
            Phase::Sweep => self.verify(memory, boot),
            Phase::Report => self.report(memory, boot),
        }
    }

    /// Tells the host that the shared pages are no secret.
    fn begin<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        self.filled = memory.load(PLUGGED_AT)? & pieces(boot);
        if self.index != 0 {
            self.phase = Phase::Fill;
            return Ok(Step::More);
        }
        for (i, value) in [boot.shared_gpa, SHARED_PAGES, 0].into_iter().enumerate() {
            memory.store(MAP_RANGE_AT + i * 8, value)?;
        }
        self.phase = Phase::Shared;
        Ok(Step::In(PORT_MAP_RANGE))
    }

    /// Fills a page of this vCPU's share of a piece. The working set is filled in any case, since the work
    /// begins with checking it.
    fn fill<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        if self.piece > MORE_MAX as u64 {
            memory.store(self.stat(4), self.filled)?;
            memory.store(self.stat(3), 1)?;
            self.phase = Phase::Ask;
            return Ok(Step::More);
        }
        let (first, pages) = match self.piece.checked_sub(1) {
            None => (page(boot.free_from), page(boot.free_to) - page(boot.free_from)),
            Some(i) if self.filled >> i & 1 == 0 => (0, 0),
            Some(i) => piece(boot, i),
        };
        let always = if self.piece == 0 { boot.working_set.min(pages) } else { 0 };
        let wanted = if boot.fill != 0 { pages } else { always };
        let (from, to) = share(wanted, self.index, boot.vcpus);
        if self.done < to - from {
            let at = first + from + self.done;
            memory.fill(at, Pattern::new(at, 0))?;
            self.done += 1;
        } else {
            (self.piece, self.done) = (self.piece + 1, 0);
        }
        Ok(Step::More)
    }

    fn ticked<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        let (first, last) = share(boot.working_set, self.index, boot.vcpus);
        let rate = boot.pages_per_tick_q16.saturating_mul(last - first) / boot.working_set.max(1);
        self.add(memory, 0, self.input)?;
        // RAM is filled by other shares than it is worked on: of pages that another vCPU has yet to fill
        // nothing can be expected.
        if !all_filled(memory, boot)? {
            self.phase = if self.index == 0 { Phase::Tend } else { Phase::Ask };
            return Ok(Step::More);
        }
        // A guest that was held does not catch up for ever: one second's work at most.
        let most = rate.saturating_mul(100).max(1 << 16);
        self.due = self.due.saturating_add(rate.saturating_mul(self.input)).min(most);
        self.phase = Phase::Rewrite;
        Ok(Step::More)
    }

    fn rewrite<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        let (first, last) = share(boot.working_set, self.index, boot.vcpus);
        if self.due < 1 << 16 || first == last {
            self.phase = if self.index == 0 { Phase::Tend } else { Phase::Ask };
            return Ok(Step::More);
        }
        // Within the share whatever the registers say that arrived from elsewhere.
        let turn = self.next % (last - first);
        let at = page(boot.free_from) + first + turn;
        if !memory.matches(at, Pattern::new(at, self.generation))? {
            self.add(memory, 2, 1)?;
        }
        let generation = self.generation.wrapping_add(1);
        memory.fill(at, Pattern::new(at, generation))?;
        self.add(memory, 1, 1)?;
        self.due -= 1 << 16;
        self.next = turn + 1;
        if self.next == last - first {
            (self.next, self.generation) = (0, generation);
        }
        Ok(Step::More)
    }

    /// Follows the host's wish about pieces. Nothing is under way in any of them between two ticks, once
    /// every vCPU has filled its share.
    fn tend<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        self.phase = Phase::Report;
        if pieces(boot) == 0 {
            return Ok(Step::More);
        }
        if !all_filled(memory, boot)? {
            return Ok(Step::More);
        }
        let plugged = memory.load(PLUGGED_AT)? & pieces(boot);
        memory.store(IN_USE_AT, plugged)?;
        if boot.fill != 0 && self.input != 0 {
            (self.phase, self.sweep) = (Phase::Sweep, SWEEP_PAGES);
        }
        Ok(Step::More)
    }

    /// Verifies one page of the pieces in use that every vCPU has filled, round and round.
    fn verify<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        let mut pieces = memory.load(IN_USE_AT)? & pieces(boot);
        for vcpu in 0..boot.vcpus {
            pieces &= memory.load(stat_at(vcpu, 4))?;
        }
        if self.sweep == 0 || pieces == 0 {
            self.phase = Phase::Report;
            return Ok(Step::More);
        }
        // The piece where it stopped, or the next one in use.
        let from = self.sweep_piece % 64;
        let bit = (u64::from(pieces.rotate_right(from as u32).trailing_zeros()) + from) % 64;
        let (first, pages) = piece(boot, bit);
        let turn = if bit == from { self.sweep_page } else { 0 };
        if turn >= pages {
            (self.sweep_piece, self.sweep_page) = ((bit + 1) % 64, 0);
        } else {
            if !memory.matches(first + turn, Pattern::new(first + turn, 0))? {
                self.add(memory, 2, 1)?;
            }
            (self.sweep_piece, self.sweep_page) = (bit, turn + 1);
        }
        self.sweep -= 1;
        Ok(Step::More)
    }

    /// A line ten times a second.
    fn report<M: Memory>(&mut self, memory: &mut M, boot: &Boot) -> Result<Step, M::Fault> {
        self.phase = Phase::Ask;
        let ticks = memory.load(self.stat(0))?;
        if ticks / 10 == self.shown {
            return Ok(Step::More);
        }
        self.shown = ticks / 10;
        let (mut pages, mut errors) = (0u64, 0u64);
        for vcpu in 0..boot.vcpus {
            pages = pages.wrapping_add(memory.load(stat_at(vcpu, 1))?);
            errors = errors.wrapping_add(memory.load(stat_at(vcpu, 2))?);
        }
        print(memory, &Line::new(&["tick ", " pages ", " errors "], &[ticks, pages, errors]))
    }

    const fn stat(&self, field: usize) -> usize {
        stat_at(self.index, field)
    }

    fn add<M: Memory>(&self, memory: &mut M, field: usize, n: u64) -> Result<(), M::Fault> {
        let at = self.stat(field);
        let value = memory.load(at)?;
        memory.store(at, value.wrapping_add(n))
    }
}

fn print<M: Memory>(memory: &mut M, line: &Line) -> Result<Step, M::Fault> {
    memory.write(CONSOLE_AT, line.bytes())?;
    Ok(Step::Out(PORT_CONSOLE, line.bytes().len() as u32))
}

/// Whether every vCPU has filled its share of RAM.
fn all_filled<M: Memory>(memory: &mut M, boot: &Boot) -> Result<bool, M::Fault> {
    for vcpu in 0..boot.vcpus {
        if memory.load(stat_at(vcpu, 3))? == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where a field of a vCPU's statistics lies in the shared pages; callers have checked `vcpu`.
const fn stat_at(vcpu: u64, field: usize) -> usize {
    const { assert!(VCPUS_MAX as usize * STATS_BYTES <= PAGE) };
    vcpu as usize * STATS_BYTES + field * 8
}

const fn page(at: u64) -> u64 {
    at / PAGE as u64
}

/// First page and pages of `Boot::more[i]`.
fn piece(boot: &Boot, i: u64) -> (u64, u64) {
    let (at, len) = boot.more.get(i as usize).copied().unwrap_or_default();
    (page(at), len / PAGE as u64)
}

/// Bits of the pieces that there are.
fn pieces(boot: &Boot) -> u64 {
    const { assert!(MORE_MAX <= 64) };
    boot.more.iter().zip(0u32..).filter(|((_, len), _)| *len != 0).map(|(_, i)| 1u64 << i).sum()
}
