//! Issuers of tokens elsewhere (OpenID Connect), as the operator names them: `[[identity.issuers]]` of the configuration. Owns
//! what may be named and what is checked about it; fetches nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jsonwebtoken::Algorithm;
use reqwest::Url;
use serde::{Deserialize, Serialize};

use crate::domain::permission::Role;

/// Issuers of one installation: each token is compared with all of them.
pub const MAX_ISSUERS: usize = 16;
/// Values of the claim that name roles.
const MAX_ROLES: usize = 256;
/// Bytes of any one text.
const MAX_BYTES: usize = 512;

/// An issuer, and what its tokens make of whoever brings one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    /// What its tokens say in `iss`, letter by letter. An `https` URL; `http` for loopback only.
    pub issuer: String,
    /// What its tokens must say in `aud`.
    pub audience: String,
    /// Where its keys are. Default none: what `<issuer>/.well-known/openid-configuration` says.
    #[serde(default)]
    pub jwks_url: Option<String>,
    /// Algorithms that it signs by; no other is accepted. Default `RS256`. `EdDSA`, `ES256`, `ES384`, `RS256`, `RS384`,
    /// `RS512` and `PS256` may be named.
    #[serde(default = "rs256")]
    pub algorithms: Vec<Algorithm>,
    /// Tenant that its people belong to. This or `tenant_claim`.
    #[serde(default)]
    pub tenant: Option<String>,
    /// Claim with the name of the tenant. Only for an issuer that may speak for every tenant.
    #[serde(default)]
    pub tenant_claim: Option<String>,
    /// Claim with the roles, a text or a list of texts; dots lead into objects, as in `realm_access.roles`. Default
    /// `roles`.
    #[serde(default = "roles")]
    pub role_claim: String,
    /// What a value of that claim makes of its bearer: `owner`, `admin`, `developer`, `operator` or `viewer`. Of several
    /// the first in this order.
    pub roles: BTreeMap<String, String>,
}

fn rs256() -> Vec<Algorithm> {
    vec![Algorithm::RS256]
}

fn roles() -> String {
    "roles".to_owned()
}

impl Issuer {
    /// The role that a value of the claim stands for.
    #[must_use]
    pub fn role(&self, value: &str) -> Option<Role> {
        // The check below has seen to it that each is one.
        self.roles.get(value).and_then(|word| word.parse().ok())
    }

    /// What is wrong with it.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut wrong = |key: &str, what: &str| problems.push(format!("identity.issuers: {key} {what}"));
        if !is_safe(&self.issuer) {
            wrong("issuer", "is no https URL (http is for loopback only)");
        }
        if self.jwks_url.as_deref().is_some_and(|url| !is_safe(url)) {
            wrong("jwks_url", "is no https URL (http is for loopback only)");
        }
        if self.audience.is_empty() || self.audience.len() > MAX_BYTES {
            wrong("audience", "is empty or too long");
        }
        let usable = |algorithm: &Algorithm| {
            use Algorithm::{ES256, ES384, EdDSA, PS256, RS256, RS384, RS512};
            matches!(algorithm, EdDSA | ES256 | ES384 | RS256 | RS384 | RS512 | PS256)
        };
        if self.algorithms.is_empty() || !self.algorithms.iter().all(usable) {
            wrong("algorithms", "names none, or one that is not accepted; see the reference");
        }
        if self.tenant.is_some() == self.tenant_claim.is_some() {
            wrong("tenant", "and tenant_claim: set one of the two");
        }
        if self.roles.is_empty() || self.roles.len() > MAX_ROLES {
            wrong("roles", "maps nothing, or too much");
        }
        for (value, word) in &self.roles {
            // The platform's role reaches beyond every tenant: no issuer hands it out.
            if !matches!(word.parse::<Role>(), Ok(role) if role != Role::Platform) {
                wrong("roles", &format!("maps `{}` to no role of a tenant", value.escape_debug()));
            }
        }
        problems
    }
}

/// Nobody on the way can change what comes from there.
fn is_safe(text: &str) -> bool {
    let Ok(url) = Url::parse(text) else { return false };
    let ip = url.host_str().and_then(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().ok());
    let loopback = ip.is_some_and(|ip| ip.is_loopback());
    let scheme = url.scheme() == "https" || (url.scheme() == "http" && loopback);
    scheme && text.len() <= MAX_BYTES && url.username().is_empty() && url.password().is_none()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn of(change: &str) -> Issuer {
        let text = format!(
            "issuer = 'https://id.example'\naudience = 'sandbar'\ntenant = 'acme'\n{change}\n[roles]\nstaff = 'developer'"
        );
        toml::from_str(&text).unwrap()
    }

    #[test]
    fn an_issuer_needs_a_safe_address_known_algorithms_one_tenant_and_roles_of_a_tenant() {
        assert_eq!(of("").problems(), Vec::<String>::new());
        assert_eq!(of("").algorithms, [Algorithm::RS256]);
        for address in ["http://127.0.0.1:80/x", "http://[::1]/x", "https://id.example:8443/realms/a"] {
            assert!(Issuer { issuer: address.to_owned(), ..of("") }.problems().is_empty(), "{address}");
        }
        for address in
            ["http://id.example", "http://10.0.0.1", "ftp://id.example", "https://a:b@id.example", "id"]
        {
            assert_eq!(Issuer { issuer: address.to_owned(), ..of("") }.problems().len(), 1, "{address}");
            assert_eq!(Issuer { jwks_url: Some(address.to_owned()), ..of("") }.problems().len(), 1);
        }
        assert_eq!(of("algorithms = ['HS256']").problems().len(), 1);
        assert_eq!(of("algorithms = []").problems().len(), 1);
        assert_eq!(of("tenant_claim = 't'").problems().len(), 1, "both");
        for word in ["platform", "root", ""] {
            let roles = BTreeMap::from([("x".to_owned(), word.to_owned())]);
            assert_eq!(Issuer { roles, ..of("") }.problems().len(), 1, "{word}");
        }
    }
}
