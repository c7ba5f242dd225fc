//! Certificates of the API: read, checked, read again when their files change; and the one that `sandbar dev --tls`
//! makes. Owns files and key material, never a socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use axum_server::tls_rustls::RustlsConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tracing::{error, info};

use crate::config;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Largest certificate or key file.
const MAX_BYTES: u64 = 1 << 20;

/// Where the certificate and its key are.
#[derive(Debug, Clone)]
pub(super) struct Files {
    cert: PathBuf,
    key: PathBuf,
}

impl Files {
    /// Those of the configuration, which has both or none.
    pub(super) fn of(server: &config::Server) -> Option<Self> {
        Some(Self { cert: server.tls_cert.clone()?, key: server.tls_key.clone()? })
    }

    /// What is served from now on.
    ///
    /// # Errors
    /// A file cannot be read, is not PEM, or key and certificate do not belong together.
    pub(super) fn load(&self) -> anyhow::Result<RustlsConfig> {
        Ok(RustlsConfig::from_config(self.read()?))
    }

    fn read(&self) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let chain = CertificateDer::pem_slice_iter(&bounded(&self.cert)?)
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("{} is no PEM certificate chain", self.cert.display()))?;
        ensure!(!chain.is_empty(), "{} has no certificate", self.cert.display());
        let key = PrivateKeyDer::from_pem_slice(&bounded(&self.key)?)
            .with_context(|| format!("{} is no PEM private key", self.key.display()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .with_context(|| {
                format!("{} and {} do not belong together", self.cert.display(), self.key.display())
            })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// When either was last written; `None` while one is missing.
    fn written(&self) -> Option<(SystemTime, SystemTime)> {
        let at = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).ok();
        Some((at(&self.cert)?, at(&self.key)?))
    }
}

/// Authorities that requests of guests trust besides those of the system.
///
/// # Errors
/// The file cannot be read, has no certificate, or one that could not be trusted.
pub(super) fn extra_roots(egress: &config::Egress) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let Some(path) = &egress.extra_roots else { return Ok(Vec::new()) };
    let what = || format!("egress.extra_roots: {} is no PEM file of certificates", path.display());
    let found =
        CertificateDer::pem_slice_iter(&bounded(path)?).collect::<Result<Vec<_>, _>>().with_context(what)?;
    ensure!(!found.is_empty(), what());
    let mut store = rustls::RootCertStore::empty();
    for one in &found {
        store.add(one.clone()).with_context(what)?;
    }
    Ok(found)
}

fn bounded(path: &Path) -> anyhow::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(bytes.len() as u64 <= MAX_BYTES, "{} is larger than {MAX_BYTES} bytes", path.display());
    Ok(bytes)
}

/// Serve what the files hold whenever they change. What cannot be used is logged, and the old certificate stays: the
/// two files are seldom replaced in the same instant.
pub(super) async fn keep_fresh(files: Files, served: RustlsConfig) {
    let mut seen = files.written();
    loop {
        tokio::time::sleep(LOOK).await;
        let written = files.written();
        if written.is_none() || written == seen {
            continue;
        }
        match files.read() {
            Ok(config) => {
                served.reload_from_config(config);
                seen = written;
                info!("certificate read again");
            }
            Err(reason) => error!(reason = format!("{reason:#}"), "the new certificate is not used"),
        }
    }
}

/// A certificate for this machine alone, in `<data_dir>/tls`; kept from one start to the next.
///
/// # Errors
/// The files cannot be written.
pub fn local_certificate(data_dir: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    let cert = data_dir.join(super::LOCAL_CERTIFICATE);
    let key = cert.with_file_name("key.pem");
    if !(cert.exists() && key.exists()) {
        let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let made = rcgen::generate_simple_self_signed(names).context("cannot make a certificate")?;
        // What a start that was killed left behind.
        let _ = std::fs::remove_file(&key);
        super::write_secret(&key, &made.signing_key.serialize_pem())?;
        std::fs::write(&cert, made.cert.pem()).with_context(|| format!("cannot write {}", cert.display()))?;
        info!("certificate made: {}", cert.display());
    }
    Ok((cert, key))
}
