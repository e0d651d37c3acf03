// Connects with Go's crypto/tls and prints the first bytes of the server's first frame.
//
//	welcome PORT NAME [CA_FILE]
//
// Without a CA file it trusts the system's authorities. Exit code 3: the handshake failed.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

const (
	headerBytes = 8
	timeout     = 900 * time.Second
	refused     = 3
)

func main() {
	handshake, err := run(os.Args[1:])
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, err)
	if handshake {
		os.Exit(refused)
	}
	os.Exit(1)
}

// run returns whether the handshake failed, and the error.
func run(arguments []string) (bool, error) {
	if len(arguments) < 2 {
		return false, errors.New("usage: welcome PORT NAME [CA_FILE]")
	}
	config := &tls.Config{
		ServerName: arguments[1],
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"zcp/1"},
	}
	if len(arguments) > 2 {
		pem, err := os.ReadFile(arguments[2])
		if err != nil {
			return false, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return false, errors.New("no certificate in " + arguments[2])
		}
	}
	raw, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", arguments[0]), timeout)
	if err != nil {
		return false, err
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(timeout)); err != nil {
		return false, err
	}
	connection := tls.Client(raw, config)
	if err := connection.Handshake(); err != nil {
		return true, err
	}
	if agreed := connection.ConnectionState().NegotiatedProtocol; agreed != "zcp/1" {
		return false, fmt.Errorf("agreed on %q", agreed)
	}
	header := make([]byte, headerBytes)
	if _, err := io.ReadFull(connection, header); err != nil {
		return false, err
	}
	_, err = os.Stdout.Write(header)
	return false, err
}
