//! The daemon as a library: for whoever runs guests with drivers of their own.
//!
//! Owns: which drivers a program's daemon has. Must not know: the command line, how anything is served.
//!
//! ```no_run
//! # struct Mine;
//! # fn drivers() -> Vec<Box<dyn mirrorvm::guest::Driver>> { Vec::new() }
//! use std::process::ExitCode;
//!
//! fn main() -> ExitCode {
//!     let mut daemon = mirrorvmd::Daemon::builder();
//!     for driver in drivers() {
//!         daemon = daemon.driver(driver);
//!     }
//!     daemon.build().main()
//! }
//! ```

use std::process::ExitCode;
use std::sync::Arc;

use mirrorvm::guest::drivers::BadDriverName;
use mirrorvm::guest::{Driver, Drivers};
use mirrorvm::qemu::{QemuUsers, Starter};

/// A daemon with the stock drivers and those that were added. The document that it serves has their schemas.
#[derive(Clone, Default)]
pub struct Daemon {
    added: Vec<Arc<dyn Driver>>,
}

/// Makes a [`Daemon`].
#[derive(Clone, Default)]
#[must_use = "a builder does nothing before it is built"]
pub struct DaemonBuilder(Daemon);

impl DaemonBuilder {
    /// Adds a driver, behind the stock ones and those that were added before. Its name must be its own: a
    /// daemon that has two of one name says so when it starts, and ends.
    pub fn driver(mut self, driver: Box<dyn Driver>) -> Self {
        self.0.added.push(Arc::from(driver));
        self
    }

    /// The daemon.
    pub fn build(self) -> Daemon {
        self.0
    }
}

impl Daemon {
    /// A daemon with the stock drivers, to be given more.
    pub fn builder() -> DaemonBuilder {
        DaemonBuilder::default()
    }

    /// Runs the program as `mirrorvmd` does, with the same command line, until it ends. To be called once,
    /// outside of any async runtime.
    pub fn main(self) -> ExitCode {
        crate::cli::main(&self)
    }

    /// All its drivers; QEMU's processes are started by `starter` and run as `users` where the daemon is
    /// root.
    ///
    /// # Errors
    /// Two of one name, or one without a name.
    pub fn drivers(&self, users: QemuUsers, starter: Starter) -> Result<Drivers, BadDriverName> {
        self.added.iter().cloned().try_fold(Drivers::stock(users, starter), Drivers::with)
    }
}
