//! Row-level security, from SQL and as the roles that the program uses: a table without it fails here.

use std::time::Duration;

use sqlx::{Connection as _, PgConnection};

use crate::support;

/// Tables that hold no tenant's data. A new table is either here or has `tenant_id` first in its key.
const SHARED: &[&str] =
    &["workers", "workers_gone", "leases", "duties", "late_acks", "plans", "_sqlx_migrations"];

#[tokio::test]
async fn every_tenant_table_is_keyed_by_tenant_and_forces_row_level_security() {
    let database = support::database().await;
    let admin = database.admin().await;
    let tables: Vec<(String, bool, bool, Option<String>)> = sqlx::query_as(
        "SELECT c.relname::text, c.relrowsecurity, c.relforcerowsecurity,
           (SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
            WHERE i.indrelid = c.oid AND i.indisprimary)
         FROM pg_class c WHERE c.relnamespace = 'sandbar'::regnamespace AND c.relkind IN ('r', 'p')",
    )
    .fetch_all(&admin)
    .await
    .unwrap();
    assert!(tables.len() > 15, "{tables:?}");
    for (name, enabled, forced, first) in tables {
        if SHARED.contains(&name.as_str()) {
            continue;
        }
        assert!(enabled && forced, "{name} does not force row-level security");
        assert_eq!(first.as_deref(), Some("tenant_id"), "key of {name}");
    }
}

#[tokio::test]
async fn the_api_role_sees_nothing_without_a_tenant_and_only_its_own_with_one() {
    let database = support::database().await;
    let admin = database.admin().await;
    for (tenant, name) in
        [("00000000-0000-0000-0000-00000000000a", "a"), ("00000000-0000-0000-0000-00000000000b", "b")]
    {
        for statement in [
            "INSERT INTO sandbar.tenants (tenant_id, name) VALUES ($1::uuid, $2)",
            "INSERT INTO sandbar.tasks (tenant_id, task_id, name) VALUES ($1::uuid, $1::uuid, $2)",
            "INSERT INTO sandbar.blobs (tenant_id, sha256, bytes) SELECT $1::uuid, sha256('m'), 'm' WHERE $2 <> ''",
        ] {
            sqlx::query(statement).bind(tenant).bind(name).execute(&admin).await.unwrap();
        }
    }
    let mut api = PgConnection::connect(&database.api_url()).await.unwrap();
    let count = "SELECT (SELECT count(*) FROM sandbar.tenants) + (SELECT count(*) FROM sandbar.tasks) + (SELECT count(*) FROM sandbar.blobs)";
    let seen: i64 = sqlx::query_scalar(count).fetch_one(&mut api).await.unwrap();
    assert_eq!(seen, 0, "without a tenant");
    for tenant in ["00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"] {
        sqlx::query("SELECT set_config('sandbar.tenant', $1, false)")
            .bind(tenant)
            .execute(&mut api)
            .await
            .unwrap();
        let seen: i64 = sqlx::query_scalar(count).fetch_one(&mut api).await.unwrap();
        assert_eq!(seen, 3, "as {tenant}");
    }
    let other = sqlx::query(
        "INSERT INTO sandbar.tasks (tenant_id, task_id, name) VALUES ('00000000-0000-0000-0000-00000000000a', gen_random_uuid(), 'x')",
    )
    .execute(&mut api)
    .await;
    assert!(other.is_err(), "wrote into another tenant");
    sqlx::query("SELECT set_config('sandbar.tenant', '', false)").execute(&mut api).await.unwrap();
    let seen: i64 = sqlx::query_scalar(count).fetch_one(&mut api).await.unwrap();
    assert_eq!(seen, 0, "after the reset");
}

#[tokio::test]
async fn the_roles_of_the_program_are_no_superusers_and_cannot_bypass_row_level_security() {
    let database = support::database().await;
    for url in [database.api_url(), database.worker_url()] {
        let mut connection = PgConnection::connect(&url).await.unwrap();
        let (who, session, powerful): (String, String, bool) = sqlx::query_as(
            "SELECT current_user::text, session_user::text,
               EXISTS (SELECT 1 FROM pg_roles WHERE rolname IN (current_user, session_user)
                       AND (rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb))",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap();
        assert_eq!(who, session);
        assert!(!powerful, "{who}");
        let keys = sqlx::query("SELECT hash FROM sandbar.api_keys").fetch_all(&mut connection).await;
        assert!(keys.is_err(), "{who} reads hashes of keys");
    }
}

#[tokio::test]
async fn a_tenant_connection_forgets_its_tenant_when_it_is_released() {
    use sandbar::domain::ids::TenantId;
    use sandbar::store::{ApiStore, Connect};
    let database = support::database().await;
    let api = ApiStore::connect(&Connect {
        url: database.api_url(),
        max_connections: 1, // the same connection every time
        acquire_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(5),
    })
    .await
    .unwrap();
    let tenant = TenantId::generate();
    let read = "SELECT current_setting('sandbar.tenant', true)";
    {
        let mut conn = api.tenant(tenant).await.unwrap();
        let set: String = sqlx::query_scalar(read).fetch_one(&mut *conn).await.unwrap();
        assert_eq!(set, tenant.to_string());
    }
    let mut listener = api.listener().await; // any plain use of the pool
    if let Ok(listener) = &mut listener {
        let set: Option<String> = sqlx::query_scalar(read).fetch_one(listener).await.unwrap();
        assert!(set.is_none_or(|s| s.is_empty()));
    }
}
