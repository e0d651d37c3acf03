package zcproto

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const maxKeyFile = 65_536

// readPrivate reads a file that only this user can access. It checks the opened file, not the path.
func readPrivate(path string) ([]byte, error) {
	file, err := openPrivate(path)
	if err != nil {
		return nil, unusable(path, "cannot be read: "+reasonOf(err)+"; check the path", err)
	}
	defer file.Close()
	status, err := file.Stat()
	switch {
	case err != nil:
		return nil, unusable(path, "cannot be read: "+reasonOf(err)+"; check the path", err)
	case !status.Mode().IsRegular():
		return nil, unusable(path, "is not a regular file; check the path", nil)
	case status.Size() > maxKeyFile:
		return nil, unusable(path, "is too large for a key; check the path", nil)
	}
	if what := accessFault(status); what != "" {
		return nil, unusable(path, what, nil)
	}
	content, err := io.ReadAll(io.LimitReader(file, maxKeyFile))
	if err != nil {
		return nil, unusable(path, "cannot be read: "+reasonOf(err)+"; check the path", err)
	}
	return content, nil
}

// writePrivate writes a new file of mode 0600 and flushes it to disk.
func writePrivate(path string, content []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return unusable(path, "already exists; load it, or use another path", err)
	}
	if err == nil {
		_, err = file.Write(content)
		if err == nil {
			err = file.Sync()
		}
		if closeErr := file.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			_ = os.Remove(path) // incomplete
		}
	}
	if err != nil {
		return unusable(path, "cannot be written: "+reasonOf(err)+"; check the path", err)
	}
	return nil
}

func unusable(path, what string, cause error) error {
	return &CertificateError{Message: wire.Escape(path, maxMessage) + ": " + what, Cause: cause}
}

// reasonOf returns the system's reason, without the path that the message names already.
func reasonOf(err error) string {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		err = pathError.Err
	}
	return err.Error()
}

func modeFault(mode fs.FileMode) string {
	if mode.Perm()&0o077 == 0 {
		return ""
	}
	return fmt.Sprintf("is accessible by other users (mode %04o); run chmod 600 on it, or create a new key if another user"+
		" may have read it", mode.Perm())
}
