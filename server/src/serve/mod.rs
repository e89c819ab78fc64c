//! The daemon's life: open the sockets and the host, say `ready`, serve, drain, end.
//!
//! Owns: the order of these. Must not know: routes.

mod accept;
mod core_dumps;
mod descriptors;
mod listen;
mod shares;
mod tls;
mod unix;
mod wire;

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use mirrorvm::codes::Capability;
use mirrorvm::guest::Drivers;
use mirrorvm::guest::drivers::BadDriverName;
use mirrorvm::host::{Host, HostConfig, OpenError};
use mirrorvm::transport::{Advertised, Unconnectable};
use rustix::fs::{Mode, OFlags};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use listen::Listener;
pub use listen::{Listen, ListenError, Place, resolve_peer};
pub use tls::{TlsError, TlsFiles};
pub use unix::SocketError;

use crate::access::admin_token::{self, AdminTokenError};
use crate::config::Config;
use crate::confine::{Confinement, LauncherError};
use crate::http::quiet;
use crate::routes;
use crate::state::AppState;

/// Name of the Unix socket in the state directory.
pub const SOCKET: &str = "mirrorvmd.sock";

/// How long changes may take to finish when the daemon is told to end.
const ACTS_DEADLINE: Duration = Duration::from_secs(60);

/// What to serve, where, and from which state directory.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the database, the keys and the sockets.
    pub state_dir: PathBuf,
    /// Where the API is served, besides the Unix socket in the state directory.
    pub listen: Vec<Listen>,
    /// Whether it is served on that socket.
    pub default_socket: bool,
    /// The address on which peers connect.
    pub peer_listen: Option<SocketAddr>,
    /// The address that peers are told to connect to.
    pub advertise: Option<Advertised>,
    /// The directories that files named by definitions may come from.
    pub image_directories: Vec<PathBuf>,
    /// The directories whose files are guests' to write.
    pub volume_directories: Vec<PathBuf>,
    /// What runs guests.
    pub drivers: Drivers,
    /// Where health and counters are served alone, to everybody who can connect.
    pub metrics_listen: Vec<Listen>,
    /// Name of the host.
    pub name: Option<String>,
    /// Files of the API over TLS.
    pub tls: Option<TlsFiles>,
    /// The part of the configuration that handlers and middleware need.
    pub config: Config,
    /// Whether the daemon ends when stdin does, as it does on SIGTERM.
    pub exit_with_stdin: bool,
    /// What the daemon is confined by.
    pub confinement: Confinement,
}

/// Why the daemon could not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No state directory was given, and there is no default one.
    #[error("no state directory: give --state-dir, or set HOME")]
    NoStateDir,
    /// The state directory cannot be made.
    #[error("cannot make the state directory {}", path.display())]
    StateDir {
        /// Path of the directory.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The state directory is a symbolic link.
    #[error(
        "the state directory {} is a symbolic link to {}: give the directory itself, so that its keys and database stay with \
         its name; only links above it are followed, which whoever may change them could do without",
        path.display(), target.display()
    )]
    StateDirLink {
        /// Path as it was given.
        path: PathBuf,
        /// Where the link leads.
        target: PathBuf,
    },
    /// Core dumps cannot be turned off.
    #[error("cannot turn core dumps off")]
    CoreDumps(#[source] io::Error),
    /// The async runtime does not start.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// A place that was given is none to serve at.
    #[error("cannot listen as {key} says")]
    Place {
        /// Key of the configuration.
        key: &'static str,
        /// What is wrong with it.
        #[source]
        source: ListenError,
    },
    /// A Unix socket cannot be served.
    #[error("cannot serve unix:{}", path.display())]
    Unix {
        /// Path of the socket.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: SocketError,
    },
    /// Nobody could connect to a TCP address.
    #[error("cannot listen on {address}: it {why}")]
    Address {
        /// Address as it was given.
        address: SocketAddr,
        /// Why nobody could connect to it.
        why: Unconnectable,
    },
    /// A TCP address cannot be served.
    #[error("cannot serve tcp:{address}")]
    Tcp {
        /// Address as it was given.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// TLS cannot be served.
    #[error("cannot serve tls:{address}")]
    Tls {
        /// Address as it was given.
        address: SocketAddr,
        /// What went wrong.
        #[source]
        source: TlsError,
    },
    /// The service manager's sockets cannot be served.
    #[error("cannot serve the sockets of the service manager")]
    Passed(#[source] io::Error),
    /// The program was built with drivers that cannot be told apart.
    #[error("the drivers of this program cannot be used")]
    Drivers(#[from] BadDriverName),
    /// There is nobody to start QEMUs.
    #[error(transparent)]
    Launcher(#[from] LauncherError),
    /// The host does not open.
    #[error("cannot open the host")]
    Host(#[from] OpenError),
    /// Nobody could get in over TCP.
    #[error("cannot write the admin token")]
    AdminToken(#[from] AdminTokenError),
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// The line `ready` cannot be written.
    #[error("cannot write to stdout")]
    Stdout(#[source] io::Error),
}

/// What has to happen before the daemon gives anything up, or starts a process or a thread: they have it from
/// it.
///
/// # Errors
/// [`ServeError::CoreDumps`], [`ServeError::StateDir`], [`ServeError::StateDirLink`].
pub fn prepare(state_dir: &Path) -> Result<(), ServeError> {
    core_dumps::disable().map_err(ServeError::CoreDumps)?;
    descriptors::lift();
    make_state_dir(state_dir)
}

/// Serves until SIGTERM or SIGINT, or until stdin ends if the options say so.
///
/// # Errors
/// [`ServeError`] says why it could not serve.
pub async fn run(options: Options) -> Result<(), ServeError> {
    // First of all: a signal that comes early must end the daemon in order, too.
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
    // Caught, a file that may not grow (RLIMIT_FSIZE) is an error of the write, and not the end of the
    // daemon.
    let _too_large =
        signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw())).map_err(ServeError::Signals)?;
    let mut parent_gone = pin!(end_of_stdin(options.exit_with_stdin));
    let files = descriptors::limit();
    let (close, closing) = watch::channel(false);
    let (router, state) =
        routes::service_with(options.drivers.clone(), options.config.clone(), closing.clone());
    state.set_confinement(options.confinement);

    let mut listeners = Vec::new();
    let mut opened = Vec::new();
    for place in options.listen.iter().cloned() {
        opened.extend(listen::open(place, options.tls.as_ref()).await?);
    }
    // There unless somebody says otherwise: it is where `mirrorvmd open` asks.
    let socket = options.state_dir.join(SOCKET);
    if options.default_socket && !opened.iter().any(|l| l.is_at(&socket)) {
        opened.extend(listen::open(Listen::Unix(socket), None).await?);
    }
    let addresses: Vec<String> = opened.iter().map(Listener::address).collect();
    state.credentials().set_origins(opened.iter().filter_map(Listener::origin).collect());
    let over_network = opened.iter().any(Listener::is_network);
    listeners.extend(opened.into_iter().map(|l| (l, router.clone())));
    let mut watched = Vec::new();
    for place in &options.metrics_listen {
        for listener in listen::open(place.clone(), None).await? {
            watched.push(format!("metrics:{}", listener.address()));
            listeners.push((listener, routes::monitoring(&state)));
        }
    }
    let addresses: Vec<String> = addresses.into_iter().chain(watched).collect();
    let wanted = options.config.limits.connections;
    let places = descriptors::places(wanted, listeners.len(), files);
    if places < wanted as usize {
        tracing::warn!(
            wanted,
            places,
            files,
            "the limit of open files leaves fewer connections to a listener"
        );
    }
    let mut loops = JoinSet::new();
    loops.spawn(sum_up_the_log(closing.clone()));
    for (listener, router) in listeners {
        let service = accept::Service {
            router,
            limits: options.config.limits,
            places,
            state: Some(state.clone()),
            closing: closing.clone(),
        };
        loops.spawn(accept::run(listener, service));
    }

    // Requests are answered already, `not_ready` where they need the host.
    let config = HostConfig {
        state_dir: options.state_dir,
        name: options.name,
        peer_listen: options.peer_listen,
        advertise: options.advertise,
        events_kept: Some(options.config.limits.events_kept),
        image_directories: options.image_directories,
        volume_directories: options.volume_directories,
        drivers: options.drivers,
        memory_reserve: Some(options.config.limits.memory_reserve_mib).filter(|n| *n > 0).map(|n| n << 20),
    };
    let opened = tokio::select! {
        opened = Host::open(config) => Some(opened),
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        () = &mut parent_gone => None,
    };
    let result = match opened {
        Some(Ok(host)) => {
            // Before anybody is let in: an earlier run's token is not there any more when requests are
            // answered.
            let said = give_admin_token(&state, &host, over_network).and_then(|()| {
                state.set_host(host.clone());
                say_ready(&addresses, &host).map_err(ServeError::Stdout)
            });
            if said.is_ok() {
                tell_manager(&[NotifyState::Ready]);
                let missing = host.capabilities().missing;
                if let Some(lack) = missing.iter().find(|m| m.what == Capability::Kvm) {
                    tracing::warn!(why = lack.why, fix = lack.fix, "guests that need KVM cannot run here");
                }
                // What the routes said of themselves, and what opening the state took.
                mirrorvm::memory::give_back_heap();
                tokio::select! {
                    _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
                    _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
                    () = &mut parent_gone => tracing::info!("stdin has ended: draining"),
                }
            }
            tell_manager(&[NotifyState::Stopping]);
            let _ = close.send(true);
            while loops.join_next().await.is_some() {}
            admin_token::remove(&host);
            // A caller that is gone has not called its change off.
            if tokio::time::timeout(ACTS_DEADLINE, state.acts().over()).await.is_err() {
                tracing::warn!("changes still go on at the end");
            }
            host.shutdown().await;
            said
        }
        Some(Err(error)) => Err(error.into()),
        None => Ok(()),
    };
    let _ = close.send(true);
    while loops.join_next().await.is_some() {}
    result
}

/// Logs how many lines were left out of the log, from time to time and at the end.
async fn sum_up_the_log(mut closing: watch::Receiver<bool>) {
    loop {
        let ended = tokio::time::timeout(quiet::SUM_UP, closing.wait_for(|closing| *closing)).await.is_ok();
        quiet::sum_up();
        if ended {
            return;
        }
    }
}

/// Tells the service manager, where there is one (sd_notify(3)).
fn tell_manager(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

/// Returns when stdin ends, and never when that is not wanted. It reads on a thread of its own that no
/// runtime waits for, because a read of stdin cannot be cancelled.
async fn end_of_stdin(wanted: bool) {
    if !wanted {
        return std::future::pending().await;
    }
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        // An error ends it, too: there is nobody left to read from.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        let _ = ended.send(());
    });
    let _ = end.await;
}

/// Writes the admin token if the API is served where it is needed.
fn give_admin_token(state: &AppState, host: &Host, over_network: bool) -> Result<(), ServeError> {
    if over_network {
        return Ok(state.credentials().admin().write(host)?);
    }
    admin_token::remove(host);
    Ok(())
}

fn make_state_dir(path: &Path) -> Result<(), ServeError> {
    // Also one that leads nowhere yet: nothing is made through it. A slash at the end would follow it.
    let bare: PathBuf = path.components().collect();
    if let Ok(target) = std::fs::read_link(&bare) {
        return Err(ServeError::StateDirLink { path: bare, target });
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        // A link is refused here already: the sockets are made before the host checks the directory for good,
        // and whoever put the link there must not have them made elsewhere.
        .and_then(|()| {
            Ok(rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?)
        })
        .map(drop)
        .map_err(|source| ServeError::StateDir { path: path.to_owned(), source })
}

fn say_ready(addresses: &[String], host: &Host) -> io::Result<()> {
    let info = host.info();
    let mut line = format!("ready {}", addresses.join(" "));
    if let Some(peer) = info.peer_listen {
        line.push_str(&format!(" peer:{peer}"));
    }
    line.push_str(&format!(" identity:{}\n", info.identity));
    let mut stdout = io::stdout().lock();
    stdout.write_all(line.as_bytes())?;
    stdout.flush()
}
