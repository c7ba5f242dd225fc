//! With a million rows ready: claims go by their index, and what is gone costs nothing. Counted in pages and rows, never
//! in time.

use super::*;

/// Rows of one tenant.
const MANY: i64 = 1_000_000;

/// Pages that `statement` touches, by its plan as executed; then undone.
async fn pages(f: &Fixture, statement: &str) -> (i64, String) {
    let mut tx = f.admin.begin().await.unwrap();
    sqlx::raw_sql("SET LOCAL search_path = sandbar").execute(&mut *tx).await.unwrap();
    // Some times before, so that neither plans nor the catalogue are counted, and the plan is the one that a connection
    // comes to in the end: from the sixth time on it knows nothing of the arguments.
    for _ in 0..7 {
        sqlx::raw_sql(&format!("SAVEPOINT a; {statement}; ROLLBACK TO a")).execute(&mut *tx).await.unwrap();
    }
    let plan: serde_json::Value =
        sqlx::query_scalar(&format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"))
            .fetch_one(&mut *tx)
            .await
            .unwrap();
    tx.rollback().await.unwrap();
    let of = |key: &str| plan[0]["Plan"][key].as_i64().unwrap_or(0);
    (of("Shared Hit Blocks") + of("Shared Read Blocks"), plan.to_string())
}

#[tokio::test]
async fn a_claim_among_a_million_ready_rows_touches_only_what_it_takes() {
    let f = Fixture::new().await;
    let (worker, epoch) = f.register().await;
    // Without statistics first: the plan of an empty queue must not meet a full one.
    assert!(f.claim((worker, epoch), 10).await.is_empty());
    sqlx::query(
        "INSERT INTO sandbar.ready (tenant_id, rank, invocation_id, attempt, spent)
         SELECT $1, now() + n * interval '1 ms', gen_random_uuid(), 1, 0 FROM generate_series(1, $2) n",
    )
    .bind(f.tenant)
    .bind(MANY)
    .execute(&f.admin)
    .await
    .unwrap();
    let first = f.row();
    f.enqueue(std::slice::from_ref(&first)).await;
    f.sql("UPDATE ready SET rank = rank - interval '1 day' WHERE invocation_id IN (SELECT invocation_id FROM invocations)").await;

    let tenant = f.tenant;
    let claim = |n: i32| {
        format!(
            "SELECT * FROM claim('{worker}', {epoch}, gen_random_uuid(), ARRAY['{tenant}']::uuid[], ARRAY[{n}], ARRAY['-infinity']::timestamptz[])"
        )
    };
    for statement in [claim(100), "SELECT * FROM ready_tenants(2000)".to_owned()] {
        let (pages, plan) = pages(&f, &statement).await;
        // A row claimed costs the way down the index, its own page and its entry; the table has some 10,000 pages.
        assert!(pages < 3_000, "{pages} pages: {plan}");
    }
    assert_eq!(f.claim((worker, epoch), 1).await[0].invocation, first.id, "still in order");
}

#[tokio::test]
async fn a_claim_on_tables_without_statistics_touches_only_what_it_takes() {
    let f = Fixture::new().await;
    // As in the first minute of an installation: nobody has counted what is in these tables.
    f.sql("ALTER TABLE invocations SET (autovacuum_enabled = off)").await;
    let (worker, epoch) = f.register().await;
    for _ in 0..10 {
        f.enqueue(&(0..1_000).map(|_| f.row()).collect::<Vec<_>>()).await;
    }
    let claim = format!(
        "SELECT * FROM claim('{worker}', {epoch}, gen_random_uuid(), ARRAY['{}']::uuid[], ARRAY[500], ARRAY['-infinity']::timestamptz[])",
        f.tenant
    );
    let mut tx = f.admin.begin().await.unwrap();
    sqlx::raw_sql("SET LOCAL search_path = sandbar").execute(&mut *tx).await.unwrap();
    let mut read = Vec::new();
    // Five times by plans for these arguments, then by the one for whatever arguments.
    for _ in 0..8 {
        sqlx::raw_sql(&format!("SAVEPOINT a; {claim}; ROLLBACK TO a")).execute(&mut *tx).await.unwrap();
        let rows: i64 = sqlx::query_scalar(
            "SELECT sum(pg_stat_get_xact_tuples_fetched(indexrelid))::bigint FROM pg_index
             WHERE indrelid = 'invocations'::regclass",
        )
        .fetch_one(&mut *tx)
        .await
        .unwrap();
        read.push(rows);
    }
    assert_eq!(
        read,
        (1..=8).map(|n| 500 * n).collect::<Vec<i64>>(),
        "rows of `invocations` read for 500 each"
    );
}

#[tokio::test]
async fn by_its_mark_a_claim_passes_over_what_an_old_snapshot_keeps() {
    let f = Fixture::new().await;
    let (worker, epoch) = f.register().await;
    sqlx::query(
        "INSERT INTO sandbar.ready (tenant_id, rank, invocation_id, attempt, spent)
         SELECT $1, now() - interval '1 day' + n * interval '1 ms', gen_random_uuid(), 1, 0 FROM generate_series(1, 100000) n",
    )
    .bind(f.tenant)
    .execute(&f.admin)
    .await
    .unwrap();
    f.enqueue(&(0..10).map(|_| f.row()).collect::<Vec<_>>()).await;
    // Somebody looks at the database from before, for as long as this test lasts.
    let mut old = f.admin.begin().await.unwrap();
    sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM sandbar.ready")
        .execute(&mut *old)
        .await
        .unwrap();
    f.sql("DELETE FROM ready WHERE rank < now() - interval '1 hour'").await;
    let tenant = f.tenant;
    let claim = |after: &str| {
        format!(
            "SELECT * FROM claim('{worker}', {epoch}, gen_random_uuid(), ARRAY['{tenant}']::uuid[], ARRAY[5], ARRAY[{after}]::timestamptz[])"
        )
    };
    let (from_the_first, _) = pages(&f, &claim("'-infinity'")).await;
    let (from_the_mark, plan) = pages(&f, &claim("now() - interval '1 hour'")).await;
    assert!(from_the_mark * 5 < from_the_first, "{from_the_mark} of {from_the_first}: {plan}");
    old.rollback().await.unwrap();
}

#[tokio::test]
async fn duties_that_run_all_the_time_touch_only_what_is_due_however_much_waits() {
    let f = Fixture::new().await;
    let one = f.row();
    f.enqueue(std::slice::from_ref(&one)).await;
    // A day ahead, all of it. None of it is more than its duty has to know.
    let tenant = f.tenant;
    for fill in [
        "INSERT INTO scheduled (tenant_id, invocation_id, due_at, rank, attempt, spent)
         SELECT $1, gen_random_uuid(), now() + interval '1 day' + n * interval '1 ms', now(), 1, 0 FROM generate_series(1, 100000) n",
        "INSERT INTO expiring (tenant_id, invocation_id, expires_at)
         SELECT $1, gen_random_uuid(), now() + interval '1 day' + n * interval '1 ms' FROM generate_series(1, 100000) n",
        "INSERT INTO idempotency_keys (tenant_id, key, fingerprint, invocation_id, expires_at)
         SELECT $1, 'k' || n, sha256('x'), gen_random_uuid(), now() + interval '1 day' + n * interval '1 ms' FROM generate_series(1, 100000) n",
    ] {
        let mut connection = f.admin.acquire().await.unwrap();
        sqlx::raw_sql("SET search_path = sandbar; SET session_replication_role = replica")
            .execute(&mut *connection)
            .await
            .unwrap();
        sqlx::query(fill).bind(tenant).execute(&mut *connection).await.unwrap();
        connection.close().await.unwrap();
    }
    for duty in ["promote(1000)", "expire(1000)", "tidy(1000)"] {
        let (pages, plan) = pages(&f, &format!("SELECT * FROM {duty}")).await;
        assert!(pages < 200, "{duty}: {pages} pages: {plan}");
    }
}
