//! Waiting with a thread: for the disk, or for a lock whose holder waits for the disk.
//!
//! Owns: that whoever waits so on one of the runtime's own threads does not keep other tasks waiting with it.
//! Must not know: what is waited for.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs `wait`, which may take as long as a disk does. Other tasks of this thread go on elsewhere meanwhile.
pub(crate) fn with_thread<T>(wait: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
        // No runtime's thread, or a runtime with one thread, which has no other place to go on.
        _ => wait(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn the_one_thread_of_a_runtime_goes_on_while_somebody_waits_on_it() {
        let (told, heard) = sync_channel(1);
        let waiter = tokio::spawn(async move { with_thread(|| heard.recv()) });
        // Whoever would keep the thread would wait for ever: the other task has no other.
        tokio::spawn(async move { told.send(7) }).await.unwrap().unwrap();
        assert_eq!(waiter.await.unwrap(), Ok(7));
    }

    #[test]
    fn without_a_runtime_a_thread_just_waits() {
        assert_eq!(with_thread(|| 7), 7);
    }
}
