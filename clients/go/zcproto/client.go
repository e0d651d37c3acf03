package zcproto

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// Version is the version of this package.
const Version = "0.1.0"

// Raw is one value, encoded in msgpack. As params or item it is sent as it is; as a result it takes any value.
type Raw = msgpack.Raw

// Client is a client of one server, made by Dial. Its methods can be called concurrently: any number of calls share one
// connection, which is made again when it is lost.
type Client struct {
	*Session
	shared *shared
}

// shared is what the sessions of a client have in common. Its mutex guards the whole client.
type shared struct {
	mu          sync.Mutex
	clock       clock
	random      func() float64
	options     Options
	connections *connections
	all         []*Session     // the first one is the client's own: it also gets events that belong to no session
	onConnected func(Endpoint) // set once the client is open
}

// Dial connects to the server at "host", "host:port" or "[::1]:port", and opens a session if there are credentials. The port is
// 7443 by default.
//
//	client, err := zcproto.Dial(ctx, "host:7443", zcproto.Options{Credentials: zcproto.APIKey("ada", key), CAFile: "ca.crt"})
//
// Servers that share their sessions can have several addresses, separated by commas, or a name with several IP addresses. The
// client stays with one of them until it fails or goes away, and then connects to another one at once.
//
//	client, err := zcproto.Dial(ctx, "a.example:7443,b.example:7443", options)
//
// It waits for a server that is starting (Options.StartTimeout). Any other error of the first attempt is returned: a
// *ConfigError, *ConnectError, *TLSError, *CertificateError, *ClosedError, or the *Error of session.open. The context limits
// Dial alone: close the client with Close.
func Dial(ctx context.Context, address string, options Options) (*Client, error) {
	addresses, err := parseAddresses(address)
	if err != nil {
		return nil, err
	}
	if options, err = options.withDefaults(); err != nil {
		return nil, err
	}
	trust, err := newTrust(&options)
	if err != nil {
		return nil, err
	}
	serverName := "" // that of each address
	if options.ServerName != "" {
		named, err := parseAddress(options.ServerName)
		if err != nil {
			return nil, err
		}
		serverName = named.host
	}
	clock := newSystemClock()
	client, err := newClient(addresses, options, clock, systemRandom)
	if err != nil {
		return nil, err
	}
	dialer := &dialer{
		serverName: serverName, trust: trust, hosts: knownHostsIn(options.Home), options: &client.shared.options, clock: clock,
		owner: client.shared.connections,
	}
	client.shared.connections.resolve, client.shared.connections.dial = dialer.resolve, dialer.dial
	if err := client.open(ctx); err != nil {
		return nil, err
	}
	return client, nil
}

// newClient returns a client that is not connected, and cannot resolve or dial yet.
func newClient(addresses []address, options Options, clock clock, random func() float64) (*Client, error) {
	if options.Credentials == nil && (options.Certificate != "" || options.GetCertificate != nil) {
		options.Credentials = ClientCertificate("")
	}
	if options.Credentials != nil {
		if err := options.Credentials.check(); err != nil {
			return nil, err
		}
	}
	s := &shared{clock: clock, random: random, options: options}
	c := newConnections(&s.mu, clock, newEndpoints(addresses, options.AddressOrder, random))
	c.startTimeout = options.StartTimeout
	c.onStarting = func() {
		s.options.warn(fmt.Sprintf("%s: nothing listens there yet; waiting up to %s for the server to start",
			joinAddresses(addresses), options.StartTimeout))
	}
	c.extra = newExtraConnections(c, options.MaxConnections-1, random)
	c.extra.onOpened = s.show
	c.onConnected = s.connected
	c.onCall = s.callReceived
	c.onEvent = s.eventReceived
	c.isWanted = func() bool {
		return slices.ContainsFunc(s.all, func(each *Session) bool { return !each.sessions.hasEnded() })
	}
	s.connections = c
	client := &Client{shared: s}
	client.Session = newSession(s, options.Credentials, options.OnEvent)
	return client, nil
}

func (c *Client) open(ctx context.Context) error {
	s := c.shared
	s.mu.Lock()
	_, err := s.connections.get(ctx) // within StartTimeout and ConnectTimeout
	if err == nil && !s.options.NoSession && s.options.Credentials != nil {
		err = c.sessions.require()
	}
	s.mu.Unlock()
	if err == nil {
		err = c.waitOpen(ctx)
	}
	if err != nil {
		_ = c.Close()
		return err
	}
	if s.options.OnConnected != nil {
		s.mu.Lock()
		s.onConnected = func(endpoint Endpoint) { s.options.OnConnected(c, endpoint) }
		endpoint := s.connections.endpoints.used
		s.mu.Unlock()
		go s.options.OnConnected(c, endpoint)
	}
	return nil
}

// Close closes all sessions and the connection. Pending calls get a *ClosedError. It always returns nil, and is idempotent.
func (c *Client) Close() error {
	s := c.shared
	s.mu.Lock()
	users := slices.Clone(s.all)
	s.mu.Unlock()
	var closing sync.WaitGroup
	for _, user := range users {
		if user != c.Session {
			closing.Add(1)
			go func() {
				defer closing.Done()
				_ = user.Close()
			}()
		}
	}
	closing.Wait()
	_ = c.Session.Close()
	s.mu.Lock()
	s.connections.close()
	s.mu.Unlock()
	return nil
}

// SessionFor opens a session of another user on the connection of this client. It has its own calls, streams, handlers and
// events, and is refreshed, revoked and closed independently. Close it with Session.Close.
//
//	ada, err := client.SessionFor(ctx, zcproto.APIKey("ada", key))
//	err = ada.Call(ctx, "order.place", order, nil)
//
// A client certificate belongs to the connection, and opens no session here. Its errors are those of Open.
func (c *Client) SessionFor(ctx context.Context, credentials Credentials, options ...SessionOption) (*Session, error) {
	if credentials == nil {
		return nil, configError("SessionFor: credentials are missing; give APIKey, DeviceKey or LoginWith")
	}
	if _, isCertificate := credentials.(*certificateLogin); isCertificate {
		return nil, configError("SessionFor: the certificate belongs to the client's own session; give other credentials")
	}
	if err := credentials.check(); err != nil {
		return nil, err
	}
	var settings sessionSettings
	for _, option := range options {
		option(&settings)
	}
	s := c.shared
	s.mu.Lock()
	if s.connections.isClosed {
		s.mu.Unlock()
		return nil, errClientClosed()
	}
	session := newSession(s, credentials, settings.onEvent)
	s.mu.Unlock()
	if _, err := session.Open(ctx); err != nil {
		_ = session.Close()
		return nil, err
	}
	return session, nil
}

// SessionOption is an option of SessionFor.
type SessionOption func(*sessionSettings)

type sessionSettings struct {
	onEvent func(Event)
}

// OnEvent calls a function with each event of the session, one at a time, instead of queuing it for NextEvent.
func OnEvent(then func(Event)) SessionOption { return func(s *sessionSettings) { s.onEvent = then } }

// Address returns the address of the server, as host:port; several are separated by commas.
func (c *Client) Address() string { return joinAddresses(c.shared.connections.endpoints.addresses) }

// Endpoint returns where the client is connected to; false without a connection.
func (c *Client) Endpoint() (Endpoint, bool) {
	c.shared.mu.Lock()
	defer c.shared.mu.Unlock()
	current := c.shared.connections.current
	if current == nil {
		return Endpoint{}, false
	}
	return current.endpoint, true
}

// Cut resets the connection like a network failure, for tests. The client reconnects.
func (c *Client) Cut() {
	c.shared.mu.Lock()
	defer c.shared.mu.Unlock()
	c.shared.connections.abort()
}

// String returns the address.
func (c *Client) String() string { return "Client(" + c.Address() + ")" }

// Format writes String for every verb, so that none prints a token.
func (c *Client) Format(state fmt.State, _ rune) { _, _ = io.WriteString(state, c.String()) }

// Welcome is what the server has announced on the current connection.
type Welcome struct {
	// Server is the product.
	Server string
	// MaxFrame is the largest frame that it accepts, in bytes.
	MaxFrame int
	// MaxStreams is how many requests may be in flight on a connection.
	MaxStreams int
	// IdleTimeout is the silence after which it closes a connection; 0 for never.
	IdleTimeout time.Duration
	// HasStreams and HasCalls are whether it has streams, and calls clients.
	HasStreams, HasCalls bool
}

// Welcome returns what the server has announced; false without a connection.
func (c *Client) Welcome() (Welcome, bool) {
	c.shared.mu.Lock()
	defer c.shared.mu.Unlock()
	current := c.shared.connections.current
	if current == nil {
		return Welcome{}, false
	}
	welcome := current.conv.Welcome()
	return Welcome{
		Server: wire.Escape(welcome.Server, maxMessage), MaxFrame: int(welcome.MaxFrame), MaxStreams: welcome.MaxStreams,
		IdleTimeout: welcome.IdleTimeout, HasStreams: welcome.Streams != nil, HasCalls: welcome.Calls != nil,
	}, true
}

// --- notifications of connections, with the mutex, which they do not release --------------------------------------------------

func (s *shared) add(session *Session) { s.all = append(s.all, session) }

func (s *shared) remove(session *Session) {
	if index := slices.Index(s.all, session); index >= 0 {
		s.all = slices.Delete(s.all, index, index+1)
	}
}

// present shows all sessions on a connection. The functions that it returns wait for the answers.
func (s *shared) present(c *connection) (waits []func()) {
	for _, each := range s.all {
		if each.sessions.renewing == nil { // otherwise a session is opened or refreshed anyway
			waits = append(waits, each.sessions.present(c))
		}
	}
	return waits
}

// show shows all sessions on an extra connection. The function that it returns waits for the answers, and returns whether the server
// has accepted a session, or the client has no valid one.
func (s *shared) show(c *connection) (await func() bool) {
	waits := s.present(c)
	return func() bool {
		for _, wait := range waits {
			wait()
		}
		now := s.clock.now()
		return c.conv.HasSession() || !slices.ContainsFunc(s.all, func(each *Session) bool {
			return each.sessions.session != nil && now < each.sessions.usableUntil
		})
	}
}

// connected shows all sessions on a new connection, and then notifies the application.
func (s *shared) connected(c *connection) {
	onConnected := s.onConnected // nil on the first connection, which open reports
	waits := s.present(c)
	go func() {
		s.mu.Lock()
		c.flush()
		s.mu.Unlock()
		var showing sync.WaitGroup
		for _, wait := range waits {
			showing.Add(1)
			go func() {
				defer showing.Done()
				s.mu.Lock()
				defer s.mu.Unlock()
				wait()
			}()
		}
		showing.Wait()
		s.mu.Lock()
		isCurrent := s.connections.current == c
		s.mu.Unlock()
		if isCurrent && onConnected != nil {
			onConnected(c.endpoint)
		}
	}()
}

// owner returns the session of a token; nil for none.
func (s *shared) owner(token wire.Token) *Session {
	for _, each := range s.all {
		if each.sessions.ownsToken(token) {
			return each
		}
	}
	return nil
}

func (s *shared) eventReceived(c *connection, event *conversation.Event) {
	if c.isExtra && (event.Token == (wire.Token{}) || strings.HasPrefix(event.Name, "session.")) {
		return // it comes on the current connection, too
	}
	owner := s.owner(event.Token)
	if owner == nil && event.Token == (wire.Token{}) && len(s.all) > 0 {
		owner = s.all[0]
	}
	if owner != nil { // otherwise it is of a session that was closed
		owner.sessions.eventReceived(event.Name, event.Token, c)
		owner.events.put(event.Name, event.Body)
	}
}

func (s *shared) callReceived(c *connection, event *conversation.Event) {
	owner := s.owner(event.Token)
	if owner == nil {
		c.failCall(event.Stream, &Error{Code: Unauthenticated, Message: "no session of this client has this token"})
		return
	}
	user := ""
	if open := owner.sessions.session; open != nil {
		user = open.info.User
	}
	owner.handlers.call(c, event, user)
}

// --- pairing ------------------------------------------------------------------------------------------------------------------

// Enroll enrolls a device under a name with a code of `zcproto pair`, and returns the user whose sessions it can open. From then
// on DeviceKey(device, name) opens them. Credentials of the options are not used.
//
// Its errors are those of Dial, and an *Error with Unauthenticated for an invalid code, AlreadyExists for a name in use: the code
// stays valid.
func Enroll(ctx context.Context, address, code string, device *Device, name string, options Options) (string, error) {
	options.NoSession = true
	options.Credentials = nil
	client, err := Dial(ctx, address, options)
	if err != nil {
		return "", err
	}
	defer client.Close()
	var enrolled struct {
		User string `msgpack:"user"`
	}
	params := map[string]any{"code": code, "public_key": device.PublicKey(), "name": name}
	err = client.Call(ctx, "device.enroll", params, &enrolled)
	return enrolled.User, err
}
