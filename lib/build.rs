//! Builds the two bare-metal images that the library carries: the migration helper and the workload guest.
//!
//! They are programs for another machine (no operating system, static addresses, own linker script), so a
//! nested cargo with its own target directory and flags builds them. Same sources and toolchain, same bytes:
//! paths are remapped, build ids are off, one codegen unit.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let lib = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = lib.parent().ok_or("lib/ has a parent")?.to_owned();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for watched in
        ["abi/src", "abi/Cargo.toml", "helper", "workload", "build.rs", "../Cargo.toml", "../Cargo.lock"]
    {
        println!("cargo::rerun-if-changed={}", lib.join(watched).display());
    }
    for (package, script) in
        [("mirrorvm-helper", "helper/src/image/image.ld"), ("mirrorvm-workload", "workload/src/image.ld")]
    {
        build(package, &lib.join(script), &root, &out)?;
    }
    Ok(())
}

fn build(package: &str, script: &Path, root: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    let binary = format!("{package}-image");
    let target_dir = out.join("images");
    let mut cargo = Command::new(env::var("CARGO")?);
    // Nothing of the outer build's flags may reach the image: its measurement must not depend on them.
    for (name, _) in env::vars() {
        let ours = ["CARGO_HOME", "CARGO_NET_OFFLINE"].contains(&name.as_str());
        let cargos = name.starts_with("CARGO") || name.starts_with("RUSTC") || name.starts_with("RUSTDOC");
        let compilers = ["RUSTFLAGS", "CFLAGS", "CC", "AR", "LDFLAGS", "CLIPPY_ARGS"];
        if (cargos && !ours) || compilers.contains(&name.as_str()) {
            cargo.env_remove(name);
        }
    }
    let cargo_home = env::var("CARGO_HOME")
        .or_else(|_| env::var("HOME").map(|h| format!("{h}/.cargo")))
        .unwrap_or_else(|_| "/nonexistent".into());
    let flags = [
        "-Crelocation-model=static".to_owned(),
        "-Cforce-frame-pointers=no".to_owned(),
        "-Ctarget-feature=+crt-static".to_owned(),
        "-Clink-arg=-nostdlib".to_owned(),
        "-Clink-arg=-nostartfiles".to_owned(),
        "-Clink-arg=-static".to_owned(),
        "-Clink-arg=-no-pie".to_owned(),
        "-Clink-arg=-Wl,--build-id=none".to_owned(),
        "-Clink-arg=-Wl,--oformat=binary".to_owned(),
        "-Clink-arg=-Wl,-z,noexecstack".to_owned(),
        format!("-Clink-arg=-Wl,-T,{}", script.display()),
        format!("--remap-path-prefix={}=/src", root.display()),
        format!("--remap-path-prefix={cargo_home}=/cargo"),
        format!("--remap-path-prefix={}=/out", out.display()),
    ];
    let status = cargo
        .args(["build", "--quiet", "--profile", "image", "--target", TARGET, "--features", "image"])
        .args(["-p", package, "--bin", &binary])
        .arg("--manifest-path")
        .arg(root.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .current_dir(root)
        .status()?;
    if !status.success() {
        return Err(format!("building {binary} ended with {status}").into());
    }
    std::fs::copy(target_dir.join(TARGET).join("image").join(&binary), out.join(format!("{package}.bin")))?;
    Ok(())
}
