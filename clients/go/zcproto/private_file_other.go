//go:build !unix

package zcproto

import (
	"io/fs"
	"os"
)

func openPrivate(path string) (*os.File, error) { return os.Open(path) }

// accessFault returns nothing: access is not a matter of the mode here.
func accessFault(fs.FileInfo) string { return "" }
