package zcproto

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
)

const (
	// How long a connection must last to count as a success.
	stableAfter = 5 * time.Second
	// The longest delay between two attempts to connect to a server that is starting.
	maxStartDelay = time.Second
)

// connections maintains the connection to one server: one for new calls, and older ones that drain.
//
// It decides when to connect and reconnect. The first attempt is repeated only while nothing listens or the server goes away,
// because the server may be starting, or be replaced. After a loss and after GOAWAY it connects to another endpoint at once; each
// one rests for a growing, jittered delay after a failure, and for what its server asked for. After a close for idleness it
// reconnects with the next call, and not at all once the sessions were revoked or replaced. All callers that wait for a connection
// share one attempt. It does not know calls, retries and how sessions are opened.
type connections struct {
	mu           *sync.Mutex // of the client
	clock        clock
	endpoints    *endpoints
	startTimeout time.Duration
	// resolve returns the IP addresses of a name, without the mutex: those of the family to prefer first.
	resolve func(ctx context.Context, address address) ([]netip.Addr, error)
	// dial makes a connection that has received WELCOME, without the mutex. It calls onTCP once it has a TCP connection.
	dial func(ctx context.Context, endpoint Endpoint, onTCP func()) (*connection, error)
	// The others are called with the mutex, and must not release it.
	onStarting  func()
	onConnected func(*connection)
	onCall      func(*connection, *conversation.Event)
	onEvent     func(*connection, *conversation.Event)
	isWanted    func() bool // whether to reconnect before the next call

	current      *connection // the main one
	extra        *extraConnections
	beside       *besideAttempt
	lastError    error // of the last attempt
	all          []*connection
	connecting   *task
	late         sync.WaitGroup // attempts whose connection is not needed
	hasConnected bool
	isClosed     bool
	closing      context.Context
	cancel       context.CancelCauseFunc
}

// task is work that several callers wait for.
type task struct {
	done chan struct{}
	err  error
}

// await waits for a task, or until ctx is done. It releases the mutex meanwhile.
func (t *task) await(ctx context.Context, mu *sync.Mutex) error {
	mu.Unlock()
	defer mu.Lock()
	select {
	case <-t.done:
		return t.err
	case <-ctx.Done():
		return contextError(ctx)
	}
}

func newConnections(mu *sync.Mutex, clock clock, endpoints *endpoints) *connections {
	c := &connections{mu: mu, clock: clock, endpoints: endpoints}
	c.closing, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// get returns the connection for new calls. Without one it connects, and retries while that may succeed. It releases the
// mutex meanwhile.
func (c *connections) get(ctx context.Context) (*connection, error) {
	for c.current == nil {
		if c.isClosed {
			return nil, errClientClosed()
		}
		if err := c.start().await(ctx, c.mu); err != nil {
			return nil, err
		}
	}
	return c.current, nil
}

func errClientClosed() *ClosedError {
	return &ClosedError{Reason: "this client is closed", Clean: true}
}

func (c *connections) start() *task {
	if c.connecting == nil {
		attempt := &task{done: make(chan struct{})}
		c.connecting = attempt
		inBackground(c.mu, func() {
			attempt.err = c.connect()
			c.connecting = nil
			close(attempt.done)
		})
	}
	return c.connecting
}

func (c *connections) connect() error {
	startsUntil := c.clock.now() + c.startTimeout
	isStarting := false
	for {
		if pause(c.closing, c.mu, c.clock, c.endpoints.firstDue(Endpoint{})-c.clock.now()) != nil {
			return errClientClosed()
		}
		connection, err := c.round(c.closing, Endpoint{})
		switch {
		case c.isClosed:
			if err == nil {
				connection.close("closed by this client")
			}
			return errClientClosed()
		case err == nil:
			c.adopt(connection)
			return nil
		case isOwnFault(err):
			return err
		}
		c.lastError = err
		failed := len(c.endpoints.known)
		permanent := c.endpoints.count((*endpointState).isPermanent)
		if c.hasConnected {
			if permanent == failed {
				c.endpoints.wakeAll() // the next call tries again
				return err
			}
			continue
		}
		starting := c.endpoints.count((*endpointState).mayBeStarting)
		if permanent > 0 || starting == 0 || c.endpoints.firstDue(Endpoint{}) >= startsUntil {
			return err
		}
		if c.endpoints.count((*endpointState).isRefused) > 0 && !isStarting {
			isStarting = true
			c.onStarting()
		}
	}
}

// adopt uses a connection for new calls.
func (c *connections) adopt(connection *connection) {
	if !c.hasConnected {
		c.hasConnected = true
		c.endpoints.resetAll() // waiting for the start does not delay the first reconnect
	}
	c.endpoints.used = connection.endpoint
	c.current = connection
	connection.stableAt = c.clock.now() + stableAfter
	c.onConnected(connection)
}

// isOwnFault returns whether an attempt has failed for a reason at this end, which is the same for all servers.
func isOwnFault(err error) bool {
	var config *ConfigError
	var certificate *CertificateError
	return errors.As(err, &config) || errors.As(err, &certificate)
}

// rest lets an endpoint rest after a failure, for a random time in addition to what its server has asked for.
func (c *connections) rest(state *endpointState, retryAfter time.Duration) {
	delay := state.backoff.next(0)
	if !c.hasConnected {
		delay = min(delay, maxStartDelay)
	}
	state.restsUntil = max(state.restsUntil, addTime(c.clock.now(), retryAfter+delay))
}

// --- servers that hang ---------------------------------------------------------------------------------------------------

// besideAttempt connects to another endpoint beside a connection whose server hangs.
type besideAttempt struct {
	old    *connection
	cancel context.CancelFunc
}

// hasOther returns whether there is more than one server to connect to.
func (c *connections) hasOther() bool {
	return len(c.endpoints.known) > 1 || len(c.endpoints.addresses) > 1
}

// silent handles a connection whose server hangs: beside the main one the client connects to another. Any other is lost if the main
// one leads elsewhere, or once it has answered.
func (c *connections) silent(connection *connection) {
	switch {
	case c.isClosed || c.current == nil:
	case connection == c.current && c.beside == nil:
		ctx, cancel := context.WithCancel(c.closing)
		c.beside = &besideAttempt{old: connection, cancel: cancel}
		c.late.Add(1)
		go c.connectBeside(ctx, c.beside)
	case connection == c.current:
	case c.current.endpoint != connection.endpoint && !c.current.conv.IsSilent(),
		c.current.conv.HasAnsweredSince(connection.conv):
		c.lose(connection)
	default:
		main := c.current
		main.probe()
		inBackground(c.mu, main.flush)
	}
}

// heard gives up the attempt beside a connection that is not silent any more, or has ended.
func (c *connections) heard(connection *connection) {
	if c.beside != nil && c.beside.old == connection {
		c.beside.cancel()
	}
}

func (c *connections) connectBeside(ctx context.Context, attempt *besideAttempt) {
	defer c.late.Done()
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() {
		attempt.cancel()
		c.beside = nil
	}()
	old := attempt.old
	for pause(ctx, c.mu, c.clock, c.endpoints.firstDue(old.endpoint)-c.clock.now()) == nil {
		connection, err := c.round(ctx, old.endpoint)
		if err != nil {
			if ctx.Err() != nil || isOwnFault(err) || c.endpoints.count((*endpointState).isPermanent) >= len(c.endpoints.known)-1 {
				return
			}
			continue
		}
		connection.isExtra = true // until it is the main one
		show := c.extra.onOpened(connection)
		connection.flush()
		isShown := show()
		switch {
		case ctx.Err() != nil || c.current != old:
			connection.close("the first server answers again")
			return
		case isShown && connection.isOpen():
			c.move(old, connection)
			return
		}
		connection.close("the server does not accept the session")
		c.rest(c.endpoints.of(connection.endpoint), 0)
	}
}

// move uses another connection in place of one whose server hangs. Extra ones on which it has not answered either count as lost.
func (c *connections) move(old, other *connection) {
	c.leave(old, errSilent(old.endpoint))
	other.isExtra = false
	lost := slices.DeleteFunc(slices.Clone(c.extra.all), func(each *connection) bool {
		return each.conv.HasAnsweredSince(old.conv)
	})
	c.adopt(other)
	for _, connection := range append(lost, old) {
		c.lose(connection)
	}
}

func (c *connections) lose(connection *connection) {
	connection.reset(&ClosedError{Reason: "the server does not answer", Cause: errSilent(connection.endpoint)})
}

func errSilent(endpoint Endpoint) *ConnectError {
	return &ConnectError{Reason: fmt.Sprintf("%s: the server does not answer", endpoint.address())}
}

// --- notifications of connections, with the mutex ------------------------------------------------------------------------

// opened registers a connection whose handshake has ended.
func (c *connections) opened(connection *connection) { c.all = append(c.all, connection) }

func (c *connections) eventReceived(connection *connection, event *conversation.Event) {
	c.onEvent(connection, event)
}

func (c *connections) callReceived(connection *connection, event *conversation.Event) {
	c.onCall(connection, event)
}

func (c *connections) connectionDrains(connection *connection, reason string) {
	c.extra.discard(connection)
	if connection.isExtra {
		return
	}
	wasCurrent := connection == c.current
	if wasCurrent {
		c.current = nil
	}
	if reason != "idle" && reason != "no_session" { // another unused connection would be closed for the same reason
		c.leave(connection, errGoingAway(connection.endpoint))
		c.reconnect(wasCurrent)
	}
}

func errGoingAway(endpoint Endpoint) *ConnectError {
	return &ConnectError{isGoingAway: true, Reason: fmt.Sprintf(
		"%s: the server is going away; try again once it has been replaced", endpoint.address())}
}

func (c *connections) connectionEnded(connection *connection, failure *ClosedError) {
	c.extra.discard(connection)
	c.heard(connection) // no call waits for it
	if connection == c.current {
		c.current = nil
		c.lastError = failure
		c.leave(connection, failure)
		c.reconnect(true)
	}
}

// leave lets the endpoint of a connection rest. Its delays start again if the connection has lasted.
func (c *connections) leave(connection *connection, reason error) {
	state := c.endpoints.of(connection.endpoint)
	if c.clock.now() >= connection.stableAt {
		state.backoff.reset()
	}
	state.err = reason
	c.rest(state, connection.retryAfter)
}

// reconnect connects now if it is wanted. wasCurrent is whether the connection for new calls is gone.
func (c *connections) reconnect(wasCurrent bool) {
	if wasCurrent && !c.isClosed && c.isWanted() {
		c.start()
	}
}

// released forgets a connection whose socket is closed.
func (c *connections) released(connection *connection) {
	if index := slices.Index(c.all, connection); index >= 0 {
		c.all = slices.Delete(c.all, index, index+1)
	}
}

// --- the end -----------------------------------------------------------------------------------------------------------

// close closes all connections with close_notify and waits until their sockets are closed. It releases the mutex meanwhile.
func (c *connections) close() {
	c.isClosed = true
	c.cancel(errClientClosed())
	if c.connecting != nil {
		_ = c.connecting.await(context.Background(), c.mu) // its waiters get the error
	}
	c.current = nil
	c.mu.Unlock()
	c.late.Wait()
	c.mu.Lock()
	all := slices.Clone(c.all)
	for _, connection := range all {
		connection.close("closed by this client")
	}
	c.mu.Unlock()
	for _, connection := range all {
		<-connection.released
	}
	c.mu.Lock()
	if c.extra.idleTimer != nil {
		c.extra.idleTimer.Stop()
	}
}

// abort resets all connections, like a network failure.
func (c *connections) abort() {
	for _, connection := range slices.Clone(c.all) {
		connection.abort()
	}
}
