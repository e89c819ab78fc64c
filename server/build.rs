//! Tells the daemon which commit it is built from (`MIRRORVMD_COMMIT`).

#[path = "build/commit.rs"]
mod commit;

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build/commit.rs");
    println!("cargo:rerun-if-env-changed=MIRRORVM_COMMIT");
    let variable = |name| std::env::var(name).unwrap_or_default();
    let commit = match std::env::var("MIRRORVM_COMMIT") {
        Ok(text) => commit::given(&text).unwrap_or_else(|wrong| panic!("{wrong}")),
        Err(_) if variable("PROFILE") == "release" => of_git(),
        Err(_) => commit::UNKNOWN.to_owned(),
    };
    println!("cargo:rustc-env=MIRRORVMD_COMMIT={commit}");
}

fn of_git() -> String {
    let root = Path::new(&std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("..");
    let Some(found) = commit::found(&root) else { return commit::UNKNOWN.to_owned() };
    for path in found.watch {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    // Whether they are as committed is asked again when they change, and then the daemon is built anyway.
    for path in ["Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "lib", "server"] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    found.commit
}
