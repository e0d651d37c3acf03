package zcproto

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// dialer makes connections: TCP, TLS, WELCOME, and the sts policy of the host.
type dialer struct {
	serverName string // to verify instead of the host; "" for the host
	trust      *trust
	hosts      *knownHosts // nil without a home
	options    *Options
	clock      clock
	owner      *connections
	network    net.Dialer
	resolver   net.Resolver
}

// resolve returns the IP addresses of a name in the order of the system, or a *ConnectError.
func (d *dialer) resolve(ctx context.Context, address address) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, d.options.ConnectTimeout, &ConnectError{Reason: fmt.Sprintf(
		"%s: the name was not resolved within %s; check DNS", address, d.options.ConnectTimeout)})
	defer cancel()
	found, err := d.resolver.LookupNetIP(ctx, "ip", address.host)
	if err != nil {
		return nil, d.cannotConnect(ctx, address, err)
	}
	var ips []netip.Addr
	for _, ip := range found {
		if ip = ip.Unmap(); !slices.Contains(ips, ip) {
			ips = append(ips, ip)
		}
	}
	return ips, nil
}

// dial returns a connection that has received WELCOME; onTCP is called before TLS. It returns a *ConnectError, *ClosedError,
// *TLSError, *CertificateError or *ConfigError.
func (d *dialer) dial(ctx context.Context, endpoint Endpoint, onTCP func()) (*connection, error) {
	serverName := d.serverName
	if serverName == "" {
		serverName = endpoint.Host
	}
	if d.trust.skipVerify && d.hosts != nil {
		for _, host := range []string{endpoint.Host, serverName} {
			if err := d.hosts.require(host, d.seconds()); err != nil {
				return nil, err
			}
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.options.ConnectTimeout, &ConnectError{Reason: fmt.Sprintf(
		"%s: no answer within %s; check the address and the firewall", endpoint.address(), d.options.ConnectTimeout)})
	defer cancel()
	connection, err := d.connect(ctx, endpoint, serverName, onTCP)
	if err != nil {
		return nil, err
	}
	select {
	case <-connection.welcomed:
	case <-connection.ended:
	case <-ctx.Done():
		connection.mu.Lock()
		connection.abort()
		connection.mu.Unlock()
		return nil, context.Cause(ctx)
	}
	connection.mu.Lock()
	failure, isGoingAway, welcome := connection.failure, connection.draining, connection.conv.Welcome()
	connection.mu.Unlock()
	if failure != nil && !isGoingAway {
		return nil, d.explained(failure)
	}
	if !d.trust.skipVerify && d.hosts != nil && welcome != nil {
		policy := stsPolicy{maxAge: int64(welcome.STS.MaxAge.Seconds()), includeSubdomains: welcome.STS.IncludeSubdomains}
		if err := d.hosts.learn(serverName, policy, d.seconds()); err != nil {
			d.options.warn(fmt.Sprintf("the sts policy of %s was not stored: %s", serverName, wire.Escape(err.Error(), maxMessage)))
		}
	}
	return connection, nil
}

func (d *dialer) seconds() int64 { return d.trust.now().Unix() }

func (d *dialer) connect(ctx context.Context, endpoint Endpoint, serverName string, onTCP func()) (*connection, error) {
	config, err := d.trust.config(serverName)
	if err != nil && !d.trust.isCAMissing() {
		return nil, err
	}
	at := netip.AddrPortFrom(endpoint.IP, uint16(endpoint.Port))
	tcp, dialErr := d.network.DialContext(ctx, "tcp", at.String())
	if dialErr != nil {
		return nil, d.cannotConnect(ctx, endpoint.address(), dialErr)
	}
	onTCP()
	if err != nil { // a server that is starting writes its CA before it listens
		if config, err = d.trust.config(serverName); err != nil {
			_ = tcp.Close()
			return nil, err
		}
	}
	link, err := handshake(ctx, tcp, config)
	if err != nil {
		return nil, err
	}
	conv := conversation.New(conversation.Settings{MaxFrame: uint32(d.options.MaxFrame)})
	connection := newConnection(d.owner, d.owner.mu, d.clock, conv, link, endpoint)
	d.owner.mu.Lock()
	d.owner.opened(connection)
	d.owner.mu.Unlock()
	go connection.read()
	return connection, nil
}

func (d *dialer) cannotConnect(ctx context.Context, address address, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var name *net.DNSError
	if errors.As(err, &name) {
		return &ConnectError{Reason: fmt.Sprintf("%s: %s; check the host name and DNS", address, name.Err), Cause: err}
	}
	reason := err.Error()
	var system syscall.Errno
	if errors.As(err, &system) {
		reason = system.Error()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return &ConnectError{Reason: fmt.Sprintf("%s: %s; check the address and the network", address, reason), Cause: err}
	}
	missing := ""
	if d.trust.isCAMissing() {
		missing = ", and " + wire.Escape(d.trust.caFile, maxMessage) + " does not exist"
	}
	return &ConnectError{Refused: true, Cause: err, Reason: fmt.Sprintf(
		"%s: %s%s; start the server, or check the host and the port", address, reason, missing)}
}

// explained explains an end before WELCOME: in TLS 1.3 a server refuses a client certificate only after the handshake, by an
// alert or by a plain close.
func (d *dialer) explained(failure *ClosedError) error {
	var tlsError *TLSError
	if errors.As(failure.Cause, &tlsError) && !isTransient(tlsError.Failure) {
		return tlsError
	}
	if failure.Clean && d.trust.hasCertificate() {
		return &ClosedError{Clean: true, Reason: failure.Reason +
			" before its WELCOME; it may have refused this client's certificate"}
	}
	return failure
}
