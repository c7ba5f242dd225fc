//! Commands about people, tenants and what they did: each for people and with `--json`, and no secret where none belongs.

use serde_json::{Value, json};

use super::{Person, Said};
use crate::support::{self, Database, Deployment};

const PASSWORD: &str = "correct horse battery";
const MASTER_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

/// Whoever runs the server: knows the database, and no key.
fn operator(database: &Database) -> Person {
    let mut person = Person::new();
    person.set("SANDBAR_DATABASE__URL", database.admin_url());
    person
}

/// Writes a file in the home of a person, and says where.
fn file(person: &Person, name: &str, text: &str) -> String {
    let path = person.dir().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// Who has no key yet, and logs in.
fn log_in(url: &str, email: &str, password: &str, rest: &[&str]) -> (Person, Said) {
    let person = Person::new();
    let mut args = vec!["login", email, "--server", url];
    args.extend(rest);
    let said = person.run_with(&args, &format!("{password}\n"));
    (person, said)
}

/// What somebody types who was invited.
fn accept<'a>(url: &'a str, name: &'a str, token: &'a str, password: &'a str) -> [&'a str; 10] {
    ["user", "accept", "--server", url, "--name", name, "--token-file", token, "--password-file", password]
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("no {field} in {value}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_are_made_invited_changed_and_removed_and_log_in_without_a_browser() {
    let deployment = Deployment::start(0).await;
    let (url, operator) = (deployment.url(), operator(&deployment.database));
    let root = ["user", "create-admin", "Root@example.org", "--name", "Root"];
    let said = operator.run_with(&root, PASSWORD).expect(0);
    assert!(said.out.contains("root@example.org") || said.out.contains("Root@example.org"), "{said:?}");
    assert!(!said.out.contains(PASSWORD) && !said.err.contains(PASSWORD));
    operator.run_with(&["user", "create-admin", "root@example.org"], "short").expect(1);
    let made = operator
        .run_with(&["user", "create-admin", "eve@example.org", "--role", "admin", "--json"], PASSWORD);
    assert_eq!(
        made.expect(0).document(),
        json!({"email": "eve@example.org", "tenant": "default", "role": "admin"})
    );

    // Neither a browser nor a terminal: the password comes from standard input or from a file, and stays nowhere.
    let (root, said) = log_in(&url, "root@example.org", PASSWORD, &[]);
    assert!(said.expect(0).out.contains("logged in to default"));
    let profiles =
        std::fs::read_to_string(root.dir().join("config/sandbar/profiles.toml")).unwrap_or_default();
    assert!(!profiles.contains(PASSWORD));
    root.run(&["user", "list"]).expect(0);
    let eve = Person::new();
    let password = file(&eve, "password", PASSWORD);
    let said = eve
        .run(&[
            "login",
            "eve@example.org",
            "--server",
            &url,
            "--password-file",
            &password,
            "--profile",
            "work",
            "--json",
        ])
        .expect(0);
    let document = said.document();
    assert_eq!(
        (&document["profile"], &document["acts_in"]["role"]),
        (&json!("work"), &json!("admin")),
        "{document}"
    );
    assert!(!said.out.contains("sbk_") && !said.err.contains("sbk_"), "{said:?}");
    let (_, refused) = log_in(&url, "eve@example.org", "wrong password", &["--json"]);
    assert_eq!(refused.expect(4).error()["problem"]["code"], "login-failed");

    let token = eve.run(&["user", "invite", "bob@example.org", "--role", "viewer"]).expect(0);
    assert!(token.out.trim().starts_with("sbi_") && token.err.contains("sandbar user accept"), "{token:?}");
    let open = eve.run(&["user", "invitations"]).expect(0).out;
    assert!(open.contains("bob@example.org") && open.contains("open, ends"), "{open}");
    let bob = Person::new();
    let (token, password) = (file(&bob, "token", token.out.trim()), file(&bob, "password", PASSWORD));
    let accept = accept(&url, "Bob", &token, &password);
    assert!(bob.run(&accept).expect(0).out.contains("member of default"));
    bob.run(&accept).expect(3);
    let listed = eve.run(&["user", "list", "--json"]).expect(0).documents();
    let id = listed
        .iter()
        .find(|one| one["email"] == "bob@example.org")
        .map(|one| text(one, "id").to_owned())
        .unwrap();
    assert!(eve.run(&["user", "list"]).expect(0).out.contains("bob@example.org"));
    assert!(eve.run(&["user", "update", &id, "--role", "operator"]).expect(0).out.contains("operator"));
    let changed = eve.run(&["user", "update", &id, "--role", "developer", "--json"]).expect(0).document();
    assert_eq!(changed["role"], "developer");
    eve.run(&["user", "update", &id, "--role", "owner"]).expect(4);
    assert_eq!(eve.run(&["user", "remove", &id, "--json"]).expect(0).document(), json!({"removed": id}));
    eve.run(&["user", "remove", &id]).expect(3);
    let invited = ["user", "invite", "carl@example.org", "--role", "viewer", "--json"];
    let invited = eve.run(&invited).expect(0).document();
    let invitation = text(&invited["invitation"], "id");
    let lines = eve.run(&["user", "invitations", "--json"]).expect(0).documents();
    assert!(lines.iter().any(|line| line["id"] == *invitation));
    assert!(eve.run(&["user", "uninvite", invitation]).expect(0).out.contains("taken back"));
    eve.run(&["user", "uninvite", invitation]).expect(3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logging_out_revokes_the_key_of_the_login_and_forgets_it_and_no_other_key() {
    let deployment = Deployment::start(0).await;
    let (url, operator) = (deployment.url(), operator(&deployment.database));
    operator.run_with(&["user", "create-admin", "ada@example.org", "--role", "viewer"], PASSWORD).expect(0);
    let (ada, said) = log_in(&url, "ada@example.org", PASSWORD, &[]);
    said.expect(0);
    let kept = ada.dir().join("config/sandbar/profiles.toml");
    let profiles = || std::fs::read_to_string(&kept).unwrap();
    let before = profiles();
    let key = before.split('"').find(|part| part.starts_with("sbk_")).unwrap().to_owned();
    ada.run(&["key", "whoami"]).expect(0);

    let said = ada.run(&["logout"]).expect(0);
    assert!(said.out.contains("logged out of profile default; its key is revoked"), "{said:?}");
    assert!(said.err.contains(&format!("sandbar login EMAIL --server {url} --profile default")), "{said:?}");
    assert!(!profiles().contains("sbk_") && profiles().contains(&url), "{}", profiles());
    ada.run(&["key", "whoami"]).expect(4);
    // Not only forgotten here: whoever copied it has nothing.
    let mut thief = Person::new();
    thief.set("SANDBAR_URL", &url);
    thief.set("SANDBAR_API_KEY", &key);
    thief.run(&["key", "whoami"]).expect(4);
    ada.run(&["logout"]).expect(3);

    let password = file(&ada, "password", PASSWORD);
    let again =
        ["login", "ada@example.org", "--server", &url, "--password-file", &password, "--profile", "work"];
    ada.run(&again).expect(0);
    let said = ada.run(&["logout", "--profile", "work", "--json"]).expect(0).document();
    assert_eq!(said, json!({"profile": "work", "server": url, "ended": true}));
    // One that somebody revoked meanwhile is forgotten all the same.
    ada.run(&again).expect(0);
    let admin = Person::of(&deployment);
    let keys = admin.run(&["key", "list", "--json"]).expect(0).documents();
    let own = keys.iter().find(|key| text(key, "name").starts_with("sandbar login of ada")).unwrap();
    admin.run(&["key", "revoke", text(own, "id")]).expect(0);
    let said = ada.run(&["logout", "--json"]).expect(0).document();
    assert_eq!(said["ended"], false);
    assert!(!profiles().contains("sbk_"));

    // A key that nobody logged in for is a program's, perhaps in use elsewhere.
    let program = file(&ada, "key", support::ADMIN_KEY);
    ada.run(&["profile", "set", "ci", "--server", &url, "--key-file", &program]).expect(0);
    let refused = ada.run(&["logout", "--profile", "ci", "--json"]).expect(6).error();
    assert_eq!(refused["problem"]["code"], "no-user");
    assert!(profiles().contains(support::ADMIN_KEY));
    admin.run(&["key", "whoami"]).expect(0);
    // A server that cannot be reached has revoked nothing.
    ada.run(&["profile", "set", "ci", "--server", "http://127.0.0.1:9", "--key-file", &program]).expect(0);
    ada.run(&["logout", "--profile", "ci"]).expect(5);
    assert!(profiles().contains(support::ADMIN_KEY));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_password_is_replaced_by_a_token_from_an_admin_or_from_the_server() {
    let deployment = Deployment::start(0).await;
    let (url, operator) = (deployment.url(), operator(&deployment.database));
    let admin = Person::of(&deployment);
    operator
        .run_with(&["user", "create-admin", "ada@example.org", "--role", "developer"], PASSWORD)
        .expect(0);
    operator.run(&["user", "reset", "nobody@example.org"]).expect(1);
    admin.run(&["user", "reset-token", "nobody@example.org"]).expect(3);

    let by_admin = admin.run(&["user", "reset-token", "ada@example.org"]).expect(0);
    assert!(by_admin.err.contains("sandbar user new-password"), "{by_admin:?}");
    let by_admin_json = admin.run(&["user", "reset-token", "ada@example.org", "--json"]).expect(0).document();
    let on_server = operator.run(&["user", "reset", "Ada@example.org"]).expect(0).out;
    let on_server_json = operator.run(&["user", "reset", "ada@example.org", "--json"]).expect(0).document();
    assert_eq!(on_server_json["email"], "ada@example.org");
    // Each took the place of the one before.
    let ada = Person::new();
    let use_it = |token: &str, password: &str, rest: &[&str]| {
        let (token, password) = (file(&ada, "token", token.trim()), file(&ada, "password", password));
        let mut args = vec!["user", "new-password", "--server", &url, "--token-file", &token];
        args.extend(["--password-file", &password]);
        args.extend(rest);
        ada.run(&args)
    };
    for old in [by_admin.out.as_str(), text(&by_admin_json, "token"), &on_server] {
        use_it(old, "the second password", &[]).expect(3);
    }
    let said = use_it(text(&on_server_json, "token"), "the second password", &[]).expect(0);
    assert!(said.out.contains("the password is set"), "{said:?}");
    log_in(&url, "ada@example.org", PASSWORD, &[]).1.expect(4);
    log_in(&url, "ada@example.org", "the second password", &[]).1.expect(0);
    let token = admin.run(&["user", "reset-token", "ada@example.org"]).expect(0).out;
    use_it(&token, "short", &[]).expect(6);
    assert_eq!(
        use_it(&token, "the third password", &["--json"]).expect(0).document(),
        json!({"password": "set"})
    );
    log_in(&url, "ada@example.org", "the third password", &[]).1.expect(0);
    let log = admin.run(&["audit", "--export"]).expect(0).out;
    assert!(log.contains("sandbar user reset") && !log.contains(token.trim()), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_are_made_suspended_and_deleted_and_the_audit_log_tells_of_it() {
    let settings = [("SANDBAR_SECRETS__MASTER_KEY", MASTER_KEY.to_owned())];
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let (url, platform) = (deployment.url(), Person::of(&deployment));
    let made = platform.run(&["tenant", "create", "acme", "--owner", "o@example.org"]).expect(0);
    assert!(made.err.contains("acme is made") && made.out.trim().starts_with("sbi_"), "{made:?}");
    platform.run(&["tenant", "create", "acme"]).expect(6);
    let second = platform.run(&["tenant", "create", "other", "--json"]).expect(0).document();
    assert_eq!(second["tenant"]["state"], "active");
    let owner = Person::new();
    let (token, password) = (file(&owner, "token", made.out.trim()), file(&owner, "password", PASSWORD));
    let accept = [&accept(&url, "O", &token, &password)[..], &["--json"]].concat();
    assert_eq!(owner.run(&accept).expect(0).document()["role"], "owner");
    let login = ["login", "o@example.org", "--server", &url, "--password-file", &password];
    owner.run(&login).expect(0);
    owner.run(&["tenant", "list"]).expect(4);

    let listed = platform.run(&["tenant", "list", "--json"]).expect(0).documents();
    assert_eq!(listed.iter().map(|one| text(one, "name")).collect::<Vec<_>>(), ["acme", "default", "other"]);
    assert!(platform.run(&["tenant", "list"]).expect(0).out.contains("acme"));
    assert!(platform.run(&["tenant", "suspend", "acme", "--cancel"]).expect(0).out.contains("is suspended"));
    assert_eq!(platform.run(&["tenant", "resume", "acme", "--json"]).expect(0).document()["state"], "active");
    platform.run(&["tenant", "suspend", "nobody"]).expect(3);
    platform.run(&["tenant", "delete", "other"]).expect(2);
    let going =
        platform.run(&["tenant", "delete", "other", "--yes", "--grace", "1h", "--json"]).expect(0).document();
    assert!(going["state"] == "deleting" && going["delete_after"].is_string(), "{going}");
    assert!(platform.run(&["tenant", "resume", "other"]).expect(0).out.contains("is active"));
    assert_eq!(
        platform.run(&["tenant", "suspend", "other", "--json"]).expect(0).document()["state"],
        "suspended"
    );
    let erased = platform.run(&["tenant", "erase-key", "other", "--yes", "--json"]).expect(0).document();
    assert_eq!(erased, json!({"erased": "other"}));

    let said = owner.run_with(&["secret", "set", "TOKEN", "--json"], "hush\n").expect(0);
    assert_eq!(said.document()["version"], 1);
    assert!(owner.run(&["secret", "list"]).expect(0).out.contains("TOKEN"));
    assert_eq!(owner.run(&["secret", "list", "--json"]).expect(0).document()["name"], "TOKEN");
    assert_eq!(
        owner.run(&["secret", "delete", "TOKEN", "--json"]).expect(0).document(),
        json!({"deleted": "TOKEN"})
    );
    for args in [vec!["usage", "--json"], vec!["usage", "--group", "hour,task"], vec!["usage", "--csv"]] {
        owner.run(&args).expect(0);
    }

    // Denials are collected for a moment before they are written.
    let log = support::eventually(std::time::Duration::from_secs(20), "the denial in the log", async || {
        Some(owner.run(&["audit"]).expect(0).out).filter(|log| log.contains("denied: forbidden"))
    })
    .await;
    assert!(log.contains("PUT /v1/secrets/TOKEN") && log.contains("done"), "{log}");
    let denied = owner.run(&["audit", "--denied", "--json"]).expect(0).documents();
    assert!(!denied.is_empty() && denied.iter().all(|entry| entry["outcome"] == "denied"), "{denied:?}");
    let of_secrets =
        owner.run(&["audit", "--target", "/v1/secrets", "--since", "1h", "--json"]).expect(0).documents();
    assert_eq!(of_secrets.len(), 2, "{of_secrets:?}");
    let all = owner.run(&["audit", "--export"]).expect(0);
    assert!(
        all.documents().len() >= 3 && !all.out.contains("hush") && !all.out.contains("acme is"),
        "{all:?}"
    );
    // Another tenant's log is another's, and what the platform did is in the installation's.
    let theirs = platform.run(&["audit", "--installation", "--export"]).expect(0).out;
    assert!(theirs.contains("/v1/tenants") && !theirs.contains("/v1/secrets/TOKEN"), "{theirs}");
}
