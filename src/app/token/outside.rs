//! Tokens of issuers elsewhere (OpenID Connect Core 1.0, Discovery 1.0; RFC 7517 for the keys): which are believed, and what
//! their claims make of whoever brings one. Owns the keys that issuers publish, as they were read last. Which issuers there
//! are is the operator's configuration and nobody else's, so no tenant can make this server ask an address of its choice.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::DateTime;
use jsonwebtoken::jwk::{Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use reqwest::Url;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;
use uuid::Uuid;

use super::{ISSUER, Refusal, crypto, header, refusal, rules};
use crate::app::{App, Error, Result};
use crate::domain::issuer::Issuer;
use crate::domain::permission::Role;
use crate::store::tenant::{Actor, Identity};

/// Longest answer of an issuer, in time and in bytes.
const ANSWER: (Duration, usize) = (Duration::from_secs(5), 256 << 10);
/// Keys of one issuer that are looked at.
const MAX_KEYS: usize = 64;
/// Keys are read again after so long.
const FRESH: Duration = Duration::from_secs(600);
/// An issuer is asked at most this often, whatever tokens say and however it answers.
const PAUSE: Duration = Duration::from_secs(10);
/// Keys of an issuer that does not answer are gone by for so long.
const STALE: Duration = Duration::from_secs(86_400);
/// Longest `sub`, in bytes (OpenID Connect Core, section 2), and longest name, in characters.
const MAX_SUBJECT: usize = 255;
const MAX_NAME: usize = 200;
/// Values of the claim with the roles that are looked at.
const MAX_VALUES: usize = 1_000;

/// The issuers of this installation.
#[derive(Debug)]
pub struct Issuers {
    http: reqwest::Client,
    known: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    issuer: Issuer,
    keys: Mutex<Keys>,
}

#[derive(Debug, Default)]
struct Keys {
    keys: Arc<[Jwk]>,
    read_at: Option<Instant>,
    asked_at: Option<Instant>,
}

impl Issuers {
    /// Nothing is asked before the first token.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(issuers: Vec<Issuer>) -> std::io::Result<Self> {
        let http = reqwest::Client::builder()
            .timeout(ANSWER.0)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(std::io::Error::other)?;
        let known = issuers.into_iter().map(|issuer| Known { issuer, keys: Mutex::default() }).collect();
        Ok(Self { http, known })
    }

    fn named(&self, iss: &str) -> Option<&Known> {
        self.known.iter().find(|known| known.issuer.issuer == iss)
    }

    /// The keys with this `kid`, or all if the token names none. Asks the issuer when they are old, or when it may have
    /// a new one.
    async fn keys(&self, known: &Known, kid: Option<&str>) -> Result<Vec<Jwk>> {
        // Held while the issuer is asked: others with its tokens wait for the same answer.
        let mut held = known.keys.lock().await;
        let found = |keys: &[Jwk]| -> Vec<Jwk> {
            keys.iter().filter(|key| kid.is_none() || key.common.key_id.as_deref() == kid).cloned().collect()
        };
        let age = |at: Option<Instant>| at.map_or(Duration::MAX, |at| at.elapsed());
        if age(held.read_at) < FRESH {
            let found = found(&held.keys);
            if !found.is_empty() {
                return Ok(found);
            }
        }
        if age(held.asked_at) >= PAUSE {
            held.asked_at = Some(Instant::now());
            match self.fetch(&known.issuer).await {
                Ok(keys) => {
                    held.keys = keys.into();
                    held.read_at = held.asked_at;
                }
                Err(error) => tracing::warn!(issuer = known.issuer.issuer, "no keys: {error:#}"),
            }
        }
        if age(held.read_at) >= STALE {
            return Err(Error::IssuerUnavailable(known.issuer.issuer.clone()));
        }
        Ok(found(&held.keys))
    }

    async fn fetch(&self, issuer: &Issuer) -> anyhow::Result<Vec<Jwk>> {
        let url = match &issuer.jwks_url {
            Some(url) => url.clone(),
            None => {
                let base = issuer.issuer.trim_end_matches('/');
                let about = self.get(&format!("{base}/.well-known/openid-configuration")).await?;
                let about: Value = serde_json::from_slice(&about)?;
                // Discovery, section 4.3: or it speaks for somebody else.
                anyhow::ensure!(about["issuer"] == issuer.issuer, "its configuration names another issuer");
                let url = about["jwks_uri"].as_str().unwrap_or_default().to_owned();
                let same = |a: &str, b: &str| -> Option<bool> {
                    Some(Url::parse(a).ok()?.scheme() == Url::parse(b).ok()?.scheme())
                };
                anyhow::ensure!(
                    same(&url, &issuer.issuer) == Some(true),
                    "its jwks_uri is not as safe as itself"
                );
                url
            }
        };
        let set: Value = serde_json::from_slice(&self.get(&url).await?)?;
        // One by one: a key of a kind that we do not know is no reason to refuse the others.
        let keys: Vec<Jwk> = set["keys"]
            .as_array()
            .into_iter()
            .flatten()
            .take(MAX_KEYS)
            .filter_map(|key| serde_json::from_value(key.clone()).ok())
            .collect();
        anyhow::ensure!(!keys.is_empty(), "it publishes no key that we know how to use");
        Ok(keys)
    }

    async fn get(&self, url: &str) -> anyhow::Result<Vec<u8>> {
        let mut answer = self.http.get(url).send().await?.error_for_status()?;
        anyhow::ensure!(answer.status().is_success(), "{url} answers {}", answer.status());
        let mut body = Vec::new();
        while let Some(part) = answer.chunk().await? {
            anyhow::ensure!(
                body.len() + part.len() <= ANSWER.1,
                "{url} answers more than {} bytes",
                ANSWER.1
            );
            body.extend_from_slice(&part);
        }
        Ok(body)
    }
}

/// What a token says of its issuer; not verified.
fn issuer_of(token: &str) -> Option<String> {
    let claims = jsonwebtoken::dangerous::insecure_decode::<Value>(token).ok()?.claims;
    claims["iss"].as_str().map(ToOwned::to_owned)
}

/// Whether the key may verify what is signed so.
fn fits(key: &Jwk, algorithm: Algorithm) -> bool {
    let alg = key.common.key_algorithm.as_ref();
    let of_algorithm = alg.is_none_or(|alg| alg.to_string() == format!("{algorithm:?}"));
    let to_sign = key.common.public_key_use.as_ref().is_none_or(|use_| *use_ == PublicKeyUse::Signature);
    of_algorithm && to_sign
}

/// The best role that the claims give.
fn role(issuer: &Issuer, claims: &Value) -> Option<Role> {
    let claim = issuer.role_claim.split('.').fold(claims, |value, step| &value[step]);
    let values = match claim {
        Value::String(one) => vec![one.as_str()],
        Value::Array(some) => some.iter().take(MAX_VALUES).filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let given: Vec<Role> = values.into_iter().filter_map(|value| issuer.role(value)).collect();
    Role::ALL.into_iter().find(|role| given.contains(role))
}

/// An id for somebody of whom we keep nothing: the same one for the same subject of the same issuer.
fn subject(issuer: &str, sub: &str) -> Uuid {
    let hash = Sha256::new().chain_update(issuer).chain_update([0]).chain_update(sub).finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_bytes(bytes).with_version(uuid::Version::Custom).into_uuid()
}

impl App {
    /// Whoever brings a token of one of the issuers elsewhere. `None`: it says that it is one of ours, or nothing.
    ///
    /// # Errors
    /// The token is refused; the issuer or Postgres does not answer.
    pub(in crate::app) async fn outsider(&self, token: &str) -> Result<Option<Identity>> {
        crypto::install();
        let refuse = |refusal| Err(Error::Token(refusal));
        let Some(iss) = issuer_of(token).filter(|iss| iss != ISSUER) else { return Ok(None) };
        let Some(known) = self.inner.issuers.named(&iss) else { return refuse(Refusal::Audience) };
        let issuer = &known.issuer;
        let header = header(token).map_err(Error::Token)?;
        if !issuer.algorithms.contains(&header.alg) {
            return refuse(Refusal::Algorithm);
        }
        let keys = self.inner.issuers.keys(known, header.kid.as_deref()).await?;
        let mut fitting = keys.iter().filter(|key| fits(key, header.alg));
        // Without a `kid` there must be no choice.
        let (Some(key), None) = (fitting.next(), fitting.next()) else {
            return refuse(Refusal::UnknownKey);
        };
        let Ok(key) = DecodingKey::from_jwk(key) else { return refuse(Refusal::UnknownKey) };
        let rules = rules(header.alg, &issuer.issuer, &issuer.audience);
        let claims = match jsonwebtoken::decode::<Value>(token, &key, &rules) {
            Ok(token) => token.claims,
            Err(error) => return refuse(refusal(&error)),
        };
        let sub = claims["sub"].as_str().unwrap_or_default();
        if sub.is_empty() || sub.len() > MAX_SUBJECT {
            return refuse(Refusal::Invalid);
        }
        let Some(role) = role(issuer, &claims) else { return refuse(Refusal::NoRole) };
        let tenant = match (&issuer.tenant, &issuer.tenant_claim) {
            (Some(tenant), _) => Some(tenant.as_str()),
            (None, Some(claim)) => claims[claim].as_str(),
            (None, None) => None,
        };
        let Some(tenant) = tenant else { return refuse(Refusal::NoRole) };
        let Some((tenant, active)) = self.inner.store.identify_tenant(tenant).await? else {
            return refuse(Refusal::NoRole);
        };
        let name = ["email", "preferred_username", "name"].iter().find_map(|claim| claims[claim].as_str());
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        let name: String = name.unwrap_or(sub).chars().take(MAX_NAME).map(plain).collect();
        Ok(Some(Identity {
            tenant,
            actor: Actor::Subject(subject(&issuer.issuer, sub)),
            name: name.into(),
            role,
            scopes: [].into(),
            expires_at: claims["exp"].as_i64().and_then(|at| DateTime::from_timestamp(at, 0)),
            active,
        }))
    }
}
