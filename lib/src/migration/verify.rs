//! Digests of every page of RAM at the pause point, by plain reads of host memory: a path that does not go through
//! the helper.

use ring::digest;

use crate::memory::GuestRam;

/// SHA-256 of every page of guest RAM, the first 16 bytes, in order of blocks and pages, the helper's block left out.
/// Two threads: the guest is paused, and nothing else has work on the usual small host.
pub fn page_digests(ram: &GuestRam) -> Vec<[u8; 16]> {
    let spans: Vec<_> = ram.layout().ram().filter_map(|b| Some((ram.mapping(b)?, b.size))).collect();
    let total: usize = spans.iter().map(|(_, size)| (size / 4096) as usize).sum();
    let mut digests = vec![[0; 16]; total];
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().min(8));
    let mut rest = digests.as_mut_slice();
    std::thread::scope(|scope| {
        for (mapping, size) in spans {
            let pages = (size / 4096) as usize;
            let (mine, others) = rest.split_at_mut(pages);
            rest = others;
            let chunk = pages.div_ceil(threads).max(1);
            for (i, part) in mine.chunks_mut(chunk).enumerate() {
                scope.spawn(move || {
                    let mut page = [0; 4096];
                    for (j, out) in part.iter_mut().enumerate() {
                        mapping.read((i * chunk + j) as u64 * 4096, &mut page);
                        let d = digest::digest(&digest::SHA256, &page);
                        out.copy_from_slice(&d.as_ref()[..16]);
                    }
                });
            }
        }
    });
    digests
}
