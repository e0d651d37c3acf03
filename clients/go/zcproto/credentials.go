package zcproto

import (
	"context"
	"fmt"
	"io"
	"maps"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// Credentials open a session: APIKey, DeviceKey, ClientCertificate or LoginWith returns them. Their secrets are in no
// formatted output.
type Credentials interface {
	fmt.Stringer
	// check returns a *ConfigError if something is missing.
	check() error
	// params returns the params of session.open on a connection, without client.
	params(channel channel) (map[string]any, error)
	// canReopen returns whether a session can be opened in place of one that belongs to another client certificate.
	canReopen() bool
}

// channel is what a signature is bound to: it is useless on another connection, and when relayed through another server.
type channel struct {
	salt uint64
	leaf [32]byte // SHA-256 of the server's certificate in DER
}

// APIKey returns the credentials of a user with an API key.
func APIKey(user, key string) Credentials {
	return &apiKey{user: user, key: func() string { return key }}
}

// apiKey holds the key in a function, because fmt prints the fields of other structs without asking their types.
type apiKey struct {
	user string
	key  func() string
}

func (c *apiKey) String() string { return "APIKey(" + c.user + ")" }

func (c *apiKey) check() error {
	if c.user == "" || c.key() == "" {
		return configError("Credentials: APIKey needs a user and a key; give both")
	}
	return nil
}

func (c *apiKey) params(channel) (map[string]any, error) {
	return map[string]any{"scheme": "api_key", "user": c.user, "key": c.key()}, nil
}

func (*apiKey) canReopen() bool { return false }

// ClientCertificate returns the credentials of the client certificate that Options gives. user is optional; the certificate
// must then name this one.
func ClientCertificate(user string) Credentials { return &certificateLogin{user: user} }

type certificateLogin struct{ user string }

func (c *certificateLogin) String() string { return "ClientCertificate(" + c.user + ")" }

func (*certificateLogin) check() error { return nil }

func (c *certificateLogin) params(channel) (map[string]any, error) {
	params := map[string]any{"scheme": "tls"}
	if c.user != "" {
		params["user"] = c.user
	}
	return params, nil
}

func (*certificateLogin) canReopen() bool { return true }

// DeviceKey returns the credentials of a device under the name with which it was enrolled. It signs for each connection.
func DeviceKey(device *Device, name string) Credentials {
	return &deviceKey{device: device, name: name}
}

type deviceKey struct {
	device *Device
	name   string
}

func (c *deviceKey) String() string { return "DeviceKey(" + c.name + ")" }

func (c *deviceKey) check() error {
	if c.device == nil || c.name == "" {
		return configError("Credentials: DeviceKey needs a device and the name under which it was enrolled; give both")
	}
	return nil
}

func (c *deviceKey) params(channel channel) (map[string]any, error) {
	signature, err := c.device.sign(wire.OpenMessage(channel.salt, channel.leaf, c.name))
	if err != nil {
		return nil, &LoginError{Cause: err}
	}
	return map[string]any{"scheme": "ed25519", "device": c.name, "signature": signature}, nil
}

func (*deviceKey) canReopen() bool { return false }

// attachParams returns the params of session.attach.
func (c *deviceKey) attachParams(channel channel, token wire.Token) (map[string]any, error) {
	signature, err := c.device.sign(wire.AttachMessage(channel.salt, channel.leaf, token))
	if err != nil {
		return nil, &LoginError{Cause: err}
	}
	return map[string]any{"signature": signature}, nil
}

// Login is a login by a scheme of the server's application: the params of session.open.
type Login struct {
	// Scheme is the name of the scheme.
	Scheme string
	// Fields are its params.
	Fields map[string]any
}

// String returns the scheme, without the fields.
func (l Login) String() string { return "Login(" + l.Scheme + ")" }

// Format writes the scheme for every verb.
func (l Login) Format(state fmt.State, _ rune) { _, _ = io.WriteString(state, l.String()) }

// LoginWith returns credentials of a scheme of the server's application. login is called for each session that is opened,
// because a login may be valid once. Its error reaches the call that needed the session, as a *LoginError.
func LoginWith(login func(ctx context.Context) (Login, error)) Credentials {
	return &schemeLogin{source: login}
}

// loginHolds is how long a login can wait for a connection: a ticket may be short-lived.
const loginHolds = 10 * time.Second

// schemeLogin is fetched before each params.
type schemeLogin struct {
	source     func(ctx context.Context) (Login, error)
	fetched    func() Login // hidden from fmt, too
	holdsUntil time.Duration
	isFetching bool
}

func (*schemeLogin) String() string { return "LoginWith" }

func (c *schemeLogin) check() error {
	if c.source == nil {
		return configError("Credentials: LoginWith needs a function; give it")
	}
	return nil
}

func (c *schemeLogin) isFetched(now time.Duration) bool {
	return c.fetched != nil && now < c.holdsUntil
}

// fetch calls the function. It releases the mutex, which guards this object, meanwhile.
func (c *schemeLogin) fetch(ctx context.Context, mu *sync.Mutex, clock clock) error {
	c.isFetching = true
	mu.Unlock()
	login, err := c.source(ctx)
	if err == nil {
		err = loginFault(login)
	}
	mu.Lock()
	c.isFetching = false
	if err != nil {
		return &LoginError{Cause: err}
	}
	c.fetched = func() Login { return login }
	c.holdsUntil = clock.now() + loginHolds
	return nil
}

func (c *schemeLogin) params(channel) (map[string]any, error) {
	login := c.fetched()
	c.fetched = nil // each login is sent once
	params := maps.Clone(login.Fields)
	if params == nil {
		params = map[string]any{}
	}
	params["scheme"] = login.Scheme
	return params, nil
}

func (*schemeLogin) canReopen() bool { return true }

// loginFault returns why a login cannot be sent, without its values.
func loginFault(login Login) error {
	if login.Scheme == "" {
		return configError("Login: Scheme is missing; give the name of the server's scheme")
	}
	for _, name := range []string{"scheme", "client"} {
		if _, found := login.Fields[name]; found {
			return configError("Login: Fields has " + name + "; leave it out")
		}
	}
	_, err := encode(login.Fields)
	return err
}
