//! Looking for a text everywhere in a database.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sqlx::PgPool;

/// The tables in which a text stands, in any of the forms it may have there. `admin` must see all rows.
pub async fn tables_with(admin: &PgPool, text: &str) -> Vec<String> {
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'sandbar'::regnamespace
         AND c.relkind IN ('r', 'p') ORDER BY 1",
    )
    .fetch_all(admin)
    .await
    .unwrap();
    let mut found = Vec::new();
    for table in tables {
        let rows: Vec<String> = sqlx::query_scalar(&format!("SELECT t::text FROM sandbar.\"{table}\" t"))
            .fetch_all(admin)
            .await
            .unwrap();
        if rows.iter().any(|row| holds(row, text)) {
            found.push(table);
        }
    }
    found
}

/// Whether a text stands in another: plain, in hexadecimal (as Postgres shows bytes), or in base64.
pub fn holds(row: &str, text: &str) -> bool {
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let shifted = (0..3).map(|shift| {
        let encoded = BASE64_STANDARD.encode([&vec![0; shift], text.as_bytes()].concat());
        // Without what its neighbours have a part in.
        encoded[4..encoded.len() - 4].to_owned()
    });
    row.contains(text) || row.contains(&hex) || shifted.into_iter().any(|encoded| row.contains(&encoded))
}
