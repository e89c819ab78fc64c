//! Digests of every page of RAM: a path that does not go through the helper, for comparing the ends of a
//! migration.

use ring::digest;

use super::{GuestRam, Mapping};
use crate::addr::RamPage;
use crate::threads::{self, Role};

/// SHA-256 of every page that moves with the guest, the first 16 bytes, in order of blocks and pages. Several
/// threads: the guest is paused, and nothing else has work on the usual small host.
///
/// `read` gives the page at an offset of a mapping: plain host memory ([`Mapping::read`]), or what a guest
/// sees there.
pub fn page_digests(
    ram: &GuestRam,
    read: impl Fn(RamPage, &Mapping, u64, &mut [u8; 4096]) + Sync,
) -> Vec<[u8; 16]> {
    let layout = ram.layout();
    let spans: Vec<_> =
        layout.ram().filter_map(|b| Some((ram.mapping(b)?, b.ram_addr.page(), b.size))).collect();
    let total: usize = spans.iter().map(|(_, _, size)| (size / 4096) as usize).sum();
    let mut digests = vec![[0; 16]; total];
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().min(8));
    let mut rest = digests.as_mut_slice();
    let read = &read;
    std::thread::scope(|scope| {
        for (mapping, first, size) in spans {
            let pages = (size / 4096) as usize;
            let (mine, others) = rest.split_at_mut(pages);
            rest = others;
            let chunk = pages.div_ceil(threads).max(1);
            for (i, part) in mine.chunks_mut(chunk).enumerate() {
                scope.spawn(move || {
                    threads::begin(Role::Pages);
                    let mut page = [0; 4096];
                    for (j, out) in part.iter_mut().enumerate() {
                        let index = (i * chunk + j) as u64;
                        read(RamPage::new(first.get() + index), mapping, index * 4096, &mut page);
                        let d = digest::digest(&digest::SHA256, &page);
                        out.copy_from_slice(&d.as_ref()[..16]);
                    }
                });
            }
        }
    });
    digests
}
