//! One Postgres for all tests of a run, and a fresh, migrated database for each of them.
//!
//! The server lives on a thread of its own, because a test's runtime ends with the test. Rust drops no statics, so
//! two watchers clean up when this process ends, however it ends: the one of the embedded Postgres stops the
//! server, and ours then removes the directory.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::str::FromStr as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sandbar::dev::{EmbeddedPostgres, Login};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tempfile::TempDir;

/// Longest migration.
const MIGRATION: Duration = Duration::from_secs(60);

/// Removes a directory once our end of its input is closed and no server uses the cluster any more.
const REMOVE: &str = r#"
read -r _
n=0
while [ -e "$1/pg/postmaster.pid" ] && [ "$n" -lt 200 ]; do
    sleep 0.1
    n=$((n + 1))
done
rm -rf -- "$1"
"#;

/// A directory that the user Postgres runs as can reach, removed at the end.
pub fn data_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("sandbar-it-")
        .permissions(std::fs::Permissions::from_mode(0o711))
        .tempdir()
        .unwrap()
}

struct Shared {
    postgres: EmbeddedPostgres,
    /// Holding its input keeps the directory.
    _remover: Child,
}

static SHARED: OnceLock<Shared> = OnceLock::new();
static STARTED: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The server of this run; its database `sandbar` is migrated and the template of all others.
async fn shared() -> &'static EmbeddedPostgres {
    let _one_at_a_time = STARTED.lock().await;
    if SHARED.get().is_none() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let dir = data_dir().keep();
                let remover = Command::new("/bin/sh")
                    .args(["-c", REMOVE, "sandbar-it-remover"])
                    .arg(&dir)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                let postgres = prepared(&dir).await;
                assert!(sender.send(Shared { postgres, _remover: remover }).is_ok());
                // The server's supervisor runs here until the process ends.
                std::future::pending::<()>().await;
            });
        });
        let shared = receiver.await.expect("the shared Postgres did not start");
        assert!(SHARED.set(shared).is_ok());
    }
    &SHARED.get().unwrap().postgres
}

async fn prepared(dir: &Path) -> EmbeddedPostgres {
    let postgres = EmbeddedPostgres::start(dir).await.unwrap();
    sandbar::store::migrate(postgres.admin_url().expose(), MIGRATION).await.unwrap();
    postgres.set_role_passwords().await.unwrap();
    insist_on_a_tenant(postgres.admin_url().expose()).await;
    postgres
}

/// Takes every check, foreign key and trigger away: rows made of fillers keep no rule but those under test.
pub async fn drop_rules(admin: &PgPool) {
    sqlx::raw_sql(
        "DO $$ DECLARE c record; BEGIN
           FOR c IN SELECT conrelid::regclass AS t, conname FROM pg_constraint
             WHERE connamespace = 'sandbar'::regnamespace AND contype IN ('c', 'f') ORDER BY contype DESC LOOP
             EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', c.t, c.conname);
           END LOOP;
           FOR c IN SELECT tgrelid::regclass AS t, tgname FROM pg_trigger g JOIN pg_class r ON r.oid = g.tgrelid
             WHERE NOT tgisinternal AND r.relnamespace = 'sandbar'::regnamespace LOOP
             EXECUTE format('DROP TRIGGER %I ON %s', c.tgname, c.t);
           END LOOP;
         END $$",
    )
    .execute(admin)
    .await
    .unwrap();
}

/// In tests a query of tenant data on a connection without a tenant is an error, and not merely empty: whoever forgot to set
/// one hears of it. As released it sees nothing; the function's comment keeps that form for [`Database::as_released`].
async fn insist_on_a_tenant(admin_url: &str) {
    let pool = PgPoolOptions::new().max_connections(1).connect(admin_url).await.unwrap();
    let released: String = sqlx::query_scalar("SELECT pg_get_functiondef('sandbar.current_tenant'::regproc)")
        .fetch_one(&pool)
        .await
        .unwrap();
    for statement in [
        "CREATE OR REPLACE FUNCTION sandbar.current_tenant() RETURNS uuid LANGUAGE plpgsql STABLE PARALLEL SAFE AS $f$
         BEGIN
           IF COALESCE(current_setting('sandbar.tenant', true), '') = '' THEN RAISE EXCEPTION 'no tenant is set'; END IF;
           RETURN current_setting('sandbar.tenant')::uuid;
         END $f$"
            .to_owned(),
        format!("COMMENT ON FUNCTION sandbar.current_tenant IS $c${released}$c$"),
    ] {
        sqlx::raw_sql(&statement).execute(&pool).await.unwrap();
    }
    pool.close().await;
}

/// A database of its own, as each role of the program reaches it.
#[derive(Debug, Clone)]
pub struct Database {
    name: String,
    admin_url: String,
    api_url: String,
    worker_url: String,
}

/// A fresh, migrated database on the shared server. It goes with the server at the end of the run.
pub async fn database() -> Database {
    fresh(shared().await).await
}

/// A fresh, migrated database on a given server, as long as nobody is connected to its database `sandbar`.
pub async fn fresh(postgres: &EmbeddedPostgres) -> Database {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let maintenance = PgConnectOptions::from_str(postgres.url(Login::Admin, "postgres").expose()).unwrap();
    let pool = PgPoolOptions::new().max_connections(1).connect_with(maintenance).await.unwrap();
    sqlx::raw_sql(&format!("CREATE DATABASE {name} TEMPLATE sandbar")).execute(&pool).await.unwrap();
    pool.close().await;
    Database::of(postgres, &name)
}

/// A server for one test alone, which may kill it: `pid()` says whom, and it comes back by itself. Migrated.
/// `stop()` it at the end; a test that fails may forget to.
pub async fn own_postgres() -> (EmbeddedPostgres, Database, TempDir) {
    let dir = data_dir();
    let postgres = prepared(dir.path()).await;
    let database = Database::of(&postgres, "sandbar");
    (postgres, database, dir)
}

impl Database {
    fn of(postgres: &EmbeddedPostgres, name: &str) -> Self {
        let url = |login| postgres.url(login, name).expose().to_owned();
        Self {
            name: name.to_owned(),
            admin_url: url(Login::Admin),
            api_url: url(Login::Api),
            worker_url: url(Login::Worker),
        }
    }

    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The owner of the schema.
    pub fn admin_url(&self) -> String {
        self.admin_url.clone()
    }

    /// Role `sandbar_api`.
    pub fn api_url(&self) -> String {
        self.api_url.clone()
    }

    /// Role `sandbar_worker`.
    pub fn worker_url(&self) -> String {
        self.worker_url.clone()
    }

    /// Without a tenant nothing is seen, as in every installation; tests insist on one otherwise.
    pub async fn as_released(&self) {
        let admin = self.admin().await;
        let released: String =
            sqlx::query_scalar("SELECT obj_description('sandbar.current_tenant'::regproc, 'pg_proc')")
                .fetch_one(&admin)
                .await
                .unwrap();
        sqlx::raw_sql(&released).execute(&admin).await.unwrap();
    }

    /// A small pool as superuser, for whom row-level security does not hold.
    pub async fn admin(&self) -> PgPool {
        PgPoolOptions::new().max_connections(4).connect(&self.admin_url).await.unwrap()
    }
}
