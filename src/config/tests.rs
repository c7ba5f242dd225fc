#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use super::{Config, ConfigError, Isolation, LogFormat, Overrides, RANGES, Secret};

/// Loads from a file's text and variables, away from the machine's own environment.
fn load(
    file: Option<&str>,
    variables: &[(&str, &str)],
    overrides: &Overrides,
) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sandbar.toml");
    if let Some(text) = file {
        std::fs::write(&path, text).unwrap();
    }
    let variables: Vec<_> =
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Config::load_from(overrides, &variables, &path)
}

fn load_file(text: &str) -> Result<Config, ConfigError> {
    load(Some(text), &[], &Overrides::default())
}

fn load_env(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    load(None, variables, &Overrides::default())
}

#[test]
fn nothing_given_is_the_default_and_valid() {
    assert_eq!(load(None, &[], &Overrides::default()).unwrap(), Config::default());
}

#[test]
fn flags_win_over_environment_and_environment_over_file() {
    let file = "[worker]\nslots = 1\ncells = 1\nthreads_per_cell = 3\n[log]\nformat = \"json\"\n";
    let env =
        [("SANDBAR_WORKER__SLOTS", "20"), ("SANDBAR_WORKER__CELLS", "2"), ("SANDBAR_DATA_DIR", "/somewhere")];
    let flags = Overrides { slots: Some(300), ..Overrides::default() };
    let config = load(Some(file), &env, &flags).unwrap();
    assert_eq!(config.worker.slots, 300);
    assert_eq!(config.worker.cells, 2);
    assert_eq!(config.worker.threads_per_cell, 3);
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.data_dir, Path::new("/somewhere"));
    assert_eq!(config.worker.poll_ms, 1_000);
}

#[test]
fn an_unknown_key_in_the_file_is_named_with_its_file() {
    let error = load_file("[server]\nlistn = \"127.0.0.1:1\"\n").unwrap_err().to_string();
    assert!(error.contains("listn") && error.contains("sandbar.toml"), "{error}");
    let error = load_file("[sever]\nlisten = \"127.0.0.1:1\"\n").unwrap_err().to_string();
    assert!(error.contains("sever"), "{error}");
}

#[test]
fn an_unknown_key_in_the_environment_is_named() {
    let error = load_env(&[("SANDBAR_WORKER__SLOT", "3")]).unwrap_err().to_string();
    assert!(error.contains("slot") && error.contains("environment"), "{error}");
}

#[test]
fn a_single_underscore_after_the_section_is_caught() {
    let error = load_env(&[("SANDBAR_SERVER_LISTEN", "127.0.0.1:1")]).unwrap_err().to_string();
    assert!(error.contains("SANDBAR_SERVER__LISTEN"), "{error}");
}

#[test]
fn variables_of_commands_are_no_settings() {
    let env = [("SANDBAR_PG_BIN", "/x"), ("SANDBAR_URL", "http://x"), ("OTHER__KEY", "1")];
    assert_eq!(load_env(&env).unwrap(), Config::default());
}

#[test]
fn a_text_of_digits_in_the_environment_stays_a_text() {
    let config = load_env(&[("SANDBAR_SERVER__ADMIN_KEY", "00012345678901234567")]).unwrap();
    assert_eq!(config.server.admin_key, Some(Secret::new("00012345678901234567")));
}

#[test]
fn a_wrong_type_names_key_and_source() {
    let error = load_env(&[("SANDBAR_WORKER__SLOTS", "many")]).unwrap_err().to_string();
    assert!(error.contains("worker.slots") && error.contains("environment"), "{error}");
    let error = load_file("[log]\nformat = \"xml\"").unwrap_err().to_string();
    assert!(error.contains("log.format") && error.contains("json"), "{error}");
}

#[test]
fn broken_toml_is_an_error_that_names_the_file() {
    let error = load_file("[server").unwrap_err().to_string();
    assert!(error.contains("sandbar.toml"), "{error}");
}

#[test]
fn a_named_file_must_exist() {
    let flags = Overrides { config_file: Some("/nonexistent/sandbar.toml".into()), ..Overrides::default() };
    assert!(matches!(load(None, &[], &flags), Err(ConfigError::File { .. })));
    let error = load_env(&[("SANDBAR_CONFIG", "/nonexistent/other.toml")]).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/other.toml"), "{error}");
}

#[test]
fn both_ends_of_every_range_are_enforced() {
    for range in RANGES {
        let (section, field) = range.key.split_once('.').unwrap();
        let with = |value: u64| {
            // Keeps the rules between settings satisfied, so that only the range decides.
            let mut pairs = vec![
                ("worker.heartbeat_ms", 100),
                ("worker.slots", 4_096),
                ("worker.dead_after_ms", 600_000),
            ];
            pairs.retain(|(key, _)| *key != range.key);
            let mut text = format!("[{section}]\n{field} = {value}\n");
            for (key, value) in pairs {
                let (other, name) = key.split_once('.').unwrap();
                if other == section {
                    text.push_str(&format!("{name} = {value}\n"));
                }
            }
            load_file(&text)
        };
        let above = with(range.max + 1).expect_err(range.key).to_string();
        assert!(above.contains(range.key), "{above}");
        assert!(
            with(range.max).is_ok() || range.key == "worker.heartbeat_ms",
            "{}: {:?}",
            range.key,
            with(range.max)
        );
        assert!(with(range.min).is_ok(), "{}: {:?}", range.key, with(range.min));
        if range.min > 0 {
            let below = with(range.min - 1).expect_err(range.key).to_string();
            assert!(below.contains(range.key), "{below}");
        }
    }
}

#[test]
fn every_number_of_the_configuration_has_a_range() {
    // Debug output lists every field; a number is a field whose value starts with a digit.
    let text = format!("{:#?}", Config::default());
    let numbers = text
        .lines()
        .filter_map(|line| line.trim().trim_end_matches(',').split_once(": "))
        .filter(|(_, value)| value.chars().all(|c| c.is_ascii_digit()))
        .count();
    assert_eq!(numbers, RANGES.len());
}

#[test]
fn all_problems_are_reported_at_once() {
    let error =
        load_file("[worker]\nslots = 0\nheartbeat_ms = 5000\n[database]\nurl = \"mysql://me:hush@x\"\n")
            .unwrap_err();
    let text = error.to_string();
    for part in ["worker.slots", "worker.dead_after_ms", "database.url"] {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
    assert!(!text.contains("hush"), "{text}");
}

#[test]
fn secrets_do_not_show_in_debug_output() {
    let config = load_file(
        "[database]\nurl = \"postgres://a:hush@h/d\"\napi_url = \"postgres://b:hush@h/d\"\n\
         worker_url = \"postgres://c:hush@h/d\"\n[server]\nadmin_key = \"hush-hush-hush-hush\"\n",
    )
    .unwrap();
    let text = format!("{config:?} {config:#?}");
    assert!(!text.contains("hush"), "{text}");
    assert_eq!(config.database.url.unwrap().expose(), "postgres://a:hush@h/d");
}

#[test]
fn a_weak_admin_key_is_refused_without_being_shown() {
    for key in ["short", "with spaces in the middle"] {
        let error = load_env(&[("SANDBAR_SERVER__ADMIN_KEY", key)]).unwrap_err().to_string();
        assert!(error.contains("server.admin_key") && !error.contains(key), "{error}");
    }
}

#[test]
fn groups_of_tenants_are_read_from_file_and_environment_and_nobody_is_in_two() {
    let (one, two) = ("019a0000-0000-7000-8000-000000000001", "019a0000-0000-7000-8000-000000000002");
    let file =
        format!("[worker]\nisolation = \"tenant\"\n[worker.trust_groups]\na = [\"{one}\", \"{two}\"]\n");
    let config = load_file(&file).unwrap();
    assert_eq!(config.worker.isolation, Isolation::Tenant);
    assert_eq!(config.worker.trust_groups["a"].len(), 2);
    let same = load_env(&[
        ("SANDBAR_WORKER__ISOLATION", "tenant"),
        ("SANDBAR_WORKER__TRUST_GROUPS", &format!(r#"{{a=["{one}","{two}"]}}"#)),
    ]);
    assert_eq!(same.unwrap().worker, config.worker);
    let twice = format!("[worker.trust_groups]\na = [\"{one}\"]\nb = [\"{one}\"]\n");
    let error = load_file(&twice).unwrap_err().to_string();
    assert!(error.contains("worker.trust_groups") && error.contains(one), "{error}");
    let error = load_file("[worker.trust_groups]\na = [\"acme\"]\n").unwrap_err().to_string();
    assert!(error.contains("trust_groups"), "{error}");
}
