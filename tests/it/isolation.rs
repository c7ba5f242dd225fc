//! Row-level security, from SQL and as the roles that the program uses: a table without it fails here.

use std::time::Duration;

use sqlx::{Connection as _, PgConnection};

use crate::support;

/// Tables that hold no tenant's data. A new table is either here or has `tenant_id` first in its key.
const SHARED: &[&str] = &[
    "workers",
    "workers_gone",
    "leases",
    "duties",
    "late_acks",
    "plans",
    "_sqlx_migrations",
    // Nobody of the program's roles reads these but through functions.
    "users",
    "sessions",
    "refresh_tokens",
    "login_failures",
    "password_resets",
    "issuer_keys",
];

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
    database.as_released().await;
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

/// All other tests run with this, so that a query of the program that forgets the tenant fails there.
#[tokio::test]
async fn in_tests_a_query_without_a_tenant_is_an_error_and_says_so() {
    let database = support::database().await;
    let admin = database.admin().await;
    sqlx::query("INSERT INTO sandbar.tenants (tenant_id, name) VALUES (gen_random_uuid(), 'a')")
        .execute(&admin)
        .await
        .unwrap();
    let mut api = PgConnection::connect(&database.api_url()).await.unwrap();
    for set in ["", "SELECT set_config('sandbar.tenant', '', false)"] {
        sqlx::raw_sql(set).execute(&mut api).await.unwrap();
        let seen = sqlx::query("SELECT name FROM sandbar.tenants").fetch_all(&mut api).await;
        assert!(seen.unwrap_err().to_string().contains("no tenant is set"));
    }
    database.as_released().await;
    let seen = sqlx::query("SELECT name FROM sandbar.tenants").fetch_all(&mut api).await.unwrap();
    assert!(seen.is_empty());
}

/// A value for a column that must have one.
fn filler(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "uuid" => "gen_random_uuid()",
        "text" => "'x'",
        "bytea" => "sha256('x')",
        "int2" | "int4" | "int8" => "1",
        "bool" => "true",
        "float8" | "numeric" => "1",
        "jsonb" => "'{}'::jsonb",
        "timestamptz" => "now()",
        "date" => "current_date",
        "interval" => "interval '1 s'",
        "inet" => "'127.0.0.1'::inet",
        _ if kind.starts_with('_') => "'{}'",
        _ => return None,
    })
}

/// Every tenant table, one after the other: a row of each of two tenants is put in, and the API's role sees and reaches
/// only the one of the tenant that is set. A table that the API may not touch at all passes as well.
#[tokio::test]
async fn in_every_tenant_table_the_api_role_reaches_the_rows_of_its_tenant_and_no_others() {
    let database = support::database().await;
    database.as_released().await;
    let admin = database.admin().await;
    support::drop_rules(&admin).await;
    let tables: Vec<(String,)> = sqlx::query_as(
        "SELECT c.relname::text FROM pg_class c
         WHERE c.relnamespace = 'sandbar'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
           AND EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id') ORDER BY 1",
    )
    .fetch_all(&admin)
    .await
    .unwrap();
    let tenants = ["00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"];
    let mut api = PgConnection::connect(&database.api_url()).await.unwrap();
    for (table,) in &tables {
        let columns: Vec<(String, String, String)> = sqlx::query_as(
            "SELECT a.attname::text, t.typname::text, CASE WHEN a.attidentity <> '' OR a.attgenerated <> '' THEN 'made' ELSE '' END
             FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
             WHERE a.attrelid = ('sandbar.' || $1)::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attnotnull
               AND a.attname <> 'tenant_id'",
        )
        .bind(table)
        .fetch_all(&admin)
        .await
        .unwrap();
        let (mut names, mut values) = (vec!["tenant_id".to_owned()], vec!["$1::uuid".to_owned()]);
        for (name, kind, made) in columns {
            if made.is_empty() {
                let value = filler(&kind).unwrap_or_else(|| panic!("no filler for {kind} of {table}.{name}"));
                // A unique column needs another value in each row.
                let value = if kind == "text" {
                    "$1"
                } else if kind == "bytea" {
                    "sha256(convert_to($1, 'UTF8'))"
                } else {
                    value
                };
                names.push(name);
                values.push(value.to_owned());
            }
        }
        let insert =
            format!("INSERT INTO sandbar.{table} ({}) VALUES ({})", names.join(", "), values.join(", "));
        for tenant in tenants {
            sqlx::query(&insert.replace("$1::uuid", "($1::text)::uuid").replace("($1,", "($1::text,"))
                .bind(tenant)
                .execute(&admin)
                .await
                .unwrap_or_else(|error| panic!("{insert}: {error}"));
        }
        for (tenant, expected) in [("", 0i64), (tenants[0], 1), (tenants[1], 1), ("", 0)] {
            sqlx::query("SELECT set_config('sandbar.tenant', $1, false)")
                .bind(tenant)
                .execute(&mut api)
                .await
                .unwrap();
            let seen = sqlx::query_scalar::<_, i64>(&format!("SELECT count(tenant_id) FROM sandbar.{table}"))
                .fetch_one(&mut api)
                .await;
            let Ok(seen) = seen else { continue }; // no right to the table at all
            assert_eq!(seen, expected, "{table} as tenant {tenant:?}");
            let others = sqlx::query_scalar::<_, i64>(&format!(
                "SELECT count(*) FROM (SELECT tenant_id FROM sandbar.{table} WHERE tenant_id::text <> $1) t"
            ))
            .bind(tenant)
            .fetch_one(&mut api)
            .await
            .unwrap();
            assert_eq!(others, 0, "{table} as tenant {tenant:?}");
            // Deleting, where it may: in a transaction that is taken back.
            sqlx::query("BEGIN").execute(&mut api).await.unwrap();
            let deleted = sqlx::query(&format!("DELETE FROM sandbar.{table}")).execute(&mut api).await;
            sqlx::query("ROLLBACK").execute(&mut api).await.unwrap();
            if let Ok(deleted) = deleted {
                assert_eq!(
                    i64::try_from(deleted.rows_affected()).unwrap(),
                    expected,
                    "{table} as {tenant:?}"
                );
            }
        }
    }
    assert!(tables.len() > 15, "{tables:?}");
}

#[tokio::test]
async fn no_policy_is_for_everybody_and_the_apis_are_all_about_its_tenant() {
    let database = support::database().await;
    let admin = database.admin().await;
    type Policy = (String, String, Vec<String>, Option<String>, Option<String>);
    let policies: Vec<Policy> = sqlx::query_as(
        "SELECT tablename::text, policyname::text, roles::text[], qual, with_check FROM pg_policies WHERE schemaname = 'sandbar'",
    )
    .fetch_all(&admin)
    .await
    .unwrap();
    assert!(policies.len() > 40);
    for (table, policy, roles, using, check) in policies {
        assert!(!roles.iter().any(|r| r == "public"), "{policy} on {table} is for everybody");
        if roles.iter().any(|r| r == "sandbar_api") {
            for expression in [using, check].into_iter().flatten() {
                assert!(
                    expression.contains("tenant_id = current_tenant()"),
                    "{policy} on {table}: {expression}"
                );
                assert!(!expression.contains(" OR "), "{policy} on {table}: {expression}");
            }
        }
    }
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

/// Of few connections, so that uses meet.
async fn small_pool() -> sandbar::store::ApiStore {
    let connect = sandbar::store::Connect {
        url: support::database().await.api_url(),
        max_connections: 4,
        acquire_timeout: Duration::from_secs(20),
        statement_timeout: Duration::from_secs(5),
    };
    sandbar::store::ApiStore::connect(&connect).await.unwrap()
}

#[tokio::test]
async fn connections_between_uses_never_carry_a_tenant_or_a_transaction_over_to_another() {
    use sandbar::domain::ids::TenantId;
    let api = small_pool().await;
    let tenants = [TenantId::generate(), TenantId::generate(), TenantId::generate()];
    let uses = (0..400usize).map(|n| {
        let (api, tenant) = (api.clone(), tenants[n * 7 % 3]);
        tokio::spawn(async move {
            let mut conn = api.tenant(tenant).await.unwrap();
            let read = "SELECT current_setting('sandbar.tenant', true), current_setting('application_name')";
            let (set, name): (String, String) = sqlx::query_as(read).fetch_one(&mut *conn).await.unwrap();
            assert_eq!(set, tenant.to_string());
            assert_eq!(name, "sandbar", "what an earlier transaction set is still set");
            match n % 4 {
                // A request that is given up in the middle of a statement.
                0 => {
                    let sleep = sqlx::query("SELECT pg_sleep(0.02)").execute(&mut *conn);
                    let _ = tokio::time::timeout(Duration::from_millis(2), sleep).await;
                }
                // One that leaves a transaction open.
                1 => {
                    let mut left = conn.begin().await.unwrap();
                    sqlx::query("SET LOCAL application_name = 'left'").execute(&mut *left).await.unwrap();
                }
                _ => {}
            }
        })
    });
    for one in uses.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    // Whatever was left behind, everything can be had again.
    let all = futures_util::future::join_all((0..4).map(|_| api.tenant(tenants[0]))).await;
    assert!(all.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_tenants_next_use_finds_a_connection_as_it_left_it_and_another_tenants_does_not() {
    use sandbar::domain::ids::TenantId;
    let api = small_pool().await;
    let (tenant, other) = (TenantId::generate(), TenantId::generate());
    let read = "SELECT current_setting('sandbar.tenant', true)";
    // Whatever sets the tenant anew takes this away; in earnest nobody but the store sets it.
    let mark = format!("{tenant}-kept");
    support::eventually(Duration::from_secs(20), "a use without setting the tenant anew", async || {
        let mut conn = api.tenant(tenant).await.unwrap();
        let set: String = sqlx::query_scalar(read).fetch_one(&mut *conn).await.unwrap();
        sqlx::query("SELECT set_config('sandbar.tenant', $1, false)")
            .bind(&mark)
            .execute(&mut *conn)
            .await
            .unwrap();
        (set == mark).then_some(())
    })
    .await;
    for _ in 0..20 {
        let mut conn = api.tenant(other).await.unwrap();
        let set: String = sqlx::query_scalar(read).fetch_one(&mut *conn).await.unwrap();
        assert_eq!(set, other.to_string());
    }
}
