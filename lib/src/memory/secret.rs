//! Secrets in memory of their own: never swapped out, in no core dump, in no child, wiped when they go.
//!
//! Owns: the pages that secrets lie on, and the type that holds one. Must not know: what a secret opens.
//!
//! Pages come in chunks between two that nobody may touch, so that whoever reads past the end of something
//! else does not run into them. A chunk stays for as long as the process lives; its pieces are used again.
//! Copies that others make of a secret (a cipher's key schedule, a message on its way into TLS, a page of a
//! helper's memory) are not here.

use std::alloc::{Layout, handle_alloc_error};
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Mutex;

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mlock, mmap_anonymous, mprotect};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::addr::PAGE_SIZE;
use crate::sync::Locked;

/// Bytes of a page that nobody may touch.
const GUARD: usize = PAGE_SIZE as usize;
/// Bytes of a chunk between its guards: little enough for the limit that an unprivileged process has.
const CHUNK: usize = 4 * PAGE_SIZE as usize;
/// Bytes that are given out at once: a line of the processor's cache, which no two secrets share.
const UNIT: usize = 64;
/// Units of a chunk.
const UNITS: usize = CHUNK / UNIT;

/// Whether secrets lie on pages that are never written to swap space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretMemory {
    /// All of them do, so far.
    Locked,
    /// The kernel did not lock a page for some of them; a sentence that says why and what helps.
    Unlocked(String),
}

/// What the pages are at the moment.
pub fn secret_memory() -> SecretMemory {
    POOL.locked().unlocked.clone().map_or(SecretMemory::Locked, SecretMemory::Unlocked)
}

static POOL: Mutex<Pool> = Mutex::new(Pool { chunks: Vec::new(), unlocked: None });

struct Pool {
    chunks: Vec<Chunk>,
    unlocked: Option<String>,
}

struct Chunk {
    /// The first byte between the guards.
    from: NonNull<u8>,
    taken: [bool; UNITS],
}

// SAFETY: the pointer is to pages that the process keeps for ever, and whoever has it has the pool's lock.
#[expect(unsafe_code, reason = "UNSAFETY: a pointer to pages that no thread owns")]
unsafe impl Send for Chunk {}

impl Chunk {
    /// New pages, and what kept the kernel from locking them.
    #[expect(unsafe_code, reason = "UNSAFETY: mapping, locking and advising pages of our own")]
    fn map() -> rustix::io::Result<(Self, Option<rustix::io::Errno>)> {
        let all = GUARD + CHUNK + GUARD;
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that is there.
        let base =
            unsafe { mmap_anonymous(std::ptr::null_mut(), all, ProtFlags::empty(), MapFlags::PRIVATE) }?;
        // SAFETY: the mapping has `all` bytes.
        let from = unsafe { base.cast::<u8>().add(GUARD) };
        let middle = from.cast();
        // SAFETY: the pages were mapped above, are nobody else's, and hold nothing yet.
        let locked = unsafe {
            mprotect(middle, CHUNK, MprotectFlags::READ | MprotectFlags::WRITE)?;
            madvise(middle, CHUNK, Advice::LinuxDontDump)?;
            madvise(middle, CHUNK, Advice::LinuxDontFork)?;
            mlock(middle, CHUNK)
        };
        let from = NonNull::new(from).ok_or(rustix::io::Errno::NOMEM)?;
        Ok((Self { from, taken: [false; UNITS] }, locked.err()))
    }

    /// The first of `units` units side by side that are free, which are taken then.
    fn take(&mut self, units: usize) -> Option<NonNull<u8>> {
        let at = self.taken.windows(units).position(|run| run.iter().all(|taken| !taken))?;
        self.taken.get_mut(at..at + units)?.fill(true);
        // Within the chunk: `at` is a position in it.
        NonNull::new(self.from.as_ptr().wrapping_add(at * UNIT))
    }

    /// Gives units back that were taken from this chunk; false when they are not of it.
    fn give_back(&mut self, room: NonNull<u8>, units: usize) -> bool {
        let Some(offset) = room.addr().get().checked_sub(self.from.addr().get()) else { return false };
        match self.taken.get_mut(offset / UNIT..offset / UNIT + units) {
            Some(run) => {
                run.fill(false);
                true
            }
            None => false,
        }
    }
}

impl Pool {
    /// Room for so many bytes, zero.
    fn take(&mut self, bytes: usize) -> NonNull<u8> {
        let units = bytes.div_ceil(UNIT).max(1);
        if let Some(room) = self.chunks.iter_mut().find_map(|chunk| chunk.take(units)) {
            return room;
        }
        let no_memory = || -> ! { handle_alloc_error(Layout::new::<[u8; CHUNK]>()) };
        let Ok((mut chunk, not_locked)) = Chunk::map() else { no_memory() };
        if let (Some(errno), None) = (not_locked, &self.unlocked) {
            let why = format!(
                "secrets are on pages that may be swapped out, because mlock(2) failed ({errno}): raise RLIMIT_MEMLOCK \
                 (systemd: LimitMEMLOCK=), or give this process CAP_IPC_LOCK"
            );
            tracing::warn!("{why}");
            self.unlocked = Some(why);
        }
        let Some(room) = chunk.take(units) else { no_memory() };
        self.chunks.push(chunk);
        room
    }

    fn give_back(&mut self, room: NonNull<u8>, bytes: usize) {
        let units = bytes.div_ceil(UNIT).max(1);
        let _ = self.chunks.iter_mut().any(|chunk| chunk.give_back(room, units));
    }
}

/// A secret of `N` bytes, at most 16 KiB: the only copy of it that its holder makes, on pages that are locked
/// where the kernel lets them be ([`secret_memory`]). Dropping it wipes it. Printing it shows its length.
pub struct Secret<const N: usize> {
    room: NonNull<u8>,
    bytes: PhantomData<[u8; N]>,
}

// SAFETY: the room is this value's alone until it is dropped, and its bytes change only through `&mut`.
#[expect(unsafe_code, reason = "UNSAFETY: a pointer that owns what it points to")]
unsafe impl<const N: usize> Send for Secret<N> {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "UNSAFETY: a pointer that owns what it points to")]
unsafe impl<const N: usize> Sync for Secret<N> {}

impl<const N: usize> Secret<N> {
    /// The bytes that `fill` puts there; it finds zeros.
    pub fn filled(fill: impl FnOnce(&mut [u8; N])) -> Self {
        const { assert!(N <= CHUNK, "a secret fits a chunk") };
        let mut secret = Self { room: POOL.locked().take(N), bytes: PhantomData };
        fill(&mut secret);
        secret
    }

    /// The bytes that `fill` puts there.
    ///
    /// # Errors
    /// Those of `fill`; whatever it wrote is wiped.
    pub fn try_filled<E>(fill: impl FnOnce(&mut [u8; N]) -> Result<(), E>) -> Result<Self, E> {
        let mut secret = Self::filled(|_| {});
        fill(&mut secret).map(|()| secret)
    }

    /// A copy of bytes that stay where they are.
    pub fn copied(bytes: &[u8; N]) -> Self {
        Self::filled(|room| room.copy_from_slice(bytes))
    }

    /// The bytes, which are wiped where they were.
    pub fn moved(bytes: &mut [u8; N]) -> Self {
        let secret = Self::copied(bytes);
        bytes.zeroize();
        secret
    }
}

impl<const N: usize> Deref for Secret<N> {
    type Target = [u8; N];

    #[expect(unsafe_code, reason = "UNSAFETY: a reference into pages that are mapped for ever")]
    fn deref(&self) -> &[u8; N] {
        // SAFETY: the pool gave `N` bytes, initialized, which are this value's until it is dropped; an array
        // of bytes has no alignment to keep.
        unsafe { self.room.cast::<[u8; N]>().as_ref() }
    }
}

impl<const N: usize> DerefMut for Secret<N> {
    #[expect(unsafe_code, reason = "UNSAFETY: a reference into pages that are mapped for ever")]
    fn deref_mut(&mut self) -> &mut [u8; N] {
        // SAFETY: as in `deref`, and `&mut self` says that there is no other reference.
        unsafe { self.room.cast::<[u8; N]>().as_mut() }
    }
}

impl<const N: usize> Drop for Secret<N> {
    fn drop(&mut self) {
        self.as_mut_slice().zeroize();
        POOL.locked().give_back(self.room, N);
    }
}

impl<const N: usize> ZeroizeOnDrop for Secret<N> {}

impl<const N: usize> Clone for Secret<N> {
    fn clone(&self) -> Self {
        Self::copied(self)
    }
}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({N} bytes)")
    }
}

/// As a list of numbers, which is what an array of bytes is.
impl<const N: usize> Serialize for Secret<N> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.iter())
    }
}

impl<'de, const N: usize> Deserialize<'de> for Secret<N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(Into(PhantomData))
    }
}

/// Reads numbers straight to where they stay.
struct Into<const N: usize>(PhantomData<[u8; N]>);

impl<'de, const N: usize> Visitor<'de> for Into<N> {
    type Value = Secret<N>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{N} bytes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Secret<N>, A::Error> {
        let secret = Secret::try_filled(|room: &mut [u8; N]| {
            room.iter_mut().enumerate().try_for_each(|(at, byte)| {
                *byte = list.next_element()?.ok_or_else(|| A::Error::invalid_length(at, &self))?;
                Ok(())
            })
        })?;
        match list.next_element::<u8>()? {
            None => Ok(secret),
            Some(_) => Err(A::Error::invalid_length(N + 1, &self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says of the piece of memory that has this address: its flags.
    fn flags(at: usize) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            if let Some(flags) = line.strip_prefix("VmFlags: ") {
                if inside {
                    return flags.split(' ').map(str::to_owned).collect();
                }
            } else if let Some((from, to)) = line.split(' ').next().and_then(|w| w.split_once('-')) {
                let hex = |text| usize::from_str_radix(text, 16);
                if let (Ok(from), Ok(to)) = (hex(from), hex(to)) {
                    inside = (from..to).contains(&at);
                }
            }
        }
        panic!("{at:x} is not mapped");
    }

    #[test]
    fn a_secret_lies_on_pages_that_are_not_dumped_not_inherited_and_locked_where_that_may_be() {
        let secret = Secret::copied(b"some bytes");
        let at = secret.as_ptr().addr();
        let found = flags(at);
        for flag in ["dd", "dc"] {
            assert!(found.iter().any(|f| f == flag), "{flag} is not among {found:?}");
        }
        let locked = found.iter().any(|f| f == "lo");
        assert_eq!(locked, secret_memory() == SecretMemory::Locked, "{found:?}");
    }

    #[test]
    fn a_secret_is_wiped_where_it_was_and_where_it_came_from() {
        let mut theirs = *b"a secret that no chance turns up";
        let secret = Secret::moved(&mut theirs);
        assert_eq!(theirs, [0; 32]);
        assert_eq!(&*secret, b"a secret that no chance turns up");
        let held = POOL.locked();
        // Nobody gets the room while the pool is held: what is there after the drop is what the drop left.
        let at = secret.as_ptr().addr();
        let dropped = std::thread::spawn(move || drop(secret));
        while read(at) != [0; 32] {
            std::thread::yield_now();
        }
        drop(held);
        dropped.join().unwrap();
    }

    /// What this process's memory holds at an address, without a reference to it.
    fn read(at: usize) -> [u8; 32] {
        use std::os::unix::fs::FileExt as _;
        let mut bytes = [0; 32];
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        memory.read_exact_at(&mut bytes, at as u64).unwrap();
        bytes
    }

    #[test]
    fn secrets_never_share_a_place_and_places_are_used_again() {
        let before = POOL.locked().chunks.len();
        for round in 0..4u8 {
            let many: Vec<Secret<100>> = (0..200).map(|i| Secret::copied(&[i ^ round; 100])).collect();
            for (secret, i) in many.iter().zip(0..) {
                assert_eq!(**secret, [i ^ round; 100]);
            }
        }
        // 200 of two units each; others' tests may hold a few meanwhile.
        let needed = (200 * 2usize).div_ceil(UNITS);
        assert!(POOL.locked().chunks.len() <= before + needed + 1);
    }

    #[test]
    fn a_secret_shows_nothing_and_reads_what_it_wrote() {
        let secret = Secret::copied(&[7; 4]);
        assert_eq!(format!("{secret:?}"), "Secret(4 bytes)");
        let text = serde_json::to_string(&secret).unwrap();
        assert_eq!(text, serde_json::to_string(&[7; 4]).unwrap());
        assert_eq!(*serde_json::from_str::<Secret<4>>(&text).unwrap(), [7; 4]);
        for bad in ["[7,7,7]", "[7,7,7,7,7]", "[7,7,7,256]", "\"7777\"", "[7,7,7,-1]"] {
            assert!(serde_json::from_str::<Secret<4>>(bad).is_err(), "{bad}");
        }
    }
}
