//! Every world that can be reached, breadth first, and how.
//!
//! Owns: the set of worlds, the shortest way to each, and from which ones a good one can be reached. Must not
//! know: what a world or a step is.
//!
//! Worlds are compared, not only their hashes: what was reached was reached.

use std::hash::{Hash, Hasher};

use super::moves::{Step, Terms, steps};
use super::world::{Fault, Promised, World};

/// As rustc hashes: fast, and nobody sends us worlds that collide.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

fn hash(world: &World) -> u64 {
    let mut mix = Mix::default();
    world.hash(&mut mix);
    mix.finish()
}

const NONE: u32 = u32::MAX;

/// Worlds by number, each once: a table of numbers, open addressing.
struct Known {
    worlds: Vec<World>,
    slots: Vec<u32>,
}

impl Known {
    fn new() -> Self {
        Self { worlds: Vec::new(), slots: vec![NONE; 1 << 12] }
    }

    /// The number of a world, and whether it is new.
    fn number(&mut self, world: &World) -> (u32, bool) {
        if self.worlds.len() * 2 > self.slots.len() {
            self.slots = vec![NONE; self.slots.len() * 2];
            for number in 0..self.worlds.len() as u32 {
                let slot = self.slot(&self.worlds[number as usize]);
                self.slots[slot] = number;
            }
        }
        let slot = self.slot(world);
        if self.slots[slot] != NONE {
            return (self.slots[slot], false);
        }
        let number = self.worlds.len() as u32;
        self.slots[slot] = number;
        self.worlds.push(*world);
        (number, true)
    }

    fn slot(&self, world: &World) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = hash(world) as usize & mask;
        while self.slots[slot] != NONE && self.worlds[self.slots[slot] as usize] != *world {
            slot = (slot + 1) & mask;
        }
        slot
    }
}

/// How a step counts for whether a world can still end well.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Counts {
    /// It comes by itself.
    Always,
    /// An administrator has to say a word.
    WithWord,
    /// It need not come.
    Not,
}

/// What was reached.
pub struct Space {
    known: Known,
    /// Through which step, of which session or host, from which world.
    parents: Vec<(u32, Step, u8)>,
    /// Steps from each world, one after the other; [`Space::from`] says where each one's begin.
    edges: Vec<(u32, Counts)>,
    from: Vec<u32>,
    pub steps: u64,
    /// The longest of the shortest ways.
    pub depth: usize,
    /// The first world that must not be.
    pub fault: Option<(Fault, u32)>,
}

/// Explores from a beginning; ends at the first world that must not be. `keep_steps`: so that it can be told
/// what can be reached from where.
pub fn explore(beginning: World, terms: &Terms, promised: Promised, keep_steps: bool) -> Space {
    let mut space = Space {
        known: Known::new(),
        parents: vec![(NONE, Step::DaemonStarts, 0)],
        edges: Vec::new(),
        from: Vec::new(),
        steps: 0,
        depth: 0,
        fault: None,
    };
    space.known.number(&beginning);
    let (mut at, mut end_of_level) = (0, 1);
    while (at as usize) < space.known.worlds.len() && space.fault.is_none() {
        if at == end_of_level {
            space.depth += 1;
            end_of_level = space.known.worlds.len() as u32;
        }
        let world = space.known.worlds[at as usize];
        space.from.push(space.edges.len() as u32);
        steps(&world, terms, &mut |step, who, next| {
            space.steps += 1;
            let (number, is_new) = space.known.number(&next);
            if keep_steps {
                let counts = match step {
                    Step::AdministratorSays(_) => Counts::WithWord,
                    step if step.comes_by_itself() => Counts::Always,
                    _ => Counts::Not,
                };
                space.edges.push((number, counts));
            }
            if is_new {
                space.parents.push((at, step, who));
                if let Some(fault) = next.fault(promised).filter(|_| space.fault.is_none()) {
                    space.fault = Some((fault, number));
                }
            }
        });
        at += 1;
    }
    space
}

impl Space {
    pub fn worlds(&self) -> &[World] {
        &self.known.worlds
    }

    /// The step by which a world was reached first.
    pub fn path_end(&self, world: u32) -> Option<Step> {
        self.parents.get(world as usize).filter(|p| p.0 != NONE).map(|p| p.1)
    }

    /// The shortest way to a world.
    pub fn path(&self, mut to: u32) -> Vec<(Step, u8)> {
        let mut path = Vec::new();
        while let Some((before, step, who)) = self.parents.get(to as usize).filter(|p| p.0 != NONE) {
            path.push((*step, *who));
            to = *before;
        }
        path.reverse();
        path
    }

    /// Whether each world is good, or one that is can be reached by steps that count.
    pub fn can_reach(&self, good: impl Fn(&World) -> bool, counts: impl Fn(Counts) -> bool) -> Vec<bool> {
        let mut can: Vec<bool> = self.known.worlds.iter().map(good).collect();
        // Most steps lead to worlds with a higher number: from the end, few turns are needed.
        loop {
            let mut changed = false;
            for world in (0..can.len()).rev().filter(|w| *w < self.from.len()) {
                let end = self.from.get(world + 1).map_or(self.edges.len(), |end| *end as usize);
                let steps = &self.edges[self.from[world] as usize..end];
                if !can[world] && steps.iter().any(|(to, c)| counts(*c) && can[*to as usize]) {
                    (can[world], changed) = (true, true);
                }
            }
            if !changed {
                return can;
            }
        }
    }
}
