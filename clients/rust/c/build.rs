//! Names the shared library by the version of its binary interface, as the loader expects it.

use std::env::var;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let part = |name: &str| var(format!("CARGO_PKG_VERSION_{name}")).expect("cargo sets the version");
    // Before 1.0 each minor version may change the interface.
    let abi = if part("MAJOR") == "0" { format!("0.{}", part("MINOR")) } else { part("MAJOR") };
    let family = var("CARGO_CFG_TARGET_FAMILY").unwrap_or_default();
    let name = match var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("macos" | "ios") => format!("-install_name,@rpath/libzcproto.{abi}.dylib"),
        _ if family == "unix" => format!("-soname,libzcproto.so.{abi}"),
        _ => return,
    };
    println!("cargo:rustc-cdylib-link-arg=-Wl,{name}");
}
