//! A daemon with two drivers more than the stock ones.

use std::process::ExitCode;

fn main() -> ExitCode {
    use mirrorvm_outside_driver::{Outside, Unfit};
    mirrorvmd::Daemon::builder().driver(Box::new(Outside)).driver(Box::new(Unfit)).build().main()
}
