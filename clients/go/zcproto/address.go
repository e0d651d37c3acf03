package zcproto

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// DefaultPort is the port of an address without one.
const DefaultPort = 7443

const maxName = 253 // RFC 1035 section 2.3.4

var (
	labelPattern  = regexp.MustCompile(`^[a-z0-9_-]{1,63}$`)
	portPattern   = regexp.MustCompile(`^[0-9]{1,5}$`)
	numberPattern = regexp.MustCompile(`^[0-9]+$`)
)

// address is a host, which is an IP address or a name in lower case, and a port.
type address struct {
	host string
	port int
}

func (a address) String() string { return net.JoinHostPort(a.host, strconv.Itoa(a.port)) }

func isIP(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// parseAddress parses "host", "host:port", "::1" or "[::1]:port". It returns a ConfigError.
func parseAddress(text string) (address, error) {
	fault := func(what string) (address, error) {
		return address{}, configError(fmt.Sprintf("%q: %s", wire.Escape(text, 120), what))
	}
	host, port := text, ""
	hasPort := false
	switch {
	case strings.HasPrefix(text, "["):
		inner, rest, found := strings.Cut(text[1:], "]")
		if addr, err := netip.ParseAddr(inner); !found || err != nil || !addr.Is6() || rest != "" && rest[0] != ':' {
			return fault("write an IPv6 address with a port as [::1]:7443")
		}
		host = inner
		if rest != "" {
			port, hasPort = rest[1:], true
		}
	case strings.Count(text, ":") > 1:
		if addr, err := netip.ParseAddr(text); err != nil || !addr.Is6() {
			return fault("write HOST:PORT, or [ADDRESS]:PORT for IPv6")
		}
	default:
		host, port, hasPort = strings.Cut(text, ":")
	}
	number := DefaultPort
	if hasPort {
		number = 0
		if portPattern.MatchString(port) {
			number, _ = strconv.Atoi(port)
		}
	}
	if number < 1 || number > 65_535 {
		return fault("the port must be a number from 1 to 65535")
	}
	if isIP(host) {
		return address{host: strings.ToLower(host), port: number}, nil
	}
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if !labelPattern.MatchString(label) {
			return fault("not a host name or an IP address; write an international name in its xn-- form")
		}
	}
	// A name that ends in a number would be resolved as an IPv4 address.
	if len(name) > maxName || numberPattern.MatchString(labels[len(labels)-1]) {
		return fault("not a host name or an IP address")
	}
	return address{host: name, port: number}, nil
}

// parseAddresses parses addresses that are separated by commas, without duplicates. It returns a ConfigError.
func parseAddresses(text string) ([]address, error) {
	var addresses []address
	for _, part := range strings.Split(text, ",") {
		parsed, err := parseAddress(strings.TrimSpace(part))
		if err != nil {
			return nil, err
		}
		if !slices.Contains(addresses, parsed) {
			addresses = append(addresses, parsed)
		}
	}
	if len(addresses) > maxAddresses {
		return nil, configError(fmt.Sprintf("%d addresses: at most %d are allowed; remove some", len(addresses), maxAddresses))
	}
	return addresses, nil
}

// joinAddresses is the inverse of parseAddresses.
func joinAddresses(addresses []address) string {
	var texts []string
	for _, address := range addresses {
		texts = append(texts, address.String())
	}
	return strings.Join(texts, ",")
}
