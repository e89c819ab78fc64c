//! `mirrorvmd identity pair`: two hosts get to know each other by two codes that people carry.
//!
//! Owns: who says what on which terminal, and when a host is registered. Must not know: what is in a code.
//! It is a client of the REST API like any other: neither daemons nor the peer port know of pairings.
//!
//! One host shows a code and waits; the other, with `--answer`, reads it and shows its own, which is given to
//! the first. Then both show the same short fingerprint, and whoever sees both says so at both.

mod code;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use mirrorvm_client::{Client, ClientError, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use zeroize::Zeroizing;

use crate::open;
use crate::out::out;
use code::{CodeError, Offer, Party, Waiting};

/// How a pairing is begun or answered.
#[derive(Debug, Args)]
pub struct PairArgs {
    /// Read the code that the other host shows from standard input, and print the answer to it.
    #[arg(long)]
    answer: bool,
    /// Name by which the other host is registered here [default: its own].
    #[arg(long = "as", value_name = "NAME")]
    as_name: Option<String>,
    /// Register the other host without asking whether it shows the same fingerprint: for scripts, over a
    /// channel that nobody else reads or writes.
    #[arg(long)]
    yes: bool,
    /// The daemon's Unix socket; counts before the state directory [default: mirrorvmd.sock in that].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The daemon's state directory [default: /var/lib/mirrorvm for root, else $XDG_STATE_HOME/mirrorvm or
    /// ~/.local/state/mirrorvm].
    #[arg(long, env = "MIRRORVM_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// Why two hosts were not paired.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// There is no default state directory.
    #[error("no state directory: give --socket or --state-dir, or set HOME")]
    NoStateDir,
    /// The async runtime does not start.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// The daemon does not answer, or refuses.
    #[error("{doing}: the daemon at {}", socket.display())]
    Daemon {
        /// What was asked for.
        doing: &'static str,
        /// Where it was asked.
        socket: PathBuf,
        /// What it said.
        #[source]
        source: ClientError,
    },
    /// The other host would not know where to connect to.
    #[error(
        "this host has no address for others: start its daemon with --peer-listen, and with --advertise if that is on all addresses"
    )]
    NoAddress,
    /// An answer of the daemon is not as it should be.
    #[error("the daemon's answer lacks {0}")]
    Answer(&'static str),
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    NoRandomness,
    /// No code that does.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// Standard input ended.
    #[error("standard input has ended: nothing was registered here")]
    NoInput,
    /// The two terminals do not show the same.
    #[error(
        "not confirmed, and nothing was registered here. If the fingerprints differ, somebody changed a code on its way: \
         carry them another way"
    )]
    Declined,
    /// The identity is registered with something else.
    #[error(
        "the other host is registered here already as {name} at {address}, and says that it is at {told}: \
         PATCH /v1/hosts/{name} changes that"
    )]
    Elsewhere {
        /// Its name here.
        name: String,
        /// The address that is registered.
        address: String,
        /// The address that it tells.
        told: String,
    },
    /// A terminal or pipe fails.
    #[error("cannot talk to the terminal")]
    Terminal(#[source] std::io::Error),
}

/// Pairs this host with another one.
///
/// # Errors
/// [`PairError`].
pub fn run(args: &PairArgs) -> Result<(), PairError> {
    let socket =
        open::socket_of(args.socket.as_ref(), args.state_dir.as_ref()).ok_or(PairError::NoStateDir)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(PairError::Runtime)?;
    let daemon = Daemon { client: Client::local(&socket), socket, runtime };
    let own = daemon.own()?;
    let mut input = Input::default();
    let (other, shown) = if args.answer { answer(&own, &mut input)? } else { offer(own, &mut input)? };
    say(format_args!("The other host is {}, {}, at {}.", other.name, other.identity, other.address))?;
    say(format_args!("Both hosts show {shown}"))?;
    if !args.yes {
        confirm(&mut input)?;
    }
    let name = args.as_name.as_ref().unwrap_or(&other.name);
    daemon.register(name, &other)?;
    say(format_args!("{name} is registered here, with that identity."))
}

/// Shows a code, and waits for the answer to it.
fn offer(own: Party, input: &mut Input) -> Result<(Party, String), PairError> {
    let offer = Offer::new(own).map_err(|_| PairError::NoRandomness)?;
    print(&offer.text())?;
    say(format_args!(
        "Within ten minutes give this code to `mirrorvmd identity pair --answer` on the other host, and its answer here:"
    ))?;
    let mut waiting = Waiting::new(offer, now());
    loop {
        let line = input.line(Some(waiting.until()))?;
        match waiting.take(&line, now()) {
            Ok(other) => {
                let shown = waiting.offer.shown(&other);
                return Ok((other, shown));
            }
            Err(over @ (CodeError::TooLate | CodeError::TooOften)) => return Err(over.into()),
            Err(wrong) => say(format_args!("{wrong}"))?,
        }
    }
}

/// Reads a code, and shows the answer to it.
fn answer(own: &Party, input: &mut Input) -> Result<(Party, String), PairError> {
    say(format_args!("The code that `mirrorvmd identity pair` shows on the other host:"))?;
    let offer = Offer::parse(&input.line(None)?, &own.identity)?;
    print(&offer.answer(own))?;
    say(format_args!("Give this answer to the other host, which waits for it."))?;
    let shown = offer.shown(own);
    Ok((offer.host, shown))
}

fn confirm(input: &mut Input) -> Result<(), PairError> {
    say(format_args!("Does the other host show the same? [y/N]"))?;
    let said = input.line(Some(now() + code::WINDOW)).map_err(|error| match error {
        PairError::NoInput | PairError::Code(CodeError::TooLate) => PairError::Declined,
        other => other,
    })?;
    let yes = ["y", "yes"].contains(&said.trim().to_ascii_lowercase().as_str());
    if yes { Ok(()) } else { Err(PairError::Declined) }
}

/// The daemon of this host.
struct Daemon {
    client: Client,
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Daemon {
    fn failed(&self, doing: &'static str) -> impl FnOnce(ClientError) -> PairError {
        move |source| PairError::Daemon { doing, socket: self.socket.clone(), source }
    }

    fn own(&self) -> Result<Party, PairError> {
        let host = self.runtime.block_on(self.client.get("/v1/host"));
        let host = host.map_err(self.failed("this host cannot be looked at"))?;
        let text = |field: &'static str| host[field].as_str().ok_or(PairError::Answer(field));
        if host["peer_address"].is_null() {
            return Err(PairError::NoAddress);
        }
        Ok(Party {
            name: text("name")?.to_owned(),
            address: text("peer_address")?.parse().map_err(|_| PairError::Answer("peer_address"))?,
            identity: text("identity")?.parse().map_err(|_| PairError::Answer("identity"))?,
        })
    }

    /// Registers the other host, unless it is registered just so.
    fn register(&self, name: &str, other: &Party) -> Result<(), PairError> {
        const MOST: usize = 100_000;
        let known = self.runtime.block_on(self.client.pages(Request::get("/v1/hosts")).all(MOST));
        let known = known.map_err(self.failed("the registered hosts cannot be listed"))?;
        let (identity, address) = (other.identity.to_string(), other.address.to_string());
        if let Some(record) = known.iter().find(|record| record["identity"] == identity.as_str()) {
            if record["address"] == address.as_str() {
                return Ok(());
            }
            let text = |field: &str| record[field].as_str().unwrap_or_default().to_owned();
            return Err(PairError::Elsewhere { name: text("name"), address: text("address"), told: address });
        }
        let body = json!({"name": name, "address": address, "identity": identity});
        let request = Request::post("/v1/hosts").json(&body).once();
        self.runtime
            .block_on(self.client.send(&request))
            .map_err(self.failed("the other host is not registered"))?;
        Ok(())
    }
}

/// Time since the machine began, asleep or not: whoever sets its clock changes nothing.
fn now() -> Duration {
    let at = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(at.tv_sec.unsigned_abs(), u32::try_from(at.tv_nsec).unwrap_or_default())
}

fn print(code: &str) -> Result<(), PairError> {
    let mut out = out();
    writeln!(out, "{code}").and_then(|()| out.flush()).map_err(PairError::Terminal)
}

/// What people read; codes alone go to standard output.
fn say(line: std::fmt::Arguments<'_>) -> Result<(), PairError> {
    writeln!(std::io::stderr(), "{line}").map_err(PairError::Terminal)
}

/// Lines of standard input, waited for no longer than until a time.
#[derive(Default)]
struct Input {
    /// What came and is not asked for yet.
    rest: Zeroizing<Vec<u8>>,
}

impl Input {
    fn line(&mut self, until: Option<Duration>) -> Result<Zeroizing<String>, PairError> {
        let stdin = std::io::stdin();
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(Zeroizing::new(String::from_utf8_lossy(&line).trim().to_owned()));
            }
            if self.rest.len() > code::TEXT_MAX {
                return Err(CodeError::Form("mirrorvm-").into());
            }
            if let Some(until) = until {
                let left =
                    until.checked_sub(now()).filter(|left| !left.is_zero()).ok_or(CodeError::TooLate)?;
                let left =
                    Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
                let mut wanted = [PollFd::new(&stdin, PollFlags::IN)];
                match poll(&mut wanted, Some(&left)) {
                    Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                    Ok(_) => {}
                    Err(errno) => return Err(PairError::Terminal(errno.into())),
                }
            }
            let mut bytes = Zeroizing::new([0; 256]);
            match rustix::io::read(&stdin, &mut bytes[..]) {
                // A last line may lack its end.
                Ok(0) if !self.rest.is_empty() => self.rest.push(b'\n'),
                Ok(0) => return Err(PairError::NoInput),
                Ok(read) => self.rest.extend_from_slice(&bytes[..read]),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(PairError::Terminal(errno.into())),
            }
        }
    }
}
