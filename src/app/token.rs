//! Access tokens of our own: made at login, good for ten minutes, signed by keys that all servers share and the master key
//! seals. Owns what is in a token and when one is refused; `outside` has the tokens of others. A token says which session
//! it belongs to, and nothing about what may be done: that is asked of the database, so that it changes within seconds.

mod crypto;
pub(super) mod outside;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::app::vault::{Vault, VaultError, Wrapped};
use crate::app::{App, Error, Result};
use crate::domain::ids::{TenantId, UserId};
use crate::store::ApiStore;
use crate::store::people::IssuerKeyRow;

/// How long an access token is good.
pub const LIFE: Duration = Duration::from_secs(600);
/// How far clocks may differ.
const LEEWAY: Duration = Duration::from_secs(30);
/// A key signs for so long, then a new one is made.
const KEY_AGE: Duration = Duration::from_secs(30 * 86_400);
/// A key verifies for so long: what it signed last has expired, and servers have had a day to notice the new one.
const KEY_LIFE: Duration = Duration::from_secs(32 * 86_400);
/// Keys are read again after so long.
const KEYS_FRESH: Duration = Duration::from_secs(300);
/// A `kid` that is not known makes the keys be read again at most this often.
const KEYS_PAUSE: Duration = Duration::from_secs(2);
/// Who makes the tokens, and for whom.
const ISSUER: &str = "sandbar";

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is not a token, or was changed.
    Invalid,
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYet,
    /// It is for somebody else, or from somebody else.
    Audience,
    /// No key has its `kid`.
    UnknownKey,
    /// It is signed by an algorithm that its issuer does not use, or not at all.
    Algorithm,
    /// Its issuer is believed, and gives no role in any tenant here.
    NoRole,
}

/// What is in a token.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    sub: UserId,
    /// The session.
    sid: Uuid,
    /// The tenant, for those who read tokens; we go by the session.
    tid: TenantId,
    iat: i64,
    nbf: i64,
    exp: i64,
    jti: Uuid,
}

/// A key that verifies, and signs when its private half opens here.
#[derive(Debug)]
struct SigningKey {
    kid: String,
    public: Vec<u8>,
    seed: std::result::Result<Seed, VaultError>,
}

/// A private half: wiped when it is dropped, and never shown.
struct Seed(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(***)")
    }
}

/// The keys as they were read.
#[derive(Debug, Clone)]
struct KeySet {
    keys: Arc<[SigningKey]>,
    read_at: Instant,
}

/// The keys of our own issuer.
#[derive(Debug, Default)]
pub struct Issuer {
    keys: Mutex<Option<KeySet>>,
}

impl Issuer {
    fn known(&self) -> Option<KeySet> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keys that are not older than `age`; there is one that may sign.
    async fn keys(&self, store: &ApiStore, vault: &Vault, age: Duration) -> Result<Arc<[SigningKey]>> {
        if let Some(known) = self.known().filter(|known| known.read_at.elapsed() < age) {
            return Ok(known.keys);
        }
        let read_at = Instant::now();
        let mut rows = store.issuer_keys().await?;
        let max = chrono::TimeDelta::from_std(KEY_AGE).unwrap_or_default();
        if rows.first().is_none_or(|newest| Utc::now() - newest.created_at > max) {
            let seed: Zeroizing<[u8; 32]> = Zeroizing::new(rand::random());
            let public = public_of(seed.as_slice())?;
            let kid = URL_SAFE_NO_PAD.encode(&public[..12]);
            let wrapped = match vault.current() {
                Some(_) => Some(vault.wrap_seed(&kid, seed.as_slice())?),
                None => None,
            };
            let stored = match &wrapped {
                Some(wrapped) => (wrapped.bytes.as_slice(), Some(wrapped.master.as_str())),
                None => (seed.as_slice(), None),
            };
            store.issuer_key_add(&kid, stored, &public, KEY_AGE, KEY_LIFE).await?;
            tracing::info!(kid, "a new key signs tokens");
            rows = store.issuer_keys().await?;
        }
        let mut keys = Vec::with_capacity(rows.len());
        for row in rows {
            keys.push(opened(store, vault, row).await?);
        }
        let keys: Arc<[SigningKey]> = keys.into();
        *self.keys.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(KeySet { keys: Arc::clone(&keys), read_at });
        Ok(keys)
    }
}

/// A key as it is used. One that lies open in Postgres though there is a master key is sealed there: it is from before there
/// was one, or from a server without.
async fn opened(store: &ApiStore, vault: &Vault, row: IssuerKeyRow) -> Result<SigningKey> {
    let IssuerKeyRow { kid, seed, master, public, .. } = row;
    let seed = match master {
        Some(master) => vault.unwrap_seed(&kid, &Wrapped { master, bytes: seed }),
        None => {
            if vault.current().is_some() {
                let wrapped = vault.wrap_seed(&kid, &seed)?;
                if store.issuer_key_seal(&kid, &seed, (&wrapped.bytes, &wrapped.master)).await? {
                    tracing::info!(kid, "a key that signs tokens has been sealed by the master key");
                }
            }
            Ok(Zeroizing::new(seed))
        }
    };
    Ok(SigningKey { kid, public, seed: seed.map(Seed) })
}

fn public_of(seed: &[u8]) -> Result<Vec<u8>> {
    let pair = Ed25519KeyPair::from_seed_unchecked(seed)
        .map_err(|error| Error::Internal(anyhow::anyhow!("a signing key is unusable: {error}")))?;
    Ok(pair.public_key().as_ref().to_vec())
}

/// Whether a credential is a token and not an API key: three parts, the first of them a JSON object.
pub(super) fn looks_like_one(credential: &str) -> bool {
    credential.starts_with("eyJ") && credential.bytes().filter(|b| *b == b'.').count() == 2
}

pub(super) fn refusal(error: &jsonwebtoken::errors::Error) -> Refusal {
    match error.kind() {
        ErrorKind::ExpiredSignature => Refusal::Expired,
        ErrorKind::ImmatureSignature => Refusal::NotYet,
        ErrorKind::InvalidAudience | ErrorKind::InvalidIssuer => Refusal::Audience,
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName | ErrorKind::MissingAlgorithm => {
            Refusal::Algorithm
        }
        _ => Refusal::Invalid,
    }
}

/// The header of a token. One that names an algorithm which the library does not know, `none` among them, is told apart
/// from what is no token.
pub(super) fn header(token: &str) -> std::result::Result<Header, Refusal> {
    jsonwebtoken::decode_header(token).map_err(|_| {
        let first = token.split('.').next().unwrap_or_default();
        let named = URL_SAFE_NO_PAD.decode(first).ok();
        let named = named.and_then(|json| serde_json::from_slice::<serde_json::Value>(&json).ok());
        let whole = token.split('.').count() == 3;
        if whole && named.is_some_and(|header| header["alg"].is_string()) {
            Refusal::Algorithm
        } else {
            Refusal::Invalid
        }
    })
}

/// The rules for tokens of one issuer.
pub(super) fn rules(algorithm: Algorithm, issuer: &str, audience: &str) -> Validation {
    let mut rules = Validation::new(algorithm);
    rules.leeway = LEEWAY.as_secs();
    rules.validate_nbf = true;
    rules.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    rules.set_issuer(&[issuer]);
    rules.set_audience(&[audience]);
    rules
}

impl App {
    async fn issuer_keys(&self, age: Duration) -> Result<Arc<[SigningKey]>> {
        self.inner.issuer.keys(&self.inner.store, &self.inner.settings.vault, age).await
    }

    /// A token for a session, and when it expires.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub(super) async fn token(
        &self,
        session: Uuid,
        user: UserId,
        tenant: TenantId,
    ) -> Result<(String, DateTime<Utc>)> {
        crypto::install();
        let keys = self.issuer_keys(KEYS_FRESH).await?;
        let internal = |detail: String| Error::Internal(anyhow::anyhow!("cannot sign a token: {detail}"));
        let key = keys.first().ok_or_else(|| internal("there is no key".to_owned()))?;
        let now = Utc::now();
        let expires = now + LIFE;
        let claims = Claims {
            iss: ISSUER.to_owned(),
            aud: ISSUER.to_owned(),
            sub: user,
            sid: session,
            tid: tenant,
            iat: now.timestamp(),
            nbf: now.timestamp(),
            exp: expires.timestamp(),
            jti: Uuid::now_v7(),
        };
        let header = Header { kid: Some(key.kid.clone()), ..Header::new(Algorithm::EdDSA) };
        let seed = key.seed.as_ref().map_err(Clone::clone)?;
        let token = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_ed_der(&seed.0))
            .map_err(|error| internal(error.to_string()))?;
        Ok((token, expires))
    }

    /// The session that a token belongs to, and when the token expires.
    ///
    /// # Errors
    /// It is refused, or Postgres does not answer.
    pub(super) async fn verify(&self, token: &str) -> Result<(Uuid, Option<DateTime<Utc>>)> {
        crypto::install();
        let refuse = |refusal| Err(Error::Token(refusal));
        let header = header(token).map_err(Error::Token)?;
        if header.alg != Algorithm::EdDSA {
            return refuse(Refusal::Algorithm);
        }
        let Some(kid) = header.kid else { return refuse(Refusal::UnknownKey) };
        let mut keys = self.issuer_keys(KEYS_FRESH).await?;
        if !keys.iter().any(|key| key.kid == kid) {
            keys = self.issuer_keys(KEYS_PAUSE).await?;
        }
        let Some(key) = keys.iter().find(|key| key.kid == kid) else {
            return refuse(Refusal::UnknownKey);
        };
        let rules = rules(Algorithm::EdDSA, ISSUER, ISSUER);
        let public = DecodingKey::from_ed_der(&key.public);
        match jsonwebtoken::decode::<Claims>(token, &public, &rules) {
            Ok(token) => Ok((token.claims.sid, DateTime::from_timestamp(token.claims.exp, 0))),
            Err(error) => refuse(refusal(&error)),
        }
    }

    /// The public halves of the keys, as a JWK set.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn jwks(&self) -> Result<Vec<(String, String)>> {
        let keys = self.issuer_keys(KEYS_FRESH).await?;
        Ok(keys.iter().map(|key| (key.kid.clone(), URL_SAFE_NO_PAD.encode(&key.public))).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::{Value, json};

    const SEED: [u8; 32] = [7; 32];

    fn sign(header: &Header, claims: &Value) -> String {
        crypto::install();
        jsonwebtoken::encode(header, claims, &EncodingKey::from_ed_der(&SEED)).unwrap()
    }

    fn check(token: &str) -> std::result::Result<(), Refusal> {
        crypto::install();
        header(token)?;
        let public = DecodingKey::from_ed_der(&public_of(&SEED).unwrap());
        let rules = rules(Algorithm::EdDSA, ISSUER, ISSUER);
        jsonwebtoken::decode::<Value>(token, &public, &rules).map(drop).map_err(|e| refusal(&e))
    }

    fn claims(change: &Value) -> Value {
        let now = Utc::now().timestamp();
        let mut claims = json!({"iss": ISSUER, "aud": ISSUER, "sub": "x", "nbf": now, "exp": now + 60});
        for (name, value) in change.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims
    }

    #[test]
    fn a_token_is_refused_for_its_own_reason() {
        let header = Header::new(Algorithm::EdDSA);
        let now = Utc::now().timestamp();
        assert_eq!(check(&sign(&header, &claims(&json!({})))), Ok(()));
        for (change, refusal) in [
            (json!({"exp": now - 60}), Refusal::Expired),
            (json!({"nbf": now + 60}), Refusal::NotYet),
            (json!({"aud": "somebody"}), Refusal::Audience),
            (json!({"iss": "somebody"}), Refusal::Audience),
            (json!({"exp": "tomorrow"}), Refusal::Invalid),
            (json!({"nbf": "x"}), Refusal::Invalid),
            (json!({"exp": null}), Refusal::Invalid),
        ] {
            assert_eq!(check(&sign(&header, &claims(&change))), Err(refusal), "{change}");
        }
        let good = sign(&header, &claims(&json!({})));
        let parts: Vec<&str> = good.split('.').collect();
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        for (forged, refusal) in [
            (format!("{}.{}.", encode(&json!({"alg": "none", "typ": "JWT"})), parts[1]), Refusal::Algorithm),
            (format!("{}.{}.{}", encode(&json!({"alg": "HS256"})), parts[1], parts[2]), Refusal::Algorithm),
            (format!("{}.{}.{}", encode(&json!({"alg": "RS256"})), parts[1], parts[2]), Refusal::Algorithm),
            (
                format!("{}.{}.{}", parts[0], encode(&claims(&json!({"sub": "root"}))), parts[2]),
                Refusal::Invalid,
            ),
            ("a.b.c".to_owned(), Refusal::Invalid),
            (parts[..2].join("."), Refusal::Invalid),
        ] {
            assert_eq!(check(&forged), Err(refusal), "{forged}");
        }
    }

    #[test]
    fn keys_are_told_from_tokens() {
        assert!(looks_like_one(&sign(&Header::new(Algorithm::EdDSA), &claims(&json!({})))));
        for key in ["sbk_abc", "sbk_a.b.c", "eyJhbGciOiJub25lIn0", ""] {
            assert!(!looks_like_one(key), "{key}");
        }
    }
}
