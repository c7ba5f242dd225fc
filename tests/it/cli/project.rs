//! From nothing to a result: a project that `sandbar new` makes, built, tested, pushed, invoked.

use std::path::Path;
use std::process::Command;

use super::{Person, Said};
use crate::support::{self, Deployment};

/// Shares the dependencies that the examples have built.
fn target_dir() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests").display().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_project_passes_its_own_tests_and_runs_on_a_server() {
    support::guest("word-count"); // its dependencies are then built and downloaded
    let deployment = Deployment::start(1).await;
    let mut person = Person::of(&deployment);
    person.set("CARGO_TARGET_DIR", target_dir());
    let made = person.run(&["new", "hello-there", "--json"]).expect(0).document();
    assert_eq!(made["name"], "hello-there");
    let project = person.dir().join("hello-there");
    for file in made["files"].as_array().unwrap() {
        assert!(project.join(file.as_str().unwrap()).is_file(), "{file}");
    }

    let tested = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--quiet"])
        .current_dir(&project)
        .env("CARGO_TARGET_DIR", target_dir())
        .env_remove("RUSTFLAGS")
        .output()
        .unwrap();
    Said::of(tested).expect(0);

    let built = person.run_in(&project, &["build", "--json"]).expect(0).document();
    assert_eq!((&built["kind"], &built["manifest"]["name"]), (&"task".into(), &"hello-there".into()));
    let module = built["path"].as_str().unwrap();
    assert_eq!(std::fs::metadata(module).unwrap().len(), built["size_bytes"].as_u64().unwrap());

    let input = r#"{"name": "Ada", "times": 2}"#;
    let ran = person.run_in(&project, &["run", module, "--input", input]).expect(0);
    let greeted = serde_json::json!({"lines": ["Hello, Ada!", "Hello, Ada!"]});
    assert_eq!(ran.document(), greeted);

    let pushed = person.run_in(&project, &["push"]).expect(0);
    assert_eq!(pushed.out, "hello-there version 1 is ready\n");
    let ended =
        person.run(&["invoke", "hello-there", "--input", input, "--wait", "--json"]).expect(0).document();
    assert_eq!(ended["result"]["json"], greeted);
    let id = ended["id"].as_str().unwrap();
    assert_eq!(person.run(&["get", id, "--result"]).expect(0).document(), greeted);
    assert!(person.run(&["get", id]).expect(0).out.contains("succeeded"));
    let logged = person.run(&["logs", id]).expect(0);
    assert!(logged.out.contains("info  greeted Ada") && logged.out.contains("attempt=1"), "{logged:?}");
    assert!(person.run(&["tasks", "show", "hello-there"]).expect(0).out.contains("Greets somebody."));
}

#[test]
fn what_cannot_become_a_project_is_refused_and_nothing_is_overwritten() {
    let person = Person::new();
    person.run(&["new", "Hello"]).expect(2);
    person.run(&["new", "match"]).expect(2);
    person.run(&["new", "hello", "--sdk", "nowhere"]).expect(3);
    std::fs::create_dir(person.dir().join("mine")).unwrap();
    std::fs::write(person.dir().join("mine/file"), "x").unwrap();
    let refused = person.run(&["new", "mine"]).expect(6);
    assert!(refused.err.contains("exists already"), "{refused:?}");
    assert_eq!(std::fs::read_dir(person.dir().join("mine")).unwrap().count(), 1);
}

#[test]
fn a_missing_project_and_a_missing_target_are_named_with_the_remedy() {
    let mut person = Person::new();
    let none = person.run(&["build"]).expect(3);
    assert!(none.err.contains("Cargo.toml") && none.err.contains("sandbar new"), "{none:?}");

    // A Rust without the target: the directory of libraries that it names is not there. A link,
    // because a program written here could be open for writing in a child that another test forks.
    person.run(&["new", "hello"]).expect(0);
    let bin = person.dir().join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink("/bin/echo", bin.join("rustc")).unwrap();
    person.set("PATH", format!("{}:/usr/bin:/bin", bin.display()));
    let missing = person.run_in(&person.dir().join("hello"), &["build"]).expect(1);
    assert!(missing.err.contains("rustup target add wasm32-wasip2"), "{missing:?}");
}
