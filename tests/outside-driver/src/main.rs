//! A daemon with one driver more than the stock ones.

use std::process::ExitCode;

fn main() -> ExitCode {
    mirrorvmd::Daemon::builder().driver(Box::new(mirrorvm_outside_driver::Outside)).build().main()
}
