//! A vCPU's registers: as a value, as JSON that travels, and as bytes of a save area.
//!
//! A program's own registers are a few words whose meaning is the program's.

use mirrorvm_helper::Cursors;
use mirrorvm_workload::{CPU_WORDS, Cpu};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::firmware;
use super::programs::Program;
use crate::hypervisor::{HypervisorError, UserEntry};

/// Words that any program has at most.
pub(super) const WORDS: usize = 16;
const _: () = assert!(CPU_WORDS <= WORDS);

/// The registers of a program, as far as it has any of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Helper(Cursors),
    Workload(Cpu),
    Firmware(firmware::Cpu),
    /// Entered where no program starts; the first instruction ends it.
    Nothing,
}

/// All registers of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    pub entry: UserEntry,
    /// CPL 3 or CPL 0.
    pub user: bool,
    pub state: State,
}

impl Registers {
    /// Before the first instruction.
    pub fn entered(entry: UserEntry, user: bool) -> Self {
        let state = match Program::at(&entry, user) {
            Some(Program::Helper) => State::Helper(Cursors::default()),
            Some(Program::Workload) => State::Workload(Cpu::new(entry.rdi)),
            Some(Program::Firmware) => State::Firmware(firmware::Cpu::default()),
            None => State::Nothing,
        };
        Self { entry, user, state }
    }

    pub fn program(&self) -> Option<Program> {
        match self.state {
            State::Helper(_) => Some(Program::Helper),
            State::Workload(_) => Some(Program::Workload),
            State::Firmware(_) => Some(Program::Firmware),
            State::Nothing => None,
        }
    }

    fn words(&self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        match &self.state {
            State::Helper(c) => [words[0], words[1]] = [u64::from(c.taken), u64::from(c.answered)],
            State::Workload(cpu) => words[..CPU_WORDS].copy_from_slice(&cpu.encode()),
            State::Firmware(cpu) => words[0] = cpu.encode(),
            State::Nothing => {}
        }
        words
    }

    /// From outside: the program must be the one that starts there.
    fn from_words(entry: UserEntry, user: bool, words: &[u64; WORDS]) -> Option<Self> {
        let (used, state) = match Program::at(&entry, user)? {
            Program::Helper => {
                let cursor = |i: usize| u32::try_from(words[i]).ok();
                (2, State::Helper(Cursors { taken: cursor(0)?, answered: cursor(1)? }))
            }
            Program::Workload => (CPU_WORDS, State::Workload(Cpu::decode(words.first_chunk()?)?)),
            Program::Firmware => (1, State::Firmware(firmware::Cpu::decode(words[0])?)),
        };
        words[used..].iter().all(|w| *w == 0).then_some(Self { entry, user, state })
    }
}

/// The form in which [`crate::hypervisor::Vcpu::save`] gives registers.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Saved {
    /// Registers in plain sight.
    Registers(SavedRegisters),
    /// They are encrypted in the vCPU's save area, which travels as memory.
    SaveArea {},
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedRegisters {
    program: Program,
    cr3: u64,
    rip: u64,
    rsp: u64,
    rdi: u64,
    tss: u64,
    words: [u64; WORDS],
}

/// JSON of the registers; `None` for those of an encrypted vCPU.
pub(super) fn to_json(registers: Option<&Registers>) -> Result<Vec<u8>, HypervisorError> {
    let saved = match registers {
        None => Saved::SaveArea {},
        Some(r) => {
            let what = "save a vCPU that runs no guest's program";
            let program = r.program().filter(|p| *p != Program::Helper);
            let program = program.ok_or(HypervisorError::Unsupported { what })?;
            let UserEntry { rip, rsp, rdi, cr3, tss } = r.entry;
            Saved::Registers(SavedRegisters { program, cr3, rip, rsp, rdi, tss, words: r.words() })
        }
    };
    Ok(serde_json::to_vec(&saved).expect("plain numbers serialize"))
}

/// Registers from JSON; `None` when they are in the save area.
pub(super) fn from_json(json: &[u8]) -> Result<Option<Registers>, HypervisorError> {
    let bad = |source| HypervisorError::BadState { source };
    let saved = match serde_json::from_slice(json).map_err(bad)? {
        Saved::SaveArea {} => return Ok(None),
        Saved::Registers(saved) => saved,
    };
    let SavedRegisters { program, cr3, rip, rsp, rdi, tss, words } = saved;
    let entry = UserEntry { rip, rsp, rdi, cr3, tss };
    let registers = Registers::from_words(entry, program != Program::Firmware, &words);
    let registers = registers.filter(|r| r.program() == Some(program) && program != Program::Helper);
    registers.map(Some).ok_or_else(|| bad(invalid("these registers are of no program that starts there")))
}

/// An error of the format's reader that says `what`.
pub(super) fn invalid(what: &str) -> serde_json::Error {
    serde::de::Error::custom(what)
}

/// Marks a save area in use: "mvmvmsa1".
const MAGIC: u64 = u64::from_le_bytes(*b"mvmvmsa1");
/// Bytes of a save area that are used: whole blocks of the cipher.
pub(super) const AREA_BYTES: usize = (2 + 5 + 1 + WORDS) * 8;
const _: () = assert!(AREA_BYTES.is_multiple_of(16));

/// As they lie in a save area. The real one has its own layout (AMD APM vol. 2, appendix B); nobody but the
/// processor reads either.
pub(super) fn to_area(r: &Registers) -> [u8; AREA_BYTES] {
    let UserEntry { rip, rsp, rdi, cr3, tss } = r.entry;
    let head = [MAGIC, 1, rip, rsp, rdi, cr3, tss, u64::from(r.user)];
    let mut bytes = [0; AREA_BYTES];
    let mut words = r.words();
    for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(head.iter().chain(&words)) {
        *to = word.to_le_bytes();
    }
    words.zeroize();
    bytes
}

/// From a save area; `None` when the bytes are no registers, as when they were read with a wrong key.
pub(super) fn from_area(bytes: &[u8; AREA_BYTES]) -> Option<Registers> {
    let all = bytes.as_chunks::<8>().0;
    let word = |i: usize| all.get(i).map_or(0, |w| u64::from_le_bytes(*w));
    if (word(0), word(1)) != (MAGIC, 1) || word(7) > 1 {
        return None;
    }
    let entry = UserEntry { rip: word(2), rsp: word(3), rdi: word(4), cr3: word(5), tss: word(6) };
    let words = std::array::from_fn(|i| word(8 + i));
    let user = word(7) == 1;
    // A vCPU that was entered nowhere has an area too.
    Registers::from_words(entry, user, &words).or_else(|| {
        Program::at(&entry, user).is_none().then_some(Registers { entry, user, state: State::Nothing })
    })
}

#[cfg(test)]
mod tests {
    use mirrorvm_workload as w;
    use proptest::prelude::*;

    use super::*;

    fn entry(rip: u64, rdi: u64) -> UserEntry {
        UserEntry { rip, rsp: 1, rdi, cr3: 2, tss: 3 }
    }

    proptest! {
        #[test]
        fn a_save_area_of_any_bytes_is_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), AREA_BYTES), good: bool, rip in 0u64..3) {
            let mut area: [u8; AREA_BYTES] = bytes.try_into().unwrap();
            if good {
                area[..8].copy_from_slice(&MAGIC.to_le_bytes());
                area[8..16].copy_from_slice(&1u64.to_le_bytes());
                let rip = [0, w::IMAGE_VA, w::IMAGE_VA + w::FIRMWARE_AT][rip as usize];
                area[16..24].copy_from_slice(&rip.to_le_bytes());
                area[56..64].copy_from_slice(&1u64.to_le_bytes());
            }
            if let Some(r) = from_area(&area) {
                prop_assert_eq!(from_area(&to_area(&r)), Some(r));
            }
        }

        #[test]
        fn json_of_any_bytes_is_read_without_a_panic(text in ".{0,200}") {
            prop_assert!(from_json(text.as_bytes()).is_err());
        }

        #[test]
        fn registers_survive_both_forms(index: u64, answer: u32, which in 0usize..2) {
            let (rip, user) = [(w::IMAGE_VA, true), (w::IMAGE_VA + w::FIRMWARE_AT, false)][which];
            let mut r = Registers::entered(entry(rip, index), user);
            if let State::Workload(cpu) = &mut r.state {
                cpu.answer(answer);
            }
            prop_assert_eq!(from_area(&to_area(&r)), Some(r));
            let json = to_json(Some(&r)).unwrap();
            prop_assert_eq!(from_json(&json).unwrap(), Some(r));
        }
    }

    #[test]
    fn a_vcpu_that_was_entered_nowhere_has_no_json_but_an_area() {
        let r = Registers::entered(entry(7, 0), true);
        assert_eq!(r.program(), None);
        assert!(matches!(to_json(Some(&r)), Err(HypervisorError::Unsupported { .. })));
        assert_eq!(from_area(&to_area(&r)), Some(r));
    }
}
