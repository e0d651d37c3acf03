//go:build grpc && unix

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"regexp"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func init() {
	peers = append(peers, peer{"grpc-go " + grpc.Version, startGRPC})
	commands["serve-grpc"] = serveGRPC
}

const echo = "/bench.Echo/Echo"

// serveGRPC serves echo in a process of its own, and prints its port. Its certificate is in the file named by the argument.
func serveGRPC() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(os.Args[2], text, 0o600); err != nil {
		return err
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	})))
	handler := func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		var message wrapperspb.StringValue
		return &message, decode(&message)
	}
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "bench.Echo",
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Echo", Handler: handler}},
	}, struct{}{})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("listening on port %d\n", listener.Addr().(*net.TCPAddr).Port)
	return server.Serve(listener)
}

func startGRPC(ctx context.Context) (call func() error, stop func(), err error) {
	file, err := os.CreateTemp("", "grpc-bench-")
	if err != nil {
		return nil, nil, err
	}
	server := exec.Command(os.Args[0], "serve-grpc", file.Name())
	port, err := startServer(server, regexp.MustCompile(`listening on port (\d+)`))
	if err != nil {
		return nil, nil, err
	}
	trusted, err := credentials.NewClientTLSFromFile(file.Name(), "localhost")
	if err != nil {
		return nil, nil, err
	}
	client, err := grpc.NewClient("localhost:"+port, grpc.WithTransportCredentials(trusted))
	if err != nil {
		return nil, nil, err
	}
	call = func() error {
		limited, cancel := context.WithTimeout(ctx, 30*time.Second) // as the other client does by default
		defer cancel()
		var answer wrapperspb.StringValue
		err := client.Invoke(limited, echo, wrapperspb.String("hello"), &answer)
		if err == nil && answer.Value != "hello" {
			err = fmt.Errorf("got %q", answer.Value)
		}
		return err
	}
	stop = func() {
		_ = client.Close()
		_ = server.Process.Kill()
		_ = server.Wait()
		_ = os.Remove(file.Name())
	}
	return call, stop, nil
}
