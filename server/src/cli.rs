//! The command line.

use std::error::Error;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use mirrorvm::chain::chain;
use mirrorvm::qemu::{QemuUsers, Starter};
use mirrorvm::transport::{Advertised, ListenAt};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::api::version;
use crate::bench::{self, BenchArgs};
use crate::config::file::{self, ConfigError};
use crate::config::sources::{self, Arguments, Given, Resolved, Setting};
use crate::confine::{self, Confine, Confinement, LauncherArgs, Needs};
use crate::daemon::Daemon;
use crate::demo::{self, DemoArgs};
use crate::offline;
use crate::open::{self, OpenArgs};
use crate::openapi::Document;
use crate::out::out;
use crate::pair::{self, PairArgs};
use crate::selftest::{self, SelftestCommand};
use crate::serve::{self, Listen, Options, Place, ServeError};

/// The program's name.
const NAME: &str = "mirrorvmd";

/// Manages the guests of one host, their mirror VMs and live migrations, over a REST API.
#[derive(Debug, Parser)]
#[command(name = NAME, version = version::line(), about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API; prints one line `ready ...` when requests are accepted. SIGTERM drains and ends.
    Serve(ServeArgs),
    /// Print a one-time link that opens a session in a browser, good for 60 seconds. The session has your
    /// role at the daemon and ends after an hour in which it was not used, after 12 hours, and with the
    /// daemon.
    Open(OpenArgs),
    /// Migrate a guest between two daemons on this machine, and check what arrived.
    #[command(long_about = demo::LONG_ABOUT)]
    Demo(DemoArgs),
    /// Keys of this host for the peer link.
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// The state directory's files: whether they are whole, copies of them, and the ways on when they are
    /// not.
    #[command(subcommand)]
    State(StateCommand),
    /// Measure what the parts that matter cost.
    Bench(BenchArgs),
    /// Try what this host's hardware is said to do, on guests of the test's own.
    #[command(subcommand)]
    Selftest(SelftestCommand),
    /// Print what the daemon would go by, and where each value comes from: flag, environment, file or
    /// default. A default is shown as it would be used, `none` where there is nothing.
    Config {
        /// As JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        serve: ServeArgs,
    },
    /// Print the completions of a shell: `mirrorvmd completions bash > /etc/bash_completion.d/mirrorvmd`.
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Print the manual page, or write one for each command to a directory: `mirrorvmd man | man -l -`.
    Man {
        /// Directory for the pages, which must be there.
        dir: Option<PathBuf>,
    },
    /// Start QEMUs for the daemon at the other end of standard input.
    #[command(hide = true)]
    QemuLauncher(LauncherArgs),
    /// Print the OpenAPI document.
    Openapi {
        /// Version of OpenAPI.
        #[arg(long, value_enum, default_value = "3.1")]
        version: OpenApiVersion,
    },
}

#[derive(Debug, Subcommand)]
enum StateCommand {
    /// Look at everything in STATE_DIR's database and say whether it is what was acknowledged. Changes
    /// nothing; the daemon may run.
    Check {
        /// The daemon's state directory.
        state_dir: PathBuf,
    },
    /// Copy STATE_DIR's database, helper images and the host's key into one new FILE of mode 0600; the daemon
    /// may run. Whoever has the file can be this host to its peers.
    Backup {
        /// The daemon's state directory.
        state_dir: PathBuf,
        /// The file to make.
        file: PathBuf,
    },
    /// Put a backup in the place of STATE_DIR's database, which is kept under another name, its helper images
    /// in theirs, and the host's key where there is none. Every guest is unconfirmed from then on. The audit
    /// log keeps it. No daemon may be running.
    Restore {
        /// What `state backup` made.
        file: PathBuf,
        /// The daemon's state directory.
        state_dir: PathBuf,
    },
    /// Go on with what is left in STATE_DIR: for a host whose database is older than what was acknowledged,
    /// has records that are damaged, or is gone, and of which there is no backup. Damaged records are
    /// removed. Every guest is unconfirmed from then on. The audit log keeps it. No daemon may be running.
    Accept {
        /// The daemon's state directory.
        state_dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum IdentityCommand {
    /// Make a key and a certificate in DIR, which must not have any, and print the identity that peers pin.
    /// A daemon makes its own in STATE_DIR/identity at its first start.
    Init {
        /// Directory, made with mode 0700.
        dir: PathBuf,
    },
    /// Show what this host is to its peers: the fingerprint that they pin, what the certificate says, and
    /// where its files are. Changes nothing; the daemon may run.
    Show {
        /// The daemon's state directory [default: /var/lib/mirrorvm for root, else $XDG_STATE_HOME/mirrorvm
        /// or ~/.local/state/mirrorvm].
        #[arg(env = "MIRRORVM_STATE_DIR")]
        state_dir: Option<PathBuf>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make this host and another one known to each other: prints a code that is good once and for ten
    /// minutes, and takes the other host's answer to it (there: `identity pair --answer`). Both then show the
    /// same short fingerprint, to be compared and confirmed. Both daemons have to run.
    Pair(PairArgs),
    /// Make the key in STATE_DIR/identity the one that this host is known by, and print the identity; with no
    /// key there, make one. For a host whose key is lost or was replaced: its daemon does not start before.
    /// Every peer that pins the old identity has to be told the new one (PATCH /v1/hosts/...). The audit log
    /// keeps it. No daemon may be running.
    Accept {
        /// The daemon's state directory.
        state_dir: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OpenApiVersion {
    /// The document as it is served.
    #[value(name = "3.1")]
    V31,
    /// The same for tools that know no newer version: 3.0.3.
    #[value(name = "3.0")]
    V30,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Directory of database, keys and sockets [default: /var/lib/mirrorvm for root, else
    /// $XDG_STATE_HOME/mirrorvm or ~/.local/state/mirrorvm].
    #[arg(long, env = "MIRRORVM_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Configuration file (TOML). Flags and environment variables count before it.
    #[arg(long, env = "MIRRORVM_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to serve beside unix:STATE_DIR/mirrorvmd.sock: unix:PATH; tls:HOST:PORT; tcp:HOST:PORT in the
    /// clear, on loopback addresses; systemd for sockets that the service manager passes. HOST is an address
    /// or a name, which is resolved once, at the start: all its addresses that this host has are served. Over
    /// tcp: and tls: callers bring a token (STATE_DIR/admin.token has one, new at each start), over tls: a
    /// certificate will do. May be repeated.
    #[arg(long, env = "MIRRORVM_LISTEN", value_name = "WHERE", value_delimiter = ',')]
    listen: Vec<Place>,
    /// Whether to serve on unix:STATE_DIR/mirrorvmd.sock, whatever --listen says. Without it `mirrorvmd open`
    /// has to be told where to ask [default: true].
    #[arg(long, env = "MIRRORVM_DEFAULT_SOCKET", value_name = "true|false")]
    default_socket: Option<bool>,
    /// Where other hosts connect for migrations to this one: address or name, which is resolved once, at the
    /// start: the first of its addresses that this host has; port 0 picks one [default: nowhere].
    #[arg(long, env = "MIRRORVM_PEER_LISTEN", value_name = "HOST:PORT")]
    peer_listen: Option<ListenAt>,
    /// Where other hosts are told to connect, as `peer_address` of /v1/host and in tickets: address or DNS
    /// name, with a port unless it is that of --peer-listen [default: --peer-listen, unless that is on all
    /// addresses].
    #[arg(long, env = "MIRRORVM_ADVERTISE", value_name = "ADDR[:PORT]")]
    advertise: Option<Advertised>,
    /// Directory that definitions of guests may name files of: kernels, initial RAM disks. May be repeated
    /// [default: none, and no definition may name a file].
    #[arg(
        long = "image-directory",
        env = "MIRRORVM_IMAGE_DIRECTORIES",
        value_name = "DIR",
        value_delimiter = ','
    )]
    image_directories: Vec<PathBuf>,
    /// A directory whose files are guests' to write: disks, firmware variables. May be repeated [default:
    /// none].
    #[arg(
        long = "volume-directory",
        env = "MIRRORVM_VOLUME_DIRECTORIES",
        value_name = "DIR",
        value_delimiter = ','
    )]
    volume_directories: Vec<PathBuf>,
    /// Whom QEMU runs as when the daemon is root: user ids FIRST-LAST, of which each guest has one, or one
    /// user for all by id or name [default: 65520-65533].
    #[arg(long, env = "MIRRORVM_QEMU_USERS", value_name = "USERS")]
    qemu_users: Option<QemuUsers>,
    /// Whether the daemon confines itself to what it needs: enforce; log, which only notes system calls that
    /// it should not make, in the kernel's audit log; none [default: enforce]. /v1/host says what is in
    /// force.
    #[arg(long, env = "MIRRORVM_CONFINE", value_name = "HOW")]
    confine: Option<Confine>,
    /// Where /metrics, /livez and /readyz are served alone, to whoever connects: unix:PATH or tcp:HOST:PORT
    /// on loopback addresses. May be repeated [default: nowhere but with the API].
    #[arg(long, env = "MIRRORVM_METRICS_LISTEN", value_name = "WHERE", value_delimiter = ',')]
    metrics_listen: Vec<Place>,
    /// Name of this host [default: the kernel's node name].
    #[arg(long, env = "MIRRORVM_NAME")]
    name: Option<String>,
    /// Take changes of what exists only with If-Match.
    #[arg(long, env = "MIRRORVM_REQUIRE_IF_MATCH")]
    require_if_match: bool,
    /// Form of the log: text or json.
    #[arg(long, env = "MIRRORVM_LOG_FORMAT", value_name = "FORMAT", value_parser = ["text", "json"])]
    log_format: Option<String>,
    /// Certificate of tls: addresses, PEM.
    #[arg(long, env = "MIRRORVM_TLS_CERTIFICATE", value_name = "FILE")]
    tls_certificate: Option<PathBuf>,
    /// Its private key, PEM; mode 0600.
    #[arg(long, env = "MIRRORVM_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Authorities of client certificates, PEM; without, callers over TLS need bearer tokens.
    #[arg(long, env = "MIRRORVM_TLS_CLIENT_CA", value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Drain and end as on SIGTERM when stdin ends. For a parent that gives its child a pipe: the pipe closes
    /// however the parent ends, SIGKILL included.
    #[arg(long, hide = true)]
    exit_with_stdin: bool,
}

/// Runs the program.
pub(crate) fn main(daemon: &Daemon) -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    // Where the arguments of `serve` came from; `config` takes the same.
    let below = matches.subcommand().map(|(_, below)| below);
    let resolved = match (&cli.command, below) {
        (Command::Serve(args) | Command::Config { serve: args, .. }, Some(below)) => {
            match resolved(args, below) {
                Ok(resolved) => Some(resolved),
                Err(error) => {
                    eprintln!("mirrorvmd: {}", chain(&error));
                    return ExitCode::FAILURE;
                }
            }
        }
        _ => None,
    };
    start_log(resolved.as_ref().is_some_and(|r| r.log_json));
    let result = match cli.command {
        Command::Serve(args) => match resolved {
            Some(resolved) => run(daemon, &args, resolved).map_err(Into::into),
            None => Ok(()),
        },
        Command::Config { json, .. } => match resolved {
            Some(resolved) => print_settings(&resolved, json),
            None => Ok(()),
        },
        Command::Open(args) => open::run(&args).map_err(Into::into),
        Command::Demo(args) => return demo::main(&args),
        Command::Identity(IdentityCommand::Init { dir }) => init_identity(&dir),
        Command::Identity(IdentityCommand::Accept { state_dir }) => offline::accept_identity(&state_dir),
        Command::Identity(IdentityCommand::Show { state_dir, json }) => {
            match state_dir.or_else(sources::default_state_dir) {
                Some(dir) => offline::show_identity(&dir, json),
                None => Err(ServeError::NoStateDir.into()),
            }
        }
        Command::Identity(IdentityCommand::Pair(args)) => pair::run(&args).map_err(Into::into),
        Command::State(command) => of_state(&command),
        Command::Bench(args) => bench::run(&args).map_err(|e| e as Box<dyn Error>),
        Command::Selftest(command) => return selftest::main(&command),
        Command::Completions { shell } => print_completions(shell),
        Command::Man { dir } => manual(dir.as_deref()),
        Command::QemuLauncher(args) => confine::serve_launcher(&args).map_err(Into::into),
        Command::Openapi { version } => print_document(daemon, version),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mirrorvmd: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn resolved(args: &ServeArgs, matches: &ArgMatches) -> Result<Resolved, ConfigError> {
    let file = args.config.as_deref().map(file::read).transpose()?.unwrap_or_default();
    let arguments = Arguments {
        state_dir: Given::of(matches, "state_dir"),
        name: Given::of(matches, "name"),
        listen: Given::many(matches, "listen"),
        default_socket: Given::of(matches, "default_socket"),
        peer_listen: Given::of(matches, "peer_listen"),
        advertise: Given::of(matches, "advertise"),
        image_directories: Given::many(matches, "image_directories"),
        volume_directories: Given::many(matches, "volume_directories"),
        qemu_users: Given::of(matches, "qemu_users"),
        confine: Given::of(matches, "confine"),
        metrics_listen: Given::many(matches, "metrics_listen"),
        require_if_match: Given::of(matches, "require_if_match"),
        log_format: Given::of(matches, "log_format"),
        tls_certificate: Given::of(matches, "tls_certificate"),
        tls_key: Given::of(matches, "tls_key"),
        tls_client_ca: Given::of(matches, "tls_client_ca"),
    };
    sources::resolve(arguments, file, |name| std::env::var(name).ok())
}

fn print_settings(resolved: &Resolved, json: bool) -> Result<(), Box<dyn Error>> {
    let mut out = out();
    if json {
        serde_json::to_writer_pretty(&mut out, &resolved.settings)?;
        writeln!(out)?;
        return Ok(());
    }
    for Setting { name, value, source } in &resolved.settings {
        let source = serde_json::to_value(source)?;
        let source = source.as_str().unwrap_or_default();
        writeln!(out, "{name:<32} {:<40} {source}", value.as_deref().unwrap_or("none"))?;
    }
    Ok(())
}

fn run(daemon: &Daemon, args: &ServeArgs, resolved: Resolved) -> Result<(), ServeError> {
    let state_dir = resolved.state_dir.or_else(sources::default_state_dir).ok_or(ServeError::NoStateDir)?;
    serve::prepare(&state_dir)?;
    // While the resolver's files and ports may still be had.
    let listen = places("listen", resolved.listen)?;
    let metrics_listen = places("metrics_listen", resolved.metrics_listen)?;
    let peer = |at: &ListenAt| {
        serve::resolve_peer(at).map_err(|source| ServeError::Place { key: "peer_listen", source })
    };
    let peer_listen = resolved.peer_listen.as_ref().map(peer).transpose()?;
    let starter = match resolved.confine {
        Confine::None => Starter::Here,
        Confine::Enforce | Confine::Log => confine::start_launcher(resolved.qemu_users)?,
    };
    let mut options = Options {
        state_dir,
        listen,
        default_socket: resolved.default_socket,
        peer_listen,
        advertise: resolved.advertise,
        image_directories: resolved.image_directories,
        volume_directories: resolved.volume_directories,
        drivers: daemon.drivers(resolved.qemu_users, starter)?,
        metrics_listen,
        name: resolved.name,
        tls: resolved.tls,
        config: resolved.config,
        exit_with_stdin: args.exit_with_stdin,
        confinement: Confinement::none(resolved.confine),
    };
    // Here is the only thread; those of the runtime have what this one has.
    mirrorvm::memory::share_heap();
    options.confinement = confine::apply(resolved.confine, &Needs::of(&options));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(ServeError::Runtime)?;
    let result = runtime.block_on(serve::run(options));
    // Whatever still blocks a thread does not keep the daemon from ending.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    result
}

/// What there is to listen at, names resolved.
fn places(key: &'static str, given: Vec<Place>) -> Result<Vec<Listen>, ServeError> {
    let mut all = Vec::new();
    for place in given {
        all.extend(place.resolve().map_err(|source| ServeError::Place { key, source })?);
    }
    Ok(all)
}

fn of_state(command: &StateCommand) -> Result<(), Box<dyn Error>> {
    match command {
        StateCommand::Check { state_dir } => offline::state::check(state_dir),
        StateCommand::Backup { state_dir, file } => offline::state::backup(state_dir, file),
        StateCommand::Restore { file, state_dir } => offline::state::restore(file, state_dir),
        StateCommand::Accept { state_dir } => offline::state::accept(state_dir),
    }
}

/// Logs to stderr what `RUST_LOG` asks for, a level or `target=level,...`; without it what is `info` and
/// above.
fn start_log(json: bool) {
    let asked = std::env::var("RUST_LOG").unwrap_or_default();
    let default = || Targets::new().with_default(LevelFilter::INFO);
    let filter = if asked.is_empty() {
        default()
    } else {
        asked.parse().unwrap_or_else(|error| {
            eprintln!("mirrorvmd: RUST_LOG {asked:?} is not understood, and info is logged: {error}");
            default()
        })
    };
    // https://no-color.org
    let colourless = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    // No colours in files. What stderr does not take is lost: a log on a full disk must not end the thread
    // that logs.
    let layer = tracing_subscriber::fmt::layer()
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal() && !colourless)
        .with_writer(std::io::stderr);
    let layer = if json { layer.json().boxed() } else { layer.boxed() };
    tracing_subscriber::registry().with(layer).with(filter).init();
}

fn init_identity(dir: &std::path::Path) -> Result<(), Box<dyn Error>> {
    let identity = mirrorvm::transport::Identity::create(dir)?;
    writeln!(out(), "{}", identity.pin())?;
    Ok(())
}

fn print_completions(shell: Shell) -> Result<(), Box<dyn Error>> {
    // Into memory first: what generates them panics where nobody reads on.
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut text);
    Ok(out().write_all(&text)?)
}

fn manual(dir: Option<&std::path::Path>) -> Result<(), Box<dyn Error>> {
    if let Some(dir) = dir {
        return Ok(clap_mangen::generate_to(Cli::command(), dir)?);
    }
    let mut text = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut text)?;
    Ok(out().write_all(&text)?)
}

fn print_document(daemon: &Daemon, version: OpenApiVersion) -> Result<(), Box<dyn Error>> {
    let drivers = daemon.drivers(QemuUsers::default(), Starter::Here)?;
    let document = match version {
        OpenApiVersion::V31 => Document::with(&drivers)?,
        OpenApiVersion::V30 => Document::with_3_0(&drivers)?,
    };
    out().write_all(document.bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let cli =
            Cli::try_parse_from(["mirrorvmd", "serve", "--listen", "tcp:127.0.0.1:0", "--listen", "unix:/a"]);
        let Command::Serve(args) = cli.unwrap().command else { panic!("serve is serve") };
        assert_eq!(args.listen.len(), 2);
        assert!(Cli::try_parse_from(["mirrorvmd", "serve", "--listen", "tcp:192.0.2.1:80"]).is_err());
    }
}
