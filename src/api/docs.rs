//! `/docs`: one page that draws `/openapi.json`. It needs nothing from elsewhere, and its policy lets it reach nothing
//! but this server.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};

const PAGE: &str = include_str!("docs/page.html");

/// The page with its policy: only the script and the style that stand in it, named by their hashes.
pub(super) fn page() -> (HeaderMap, &'static str) {
    let policy = format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        hash("script"),
        hash("style")
    );
    let mut headers = HeaderMap::new();
    let plain = |text| HeaderValue::from_static(text);
    let fixed: [(HeaderName, HeaderValue); 4] = [
        (CONTENT_TYPE, plain("text/html; charset=utf-8")),
        (X_CONTENT_TYPE_OPTIONS, plain("nosniff")),
        (REFERRER_POLICY, plain("no-referrer")),
        (CACHE_CONTROL, plain("no-cache")),
    ];
    headers.extend(fixed);
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        headers.insert(CONTENT_SECURITY_POLICY, policy);
    }
    (headers, PAGE)
}

/// The hash of what stands between the tags of this name, as a policy names it.
fn hash(tag: &str) -> String {
    let inside = PAGE
        .split_once(&format!("<{tag}>"))
        .and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")))
        .map_or("", |(inside, _)| inside);
    format!("sha256-{}", BASE64_STANDARD.encode(Sha256::digest(inside)))
}

/// Handler of the page.
pub(super) async fn docs() -> Response {
    page().into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_page_asks_nobody_else_and_its_policy_names_what_stands_in_it() {
        for outside in ["http://", "https://", "//cdn", "@import", " url("] {
            assert!(!PAGE.contains(outside), "{outside}");
        }
        // An attribute with style or script in it would not be let through.
        assert!(!PAGE.contains(" style=") && !PAGE.contains(" onclick=") && !PAGE.contains("innerHTML"));
        let (headers, _) = page();
        let policy = headers["content-security-policy"].to_str().unwrap().to_owned();
        assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!((PAGE.matches("<script>").count(), PAGE.matches("<style>").count()), (1, 1));
        assert_ne!(hash("script"), hash("nothing"));
    }
}
