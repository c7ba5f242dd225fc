//! Tries what a guest must not reach, with std alone, and prints one line per try: `name: ok …` or
//! `name: error kind (message)`. Exits with the number of tries that succeeded.

use std::fmt::Debug;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut reached = 0;
    let mut attempt = |name: &str, result: io::Result<String>| match result {
        Ok(what) => {
            reached += 1;
            println!("{name}: ok {what}");
        }
        Err(error) => println!("{name}: error {:?} ({error})", error.kind()),
    };
    attempt("tcp-connect", shown(TcpStream::connect(("127.0.0.1", 80))));
    attempt("tcp-listen", shown(TcpListener::bind(("127.0.0.1", 0))));
    attempt("udp-bind", shown(UdpSocket::bind(("127.0.0.1", 0))));
    attempt(
        "resolve",
        ("localhost", 80).to_socket_addrs().map(|found| format!("{:?}", found.collect::<Vec<_>>())),
    );
    attempt("read-dir", std::fs::read_dir("/").map(|entries| format!("{} entries", entries.count())));
    attempt("read-file", std::fs::read_to_string("/etc/passwd").map(|text| format!("{} bytes", text.len())));
    attempt("write-file", shown(std::fs::write("/written-by-a-guest", b"x")));
    attempt("current-dir", shown(std::fs::read_dir(".")));
    attempt(
        "environment",
        match std::env::vars().next() {
            Some((name, _)) => Ok(name),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "empty")),
        },
    );
    ExitCode::from(reached)
}

fn shown<T: Debug>(result: io::Result<T>) -> io::Result<String> {
    result.map(|value| format!("{value:?}"))
}
