package zcproto

import (
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"math"
	"time"
)

// Defaults of Options.
const (
	DefaultTimeout        = 30 * time.Second
	DefaultConnectTimeout = 10 * time.Second
	DefaultStartTimeout   = 10 * time.Second
	DefaultMaxCalls       = 16
	DefaultMaxFrame       = 1 << 20
)

const maxConnections = 64

// NoTimeout as a timeout of Options disables it.
const NoTimeout = time.Duration(math.MaxInt64)

// Options are how to reach and verify a server, and what opens a session there. The zero value is valid: it trusts the CAs
// of the system and has no session, so that only public methods can be called.
type Options struct {
	// Credentials open the session: APIKey, DeviceKey, ClientCertificate or LoginWith. Without them a client certificate opens
	// it, if there is one.
	Credentials Credentials

	// CAFile is a PEM file of the CA to trust. Without it and Pins, the CAs of the system are trusted.
	CAFile string
	// Pins are the keys to trust: sha256/BASE64 of the server's public key, or cert-sha256/BASE64 of its certificate, also
	// several in one text, separated by commas or white space. List future keys too: `zcproto cert pins` prints them. With
	// CAFile or SystemStore both must match; without them a pin replaces the CA, and dates and name are still verified.
	Pins []string
	// SystemStore trusts the CAs of the system, also with Pins.
	SystemStore bool
	// ServerName is the name to verify in the certificate instead of the host's.
	ServerName string
	// InsecureSkipVerify trusts any server. It is refused for hosts that have announced an sts policy.
	InsecureSkipVerify bool

	// Certificate is a PEM file of the client certificate, followed by its issuers. It is read for each connection, so the
	// next one uses a renewed certificate.
	Certificate string
	// KeyFile is a file of the certificate's private key, which only its owner may be able to read: by default Certificate.
	KeyFile string
	// GetCertificate returns the client certificate of each connection, instead of files.
	GetCertificate func() (*tls.Certificate, error)

	// NoSession connects without opening a session; Client.Open opens one later.
	NoSession bool
	// ClientName is the product and version that the server lists, such as "example/1.0".
	ClientName string

	// Timeout limits a call whose context has no deadline, including all attempts: DefaultTimeout if 0. It is not applied to
	// streams.
	Timeout time.Duration
	// ConnectTimeout limits one attempt to connect, from TCP to WELCOME, and apart from that the resolution of a name:
	// DefaultConnectTimeout if 0.
	ConnectTimeout time.Duration
	// StartTimeout is how long Dial waits for a server that is starting: while nothing listens at its address, or the server is
	// going away, the attempt is repeated, and a missing CAFile may still be created. DefaultStartTimeout if 0; negative does not
	// wait.
	StartTimeout time.Duration

	// MaxConnections is how many connections are made at once: 1 if 0, and at most 64. A further one is made to the same server
	// while calls wait because the server allows no more of them in flight, and closed after 30 seconds without calls.
	MaxConnections int
	// AddressOrder is the order in which several addresses are tried: RandomOrder if empty.
	AddressOrder AddressOrder

	// OnEvent is called with each event of the server, one at a time. Without it, events are queued for Session.NextEvent.
	OnEvent func(Event)
	// OnConnected is called in a goroutine of its own once the client has connected and opened its session, and again after each
	// reconnect when all sessions are known to the server: a good place to open long streams again. It gets where the client has
	// connected to.
	OnConnected func(*Client, Endpoint)
	// MaxCalls is how many calls of the server are handled at once in a session: DefaultMaxCalls if 0.
	MaxCalls int
	// MaxFrame is the largest frame accepted from the server, in bytes: DefaultMaxFrame if 0.
	MaxFrame int

	// Home is the folder that remembers hosts with an sts policy: by default ZCPROTO_HOME, or else ~/.zeroclaw.
	Home string
	// KeyLog gets the TLS secrets of all connections, so that Wireshark can decrypt them. Anyone who can read them can decrypt
	// captured connections. SSLKEYLOGFILE is ignored.
	KeyLog io.Writer
	// Logger gets warnings, such as a handler that failed: slog.Default if nil.
	Logger *slog.Logger
}

// withDefaults returns the options with a value for each, or a *ConfigError.
func (o Options) withDefaults() (Options, error) {
	for name, timeout := range map[string]*time.Duration{"Timeout": &o.Timeout, "ConnectTimeout": &o.ConnectTimeout} {
		if *timeout < 0 {
			return o, configError(fmt.Sprintf("%s: %s is below 0; leave it out for the default", name, *timeout))
		}
	}
	if o.MaxCalls < 0 || o.MaxFrame < 0 || o.MaxFrame > math.MaxInt32 {
		return o, configError("MaxCalls and MaxFrame: a limit is below 0 or above 2 GiB; leave it out for the default")
	}
	if o.MaxConnections < 0 || o.MaxConnections > maxConnections {
		return o, configError(fmt.Sprintf("MaxConnections: %d is not from 1 to %d; leave it out for 1", o.MaxConnections, maxConnections))
	}
	setDefault(&o.MaxConnections, 1)
	setDefault(&o.AddressOrder, RandomOrder)
	if o.AddressOrder != RandomOrder && o.AddressOrder != ListedOrder {
		return o, configError("AddressOrder: it is neither RandomOrder nor ListedOrder; give one of them")
	}
	setDefault(&o.Timeout, DefaultTimeout)
	setDefault(&o.ConnectTimeout, DefaultConnectTimeout)
	setDefault(&o.StartTimeout, DefaultStartTimeout)
	setDefault(&o.MaxCalls, DefaultMaxCalls)
	setDefault(&o.MaxFrame, DefaultMaxFrame)
	setDefault(&o.ClientName, "zcproto-go/"+Version)
	setDefault(&o.Logger, slog.Default())
	return o, nil
}

func setDefault[T comparable](value *T, byDefault T) {
	var zero T
	if *value == zero {
		*value = byDefault
	}
}

func (o *Options) warn(message string) { o.Logger.Warn("zcproto: " + message) }
