//! The report: for the person who ran it, in lines, and for the project, as JSON.
//!
//! Owns: both forms. Must not know: how steps are done.

use std::io::{self, Write};

use mirrorvm::chain::chain;
use mirrorvm::sev::kernel::{Issued, Missing};
use serde::Serialize;

use super::steps::{Came, Expected, Step};

/// Version of the report's form.
const FORM: u32 = 1;

/// What came of a self-test.
pub(super) struct Report {
    modelled: bool,
    missing: Option<Missing>,
    pub steps: Vec<Step>,
    issued: Vec<Issued>,
}

#[derive(Serialize)]
struct Written<'a> {
    form: u32,
    program: &'static str,
    /// Kernel, processor: what answers depend on. No name of the host.
    host: Host,
    modelled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<String>,
    agree: usize,
    differ: usize,
    not_run: usize,
    steps: Vec<WrittenStep<'a>>,
}

#[derive(Serialize)]
struct Host {
    kernel: String,
    processor: String,
    microcode: String,
}

#[derive(Serialize)]
struct WrittenStep<'a> {
    group: &'a str,
    step: &'a str,
    expected: String,
    came: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    agrees: Option<bool>,
    requests: Vec<WrittenRequest>,
}

#[derive(Serialize)]
struct WrittenRequest {
    request: String,
    command: u32,
    before: String,
    after: String,
    errno: i32,
    firmware: u32,
}

impl WrittenRequest {
    fn of(issued: &Issued) -> Self {
        Self {
            request: format!("{:#010x}", issued.request),
            command: issued.command,
            before: hex(&issued.before),
            after: hex(&issued.after),
            errno: issued.errno,
            firmware: issued.firmware,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn expected(expected: Expected) -> String {
    match expected {
        Expected::Done => "done".into(),
        Expected::Firmware(code) => format!("refused: {code}"),
        Expected::Errno(errno) => format!("refused: {}", io::Error::from_raw_os_error(errno)),
    }
}

fn came(came: &Came) -> String {
    match came {
        Came::Done(told) if told.is_empty() => "done".into(),
        Came::Done(told) => format!("done: {told}"),
        Came::Refused(failure) => format!("refused: {}", chain(failure)),
        Came::NotRun(why) => format!("not run: {why}"),
    }
}

/// The first line of a file of /proc with this name, without it.
fn line_of(file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.map_or_else(|| "unknown".to_owned(), |rest| rest.trim_start_matches([' ', '\t', ':']).to_owned())
}

impl Report {
    pub const fn new(modelled: bool, steps: Vec<Step>, issued: Vec<Issued>) -> Self {
        Self { modelled, missing: None, steps, issued }
    }

    /// Of a host that cannot be tested.
    pub const fn missing(missing: Missing) -> Self {
        Self { modelled: false, missing: Some(missing), steps: Vec::new(), issued: Vec::new() }
    }

    fn count(&self, agrees: Option<bool>) -> usize {
        self.steps.iter().filter(|step| step.agrees() == agrees).count()
    }

    /// What the program ends with.
    pub fn code(&self) -> u8 {
        match (&self.missing, self.count(Some(false))) {
            (Some(_), _) => 2,
            (None, 0) => 0,
            (None, _) => 1,
        }
    }

    /// A line for each step that did not agree, and what it comes to.
    pub fn summary(&self, to: &mut impl Write) -> io::Result<()> {
        if let Some(missing) = &self.missing {
            writeln!(to, "nothing was tested: {missing}")?;
            return writeln!(to, "the same steps on the model: mirrorvmd selftest sev --modelled");
        }
        if self.modelled {
            writeln!(to, "on a modelled security processor: this says nothing of the host")?;
        }
        for step in self.steps.iter().filter(|step| step.agrees() != Some(true)) {
            let word = if step.agrees().is_some() { "differs" } else { "not run" };
            writeln!(to, "{word}: {}: {}", step.group, step.name)?;
            writeln!(to, "    expected {}", expected(step.expected))?;
            writeln!(to, "    came     {}", came(&step.came))?;
        }
        let (agree, differ, not_run) = (self.count(Some(true)), self.count(Some(false)), self.count(None));
        writeln!(to, "{agree} steps agree, {differ} differ, {not_run} not run")
    }

    fn written<'a>(&self, step: &'a Step) -> WrittenStep<'a> {
        WrittenStep {
            group: step.group,
            step: step.name,
            expected: expected(step.expected),
            came: came(&step.came),
            agrees: step.agrees(),
            requests: self.issued[step.issued.clone()].iter().map(WrittenRequest::of).collect(),
        }
    }

    /// All of it, as JSON.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let written = Written {
            form: FORM,
            program: concat!("mirrorvmd ", env!("CARGO_PKG_VERSION")),
            host: Host {
                kernel: line_of("/proc/sys/kernel/osrelease", ""),
                processor: line_of("/proc/cpuinfo", "model name"),
                microcode: line_of("/proc/cpuinfo", "microcode"),
            },
            modelled: self.modelled,
            missing: self.missing.as_ref().map(ToString::to_string),
            agree: self.count(Some(true)),
            differ: self.count(Some(false)),
            not_run: self.count(None),
            steps: self.steps.iter().map(|step| self.written(step)).collect(),
        };
        serde_json::to_writer_pretty(&mut *to, &written)?;
        writeln!(to)
    }
}
