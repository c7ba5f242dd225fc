//! An ordinary program without the SDK, for both WASI versions: copies its input to its output in
//! upper case, tells its arguments and environment on stderr, and exits as `--exit N` says.

use std::io::{self, Read, Write};
use std::process::ExitCode;

fn main() -> io::Result<ExitCode> {
    let mut exit = 0;
    let mut args = std::env::args();
    let program = args.next().unwrap_or_default();
    eprintln!("program {program}");
    while let Some(arg) = args.next() {
        eprintln!("arg {arg}");
        if arg == "--exit" {
            exit = args.next().and_then(|code| code.parse().ok()).unwrap_or(2);
            eprintln!("arg {exit}");
        }
    }
    let mut env: Vec<_> = std::env::vars().collect();
    env.sort();
    for (name, value) in env {
        eprintln!("env {name}={value}");
    }

    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input)?;
    input.make_ascii_uppercase();
    io::stdout().write_all(&input)?;
    Ok(ExitCode::from(exit))
}
