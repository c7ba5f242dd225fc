//! HTTPS out: a guest and a request without a guest believe the operator's own authority, and nobody else.

use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use super::{deployment, fetch, grant, log, serve};
use crate::edge::{Issued, acceptor, issue};
use crate::support::{self, Client, Process, data_dir};

/// An HTTPS server that answers `/echo`.
async fn target(issued: &Issued) -> (u16, AbortOnDropHandle<()>) {
    let acceptor = acceptor(issued);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream, 1, &Default::default()).await;
                }
            });
        }
    });
    (port, AbortOnDropHandle::new(serving))
}

/// How a request without a guest ends.
async fn request(client: &Client, name: &str, port: u16) -> Value {
    let url = format!("https://127.0.0.1:{port}");
    let definition = json!({"http": {"method": "GET", "url": format!("{url}/echo")}});
    client.post(&format!("/v1/tasks/{name}/versions"), &definition).await.expect(201);
    let grants = json!({"grants": {"http": [url]}});
    support::send(client.request(Method::PATCH, &format!("/v1/tasks/{name}")).json(&grants))
        .await
        .expect(200);
    client.invoke(name, &json!({"retry": {"max_attempts": 1}})).await.expect(200).json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_goes_to_whom_the_operators_authority_vouches_for_by_that_name_and_to_nobody_else() {
    let dir = data_dir();
    let roots = dir.path().join("roots.pem");
    let (right, misnamed, stranger) = (issue("127.0.0.1"), issue("localhost"), issue("127.0.0.1"));
    std::fs::write(&roots, [right.authority.as_str(), misnamed.authority.as_str()].concat()).unwrap();
    let settings = [("SANDBAR_EGRESS__EXTRA_ROOTS", roots.display().to_string())];
    let (_deployment, client) = deployment(&settings).await;
    let [(good, _a), (wrong, _b), (unknown, _c)] =
        [target(&right).await, target(&misnamed).await, target(&stranger).await];
    let all = [good, wrong, unknown].map(|port| format!("https://127.0.0.1:{port}"));
    grant(&client, &json!({"http": all})).await;

    let (out, ended) = fetch(&client, &json!({"url": format!("{}/echo", all[0])})).await;
    assert_eq!(out["status"], 200, "{ended:#}");
    let ended = request(&client, "good", good).await;
    assert_eq!(ended["state"], "succeeded", "{ended:#}");

    for (name, port, url, words) in [
        ("wrong", wrong, &all[1], "not valid for name"),
        ("unknown", unknown, &all[2], "invalid peer certificate"),
    ] {
        let (out, ended) = fetch(&client, &json!({"url": format!("{url}/echo")})).await;
        assert_eq!(out["error"], "TLS-certificate-error", "{ended:#}");
        let text = log(&client, &ended).await;
        assert!(text.contains("no secure connection") && text.contains(words), "{text}");
        let ended = request(&client, name, port).await;
        let message = ended["attempts"][0]["termination"]["message"].as_str().unwrap();
        assert!(message.starts_with("tls-certificate-error: ") && message.contains(words), "{ended:#}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_roots_that_has_no_certificate_ends_the_start_and_says_so() {
    let dir = data_dir();
    let roots = dir.path().join("roots.pem");
    std::fs::write(&roots, "nothing").unwrap();
    let database = support::database().await;
    let variables = [
        ("SANDBAR_DATABASE__URL", database.admin_url()),
        ("SANDBAR_EGRESS__EXTRA_ROOTS", roots.display().to_string()),
        ("SANDBAR_DATA_DIR", dir.path().join("worker").display().to_string()),
    ];
    let mut worker = Process::spawn("worker", dir.path(), &["worker"], &variables);
    assert!(!worker.ended(std::time::Duration::from_secs(60)).await.success());
    assert!(worker.log().contains("egress.extra_roots"), "{}", worker.log());
}
