package zcproto

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

const (
	maxAddresses = 32
	maxEndpoints = 64 // of all addresses, in one round
)

// AddressOrder is the order in which a client with several addresses tries them.
type AddressOrder string

const (
	// RandomOrder tries the addresses, and the IP addresses of a name, in another random order each time, so that many clients
	// are spread evenly over the servers.
	RandomOrder AddressOrder = "random"
	// ListedOrder tries them in the order given, such as a primary server and then its backups.
	ListedOrder AddressOrder = "listed"
)

// Endpoint is where a client connects to: one IP address of one of its addresses.
type Endpoint struct {
	// Host and Port are those of the address, as given to Dial.
	Host string
	Port int
	// IP is the address to which the host was resolved.
	IP netip.Addr
}

// String returns host and port, and the IP address unless it is the host: "a.example:7443 (192.0.2.1)".
func (e Endpoint) String() string {
	text := e.address().String()
	if e.IP.IsValid() && !isIP(e.Host) {
		text += " (" + e.IP.String() + ")"
	}
	return text
}

func (e Endpoint) address() address { return address{e.Host, e.Port} }

// endpoints are the endpoints of a client.
//
// They decide in which order endpoints are tried, and how long each one rests after a failure: a bad server does not delay the
// others. They do not know how connections are made. The mutex of the client guards them.
type endpoints struct {
	addresses []address
	isListed  bool
	random    func() float64
	// known are the endpoints to which the addresses were resolved last. A name that cannot be resolved has one without an IP.
	known map[Endpoint]*endpointState
	used  Endpoint // by the latest connection: it is tried first
}

// endpointState is what is known about an endpoint.
type endpointState struct {
	backoff    *backoff
	restsUntil time.Duration
	err        error // of the latest attempt; nil after WELCOME
}

func newEndpoints(addresses []address, order AddressOrder, random func() float64) *endpoints {
	return &endpoints{
		addresses: addresses, isListed: order == ListedOrder, random: random, known: map[Endpoint]*endpointState{},
	}
}

func (e *endpoints) of(endpoint Endpoint) *endpointState {
	state := e.known[endpoint]
	if state == nil {
		state = &endpointState{backoff: newBackoff(e.random), restsUntil: never}
		e.known[endpoint] = state
	}
	return state
}

// isPermanent returns whether the latest attempt has failed in a way that a retry does not change.
func (s *endpointState) isPermanent() bool {
	failure, ok := s.err.(*TLSError)
	return ok && !isTransient(failure.Failure)
}

// isRefused returns whether nothing listens there.
func (s *endpointState) isRefused() bool {
	failure, ok := s.err.(*ConnectError)
	return ok && failure.Refused
}

// mayBeStarting returns whether the server may serve soon: nothing listens yet, or the one that does is going away.
func (s *endpointState) mayBeStarting() bool {
	failure, ok := s.err.(*ConnectError)
	return ok && (failure.Refused || failure.isGoingAway)
}

// resolved notes the IP addresses of a host. Those that it no longer has are forgotten.
func (e *endpoints) resolved(address address, ips []netip.Addr) {
	e.forget(address, ips)
	for _, ip := range ips {
		e.of(Endpoint{address.host, address.port, ip})
	}
}

// unresolved notes that a host has no IP addresses, and returns its state.
func (e *endpoints) unresolved(address address) *endpointState {
	e.forget(address, []netip.Addr{{}})
	return e.of(Endpoint{Host: address.host, Port: address.port})
}

func (e *endpoints) forget(address address, except []netip.Addr) {
	maps.DeleteFunc(e.known, func(endpoint Endpoint, _ *endpointState) bool {
		return endpoint.address() == address && !slices.Contains(except, endpoint.IP)
	})
}

// firstDue returns when the first endpoint but one can be tried. An address that was not resolved yet can be tried at any time.
func (e *endpoints) firstDue(except Endpoint) time.Duration {
	first := forever
	isKnown := map[address]bool{}
	for endpoint, state := range e.known {
		if endpoint != except {
			first = min(first, state.restsUntil)
		}
		isKnown[endpoint.address()] = true
	}
	if len(isKnown) < len(e.addresses) {
		return never
	}
	return first
}

// isSticky returns whether the endpoint of the latest connection is tried first.
func (e *endpoints) isSticky(now time.Duration) bool {
	state := e.known[e.used]
	return state != nil && state.restsUntil <= now
}

// nextOrder returns the addresses in the order of one round.
func (e *endpoints) nextOrder() []address {
	order := slices.Clone(e.addresses)
	if !e.isListed {
		shuffle(order, e.random)
	}
	return order
}

// sorted returns endpoints of an address in the order in which they are tried: families take turns, beginning with that of the
// first one (RFC 8305 section 4).
func (e *endpoints) sorted(address address, ips []netip.Addr) []Endpoint {
	var families [2][]Endpoint
	for _, ip := range ips {
		family := 0
		if ip.Is4() != ips[0].Is4() {
			family = 1
		}
		families[family] = append(families[family], Endpoint{address.host, address.port, ip})
	}
	var sorted []Endpoint
	for index := range families {
		if !e.isListed {
			shuffle(families[index], e.random)
		}
	}
	for index := range max(len(families[0]), len(families[1])) {
		for _, family := range families {
			if index < len(family) {
				sorted = append(sorted, family[index])
			}
		}
	}
	return sorted
}

func shuffle[T any](values []T, random func() float64) {
	for last := len(values) - 1; last > 0; last-- {
		other := int(random() * float64(last+1))
		values[last], values[other] = values[other], values[last]
	}
}

// count returns how many endpoints have such a state.
func (e *endpoints) count(has func(*endpointState) bool) int {
	count := 0
	for _, state := range e.known {
		if has(state) {
			count++
		}
	}
	return count
}

// resetAll starts all delays at 100 ms again.
func (e *endpoints) resetAll() {
	for _, state := range e.known {
		state.backoff.reset()
	}
}

// wakeAll lets all endpoints be tried at once.
func (e *endpoints) wakeAll() {
	for _, state := range e.known {
		state.restsUntil = never
	}
}

// ofSeveral adds to the error of one address that there are others.
func ofSeveral(err error, count int) error {
	prefix := fmt.Sprintf("none of %d addresses can be reached: ", count)
	switch err := err.(type) {
	case *ConnectError:
		copied := *err
		copied.Reason = prefix + err.Reason
		return &copied
	case *TLSError:
		copied := *err
		copied.Detail = prefix + err.Detail
		return &copied
	case *ClosedError:
		copied := *err
		copied.Reason = prefix + err.Reason
		return &copied
	}
	return err
}
