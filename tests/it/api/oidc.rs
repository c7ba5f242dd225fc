//! Tokens of an issuer elsewhere: a small one on loopback, whose keys and answers a test changes.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use sandbar::domain::issuer::Issuer;

use super::*;
use crate::support::send;

/// A key of the issuer.
struct Key {
    kid: &'static str,
    pair: EcdsaKeyPair,
}

impl Key {
    fn new(kid: &'static str) -> Self {
        let (random, kind) = (SystemRandom::new(), &ECDSA_P256_SHA256_FIXED_SIGNING);
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        Self { kid, pair: EcdsaKeyPair::from_pkcs8(kind, pkcs8.as_ref(), &random).unwrap() }
    }

    fn jwk(&self) -> Value {
        let point = self.pair.public_key().as_ref();
        let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..]));
        json!({"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.kid, "x": x, "y": y})
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let signature = self.pair.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn token(&self, claims: &Value) -> String {
        self.sign(&json!({"alg": "ES256", "typ": "JWT", "kid": self.kid}), claims)
    }
}

/// What the issuer publishes; none: it fails.
type Published = Arc<Mutex<Option<Vec<Value>>>>;

/// An issuer on loopback: its URL.
async fn issuer(published: Published) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/realm", listener.local_addr().unwrap());
    let about = json!({"issuer": url, "jwks_uri": format!("{url}/keys")});
    let keys = async |State(published): State<Published>| match &*published.lock().unwrap() {
        Some(keys) => Ok(axum::Json(json!({"keys": keys}))),
        None => Err(StatusCode::INTERNAL_SERVER_ERROR),
    };
    let router = Router::new()
        .route("/realm/.well-known/openid-configuration", get(async move || axum::Json(about)))
        .route("/realm/keys", get(keys))
        .with_state(published);
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

fn believed(url: &str, more: &str) -> Issuer {
    let text = format!(
        "issuer = '{url}'\naudience = 'sandbar'\nalgorithms = ['ES256']\nrole_claim = 'realm_access.roles'\n{more}\n\
         [roles]\nstaff = 'developer'\nboss = 'admin'"
    );
    toml::from_str(&text).unwrap()
}

async fn api_with(issuers: Vec<Issuer>) -> Api {
    Api::on(&support::database().await, Settings { issuers, ..Settings::default() }).await
}

fn claims(url: &str, change: &Value) -> Value {
    let now = chrono::Utc::now().timestamp();
    let mut claims = json!({
        "iss": url, "aud": "sandbar", "sub": "u-1", "email": "ada@example.com", "iat": now, "exp": now + 300,
        "realm_access": {"roles": ["other", "staff"]},
    });
    for (name, value) in change.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims
}

async fn me(api: &Api, token: &str) -> support::Answer {
    send(api.client.anonymous(Method::GET, "/v1/me").bearer_auth(token)).await
}

#[tokio::test]
async fn a_token_of_a_believed_issuer_is_its_bearers_role_in_its_tenant() {
    let key = Key::new("one");
    let published: Published = Arc::new(Mutex::new(Some(vec![json!({"kty": "odd", "kid": "x"}), key.jwk()])));
    let url = issuer(published).await;
    let api = api_with(vec![believed(&url, "tenant = 'one'")]).await;
    let first = me(&api, &key.token(&claims(&url, &json!({})))).await.expect(200).json();
    assert_eq!(
        (&first["kind"], &first["name"], &first["role"], &first["tenant"]),
        (&json!("subject"), &json!("ada@example.com"), &json!("developer"), &json!("one"))
    );
    assert!(first["expires_at"].is_string());
    let boss =
        claims(&url, &json!({"realm_access": {"roles": ["staff", "boss"]}, "aud": ["else", "sandbar"]}));
    let again = me(&api, &key.token(&boss)).await.expect(200).json();
    assert_eq!((&again["role"], &again["id"]), (&json!("admin"), &first["id"]), "the same subject, now more");
    let other = me(&api, &key.token(&claims(&url, &json!({"sub": "u-2"})))).await.expect(200).json();
    assert_ne!(other["id"], first["id"]);

    // What it may is what its role may, and it stands in the audit log.
    let token = key.token(&claims(&url, &json!({})));
    let upload = api.client.anonymous(Method::POST, "/v1/tasks/x/versions").bearer_auth(&token);
    let upload = upload.header("content-type", "application/wasm").body("no module");
    assert_eq!(send(upload).await.status, 422);
    let keys = send(api.client.anonymous(Method::GET, "/v1/keys").bearer_auth(&token)).await;
    assert_eq!(problem(&keys, 403), "forbidden");
    let denied = support::eventually(std::time::Duration::from_secs(10), "an entry", async || {
        let audit = api.client.get("/v1/audit?outcome=denied").await.expect(200).json();
        audit["items"].as_array().unwrap().iter().find(|entry| entry["actor_kind"] == "subject").cloned()
    })
    .await;
    assert_eq!((&denied["actor"], &denied["actor_id"]), (&first["name"], &first["id"]));
}

#[tokio::test]
async fn each_token_that_is_not_good_is_refused_for_its_own_reason() {
    let (key, stranger) = (Key::new("one"), Key::new("one"));
    let url = issuer(Arc::new(Mutex::new(Some(vec![key.jwk()])))).await;
    let api = api_with(vec![believed(&url, "tenant = 'one'")]).await;
    let now = chrono::Utc::now().timestamp();
    for (change, status, code) in [
        (json!({"exp": now - 60}), 401, "token-expired"),
        (json!({"exp": null}), 401, "token-invalid"),
        (json!({"nbf": now + 120}), 401, "token-not-yet-valid"),
        (json!({"aud": "somebody"}), 401, "token-wrong-audience"),
        (json!({"sub": ""}), 401, "token-invalid"),
        (json!({"sub": "x".repeat(256)}), 401, "token-invalid"),
        (json!({"realm_access": {"roles": ["other"]}}), 403, "token-without-role"),
        (json!({"realm_access": {"roles": {"staff": true}}}), 403, "token-without-role"),
        (json!({"realm_access": "staff"}), 403, "token-without-role"),
    ] {
        let answer = me(&api, &key.token(&claims(&url, &change))).await;
        assert_eq!(problem(&answer, status), code, "{change}");
    }
    let good = claims(&url, &json!({}));
    let hs256 = |secret: &[u8]| {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(&json!({"alg": "HS256", "kid": "one"})), part(&good));
        let tag =
            ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret), message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(tag))
    };
    for (token, code) in [
        (stranger.token(&good), "token-invalid"),
        (Key { kid: "two", ..stranger }.token(&good), "token-unknown-key"),
        (key.sign(&json!({"alg": "ES384", "kid": "one"}), &good), "token-wrong-algorithm"),
        (key.sign(&json!({"alg": "none", "kid": "one"}), &good), "token-wrong-algorithm"),
        // The public key as a shared secret.
        (hs256(key.pair.public_key().as_ref()), "token-wrong-algorithm"),
        (hs256(key.jwk().to_string().as_bytes()), "token-wrong-algorithm"),
        (key.token(&claims("https://elsewhere.example", &json!({}))), "token-wrong-audience"),
    ] {
        assert_eq!(problem(&me(&api, &token).await, 401), code, "{token}");
    }
    // One key, and no `kid`: there is no choice.
    me(&api, &key.sign(&json!({"alg": "ES256"}), &good)).await.expect(200);
}

#[tokio::test]
async fn a_tenant_is_named_by_a_claim_only_where_the_operator_says_so() {
    let key = Key::new("one");
    let url = issuer(Arc::new(Mutex::new(Some(vec![key.jwk()])))).await;
    let api = api_with(vec![believed(&url, "tenant_claim = 'org'")]).await;
    let of = async |change: Value| me(&api, &key.token(&claims(&url, &change))).await;
    assert_eq!(of(json!({"org": "one"})).await.expect(200).json()["tenant"], "one");
    for change in [json!({"org": "nobody"}), json!({"org": ["one"]}), json!({})] {
        assert_eq!(problem(&of(change).await, 403), "token-without-role");
    }
}

#[tokio::test]
async fn an_issuer_that_is_away_is_no_reason_to_forget_its_keys_nor_to_believe_anybody() {
    let key = Key::new("one");
    let published: Published = Arc::new(Mutex::new(None));
    let url = issuer(Arc::clone(&published)).await;
    let issuers = || vec![believed(&url, "tenant = 'one'")];
    let api = api_with(issuers()).await;
    let away = me(&api, &key.token(&claims(&url, &json!({})))).await;
    assert_eq!(problem(&away, 503), "issuer-unavailable");
    assert_eq!(away.headers["retry-after"], "10");

    let api = {
        *published.lock().unwrap() = Some(vec![key.jwk()]);
        api_with(issuers()).await
    };
    me(&api, &key.token(&claims(&url, &json!({})))).await.expect(200);
    *published.lock().unwrap() = None;
    me(&api, &key.token(&claims(&url, &json!({"sub": "u-2"})))).await.expect(200);
}

/// An RSA key for tests alone, as PKCS #8 in base64.
const RSA: &str = include_str!("rs256.pkcs8.base64");

#[tokio::test]
async fn an_rs256_token_is_verified_by_its_real_signature_and_only_where_rs256_is_named() {
    let der = base64::prelude::BASE64_STANDARD.decode(RSA.replace(char::is_whitespace, "")).unwrap();
    let pair = ring::signature::RsaKeyPair::from_pkcs8(&der).unwrap();
    let public: ring::rsa::PublicKeyComponents<Vec<u8>> = pair.public().into();
    let (n, e) = (URL_SAFE_NO_PAD.encode(public.n), URL_SAFE_NO_PAD.encode(public.e));
    let jwk = json!({"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "rsa", "n": n, "e": e});
    let token = |claims: &Value| {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(&json!({"alg": "RS256", "kid": "rsa"})), part(claims));
        let mut signature = vec![0; pair.public().modulus_len()];
        let kind = &ring::signature::RSA_PKCS1_SHA256;
        pair.sign(kind, &SystemRandom::new(), message.as_bytes(), &mut signature).unwrap();
        (message, signature)
    };
    let whole =
        |(message, signature): &(String, Vec<u8>)| format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature));
    let url = issuer(Arc::new(Mutex::new(Some(vec![jwk])))).await;
    let named = format!(
        "issuer = '{url}'\naudience = 'sandbar'\nalgorithms = ['RS256']\nrole_claim = 'realm_access.roles'\n\
         tenant = 'one'\n[roles]\nstaff = 'developer'"
    );
    let api = api_with(vec![toml::from_str(&named).unwrap()]).await;
    let strict = api_with(vec![believed(&url, "tenant = 'one'")]).await;
    let good = token(&claims(&url, &json!({})));
    assert_eq!(me(&api, &whole(&good)).await.expect(200).json()["role"], "developer");
    assert_eq!(problem(&me(&strict, &whole(&good)).await, 401), "token-wrong-algorithm");
    for at in [0, 100, good.1.len() - 1] {
        let mut bad = good.clone();
        bad.1[at] ^= 1;
        assert_eq!(problem(&me(&api, &whole(&bad)).await, 401), "token-invalid");
    }
    let other = token(&claims(&url, &json!({"sub": "somebody-else"})));
    assert_eq!(problem(&me(&api, &whole(&(other.0, good.1))).await, 401), "token-invalid");
}
