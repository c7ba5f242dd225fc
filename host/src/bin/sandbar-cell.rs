//! The two hidden subcommands of the sandbox as a program of their own, for tests and benches of
//! this crate. The product dispatches the same functions from its own binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some(sandbar_host::compile::SUBCOMMAND) => sandbar_host::compile::compile_child_main(),
        Some(sandbar_host::cell::SUBCOMMAND) => sandbar_host::cell::child_main(),
        _ => ExitCode::from(2),
    }
}
