//! A network between two hosts that breaks where a test says: in one connection, one way, after so many TLS
//! records and bytes.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From who connected.
    Up,
    /// To who connected.
    Down,
}

/// What happens at a break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Every connection is cut and none is taken until [`Proxy::mend`].
    Cut,
    /// This way ends with an orderly end of TCP (no TLS goodbye); the rest is as with `Cut` once it is
    /// noticed.
    Truncate,
    /// Nothing goes this way any more until [`Proxy::mend`]; connections stay.
    Stall,
    /// One bit of the next byte arrives changed; everything else as it was sent.
    Flip,
}

/// Where the network breaks, once.
#[derive(Clone, Copy, Debug)]
pub struct Break {
    /// Which connection, counted from 0 since the break was set. 0 is a migration's control link.
    pub connection: usize,
    /// Which way.
    pub way: Way,
    /// TLS records that still pass whole.
    pub records: u64,
    /// Bytes of the next record that still pass.
    pub bytes: u64,
    /// What happens.
    pub act: Act,
}

/// What one connection carried: whole TLS records each way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From who connected.
    pub up: u64,
    /// To who connected.
    pub down: u64,
}

#[derive(Default)]
struct State {
    plan: Option<Break>,
    /// A break happened.
    broken: bool,
    down: bool,
    /// Connections so far.
    made: usize,
    /// How many of them there were when the count began anew; the others have no part in what is counted.
    before: usize,
    traffic: Vec<Traffic>,
    /// Ways of each connection that have come to their end.
    ended: Vec<u8>,
    /// Bytes that went up each connection, up to [`KEPT`] of each; `None`: nobody wants them.
    kept: Option<Vec<Vec<u8>>>,
    sockets: Vec<TcpStream>,
}

impl State {
    fn count_anew(&mut self) {
        self.before = self.made;
        self.traffic.clear();
        self.ended.clear();
    }

    /// The number of a connection among those that are counted.
    const fn counted(&self, connection: usize) -> Option<usize> {
        connection.checked_sub(self.before)
    }
}

/// Bytes of a connection that are kept for who listens.
const KEPT: usize = 4 << 20;

struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
}

/// The proxy; ends with its value.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// A proxy in front of `target`, on a port of its own.
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: target.parse().unwrap(),
            state: Mutex::default(),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        let acceptor = std::thread::spawn(move || accept(&listener, &theirs));
        Self { address, shared, acceptor: Some(acceptor) }
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Sets a break for the connections to come.
    pub fn arm(&self, plan: Break) {
        let mut state = self.shared.lock();
        state.plan = Some(plan);
        state.broken = false;
        state.count_anew();
    }

    /// Starts to count connections and records anew, without a break.
    pub fn watch(&self) {
        self.mend();
        let mut state = self.shared.lock();
        state.count_anew();
    }

    /// Listens: from now on the bytes that go up new connections are kept.
    pub fn listen(&self) {
        self.watch();
        self.shared.lock().kept = Some(Vec::new());
    }

    /// What went up each connection since [`Proxy::listen`], the first few MiB of each.
    pub fn heard(&self) -> Vec<Vec<u8>> {
        self.shared.lock().kept.take().unwrap_or_default()
    }

    /// Ends every break: stalled bytes go on, connections are taken again.
    pub fn mend(&self) {
        let mut state = self.shared.lock();
        state.plan = None;
        state.down = false;
        self.shared.changed.notify_all();
    }

    /// Takes no connections and cuts those there are, until [`Proxy::mend`].
    pub fn cut(&self) {
        self.shared.cut(&mut self.shared.lock());
    }

    /// Whether the break happened.
    pub fn is_broken(&self) -> bool {
        self.shared.lock().broken
    }

    /// Waits for the break, and returns at once when it happens.
    ///
    /// # Panics
    /// When it does not happen within `seconds`.
    pub fn wait_broken(&self, seconds: u64) {
        let state = self.shared.lock();
        let limit = Duration::from_secs(seconds);
        let waited = self.shared.changed.wait_timeout_while(state, limit, |s| !s.broken);
        assert!(waited.unwrap_or_else(PoisonError::into_inner).0.broken, "nothing was broken in {seconds} s");
    }

    /// Waits for the end of a connection, counted from 0 since the last `arm` or `watch`, and gives all that
    /// it carried, the goodbyes among it.
    ///
    /// # Panics
    /// When it does not end within `seconds`.
    pub fn wait_ended(&self, connection: usize, seconds: u64) -> Traffic {
        let over = |state: &State| state.ended.get(connection).is_some_and(|ways| *ways == 2);
        let state = self.shared.lock();
        let limit = Duration::from_secs(seconds);
        let waited = self.shared.changed.wait_timeout_while(state, limit, |s| !over(s));
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        assert!(over(&state), "connection {connection} did not end in {seconds} s");
        state.traffic[connection]
    }

    /// What connections carried since the last `arm` or `watch`.
    pub fn traffic(&self) -> Vec<Traffic> {
        self.shared.lock().traffic.clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.cut();
        self.shared.changed.notify_all();
        // Wakes the acceptor.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self, state: &mut State) {
        state.down = true;
        for socket in state.sockets.drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept() else { return };
        if shared.ended.load(Ordering::SeqCst) {
            return;
        }
        let mut state = shared.lock();
        if state.down {
            continue;
        }
        let Ok(server) = TcpStream::connect_timeout(&shared.target, Duration::from_secs(5)) else { continue };
        let _ = client.set_nodelay(true);
        let _ = server.set_nodelay(true);
        let index = state.made;
        state.made += 1;
        state.traffic.push(Traffic::default());
        state.ended.push(0);
        let pairs = [(&client, &server, Way::Up), (&server, &client, Way::Down)];
        for (from, to, way) in pairs {
            let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { continue };
            let shared = Arc::clone(shared);
            std::thread::spawn(move || {
                carry(from, to, way, index, &shared);
                let mut state = shared.lock();
                let counted = state.counted(index);
                if let Some(ways) = counted.and_then(|i| state.ended.get_mut(i)) {
                    *ways += 1;
                }
                drop(state);
                shared.changed.notify_all();
            });
        }
        state.sockets.push(client);
        state.sockets.push(server);
    }
}

/// Where in the stream of TLS records (type, version, length) the next byte is.
#[derive(Default)]
struct Records {
    whole: u64,
    header: Vec<u8>,
    left: usize,
    /// Bytes of the record that is not whole yet.
    part: u64,
}

impl Records {
    /// Takes one byte.
    fn push(&mut self, byte: u8) {
        self.part += 1;
        if self.left > 0 {
            self.left -= 1;
        } else {
            self.header.push(byte);
            if self.header.len() < 5 {
                return;
            }
            self.left = usize::from(u16::from_be_bytes([self.header[3], self.header[4]]));
            self.header.clear();
        }
        if self.left == 0 {
            self.whole += 1;
            self.part = 0;
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, way: Way, index: usize, shared: &Shared) {
    let mut seen = Records::default();
    let mut buffer = [0; 16 << 10];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        let mut done = 0;
        while done < n {
            let plan = {
                let state = shared.lock();
                state.plan.filter(|p| state.counted(index) == Some(p.connection) && p.way == way)
            };
            let start = done;
            let mut reached = false;
            while done < n {
                if plan.is_some_and(|p| {
                    seen.whole > p.records || (seen.whole == p.records && seen.part >= p.bytes)
                }) {
                    reached = true;
                    break;
                }
                seen.push(buffer[done]);
                done += 1;
            }
            if way == Way::Up {
                let mut state = shared.lock();
                let counted = state.counted(index);
                if let (Some(kept), Some(index)) = (&mut state.kept, counted) {
                    kept.resize_with(kept.len().max(index + 1), Vec::new);
                    let room = KEPT.saturating_sub(kept[index].len()).min(done - start);
                    kept[index].extend_from_slice(&buffer[start..start + room]);
                }
            }
            if to.write_all(&buffer[start..done]).is_err() {
                let _ = from.shutdown(Shutdown::Both);
                return;
            }
            {
                let mut state = shared.lock();
                let counted = state.counted(index);
                if let Some(t) = counted.and_then(|i| state.traffic.get_mut(i)) {
                    *(if way == Way::Up { &mut t.up } else { &mut t.down }) = seen.whole;
                }
            }
            if reached && plan.is_some_and(|p| p.act == Act::Flip) {
                let mut state = shared.lock();
                state.plan = None;
                state.broken = true;
                shared.changed.notify_all();
                buffer[done] ^= 0x10;
                continue;
            }
            if reached
                && let Some(plan) = plan
                && !break_here(plan, &to, shared)
            {
                return;
            }
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Breaks the network; true when it was mended and bytes may go on.
fn break_here(plan: Break, to: &TcpStream, shared: &Shared) -> bool {
    let mut state = shared.lock();
    if state.plan.is_none() {
        return true;
    }
    state.broken = true;
    shared.changed.notify_all();
    match plan.act {
        Act::Flip => true,
        Act::Cut => {
            state.plan = None;
            shared.cut(&mut state);
            false
        }
        Act::Truncate => {
            state.plan = None;
            state.down = true;
            let _ = to.shutdown(Shutdown::Write);
            false
        }
        Act::Stall => {
            while state.plan.is_some() && !state.down {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            !state.down
        }
    }
}
