//! The system calls that a cell or a compilation makes once it is set up: found by tracing both under the tests of
//! this crate, plus what the C library and Rust's runtime do when memory runs out, a thread panics or the process
//! aborts. Everything else is refused: no file, no socket, no process, no thread, no signal to others.

use std::collections::BTreeMap;

use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

/// The kernel's number of PAGEMAP_SCAN: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// Write and execute.
const WRITE_EXEC: u64 = (libc::PROT_WRITE | libc::PROT_EXEC) as u64;
/// Commands of futex without its flags.
const FUTEX_COMMAND: u64 = 0x7f;

/// The allow list; `None` if a rule is malformed.
pub(super) fn allowed() -> Option<BTreeMap<i64, Vec<SeccompRule>>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALWAYS.iter().map(|call| (*call, Vec::new())).collect();
    // Code is written, then made executable: never both at once.
    let mut never_both = Vec::new();
    for protection in [0, libc::PROT_WRITE, libc::PROT_EXEC] {
        never_both.push(rule(2, SeccompCmpOp::MaskedEq(WRITE_EXEC), u64::try_from(protection).ok()?)?);
    }
    rules.insert(libc::SYS_mmap, never_both.clone());
    rules.insert(libc::SYS_mprotect, never_both);
    rules.insert(libc::SYS_ioctl, vec![rule(1, SeccompCmpOp::Eq, PAGEMAP_SCAN)?]);
    // Sent over the one connected socket: an address would name another.
    rules.insert(libc::SYS_sendto, vec![wide(4, SeccompCmpOp::Eq, 0)?]);
    rules.insert(libc::SYS_recvfrom, vec![wide(4, SeccompCmpOp::Eq, 0)?]);
    // The engine keeps the first contents of a guest's memory in a sealed anonymous file, which every instance maps
    // copy-on-write. Refused, it runs no guest that has data.
    let sealable = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
    rules.insert(libc::SYS_memfd_create, vec![rule(1, SeccompCmpOp::Eq, sealable)?]);
    // Seals, and a build of the standard library with checks looks whether what it closes is open.
    let mut controls = Vec::new();
    for command in [libc::F_ADD_SEALS, libc::F_GETFD] {
        controls.push(rule(1, SeccompCmpOp::Eq, u64::try_from(command).ok()?)?);
    }
    rules.insert(libc::SYS_fcntl, controls);
    // Names of threads, and names of memory for debuggers.
    let (name, memory) = (u64::try_from(libc::PR_SET_NAME).ok()?, u64::try_from(libc::PR_SET_VMA).ok()?);
    rules.insert(libc::SYS_prctl, vec![rule(0, SeccompCmpOp::Eq, name)?, rule(0, SeccompCmpOp::Eq, memory)?]);
    // How abort ends: a signal to oneself.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![rule(0, SeccompCmpOp::Eq, own)?]);
    // Waiting and waking; nothing that hands locks to other processes.
    let mut waits = Vec::new();
    for command in [
        libc::FUTEX_WAIT,
        libc::FUTEX_WAKE,
        libc::FUTEX_REQUEUE,
        libc::FUTEX_CMP_REQUEUE,
        libc::FUTEX_WAIT_BITSET,
        libc::FUTEX_WAKE_BITSET,
    ] {
        waits.push(rule(1, SeccompCmpOp::MaskedEq(FUTEX_COMMAND), u64::try_from(command).ok()?)?);
    }
    rules.insert(libc::SYS_futex, waits);
    Some(rules)
}

/// Without a look at their arguments: they reach only what the process already has.
const ALWAYS: &[i64] = &[
    // The socket, and pipes of a compilation.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_getrandom,
    // Signals that traps and aborts make within the process.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    // Beginning and end of threads.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    // New code is published to the other cores by it, on machines that need that.
    #[cfg(target_arch = "aarch64")]
    libc::SYS_membarrier,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn rule(argument: u8, how: SeccompCmpOp, value: u64) -> Option<SeccompRule> {
    condition(argument, SeccompCmpArgLen::Dword, how, value)
}

fn wide(argument: u8, how: SeccompCmpOp, value: u64) -> Option<SeccompRule> {
    condition(argument, SeccompCmpArgLen::Qword, how, value)
}

fn condition(argument: u8, len: SeccompCmpArgLen, how: SeccompCmpOp, value: u64) -> Option<SeccompRule> {
    SeccompRule::new(vec![SeccompCondition::new(argument, len, how, value).ok()?]).ok()
}
