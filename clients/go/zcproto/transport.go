package zcproto

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// What is read and discarded after this end has closed.
	lingerTimeout = 2 * time.Second
	lingerBytes   = 4 << 20
	// Encrypted bytes that wait for the network, above which requests wait too.
	maxUnsent = 256 << 10
	readSize  = 16 << 10 // what one TLS record has at most
)

// errTruncated is the end of TCP without close_notify (RFC 8446 section 6.1).
var errTruncated = errors.New("the connection ended without close_notify")

// rawConn is the TCP connection below TLS, with two properties that crypto/tls relies on others for:
//
//   - Read reports the end of TCP as errTruncated. crypto/tls takes a bare end at the border of a record for a clean one, so
//     io.EOF of tls.Conn means close_notify only with this.
//   - Write never blocks: what the system does not take waits in memory, and a goroutine sends it. So no caller waits for a
//     server that does not read. The connection stops sending requests above maxUnsent.
type rawConn struct {
	net.Conn
	tryWrite func(data []byte) int // writes what the system takes at once; nil if that is unknown

	mu        sync.Mutex
	waiting   []byte
	sending   int // bytes in the hands of the goroutine
	isSending bool
	hasFailed bool
	idle      sync.Cond // !isSending
	onSent    func()    // called without locks once all waiting bytes are sent
}

func newRawConn(tcp net.Conn) *rawConn {
	raw := &rawConn{Conn: tcp, tryWrite: writerOf(tcp)}
	raw.idle.L = &raw.mu
	return raw
}

func (c *rawConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n == 0 && err == io.EOF {
		err = errTruncated
	}
	return n, err
}

func (c *rawConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rest := p
	if !c.isSending && !c.hasFailed && c.tryWrite != nil {
		rest = p[c.tryWrite(p):]
	}
	if len(rest) > 0 && !c.hasFailed { // after a failure the reader reports the end
		c.waiting = append(c.waiting, rest...)
		if !c.isSending {
			c.isSending = true
			go c.send()
		}
	}
	return len(p), nil
}

// SetWriteDeadline does nothing: crypto/tls would limit the goroutine that sends.
func (c *rawConn) SetWriteDeadline(time.Time) error { return nil }

func (c *rawConn) SetDeadline(t time.Time) error { return c.Conn.SetReadDeadline(t) }

func (c *rawConn) send() {
	var spare []byte
	c.mu.Lock()
	for len(c.waiting) > 0 {
		data := c.waiting
		c.waiting = spare[:0]
		c.sending = len(data)
		c.mu.Unlock()
		_, err := c.Conn.Write(data)
		spare = data
		c.mu.Lock()
		if err != nil {
			c.hasFailed = true
			c.waiting = nil
		}
	}
	c.isSending = false
	c.sending = 0
	c.waiting = nil // a burst must not keep its memory
	c.idle.Broadcast()
	onSent := c.onSent
	c.mu.Unlock()
	if onSent != nil {
		onSent()
	}
}

// unsent returns how many bytes wait for the network.
func (c *rawConn) unsent() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting) + c.sending
}

// flushed waits until nothing waits for the network.
func (c *rawConn) flushed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.isSending {
		c.idle.Wait()
	}
}

// byteStream carries the frames of one connection: TLS, or a pipe of a test.
type byteStream interface {
	// read returns io.EOF after close_notify, a *TLSError for any other end.
	read(p []byte) (int, error)
	// write never blocks. An error is reported by read.
	write(data []byte)
	unsent() int
	// onSent calls then, without locks, whenever all bytes are sent that had to wait.
	onSent(then func())
	// leafHash returns the SHA-256 of the server's certificate in DER.
	leafHash() [32]byte
	// shut sends close_notify. What the server still sends is read and discarded, for 2 s or 4 MiB at most.
	shut()
	// reset ends the connection like a network failure.
	reset()
	// release closes the socket, once it was read to its end.
	release()
}

// tlsStream is the byteStream of a real connection.
type tlsStream struct {
	raw  *rawConn
	tls  *tls.Conn
	leaf [32]byte
}

// handshake performs TLS and verifies the server: before that, nothing but the ClientHello was sent.
func handshake(ctx context.Context, tcp net.Conn, config *tls.Config) (*tlsStream, error) {
	raw := newRawConn(tcp)
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.flushed() // the alert
		_ = tcp.Close()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, tlsFailureOf(err, false)
	}
	leaf := sha256.Sum256(conn.ConnectionState().PeerCertificates[0].Raw)
	return &tlsStream{raw: raw, tls: conn, leaf: leaf}, nil
}

func (s *tlsStream) read(p []byte) (int, error) {
	n, err := s.tls.Read(p)
	if err != nil && err != io.EOF {
		err = tlsFailureOf(err, true)
	}
	return n, err
}

func (s *tlsStream) write(data []byte) { _, _ = s.tls.Write(data) }

func (s *tlsStream) unsent() int { return s.raw.unsent() }

func (s *tlsStream) onSent(then func()) {
	s.raw.mu.Lock()
	defer s.raw.mu.Unlock()
	s.raw.onSent = then
}

func (s *tlsStream) leafHash() [32]byte { return s.leaf }

func (s *tlsStream) shut() {
	_ = s.tls.CloseWrite()
	_ = s.raw.Conn.SetReadDeadline(time.Now().Add(lingerTimeout))
}

func (s *tlsStream) reset() {
	if tcp, ok := s.raw.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = s.raw.Conn.Close()
}

func (s *tlsStream) release() {
	_ = s.raw.Conn.SetWriteDeadline(time.Now().Add(lingerTimeout))
	s.raw.flushed()
	_ = s.raw.Conn.Close()
}
