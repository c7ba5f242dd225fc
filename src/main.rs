//! The `sandbar` binary: every role and the command line. Owns nothing but the choice between a process of its own
//! kind (a cell, a compilation) and the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Children that handle hostile input start here, before anything else of this program has run.
    match std::env::args_os().nth(1).as_deref().and_then(std::ffi::OsStr::to_str) {
        Some("__cell") => sandbar_host::cell::child_main(),
        Some("__compile") => sandbar_host::compile::compile_child_main(),
        _ => sandbar::cli::main(),
    }
}
