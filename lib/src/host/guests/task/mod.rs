//! The task that owns a guest: its machine, its mirrors, its record. Everybody else sends it messages.
//!
//! Blocking work (making machines and mirrors) runs on this task through `block_in_place`: while it does,
//! messages wait, and the published record says what goes on.

mod audits;
mod batches;
mod lease;
mod life;
mod mirrors;
mod publish;

use std::collections::HashMap;
use std::sync::Arc;

use flume::Receiver;
use tokio::time::{Interval, MissedTickBehavior};
use uuid::Uuid;

use crate::host::act::Act;
use crate::host::guests::command::{Command, Envelope};
use crate::host::guests::decide::Standing;
use crate::host::guests::entry::GuestEntry;
use crate::host::inner::Inner;
use crate::host::mirrors::batches::BatchSession;
use crate::host::{Ask, GuestRecord, GuestState, HostError, NotRun, ResourceKind};

use crate::guest::lifecycle::Event;
use crate::guest::{EndWatch, Machine, MachineEnd, Readiness};
use crate::mirror::Mirror;

/// Messages that wait at most; more make senders wait.
const QUEUE: usize = 32;

/// The owner's state.
struct Owner {
    inner: Arc<Inner>,
    entry: Arc<GuestEntry>,
    state: GuestState,
    machine: Option<Box<dyn Machine>>,
    mirrors: HashMap<Uuid, Mirror>,
    /// Exports and imports under way, by mirror.
    batches: HashMap<Uuid, BatchSession>,
    /// The migration that has the guest: by its claim from the queue on, then by the lease, to its end.
    lent: Option<Uuid>,
    /// While a migration has the machine: whether the guest has ended.
    away: Option<(Uuid, EndWatch)>,
    /// The audit that has its mirror.
    audit: Option<audits::Auditing>,
    /// Whether its labels have gone to the destination.
    labels_sent: bool,
    /// The guest's readiness as of the last generation.
    shown: Option<Readiness>,
}

/// Starts the task of a guest in `state`.
pub(in crate::host) fn spawn(inner: &Arc<Inner>, record: GuestRecord, state: GuestState) -> Arc<GuestEntry> {
    // A channel of tokio's has room for 32 messages from the beginning, which is a fifth of what a guest
    // takes.
    let (sender, receiver) = flume::bounded(QUEUE);
    let entry = Arc::new(GuestEntry::new(record, sender));
    // By reference: a task keeps what it is called with beside what it works with.
    let owner = Box::new(Owner {
        inner: Arc::clone(inner),
        entry: Arc::clone(&entry),
        state,
        machine: None,
        mirrors: HashMap::new(),
        batches: HashMap::new(),
        lent: None,
        away: None,
        audit: None,
        labels_sent: false,
        shown: None,
    });
    inner.runtime.spawn(owner.run(receiver));
    entry
}

impl Drop for Owner {
    /// However it ends: nobody waits for what it will not do.
    fn drop(&mut self) {
        self.entry.close();
    }
}

/// Returns at once the first time, then a quarter of a second after it did last.
async fn tick(poll: &mut Option<Box<Interval>>) {
    let poll = poll.get_or_insert_with(|| {
        let mut poll = tokio::time::interval(std::time::Duration::from_millis(250));
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Box::new(poll)
    });
    poll.tick().await;
}

impl Owner {
    async fn run(mut self: Box<Self>, commands: Receiver<Envelope>) {
        // Most of many guests have no machine, and need no clock.
        let mut poll = None;
        loop {
            let watching =
                (self.machine.is_some() && self.state != GuestState::Failed) || self.away.is_some();
            if !watching {
                poll = None;
            }
            let command = tokio::select! {
                command = commands.recv_async() => command,
                () = tick(&mut poll), if watching => {
                    self.look_after_machine();
                    continue;
                }
            };
            let Ok(envelope) = command else { return };
            let (command, act) = *envelope;
            if tokio::task::block_in_place(|| Act::sync_scope(act, || self.handle(command))) {
                return;
            }
        }
    }

    /// Machines in other processes do not call back when they end.
    fn look_after_machine(&mut self) {
        if let Some(end) = self.machine.as_ref().and_then(|m| m.ended()) {
            tokio::task::block_in_place(|| self.ended(end));
        } else if self.machine.is_some() {
            tokio::task::block_in_place(|| self.hear_news());
        } else if let Some(end) = self.away.as_ref().and_then(|(_, watch)| watch.look()) {
            self.ended_away(&end);
        }
    }

    /// The guest ended while a migration has its machine: there is nothing more to move.
    fn ended_away(&mut self, end: &MachineEnd) {
        let Some((migration, _)) = self.away.take() else { return };
        tracing::info!(guest = %self.entry.id, %migration, %end, "a guest ended while it was being migrated");
        if let Some(entry) = self.inner.migration_entry(migration) {
            entry.control.guest_ended(end);
        }
    }

    /// Does one thing; true when the task is over.
    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Act(action, ask, reply) => self.act(action, &ask, reply),
            Command::Undefine(ask, reply) => return self.undefine(&ask, reply),
            Command::Relabel { change, ask, reply } => {
                let _ = reply.send(self.relabel(change, &ask));
            }
            Command::HoldLabels { migration, reply } => {
                self.labels_sent = self.lent == Some(migration);
                let _ = reply.send(Ok(self.entry.record().spec.labels));
            }
            Command::AdoptLabels(labels, reply) => {
                let _ = reply.send(self.store(self.state, |r| r.spec.labels = labels).map(|_| ()));
            }
            Command::CreateMirror(spec, ask, reply) => {
                let _ = reply.send(self.ask_for_mirror(&spec, &ask));
            }
            Command::DeleteMirror(id, ask, reply) => {
                let _ = reply.send(self.delete_mirror(id, &ask));
            }
            Command::Touch => {
                if self.entry.readiness() != self.shown {
                    self.publish(|_| {});
                }
            }
            Command::AddBlock(block, ask, reply) => {
                let _ = reply.send(self.add_block(block, &ask));
            }
            Command::Replug { block, gpa, ask, reply } => {
                let _ = reply.send(self.replug(&block, gpa, &ask));
            }
            Command::Export { mirror, spec, pages, ask, reply } => {
                self.end_audit(NotRun::MirrorNeeded);
                let _ = reply.send(self.export(mirror, &spec, &pages, &ask));
            }
            Command::Import { mirror, step, ask, reply } => {
                self.end_audit(NotRun::MirrorNeeded);
                let _ = reply.send(self.import(mirror, step, &ask));
            }
            Command::Claim { migration, choice, streams, dry_run, reply } => {
                let _ = reply.send(self.claim(migration, &choice, streams, dry_run));
            }
            Command::Release { migration, done } => {
                self.release(migration);
                let _ = done.send(());
            }
            Command::Lend { migration, choice, template, streams, reply } => {
                let lease = self.lend(migration, &choice, template, streams);
                if let Err(Ok(lease)) = reply.send(lease) {
                    self.take_back(lease.machine, lease.mirror, lease.mirror_id, !lease.transient);
                    self.publish(|r| r.migration = None);
                }
            }
            Command::Held => self.held(Event::HoldForHandOver, GuestState::Paused),
            Command::RunsOn => self.held(Event::Resume, GuestState::Running),
            Command::StartSent(with, reply) => {
                let _ = reply.send(self.start_sent(&with));
            }
            Command::HandedOver { peer, delete, with, reply } => {
                return self.handed_over(Some(peer), delete, &with, reply);
            }
            Command::Watch(migration, watch) => self.away = Some((migration, watch)),
            Command::Commit { paused, with, reply } => {
                let _ = reply.send(self.commit(paused, &with));
            }
            Command::InDoubt(reply) => {
                self.step(Event::HoldForHandOver);
                self.step(Event::StartSent);
                self.publish(|_| {});
                let _ = reply.send(Ok(()));
            }
            Command::GiveBack(back) => self.give_back(*back),
            Command::Ended(end) => self.ended(end),
            Command::Audited { migration, audit } => self.audited(migration, audit),
            Command::Arrived { machine, paused, fault, mirror, audit, done } => {
                if let Some(held) = audit {
                    self.hold_audit(held);
                }
                if let Some(mirror) = mirror {
                    self.keep_mirror(*mirror);
                }
                self.arrived(machine, paused, fault);
                let _ = done.send(());
            }
            Command::Settled { peer, delete, with, reply } => {
                return self.handed_over(peer, delete, &with, reply);
            }
            Command::Confirmed { moved_to, done } => {
                // Somebody may have been faster.
                if self.entry.record().unconfirmed {
                    let stored = self.store(self.state, |r| {
                        r.unconfirmed = false;
                        r.moved_to = moved_to;
                    });
                    if let Err(error) = stored {
                        tracing::error!(error = %crate::chain::chain(&error), guest = %self.entry.id,
                            "a guest stays unconfirmed: its record is not stored");
                    }
                }
                let _ = done.send(());
            }
            Command::Vanish(vanish) => return self.vanish(*vanish),
            Command::Shutdown(done) => {
                self.drop_body();
                let _ = done.send(());
                return true;
            }
        }
        false
    }

    fn check(&self, ask: &Ask) -> Result<(), HostError> {
        ask.check(ResourceKind::Guest, self.entry.record().generation)
    }

    const fn standing<'a>(&self, record: &'a GuestRecord) -> Standing<'a> {
        Standing { record, state: self.state, lent: self.lent }
    }
}
