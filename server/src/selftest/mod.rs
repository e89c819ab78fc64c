//! `mirrorvmd selftest sev`: the path to real SEV, run on guests of its own, and what differs from what is
//! known.
//!
//! Owns: the command, the report. Must not know: daemons, hosts, migrations. Nobody here has such a
//! processor; this is what a person who has one runs for us. It needs no daemon, makes small guests that
//! never run an instruction, and leaves nothing behind.

mod report;
mod steps;

use std::error::Error;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};
use mirrorvm::chain::chain;
use mirrorvm::hypervisor::Hypervisor;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::sev::kernel::{KernelPlatform, Missing, Trace, probe};
use mirrorvm::sev::model::ModelPlatform;
use mirrorvm::sev::{Platform as _, PlatformCerts};

use report::Report;
use steps::Ground;

use crate::out::out;

#[derive(Debug, Subcommand)]
pub(crate) enum SelftestCommand {
    /// Give this host's security processor and KVM the commands that mirrors and their guests take, on guests
    /// of the test's own, and say what came otherwise than the documents have it. Ends with 0 when all
    /// agreed, 1 when something differed, 2 when this host has no SEV to test.
    Sev(SevArgs),
}

#[derive(Debug, Args)]
pub(crate) struct SevArgs {
    /// Where to write the report (JSON), ready to be sent to the project: versions, steps, requests and
    /// answers; no keys, no addresses, no names [default: standard output].
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// AMD's certificates of this processor's generation, ASK and ARK in one file as its key distribution
    /// service has them ("cert_chain"). Without, nothing is sent: SEND_START takes them.
    #[arg(long, value_name = "FILE")]
    amd_certificates: Option<PathBuf>,
    /// On the model in this program, which is what expectations come from. Says nothing of this host.
    #[arg(long, conflicts_with = "amd_certificates")]
    modelled: bool,
}

/// Largest file of AMD's certificates that is read: there are two of about 1.5 KiB.
const CERTIFICATES_MAX: u64 = 64 << 10;

pub(crate) fn main(command: &SelftestCommand) -> ExitCode {
    let SelftestCommand::Sev(args) = command;
    match sev(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mirrorvmd: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn sev(args: &SevArgs) -> Result<ExitCode, Box<dyn Error>> {
    let report = if args.modelled { on_the_model() } else { on_this_host(args)? };
    let mut told = std::io::stderr().lock();
    report.summary(&mut told)?;
    match &args.report {
        Some(file) => {
            let mut to = std::fs::File::create_new(file)
                .map_err(|e| format!("the report {} cannot be made: {e}", file.display()))?;
            report.write(&mut to)?;
            to.sync_all()?;
            writeln!(told, "the report is in {}", file.display())?;
        }
        None => report.write(&mut out())?,
    }
    Ok(ExitCode::from(report.code()))
}

fn on_the_model() -> Report {
    let platform = ModelPlatform::new();
    let host = EmulatedHost::new(Arc::clone(&platform));
    let certs = platform.pdh().map(PlatformCerts::from).map_err(|e| chain(&e).to_string());
    let steps = steps::run(&Ground { host: &host, platform: &*platform, certs, no_es: None, issued: &|| 0 });
    Report::new(true, steps, Vec::new())
}

fn on_this_host(args: &SevArgs) -> Result<Report, Box<dyn Error>> {
    let amd = args.amd_certificates.as_deref().map(certificates).transpose()?;
    let trace = Arc::new(Trace::default());
    let (support, opened) = match probe() {
        Ok(support) => (support, KernelPlatform::traced(Arc::clone(&trace))),
        Err(missing) => return Ok(Report::missing(missing)),
    };
    let platform = match opened {
        Ok(platform) => platform,
        Err(missing) => return Ok(Report::missing(missing)),
    };
    let certs = match amd {
        None => Err("no --amd-certificates were given".to_owned()),
        Some(amd) => match platform.certs() {
            Ok(certs) => Ok(PlatformCerts { amd, ..certs }),
            Err(error) => Err(chain(&error).to_string()),
        },
    };
    let host = KvmHost::with_sev(Some(platform))?;
    let platform = host.sev().ok_or("KVM has lost its security processor")?;
    let no_es = support.es.err().map(|missing: Missing| missing.to_string());
    let issued = || trace.len();
    let steps = steps::run(&Ground { host: &host, platform: &*platform, certs, no_es, issued: &issued });
    Ok(Report::new(false, steps, trace.issued()))
}

fn certificates(file: &Path) -> Result<Vec<u8>, String> {
    let told = |what: String| format!("AMD's certificates in {}: {what}", file.display());
    let size = std::fs::metadata(file).map_err(|e| told(e.to_string()))?.len();
    if size == 0 || size > CERTIFICATES_MAX {
        return Err(told(format!("{size} bytes is not the size of two certificates")));
    }
    std::fs::read(file).map_err(|e| told(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_agrees_with_every_step() {
        let report = on_the_model();
        let mut told = Vec::new();
        report.summary(&mut told).unwrap();
        let told = String::from_utf8(told).unwrap();
        assert_eq!(report.code(), 0, "{told}");
        assert!(told.contains("0 differ") && told.contains("modelled"), "{told}");
    }

    #[test]
    fn the_report_says_what_differs_and_has_no_addresses() {
        let mut report = on_the_model();
        report.steps[2].expected = steps::Expected::Errno(libc::EPERM);
        assert_eq!(report.code(), 1);
        let mut bytes = Vec::new();
        report.write(&mut bytes).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(read["differ"], 1, "{read}");
        assert_eq!(read["steps"][2]["agrees"], false);
        assert!(read["steps"].as_array().unwrap().len() > 40, "{read}");
    }

    #[test]
    fn a_host_without_sev_is_told_what_it_lacks() {
        if probe().is_ok() {
            return;
        }
        let args = SevArgs { report: None, amd_certificates: None, modelled: false };
        let report = on_this_host(&args).unwrap();
        assert_eq!(report.code(), 2);
        let mut told = Vec::new();
        report.summary(&mut told).unwrap();
        let told = String::from_utf8(told).unwrap();
        assert!(told.contains("nothing was tested") && told.contains("SEV"), "{told}");
    }
}
