//! The servers of a client: where they are, which one to try next, and for how long each one rests after a failure.
//!
//! Rules: an endpoint is one IP address of one address of the application. Each has a delay of its own, so that a server that is
//! down neither delays the others nor is tried more often because of them. A client stays with its server until the connection
//! ends. All time and randomness are parameters.

use super::address::{Address, Endpoint};
use super::backoff::Backoff;
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// How many endpoints are tried in one round; more addresses of a name are ignored.
const MAX_TRIED: usize = 64;
/// How many endpoints are remembered.
const MAX_KNOWN: usize = 256;
/// How long an attempt may take until TCP is connected, before the next one starts beside it.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// How long it may take from then to WELCOME. A fleet that is slow must not get several times the handshakes.
const HANDSHAKE_DELAY: Duration = Duration::from_secs(2);
/// How long to wait for the first address in the order after another one has been resolved.
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);

/// The order in which a client with several addresses tries them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressOrder {
    /// Another order each time, so that many clients spread evenly over the servers.
    #[default]
    Random,
    /// In the order given: a primary server and its backups.
    Listed,
}

/// What failed: an attempt at an endpoint, or the resolution of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Endpoint(Endpoint),
    Name(Address),
}

impl Place {
    fn is_of(&self, address: &Address) -> bool {
        match self {
            Self::Endpoint(endpoint) => endpoint.is_of(address),
            Self::Name(name) => name == address,
        }
    }
}

/// The state of a place after its last attempt.
#[derive(Debug, Default)]
struct Rest {
    backoff: Backoff,
    until: Option<Instant>,
    /// Whether the last attempt has failed for a reason that stays, such as another certificate.
    is_permanent: bool,
}

/// The state of all endpoints of a client.
#[derive(Debug)]
pub(crate) struct Endpoints {
    pub(crate) addresses: Vec<Address>,
    order: AddressOrder,
    random: fn() -> f64,
    known: Vec<(Place, Rest)>, // the oldest first
    last_used: Option<Endpoint>,
}

impl Endpoints {
    pub(crate) fn new(addresses: Vec<Address>, order: AddressOrder, random: fn() -> f64) -> Self {
        Self { addresses, order, random, known: Vec::new(), last_used: None }
    }

    /// Return when the next round may begin; `None` for at once.
    pub(crate) fn due_at(&self) -> Option<Instant> {
        let due_times = self.addresses.iter().map(|address| {
            let own = self.known.iter().filter(|(place, _)| place.is_of(address));
            let name = own.clone().find(|(place, _)| matches!(place, Place::Name(_)));
            match name {
                Some((_, rest)) => rest.until, // it cannot be resolved
                None => own.map(|(_, rest)| rest.until).min()?,
            }
        });
        due_times.min()?
    }

    /// Return whether there is more than one endpoint, as far as that is known.
    pub(crate) fn are_several(&self) -> bool {
        let endpoints = self.known.iter().filter(|(place, _)| matches!(place, Place::Endpoint(_)));
        self.addresses.len() > 1 || endpoints.count() > 1
    }

    /// Let no place rest.
    pub(crate) fn end_rests(&mut self) {
        for (_, rest) in &mut self.known {
            rest.until = None;
        }
    }

    fn rest(&mut self, place: &Place) -> &mut Rest {
        let index = self.known.iter().position(|(known, _)| known == place).unwrap_or_else(|| {
            if self.known.len() == MAX_KNOWN {
                self.known.remove(0);
            }
            self.known
                .push((place.clone(), Rest { backoff: Backoff::new(self.random), until: None, is_permanent: false }));
            self.known.len() - 1
        });
        &mut self.known[index].1
    }

    fn is_due(&self, place: &Place, now: Instant) -> bool {
        let rest = self.known.iter().find(|(known, _)| known == place);
        rest.and_then(|(_, rest)| rest.until).is_none_or(|until| until <= now)
    }

    fn rests_until(&self, place: &Place) -> Option<Instant> {
        self.known.iter().find(|(known, _)| known == place)?.1.until
    }

    /// Let a place rest after a failure, at most for a limit if there is one.
    pub(crate) fn failed(&mut self, place: &Place, retry_after: Duration, limit: Option<Duration>, now: Instant) {
        let rest = self.rest(place);
        let delay = rest.backoff.next(retry_after);
        rest.until = Some(now + limit.map_or(delay, |limit| delay.min(retry_after.max(limit))));
    }

    /// Record whether the last failure of a place is permanent.
    pub(crate) fn set_permanent(&mut self, place: &Place, is_permanent: bool) {
        self.rest(place).is_permanent = is_permanent;
    }

    /// Return whether all servers have failed permanently.
    pub(crate) fn are_all_permanent(&self) -> bool {
        let is_permanent = |address: &Address| {
            let mut own = self.known.iter().filter(|(place, _)| place.is_of(address)).peekable();
            own.peek().is_some() && own.all(|(_, rest)| rest.is_permanent)
        };
        self.addresses.iter().all(is_permanent)
    }

    /// Record that an endpoint is in use.
    pub(crate) fn used(&mut self, endpoint: &Endpoint) {
        let rest = self.rest(&Place::Endpoint(endpoint.clone()));
        rest.until = None;
        rest.is_permanent = false;
        self.last_used = Some(endpoint.clone());
    }

    /// Start the delays of an endpoint again, after a success.
    pub(crate) fn reset(&mut self, endpoint: &Endpoint) {
        self.rest(&Place::Endpoint(endpoint.clone())).backoff.reset();
    }

    /// Forget endpoints that their names do not have any more, and names that were resolved.
    fn resolved(&mut self, address: &Address, ips: &[IpAddr]) {
        self.known.retain(|(place, _)| match place {
            Place::Name(name) => name != address,
            Place::Endpoint(endpoint) => !endpoint.is_of(address) || ips.contains(&endpoint.ip),
        });
    }

    /// Begin a round.
    pub(crate) fn round(&self) -> Round {
        let mut addresses = self.addresses.clone();
        if self.order == AddressOrder::Random {
            shuffle(&mut addresses, self.random);
        }
        let names = addresses.into_iter().map(|address| Name { address, ips: None }).collect();
        Round { names, resolved_at: None, tried: Vec::new(), running: Vec::new(), last_started: None }
    }
}

/// An address in a round, with its IP addresses once they are known: none if it cannot be resolved.
#[derive(Debug)]
struct Name {
    address: Address,
    ips: Option<Vec<IpAddr>>,
}

#[derive(Debug)]
struct Running {
    endpoint: Endpoint,
    started: Instant,
    connected: Option<Instant>,
}

/// One round: each endpoint that does not rest is tried once, and the next one starts beside the last if that is slow.
#[derive(Debug)]
pub(crate) struct Round {
    names: Vec<Name>, // in the order in which they are tried
    resolved_at: Option<Instant>,
    tried: Vec<Endpoint>,
    running: Vec<Running>,
    last_started: Option<Endpoint>,
}

/// What to do next in a round.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Start an attempt.
    Start(Endpoint),
    /// Wait for an event, or for this time.
    Wait(Option<Instant>),
    /// All attempts have failed.
    Over,
}

impl Round {
    /// Return the addresses, to resolve them.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.names.iter().map(|name| &name.address)
    }

    /// Do not try an endpoint.
    pub(crate) fn exclude(&mut self, endpoint: &Endpoint) {
        self.tried.push(endpoint.clone());
    }

    /// Record the IP addresses of an address; none if it cannot be resolved.
    pub(crate) fn resolved(&mut self, endpoints: &mut Endpoints, address: &Address, ips: Vec<IpAddr>, now: Instant) {
        if !ips.is_empty() {
            endpoints.resolved(address, &ips);
            self.resolved_at.get_or_insert(now);
        }
        let others: usize = self.names.iter().filter_map(|name| name.ips.as_ref()).map(Vec::len).sum();
        let mut ips = interleaved(ips, (endpoints.order == AddressOrder::Random).then_some(endpoints.random));
        let place = |ip: &IpAddr| Place::Endpoint(Endpoint::new(address, *ip));
        ips.sort_by_key(|ip| !endpoints.is_due(&place(ip), now));
        ips.truncate(MAX_TRIED.saturating_sub(others));
        for ip in &ips {
            endpoints.rest(&place(ip)); // known from now on
        }
        if let Some(name) = self.names.iter_mut().find(|name| name.address == *address) {
            name.ips = Some(ips);
        }
    }

    /// Record that an attempt has connected TCP.
    pub(crate) fn connected(&mut self, endpoint: &Endpoint, now: Instant) {
        if let Some(running) = self.running.iter_mut().find(|running| running.endpoint == *endpoint) {
            running.connected = Some(now);
        }
    }

    /// Record that an attempt has failed.
    pub(crate) fn failed(&mut self, endpoint: &Endpoint) {
        self.running.retain(|running| running.endpoint != *endpoint);
    }

    /// Return where an endpoint, or an address, is in the order.
    pub(crate) fn position(&self, place: &Place) -> usize {
        self.names.iter().position(|name| place.is_of(&name.address)).unwrap_or(self.names.len())
    }

    /// Return what to do next. After `Start` the attempt is recorded as begun.
    pub(crate) fn next(&mut self, endpoints: &Endpoints, now: Instant) -> Step {
        let mut times = Vec::new();
        if self.tried.is_empty() && self.names.first().is_some_and(|first| first.ips.is_none()) {
            match self.resolved_at.map(|at| at + RESOLUTION_DELAY) {
                Some(begin) if begin <= now => {}
                begin => return Step::Wait(begin),
            }
        }
        let untried: Vec<Endpoint> = self.untried().collect();
        let mut due = untried.iter().filter(|endpoint| endpoints.is_due(&Place::Endpoint((*endpoint).clone()), now));
        let sticky = due.clone().find(|endpoint| endpoints.last_used.as_ref() == Some(endpoint));
        if let Some(next) = sticky.or_else(|| due.next()) {
            let last = self.running.iter().find(|running| Some(&running.endpoint) == self.last_started.as_ref());
            let start = last.map_or(now, |last| match last.connected {
                None => last.started + ATTEMPT_DELAY,
                Some(connected) => connected + HANDSHAKE_DELAY,
            });
            if start <= now {
                self.tried.push(next.clone());
                self.running.push(Running { endpoint: next.clone(), started: now, connected: None });
                self.last_started = Some(next.clone());
                return Step::Start(next.clone());
            }
            times.push(start);
        }
        let is_resolving = self.names.iter().any(|name| name.ips.is_none());
        if self.running.is_empty() && !is_resolving && times.is_empty() {
            return Step::Over;
        }
        // A rest can end while other attempts run.
        let rests = untried.into_iter().filter_map(|endpoint| endpoints.rests_until(&Place::Endpoint(endpoint)));
        times.extend(rests.filter(|until| *until > now));
        Step::Wait(times.into_iter().min())
    }

    fn untried(&self) -> impl Iterator<Item = Endpoint> {
        let all =
            self.names.iter().flat_map(|name| name.ips.iter().flatten().map(|ip| Endpoint::new(&name.address, *ip)));
        all.filter(|endpoint| !self.tried.contains(endpoint))
    }
}

fn shuffle<T>(items: &mut [T], random: fn() -> f64) {
    for last in (1..items.len()).rev() {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index"
        )]
        let other = (random() * (last + 1) as f64) as usize;
        items.swap(last, other.min(last));
    }
}

/// Return IP addresses with both families in turn, that of the first one first (RFC 8305, section 4). With a source of
/// randomness, those of a family are in random order.
fn interleaved(ips: Vec<IpAddr>, random: Option<fn() -> f64>) -> Vec<IpAddr> {
    let is_v6 = ips.first().is_some_and(IpAddr::is_ipv6);
    let (mut first, mut second): (Vec<_>, Vec<_>) = ips.into_iter().partition(|ip| ip.is_ipv6() == is_v6);
    if let Some(random) = random {
        shuffle(&mut first, random);
        shuffle(&mut second, random);
    }
    let mut mixed = Vec::with_capacity(first.len() + second.len());
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    loop {
        let before = mixed.len();
        mixed.extend(first.next());
        mixed.extend(second.next());
        if mixed.len() == before {
            return mixed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const S: Duration = Duration::from_secs(1);

    fn address(text: &str) -> Address {
        Address::parse(text).unwrap()
    }

    fn endpoint(host: &str, ip: &str) -> Endpoint {
        Endpoint::new(&address(host), ip.parse().unwrap())
    }

    fn place(host: &str, ip: &str) -> Place {
        Place::Endpoint(endpoint(host, ip))
    }

    /// Endpoints without jitter: each delay is its ceiling.
    fn endpoints(hosts: &[&str]) -> Endpoints {
        Endpoints::new(hosts.iter().map(|host| address(host)).collect(), AddressOrder::Listed, || 1.0)
    }

    /// A round in which each host has the IP addresses given.
    fn resolved(endpoints: &mut Endpoints, ips: &[(&str, &[&str])], now: Instant) -> Round {
        let mut round = endpoints.round();
        for (host, ips) in ips {
            let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
            round.resolved(endpoints, &address(host), ips, now);
        }
        round
    }

    const TWO: [(&str, &[&str]); 2] = [("a", &["192.0.2.1"]), ("b", &["192.0.2.2"])];

    #[test]
    fn the_next_attempt_starts_at_once_after_a_failure() {
        let (mut endpoints, now) = (endpoints(&["a", "b"]), Instant::now());
        let mut round = resolved(&mut endpoints, &TWO, now);
        let (a, b) = (endpoint("a", "192.0.2.1"), endpoint("b", "192.0.2.2"));
        assert_eq!(round.next(&endpoints, now), Step::Start(a.clone()));
        round.failed(&a);
        assert_eq!(round.next(&endpoints, now), Step::Start(b.clone()));
        assert_eq!(round.next(&endpoints, now), Step::Wait(None));
        round.failed(&b);
        assert_eq!(round.next(&endpoints, now), Step::Over);
    }

    #[test]
    fn a_slow_attempt_is_joined_after_250_ms_or_2_s_after_tcp() {
        let (mut endpoints, now) = (endpoints(&["a", "b", "c"]), Instant::now());
        let ips: [(&str, &[&str]); 3] = [TWO[0], TWO[1], ("c", &["192.0.2.3"])];
        let mut round = resolved(&mut endpoints, &ips, now);
        assert!(matches!(round.next(&endpoints, now), Step::Start(_)));
        assert_eq!(round.next(&endpoints, now), Step::Wait(Some(now + 250 * MS)));
        let b = endpoint("b", "192.0.2.2");
        assert_eq!(round.next(&endpoints, now + 250 * MS), Step::Start(b.clone()));
        round.connected(&b, now + 300 * MS);
        assert_eq!(round.next(&endpoints, now + 300 * MS), Step::Wait(Some(now + 2_300 * MS)));
        assert_eq!(round.next(&endpoints, now + 2_300 * MS), Step::Start(endpoint("c", "192.0.2.3")));
    }

    #[test]
    fn a_slow_name_holds_up_the_others_for_50_ms_and_joins_later() {
        let (mut endpoints, now) = (endpoints(&["a", "b"]), Instant::now());
        let mut round = endpoints.round();
        assert_eq!(round.next(&endpoints, now), Step::Wait(None));
        round.resolved(&mut endpoints, &address("b"), vec!["192.0.2.2".parse().unwrap()], now);
        assert_eq!(round.next(&endpoints, now), Step::Wait(Some(now + 50 * MS)));
        let b = endpoint("b", "192.0.2.2");
        assert_eq!(round.next(&endpoints, now + 50 * MS), Step::Start(b.clone()));
        round.failed(&b);
        assert_eq!(round.next(&endpoints, now + S), Step::Wait(None));
        round.resolved(&mut endpoints, &address("a"), vec!["192.0.2.1".parse().unwrap()], now + S);
        assert_eq!(round.next(&endpoints, now + S), Step::Start(endpoint("a", "192.0.2.1")));
    }

    #[test]
    fn a_name_that_fails_holds_up_nothing() {
        let (mut endpoints, now) = (endpoints(&["a", "b"]), Instant::now());
        let mut round = resolved(&mut endpoints, &[("a", &[]), TWO[1]], now);
        assert_eq!(round.next(&endpoints, now), Step::Start(endpoint("b", "192.0.2.2")));
    }

    #[test]
    fn each_endpoint_rests_for_its_own_time() {
        let (mut endpoints, now) = (endpoints(&["a", "b"]), Instant::now());
        let (a, b) = (place("a", "192.0.2.1"), place("b", "192.0.2.2"));
        assert_eq!(endpoints.due_at(), None);
        for _ in 0..3 {
            endpoints.failed(&a, Duration::ZERO, None, now);
        }
        endpoints.failed(&b, Duration::ZERO, None, now);
        assert_eq!(endpoints.due_at(), Some(now + 100 * MS));
        let mut round = resolved(&mut endpoints, &TWO, now);
        assert_eq!(round.next(&endpoints, now), Step::Over);
        let later = now + 100 * MS;
        let mut round = resolved(&mut endpoints, &TWO, later);
        assert_eq!(round.next(&endpoints, later), Step::Start(endpoint("b", "192.0.2.2")));
        assert_eq!(round.next(&endpoints, later), Step::Wait(Some(now + 400 * MS))); // when the other one is due
        endpoints.failed(&b, S, Some(S / 2), now);
        assert_eq!(endpoints.rests_until(&b), Some(now + S), "a limit does not shorten what the server asks for");
        endpoints.end_rests();
        assert_eq!(endpoints.due_at(), None);
    }

    #[test]
    fn a_server_that_was_not_tried_yet_does_not_rest() {
        let (mut endpoints, now) = (endpoints(&["a", "b"]), Instant::now());
        let mut round = endpoints.round();
        round.resolved(&mut endpoints, &address("a"), vec!["192.0.2.1".parse().unwrap()], now);
        endpoints.failed(&place("a", "192.0.2.1"), S, None, now);
        assert_eq!(endpoints.due_at(), None); // b was not resolved
        let ips: [&str; 2] = ["192.0.2.1", "192.0.2.3"];
        resolved(&mut endpoints, &[("a", &ips), ("b", &[])], now);
        endpoints.failed(&Place::Name(address("b")), S, None, now);
        assert_eq!(endpoints.due_at(), None); // another address of a
    }

    #[test]
    fn one_server_that_may_come_back_is_enough_to_go_on() {
        let (mut endpoints, now) = (endpoints(&["a", "b"]), Instant::now());
        let (a, b) = (place("a", "192.0.2.1"), place("b", "192.0.2.2"));
        endpoints.set_permanent(&a, true);
        assert!(!endpoints.are_all_permanent()); // b is unknown
        endpoints.failed(&b, S, None, now);
        assert!(!endpoints.are_all_permanent());
        endpoints.set_permanent(&b, true);
        assert!(endpoints.are_all_permanent());
        endpoints.used(&endpoint("a", "192.0.2.1"));
        assert!(!endpoints.are_all_permanent());
    }

    #[test]
    fn a_client_stays_with_its_server_unless_it_rests() {
        let (mut endpoints, now) = (endpoints(&["a", "b"]), Instant::now());
        let b = endpoint("b", "192.0.2.2");
        endpoints.used(&b);
        assert_eq!(resolved(&mut endpoints, &TWO, now).next(&endpoints, now), Step::Start(b.clone()));
        endpoints.failed(&Place::Endpoint(b), Duration::ZERO, None, now);
        let next = resolved(&mut endpoints, &TWO, now).next(&endpoints, now);
        assert_eq!(next, Step::Start(endpoint("a", "192.0.2.1")));
    }

    #[test]
    fn endpoints_that_a_name_has_lost_are_forgotten() {
        let (mut endpoints, now) = (endpoints(&["a"]), Instant::now());
        endpoints.used(&endpoint("a", "192.0.2.9"));
        endpoints.failed(&place("a", "192.0.2.1"), S, None, now);
        assert_eq!(endpoints.due_at(), None);
        let mut round = resolved(&mut endpoints, &TWO[..1], now);
        assert_eq!(endpoints.due_at(), Some(now + S + 100 * MS));
        assert_eq!(round.next(&endpoints, now), Step::Over);
        // While the name cannot be resolved, its endpoints are not tried.
        endpoints.failed(&Place::Name(address("a")), 5 * S, None, now);
        assert_eq!(endpoints.due_at(), Some(now + 5_100 * MS));
    }

    #[test]
    fn the_families_of_a_name_are_tried_in_turn() {
        let (mut endpoints, now) = (endpoints(&["a"]), Instant::now());
        let mut round = resolved(&mut endpoints, &[("a", &["::1", "::2", "192.0.2.1", "::3", "192.0.2.2"])], now);
        let mut found = Vec::new();
        while let Step::Start(endpoint) = round.next(&endpoints, now) {
            round.failed(&endpoint);
            found.push(endpoint.ip.to_string());
        }
        assert_eq!(found, ["::1", "192.0.2.1", "::2", "192.0.2.2", "::3"]);
    }

    #[test]
    fn random_order_spreads_clients_over_the_servers() {
        let hosts: Vec<Address> = ["a", "b", "c"].map(address).into();
        let firsts: std::collections::HashSet<String> = (0..200)
            .map(|_| {
                let endpoints = Endpoints::new(hosts.clone(), AddressOrder::Random, crate::random::fraction);
                endpoints.round().addresses().next().unwrap().host.clone()
            })
            .collect();
        assert_eq!(firsts.len(), 3);
    }

    #[test]
    fn memory_is_bounded() {
        let (mut endpoints, now) = (endpoints(&["a"]), Instant::now());
        let ips: Vec<IpAddr> = (0..1_000_u32).map(|number| IpAddr::from(number.to_be_bytes())).collect();
        for ip in &ips {
            endpoints.failed(&Place::Endpoint(Endpoint::new(&address("a"), *ip)), Duration::ZERO, None, now);
        }
        assert_eq!(endpoints.known.len(), MAX_KNOWN);
        let mut round = endpoints.round();
        round.resolved(&mut endpoints, &address("a"), ips, now);
        assert_eq!(round.untried().count(), MAX_TRIED);
    }
}
