//! The command line.

use std::error::Error;
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::bench::{self, BenchArgs};
use crate::demo::{self, DemoArgs};
use crate::openapi::Document;
use crate::serve::{self, Listen, Options, ServeError};

/// Manages the guests of one host, their mirror VMs and live migrations, over a REST API.
#[derive(Debug, Parser)]
#[command(name = "mirrorvmd", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API; prints one line `ready ...` when requests are accepted. SIGTERM drains and ends.
    Serve(ServeArgs),
    /// Migrate a guest between two daemons on this machine, and check what arrived.
    #[command(long_about = demo::LONG_ABOUT)]
    Demo(DemoArgs),
    /// Keys of this host for the peer link.
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Measure what the parts that matter cost.
    Bench(BenchArgs),
    /// Print the OpenAPI document.
    Openapi {
        /// Version of OpenAPI.
        #[arg(long, value_enum, default_value = "3.1")]
        version: OpenApiVersion,
    },
}

#[derive(Debug, Subcommand)]
enum IdentityCommand {
    /// Make a key and a certificate in DIR, which must not have any, and print the identity that peers pin.
    /// A daemon makes its own in STATE_DIR/identity when there is none.
    Init {
        /// Directory, made with mode 0700.
        dir: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OpenApiVersion {
    /// The document as it is served.
    #[value(name = "3.1")]
    V31,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Directory of database, keys and sockets [default: /var/lib/mirrorvm for root, else
    /// $XDG_STATE_HOME/mirrorvm or ~/.local/state/mirrorvm].
    #[arg(long, env = "MIRRORVM_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where to serve: unix:PATH, or tcp:ADDR:PORT on a loopback address; may be repeated
    /// [default: unix:STATE_DIR/mirrorvmd.sock].
    #[arg(long, value_name = "WHERE")]
    listen: Vec<Listen>,
    /// Where other hosts connect for migrations to this one; port 0 picks one [default: nowhere].
    #[arg(long, value_name = "ADDR:PORT")]
    peer_listen: Option<SocketAddr>,
    /// Name of this host [default: the kernel's node name].
    #[arg(long)]
    name: Option<String>,
    /// Drain and end as on SIGTERM when stdin ends. For a parent that gives its child a pipe: the pipe closes however
    /// the parent ends, SIGKILL included.
    #[arg(long, hide = true)]
    exit_with_stdin: bool,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // No colours in files.
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
    let result = match cli.command {
        Command::Serve(args) => run(args).map_err(Into::into),
        Command::Demo(args) => return demo::main(&args),
        Command::Identity(IdentityCommand::Init { dir }) => init_identity(&dir),
        Command::Bench(args) => bench::run(&args).map_err(|e| e as Box<dyn Error>),
        Command::Openapi { version: OpenApiVersion::V31 } => print_document(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mirrorvmd: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: ServeArgs) -> Result<(), ServeError> {
    let state_dir = args.state_dir.or_else(default_state_dir).ok_or(ServeError::NoStateDir)?;
    let options = Options {
        state_dir,
        listen: args.listen,
        peer_listen: args.peer_listen,
        name: args.name,
        exit_with_stdin: args.exit_with_stdin,
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(ServeError::Runtime)?;
    let result = runtime.block_on(serve::run(options));
    // Whatever still blocks a thread does not keep the daemon from ending.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    result
}

fn default_state_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(PathBuf::from("/var/lib/mirrorvm"));
    }
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|base| base.join("mirrorvm"))
}

fn init_identity(dir: &std::path::Path) -> Result<(), Box<dyn Error>> {
    let identity = mirrorvm::transport::Identity::create(dir)?;
    writeln!(std::io::stdout(), "{}", identity.pin())?;
    Ok(())
}

fn print_document() -> Result<(), Box<dyn Error>> {
    let document = Document::of_this_build()?;
    std::io::stdout().write_all(document.bytes())?;
    Ok(())
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

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
