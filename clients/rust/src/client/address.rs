//! Addresses of servers: `host`, `host:port`, `[::1]:7443`.

use crate::error::{Error, Result};
use crate::text;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// The port of an address without one.
pub const DEFAULT_PORT: u16 = 7443;
const MAX_ADDRESSES: usize = 32;
const MAX_NAME: usize = 253; // RFC 1035 section 2.3.4

/// A port and a host: an IP address, or a name in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// Where a connection is: the address of its server, and the IP address that it has resolved to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Endpoint {
    /// The host of the address, as it was given.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The IP address.
    pub ip: IpAddr,
}

impl Endpoint {
    pub(crate) fn is_of(&self, address: &Address) -> bool {
        self.port == address.port && self.host == address.host
    }

    pub(crate) fn new(address: &Address, ip: IpAddr) -> Self {
        Self { host: address.host.clone(), port: address.port, ip }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, ip } = self;
        write!(f, "{}", Address { host: host.clone(), port: *port })?;
        if host.parse::<IpAddr>().is_err() { write!(f, " ({ip})") } else { Ok(()) }
    }
}

impl Address {
    /// Parse several addresses, separated by commas.
    pub(crate) fn parse_list(text: &str) -> Result<Vec<Self>> {
        let mut addresses = Vec::new();
        for address in text.split(',') {
            let address = Self::parse(address.trim())?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.len() > MAX_ADDRESSES {
            let count = addresses.len();
            return Err(Error::Config(format!("{count} addresses: give at most {MAX_ADDRESSES}")));
        }
        Ok(addresses)
    }

    pub(crate) fn parse(address: &str) -> Result<Self> {
        let fault = |what: &str| Err(Error::Config(format!("\"{}\": {what}", text::escape(address, 120))));
        let (host, port) = if let Some((host, rest)) = address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let port = rest.strip_prefix(':');
            if host.parse::<Ipv6Addr>().is_err() || (port.is_none() && !rest.is_empty()) {
                return fault("write an IPv6 address with a port as [::1]:7443");
            }
            (host, port)
        } else if address.parse::<Ipv6Addr>().is_ok() {
            (address, None)
        } else {
            match address.split_once(':') {
                Some((_, port)) if port.contains(':') => return fault("write HOST:PORT, or [ADDRESS]:PORT for IPv6"),
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            }
        };
        let port = match port {
            None => DEFAULT_PORT,
            Some(digits) => match digits.parse::<u16>() {
                Ok(port) if port > 0 && digits.bytes().all(|byte| byte.is_ascii_digit()) => port,
                _ => return fault("the port must be a number from 1 to 65535"),
            },
        };
        let host = host.to_ascii_lowercase();
        let name = host.strip_suffix('.').unwrap_or(&host);
        if host.parse::<IpAddr>().is_err() && !is_name(name) {
            return fault("not a host name or an IP address; write an international name in its ASCII form");
        }
        Ok(Self { host: name.to_owned(), port })
    }
}

fn is_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
    };
    // Otherwise "1.2.3" would be resolved as an IPv4 address.
    let is_number = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    name.len() <= MAX_NAME && !is_number && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for (text, shown) in [
            ("localhost", "localhost:7443"),
            ("Example.COM.:1", "example.com:1"),
            ("127.0.0.1:65535", "127.0.0.1:65535"),
            ("::1", "[::1]:7443"),
            ("[::1]:80", "[::1]:80"),
            ("[::1]", "[::1]:7443"),
            ("a_b.c", "a_b.c:7443"),
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn several_addresses_are_separated_by_commas() {
        let shown =
            |text: &str| Address::parse_list(text).map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(shown("a:1, [::1]:2,a:1,b").unwrap(), ["a:1", "[::1]:2", "b:7443"]);
        let many = |count: u32| (0..count).map(|number| format!("a{number}")).collect::<Vec<_>>().join(",");
        assert_eq!(shown(&many(32)).unwrap().len(), 32);
        for text in ["", "a,", ",a", "a:1,b:0", &many(33)] {
            assert!(matches!(shown(text), Err(Error::Config(_))), "{text}");
        }
    }

    #[test]
    fn an_endpoint_shows_the_ip_address_of_a_name() {
        let shown =
            |host: &str, ip: &str| Endpoint::new(&Address::parse(host).unwrap(), ip.parse().unwrap()).to_string();
        assert_eq!(shown("a.example", "192.0.2.1"), "a.example:7443 (192.0.2.1)");
        assert_eq!(shown("[::1]:80", "::1"), "[::1]:80");
    }

    #[test]
    fn malformed_addresses_are_refused() {
        for text in
            ["", ":80", "a:", "a:0", "a:65536", "a:+1", "a b", "1.2.3", "a..b", "[a]:1", "[::1]80", "a:1:2", "a\n"]
        {
            assert!(matches!(Address::parse(text), Err(Error::Config(_))), "{text:?}");
        }
    }
}
