//! `mirrorvmd open`: a one-time link that opens a session in a browser.
//!
//! Owns: where the daemon is asked, what is printed. Must not know: sessions; it is a client of the REST API
//! like any other.
//!
//! It starts no browser: whatever is among a program's arguments, any local user reads in `/proc`, and would
//! be faster.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use mirrorvm_client::{Client, ClientError};
use serde_json::Value;

use crate::config::sources;
use crate::out::out;
use crate::serve::SOCKET;

/// Which daemon is asked.
#[derive(Debug, Args)]
pub struct OpenArgs {
    /// The daemon's Unix socket; counts before the state directory [default: mirrorvmd.sock in that].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The daemon's state directory [default: /var/lib/mirrorvm for root, else $XDG_STATE_HOME/mirrorvm or
    /// ~/.local/state/mirrorvm].
    #[arg(long, env = "MIRRORVM_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Print the link and nothing else.
    #[arg(long)]
    print: bool,
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no default state directory.
    #[error("no state directory: give --socket or --state-dir, or set HOME")]
    NoStateDir,
    /// The async runtime does not start.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// The daemon gives none.
    #[error("no link from the daemon at {}", socket.display())]
    Refused {
        /// Where it was asked.
        socket: PathBuf,
        /// What it said.
        #[source]
        source: ClientError,
    },
    /// The answer is not as it should be.
    #[error("the daemon's answer has no link")]
    Answer,
    /// The link cannot be printed.
    #[error("cannot write to stdout")]
    Stdout(#[source] std::io::Error),
}

/// Where the daemon of this machine is asked: at a socket that was given, or at that of a state directory;
/// `None` where there is no default one.
pub fn socket_of(socket: Option<&PathBuf>, state_dir: Option<&PathBuf>) -> Option<PathBuf> {
    match (socket, state_dir) {
        (Some(socket), _) => Some(socket.clone()),
        (None, Some(dir)) => Some(dir.join(SOCKET)),
        (None, None) => Some(sources::default_state_dir()?.join(SOCKET)),
    }
}

/// Asks and prints.
///
/// # Errors
/// [`OpenError`].
pub fn run(args: &OpenArgs) -> Result<(), OpenError> {
    let socket = socket_of(args.socket.as_ref(), args.state_dir.as_ref()).ok_or(OpenError::NoStateDir)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(OpenError::Runtime)?;
    let asked = runtime.block_on(Client::local(&socket).post("/v1/session-links", None));
    let link = asked.map_err(|source| OpenError::Refused { socket, source })?;
    let urls: Vec<&str> = link["urls"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if urls.is_empty() {
        return Err(OpenError::Answer);
    }
    let mut out = out();
    for url in urls {
        writeln!(out, "{url}").map_err(OpenError::Stdout)?;
    }
    out.flush().map_err(OpenError::Stdout)?;
    if !args.print {
        let word = |name: &str| link[name].as_str().unwrap_or("?");
        let (principal, role) = (word("principal"), word("role"));
        // Nobody may be reading stderr; the link is what counts.
        let _ = writeln!(
            std::io::stderr(),
            "Paste it into a browser's address bar within {} seconds: it opens one session, as {principal} with the role \
             {role}.",
            link["expires_in_seconds"]
        );
    }
    Ok(())
}
