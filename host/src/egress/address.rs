//! Which addresses requests of guests may be sent to: public unicast ones, and private networks that the operator has
//! listed. Everything is judged as an address, after a name has been resolved, so how somebody spelled it does not
//! matter. What is not known to be public is refused. Pure; opens nothing.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Most networks an operator can list: a list that a person can still judge.
pub const MAX_NETWORKS: usize = 64;

/// Why an address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// `0.0.0.0/8` and `::`: this host, on many systems.
    Unspecified,
    /// `127.0.0.0/8` and `::1`.
    Loopback,
    /// Private and shared networks of IPv4.
    Private,
    /// `169.254.0.0/16` and `fe80::/10`.
    LinkLocal,
    /// `fc00::/7`, and `fec0::/10` before it.
    UniqueLocal,
    /// `224.0.0.0/4` and `ff00::/8`.
    Multicast,
    /// Where clouds hand credentials to their machines. No list opens these.
    Metadata,
    /// An IPv6 form that carries an IPv4 address: mapped, compatible, translated, tunnelled.
    Carrier,
    /// Documentation, benchmarks, protocol assignments, and what nobody has been given yet.
    Reserved,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unspecified => "an unspecified address",
            Self::Loopback => "a loopback address",
            Self::Private => "a private address",
            Self::LinkLocal => "a link-local address",
            Self::UniqueLocal => "a unique-local address",
            Self::Multicast => "a multicast address",
            Self::Metadata => "a cloud's metadata address",
            Self::Carrier => "an IPv6 address that carries an IPv4 address",
            Self::Reserved => "a reserved address",
        })
    }
}

/// Metadata services of clouds; the last of the IPv4 ones lies in public space.
const METADATA_V4: [Ipv4Addr; 5] = [
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(169, 254, 170, 2),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(192, 0, 0, 192),
    Ipv4Addr::new(168, 63, 129, 16),
];
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x23),
    Ipv6Addr::new(0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x254),
];

/// Special networks of IPv4, from the registry of the IANA.
const SPECIAL_V4: [(Ipv4Addr, u32, Scope); 15] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8, Scope::Unspecified),
    (Ipv4Addr::new(10, 0, 0, 0), 8, Scope::Private),
    (Ipv4Addr::new(100, 64, 0, 0), 10, Scope::Private),
    (Ipv4Addr::new(127, 0, 0, 0), 8, Scope::Loopback),
    (Ipv4Addr::new(169, 254, 0, 0), 16, Scope::LinkLocal),
    (Ipv4Addr::new(172, 16, 0, 0), 12, Scope::Private),
    (Ipv4Addr::new(192, 0, 0, 0), 24, Scope::Reserved),
    (Ipv4Addr::new(192, 0, 2, 0), 24, Scope::Reserved),
    (Ipv4Addr::new(192, 88, 99, 0), 24, Scope::Reserved),
    (Ipv4Addr::new(192, 168, 0, 0), 16, Scope::Private),
    (Ipv4Addr::new(198, 18, 0, 0), 15, Scope::Reserved),
    (Ipv4Addr::new(198, 51, 100, 0), 24, Scope::Reserved),
    (Ipv4Addr::new(203, 0, 113, 0), 24, Scope::Reserved),
    (Ipv4Addr::new(224, 0, 0, 0), 4, Scope::Multicast),
    (Ipv4Addr::new(240, 0, 0, 0), 4, Scope::Reserved),
];

/// Special networks of IPv6, the narrow ones first. `2000::/3` alone is given out; the rest of the space is refused.
const SPECIAL_V6: [(Ipv6Addr, u32, Scope); 9] = [
    (Ipv6Addr::LOCALHOST, 128, Scope::Loopback),
    (Ipv6Addr::UNSPECIFIED, 128, Scope::Unspecified),
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23, Scope::Reserved),
    (Ipv6Addr::new(0x2001, 0x0db8, 0, 0, 0, 0, 0, 0), 32, Scope::Reserved),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20, Scope::Reserved),
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7, Scope::UniqueLocal),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10, Scope::LinkLocal),
    (Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0), 10, Scope::UniqueLocal),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8, Scope::Multicast),
];

/// Forms of IPv6 that carry an IPv4 address, and the bit it begins at.
const CARRIERS: [(Ipv6Addr, u32, u32); 7] = [
    // Mapped.
    (Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96, 96),
    // Translated by a stateless translator.
    (Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96, 96),
    // Compatible, long deprecated. After loopback and unspecified, which lie in it.
    (Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 0), 96, 96),
    // NAT64, everybody's prefix and the local ones.
    (Ipv6Addr::new(0x0064, 0xff9b, 0, 0, 0, 0, 0, 0), 96, 96),
    (Ipv6Addr::new(0x0064, 0xff9b, 1, 0, 0, 0, 0, 0), 48, 96),
    // 6to4.
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16, 16),
    // Teredo: the client's, written inverted. Judged as written, which is no worse: the form alone is refused.
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32, 96),
];

/// The IPv4 address that an IPv6 address carries.
fn carried(address: Ipv6Addr) -> Option<Ipv4Addr> {
    if address == Ipv6Addr::LOCALHOST || address == Ipv6Addr::UNSPECIFIED {
        return None;
    }
    let bits = address.to_bits();
    let teredo = bits >> 96 == 0x2001_0000;
    let form = CARRIERS.iter().find(|(base, prefix, _)| same_prefix_v6(bits, base.to_bits(), *prefix));
    // ISATAP: any prefix, and a mark before the last 32 bits.
    let isatap = matches!((bits >> 32) & 0xffff_ffff, 0x0000_5efe | 0x0200_5efe);
    let at = form.map(|(_, _, at)| *at).or(isatap.then_some(96))?;
    let v4 = u32::try_from((bits >> (96 - at)) & 0xffff_ffff).ok()?;
    Some(Ipv4Addr::from_bits(if teredo { !v4 } else { v4 }))
}

const fn same_prefix_v4(a: u32, b: u32, prefix: u32) -> bool {
    prefix == 0 || (a ^ b) >> (32 - prefix) == 0
}

const fn same_prefix_v6(a: u128, b: u128, prefix: u32) -> bool {
    prefix == 0 || (a ^ b) >> (128 - prefix) == 0
}

/// What is special about an address; `None`: nothing, it is public.
#[must_use]
pub fn scope(address: IpAddr) -> Option<Scope> {
    match address {
        IpAddr::V4(v4) if METADATA_V4.contains(&v4) => Some(Scope::Metadata),
        IpAddr::V4(v4) => SPECIAL_V4
            .iter()
            .find(|(base, prefix, _)| same_prefix_v4(v4.to_bits(), base.to_bits(), *prefix))
            .map(|(_, _, scope)| *scope),
        IpAddr::V6(v6) if METADATA_V6.contains(&v6) => Some(Scope::Metadata),
        IpAddr::V6(v6) if carried(v6).is_some() => Some(Scope::Carrier),
        IpAddr::V6(v6) => SPECIAL_V6
            .iter()
            .find(|(base, prefix, _)| same_prefix_v6(v6.to_bits(), base.to_bits(), *prefix))
            .map(|(_, _, scope)| *scope)
            .or_else(|| (v6.to_bits() >> 125 != 0b001).then_some(Scope::Reserved)),
    }
}

/// One network: an address and the number of its leading bits that count, as in `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    base: IpAddr,
    prefix: u32,
}

/// A text that is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no network: expected an address or a network such as 10.0.0.0/8 or fd00:1::/32, with no bits set behind the prefix"
)]
pub struct InvalidNetwork(String);

impl Network {
    fn contains(&self, address: IpAddr) -> bool {
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(v4)) => same_prefix_v4(base.to_bits(), v4.to_bits(), self.prefix),
            (IpAddr::V6(base), IpAddr::V6(v6)) => same_prefix_v6(base.to_bits(), v6.to_bits(), self.prefix),
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        let invalid = || InvalidNetwork(text.chars().take(64).collect());
        let (base, prefix) = match text.split_once('/') {
            Some((base, prefix)) if prefix.len() <= 3 && prefix.bytes().all(|b| b.is_ascii_digit()) => {
                (base, Some(prefix.parse().map_err(|_| invalid())?))
            }
            Some(_) => return Err(invalid()),
            None => (text, None),
        };
        let base: IpAddr = base.parse().map_err(|_| invalid())?;
        let (width, behind) = match base {
            IpAddr::V4(v4) => (32, u128::from(v4.to_bits()) << 96),
            IpAddr::V6(v6) => (128, v6.to_bits()),
        };
        let prefix: u32 = prefix.unwrap_or(width);
        if prefix > width || behind.checked_shl(prefix).unwrap_or(0) != 0 {
            return Err(invalid());
        }
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl serde::Serialize for Network {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Network {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Private networks that the operator lets guests reach. None by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

impl Networks {
    /// These networks.
    #[must_use]
    pub const fn new(networks: Vec<Network>) -> Self {
        Self(networks)
    }

    /// Whether a request may be sent to this address.
    ///
    /// # Errors
    /// Why not. A form that carries an IPv4 address needs both the form and the address in it to be allowed.
    pub fn check(&self, address: IpAddr) -> Result<(), Scope> {
        let Some(scope) = scope(address) else { return Ok(()) };
        let listed = self.0.iter().any(|network| network.contains(address));
        match (scope, address) {
            (Scope::Metadata, _) => Err(scope),
            _ if !listed => Err(scope),
            (Scope::Carrier, IpAddr::V6(v6)) => match carried(v6) {
                Some(v4) => self.check(IpAddr::V4(v4)),
                None => Err(scope),
            },
            _ => Ok(()),
        }
    }

    /// Whether a request may be sent to a name that resolves to these addresses. One bad one spoils them all: a name
    /// that is public and private at once is an attack or a mistake.
    ///
    /// # Errors
    /// What is wrong with the first that is refused.
    pub fn check_all(&self, addresses: &[IpAddr]) -> Result<(), Scope> {
        addresses.iter().try_for_each(|address| self.check(*address))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn networks(list: &[&str]) -> Networks {
        Networks::new(list.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn what_is_not_public_is_refused_by_its_name() {
        for (address, expected) in [
            ("0.0.0.0", Scope::Unspecified),
            ("0.1.2.3", Scope::Unspecified),
            ("127.0.0.1", Scope::Loopback),
            ("127.255.255.254", Scope::Loopback),
            ("10.0.0.0", Scope::Private),
            ("10.255.255.255", Scope::Private),
            ("100.64.0.1", Scope::Private),
            ("100.127.255.255", Scope::Private),
            ("172.16.0.1", Scope::Private),
            ("172.31.255.255", Scope::Private),
            ("192.168.0.1", Scope::Private),
            ("169.254.0.1", Scope::LinkLocal),
            ("169.254.169.254", Scope::Metadata),
            ("169.254.170.2", Scope::Metadata),
            ("100.100.100.200", Scope::Metadata),
            ("168.63.129.16", Scope::Metadata),
            ("192.0.0.192", Scope::Metadata),
            ("192.0.0.1", Scope::Reserved),
            ("192.0.2.1", Scope::Reserved),
            ("192.88.99.1", Scope::Reserved),
            ("198.18.0.1", Scope::Reserved),
            ("198.19.255.255", Scope::Reserved),
            ("198.51.100.7", Scope::Reserved),
            ("203.0.113.9", Scope::Reserved),
            ("224.0.0.1", Scope::Multicast),
            ("239.255.255.255", Scope::Multicast),
            ("240.0.0.1", Scope::Reserved),
            ("255.255.255.255", Scope::Reserved),
            ("::", Scope::Unspecified),
            ("::1", Scope::Loopback),
            ("::ffff:127.0.0.1", Scope::Carrier),
            ("::ffff:8.8.8.8", Scope::Carrier),
            ("::127.0.0.1", Scope::Carrier),
            ("::2", Scope::Carrier),
            ("::ffff:0:10.0.0.1", Scope::Carrier),
            ("64:ff9b::169.254.169.254", Scope::Carrier),
            ("64:ff9b:1:2:3:4:10.0.0.1", Scope::Carrier),
            ("2002:7f00:1::", Scope::Carrier),
            ("2002:a9fe:a9fe::1", Scope::Carrier),
            ("2001:0:4136:e378:8000:63bf:3fff:fdd2", Scope::Carrier),
            ("2606:4700::5efe:10.0.0.1", Scope::Carrier),
            ("2606:4700::200:5efe:10.0.0.1", Scope::Carrier),
            ("fe80::1", Scope::LinkLocal),
            ("febf::1", Scope::LinkLocal),
            ("fec0::1", Scope::UniqueLocal),
            ("fc00::1", Scope::UniqueLocal),
            ("fd12:3456::1", Scope::UniqueLocal),
            ("fd00:ec2::254", Scope::Metadata),
            ("fd20:ce::254", Scope::Metadata),
            ("ff02::1", Scope::Multicast),
            ("2001:2::1", Scope::Reserved),
            ("2001:20::1", Scope::Reserved),
            ("2001:db8::1", Scope::Reserved),
            ("3fff::1", Scope::Reserved),
            ("100::1", Scope::Reserved),
            ("4000::1", Scope::Reserved),
            ("5f00::1", Scope::Reserved),
            ("64:ff9b:2::1", Scope::Reserved),
        ] {
            assert_eq!(Networks::default().check(ip(address)), Err(expected), "{address}");
        }
    }

    #[test]
    fn neighbours_of_special_networks_are_public() {
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "168.63.129.17",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2606:4700:4700::1111",
            "2003::1",
            "3ffe::1",
            "2a00:1450::1",
        ] {
            assert_eq!(Networks::default().check(ip(address)), Ok(()), "{address}");
        }
    }

    #[test]
    fn an_operator_opens_exactly_the_networks_on_the_list_and_never_metadata() {
        let list = networks(&["10.1.0.0/16", "127.0.0.1", "fd00::/8", "169.254.0.0/16", "64:ff9b::/96"]);
        for allowed in
            ["10.1.0.0", "10.1.255.255", "127.0.0.1", "fd12::1", "169.254.3.4", "64:ff9b::8.8.8.8", "8.8.8.8"]
        {
            assert_eq!(list.check(ip(allowed)), Ok(()), "{allowed}");
        }
        for (refused, why) in [
            ("10.2.0.1", Scope::Private),
            ("127.0.0.2", Scope::Loopback),
            ("::ffff:10.1.0.1", Scope::Carrier),
            ("fc00::1", Scope::UniqueLocal),
            ("169.254.169.254", Scope::Metadata),
            ("fd00:ec2::254", Scope::Metadata),
            ("64:ff9b::192.168.0.1", Scope::Private),
            ("64:ff9b::169.254.169.254", Scope::Metadata),
        ] {
            assert_eq!(list.check(ip(refused)), Err(why), "{refused}");
        }
    }

    #[test]
    fn everything_listed_still_leaves_metadata_refused() {
        let all = networks(&["0.0.0.0/0", "::/0"]);
        for address in METADATA_V4 {
            assert_eq!(all.check(IpAddr::V4(address)), Err(Scope::Metadata));
            for form in [address.to_ipv6_mapped(), address.to_ipv6_compatible()] {
                assert_eq!(all.check(IpAddr::V6(form)), Err(Scope::Metadata), "{form}");
            }
        }
        for address in METADATA_V6 {
            assert_eq!(all.check(IpAddr::V6(address)), Err(Scope::Metadata));
        }
        // Teredo carries the client's address inverted.
        assert_eq!(all.check(ip("2001:0:1::5601:5601")), Err(Scope::Metadata));
    }

    #[test]
    fn one_bad_address_spoils_a_name() {
        let none = Networks::default();
        assert_eq!(none.check_all(&[ip("8.8.8.8"), ip("2606:4700::1")]), Ok(()));
        assert_eq!(none.check_all(&[ip("8.8.8.8"), ip("127.0.0.1")]), Err(Scope::Loopback));
    }

    #[test]
    fn networks_are_read_as_they_are_shown_and_sloppy_ones_are_refused() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("127.0.0.1", "127.0.0.1/32"),
            ("::/0", "::/0"),
            ("fd00::/8", "fd00::/8"),
        ] {
            let network: Network = text.parse().unwrap();
            assert_eq!(network.to_string(), shown);
            assert_eq!(shown.parse::<Network>(), Ok(network));
        }
        for text in [
            "",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10/8",
            "::1/64",
            "fd00::/129",
            "a",
            "0x7f.0.0.1",
        ] {
            assert!(text.parse::<Network>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn an_ipv4_address_is_judged_alike_alone_and_in_every_form_that_carries_it(bits: u32) {
            let v4 = Ipv4Addr::from_bits(bits);
            let forms = [
                v4.to_ipv6_mapped().to_bits(),
                0xffff_0000_0000 << 16 | u128::from(bits),
                0x0064_ff9b_u128 << 96 | u128::from(bits),
                0x0064_ff9b_0001_u128 << 80 | u128::from(bits),
                0x2002_u128 << 112 | u128::from(bits) << 80,
                0x2001_0000_u128 << 96 | u128::from(!bits),
                0x2606_4700_u128 << 96 | 0x5efe << 32 | u128::from(bits),
            ];
            let every_form = networks(&["::/0"]);
            for form in forms {
                let form = IpAddr::V6(Ipv6Addr::from_bits(form));
                // By default not even a public address is reached in disguise …
                prop_assert_eq!(Networks::default().check(form), Err(Scope::Carrier), "{}", form);
                // … and where the disguise is allowed, what is in it decides.
                prop_assert_eq!(every_form.check(form), every_form.check(IpAddr::V4(v4)), "{}", form);
            }
        }

        #[test]
        fn what_the_standard_library_calls_local_is_never_public(bits: u32, wide: u128) {
            let v4 = Ipv4Addr::from_bits(bits);
            if v4.is_loopback() || v4.is_private() || v4.is_link_local() || v4.is_multicast() || v4.is_broadcast()
                || v4.is_documentation() || v4.is_unspecified()
            {
                prop_assert!(scope(IpAddr::V4(v4)).is_some());
            }
            let v6 = Ipv6Addr::from_bits(wide);
            if v6.is_loopback() || v6.is_unspecified() || v6.is_multicast() || v6.is_unique_local()
                || v6.is_unicast_link_local() || v6.to_ipv4().is_some()
            {
                prop_assert!(scope(IpAddr::V6(v6)).is_some());
            }
        }

        #[test]
        fn a_network_contains_what_shares_its_prefix_and_nothing_else(bits: u32, other: u32, prefix in 0u32..=32) {
            let base = if prefix == 0 { 0 } else { bits >> (32 - prefix) << (32 - prefix) };
            let network: Network = format!("{}/{prefix}", Ipv4Addr::from_bits(base)).parse().unwrap();
            let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
            prop_assert_eq!(network.contains(IpAddr::V4(Ipv4Addr::from_bits(other))), other & mask == base);
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Network>();
        }
    }
}
