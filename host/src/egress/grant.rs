//! Which destinations a task has been given. A grant names a scheme, a host (exactly, or with one label left open) and
//! a port; a destination is what a request names. Both are brought into one form before they are compared, and what
//! has several readings is refused. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Characters of a DNS name.
const MAX_NAME: usize = 253;
/// Characters of one label.
const MAX_LABEL: usize = 63;
/// Characters of a grant: the longest name with scheme and port.
pub const MAX_GRANT: usize = MAX_NAME + "https://".len() + ":65535".len();
/// Labels that a wildcard needs behind it: with one, anybody could register a name under it.
const MIN_LABELS_BEHIND_WILDCARD: usize = 2;

/// How a request travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Scheme {
    /// In the clear.
    Http,
    /// By TLS.
    Https,
}

impl Scheme {
    /// The word before `://`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// The port when none is named.
    #[must_use]
    pub const fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// A host, in the one form that is compared.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A DNS name in lower case, without a dot at the end.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(v4)) => write!(f, "{v4}"),
            Self::Address(IpAddr::V6(v6)) => write!(f, "[{v6}]"),
        }
    }
}

/// Why a text is no grant or no destination, in words for whoever wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(&'static str);

fn label(label: &str) -> bool {
    (1..=MAX_LABEL).contains(&label.len())
        && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// Whether resolvers may take a name that ends in this label for a number.
fn numeric(label: &str) -> bool {
    let hex = label.strip_prefix("0x").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()));
    hex || label.bytes().all(|b| b.is_ascii_digit())
}

/// A host in lower case. A number in any spelling but the usual one is no host: `127.1`, `0x7f000001`, `2130706433`
/// and `0177.0.0.1` are names to some and addresses to others.
fn host(text: &str) -> Result<Host, Invalid> {
    if let Some(inner) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let v6: Ipv6Addr = inner.parse().map_err(|_| Invalid("the host is no IPv6 address"))?;
        return Ok(Host::Address(IpAddr::V6(v6)));
    }
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.is_empty() || name.len() > MAX_NAME || !name.split('.').all(label) {
        return Err(Invalid("the host is neither a DNS name nor an address"));
    }
    if name.rsplit('.').next().is_some_and(numeric) {
        let v4: Ipv4Addr = name
            .parse()
            .map_err(|_| Invalid("the host is a number that is not written as an IPv4 address"))?;
        return Ok(Host::Address(IpAddr::V4(v4)));
    }
    Ok(Host::Name(name.to_owned()))
}

/// `host`, or `host:port`.
fn split_port(text: &str) -> Result<(&str, Option<u16>), Invalid> {
    let colon = match text.rfind(']') {
        Some(end) => text[end..].find(':').map(|at| end + at),
        None => text.find(':'),
    };
    let Some(colon) = colon else { return Ok((text, None)) };
    let (host, port) = (&text[..colon], &text[colon + 1..]);
    let plain =
        (1..=5).contains(&port.len()) && port.bytes().all(|b| b.is_ascii_digit()) && !port.starts_with('0');
    match port.parse() {
        Ok(port) if plain => Ok((host, Some(port))),
        _ => Err(Invalid("the port is no number from 1 to 65535")),
    }
}

/// Where a request wants to go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination {
    /// How.
    pub scheme: Scheme,
    /// To whom.
    pub host: Host,
    /// At which port.
    pub port: u16,
}

impl Destination {
    /// From the scheme and the authority of a request. Upper case and a dot at the end mean the same as without; a user
    /// or a password in the authority is refused.
    ///
    /// # Errors
    /// What is wrong with the authority.
    pub fn parse(scheme: Scheme, authority: &str) -> Result<Self, Invalid> {
        if authority.len() > MAX_GRANT {
            return Err(Invalid("the host is too long"));
        }
        if authority.contains('@') {
            return Err(Invalid("the host may not be preceded by a user or a password"));
        }
        let (name, port) = split_port(authority)?;
        Ok(Self {
            scheme,
            host: host(&name.to_ascii_lowercase())?,
            port: port.unwrap_or(scheme.default_port()),
        })
    }

    /// `host`, or `host:port` when the port is not the scheme's own: what a `Host` header says.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.port == self.scheme.default_port() {
            self.host.to_string()
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    One(Host),
    /// Names with exactly one label before this.
    Under(String),
}

/// Leave to reach one destination, or those that differ from it in their first label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpGrant {
    scheme: Scheme,
    hosts: Hosts,
    port: u16,
}

impl HttpGrant {
    /// Reads `[http://|https://][*.]host[:port]`: without a scheme by TLS only, without a port the scheme's own.
    ///
    /// # Errors
    /// What is wrong with it: upper case, a path, a wildcard elsewhere than in the first label or over fewer than two,
    /// a number that is not written as an address.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        if text.len() > MAX_GRANT {
            return Err(Invalid("it is too long"));
        }
        let (scheme, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (Scheme::Https, rest),
            (_, Some(rest)) => (Scheme::Http, rest),
            _ => (Scheme::Https, text),
        };
        let (name, port) = split_port(rest)?;
        if name.ends_with('.') || name.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(Invalid("the host must be in lower case and without a dot at the end"));
        }
        let hosts = match name.strip_prefix("*.") {
            None => Hosts::One(host(name)?),
            Some(parent) => match host(parent)? {
                Host::Name(parent) if parent.split('.').count() >= MIN_LABELS_BEHIND_WILDCARD => {
                    // Room for the label that is left open.
                    Hosts::Under(parent)
                }
                Host::Name(_) => return Err(Invalid("a wildcard needs at least two labels behind it")),
                Host::Address(_) => return Err(Invalid("a wildcard needs a name behind it")),
            },
        };
        Ok(Self { scheme, hosts, port: port.unwrap_or(scheme.default_port()) })
    }

    /// Whether it covers this destination.
    #[must_use]
    pub fn allows(&self, to: &Destination) -> bool {
        let host = match (&self.hosts, &to.host) {
            (Hosts::One(one), host) => one == host,
            (Hosts::Under(parent), Host::Name(name)) => {
                name.split_once('.').is_some_and(|(_, behind)| behind == parent)
            }
            (Hosts::Under(_), Host::Address(_)) => false,
        };
        host && self.scheme == to.scheme && self.port == to.port
    }
}

impl fmt::Display for HttpGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.scheme.as_str())?;
        match &self.hosts {
            Hosts::One(host) => write!(f, "{host}")?,
            Hosts::Under(parent) => write!(f, "*.{parent}")?,
        }
        write!(f, ":{}", self.port)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    fn grant(text: &str) -> HttpGrant {
        HttpGrant::parse(text).unwrap()
    }

    fn to(scheme: Scheme, authority: &str) -> Destination {
        Destination::parse(scheme, authority).unwrap()
    }

    #[test]
    fn a_grant_covers_its_scheme_host_and_port_and_nothing_beside() {
        use Scheme::{Http, Https};
        for (given, scheme, authority, covered) in [
            ("api.example.com", Https, "api.example.com", true),
            ("api.example.com", Https, "API.Example.COM.", true),
            ("api.example.com", Https, "api.example.com:443", true),
            ("api.example.com", Http, "api.example.com", false),
            ("api.example.com", Http, "api.example.com:443", false),
            ("api.example.com", Https, "api.example.com:8443", false),
            ("api.example.com", Https, "example.com", false),
            ("api.example.com", Https, "api.example.com.evil.org", false),
            ("api.example.com", Https, "xapi.example.com", false),
            ("http://api.example.com:8080", Http, "api.example.com:8080", true),
            ("http://api.example.com:8080", Http, "api.example.com", false),
            ("*.example.com", Https, "a.example.com", true),
            ("*.example.com", Https, "a.b.example.com", false),
            ("*.example.com", Https, "example.com", false),
            ("*.example.com", Https, "badexample.com", false),
            ("*.example.com", Https, "10.0.0.1", false),
            ("http://10.0.0.1:80", Http, "10.0.0.1", true),
            ("http://10.0.0.1", Http, "10.0.0.2", false),
            ("http://[::1]:8080", Http, "[0:0:0:0:0:0:0:1]:8080", true),
            ("http://127.0.0.1", Http, "[::ffff:127.0.0.1]", false),
        ] {
            assert_eq!(
                grant(given).allows(&to(scheme, authority)),
                covered,
                "{given} {scheme:?} {authority}"
            );
        }
    }

    #[test]
    fn numbers_in_other_spellings_than_the_usual_one_are_no_hosts() {
        for authority in [
            "2130706433",
            "0x7f000001",
            "0x7F.0.0.1",
            "0177.0.0.1",
            "127.1",
            "127.0.1",
            "127.0.0.01",
            "1",
            "0x",
            "0",
            "127.0.0.1.1",
            "256.0.0.1",
            "example.1",
            "example.0xa",
            "a.b.017",
            "127.0.0.0x1",
            "00000177.0.0.1",
        ] {
            assert!(Destination::parse(Scheme::Http, authority).is_err(), "{authority}");
            assert!(
                HttpGrant::parse(&format!("http://{}", authority.to_lowercase())).is_err(),
                "{authority}"
            );
        }
        assert_eq!(to(Scheme::Http, "127.0.0.1.").host, Host::Address(Ipv4Addr::LOCALHOST.into()));
        // Not numbers: names that only look a little like them.
        for name in ["0x7g.example", "1.example.com", "1a", "0xg"] {
            assert_eq!(to(Scheme::Http, name).host, Host::Name(name.to_owned()));
        }
    }

    #[test]
    fn authorities_with_two_readings_are_refused() {
        for authority in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "-a.b",
            "a-.b",
            "user@a.b",
            "user:pw@a.b",
            "a.b@127.0.0.1",
            "a.b:80:80",
            "a.b:",
            "a.b:0",
            "a.b:080",
            "a.b:+80",
            "a.b:65536",
            "a b",
            "a\0b",
            "a/b",
            "a.b/",
            "a\\b",
            "a%2eb",
            "ａ.example",
            "[::1",
            "::1",
            "[::1]x",
            "[::1%25eth0]",
            "[fe80::1%1]",
            "[127.0.0.1]",
            "a_b.c",
            "*.example.com",
            "a.b#c",
            "a.b?c",
            "[]",
        ] {
            assert!(Destination::parse(Scheme::Http, authority).is_err(), "{authority:?}");
        }
        assert!(Destination::parse(Scheme::Http, &"a.".repeat(200)).is_err());
    }

    #[test]
    fn grants_that_nobody_could_judge_are_refused() {
        for text in [
            "",
            "*",
            "*.com",
            "*.",
            "a.*.b",
            "**.a.b",
            "*a.example.com",
            "Example.com",
            "example.com.",
            "https://a/b",
            "ftp://a",
            "https://",
            "a:0",
            "a:65536",
            "a:*",
            "*.10.0.0.1",
            "https://user@a.b",
            "https://a.b?c",
            "*.*.a.b",
        ] {
            assert!(HttpGrant::parse(text).is_err(), "{text:?}");
        }
        assert!(HttpGrant::parse(&"a".repeat(MAX_GRANT + 1)).is_err());
    }

    #[test]
    fn a_grant_reads_as_it_is_shown() {
        for (text, shown) in [
            ("api.example.com", "https://api.example.com:443"),
            ("http://a", "http://a:80"),
            ("https://*.a-b.example:8080", "https://*.a-b.example:8080"),
            ("http://[0:0::1]", "http://[::1]:80"),
        ] {
            assert_eq!(grant(text).to_string(), shown);
            assert_eq!(grant(shown), grant(text));
        }
    }

    #[test]
    fn a_destination_says_its_port_only_where_it_must() {
        assert_eq!(to(Scheme::Https, "A.b:443").to_string(), "https://a.b");
        assert_eq!(to(Scheme::Http, "a.b:443").authority(), "a.b:443");
        assert_eq!(to(Scheme::Http, "[::0001]").authority(), "[::1]");
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_read_reads_the_same_again(text in "\\PC{0,40}|[a-zA-Z0-9.:@*\\[\\]-]{0,40}") {
            if let Ok(grant) = HttpGrant::parse(&text) {
                prop_assert_eq!(HttpGrant::parse(&grant.to_string()), Ok(grant));
            }
            if let Ok(to) = Destination::parse(Scheme::Http, &text) {
                prop_assert_eq!(Destination::parse(Scheme::Http, &to.authority()), Ok(to));
            }
        }

        #[test]
        fn a_name_is_covered_by_its_own_grant_and_by_the_wildcard_over_it_only(
            name in "[a-z]{1,5}(\\.[a-z]{1,5}){2,4}", other in "[a-z]{1,5}(\\.[a-z]{1,5}){2,4}", port in 1u16..,
        ) {
            let own = grant(&format!("http://{name}:{port}"));
            let loud = format!("{}:{port}", name.to_uppercase());
            prop_assert!(own.allows(&to(Scheme::Http, &loud)));
            prop_assert_eq!(own.allows(&to(Scheme::Http, &format!("{other}:{port}"))), name == other);
            let parent = name.split_once('.').unwrap().1;
            let wild = grant(&format!("http://*.{parent}:{port}"));
            let same = format!("{name}:{port}");
            prop_assert!(wild.allows(&to(Scheme::Http, &same)));
            let covered = wild.allows(&to(Scheme::Http, &format!("{other}:{port}")));
            prop_assert_eq!(covered, other.split_once('.').unwrap().1 == parent);
        }

        #[test]
        fn every_spelling_of_an_address_is_that_address_or_nothing(bits: u32) {
            let v4 = Ipv4Addr::from_bits(bits);
            let [a, b, c, d] = v4.octets();
            let usual = to(Scheme::Http, &v4.to_string());
            prop_assert_eq!(usual.host, Host::Address(v4.into()));
            for spelling in [
                format!("{bits}"), format!("{bits:#x}"), format!("0{bits:o}"), format!("{a:#x}.{b}.{c}.{d}"),
                format!("0{a:o}.{b}.{c}.{d}"), format!("{a}.{b}.{}", u32::from(c) << 8 | u32::from(d)),
                format!("{a}.{}", bits & 0xff_ffff), format!("{a}.{b}.{c}.{d:#X}"),
            ] {
                prop_assert!(Destination::parse(Scheme::Http, &spelling).is_err(), "{}", spelling);
            }
        }
    }
}
