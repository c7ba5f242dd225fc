//! Profiles, completions, and what is found without any setting.

use std::os::unix::fs::PermissionsExt as _;

use super::Person;
use crate::support::{ADMIN_KEY, Deployment, Process, data_dir};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_profile_is_kept_for_its_owner_only_and_leads_to_its_server() {
    let deployment = Deployment::start(0).await;
    let person = Person::new();
    let set = ["profile", "set", "mine", "--server", &deployment.url()];
    let kept = person.run_with(&set, &format!("{ADMIN_KEY}\n")).expect(0);
    assert!(kept.out.is_empty() && !kept.err.contains(ADMIN_KEY), "{kept:?}");
    let file = person.dir().join("config/sandbar/profiles.toml");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    // The first profile is the one in use.
    person.run(&["tasks", "--json"]).expect(0);
    person.run_with(&["profile", "set", "other", "--server", "http://127.0.0.1:9"], "k").expect(0);
    person.run(&["tasks", "--profile", "other"]).expect(5);
    person.run(&["profile", "use", "other"]).expect(0);
    person.run(&["tasks"]).expect(5);
    let list = person.run(&["profile", "list", "--json"]).expect(0).documents();
    assert_eq!(list.len(), 2);
    assert!(list.iter().any(|p| p["name"] == "other" && p["current"] == true && p["has_key"] == true));
    assert!(!person.run(&["profile", "list"]).expect(0).out.contains(ADMIN_KEY));
    person.run(&["profile", "use", "none"]).expect(3);
    person.run(&["profile", "remove", "other"]).expect(0);
    person.run(&["profile", "remove", "other"]).expect(3);

    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let refused = person.run(&["profile", "list"]).expect(2);
    assert!(refused.err.contains("chmod 600"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn below_the_directory_of_sandbar_dev_nothing_needs_to_be_set() {
    let person = Person::new();
    let none = person.run(&["list"]).expect(5);
    assert!(none.err.contains("sandbar dev"), "{none:?}");

    let home = data_dir();
    let dir = home.path().join(".sandbar");
    let (dev, _client) = Process::dev(&dir).await;
    std::fs::write(dir.join("admin.key"), format!("{ADMIN_KEY}\n")).unwrap();
    let inner = home.path().join("some/project");
    std::fs::create_dir_all(&inner).unwrap();
    person.run_in(home.path(), &["list"]).expect(0);
    person.run_in(&inner, &["list"]).expect(0);
    person.run_in(&inner, &["list", "--profile", "dev"]).expect(0);
    assert!(dev.terminate().await.success());
    // It took its address with it.
    person.run_in(&inner, &["list"]).expect(5);
    assert!(!dir.join("address").exists());
}

#[test]
fn every_shell_gets_completions_that_know_the_commands() {
    let person = Person::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let said = person.run(&["completions", shell]).expect(0);
        assert!(said.out.contains("invoke") && said.out.contains("idempotency-key"), "{shell}");
        assert!(said.err.is_empty(), "{shell}");
    }
    let bash = person.run(&["completions", "bash"]).expect(0);
    let file = person.dir().join("completions");
    std::fs::write(&file, bash.out).unwrap();
    let checked = std::process::Command::new("bash").arg("-n").arg(&file).status().unwrap();
    assert!(checked.success());
}

#[test]
fn a_wrong_command_line_is_a_usage_error_and_help_is_not() {
    let person = Person::new();
    person.run(&["nothing"]).expect(2);
    person.run(&["invoke"]).expect(2);
    let help = person.run(&["--help"]).expect(0);
    assert!(help.out.contains("Exit codes") && !help.out.contains('\x1b'), "{help:?}");
    assert!(person.run(&["--version"]).expect(0).out.starts_with("sandbar "));
}
