//! What the system says about this program.

use crate::Error;

/// Processor time in seconds.
pub(crate) fn processor() -> Result<f64, Error> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name, in parentheses, may contain spaces. The kernel's unit for programs is a hundredth of a second.
    let after = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

/// Resident memory in bytes.
pub(crate) fn resident() -> Result<f64, Error> {
    status("VmRSS:")
}

/// The most resident memory that there was so far, in bytes.
pub(crate) fn peak() -> Result<f64, Error> {
    status("VmHWM:")
}

fn status(what: &str) -> Result<f64, Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(what)).ok_or("/proc/self/status lacks a line")?;
    let kib: f64 = line.split_whitespace().nth(1).unwrap_or("0").parse()?;
    Ok(kib * 1024.0)
}
