//! The walls around cells and compilations: what they hold back, and that both work behind them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]
// System calls that no library would make for us.
#![allow(unsafe_code)]

mod common;

use std::process::Command;

use common::{QUICK, artifact, attempt, cell, finished, program, script};
use sandbar_host::cell::{Cell, CellConfig};
use sandbar_host::limits::Limits;
use sandbar_host::outcome::Termination;
use sandbar_host::walls::{self, Wall, Walls};

/// Marks the lines of a probe among those of the test harness.
const MARK: &str = "probe ";

/// What a test asks a copy of this program to try behind the walls; answers come as lines.
fn probe(name: &str) -> Vec<String> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "--test-threads", "1", name])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<String> =
        text.lines().filter_map(|line| line.split_once(MARK)).map(|(_, answer)| answer.to_owned()).collect();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(lines.last().is_some_and(|line| line == "done"), "{:?}\n{text}\n{errors}", output.status);
    lines
}

fn say(what: &str, result: std::io::Result<()>) {
    match result {
        Ok(()) => println!("{MARK}{what} allowed"),
        Err(err) => println!("{MARK}{what} {}", err.raw_os_error().unwrap_or(0)),
    }
}

fn call(number: i64, arguments: [i64; 5]) -> std::io::Result<()> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: tried with arguments that name no memory of this process; behind the walls none of the calls below is
    // even looked at.
    match unsafe { libc::syscall(number, a, b, c, d, e) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[test]
#[ignore = "run by the tests, in a process of its own"]
fn probe_reach() {
    let before = walls::before_threads();
    assert!(before.no_new_privileges && walls::behind_threads());
    use std::os::unix::process::CommandExt;
    let parent = i64::from(std::os::unix::process::parent_id());
    say("read a file", std::fs::File::open("/etc/passwd").map(drop));
    say("write a file", std::fs::File::create("/tmp/sandbar-probe").map(drop));
    say("look at a file", std::fs::metadata("/etc/passwd").map(drop));
    say("list a directory", std::fs::read_dir("/").map(drop));
    say("internet socket", std::net::UdpSocket::bind("127.0.0.1:0").map(drop));
    say("local socket", std::os::unix::net::UnixStream::pair().map(drop));
    say("another program", Err(Command::new("/bin/true").exec()));
    say("child process", call(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0, 0]));
    say("thread", std::thread::Builder::new().spawn(|| ()).map(drop));
    say("signal to the parent", call(libc::SYS_kill, [parent, 0, 0, 0, 0]));
    say("signal to a thread of the parent", call(libc::SYS_tgkill, [parent, parent, 0, 0, 0]));
    say("ptrace", call(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH as i32), parent, 0, 0, 0]));
    say("memory of others", call(libc::SYS_process_vm_readv, [parent, 0, 0, 0, 0]));
    say("namespaces", call(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0, 0]));
    say("limits", call(libc::SYS_prlimit64, [parent, i64::from(libc::RLIMIT_NOFILE as i32), 0, 0, 0]));
    say("io_uring", call(425, [1, 0, 0, 0, 0]));
    say("bpf", call(libc::SYS_bpf, [0, 0, 0, 0, 0]));
    let both = i64::from(libc::PROT_WRITE | libc::PROT_EXEC);
    say(
        "writable code",
        call(libc::SYS_mmap, [0, 4096, both, i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS), -1]),
    );
    say("any ioctl", call(libc::SYS_ioctl, [1, 0x5401, 0, 0, 0]));
    say("privileges", call(libc::SYS_prctl, [i64::from(libc::PR_SET_SECCOMP), 0, 0, 0, 0]));
    println!("{MARK}done");
}

#[test]
fn behind_the_walls_no_file_socket_process_signal_or_foreign_memory_can_be_reached() {
    let lines = probe("probe_reach");
    assert!(lines.len() > 20, "{lines:?}");
    for line in lines.iter().filter(|line| *line != "done") {
        assert!(line.ends_with(&format!(" {}", libc::EPERM)), "{line}");
    }
}

#[test]
#[ignore = "run by the tests, in a process of its own"]
fn probe_landlock() {
    if walls::before_threads().landlock {
        say("read a file", std::fs::File::open("/etc/passwd").map(drop));
        say("write a file", std::fs::File::create("/tmp/sandbar-probe").map(drop));
        say("connect", std::net::TcpStream::connect("127.0.0.1:1").map(drop));
    }
    println!("{MARK}done");
}

#[test]
fn landlock_alone_keeps_files_and_connections_away() {
    let lines = probe("probe_landlock");
    if lines.len() == 1 {
        println!("SKIPPED: this kernel has no Landlock");
        return;
    }
    for line in lines.iter().filter(|line| line.contains("file")) {
        assert!(line.ends_with(&format!(" {}", libc::EACCES)), "{line}");
    }
    // Before Linux 6.7 there is no such right, and nobody listens on that port.
    assert!(!lines.iter().any(|line| line == "connect allowed"), "{lines:?}");
}

#[test]
#[ignore = "run by the tests, in a process of its own"]
fn probe_every_call() {
    let _ = walls::before_threads();
    assert!(walls::behind_threads());
    let mut allowed = Vec::new();
    // Those that would end this process or stop the thread if they are allowed, which others prove, and what only
    // the probes of the kernel may call, which it punishes itself.
    let lethal =
        [libc::SYS_exit, libc::SYS_exit_group, libc::SYS_rt_sigreturn, libc::SYS_restart_syscall, 335, 336];
    for number in (0..600).filter(|number| !lethal.contains(number)) {
        // Arguments that no allowed call can do anything with.
        match call(number, [-1, -1, -1, -1, -1]) {
            Err(err) if err.raw_os_error() == Some(libc::EPERM) => {}
            _ => allowed.push(number.to_string()),
        }
    }
    println!("{MARK}allowed {}", allowed.join(" "));
    println!("{MARK}done");
}

#[test]
fn of_all_system_calls_only_a_few_are_answered() {
    let lines = probe("probe_every_call");
    let allowed: Vec<i64> = lines[0].split(' ').skip(1).map(|number| number.parse().unwrap()).collect();
    // A wall with a door more is a decision: this number changes only with the list.
    assert!(allowed.len() <= 32, "{allowed:?}");
    for dangerous in [
        libc::SYS_openat,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_clone3,
        libc::SYS_execve,
        libc::SYS_ptrace,
        libc::SYS_kill,
        libc::SYS_sendmsg,
        libc::SYS_recvmsg,
        libc::SYS_memfd_create,
    ] {
        assert!(!allowed.contains(&dangerous), "{dangerous}");
    }
}

#[tokio::test]
async fn every_thread_of_a_cell_stands_behind_the_walls_and_guests_run_there() {
    let code = artifact(QUICK).await;
    let (cell, mut events) = cell(2, 4).await;
    assert!(cell.walls().no_new_privileges && cell.walls().seccomp, "{:?}", cell.walls());
    let mut threads = 0;
    for thread in std::fs::read_dir(format!("/proc/{}/task", cell.pid())).unwrap() {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2\n"), "{status}");
        assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
        threads += 1;
    }
    assert!(threads >= 5, "two for guests, clock, timers, outbox, reader");
    cell.load(&code).await.unwrap();
    cell.submit(1, &attempt(&code, 1, Limits::default())).unwrap();
    assert_eq!(finished(&mut events).await.1.termination, Termination::Succeeded);
}

/// A program that says it is a cell without any wall.
fn naked(dir: &tempfile::TempDir) -> std::path::PathBuf {
    use sandbar_host::cell::protocol::{FromCell, Packer};
    let mut ready = Packer::new(1 << 20);
    ready.push(&FromCell::Ready(Walls::default())).unwrap();
    let octal: String = ready.take(Vec::new()).iter().map(|b| format!("\\{b:03o}")).collect();
    script(&dir.path().join("naked"), &format!("printf '{octal}' >&0\nread never\nsleep 100"))
}

#[tokio::test]
async fn a_cell_without_a_required_wall_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let required: Walls = [Wall::Seccomp, Wall::Landlock].into_iter().collect();
    let config = CellConfig { require_walls: required, ..CellConfig::new(naked(&dir)) };
    let Err(err) = Cell::spawn(&config).await else { panic!("a cell without walls was taken") };
    assert!(err.to_string().contains("seccomp, landlock"), "{err}");
    let config = CellConfig::new(naked(&dir));
    assert!(Cell::spawn(&config).await.is_ok(), "nothing was required");
}

#[tokio::test]
async fn required_walls_that_stand_are_enough() {
    let (probe, _events) = cell(1, 1).await;
    let config = CellConfig { require_walls: probe.walls(), ..CellConfig::new(program()) };
    let (cell, _events) = Cell::spawn(&config).await.unwrap();
    assert_eq!(cell.walls(), probe.walls());
}
