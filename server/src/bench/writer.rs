//! The guest that works on its RAM under QEMU: `writer.s`, a multiboot program that rewrites a working set at
//! a rate.
//!
//! Owns: its image and parameters, and whether it does what it should, as seen from outside. Must not know:
//! QEMU.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::BenchError;

/// What `writer.s` assembles to.
const IMAGE: &[u8] = include_bytes!("writer.bin");
/// Where it is loaded.
const LOADED_AT: u64 = 0x10_0000;
/// Offsets of its words.
const FIRST: usize = 32;
const OWED: usize = 40;
const DONE: u64 = 44;
const TICKS_PER_SECOND: u64 = 100;
const PAGE: u64 = 4096;

/// The program with what it is to do.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    /// Guest-physical, whole pages, below 4 GiB.
    pub working_set: Range<u64>,
    pub bytes_per_second: u64,
}

impl Writer {
    /// Pages of one tick, rounded to the nearest.
    fn pages_per_tick(&self) -> u64 {
        let per_tick = PAGE * TICKS_PER_SECOND;
        (self.bytes_per_second + per_tick / 2) / per_tick
    }

    fn image(&self) -> Vec<u8> {
        let mut image = IMAGE.to_vec();
        let words = [self.working_set.start, self.working_set.end, self.pages_per_tick()];
        debug_assert_eq!(FIRST + 8, OWED);
        for (at, word) in (FIRST..).step_by(4).zip(words) {
            image[at..at + 4].copy_from_slice(&(word as u32).to_le_bytes());
        }
        image
    }

    /// Writes the image for QEMU's `-kernel`.
    pub fn write(&self, dir: &Path) -> Result<PathBuf, BenchError> {
        let path = dir.join("writer.img");
        std::fs::write(&path, self.image())?;
        Ok(path)
    }

    /// Waits until it rewrites at its rate, within a third, for half a second; `base`: where RAM begins in
    /// `memory`.
    pub fn await_load(&self, memory: &File, base: u64) -> Result<(), BenchError> {
        let done = || {
            let mut word = [0; 4];
            memory.read_exact_at(&mut word, base + LOADED_AT + DONE)?;
            Ok::<_, BenchError>(u32::from_le_bytes(word))
        };
        let wanted = (self.pages_per_tick() * TICKS_PER_SECOND) as f64;
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut rate = 0.0;
        while Instant::now() < deadline {
            let (begun, before) = (Instant::now(), done()?);
            std::thread::sleep(Duration::from_millis(500));
            rate = f64::from(done()?.wrapping_sub(before)) / begun.elapsed().as_secs_f64();
            if (rate / wanted - 1.0).abs() < 0.33 {
                return Ok(());
            }
        }
        Err(format!("the guest under QEMU rewrites {rate:.0} pages/s and not {wanted:.0}").into())
    }

    /// What it leaves alone of `ram`, in which its working set lies.
    pub fn outside(&self, ram: Range<u64>) -> [Range<u64>; 2] {
        [ram.start..self.working_set.start, self.working_set.end..ram.end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn writer() -> Writer {
        Writer { working_set: 0x1000_0000..0x2000_0000, bytes_per_second: 50 << 20 }
    }

    #[test]
    fn words_are_where_the_program_reads_them() {
        let image = writer().image();
        let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
        assert_eq!((word(FIRST), word(36), word(OWED)), (0x1000_0000, 0x2000_0000, 128));
        assert_eq!(word(0), 0x1bad_b002);
        assert_eq!(word(0).wrapping_add(word(4)).wrapping_add(word(8)), 0, "checksum");
        assert_eq!(u64::from(word(16)), LOADED_AT);
        assert_eq!(word(20) - word(16), image.len() as u32);
    }

    #[test]
    fn the_image_is_what_its_source_assembles_to() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bench/writer.s");
        let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
        run(Command::new("as").arg("--32").arg("-o").arg(at("o")).arg(source));
        let ld = &mut Command::new("ld");
        ld.args(["-m", "elf_i386", "--oformat", "binary", "-Ttext", "0x100000", "-o"])
            .arg(at("bin"))
            .arg(at("o"));
        run(ld);
        assert_eq!(std::fs::read(at("bin")).unwrap(), IMAGE);
    }

    /// A file stands for the guest's memory.
    #[test]
    fn a_guest_that_works_at_its_rate_is_taken() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&0u32.to_le_bytes(), LOADED_AT + DONE).unwrap();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let theirs = file.try_clone().unwrap();
        let guest = std::thread::spawn(move || {
            let begun = Instant::now();
            let tick = Duration::from_millis(5);
            while stopped.recv_timeout(tick) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let pages = (begun.elapsed().as_secs_f64() * 12_800.0) as u32;
                theirs.write_all_at(&pages.to_le_bytes(), LOADED_AT + DONE).unwrap();
            }
        });
        writer().await_load(&file, 0).unwrap();
        drop(stop);
        guest.join().unwrap();
    }
}
