//go:build !unix

package zcproto

import (
	"io/fs"
	"net"
	"os"
)

// writerOf returns nil: a goroutine sends everything.
func writerOf(net.Conn) func(data []byte) int { return nil }

func openPrivate(path string) (*os.File, error) { return os.Open(path) }

// accessFault returns nothing: access is not a matter of the mode here.
func accessFault(fs.FileInfo) string { return "" }
