//! The imports this host offers, by name. The linkers in `run` provide exactly these.
//! Owns the lists only.

/// The one module of WASI preview 1.
pub(super) const P1_MODULE: &str = "wasi_snapshot_preview1";

/// Every function of WASI preview 1, in the order of their names.
const P1_FUNCTIONS: [&str; 46] = [
    "args_get",
    "args_sizes_get",
    "clock_res_get",
    "clock_time_get",
    "environ_get",
    "environ_sizes_get",
    "fd_advise",
    "fd_allocate",
    "fd_close",
    "fd_datasync",
    "fd_fdstat_get",
    "fd_fdstat_set_flags",
    "fd_fdstat_set_rights",
    "fd_filestat_get",
    "fd_filestat_set_size",
    "fd_filestat_set_times",
    "fd_pread",
    "fd_prestat_dir_name",
    "fd_prestat_get",
    "fd_pwrite",
    "fd_read",
    "fd_readdir",
    "fd_renumber",
    "fd_seek",
    "fd_sync",
    "fd_tell",
    "fd_write",
    "path_create_directory",
    "path_filestat_get",
    "path_filestat_set_times",
    "path_link",
    "path_open",
    "path_readlink",
    "path_remove_directory",
    "path_rename",
    "path_symlink",
    "path_unlink_file",
    "poll_oneoff",
    "proc_exit",
    "proc_raise",
    "random_get",
    "sched_yield",
    "sock_accept",
    "sock_recv",
    "sock_send",
    "sock_shutdown",
];

/// Interfaces of packages with their compatible version prefix.
const INTERFACES: [(&str, &str, &[&str]); 8] = [
    ("sandbar:task", "0.1.", &["context", "invoke", "log", "secrets", "types"]),
    (
        "wasi:cli",
        "0.2.",
        &[
            "environment",
            "exit",
            "stdin",
            "stdout",
            "stderr",
            "terminal-input",
            "terminal-output",
            "terminal-stdin",
            "terminal-stdout",
            "terminal-stderr",
        ],
    ),
    ("wasi:clocks", "0.2.", &["monotonic-clock", "wall-clock"]),
    ("wasi:filesystem", "0.2.", &["types", "preopens"]),
    ("wasi:io", "0.2.", &["error", "poll", "streams"]),
    ("wasi:random", "0.2.", &["random", "insecure", "insecure-seed"]),
    (
        "wasi:sockets",
        "0.2.",
        &[
            "instance-network",
            "ip-name-lookup",
            "network",
            "tcp",
            "tcp-create-socket",
            "udp",
            "udp-create-socket",
        ],
    ),
    ("wasi:http", "0.2.", &["types", "outgoing-handler"]),
];

/// Interfaces that are offered in one version only: drafts, which promise nothing from one to the next.
const DRAFTS: [&str; 5] = [
    "wasi:config/store@0.2.0-draft",
    "wasi:keyvalue/atomics@0.2.0-draft2",
    "wasi:keyvalue/batch@0.2.0-draft2",
    "wasi:keyvalue/store@0.2.0-draft2",
    "wasi:logging/logging@0.1.0-draft",
];

/// Whether a core module may import this function.
pub(super) fn p1_function(name: &str) -> bool {
    P1_FUNCTIONS.binary_search(&name).is_ok()
}

/// Whether a component may import this instance, for example `wasi:io/poll@0.2.3`.
pub(super) fn interface(name: &str) -> bool {
    if DRAFTS.contains(&name) {
        return true;
    }
    let Some((path, version)) = name.split_once('@') else {
        return false;
    };
    let Some((package, interface)) = path.split_once('/') else {
        return false;
    };
    INTERFACES.iter().any(|(offered, prefix, interfaces)| {
        *offered == package && compatible(version, prefix) && interfaces.contains(&interface)
    })
}

/// Whether an export is `wasi:cli/run` of a version this host can call.
pub(super) fn cli_run(name: &str) -> bool {
    name.strip_prefix("wasi:cli/run@").is_some_and(|version| compatible(version, "0.2."))
}

/// `0.2.<digits>`, no pre-releases: those made no promises.
fn compatible(version: &str, prefix: &str) -> bool {
    version
        .strip_prefix(prefix)
        .is_some_and(|patch| !patch.is_empty() && patch.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_preview_1_list_is_sorted_so_that_the_search_finds_all() {
        assert!(P1_FUNCTIONS.is_sorted());
        assert!(P1_FUNCTIONS.iter().all(|name| p1_function(name)));
        assert!(p1_function("sock_shutdown"));
        assert!(!p1_function("thread_spawn"));
    }

    #[test]
    fn only_offered_interfaces_of_compatible_versions_pass() {
        assert!(interface("wasi:io/poll@0.2.0"));
        assert!(interface("wasi:cli/stdin@0.2.12"));
        assert!(interface("sandbar:task/log@0.1.0"));
        assert!(interface("wasi:keyvalue/store@0.2.0-draft2"));
        for bad in [
            "wasi:io/poll@0.3.0",
            "wasi:io/poll@0.2.0-rc-2023",
            "wasi:io/poll",
            "wasi:nn/graph@0.2.0",
            "wasi:keyvalue/store@0.2.0-draft",
            "wasi:keyvalue/watcher@0.2.0-draft2",
            "wasi:http/incoming-handler@0.2.0",
            "evil:io/poll@0.2.0",
        ] {
            assert!(!interface(bad), "{bad}");
        }
    }
}
