//! The edge of the server: TLS with certificates that change, heads that do not come, what browsers are told, other
//! origins, and TLS to Postgres.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use reqwest::{Certificate, Method, StatusCode};
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio_util::task::AbortOnDropHandle;

use crate::cli::Person;
use crate::support::{self, ADMIN_KEY, Client, Deployment, Process, data_dir, eventually};

/// Longest wait for anything that should happen soon.
const SOON: Duration = Duration::from_secs(20);

/// An authority and a certificate of it.
pub struct Issued {
    pub authority: String,
    chain: String,
    pub key: KeyPair,
    pub der: rustls::pki_types::CertificateDer<'static>,
}

pub fn issue(name: &str) -> Issued {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut leaf = CertificateParams::new(vec![name.to_owned()]).unwrap();
    leaf.distinguished_name.push(rcgen::DnType::CommonName, name);
    let leaf = leaf.signed_by(&key, &authority).unwrap();
    Issued { authority: authority.pem(), chain: leaf.pem(), der: leaf.der().clone(), key }
}

impl Issued {
    fn write(&self, cert: &Path, key: &Path) {
        std::fs::write(key, self.key.serialize_pem()).unwrap();
        std::fs::write(cert, &self.chain).unwrap();
    }

    /// A client that trusts this authority and nobody else.
    fn client(&self) -> reqwest::Client {
        reqwest::Client::builder()
            .tls_built_in_root_certs(false)
            .add_root_certificate(Certificate::from_pem(self.authority.as_bytes()).unwrap())
            // A connection that is kept would show the old certificate.
            .pool_max_idle_per_host(0)
            .no_proxy()
            .timeout(SOON)
            .build()
            .unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_serves_the_certificate_of_the_files_and_a_new_one_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let (first, second) = (issue("127.0.0.1"), issue("127.0.0.1"));
    first.write(&cert, &key);
    let settings = [
        ("SANDBAR_SERVER__TLS_CERT", cert.display().to_string()),
        ("SANDBAR_SERVER__TLS_KEY", key.display().to_string()),
    ];
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let url = format!("{}/v1/tasks", deployment.url());
    assert!(url.starts_with("https://"), "{url}");
    let ask = async |client: &reqwest::Client| {
        client.get(&url).header("x-api-key", ADMIN_KEY).send().await.map(|answer| {
            let told = answer.headers().get("strict-transport-security").cloned();
            (answer.status(), told.map(|value| value.to_str().unwrap().to_owned()))
        })
    };
    let told = Some("max-age=31536000".to_owned());
    assert_eq!(ask(&first.client()).await.unwrap(), (StatusCode::OK, told.clone()));
    assert!(ask(&second.client()).await.is_err(), "another authority is not believed");
    assert!(
        reqwest::get(url.replace("https://", "http://")).await.is_err(),
        "nothing is answered in the clear"
    );

    // What cannot be used changes nothing; what can is served to the next connection.
    std::fs::write(&cert, "no certificate").unwrap();
    eventually(SOON, "the broken certificate to be looked at", async || {
        deployment.server.log().contains("the new certificate is not used").then_some(())
    })
    .await;
    ask(&first.client()).await.unwrap();
    second.write(&cert, &key);
    eventually(SOON, "the new certificate", async || ask(&second.client()).await.ok()).await;
    assert!(ask(&first.client()).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_without_its_key_is_no_configuration_and_a_wrong_one_ends_the_start() {
    let dir = data_dir();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    issue("localhost").write(&cert, &key);
    std::fs::write(&cert, issue("localhost").chain).unwrap();
    let mut variables = vec![
        ("SANDBAR_SERVER__TLS_CERT", cert.display().to_string()),
        ("SANDBAR_DATA_DIR", "data".to_owned()),
    ];
    let mut alone = Process::spawn("server", dir.path(), &["server"], &variables);
    assert_eq!(alone.ended(SOON).await.code(), Some(2));
    assert!(alone.log().contains("server.tls_key"), "{}", alone.log());

    let database = support::database().await;
    variables.push(("SANDBAR_SERVER__TLS_KEY", key.display().to_string()));
    variables.push(("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()));
    variables.push(("SANDBAR_DATABASE__URL", database.admin_url()));
    let mut wrong = Process::spawn("server", dir.path(), &["server"], &variables);
    assert_eq!(wrong.ended(SOON).await.code(), Some(1));
    assert!(wrong.log().contains("do not belong together"), "{}", wrong.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_makes_a_certificate_that_commands_of_this_machine_trust() {
    let dir = data_dir();
    let variables = [
        ("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()),
        ("SANDBAR_DATA_DIR", dir.path().display().to_string()),
    ];
    let mut dev = Process::spawn("dev", dir.path(), &["dev", "--tls"], &variables);
    let address = dev.address().await;
    let mut person = Person::new();
    person.set("SANDBAR_DATA_DIR", dir.path().display().to_string());
    eventually(SOON, "the server to answer", async || {
        (person.run(&["tasks", "--json"]).code == 0).then_some(())
    })
    .await;
    let made = std::fs::read(dir.path().join("tls/cert.pem")).unwrap();
    for name in [address.clone(), address.replace("127.0.0.1", "localhost")] {
        let client = reqwest::Client::builder()
            .tls_built_in_root_certs(false)
            .add_root_certificate(Certificate::from_pem(&made).unwrap())
            .no_proxy()
            .build()
            .unwrap();
        let answer = client.get(format!("https://{name}/livez")).send().await.unwrap();
        assert_eq!(answer.status(), 200);
    }
    assert!(dev.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_does_not_come_is_cut_off_and_others_are_served_meanwhile() {
    let settings = [("SANDBAR_SERVER__HEADER_TIMEOUT_S", "1".to_owned())];
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let address = deployment.url().replace("http://", "");
    let mut slow = Vec::new();
    for head in ["", "GET /livez HTTP/1.1\r\n", "GET /livez HTTP/1.1\r\nhost: a\r\nx-slow: "] {
        let mut connection = TcpStream::connect(&address).await.unwrap();
        connection.write_all(head.as_bytes()).await.unwrap();
        slow.push(connection);
    }
    // One that says a header field now and then has had its time as well.
    let mut dripping = TcpStream::connect(&address).await.unwrap();
    dripping.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
    let dripped = eventually(SOON, "the slow drip to be cut off", async || {
        let mut byte = [0];
        let cut = match dripping.try_read(&mut byte) {
            Ok(_) => true,
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        };
        (cut || dripping.write_all(b"x-a: b\r\n").await.is_err()).then_some(())
    });
    let ((), answer) =
        tokio::join!(dripped, support::send(deployment.client().request(Method::GET, "/v1/tasks")));
    answer.expect(200);
    for mut connection in slow {
        let mut rest = Vec::new();
        tokio::time::timeout(SOON, connection.read_to_end(&mut rest)).await.expect("to be cut off").unwrap();
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_origins_are_kept_out_unless_they_are_named() {
    let app = "https://app.example.com";
    let allowed = "access-control-allow-origin";
    let preflight = async |client: &Client, origin: &str| {
        let request = client
            .anonymous(Method::OPTIONS, "/v1/tasks")
            .header("origin", origin)
            .header("access-control-request-method", "GET")
            .header("access-control-request-headers", "x-api-key");
        support::send(request).await.headers.get(allowed).map(|value| value.to_str().unwrap().to_owned())
    };
    let plain = async |client: &Client, origin: &str| {
        let answer = support::send(client.request(Method::GET, "/v1/tasks").header("origin", origin)).await;
        answer.expect(200).headers.get(allowed).map(|value| value.to_str().unwrap().to_owned())
    };
    let closed = Deployment::start(0).await;
    assert_eq!(preflight(&closed.client(), app).await, None);
    assert_eq!(plain(&closed.client(), app).await, None);

    let settings = [("SANDBAR_SERVER__CORS_ORIGINS", format!("[\"{app}\"]"))];
    let open = Deployment::on(support::database().await, 0, &settings).await;
    let (named, other) = (Some(app.to_owned()), "https://app.example.com.evil.test");
    assert_eq!(preflight(&open.client(), app).await, named);
    assert_eq!(plain(&open.client(), app).await, named);
    assert_eq!(preflight(&open.client(), other).await, None);
    assert_eq!(plain(&open.client(), other).await, None);
}

/// Takes TLS connections with this certificate.
pub fn acceptor(issued: &Issued) -> tokio_rustls::TlsAcceptor {
    let key = PrivatePkcs8KeyDer::from(issued.key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![issued.der.clone()], key.into())
        .unwrap();
    tokio_rustls::TlsAcceptor::from(Arc::new(config))
}

/// Speaks TLS as Postgres does, in front of one that listens on a socket in a directory only.
async fn tls_in_front_of(socket: String, issued: &Issued) -> (u16, AbortOnDropHandle<()>) {
    let acceptor = acceptor(issued);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let (acceptor, socket) = (acceptor.clone(), socket.clone());
            tokio::spawn(async move {
                // SSLRequest: length 8, code 80877103; 'S' for "go on".
                let mut request = [0; 8];
                client.read_exact(&mut request).await?;
                assert_eq!(request, [0, 0, 0, 8, 4, 210, 22, 47], "a client that does not ask for TLS");
                client.write_all(b"S").await?;
                let mut client = acceptor.accept(client).await?;
                let mut server = UnixStream::connect(socket).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    (port, AbortOnDropHandle::new(serving))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_connection_to_postgres_is_encrypted_and_its_certificate_verified() {
    let database = support::database().await;
    let dir = data_dir();
    let (right, stranger) = (issue("localhost"), issue("localhost"));
    let (socket, plain) = {
        let url = reqwest::Url::parse(&database.admin_url()).unwrap();
        let host = url.query_pairs().find(|(key, _)| key == "host").unwrap().1.into_owned();
        (format!("{host}/.s.PGSQL.{}", url.port().unwrap_or(5432)), url)
    };
    let (port, _serving) = tls_in_front_of(socket, &right).await;
    let trusted = dir.path().join("trusted.pem");
    let unknown = dir.path().join("unknown.pem");
    std::fs::write(&trusted, &right.authority).unwrap();
    std::fs::write(&unknown, &stranger.authority).unwrap();
    let url = |host: &str, authority: &Path| {
        let mut url = plain.clone();
        url.set_host(Some(host)).unwrap();
        url.set_port(Some(port)).unwrap();
        url.set_query(Some(&format!("sslmode=verify-full&sslrootcert={}", authority.display())));
        url.to_string()
    };
    let start = |url: String| {
        let variables = [
            ("SANDBAR_DATABASE__URL", url),
            ("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()),
            ("SANDBAR_SERVER__ADMIN_KEY", ADMIN_KEY.to_owned()),
            ("SANDBAR_DATABASE__ACQUIRE_TIMEOUT_MS", "2000".to_owned()),
            ("SANDBAR_DATA_DIR", dir.path().join("server").display().to_string()),
        ];
        Process::spawn("server", dir.path(), &["server"], &variables)
    };
    std::fs::create_dir_all(dir.path().join("server")).unwrap();
    let mut server = start(url("localhost", &trusted));
    let client = Client::new(format!("http://{}", server.address().await));
    server.ready(&client).await;
    client.get("/v1/tasks").await.expect(200);
    assert!(server.terminate().await.success());
    // An authority nobody trusts, and a name the certificate is not for.
    for url in [url("localhost", &unknown), url("127.0.0.1", &trusted)] {
        let mut refused = start(url);
        assert!(!refused.ended(Duration::from_secs(60)).await.success());
        assert!(refused.log().contains("certificate"), "{}", refused.log());
    }
}
