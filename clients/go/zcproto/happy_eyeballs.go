package zcproto

import (
	"context"
	"net/netip"
	"time"
)

const (
	// When the next endpoint of a round is tried: so long after the latest one was tried, while that has no TCP connection ...
	attemptDelay = 250 * time.Millisecond
	// ... and so long after its TCP connection, while it has no WELCOME: TLS is not raced earlier, because a server that is only
	// slow would get several times the handshakes.
	handshakeDelay = 2 * time.Second
	// How long the first address can delay the others while its name is resolved.
	resolutionDelay = 50 * time.Millisecond
)

// round tries the endpoints of a client until one has sent WELCOME: happy eyeballs (RFC 8305) over all its addresses. Each one is
// tried once. The first WELCOME wins, and the other attempts are given up.
type round struct {
	owner    *connections
	ctx      context.Context
	except   Endpoint     // is not tried
	outcomes chan outcome // has room for all
	order    []address
	found    map[address][]Endpoint // of the addresses that were resolved; nil for those that cannot be
	count    int                    // of found
	beginsAt time.Duration          // though the first address is not resolved
	tried    map[Endpoint]bool
	running  int
	latest   Endpoint
	nextAt   time.Duration
}

// outcome is what a goroutine of a round reports.
type outcome struct {
	endpoint   Endpoint // without an IP: of the resolution of a name
	ips        []netip.Addr
	isTCP      bool // there is a TCP connection
	connection *connection
	err        error
}

// round returns a connection that has received WELCOME and not GOAWAY, or the error of the endpoints. It tries all but one; the zero
// Endpoint excepts none. It releases the mutex meanwhile.
func (c *connections) round(ctx context.Context, except Endpoint) (*connection, error) {
	ctx, cancel := context.WithCancel(ctx)
	r := &round{
		owner: c, ctx: ctx, except: except, outcomes: make(chan outcome, maxAddresses+2*maxEndpoints), order: c.endpoints.nextOrder(),
		found: map[address][]Endpoint{}, beginsAt: forever, tried: map[Endpoint]bool{}, nextAt: never,
	}
	defer func() {
		cancel()
		if r.running > 0 {
			c.late.Add(1)
			go r.giveUp(r.running)
		}
	}()
	for _, address := range r.order {
		if ip, err := netip.ParseAddr(address.host); err == nil {
			r.resolved(address, []netip.Addr{ip}, nil)
			continue
		}
		go func() {
			ips, err := c.resolve(ctx, address)
			r.outcomes <- outcome{endpoint: Endpoint{Host: address.host, Port: address.port}, ips: ips, err: err}
		}()
	}
	for {
		now := c.clock.now()
		next, due, isAny := r.next(now)
		switch {
		case isAny && due <= now:
			r.try(next, now)
			continue
		case r.running == 0 && len(r.found) == len(r.order):
			return nil, r.failure()
		}
		outcome, err := r.await(due - now)
		if err != nil {
			return nil, err
		}
		if outcome != nil {
			if connection, err := r.handle(outcome); connection != nil || err != nil {
				return connection, err
			}
		}
	}
}

// await waits for an outcome, at most for d. It releases the mutex meanwhile.
func (r *round) await(d time.Duration) (*outcome, error) {
	c := r.owner
	over := make(chan struct{})
	if d < forever/2 {
		timer := c.clock.afterFunc(d, func() { close(over) })
		defer timer.Stop()
	}
	c.mu.Unlock()
	defer c.mu.Lock()
	select {
	case outcome := <-r.outcomes:
		return &outcome, nil
	case <-over:
		return nil, nil
	case <-r.ctx.Done():
		return nil, errClientClosed()
	}
}

// next returns the next endpoint to try, and when. Without one it returns when to look again.
func (r *round) next(now time.Duration) (next Endpoint, due time.Duration, isAny bool) {
	e := r.owner.endpoints
	first := r.order[0]
	isSticky := e.used != r.except && e.isSticky(now)
	if isSticky {
		first = e.used.address()
	}
	if _, isResolved := r.found[first]; !isResolved && now < r.beginsAt {
		return Endpoint{}, r.beginsAt, false
	}
	rests := forever
	for _, address := range r.order {
		for _, endpoint := range r.found[address] {
			if r.tried[endpoint] || endpoint == r.except {
				continue
			}
			if isSticky && endpoint == e.used {
				return endpoint, r.nextAt, true
			}
			if until := max(e.of(endpoint).restsUntil, now); until < rests {
				next, rests, isAny = endpoint, until, true
			}
		}
	}
	return next, max(r.nextAt, rests), isAny
}

func (r *round) try(endpoint Endpoint, now time.Duration) {
	r.tried[endpoint] = true
	r.running++
	r.latest = endpoint
	r.nextAt = now + attemptDelay
	go func() {
		connection, err := r.owner.dial(r.ctx, endpoint, func() { r.outcomes <- outcome{endpoint: endpoint, isTCP: true} })
		r.outcomes <- outcome{endpoint: endpoint, connection: connection, err: err}
	}()
}

// handle notes an outcome. It returns the connection that wins, or an error that ends the round.
func (r *round) handle(outcome *outcome) (*connection, error) {
	c := r.owner
	now := c.clock.now()
	switch {
	case !outcome.endpoint.IP.IsValid():
		r.resolved(outcome.endpoint.address(), outcome.ips, outcome.err)
		return nil, nil
	case outcome.isTCP:
		if outcome.endpoint == r.latest {
			r.nextAt = now + handshakeDelay
		}
		return nil, nil
	}
	r.running--
	if outcome.endpoint == r.latest {
		r.nextAt = now
	}
	state := c.endpoints.of(outcome.endpoint)
	connection, err := outcome.connection, outcome.err
	switch {
	case err != nil:
	case connection.draining: // GOAWAY in the same read as WELCOME: it rests
		err = errGoingAway(connection.endpoint)
	case connection.failure != nil:
		err = connection.failure
	}
	state.err = err
	if err == nil {
		return connection, nil
	}
	if isOwnFault(err) {
		return nil, err
	}
	if connection == nil || !connection.draining {
		c.rest(state, 0)
	}
	return nil, nil
}

func (r *round) resolved(address address, ips []netip.Addr, err error) {
	c := r.owner
	ips = ips[:min(len(ips), maxEndpoints-r.count)]
	r.count += len(ips)
	if len(ips) == 0 {
		r.found[address] = nil
		state := c.endpoints.unresolved(address)
		state.err = err
		c.rest(state, 0)
		return
	}
	c.endpoints.resolved(address, ips)
	r.found[address] = c.endpoints.sorted(address, ips)
	r.beginsAt = min(r.beginsAt, c.clock.now()+resolutionDelay)
}

// failure returns the error of the round: a permanent one before any other, that of a server that may be starting before the rest,
// and otherwise the first one in the order of the addresses.
func (r *round) failure() error {
	e := r.owner.endpoints
	var found error = &ConnectError{Reason: "no address can be tried now"}
	best := 0
	for _, address := range r.order {
		of := r.found[address]
		if of == nil {
			of = []Endpoint{{Host: address.host, Port: address.port}}
		}
		for _, endpoint := range of {
			state := e.of(endpoint)
			rank := 1
			switch {
			case state.err == nil:
				rank = 0
			case state.isPermanent():
				rank = 3
			case state.mayBeStarting():
				rank = 2
			}
			if rank > best {
				best, found = rank, state.err
			}
		}
	}
	if len(e.addresses) > 1 {
		return ofSeveral(found, len(e.addresses))
	}
	return found
}

// giveUp closes the connections of attempts that come too late.
func (r *round) giveUp(running int) {
	defer r.owner.late.Done()
	for running > 0 {
		outcome := <-r.outcomes
		if !outcome.endpoint.IP.IsValid() || outcome.isTCP {
			continue
		}
		running--
		if outcome.connection != nil {
			r.owner.mu.Lock()
			outcome.connection.close("another server was faster")
			r.owner.mu.Unlock()
		}
	}
}
