//! The standard's interface for logs.

use serde_json::json;

use super::Tenant;
use crate::support::Deployment;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_the_standard_interface_stand_in_the_log_under_the_same_limits() {
    let deployment = Deployment::start(1).await;
    let tenant = Tenant::first(&deployment);
    tenant.upload("settings", "settings").await;
    let steps = json!([{"what": "log", "name": "billing", "text": "one\u{0}two"}]);
    let (out, ended) = tenant.run("settings", &steps).await;
    assert_eq!(out, json!(["ok"]), "{ended:#}");
    let log = tenant.log(&ended).await;
    let records: Vec<serde_json::Value> = match serde_json::from_str::<serde_json::Value>(&log) {
        Ok(page) => page["items"].as_array().cloned().unwrap_or_default(),
        Err(_) => log.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
    };
    let found: Vec<_> = records
        .iter()
        .filter(|record| record["target"] == "billing")
        .map(|record| (record["level"].as_str().unwrap(), record["fields"]["critical"].as_str()))
        .collect();
    assert_eq!(found, [("error", Some("true")), ("info", None)], "{log}");
    assert!(!log.contains("\\u0000"), "{log}");

    // A flood is cut where any other log is.
    let flood = json!([{"what": "log", "name": "flood", "text": "x".repeat(1_000), "count": 1_000}]);
    let (_, ended) = tenant.run("settings", &flood).await;
    let receipt = &ended["attempts"][0]["receipt"];
    assert!(receipt["log_bytes"].as_u64().unwrap() <= 256 << 10, "{receipt:#}");
    assert!(receipt["log_dropped_bytes"].as_u64().unwrap() > 1_000_000, "{receipt:#}");
    assert!(receipt["host_calls"].as_u64().unwrap() >= 2_000, "{receipt:#}");
}
